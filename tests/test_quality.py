"""The default diffusion run on the shipped weights: its samples, their score, the bars of quality.py."""

import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(ROOT, tmp_path / "repo", ignore=shutil.ignore_patterns("out", ".venv", ".git"))


@pytest.mark.slow
def test_default_run(copy):
    for script in ("train_diffusion.py", "sample.py", "fid.py", "tests/quality.py"):
        began = time.time()
        done = subprocess.run([sys.executable, script], cwd=copy, capture_output=True, text=True)
        print(f"{script}: {time.time() - began:.0f} s\n{done.stdout}")
        assert done.returncode == 0, (script, done.stdout[-1000:], done.stderr[-2000:])


@pytest.mark.slow
def test_claims_are_drawn_and_go_on(copy):
    """Two experiments of one seed; the second time all runs are there."""
    command = [sys.executable, "assets/claims.py", "--quick", "--only", "width,steps", "--jobs", "1"]
    said = [subprocess.run(command, cwd=copy, capture_output=True, text=True).stdout for _ in range(2)]
    assert "5 runs, 0 of them made already" in said[0] and "5 runs, 5 of them made already" in said[1], said
    assert "FAILED" not in said[0] and "too short" in (copy / "out/claims/quick/claims.md").read_text()
    assert (copy / "out/claims/quick/width.png").is_file()
