"""Train a diffusion model that predicts the clean latent instead of the velocity, as in JiT.

    python extras/paper/x_prediction.py --out out/x_prediction     # the flags of train_diffusion.py

For claims.py. sample.py and the other scripts would take the last layer's output for a velocity.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_diffusion  # noqa: E402
from dit_dh import DiTDH  # noqa: E402
from rae import run_script  # noqa: E402


class XPrediction(DiTDH):
    """A DiTDH whose last layer predicts the clean latent; forward still returns the velocity.

    x_t = (1 - t) z + t eps, so v = eps - z = (x_t - z) / t. The noise in v then comes from x_t, and
    the network needs no width to carry it. t >= 0.05 bounds the division.
    """

    def forward(self, x_t, t, y):
        x_hat = super().forward(x_t, t, y)  # (B, N, C)
        return (x_t - x_hat) / t.clamp(min=0.05)[:, None, None]


if __name__ == "__main__":
    train_diffusion.DiTDH = XPrediction
    run_script(train_diffusion.main)
