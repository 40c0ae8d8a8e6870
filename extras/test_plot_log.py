"""extras/plot_log.py: a picture of a run's log, with and without previews."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="needs pip install matplotlib")

DIFFUSION = {"loss": 1.2, "lr": 1e-3, "loss_by_t": [2.0, 1.5, 1.0, 0.5, 0.2]}


def write_log(*lines):
    Path("log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def plot(run):
    run("extras/plot_log.py", ".", tiny=False)
    return np.asarray(Image.open("log.png").convert("L"))


def test_shows_the_previews_beside_the_losses(run):
    write_log({"step": 2, **DIFFUSION}, {"step": 4, **DIFFUSION})
    plain = plot(run)
    for step in (2, 4):
        Image.new("RGB", (40, 30), "black").save(f"samples_{step:07d}.png")
    with_previews = plot(run)
    half = plain.shape[1] // 2
    assert (plain[:, half:] == 0).mean() < 0.01
    assert (with_previews[:, half:] == 0).mean() > 0.2  # the previews are on the right


def test_plots_a_decoder_run(run):
    losses = {"step": 2, "l1": 0.3, "perceptual": 0.2, "g_loss": 0.0, "d_loss": 0.0}
    write_log(losses)
    without_psnr = plot(run)
    write_log(losses, {"step": 2, "psnr": 12.0, "psnr_noisy": 11.0})
    assert (plot(run) != without_psnr).any()
