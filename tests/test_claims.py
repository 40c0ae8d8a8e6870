"""assets/claims.py: two experiments of one seed; the second time all runs are there."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_claims_are_drawn_and_go_on(tmp_path):
    pytest.importorskip("matplotlib", reason="claims.py draws with it: pip install matplotlib")
    unwanted = shutil.ignore_patterns("out", ".venv", ".git")
    copy = shutil.copytree(ROOT, tmp_path / "repo", ignore=unwanted)
    command = [sys.executable, "assets/claims.py", "--quick", "--only", "width,steps"]
    said = []
    for _ in range(2):
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "5 runs, 0 of them made already" in said[0]
    assert "5 runs, 5 of them made already" in said[1]
    assert "FAILED" not in said[0]
    assert "too short" in (copy / "out/claims/quick/claims.md").read_text()
    assert (copy / "out/claims/quick/width.png").is_file()


def test_claims_links_are_alive():
    text = (ROOT / "assets/claims.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "assets" / target).is_file(), target
