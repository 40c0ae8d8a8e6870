"""Shared by the tests. Scripts run in this process at tiny sizes, on a small toy world."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

# Flags that make a command small enough for a test. They come last, and so they win.
TRAINING = "--steps 4 --global-batch-size 8 --log-every 2 --save-every 2"
TINY = {
    "train_decoder.py": f"{TRAINING} --eval-every 2 --eval-num 20",
    "train_diffusion.py": f"{TRAINING} --sample-every 4 --backbone 16,1,2 --wide-head 24,1,2",
    "sample.py": "--num 20 --steps 2",
    "fid.py": "",
    "extras/pretrain_encoder.py": "--steps 4 --batch-size 8",
    "extras/explore.py": "--steps 2",
    "extras/reconstruct.py": "",
    "extras/to_official.py": "",
}

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same random numbers alone and after other tests."""
    torch.manual_seed(0)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run("train_decoder.py", "--steps 4 ...") in an empty folder, on a small toy world.

    Returns what the script printed. A UsageError becomes SystemExit("error: ..."), the line that a
    user would see. An argparse error is SystemExit(2), with the message in capsys's stderr.
    """
    import rae
    from toy import world

    monkeypatch.setattr(world, "TOY", {"train": (60, 0), "val": (30, 1)})
    monkeypatch.chdir(tmp_path)

    def call(script, arguments="", tiny=True):
        name = "script_" + Path(script).stem
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        words = arguments.split() if isinstance(arguments, str) else arguments
        extra = TINY[script].split() if tiny else []
        monkeypatch.setattr(sys, "argv", [script, *words, *extra])
        spec.loader.exec_module(module)
        capsys.readouterr()
        rae.run_script(module.main)
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def golden():
    names = ("rae", "dit_dh", "dit", "stage1")
    return {name: torch.load(GOLDEN / f"{name}.pt", weights_only=True) for name in names}


def tokens(x):
    """(B, C, h, w), as in the official code -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def gap(a, b):
    """The largest absolute difference between two tensors."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()
