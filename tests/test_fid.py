"""fid.py: the network's names, the resize, the distance's closed forms, and what it reads."""

import hashlib
import json
import os
import subprocess
import sys

import fid
import numpy as np
import pytest
import torch
from conftest import ROOT
from fid import (Images, InceptionV3, frechet_distance, inception_score, precision_recall, prepare,
                 resize_adm, statistics)
from PIL import Image
from test_rae import save_images

DATA = ROOT.parent / "shared" / "data"


def sha(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_inception_has_the_published_names_and_shapes():
    state = {k: v for k, v in InceptionV3().state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 472
    assert sha(sorted(state)) == "ed87dd0f166ade6855a6d284ee17fb1bc768f59db1b37c53afed23d5c199e182"
    assert sha([f"{k} {tuple(state[k].shape)}" for k in sorted(state)]) == \
        "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"


def test_inception_against_torchvision():
    """The same weights in torchvision's network, with the three pools that differ patched in."""
    from torchvision.models import inception

    def average(x, **kw):
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    torch.manual_seed(0)
    ours = InceptionV3().eval()
    theirs = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False,
                                  transform_input=False).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 299, 299)
    kept, pools = inception.F.avg_pool2d, []

    class Functional:
        def __getattr__(self, name):
            return getattr(torch.nn.functional, name)

        def avg_pool2d(self, x, **kw):            # 5b-5d, 6b-6e, 7b average; the tenth, 7c, takes the maximum
            pools.append(1)
            return torch.nn.functional.max_pool2d(x, 3, 1, 1) if len(pools) == 9 else average(x)
    inception.F, kept = Functional(), inception.F
    try:
        with torch.no_grad():
            want = theirs(x)
    finally:
        inception.F = kept
    assert len(pools) == 9
    with torch.no_grad():
        assert (ours(x) - want).abs().max() < 1e-5 * want.abs().max()


def test_resize_is_tensorflow_1s():
    x = torch.tensor([[[[0.0, 10], [20, 30]]]])
    assert resize_adm(x, 4)[0, 0].tolist() == [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30],
                                               [20, 25, 30, 30]]


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    d = 6
    mu1, mu2, s1, s2 = rng.normal(size=d), rng.normal(size=d), rng.random(d) + 0.1, rng.random(d) + 0.1
    closed = np.square(mu1 - mu2).sum() + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    assert frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2)) == pytest.approx(closed, rel=1e-9)
    assert frechet_distance(turn @ mu1, turn @ np.diag(s1) @ turn.T, turn @ mu2,
                            turn @ np.diag(s2) @ turn.T) == \
        pytest.approx(closed, rel=1e-9)
    a = rng.normal(size=(20, d))
    assert abs(frechet_distance(a.mean(0), np.cov(a.T), a.mean(0), np.cov(a.T))) < 1e-6


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_statistics_stream(tmp_path, batch):
    save_images(tmp_path / "a" / "b", 9, size=(8, 8))
    save_images(tmp_path / "c", 3, size=(8, 8), mode="L", suffix=".PNG", seed=4)
    images = Images(tmp_path)
    assert len(images) == 12
    result = statistics(images, lambda x: (x.float().flatten(1)[:, :20],), 12, batch, "cpu")
    mu, sigma = result["mu"], result["sigma"]
    f = np.stack([images.read(i).flatten()[:20].numpy() for i in range(12)]).astype(np.float64)
    assert np.allclose(mu, f.mean(0), rtol=1e-12) and np.allclose(sigma, np.cov(f.T), rtol=1e-9)


def test_every_kind_of_image_is_read(tmp_path):
    for mode, suffix in (("RGB", ".PNG"), ("L", ".JPEG"), ("P", ".png"), ("RGBA", ".webp"), ("1", ".bmp")):
        save_images(tmp_path / "deep" / mode, 1, size=(8, 8), mode=mode, suffix=suffix)
    (tmp_path / "deep" / "record.json").write_text("{}")
    images = Images(tmp_path)
    assert len(images) == 5 and images.size == 8
    assert all(images.read(i).shape == (3, 8, 8) and images.read(i).dtype == torch.uint8 for i in range(5))
    assert Images(tmp_path, crop=4).size == 4


def test_bad_arrays(tmp_path):
    for name, arrays, message in (("f", dict(arr_0=np.zeros((4, 8, 8, 3))), "uint8"),
                                  ("g", dict(arr_0=np.zeros((4, 3, 8, 8), np.uint8)), "uint8"),
                                  ("h", dict(x=np.zeros(3)), "uint8"),
                                  ("i", dict(arr_0=np.zeros((1, 8, 8, 3), np.uint8)), "1 images")):
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match=message):
            Images(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "evil.npz", arr_0=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="not an .npz"):
        Images(tmp_path / "evil.npz")


# -------------------------------------------------------------------- against the peers, and real photographs

def photographs(folder, n, size):
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs the photographs of {folder} beside the repository")
    images = Images(DATA / folder, crop=size)
    chosen = np.linspace(0, len(images) - 1, n).astype(int)
    return torch.stack([images.read(i) for i in chosen])


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights whose batch norms are set from one batch of images (photographs where they are at hand),
    so that features neither vanish nor explode."""
    torch.manual_seed(0)
    net = InceptionV3()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None                          # a plain average: the one batch's own statistics
    here = (DATA / "imagenette" / "val").is_dir()
    images = photographs("imagenette/val", 16, 224) if here else torch.randint(0, 256, (8, 3, 64, 64))
    with torch.no_grad():
        net.train()(prepare(images, "adm"))
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.save(net.eval().state_dict(), path)
    return path


def load(path):
    net = InceptionV3()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval().requires_grad_(False)


def close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def torch_fidelity_net(inception_file, layers):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3",
                                 reason="pip install torch-fidelity")
    return module.FeatureExtractorInceptionV3("net", layers,
                                              feature_extractor_weights_path=str(inception_file)).eval()


def pytorch_fid_net(inception_file, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception", reason="pip install pytorch-fid")
    state = torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *a, **kw: state)
    return peer.InceptionV3([3]).eval()


@pytest.mark.slow
@torch.no_grad()
def test_features_equal_the_peers(inception_file, monkeypatch):
    images, ours = photographs("imagenette/val", 64, 224), load(inception_file)
    theirs, seen = torch_fidelity_net(inception_file, ["2048", "logits_unbiased"]), []
    theirs.Mixed_6d.register_forward_hook(lambda m, x, y: seen.append(y))
    other = pytorch_fid_net(inception_file, monkeypatch)
    for x in images.split(16):
        pool3, logits = theirs(x)
        mine, spatial = ours.features(prepare(x, "adm"))
        close(mine, pool3)
        close(ours.logits(mine), logits)
        close(spatial, seen.pop()[:, :7].permute(0, 2, 3, 1).reshape(len(x), -1))
        assert spatial.shape == (16, 2023)
        close(ours(prepare(x, "pytorch-fid")), other(x.float() / 255)[0].flatten(1))
    assert torch.equal(prepare(list(x), "adm"), prepare(x, "adm"))


def two_sides(inception_file, folder, n, total, size):
    """pool3 features of `total` photographs, shuffled by a seed: the first and the last n, (n, 2048) each."""
    images, net = photographs(folder, total, size), load(inception_file)
    with torch.no_grad():
        f = torch.cat([net(prepare(x, "adm")) for x in images.split(50)])
    f = f[torch.randperm(total, generator=torch.Generator().manual_seed(0))]
    return f[:n], f[-n:]


@pytest.mark.slow
@pytest.mark.parametrize("folder, n, total, size", [("imagenette", 1000, 2000, 224),
                                                    ("cifar10", 2200, 2400, 32)])
def test_scores_equal_the_peers(inception_file, folder, n, total, size):
    fidelity = pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    score = pytest.importorskip("pytorch_fid.fid_score", reason="pip install pytorch-fid")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    assert fidelity
    a, b = two_sides(inception_file, folder, n, total, size)
    moments = []
    for side in (a, b):
        m = fid.Moments()
        for x in side.split(64):
            m.add(x)
        moments.append(m.result())
    mine = frechet_distance(*moments[0], *moments[1])
    stats = [fid_features_to_statistics(x) for x in (a, b)]
    want = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    double = [(x.double().numpy().mean(0), np.cov(x.double().numpy().T)) for x in (a, b)]
    other = score.calculate_frechet_distance(*double[0], *double[1])
    same = frechet_distance(*moments[0], *moments[0])
    print(folder, n, mine, want, other, same)
    assert n < 2048 or abs(same) < 1e-6
    assert mine == pytest.approx(want, rel=1e-6) and mine == pytest.approx(other, rel=1e-6)
    logits = load(inception_file).logits(a)
    p = logits.double().softmax(1)
    chunks = torch.cat([p, torch.special.entr(p).sum(1, keepdim=True)], 1).sum(0, keepdim=True)
    want = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert inception_score(chunks, n) == pytest.approx(want, rel=1e-6)
    want = calculate_precision_recall_full(a.double(), b.double())
    assert precision_recall(a, b) == pytest.approx(want, abs=1e-6)    # theirs is a float32 mean


def test_inception_score_closed_forms():
    def rows(p):
        return torch.cat([p, torch.special.entr(p).sum(1, keepdim=True)], 1)
    uniform = torch.full((16, 1008), 1 / 1008, dtype=torch.float64)
    assert inception_score(rows(uniform).sum(0, keepdim=True), 16) == pytest.approx(1)
    one_hot = torch.eye(1008, dtype=torch.float64)[torch.arange(16) % 8]
    assert inception_score(rows(one_hot).sum(0, keepdim=True), 16) == pytest.approx(8)
    chunks = torch.stack([rows(one_hot[:1]).sum(0) * fid.CHUNK, rows(one_hot[:8]).sum(0)])
    assert inception_score(chunks, fid.CHUNK + 8) == pytest.approx((1 + 8) / 2), "the mean over chunks"


@pytest.mark.parametrize("block", [1000, 16])
@pytest.mark.parametrize("mean", [0, 3000])            # norms that dwarf the distances
def test_precision_recall_by_definition(monkeypatch, block, mean):
    monkeypatch.setattr(fid, "BLOCK", block)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(70, 5)) + mean, rng.normal(size=(60, 5)) + mean + 1.2
    a, b = a.astype(np.float32), b.astype(np.float32)

    def squared(x, y):
        return ((x[:, None].astype(np.float64) - y) ** 2).sum(2)
    d, radius_a, radius_b = squared(a, b), np.sort(squared(a, a), 1)[:, 3], np.sort(squared(b, b), 1)[:, 3]
    want = ((d <= radius_b).any(1).mean(), (d <= radius_a[:, None]).any(0).mean())
    assert 0.2 < min(want) and max(want) < 1
    assert precision_recall(*map(torch.from_numpy, (a, b))) == pytest.approx(want)


def test_precision_recall_of_tiny_sets():
    """Fewer than three neighbours: a ball reaches to the farthest image of its set."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[-0.9], [5.0]])
    assert precision_recall(a, b) == (1, 0.5)


# ------------------------------------------------------------------------------------------- the command line

@pytest.fixture
def sides(tmp_path, inception_file):
    """Two small folders of images and the words that all commands share."""
    save_images(tmp_path / "a", 13, size=(32, 32), seed=1)
    save_images(tmp_path / "b", 11, size=(32, 32), seed=2)
    return f"{tmp_path}/a {tmp_path}/b --weights {inception_file} --json"


ALL = "--metrics fid,sfid,is,pr --batch 4"


@pytest.mark.slow
def test_saved_statistics_give_the_same_numbers(run, sides, inception_file):
    want = json.loads(run("fid.py", f"{sides} {ALL}", tiny=False))
    assert {"FID", "sFID", "IS", "precision", "recall", "images_per_s"} <= want.keys() and want["num"] == 13
    for side in ("a", "b"):
        said = run("fid.py", f"{side} --weights {inception_file} --save {side}.npz --batch 4", tiny=False)
        assert "32 px, adm" in said
    got = json.loads(run("fid.py", f"a b.npz --weights {inception_file} --json --metrics fid,sfid --batch 4"))
    assert (got["FID"], got["sFID"]) == (want["FID"], want["sFID"])
    got = json.loads(run("fid.py", f"a.npz b.npz --weights {inception_file} --json"))
    assert got["FID"] == want["FID"] and got["num"] == 13
    same = json.loads(run("fid.py",
                          f"a a.npz --weights {inception_file} --json --metrics fid,sfid --batch 4"))
    assert abs(same["FID"]) < 1e-5 * want["FID"], "13 images: most eigenvalues are rounding"
    # as ADM's file holds both: statistics for FID and sFID, images for precision and recall
    pixels = np.stack([np.asarray(Image.open(f))
                       for f in sorted(__import__("pathlib").Path("b").glob("*.png"))])
    stats = np.load("b.npz")
    np.savez("virtual.npz", arr_0=pixels, **{k: stats[k] for k in ("mu", "sigma", "mu_s", "sigma_s")})
    got = json.loads(run("fid.py", f"a virtual.npz --weights {inception_file} --json {ALL}"))
    assert got.keys() == want.keys()
    for key in ("FID", "sFID", "IS", "precision", "recall"):
        assert got[key] == pytest.approx(want[key], rel=1e-9), key
    other = json.loads(run("fid.py", f"{sides} --mode pytorch-fid"))
    assert other["FID"] != want["FID"] and "pytorch-fid" in other["label"]


@pytest.mark.slow
def test_two_processes_give_the_number_of_one(sides, inception_file, tmp_path):
    """Batches, not images, go to the processes in turn; 13 and 11 images, 4 at a time, and 67 to 2,000 toys.

    Where there are fewer images than features, the Frechet distance turns the order of a float64 sum into
    1e-8 of itself: mu and sigma are compared there, and the distance in the toy encoder's 64 features."""
    save_images(tmp_path / "c", 67, size=(32, 32), seed=3)
    got = []
    for launch in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                      "--nproc_per_node=2"]):
        out = []
        for words in (f"{sides} {ALL}", f"a --weights {inception_file} --save {len(launch)}.npz --batch 4",
                      "c toy --json"):
            done = subprocess.run([*launch, f"{ROOT}/fid.py", *words.split()], cwd=tmp_path, text=True,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
            assert done.returncode == 0, done.stderr[-2000:]
            out.append(done.stdout)
        got.append([json.loads(out[0]), np.load(tmp_path / f"{len(launch)}.npz"), json.loads(out[2])])
    for key, rel in (("FID", 1e-7), ("sFID", 1e-7), ("IS", 1e-9), ("precision", 0), ("recall", 0)):
        assert got[0][0][key] == pytest.approx(got[1][0][key], rel=rel), key
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.abs(got[0][1][key] - got[1][1][key]).max() <= 1e-12 * np.abs(got[0][1][key]).max(), key
    assert got[0][2]["Frechet distance"] == pytest.approx(got[1][2]["Frechet distance"], rel=1e-9)
    assert got[0][2]["num"] == 67


def test_mistakes(run, sides, inception_file, tmp_path):
    weights = f"--weights {inception_file}"
    save_images(tmp_path / "big", 4, size=(48, 48))
    save_images(tmp_path / "uneven", 2, size=(40, 32))
    save_images(tmp_path / "uneven" / "more", 2, size=(36, 36), suffix=".JPEG")
    save_images(tmp_path / "broken", 3, size=(32, 32))
    (tmp_path / "broken" / "1.png").write_text("text")
    run("fid.py", f"b {weights} --save b.npz", tiny=False)
    np.savez("nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    cases = [
        (f"a b.npz {weights} --mode pytorch-fid", r"b.npz: statistics of \(adm, .*\), not of \(pytorch-fid"),
        (f"big b.npz {weights}", "big and b.npz have 48 and 32 px|32 and 48 px; pass --crop"),
        (f"uneven b.npz {weights}", "32 and mixed px"),
        (f"broken a {weights}", "broken/1.png: cannot be read as an image"),
        (f"a nan.npz {weights}", "nan.npz: mu is not finite throughout"),
        (f"a b {weights} --metrics fid,kid", "--metrics fid,kid: wants some of"),
        ("a b --features encoder:toy --metrics is", "--metrics is: only fid"),
        ("uneven uneven --features encoder:toy", "wants square images of one size; pass --crop"),
        (f"a b --weights {tmp_path}/nan.npz", "not the Inception weights"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit, match=message) as stop:
            run("fid.py", arguments, tiny=False)
        assert "\n" not in str(stop.value)
    with pytest.raises(ValueError, match="pass the file .--weights, in training --inception"):
        fid.load_inception("nowhere.pth", "cpu")
    run("fid.py", f"uneven uneven {weights}", tiny=False)             # resized one by one
    run("fid.py", f"uneven a {weights} --crop 32", tiny=False)


def test_warnings(tmp_path, inception_file):
    save_images(tmp_path / "jpeg", 3, size=(32, 32), suffix=".JPG", mode="L")
    done = subprocess.run([sys.executable, f"{ROOT}/fid.py", tmp_path / "jpeg", tmp_path / "jpeg",
                           "--weights",
                           inception_file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("is not the published file", "holds JPEG images", "3 samples; below 2048"):
        assert text in done.stderr
    assert done.stdout.startswith("FID ") and "(N=3, adm, inception " in done.stdout
    assert "images/s" in done.stdout


def test_a_run_scores_itself_as_fid_does(run):
    """The same checkpoint, seed, labels and batch size: bit for bit."""
    run("train_diffusion.py", "--fid-every 2 --fid-num 70")
    scores = [json.loads(line) for line in open("out/diffusion/log.jsonl") if "Frechet" in line]
    assert [x["step"] for x in scores] == [2, 4]
    run("sample.py", "--num 70 --batch-size 64 --out s.npz", tiny=False)
    got = json.loads(run("fid.py", "s.npz toy --json"))
    assert got["Frechet distance"] == scores[-1]["Frechet distance"]


def test_sample_folders_carry_a_record(run):
    run("train_diffusion.py")
    run("sample.py", "--out s")
    run("sample.py", "--out s")                        # the same record: the same files again
    record = json.loads(open("s/record.json").read())
    assert record["seed"] == 0 and len(record["weights"]) == 16
    with pytest.raises(SystemExit, match="s: not empty, and its images would mix"):
        run("sample.py", "--out s --seed 1")
    run("sample.py", "--out s.npz")
    assert json.loads(str(np.load("s.npz")["record"])) == record
    assert Images("s").size == 32 and len(Images("s")) == 20


MEMORY = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import bench, fid, torch
class Source:
    source, size = "noise", 32
    def batches(self, num, size, rank, world):
        for first in range(0, num, size):
            yield first, torch.zeros(min(size, num - first), 3, 8, 8, dtype=torch.uint8)
class Net:
    logits = staticmethod(lambda f: f[:, :1008])
g = torch.Generator().manual_seed(0)
def features(x):
    return torch.rand(len(x), 2048, generator=g), torch.rand(len(x), 2023, generator=g)
num, metrics = int(sys.argv[2]), sys.argv[3].split(",")
r = fid.statistics(Source(), features, num, 64, "cpu", Net, metrics)
if "pr" in metrics:
    print(fid.precision_recall(r["pool3"], torch.rand(2000, 2048, generator=g)))
print(bench.held_at_most())
"""


def peak(num, metrics):
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}          # freed large blocks leave no holes
    done = subprocess.run([sys.executable, "-c", MEMORY, str(ROOT), str(num), metrics], capture_output=True,
                          text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_sums_stream():
    a, b = peak(1000, "fid,sfid,is"), peak(4000, "fid,sfid,is")
    assert b < a + 12e6, (a, b)                        # 3,000 more rows of features would be 50 MB


@pytest.mark.slow
def test_precision_recall_of_50000_rows():
    used = peak(50000, "pr")
    print(f"{used / 1e9:.2f} GB")
    assert used < 1.5e9
