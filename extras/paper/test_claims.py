"""extras/paper: the numbers of docs/results.md and the scripts behind them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from dit_dh import DiTDH
from extras.paper.claims import verdict
from extras.paper.x_prediction import XPrediction
from tests.conftest import ROOT, launch


def run_in_copy(tmp_path, *command):
    """Run a script in a copy of the repository and return what it printed."""
    pytest.importorskip("matplotlib", reason="needs pip install matplotlib")
    copy = tmp_path / "repo"
    if not copy.exists():
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".venv", ".git"))
    process = subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_x_prediction_returns_the_velocity():
    """If the last layer predicts z, the model returns eps - z; below t = 0.05, less than that."""
    sizes = dict(latent_dim=8, grid_size=2, backbone=(16, 1, 2), wide_head=None, num_classes=3)
    model = XPrediction(**sizes)
    z = torch.randn(1, 1, 8).expand(3, 4, 8)
    model.final_layer.linear.bias.data = z[0, 0]  # its weight starts at zero
    eps = torch.randn(3, 4, 8)
    t = torch.tensor([0.025, 0.3, 1.0])
    x_t = (1 - t[:, None, None]) * z + t[:, None, None] * eps
    share = torch.tensor([0.5, 1, 1])[:, None, None]
    v = model(x_t, t, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(v, share * (eps - z), rtol=0, atol=1e-5)
    assert model.state_dict().keys() == DiTDH(**sizes).state_dict().keys()


def test_results_page_equals_claims_json():
    """Each cell and verdict of docs/results.md. The page leaves out some cells and high shares."""
    saved = json.loads((ROOT / "docs/claims.json").read_text())["rows"]
    lines = (ROOT / "docs/results.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    verdicts = ("yes", "in part", "mixed", "no", "not shown")
    table = [row for row in table if len(row) == 4 and row[3] in verdicts]
    assert [row[0] for row in table] == [row["claim"] for row in saved]
    for (claim, _, here, shown), row in zip(table, saved):
        assert shown == row["shown"], claim
        for cell in re.sub(r"[][*]", "", here).split("; "):
            name, text = cell.split(": ")
            numbers = [float(number) for number in re.findall(r"[\d.]+", text)]
            in_file = row["cells"][name]
            if len(in_file) == 3 and in_file[2] >= 0.98:
                in_file = in_file[:2]
            assert numbers == in_file, (claim, name)


def test_verdicts_follow_from_the_intervals():
    """Except in rows with a criterion of their own."""
    for row in json.loads((ROOT / "docs/claims.json").read_text())["rows"]:
        if "criterion" in row:
            continue
        comparisons = []
        for intervals in row["differences"].values():
            signs = [(center - half > 0) - (center + half < 0) for center, half in intervals]
            comparisons.append((signs, ""))
        assert verdict(*comparisons) == row["shown"], row["claim"]


def test_results_page_equals_toy_json():
    """The tables of the toy's numbers in docs/results.md, rounded as there."""
    saved = json.loads((ROOT / "docs/toy.json").read_text())
    rows = {}
    for line in (ROOT / "docs/results.md").read_text().splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name] = re.findall(r"\d+(?:\.\d+)?", " ".join(cells))
    quality = (
        ("classifier on validation images", "classifier"),
        ("linear probe on the latents", "linear_probe"),
        ("shipped decoder: PSNR of validation images", "psnr"),
        ("... reconstructions recognized", "reconstructions_right"),
        ("500 unguided samples recognized as their class", "samples_right"),
        ("... with CFG 1.5", "samples_right_cfg"),
    )
    shown = {name: ([saved["quality"][key]], rows[name]) for name, key in quality}
    for name, key in (("`train_diffusion.py`, loss", "loss"), ("`train_decoder.py`, L1", "l1")):
        steps = rows["step"][: len(rows[name])]
        shown[name] = ([saved[key][step] for step in steps], rows[name])
    for name, row in (("with GAN", "with GAN"), ("--disc-weight 0", "`--disc-weight 0`")):
        scores = saved["gan"][name]
        shown[name] = (scores["psnr"] + scores["ssim"] + scores["distance"], rows[row])
    for name, (numbers, texts) in shown.items():
        assert len(numbers) == len(texts), name
        for number, text in zip(numbers, texts):
            assert float(text) == round(number, len(text.partition(".")[2])), (name, number, text)


def test_claims_figure_has_six_panels(tmp_path, monkeypatch):
    """Each with a title and data, drawn from docs/claims.json."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs pip install matplotlib")
    from extras.paper import claims_figure

    monkeypatch.chdir(tmp_path)
    claims_figure.main()
    panels = pyplot.gcf().axes
    pyplot.close()
    assert len(panels) == 6
    assert all(panel.get_title() and len(panel.lines) > 3 for panel in panels)
    assert Image.open("out/claims.png").width == 1800


@pytest.mark.slow
def test_claims_write_a_table_and_resume(tmp_path):
    """An experiment with one seed. The second time, all runs are done."""
    command = ["extras/paper/claims.py", "--quick", "--only", "steps"]
    first = run_in_copy(tmp_path, *command)
    second = run_in_copy(tmp_path, *command)
    assert "3 runs, 0 of them done" in first
    assert "3 runs, 3 of them done" in second
    assert "FAILED" not in first
    quick = tmp_path / "repo/out/claims/quick"
    table = (quick / "claims.md").read_text()
    assert "too short" in table
    assert "nan" not in table


@pytest.mark.slow
def test_the_shift_follows_the_square_root(tmp_path):
    """From 64 to 4,096 latent numbers, and from 192 to 12,288 pixel values."""
    printed = run_in_copy(tmp_path, "extras/paper/why_shift.py")
    errors = re.findall(r"each within ([\d.]+)%", printed)
    assert len(errors) == 2
    assert max(map(float, errors)) < 5


@pytest.mark.slow
def test_costs_are_the_papers():
    """Our models have the paper's numbers of multiply-adds, counted its way."""
    counts = {}
    for row in launch("extras/paper/costs.py").splitlines():
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
