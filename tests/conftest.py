"""Shared by the tests: the scripts run in this process at tiny sizes, on a small toy world."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

# What makes a command of the README small enough for a test; appended to it, so it wins.
TRAINING = "--steps 4 --global-batch-size 8 --log-every 2 --save-every 2"
TINY = {
    "train_decoder.py": f"{TRAINING} --eval-every 2 --eval-num 20",
    "train_diffusion.py": f"{TRAINING} --sample-every 4",
    "sample.py": "--num 20 --steps 2",
    "fid.py": "",
    "extras/pretrain_encoder.py": "--steps 4 --batch-size 8",
}


# The README, and the pages that it links.
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def docs():
    """The text of all of them."""
    return "\n".join(path.read_text() for path in DOCS)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, alone and after others."""
    torch.manual_seed(0)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run("train_decoder.py", "--steps 4 ...") in an empty folder, on a small toy world.

    It returns what the script printed. A script that stops with an error raises SystemExit, whose
    text is the line that a user would see.
    """
    import rae
    from toy import world

    monkeypatch.setattr(world, "TOY", {"train": (60, 0), "val": (30, 1)})
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(script, arguments="", tiny=True):
        name = "script_" + Path(script).stem
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        words = arguments.split() if isinstance(arguments, str) else arguments
        extra = TINY[script].split() if tiny else []
        monkeypatch.setattr(sys, "argv", [script, *words, *extra])
        spec.loader.exec_module(module)
        capsys.readouterr()
        try:
            module.main()
        except (ValueError, OSError) as error:
            raise SystemExit(rae.error_line(error)) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def golden():
    names = ("rae", "dit_dh", "dit", "stage1")
    return {name: torch.load(GOLDEN / f"{name}.pt", weights_only=True) for name in names}


def tokens(x):
    """(B, C, h, w) as the released code has it -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def gap(a, b):
    """The largest difference of two tensors."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()
