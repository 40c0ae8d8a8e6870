"""The default chain, each stage from nothing with no flags: its time and its quality."""

import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

CHAIN = ["assets/pretrain_encoder.py", "train_decoder.py", "train_diffusion.py", "sample.py", "fid.py"]


@pytest.mark.slow
def test_default_chain(tmp_path):
    shutil.copytree(ROOT, tmp_path / "repo", ignore=shutil.ignore_patterns("out", ".venv", ".git"))
    seconds = {}
    for script in CHAIN + ["tests/quality.py"]:
        began = time.time()
        done = subprocess.run([sys.executable, script], cwd=tmp_path / "repo", capture_output=True, text=True)
        seconds[script] = round(time.time() - began)
        print(script, seconds[script], "s\n", done.stdout)
        assert done.returncode == 0, (script, done.stdout[-1000:], done.stderr[-2000:])
    assert seconds["train_diffusion.py"] < 360 and sum(seconds[script] for script in CHAIN) < 900, seconds
