"""fid.py: the network, the resize, the scores' closed forms, and what it reads and refuses."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import rae as R
from fid import (
    Inception,
    InceptionFeatures,
    extract_features,
    frechet_distance,
    inception_score,
    load_statistics,
    mean_and_covariance,
    open_images,
    precision_recall,
    preprocess,
    read_image,
    read_npz,
    resize_last,
)
from tests.conftest import ROOT, launch, load, photographs, relative_gap, save_images


def sha(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_inception_has_the_published_names_and_shapes(inception_file):
    state = Inception(load(inception_file)).net.state_dict()
    names = sorted(name for name in state if not name.endswith("num_batches_tracked"))
    shapes = [f"{name} {tuple(state[name].shape)}" for name in names]
    assert len(names) == 472
    assert sha(names) == "ed87dd0f166ade6855a6d284ee17fb1bc768f59db1b37c53afed23d5c199e182"
    assert sha(shapes) == "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"


def test_resize_is_tensorflow_1s():
    x = torch.tensor([[[[0.0, 10], [20, 30]]]])
    want = [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]
    assert resize_last(resize_last(x, 4).mT, 4).mT[0, 0].tolist() == want


def test_preprocessing_modes():
    """Images of 299 px are not resized in either mode; the ranges differ."""
    x = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(preprocess(x, "adm"), (x.float() - 128) / 128)
    assert (preprocess(x, "pytorch-fid") - (x.float() / 127.5 - 1)).abs().max() < 1e-6

    ramp = torch.arange(0, 256, 8).expand(1, 3, 32, 32)  # rising by 8 from pixel to pixel
    where = torch.arange(299) * 32 / 299
    adm = 8 * where.clamp(max=31)
    assert (preprocess(ramp, "adm") * 128 + 128 - adm).abs().max() < 1e-3
    centers = 8 * ((torch.arange(299) + 0.5) * 32 / 299 - 0.5).clamp(0, 31)
    assert ((preprocess(ramp, "pytorch-fid") + 1) * 127.5 - centers).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------
# The scores


def test_mean_and_covariance():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(2500, 7)) + 3).astype(np.float32)
    double = features.astype(np.float64)
    for given in (features, torch.from_numpy(features)):
        mu, sigma = mean_and_covariance(given)
        assert mu.dtype == sigma.dtype == np.float64
        assert np.allclose(mu, double.mean(0), rtol=1e-12)
        assert np.allclose(sigma, np.cov(double.T), rtol=1e-9)


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    d = 6
    mu1 = rng.normal(size=d)
    mu2 = rng.normal(size=d)
    s1 = rng.random(d) + 0.1
    s2 = rng.random(d) + 0.1
    closed = np.square(mu1 - mu2).sum() + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    got = frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2))
    assert got == pytest.approx(closed, rel=1e-9)
    assert isinstance(got, float), "a Python number, and a real one"

    # Turning both sides alike changes nothing.
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    sigma1 = turn @ np.diag(s1) @ turn.T
    sigma2 = turn @ np.diag(s2) @ turn.T
    got = frechet_distance(turn @ mu1, sigma1, turn @ mu2, sigma2)
    assert got == pytest.approx(closed, rel=1e-9)

    mu, sigma = mean_and_covariance(rng.normal(size=(20, d)))
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-6

    # Two covariances that do not commute: for 2 x 2 the root's trace has a closed form.
    a = np.array([[2.0, 1.0], [1.0, 3.0]])
    b = np.array([[4.0, -1.0], [-1.0, 0.5]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    zero = np.zeros(2)
    got = frechet_distance(zero, a, zero, b)
    assert got == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)

    # Fewer images than features: the root's trace is the sum of these singular values.
    x = rng.normal(size=(5, 40))
    y = rng.normal(size=(7, 40))
    (mu1, sigma1), (mu2, sigma2) = mean_and_covariance(x), mean_and_covariance(y)
    product = (x - mu1) @ (y - mu2).T / np.sqrt(4 * 6)
    root = np.linalg.svd(product, compute_uv=False).sum()
    closed = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(closed, rel=1e-4)


def test_inception_score_closed_forms():
    uniform = torch.zeros(16, 1008)
    assert inception_score(uniform) == pytest.approx(1)
    one_hot = 1000 * torch.eye(1008)[torch.arange(16) % 8]
    assert inception_score(one_hot) == pytest.approx(8)
    # 5,000 images of one class, then 8 of eight: the mean over the two chunks.
    chunks = torch.cat([one_hot[:1].expand(5000, -1), one_hot[:8]])
    assert inception_score(chunks) == pytest.approx((1 + 8) / 2)


def squared_distances(x, y):
    return ((x[:, None].astype(np.float64) - y) ** 2).sum(2)


@pytest.mark.parametrize("mean", [0, 3000])  # norms much larger than the distances
def test_precision_recall_by_definition(mean):
    """More images than the 500 that are compared at once."""
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(1100, 5)) + mean).astype(np.float32)
    b = (rng.normal(size=(700, 5)) + mean + 1.2).astype(np.float32)
    d = squared_distances(a, b)
    radius_a = np.sort(squared_distances(a, a), 1)[:, 3]
    radius_b = np.sort(squared_distances(b, b), 1)[:, 3]
    precision = (d <= radius_b).any(1).mean()
    recall = (d <= radius_a[:, None]).any(0).mean()
    assert 0.2 < precision < 1 and 0.2 < recall < 1
    got = precision_recall(torch.from_numpy(a), torch.from_numpy(b))
    assert got == pytest.approx((precision, recall))


class Pixels:
    """Features that are pixels: 20 for FID, 5 for sFID."""

    label = "pixels"
    dims = (20, 5)

    def __init__(self, most=100):
        self.most = most

    def __call__(self, images):
        assert len(images) <= self.most
        x = torch.stack(images).flatten(1).float()
        return x[:, :20], x[:, 20:25]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_features_are_of_all_images_in_their_order(tmp_path, batch_size):
    save_images(tmp_path / "a" / "b", 9, size=(8, 8))
    save_images(tmp_path / "c", 3, size=(8, 8), mode="L", suffix=".PNG", seed=4)
    paths = open_images(str(tmp_path), {})
    assert len(paths) == 12
    want = torch.stack([read_image(path, None).flatten()[:25].float() for path in paths])
    pool3, spatial = extract_features(paths, Pixels(batch_size), None, batch_size, "cpu")
    assert torch.equal(pool3, want[:, :20])
    assert torch.equal(spatial, want[:, 20:])

    args = SimpleNamespace(crop=None, save=None, batch_size=batch_size)
    side = load_statistics(str(tmp_path), ["fid", "sfid", "pr"], Pixels(), args, "cpu")
    assert (side["n"], side["size"], side["label"]) == (12, "8x8", "pixels")
    assert torch.equal(side["pr"], want[:, :20])
    want = want.double().numpy()
    for metric, part in (("fid", want[:, :20]), ("sfid", want[:, 20:])):
        mu, sigma = side[metric]
        assert np.allclose(mu, part.mean(0), rtol=1e-12)
        assert np.allclose(sigma, np.cov(part.T), rtol=1e-9)


def test_images_of_an_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), arr_0=pixels, settings="x")
    np.savez_compressed(tmp_path / "b.npz", mu=np.zeros(3), arr_0=pixels)
    for name in ("a.npz", "b.npz"):
        path = str(tmp_path / name)
        images = open_images(path, read_npz(path))
        assert np.array_equal(images, pixels)
        assert np.array_equal(read_image(images[3], None), pixels[3].transpose(2, 0, 1))


# ---------------------------------------------------------------------------------------------
# Against pytorch-fid and torch-fidelity


@torch.no_grad()
def test_features_equal_the_peers(inception_file, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception", reason="pip install pytorch-fid")
    fidelity = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity"
    )
    images = photographs("imagenette/val", 4, 224)
    ours = Inception(load(inception_file))
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *a, **k: load(inception_file))
    pytorch_fid = peer.InceptionV3([3]).eval()
    torch_fidelity = fidelity.FeatureExtractorInceptionV3(
        "net", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    ).eval()
    seen = []
    torch_fidelity.Mixed_6d.register_forward_hook(lambda module, x, y: seen.append(y))
    for x in images.split(2):
        their_pool3, their_logits = torch_fidelity(x)
        pool3, spatial = ours(preprocess(x, "adm"))
        assert relative_gap(pool3, their_pool3) <= 1e-6
        assert relative_gap(ours.logits(pool3), their_logits) <= 1e-6
        their_spatial = seen.pop()[:, :7].permute(0, 2, 3, 1).reshape(len(x), -1)
        assert spatial.shape == (2, 2023)
        assert relative_gap(spatial, their_spatial) <= 1e-6
        pool3 = ours(preprocess(x, "pytorch-fid"))[0]
        assert relative_gap(pool3, pytorch_fid(x.float() / 255)[0].flatten(1)) <= 1e-6
    both = InceptionFeatures(inception_file, "adm", "cpu")(list(x))
    for got, want in zip(both, ours(preprocess(x, "adm"))):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_scores_equal_the_peers(inception_file):
    """Fewer images than features, and more: only 64 features are compared, since the peers' roots
    of 2,048 x 2,048 matrices take minutes.
    """
    pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason="pip install pytorch-fid")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    images = photographs("imagenette", 120, 160)
    net = Inception(load(inception_file))
    with torch.no_grad():
        pool3 = torch.cat([net(preprocess(x, "adm"))[0] for x in images.split(40)])
    pool3 = pool3[torch.randperm(120)]
    for n in (40, 90):
        a, b = pool3[:n], pool3[-n:]
        few_a, few_b = a[:, :64], b[:, :64]
        gaussian = mean_and_covariance(few_a)
        ours = frechet_distance(*gaussian, *mean_and_covariance(few_b))
        theirs = fid_statistics_to_metric(
            fid_features_to_statistics(few_a), fid_features_to_statistics(few_b), verbose=False
        )["frechet_inception_distance"]
        a64, b64 = few_a.double().numpy(), few_b.double().numpy()
        others = fid_score.calculate_frechet_distance(
            a64.mean(0), np.cov(a64.T), b64.mean(0), np.cov(b64.T)
        )
        assert n < 64 or abs(frechet_distance(*gaussian, *gaussian)) < 1e-6
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert ours == pytest.approx(others, rel=1e-6)

        logits = net.logits(a)
        theirs = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
        assert inception_score(logits) == pytest.approx(theirs, rel=1e-6)
        theirs = calculate_precision_recall_full(a.double(), b.double())
        assert precision_recall(a, b) == pytest.approx(theirs, abs=1e-6)  # theirs: a float32 mean


# ---------------------------------------------------------------------------------------------
# The command line


NAMES = "FID|sFID|IS|precision|recall|Frechet distance"


def scores_of(said):
    """The numbers that fid.py printed: {"FID": 12.3456, ...}."""
    return {name: float(x) for name, x in re.findall(rf"\b({NAMES}) (-?[\d.]+)", said)}


@pytest.fixture
def sides(tmp_path):
    """Two small folders of images, a and b, in the folder where `run` runs."""
    save_images(tmp_path / "a", 7, size=(32, 32), seed=1)
    save_images(tmp_path / "b", 6, size=(32, 32), seed=2)


TOY = "--features encoder:toy"


def test_toy_distance_and_its_statistics(run, sides):
    """Without a download: from folders, .npz files, and saved statistics, the same number."""
    said = run("fid.py", f"a b {TOY}")
    want = scores_of(said)
    assert want.keys() == {"Frechet distance"}
    assert re.search(r"\(7 samples, reference b, encoder toy [0-9a-f]{16}\)\n$", said)

    encoder = R.load_encoder("toy", 32)
    gaussians = []
    for side in ("a", "b"):
        images = torch.stack([read_image(path, None) for path in R.list_images(side)])
        gaussians += mean_and_covariance(encoder(images.float() / 255).mean(1))
        pixels = images.permute(0, 2, 3, 1).numpy()
        np.savez(f"images_{side}.npz", arr_0=pixels)
        said = run("fid.py", f"{side} {TOY} --save {side}.npz --batch-size 4")
        assert f"wrote {side}.npz: {len(images)} images, 32x32, encoder toy " in said
    assert want["Frechet distance"] == pytest.approx(frechet_distance(*gaussians), rel=1e-4)
    for files in ("a b.npz", "a.npz b.npz", "images_a.npz images_b.npz", "a.npz b"):
        assert scores_of(run("fid.py", f"{files} {TOY}")) == pytest.approx(want, rel=1e-4), files
    assert abs(scores_of(run("fid.py", f"a a.npz {TOY}"))["Frechet distance"]) < 1e-3

    np.savez("both.npz", arr_0=pixels, mu=np.zeros(4), sigma=np.eye(4))  # of other features
    run("fid.py", f"both.npz {TOY} --save again")  # computes them anew
    assert np.allclose(np.load("again.npz")["mu"], np.load("b.npz")["mu"], rtol=1e-4)
    # Without flags: against the toy's validation images.
    said = run("fid.py", "a")
    assert "reference toy, encoder toy " in said
    assert said == run("fid.py", f"a toy {TOY}")


def test_samples_are_scored(trained):
    """What sample.py writes: a folder and an .npz of the same images."""
    trained("sample.py", "--out s")
    folder = trained("fid.py", "s")
    assert "(20 samples," in folder
    assert scores_of(folder) == scores_of(trained("fid.py", "s.npz"))


ALL = "--metrics fid,sfid,is,pr --batch-size 4"


@pytest.mark.slow
def test_saved_statistics_give_the_same_numbers(run, sides, inception_file):
    weights = f"--weights {inception_file}"

    def scores(flags):
        return scores_of(run("fid.py", f"{flags} {weights}"))

    said = run("fid.py", f"a b {ALL} {weights}")
    want = scores_of(said)
    assert want.keys() == {"FID", "sFID", "IS", "precision", "recall"}
    assert "only 7 samples" in said
    assert "(7 samples, reference b, adm, inception " in said
    for side in ("a", "b"):
        said = run("fid.py", f"{side} --save {side}.npz --batch-size 4 {weights}")
        assert "32x32, adm, inception " in said
    got = scores("a.npz b.npz --metrics fid,sfid")
    assert got == {name: want[name] for name in ("FID", "sFID")}
    same = scores("a a.npz --batch-size 4")
    assert abs(same["FID"]) < 1e-5 * want["FID"], "7 images: most eigenvalues are rounding errors"
    assert scores("a b --metrics is --batch-size 4") == {"IS": want["IS"]}

    # Like ADM's file, which holds both: statistics for FID and sFID, images for precision and
    # recall. It records no label.
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(Path("b").glob("*.png"))])
    kept = np.load("b.npz")
    arrays = {name: kept[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez("virtual.npz", arr_0=pixels, **arrays)
    said = run("fid.py", f"a virtual.npz {ALL} {weights}")
    assert scores_of(said) == want
    assert "virtual.npz does not " in said and "assuming adm, inception " in said

    # The other preprocessing gives another number, and may not be mixed.
    said = run("fid.py", f"a b {weights} --mode pytorch-fid")
    assert scores_of(said)["FID"] != want["FID"]
    assert "pytorch-fid, inception " in said
    with pytest.raises(SystemExit, match="a is pytorch-fid, .*b.npz is adm"):
        run("fid.py", f"a b.npz {weights} --mode pytorch-fid")

    # Images of any size are resized one by one.
    save_images(Path("uneven"), 2, size=(40, 32))
    save_images(Path("uneven/more"), 2, size=(36, 36))
    run("fid.py", f"uneven uneven {weights} --metrics pr")


MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import fid

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

features = torch.rand(20000, int(sys.argv[3]))
before = peak()
if sys.argv[2] == "fid":
    fid.mean_and_covariance(features)
else:
    fid.precision_recall(features[:10000], features[10000:])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("metric, width, most", [("fid", 2048, 0.8e9), ("pr", 256, 0.4e9)])
def test_memory_for_many_images(tmp_path, metric, width, most):
    """A few copies of the features (164 and 20 MB) in float64, and no matrix of all pairs."""
    (tmp_path / "memory.py").write_text(MEMORY)
    used = int(launch(tmp_path / "memory.py", f"{ROOT} {metric} {width}"))
    print(f"{used / 1e9:.2f} GB")
    assert used < most
