"""extras/paper/claims.py on two experiments, the law of why_shift.py, the counts of costs.py."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


def run_in_copy(tmp_path, *command):
    """What a script of a copy of the repository prints; without matplotlib the test is skipped."""
    pytest.importorskip("matplotlib", reason="it draws with matplotlib: pip install matplotlib")
    copy = tmp_path / "repo"
    if not copy.exists():
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".venv", ".git"))
    done = subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_claims_are_drawn_and_go_on(tmp_path):
    """Two experiments of one seed; the second time all runs are there."""
    command = ["extras/paper/claims.py", "--quick", "--only", "width,steps"]
    first = run_in_copy(tmp_path, *command)
    second = run_in_copy(tmp_path, *command)
    assert "6 runs, 0 of them made already" in first
    assert "6 runs, 6 of them made already" in second
    assert "FAILED" not in first
    quick = tmp_path / "repo/out/claims/quick"
    assert "too short" in (quick / "claims.md").read_text()
    assert (quick / "claims.png").is_file()


@pytest.mark.slow
def test_the_shift_follows_the_square_root(tmp_path):
    """From 64 to 4,096 numbers of a latent, and from 192 to 12,288 of a picture."""
    said = run_in_copy(tmp_path, "extras/paper/why_shift.py")
    off = re.findall(r"each within ([\d.]+)%", said)
    assert len(off) == 2
    assert max(map(float, off)) < 5


@pytest.mark.slow
def test_costs_are_the_papers():
    """Counted as the paper's, the models have its numbers of multiply-adds."""
    command = [sys.executable, "extras/paper/costs.py"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    counts = {}
    for row in said.splitlines():
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) > 4 and re.fullmatch(r"[\d.]+", cells[3]):
            counts[cells[1]] = float(cells[3])
    paper = {
        "DiT-XL on RAE latents, an evaluation": 114.8,
        "DiT^DH-XL": 156.8,
        "decoder SD-VAE": 310.4,
        "decoder ViT-B": 22.2,
        "decoder ViT-L": 78.1,
        "decoder ViT-XL": 106.7,
    }
    for name, count in paper.items():
        assert counts[name] == pytest.approx(count, rel=0.005), name
