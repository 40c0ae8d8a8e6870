"""Shared by all tests: how to run a script, tiny trained runs, and small helpers.

Scripts run in this process, at tiny sizes and on a small toy world (fixture `run`). Only tests
about processes start others (`launch`).
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rae
from toy import world

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "extras/README.md"]
PHOTOGRAPHS = ROOT.parent / "shared" / "data"  # real ones, where they are at hand

# Flags that make a command small enough for a test. They come last, and so they win.
SMALL_MODEL = "--backbone 16,1,2 --wide-head 24,1,2"
SHORT = "--steps 4 --global-batch-size 8 --log-every 2 --save-every 2"
TINY = {
    "train_decoder.py": f"{SHORT} --eval-every 2 --eval-num 20",
    "train_diffusion.py": f"{SHORT} --sample-every 4 {SMALL_MODEL}",
    "sample.py": "--num 20 --steps 2",
    "fid.py": "",
    "extras/pretrain_encoder.py": "--steps 4 --batch-size 8",
    "extras/explore.py": "--steps 2",
    "extras/reconstruct.py": "",
    "extras/to_official.py": "",
}
TRAINING = ["train_decoder.py", "train_diffusion.py"]

compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"
)


# ---------------------------------------------------------------------------------------------
# Fixtures


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same random numbers alone and after other tests."""
    torch.manual_seed(0)


def small_world(monkeypatch, folder):
    monkeypatch.setattr(world, "TOY", {"train": (60, 0), "val": (30, 1)})
    monkeypatch.chdir(folder)


def run_here(script, arguments="", tiny=True):
    """Run a script in this process and folder; returns what it printed.

    A UsageError becomes SystemExit("error: ..."), the line that a user would see. An argparse error
    is SystemExit(2), with the message in capsys's stderr.
    """
    spec = importlib.util.spec_from_file_location("script_" + Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    words = arguments.split() if isinstance(arguments, str) else arguments
    words = [script, *words, *(TINY[script].split() if tiny else [])]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", words)
        spec.loader.exec_module(module)
        rae.run_script(module.main)
    return printed.getvalue()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run("train_decoder.py", "--seed 1") in an empty folder, on a small toy world."""
    small_world(monkeypatch, tmp_path)
    return run_here


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with tiny runs of both stages."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_world(monkeypatch, folder)
        for script in TRAINING:
            run_here(script)
    return folder


@pytest.fixture
def trained(run, trained_once):
    """Like `run`, in a folder with out/decoder and out/diffusion."""
    shutil.copytree(trained_once / "out", "out")
    return run


@pytest.fixture
def snapshots(monkeypatch):
    """Copy a run's folder OUT to OUT.STEP after each save: what a kill at that time leaves."""
    atomic_save = rae.atomic_save

    def save_and_copy(content, path):
        atomic_save(content, path)
        if "step" in content:
            shutil.copytree(path.parent, f"{path.parent}.{content['step']}", dirs_exist_ok=True)

    monkeypatch.setattr(rae, "atomic_save", save_and_copy)


@pytest.fixture(scope="session")
def golden():
    return {name: load(GOLDEN / f"{name}.pt") for name in ("rae", "dit_dh", "dit", "stage1")}


@pytest.fixture(scope="session")
def toy():
    """The toy's RAE. Tests do not change it."""
    return rae.load_rae("toy")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Weights of fid.py's network whose features neither vanish nor explode.

    They are random; the batch norms have the statistics of a few images.
    """
    import timm

    from fid import Inception, preprocess

    torch.manual_seed(0)
    inception = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
    net = Inception(inception.state_dict())
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average: the statistics of the one batch
    images = photographs("imagenette/val", 8, 224)
    with torch.no_grad():
        net.train()(preprocess(images, "adm"))
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.save(net.net.state_dict(), path)
    return path


def photographs(folder, n, size):
    """n photographs from all over a folder of PHOTOGRAPHS, (n, 3, size, size) uint8; or toys."""
    from fid import read_image

    if not (PHOTOGRAPHS / folder).is_dir():
        return torch.from_numpy(world.toy_images(n, seed=3, size=size)[0])
    paths = rae.list_images(PHOTOGRAPHS / folder)
    chosen = np.linspace(0, len(paths) - 1, n).astype(int)
    return torch.stack([read_image(paths[i], size) for i in chosen])


@pytest.fixture
def photos(tmp_path):
    """photos/ (2 x 6 images) and photos_val/ (2 x 3): the classes cat and dog."""
    for i, name in enumerate(("cat", "dog")):
        save_images(tmp_path / "photos" / name, 6, size=(44, 40), seed=i)
        save_images(tmp_path / "photos_val" / name, 3, size=(44, 40), seed=9 + i)
    return tmp_path / "photos"


# ---------------------------------------------------------------------------------------------
# Files


def save_images(folder, n, size=(40, 36), mode="RGB", suffix=".png", seed=0):
    """Write n images of random pixels, 0.png, 1.png, ..., of `size` (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    width, height = size
    for i in range(n):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}{suffix}")


def load(path):
    return torch.load(path, weights_only=True)


def log_of(out):
    """The lines of a run's log, without the speed."""
    lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    for line in lines:
        line.pop("images_per_s", None)
    return lines


def files_of(folder):
    """The bytes of all files below a folder, and None for folders."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def pictures_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.png"))}


def same(a, b):
    """Bit-equal, through nested dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def assert_same_run(a, b):
    """Equal checkpoints, logs and pictures."""
    assert same(load(f"{a}/checkpoint.pt"), load(f"{b}/checkpoint.pt"))
    assert log_of(a) == log_of(b)
    assert pictures_of(a) == pictures_of(b)


NUMBERS = ("l1", "perceptual", "loss", "psnr", "psnr_noisy")


def assert_close_logs(log, other, rel, numbers=NUMBERS):
    """The same numbers in two logs, line by line."""
    for a, b in zip(log, other, strict=True):
        for key in a.keys() & numbers:
            assert a[key] == pytest.approx(b[key], rel=rel), (key, a, b)


def tokens(x):
    """(B, C, h, w), as in the official code -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def gap(a, b):
    """The largest absolute difference between two tensors."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()


def relative_gap(a, b):
    """The largest absolute difference, relative to the largest number of b."""
    return gap(a, b) / b.abs().max().item()


def relative_distance(a, b):
    """The norm of the difference of two lists of tensors, relative to the first's norm."""
    a = torch.cat([x.flatten() for x in a])
    b = torch.cat([x.flatten() for x in b])
    return ((a - b).norm() / a.norm()).item()


def first_gradients(monkeypatch):
    """A list to which every optimizer adds its gradients when it first steps."""
    seen = []

    class AdamW(torch.optim.AdamW):
        fresh = True

        def step(self):
            if self.fresh:
                seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
                self.fresh = False
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    return seen


# ---------------------------------------------------------------------------------------------
# Processes


def begin(script, flags="", processes=1, cwd=None, torchrun=(), **env):
    """Start a script, under torchrun if processes > 1 or if it has flags of its own."""
    launcher = [sys.executable]
    if processes > 1 and not torchrun:
        torchrun = ("--standalone", f"--nproc_per_node={processes}")
    if torchrun:
        launcher += ["-m", "torch.distributed.run", *torchrun, "--"]
    return subprocess.Popen(
        [*launcher, str(ROOT / script), *flags.split()],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(script, flags="", processes=1, cwd=None, **env):
    """Run a script to its end, which must be a good one; returns what it printed."""
    process = begin(script, flags, processes, cwd, **env)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, (script, flags, out[-1000:], err[-3000:])
    return out
