"""The default diffusion run on the shipped weights: its samples, their score, quality.py's bars."""

import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_default_run(tmp_path):
    unwanted = shutil.ignore_patterns("out", ".venv", ".git")
    copy = shutil.copytree(ROOT, tmp_path / "repo", ignore=unwanted)
    for script in ("train_diffusion.py", "sample.py", "fid.py", "extras/quality.py"):
        began = time.time()
        done = subprocess.run([sys.executable, script], cwd=copy, capture_output=True, text=True)
        print(f"{script}: {time.time() - began:.0f} s\n{done.stdout}")
        assert done.returncode == 0, (script, done.stdout[-1000:], done.stderr[-2000:])
