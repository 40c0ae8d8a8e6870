"""extras/gpu_check.py at tiny sizes: every part runs; resume; failures."""

import json
import sys
from pathlib import Path

import gpu_check
import pytest

from rae import UsageError
from tests.conftest import files_of, save_images


@pytest.fixture
def check(monkeypatch, tmp_path):
    """check("--only matmul") in an empty folder; returns the results of the parts."""
    monkeypatch.chdir(tmp_path)

    def run(flags):
        monkeypatch.setattr(sys, "argv", ["extras/gpu_check.py", *flags.split()])
        gpu_check.main()
        return parts()

    return run


def parts():
    return json.loads(Path("out/gpu_check/results.json").read_text())["parts"]


@pytest.mark.slow
def test_every_part_runs_once(check, tmp_path):
    for split, n in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            save_images(tmp_path / "cifar10" / split / name, n, size=(32, 32))
    check("--tiny --cifar10 cifar10")
    results = check("--tiny --only variants")
    assert results.keys() == gpu_check.PARTS.keys()
    for name, part in results.items():
        assert "error" not in part
        assert part["rows"], name
    rows = {row["what"]: row for row in results["variants"]["rows"]}
    assert rows.keys() >= gpu_check.VARIANTS.keys()
    assert rows["default"]["images_per_s"] > 0
    assert [row["computed_gb"] for row in results["presets"]["rows"]] == [52, 62, 47, 63]

    before = files_of("out/gpu_check")
    assert check("--tiny --cifar10 cifar10") == results
    assert files_of("out/gpu_check") == before


@pytest.mark.slow
def test_failures_do_not_cost_other_parts(check, monkeypatch):
    function, limit = gpu_check.PARTS["matmul"]
    monkeypatch.setitem(gpu_check.PARTS, "matmul", (function, 0.1))
    with pytest.raises(UsageError, match="failed: matmul, cifar10; see out/gpu_check/PART.log"):
        check("--tiny --only matmul,cifar10,sample --cifar10 nowhere")
    results = parts()
    assert results["matmul"]["error"] == "timed out after 0.1 s"
    assert results["cifar10"]["error"].startswith(
        "failed with 1: error: nowhere/train: no such folder"
    )
    assert "error" not in results["sample"]

    # Only the failed part is repeated.
    monkeypatch.setitem(gpu_check.PARTS, "matmul", (function, limit))
    again = check("--tiny --only matmul,sample")
    assert "error" not in again["matmul"]
    assert again["sample"] == results["sample"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tiny --only matmul,speed", "--only matmul,speed: choose from matmul,train"),
        ("--tiny --only cifar10", "--cifar10 FOLDER"),
    ],
)
def test_usage_errors(check, flags, message):
    with pytest.raises(UsageError, match=message):
        check(flags)


def test_other_folders_are_left_alone(check, tmp_path):
    save_images(tmp_path / "data" / "cifar10" / "train", 2)
    with pytest.raises(UsageError, match="data is not empty"):
        check("--tiny --only cifar10 --out data --cifar10 data/cifar10")
    assert (tmp_path / "data/cifar10/train/1.png").exists()


def test_without_a_gpu(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    with pytest.raises(UsageError, match="no CUDA device"):
        check("")
