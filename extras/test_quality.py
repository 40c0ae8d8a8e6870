"""A default run from training to samples, their score, and the checks of extras/quality.py."""

import shutil
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_default_run(tmp_path):
    unwanted = shutil.ignore_patterns("out", ".venv", ".git")
    copy = shutil.copytree(ROOT, tmp_path / "repo", ignore=unwanted)
    for script in ("train_diffusion.py", "sample.py", "fid.py", "extras/quality.py"):
        start = time.time()
        done = subprocess.run([sys.executable, script], cwd=copy, capture_output=True, text=True)
        print(f"{script}: {time.time() - start:.0f} s\n{done.stdout}")
        assert done.returncode == 0, (script, done.stdout[-1000:], done.stderr[-2000:])
