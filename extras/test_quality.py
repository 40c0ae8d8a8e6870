"""A default run, shortened from 1,000 to 600 steps, passes the checks of extras/quality.py."""

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
    for command in ("train_diffusion.py --steps 600", "extras/quality.py"):
        start = time.time()
        done = subprocess.run(
            [sys.executable, *command.split()], cwd=copy, capture_output=True, text=True
        )
        print(f"{command}: {time.time() - start:.0f} s\n{done.stdout}")
        assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-2000:])
