"""Shared by the tests: the scripts run in this process at tiny sizes, and the toy world shrinks for them."""

import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(ROOT))

# What makes a command of the README small enough for a test; appended to it, so it wins.
TINY = {
    "train_decoder.py": "--steps 4 --batch-size 8 --log-every 2 --eval-every 2 --eval-num 20 --save-every 2",
    "train_diffusion.py": "--steps 4 --batch-size 8 --log-every 2 --sample-every 4 --save-every 2",
    "sample.py": "--num 20 --steps 2",
    "fid.py": "",
    "assets/pretrain_encoder.py": "--steps 4 --batch-size 8",
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by .ci/run and by pytest -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run("train_decoder.py", "--steps 4 ...") in an empty folder, small toy world; returns its output.

    A script that stops with an error raises SystemExit, whose text is the line a user would see."""
    import rae
    from assets import toy_world
    monkeypatch.setattr(toy_world, "TOY", {"train": (60, 0), "val": (30, 1)})
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(script, arguments="", tiny=True):
        import importlib.util
        name = "script_" + Path(script).stem
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        words = f"{arguments} {TINY[script] if tiny else ''}".split()
        monkeypatch.setattr(sys, "argv", [script, *words])
        spec.loader.exec_module(module)
        capsys.readouterr()
        try:
            rae.cli(module.main)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return capsys.readouterr().out

    return call


@pytest.fixture
def group():
    """This process as a group of one, as rae.start has it."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def golden():
    return {name: torch.load(GOLDEN / f"{name}.pt", weights_only=True) for name in ("rae", "dit_dh", "dit")}


def tokens(x):
    """(B, C, h, w) as the released code has it -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def gap(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()
