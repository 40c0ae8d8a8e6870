"""fid.py: the network, the resize, the scores' closed forms, and what it reads and refuses."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_rae import save_images

import rae as R
from fid import (
    EncoderFeatures,
    Inception,
    InceptionFeatures,
    download_weights,
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
from rae import UsageError

DATA = ROOT.parent / "shared" / "data"


# ---------------------------------------------------------------------------------------------
# The network and its input


def sha(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module")
def random_state():
    """Random weights of the network, under its published names."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("inception_v3", num_classes=1008, aux_logits=False).state_dict()


def test_inception_has_the_published_names_and_shapes(random_state):
    shapes = {}
    for name, tensor in Inception(random_state).net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            shapes[name] = tuple(tensor.shape)
    names = sorted(shapes)
    assert len(names) == 472
    assert sha(names) == "ed87dd0f166ade6855a6d284ee17fb1bc768f59db1b37c53afed23d5c199e182"
    assert (
        sha([f"{name} {shapes[name]}" for name in names])
        == "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"
    )


class FunctionalWithOurPools:
    """torch.nn.functional for torchvision's blocks, which call avg_pool2d nine times a forward.

    8 of them (Mixed_5b to 5d, 6b to 6e and 7b) become averages without the padding, the ninth
    (Mixed_7c) a maximum.
    """

    def __init__(self):
        self.pools = 0

    def __getattr__(self, name):
        return getattr(torch.nn.functional, name)

    def avg_pool2d(self, x, **options):
        self.pools += 1
        if self.pools == 9:
            return torch.nn.functional.max_pool2d(x, 3, 1, 1)
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def test_inception_against_torchvision(random_state, monkeypatch):
    """The same weights in torchvision's network, with the pools that differ patched in."""
    from torchvision.models import inception

    ours = Inception(random_state)
    theirs = inception.Inception3(
        num_classes=1008, aux_logits=False, init_weights=False, transform_input=False
    ).eval()
    theirs.load_state_dict(random_state)
    theirs.fc = torch.nn.Identity()
    functional = FunctionalWithOurPools()
    monkeypatch.setattr(inception, "F", functional)
    x = torch.randn(2, 3, 299, 299)
    with torch.no_grad():
        want = theirs(x)
        pool3, spatial = ours(x)
    assert functional.pools == 9
    assert spatial.shape == (2, 2023)
    assert (pool3 - want).abs().max() < 1e-5 * want.abs().max()


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
    assert inception_score(one_hot.numpy()) == pytest.approx(8)
    # 5,000 images of one class, then 8 of eight: the mean over the two chunks.
    chunks = torch.cat([one_hot[:1].expand(5000, -1), one_hot[:8]])
    assert inception_score(chunks) == pytest.approx((1 + 8) / 2)


def squared_distances(x, y):
    difference = x[:, None].astype(np.float64) - y
    return (difference**2).sum(2)


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


def test_precision_recall_of_tiny_sets():
    """Fewer than three neighbors: a ball reaches to the farthest image of its set."""
    a = torch.tensor([[0.0], [1.0]])
    b = torch.tensor([[-0.9], [5.0]])
    assert precision_recall(a, b) == (1, 0.5)


# ---------------------------------------------------------------------------------------------
# The images


def arguments(**changed):
    defaults = {"num": None, "crop": None, "save": None, "batch_size": 64}
    return SimpleNamespace(**(defaults | changed))


class Pixels:
    """Features that are pixels: 20 for FID, 5 for sFID."""

    label = "pixels"

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
    paths = open_images(str(tmp_path), {}, None)
    assert len(paths) == 12
    want = torch.stack([read_image(path, None).flatten()[:25].float() for path in paths])
    pool3, spatial = extract_features(paths, Pixels(batch_size), None, batch_size, "cpu")
    assert torch.equal(pool3, want[:, :20])
    assert torch.equal(spatial, want[:, 20:])

    args = arguments(batch_size=batch_size)
    side = load_statistics(str(tmp_path), ["fid", "sfid", "pr"], Pixels(), args, "cpu")
    assert (side["n"], side["size"], side["label"]) == (12, "8x8", "pixels")
    assert torch.equal(side["pool3"], want[:, :20])
    want = want.double().numpy()
    assert np.allclose(side["mu"], want[:, :20].mean(0), rtol=1e-12)
    assert np.allclose(side["sigma"], np.cov(want[:, :20].T), rtol=1e-9)
    assert np.allclose(side["mu_s"], want[:, 20:].mean(0), rtol=1e-12)
    assert np.allclose(side["sigma_s"], np.cov(want[:, 20:].T), rtol=1e-9)


def test_every_kind_of_image_is_read(tmp_path, capsys):
    kinds = [("RGB", ".PNG"), ("L", ".JPEG"), ("P", ".png"), ("RGBA", ".webp"), ("1", ".bmp")]
    for mode, suffix in kinds:
        save_images(tmp_path / "deep" / mode, 1, size=(10, 8), mode=mode, suffix=suffix)
    (tmp_path / "deep" / "settings.json").write_text("{}")
    images = open_images(str(tmp_path), {}, None)
    assert len(images) == 5
    assert "skipped 1 files that are not images" in capsys.readouterr().out
    for image in images:
        assert read_image(image, None).shape == (3, 8, 10)
        assert read_image(image, None).dtype == torch.uint8
        assert read_image(image, 4).shape == (3, 4, 4)
    assert open_images(str(tmp_path), {}, 3) == images[:3]


def test_images_of_an_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), arr_0=pixels, settings="x")
    np.savez_compressed(tmp_path / "b.npz", mu=np.zeros(3), arr_0=pixels)
    for name in ("a.npz", "b.npz"):
        path = str(tmp_path / name)
        images = open_images(path, read_npz(path), None)
        assert np.array_equal(images, pixels)
        assert torch.equal(
            read_image(images[3], None), torch.from_numpy(pixels[3].transpose(2, 0, 1))
        )
        assert len(open_images(path, read_npz(path), 3)) == 3


def test_bad_arrays(tmp_path):
    path = str(tmp_path / "bad.npz")
    cases = [
        ({"arr_0": np.zeros((4, 8, 8, 3))}, "bad.npz: has no images .*uint8"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "bad.npz: has no images .*uint8"),
        ({"x": np.zeros(3)}, "bad.npz: has no images .*uint8"),
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "bad.npz: needs at least two images"),
        ({"arr_0": np.array([print], dtype=object)}, "bad.npz: not a readable"),  # would run code
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(UsageError, match=message):
            open_images(path, read_npz(path), None)
    with pytest.raises(UsageError, match="none.npz: no such file"):
        read_npz(str(tmp_path / "none.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, arr_0=np.random.default_rng(0).integers(256, size=(8, 32, 32, 3), dtype=np.uint8))
    whole = path.read_bytes()
    for content in (
        whole[:-200],
        whole[:2000],
        whole[:5000] + bytes(4000) + whole[9000:],
        b"hello",
        b"",
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="a.npz: not a readable .npz"):
            read_npz(str(path))


# ---------------------------------------------------------------------------------------------
# Against the peers, on real photographs


def photographs(folder, n, size):
    """n photographs from all over a folder of shared/data, (n, 3, size, size)."""
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs the photographs of {folder} beside the repository")
    paths = R.list_images(DATA / folder)
    chosen = np.linspace(0, len(paths) - 1, n).astype(int)
    return torch.stack([read_image(paths[i], size) for i in chosen])


@pytest.fixture(scope="module")
def inception_file(random_state, tmp_path_factory):
    """Random weights whose features neither vanish nor explode.

    The batch norms have the statistics of one batch of images: photographs, if there are any.
    """
    net = Inception(random_state)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average: the statistics of the one batch
    if (DATA / "imagenette" / "val").is_dir():
        images = photographs("imagenette/val", 8, 224)
    else:
        images = torch.randint(0, 256, (8, 3, 64, 64))
    with torch.no_grad():
        net.train()(preprocess(images, "adm"))
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.save(net.net.state_dict(), path)
    return path


def load(path):
    return Inception(R.load(path))


def assert_close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def torch_fidelity_net(inception_file, layers):
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity"
    )
    net = module.FeatureExtractorInceptionV3(
        "net", layers, feature_extractor_weights_path=str(inception_file)
    )
    return net.eval()


def pytorch_fid_net(inception_file, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception", reason="pip install pytorch-fid")
    state = torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *args, **options: state)
    return peer.InceptionV3([3]).eval()


@pytest.mark.slow
@torch.no_grad()
def test_features_equal_the_peers(inception_file, monkeypatch):
    images = photographs("imagenette/val", 64, 224)
    ours = load(inception_file)
    fidelity = torch_fidelity_net(inception_file, ["2048", "logits_unbiased"])
    seen = []
    fidelity.Mixed_6d.register_forward_hook(lambda module, x, y: seen.append(y))
    pytorch_fid = pytorch_fid_net(inception_file, monkeypatch)
    for x in images.split(16):
        their_pool3, their_logits = fidelity(x)
        pool3, spatial = ours(preprocess(x, "adm"))
        assert_close(pool3, their_pool3)
        assert_close(ours.logits(pool3), their_logits)
        assert spatial.shape == (16, 2023)
        assert_close(spatial, seen.pop()[:, :7].permute(0, 2, 3, 1).reshape(len(x), -1))
        pool3 = ours(preprocess(x, "pytorch-fid"))[0]
        assert_close(pool3, pytorch_fid(x.float() / 255)[0].flatten(1))
    both = InceptionFeatures(inception_file, "adm", "cpu")(list(x))
    for got, want in zip(both, ours(preprocess(x, "adm"))):
        assert torch.equal(got, want)


def two_sides(inception_file, folder, n, total, size):
    """pool3 of `total` shuffled photographs: of the first n and of the last n, (n, 2048) each."""
    images = photographs(folder, total, size)
    net = load(inception_file)
    with torch.no_grad():
        pool3 = torch.cat([net(preprocess(x, "adm"))[0] for x in images.split(50)])
    pool3 = pool3[torch.randperm(total, generator=torch.Generator().manual_seed(0))]
    return pool3[:n], pool3[-n:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, n, total, size, width",
    [("imagenette", 400, 800, 224, 512), ("cifar10", 600, 800, 32, 512)],
)
def test_scores_equal_the_peers(inception_file, folder, n, total, size, width):
    """Fewer images than features, and more. Only 512 features are compared: the peers' roots of
    2,048 x 2,048 matrices take minutes.
    """
    pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason="pip install pytorch-fid")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = two_sides(inception_file, folder, n, total, size)
    some_a = a[:, :width]
    some_b = b[:, :width]
    mu_a, sigma_a = mean_and_covariance(some_a)
    mu_b, sigma_b = mean_and_covariance(some_b)
    ours = frechet_distance(mu_a, sigma_a, mu_b, sigma_b)
    same = frechet_distance(mu_a, sigma_a, mu_a, sigma_a)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(some_a), fid_features_to_statistics(some_b), verbose=False
    )["frechet_inception_distance"]
    a64 = some_a.double().numpy()
    b64 = some_b.double().numpy()
    others = fid_score.calculate_frechet_distance(
        a64.mean(0), np.cov(a64.T), b64.mean(0), np.cov(b64.T)
    )
    print(folder, n, ours, theirs, others, same)
    assert n < width or abs(same) < 1e-6
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours == pytest.approx(others, rel=1e-6)

    logits = load(inception_file).logits(a)
    theirs = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-6)

    theirs = calculate_precision_recall_full(a.double(), b.double())
    assert precision_recall(a, b) == pytest.approx(theirs, abs=1e-6)  # theirs is a float32 mean


# ---------------------------------------------------------------------------------------------
# The command line


NAMES = "FID|sFID|IS|precision|recall|Frechet distance"


def scores_of(said):
    """The numbers that fid.py printed: {"FID": 12.3456, ...}."""
    return {name: float(x) for name, x in re.findall(rf"\b({NAMES}) (-?[\d.]+)", said)}


@pytest.fixture
def sides(tmp_path):
    """Two small folders of images, a and b, in the folder where `run` runs."""
    save_images(tmp_path / "a", 13, size=(32, 32), seed=1)
    save_images(tmp_path / "b", 11, size=(32, 32), seed=2)


TOY = "--features encoder:toy"


def test_toy_distance_and_its_statistics(run, sides):
    """Without a download: from folders, .npz files, and saved statistics, the same number."""
    said = run("fid.py", f"a b {TOY}")
    want = scores_of(said)
    assert want.keys() == {"Frechet distance"}
    assert re.search(r"\(13 samples, reference b, encoder toy [0-9a-f]{16}\)\n$", said)

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
    assert scores_of(run("fid.py", f"a b {TOY} --num 5")) != want
    assert "(5 samples," in run("fid.py", f"a b {TOY} --num 5")

    # Without flags: against the toy's validation images.
    said = run("fid.py", "a")
    assert "reference toy, encoder toy " in said
    assert said == run("fid.py", f"a toy {TOY}")


def test_mistakes(run, sides, tmp_path):
    save_images(tmp_path / "big", 4, size=(48, 48))
    save_images(tmp_path / "uneven", 2, size=(40, 40))
    save_images(tmp_path / "uneven" / "more", 2, size=(48, 48))
    save_images(tmp_path / "broken", 3, size=(32, 32))
    (tmp_path / "broken" / "1.png").write_text("text")
    run("fid.py", f"b {TOY} --save b.npz")
    arrays = dict(np.load("b.npz"))
    np.savez("other.npz", **(arrays | {"label": "encoder toy 0123456789abcdef"}))
    np.savez("statistics.npz", **{name: x for name, x in arrays.items() if name != "arr_0"})
    torch.save({"fc.weight": torch.zeros(1)}, "wrong.pt")
    cases = [
        (f"a other.npz {TOY}", "label: a has encoder toy .*other.npz has encoder toy 0123"),
        (f"big b.npz {TOY}", "size: big has 48x48, b.npz has 32x32; pass --crop"),
        (f"statistics.npz {TOY} --save c.npz", "statistics.npz: has no images"),
        (f"uneven a {TOY}", "need square images of one size; pass --crop"),
        (f"broken a {TOY}", "broken/1.png' cannot be read as an image"),
        (f"a b {TOY} --num 1", "a: needs at least two images"),
        (f"none b {TOY}", "none: no such folder, or no images in it"),
        (f"none.npz b {TOY}", "none.npz: no such file; run sample.py first"),
        (f"a b {TOY} --metrics fid,kid", "--metrics fid,kid: must be of fid,sfid,is,pr"),
        (f"a b {TOY} --metrics is", "encoder:NAME with --metrics fid"),
        ("a b --features toy", "--features must be inception, or encoder:NAME"),
        ("a b --features encoder:toys", "encoder toys: no such file"),
        ("a b --weights none.pth", "none.pth: no such file"),
        ("a b --weights b.npz", "b.npz: not a readable checkpoint"),
    ]
    for flags, message in cases:
        with pytest.raises(SystemExit, match=message) as stop:
            run("fid.py", flags)
        assert str(stop.value).startswith("error: ")
        assert "\n" not in str(stop.value)
    for flags in ("--batch-size many", "--batch 4", "--mode other"):
        with pytest.raises(SystemExit) as stop:
            run("fid.py", f"a b {flags}")
        assert stop.value.code == 2
    run("fid.py", f"uneven a {TOY} --crop 32")


def test_images_that_turn_out_uneven(tmp_path):
    save_images(tmp_path / "a", 65, size=(32, 32))
    save_images(tmp_path / "b", 1, size=(40, 40))
    features = EncoderFeatures("toy", "cpu")
    with pytest.raises(UsageError, match="images of one size; pass --crop"):
        extract_features(R.list_images(tmp_path), features, None, 66, "cpu")
    assert features.label.startswith("encoder toy ")


@pytest.mark.parametrize("size", [(40, 32), (32, 40)])
def test_encoder_features_need_square_images(run, tmp_path, size):
    save_images(tmp_path / "wide", 3, size=size)
    with pytest.raises(SystemExit, match="error: .*pass --crop"):
        run("fid.py", f"wide wide {TOY}")
    run("fid.py", f"wide wide {TOY} --crop 32")


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UsageError, match="cannot download https://x/y.pth .*pass --weights FILE"):
        download_weights("https://x/y.pth", "y.pth", "--weights")


def test_samples_are_scored(run):
    """What sample.py writes: a folder and an .npz of the same images."""
    run("train_diffusion.py")
    run("sample.py", "--out s")
    folder = run("fid.py", "s")
    assert "(20 samples," in folder
    assert scores_of(folder) == scores_of(run("fid.py", "s.npz"))


ALL = "--metrics fid,sfid,is,pr --batch-size 4"


@pytest.mark.slow
def test_saved_statistics_give_the_same_numbers(run, sides, inception_file):
    weights = f"--weights {inception_file}"

    def scores(flags):
        return scores_of(run("fid.py", f"{flags} {weights}"))

    said = run("fid.py", f"a b {ALL} {weights}")
    want = scores_of(said)
    assert want.keys() == {"FID", "sFID", "IS", "precision", "recall"}
    assert "13 images are fewer than FID's 2,048 features" in said
    assert "(13 samples, reference b, adm, inception " in said
    for side in ("a", "b"):
        said = run("fid.py", f"{side} --save {side}.npz --batch-size 4 {weights}")
        assert f"wrote {side}.npz: " in said
        assert "32x32, adm, inception " in said
    got = scores("a b.npz --metrics fid,sfid --batch-size 4")
    assert got == {name: want[name] for name in ("FID", "sFID")}
    assert scores("a.npz b.npz") == {"FID": want["FID"]}
    same = scores("a a.npz --batch-size 4")
    assert abs(same["FID"]) < 1e-5 * want["FID"], "13 images: most eigenvalues are rounding errors"
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
    with pytest.raises(SystemExit, match="label: a has pytorch-fid, .*b.npz has adm"):
        run("fid.py", f"a b.npz {weights} --mode pytorch-fid")

    # Images of any size are resized one by one.
    save_images(Path("uneven"), 2, size=(40, 32))
    save_images(Path("uneven/more"), 2, size=(36, 36))
    run("fid.py", f"uneven uneven {weights} --metrics pr")


ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]


def launch(processes, flags, folder):
    """A finished run of fid.py in one or two processes, on one thread each."""
    return subprocess.run(
        [*processes, f"{ROOT}/fid.py", *flags.split()],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_two_processes_give_the_number_of_one(sides, inception_file, tmp_path):
    """Batches, not images, go to the processes in turn, so all numbers are the same.

    13 and 11 images, 4 at a time; 3 images, which leave the second process without any; and 67
    against 2,000 toys.
    """
    save_images(tmp_path / "c", 67, size=(32, 32), seed=3)
    weights = f"--weights {inception_file}"
    commands = [
        f"a b {ALL} {weights}",
        f"a b --num 3 --metrics pr --batch-size 4 {weights}",
        "c toy",
    ]
    results = []
    for processes in (ONE, TWO):
        save = launch(processes, f"a {weights} --save a.npz --batch-size 4", tmp_path)
        assert save.returncode == 0, save.stderr[-2000:]
        results.append([dict(np.load(tmp_path / "a.npz"))])
        for command in commands:
            done = launch(processes, command, tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
            results[-1].append(done.stdout.splitlines()[-1])
    one, two = results
    assert one[0].keys() == two[0].keys()
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.array_equal(one[0][name], two[0][name]), name
    assert one[1:] == two[1:]
    assert "(67 samples," in one[3]


NO_GLOO_LEFT = """
import os, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv.pop(1)).parent))
import fid
fid.run_script(fid.main)
threads = [Path(f"/proc/self/task/{i}/comm").read_text() for i in os.listdir("/proc/self/task")]
sys.exit(any("gloo" in name for name in threads))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed on Linux")
def test_no_thread_of_the_group_is_left(tmp_path):
    """A thread left over aborts the process now and then, when Python ends before it."""
    save_images(tmp_path / "c", 7, size=(32, 32))
    (tmp_path / "scored.py").write_text(NO_GLOO_LEFT)
    done = launch([*TWO, "scored.py"], "c toy", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(7 samples," in done.stdout


@pytest.mark.slow
def test_an_error_in_one_process_ends_both(tmp_path):
    """Image 69, which only the second process reads, is broken: the first does not wait for it."""
    for i in range(70):
        save_images(tmp_path / "broken" / f"{i:02}", 1, size=(32, 32), seed=i)
    (tmp_path / "broken" / "69" / "0.png").write_text("text")
    done = launch(TWO, "broken toy --batch-size 5", tmp_path)
    assert done.returncode != 0
    assert "error: 'broken/69/0.png' cannot be read as an image" in done.stderr


# ---------------------------------------------------------------------------------------------
# Memory

MEMORY = """
import resource
import sys

sys.path.insert(0, sys.argv[1])
import torch

import fid


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


features = torch.rand(20000, 2048)
before = peak()
if sys.argv[2] == "fid":
    fid.mean_and_covariance(features)
else:
    fid.precision_recall(features[:10000], features[10000:])
print((peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("metric, most", [("fid", 0.2e9), ("pr", 0.3e9)])
def test_memory_for_many_images(metric, most):
    """Features are held once, in float32 (164 MB for these 20,000 images); nothing is as large."""
    command = [sys.executable, "-c", MEMORY, str(ROOT), metric]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    used = int(done.stdout.split()[-1])
    print(f"{used / 1e9:.2f} GB")
    assert used < most
