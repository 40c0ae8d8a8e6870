"""fid.py: the network's names, the resize, the scores' closed forms, and what it reads."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_rae import save_images

import fid
from fid import (
    Images,
    InceptionV3,
    compute_statistics,
    extract_features,
    frechet_distance,
    inception_score,
    mean_and_covariance,
    precision_recall,
    prepare,
    resize_adm,
)

DATA = ROOT.parent / "shared" / "data"


# ---------------------------------------------------------------------------------------------
# The network and its input


def sha(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_inception_has_the_published_names_and_shapes():
    shapes = {}
    for name, tensor in InceptionV3().state_dict().items():
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


def test_inception_against_torchvision(monkeypatch):
    """The same weights in torchvision's network, with the pools that differ patched in."""
    from torchvision.models import inception

    torch.manual_seed(0)
    ours = InceptionV3().eval()
    theirs = inception.Inception3(
        num_classes=1008, aux_logits=False, init_weights=False, transform_input=False
    ).eval()
    theirs.load_state_dict(ours.state_dict())
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
    assert resize_adm(x, 4)[0, 0].tolist() == want


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


@pytest.mark.parametrize("block", [500, 16])
@pytest.mark.parametrize("mean", [0, 3000])  # norms that dwarf the distances
def test_precision_recall_by_definition(monkeypatch, block, mean):
    monkeypatch.setattr(fid, "BLOCK", block)
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(70, 5)) + mean).astype(np.float32)
    b = (rng.normal(size=(60, 5)) + mean + 1.2).astype(np.float32)
    d = squared_distances(a, b)
    radius_a = np.sort(squared_distances(a, a), 1)[:, 3]
    radius_b = np.sort(squared_distances(b, b), 1)[:, 3]
    precision = (d <= radius_b).any(1).mean()
    recall = (d <= radius_a[:, None]).any(0).mean()
    assert 0.2 < precision < 1 and 0.2 < recall < 1
    assert precision_recall(a, b) == pytest.approx((precision, recall))


def test_precision_recall_of_tiny_sets():
    """Fewer than three neighbours: a ball reaches to the farthest image of its set."""
    a = torch.tensor([[0.0], [1.0]])
    b = torch.tensor([[-0.9], [5.0]])
    assert precision_recall(a, b) == (1, 0.5)


# ---------------------------------------------------------------------------------------------
# The images


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_features_are_those_of_all_images_in_their_order(tmp_path, batch_size):
    save_images(tmp_path / "a" / "b", 9, size=(8, 8))
    save_images(tmp_path / "c", 3, size=(8, 8), mode="L", suffix=".PNG", seed=4)
    images = Images(tmp_path)
    assert len(images) == 12

    def extract(x):
        assert len(x) <= batch_size
        return x.float().flatten(1)[:, :20], x.float().flatten(1)[:, 20:25]

    want = torch.stack([images.load(i).flatten()[:25].float() for i in range(12)])
    pool3, spatial = extract_features(images, extract, batch_size, "cpu", with_spatial=True)
    assert torch.equal(pool3, want[:, :20])
    assert torch.equal(spatial, want[:, 20:])
    pool3, spatial = extract_features(images, extract, batch_size, "cpu")
    assert torch.equal(pool3, want[:, :20])
    assert spatial is None

    found = compute_statistics(images, ["fid", "sfid"], None, extract, batch_size, "cpu")
    want = want.double().numpy()
    assert np.allclose(found["mu"], want[:, :20].mean(0), rtol=1e-12)
    assert np.allclose(found["sigma"], np.cov(want[:, :20].T), rtol=1e-9)
    assert np.allclose(found["mu_s"], want[:, 20:].mean(0), rtol=1e-12)
    assert np.allclose(found["sigma_s"], np.cov(want[:, 20:].T), rtol=1e-9)


def test_every_kind_of_image_is_read(tmp_path):
    kinds = [("RGB", ".PNG"), ("L", ".JPEG"), ("P", ".png"), ("RGBA", ".webp"), ("1", ".bmp")]
    for mode, suffix in kinds:
        save_images(tmp_path / "deep" / mode, 1, size=(8, 8), mode=mode, suffix=suffix)
    (tmp_path / "deep" / "record.json").write_text("{}")
    images = Images(tmp_path)
    assert len(images) == 5
    assert images.size == "8"
    for i in range(5):
        assert images.load(i).shape == (3, 8, 8)
        assert images.load(i).dtype == torch.uint8
    assert Images(tmp_path, crop=4).size == "4"
    assert len(Images(tmp_path, num=3)) == 3


def test_bad_arrays(tmp_path):
    cases = [
        ({"arr_0": np.zeros((4, 8, 8, 3))}, "uint8"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "uint8"),
        ({"x": np.zeros(3)}, "uint8"),
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "1 images"),
        ({"arr_0": np.array([print], dtype=object)}, "uint8"),  # code that would be run
    ]
    for arrays, message in cases:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            Images(tmp_path / "bad.npz")


def test_images_of_an_npz_are_mapped(tmp_path):
    """As np.savez and sample.py write them; a compressed file is read."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), arr_0=pixels, record="x")
    np.savez_compressed(tmp_path / "b.npz", mu=np.zeros(3), arr_0=pixels)
    for name, mapped in (("a.npz", True), ("b.npz", False)):
        images = Images(tmp_path / name)
        assert isinstance(images.items, np.memmap) == mapped
        assert np.array_equal(images.items, pixels)
        assert torch.equal(images.load(3), torch.from_numpy(pixels[3]).permute(2, 0, 1))
        assert len(Images(tmp_path / name, num=3)) == 3
    cut = (tmp_path / "a.npz").read_bytes()[:-200]
    (tmp_path / "cut.npz").write_bytes(cut)
    with pytest.raises(ValueError, match="cut.npz: not an .npz of arrays"):
        Images(tmp_path / "cut.npz")


# ---------------------------------------------------------------------------------------------
# Against the peers, on real photographs


def photographs(folder, n, size):
    """n photographs from all over a folder of shared/data, (n, 3, size, size)."""
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs the photographs of {folder} beside the repository")
    images = Images(DATA / folder, crop=size)
    chosen = np.linspace(0, len(images) - 1, n).astype(int)
    return torch.stack([images.load(i) for i in chosen])


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights that neither let features vanish nor explode.

    Their batch norms have the statistics of one batch of images: photographs, where there are any.
    """
    torch.manual_seed(0)
    net = InceptionV3()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average: the one batch's own statistics
    if (DATA / "imagenette" / "val").is_dir():
        images = photographs("imagenette/val", 16, 224)
    else:
        images = torch.randint(0, 256, (8, 3, 64, 64))
    with torch.no_grad():
        net.train()(prepare(images, "adm"))
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.save(net.eval().state_dict(), path)
    return path


def load(path):
    net = InceptionV3()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval().requires_grad_(False)


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
        pool3, spatial = ours(prepare(x, "adm"))
        assert_close(pool3, their_pool3)
        assert_close(ours.logits(pool3), their_logits)
        assert spatial.shape == (16, 2023)
        assert_close(spatial, seen.pop()[:, :7].permute(0, 2, 3, 1).reshape(len(x), -1))
        pool3 = ours(prepare(x, "pytorch-fid"))[0]
        assert_close(pool3, pytorch_fid(x.float() / 255)[0].flatten(1))
    assert torch.equal(prepare(list(x), "adm"), prepare(x, "adm"))


def two_sides(inception_file, folder, n, total, size):
    """pool3 of `total` shuffled photographs: of the first n and of the last n, (n, 2048) each."""
    images = photographs(folder, total, size)
    net = load(inception_file)
    with torch.no_grad():
        pool3 = torch.cat([net(prepare(x, "adm"))[0] for x in images.split(50)])
    pool3 = pool3[torch.randperm(total, generator=torch.Generator().manual_seed(0))]
    return pool3[:n], pool3[-n:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, n, total, size, width",
    [("imagenette", 400, 800, 224, 512), ("cifar10", 2200, 2400, 32, 2048)],
)
def test_scores_equal_the_peers(inception_file, folder, n, total, size, width):
    """Of fewer images than features, and of more. The peers' roots of 2,048 x 2,048 take minutes:
    where the images are few, the distance is of the first 512 features.
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


@pytest.fixture
def sides(tmp_path, inception_file):
    """Two small folders of images and the words that all commands share."""
    save_images(tmp_path / "a", 13, size=(32, 32), seed=1)
    save_images(tmp_path / "b", 11, size=(32, 32), seed=2)
    return f"{tmp_path}/a {tmp_path}/b --weights {inception_file} --json"


ALL = "--metrics fid,sfid,is,pr --batch-size 4"


@pytest.mark.slow
def test_saved_statistics_give_the_same_numbers(run, sides, inception_file):
    weights = f"--weights {inception_file}"

    def scores(arguments):
        return json.loads(run("fid.py", f"{arguments} --json", tiny=False))

    want = scores(f"{sides} {ALL}")
    assert {"FID", "sFID", "IS", "precision", "recall", "images_per_s"} <= want.keys()
    assert want["num"] == 13
    for side in ("a", "b"):
        said = run("fid.py", f"{side} {weights} --save {side}.npz --batch-size 4", tiny=False)
        assert "32 px, adm" in said
    got = scores(f"a b.npz {weights} --metrics fid,sfid --batch-size 4")
    assert got["FID"] == want["FID"]
    assert got["sFID"] == want["sFID"]
    got = scores(f"a.npz b.npz {weights}")
    assert got["FID"] == want["FID"]
    assert got["num"] == 13
    same = scores(f"a a.npz {weights} --metrics fid,sfid --batch-size 4")
    assert abs(same["FID"]) < 1e-5 * want["FID"], "13 images: most eigenvalues are rounding"

    # As ADM's file holds both: statistics for FID and sFID, images for precision and recall.
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(Path("b").glob("*.png"))])
    kept = np.load("b.npz")
    arrays = {name: kept[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez("virtual.npz", arr_0=pixels, **arrays)
    got = scores(f"a virtual.npz {weights} {ALL}")
    assert got.keys() == want.keys()
    for name in ("FID", "sFID", "IS", "precision", "recall"):
        assert got[name] == pytest.approx(want[name], rel=1e-9), name

    other = scores(f"{sides} --mode pytorch-fid")
    assert other["FID"] != want["FID"]
    assert "pytorch-fid" in other["label"]


ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]


def launch(processes, arguments, folder):
    """A finished run of fid.py in one or two processes, on one thread each."""
    return subprocess.run(
        [*processes, f"{ROOT}/fid.py", *arguments.split()],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_two_processes_give_the_number_of_one(sides, inception_file, tmp_path):
    """Batches, not images, go to the processes in turn, so that all numbers are the same.

    13 and 11 images, 4 at a time; 3 images, which leave the second process without any; and 67
    against 2,000 toys.
    """
    save_images(tmp_path / "c", 67, size=(32, 32), seed=3)
    commands = [
        f"{sides} {ALL}",
        f"{sides} --num 3 --metrics pr --batch-size 4",
        "c toy --json",
    ]
    results = []
    for processes in (ONE, TWO):
        save = launch(
            processes, f"a --weights {inception_file} --save a.npz --batch-size 4", tmp_path
        )
        assert save.returncode == 0, save.stderr[-2000:]
        numbers = [dict(np.load(tmp_path / "a.npz"))]
        (tmp_path / "a.npz").unlink()  # --save does not write over a file
        for command in commands:
            done = launch(processes, command, tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
            scores = json.loads(done.stdout)
            del scores["images_per_s"]
            numbers.append(scores)
        results.append(numbers)
    one, two = results
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.array_equal(one[0][name], two[0][name]), name
    assert one[1:] == two[1:]
    assert one[3]["num"] == 67


NO_GLOO_LEFT = """
import os, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv.pop(1)).parent))
import fid
fid.main()
threads = [Path(f"/proc/self/task/{i}/comm").read_text() for i in os.listdir("/proc/self/task")]
sys.exit(any("gloo" in name for name in threads))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed on Linux")
def test_no_thread_of_the_group_is_left(tmp_path):
    """One that is left aborts the process now and then, when Python ends before it."""
    save_images(tmp_path / "c", 7, size=(32, 32))
    (tmp_path / "scored.py").write_text(NO_GLOO_LEFT)
    done = launch([*TWO, "scored.py"], "c toy --json", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["num"] == 7


@pytest.mark.slow
def test_an_error_in_one_process_ends_both(tmp_path):
    """Image 69, which only the second process reads, is broken: the first does not wait for it."""
    for i in range(70):
        save_images(tmp_path / "broken" / f"{i:02}", 1, size=(32, 32), seed=i)
    (tmp_path / "broken" / "69" / "0.png").write_text("text")
    done = launch(TWO, "broken toy --batch-size 5", tmp_path)
    assert done.returncode != 0
    assert "error of process 1: " in done.stderr
    assert "broken/69/0.png: not readable as an image" in done.stderr


def test_mistakes(run, sides, inception_file, tmp_path):
    weights = f"--weights {inception_file}"
    save_images(tmp_path / "big", 4, size=(48, 48))
    save_images(tmp_path / "uneven", 2, size=(40, 32))
    save_images(tmp_path / "uneven" / "more", 2, size=(36, 36), suffix=".JPEG")
    save_images(tmp_path / "broken", 3, size=(32, 32))
    (tmp_path / "broken" / "1.png").write_text("text")
    run("fid.py", f"b {weights} --save b.npz", tiny=False)
    np.savez("nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.savez("unlabelled.npz", mu=np.zeros(64), sigma=np.eye(64))
    cases = [
        (
            f"a b.npz {weights} --mode pytorch-fid",
            r"b.npz: statistics of \(adm, .*\), not of \(pytorch-fid",
        ),
        (
            "a unlabelled.npz --features encoder:toy",
            r"statistics of \(Inception, as it does not say",
        ),
        (f"unlabelled.npz {weights} --save c.npz", "unlabelled.npz: wants images"),
        (f"a {weights} --save c", "--save c: wants a name that ends in .npz"),
        (f"big b.npz {weights}", "big and b.npz have 32 and 48 px; pass --crop"),
        (f"uneven b.npz {weights}", "32 and mixed px"),
        (f"broken a {weights}", "broken/1.png: not readable as an image"),
        (f"a nan.npz {weights}", "nan.npz: mu is not finite throughout"),
        (f"a b {weights} --metrics fid,kid", "--metrics fid,kid: wants some of"),
        (f"a b {weights} --num 1", "a: 1 images; a distance needs two"),
        (
            "a b --features encoder:toy --metrics is",
            "--metrics is: encoder:toy has features for fid's distance alone",
        ),
        ("a b --features toy", "--features toy: wants inception or encoder:NAME"),
        ("uneven uneven --features encoder:toy", "wants square images of one size; pass --crop"),
        (f"a b --weights {tmp_path}/nan.npz", "not the Inception weights"),
        ("a b --batch-size many", "--batch-size: .many.: wants a whole number"),
        ("a b --batch 4", "unrecognized arguments: --batch 4"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit, match=message) as stop:
            run("fid.py", arguments, tiny=False)
        assert str(stop.value).startswith("error: ")
        assert "\n" not in str(stop.value)
    with pytest.raises(ValueError, match="pass the file .--weights, in training --inception"):
        fid.load_inception("nowhere.pth", "cpu")
    run("fid.py", f"uneven uneven {weights} --metrics pr", tiny=False)  # resized one by one
    run("fid.py", f"uneven a {weights} --metrics pr --crop 32", tiny=False)


def test_images_that_turn_out_uneven(tmp_path):
    """Only the sizes of the first 64 images are known before the features are made."""
    save_images(tmp_path / "a", 65, size=(32, 32))
    save_images(tmp_path / "b", 1, size=(36, 36))
    images = Images(tmp_path)
    assert images.size == "32"
    extract, label = fid.load_encoder("toy", 32, "cpu")
    assert label.startswith("encoder toy ")
    with pytest.raises(ValueError, match="encoder:toy wants images of one size; pass --crop"):
        extract_features(images, extract, 66, "cpu")


@pytest.mark.slow
def test_warnings(tmp_path, inception_file):
    save_images(tmp_path / "jpeg", 3, size=(32, 32), suffix=".JPG", mode="L")
    folder = tmp_path / "jpeg"
    done = launch(ONE, f"{folder} {folder} --weights {inception_file}", tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (
        "is not the published file",
        "holds JPEG images",
        "3 samples; with fewer than the 2,048 features FID is far too high",
    ):
        assert text in done.stderr
    assert done.stdout.startswith("FID ")
    assert "(N=3, adm, inception " in done.stdout
    assert "images/s" in done.stdout


def test_sample_folders_carry_a_record(run):
    run("train_diffusion.py")
    run("sample.py", "--out s")
    run("sample.py", "--out s")  # the same record: the same files again
    record = json.loads(Path("s/record.json").read_text())
    assert record["seed"] == 0
    assert len(record["weights"]) == 16
    with pytest.raises(SystemExit, match="s: not empty, and its images would mix"):
        run("sample.py", "--out s --seed 1")
    run("sample.py", "--out s.npz")
    assert json.loads(str(np.load("s.npz")["record"])) == record
    assert Images("s").size == "32"
    assert len(Images("s")) == 20


# ---------------------------------------------------------------------------------------------
# Memory

MEMORY = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/extras"]

import bench
import torch

import fid

imports = bench.held_at_most()
generator = torch.Generator().manual_seed(0)


class Noise:
    source = "noise"

    def __len__(self):
        return int(sys.argv[2])

    def batch(self, first, last, device):
        return torch.zeros(last - first, 3, 8, 8, dtype=torch.uint8)


class Network:
    def logits(self, pool3):
        return pool3[:, :1008]


def extract(images):
    pool3 = torch.rand(len(images), 2048, generator=generator)
    spatial = torch.rand(len(images), 2023, generator=generator)
    return pool3, spatial


metrics = sys.argv[3].split(",")
result = fid.compute_statistics(Noise(), metrics, Network(), extract, 64, "cpu")
if "pr" in metrics:
    references = torch.rand(2000, 2048, generator=generator)
    print(fid.precision_recall(result["pool3"], references))
print(bench.held_at_most() - imports)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "num, metrics, most", [(50_000, "fid,sfid,is", 1.2e9), (15_000, "pr", 0.4e9)]
)
def test_memory_for_many_images(num, metrics, most):
    """The features of all are held, once; nothing else is that large."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed large blocks leave no holes
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(ROOT), str(num), metrics],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    used = int(done.stdout.split()[-1])
    print(f"{used / 1e9:.2f} GB")
    assert used < most
