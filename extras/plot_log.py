"""Plot a run's losses beside its first and last preview.

    pip install matplotlib
    python extras/plot_log.py out/diffusion      # -> out/diffusion/log.png

Works for both training scripts, also while they run.
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot

LOSSES = ["loss", "l1", "perceptual", "g_loss", "d_loss"]
DETAILS = ["loss_by_t", "psnr", "psnr_noisy"]
FIFTHS = [f"loss, t = {i / 5:g} to {(i + 1) / 5:g}" for i in range(5)]  # labels of loss_by_t


def main():
    out = Path(sys.argv[1])
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    previews = sorted(out.glob("samples_*.png")) or sorted(out.glob("grid_*.png"))
    figure, grid = pyplot.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for ax, names in zip(grid[:, 0], (LOSSES, DETAILS)):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                ax.plot(*zip(*points), ".-", label=FIFTHS if name == "loss_by_t" else name)
                ax.legend()
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    for ax, path in zip(grid[:, 1], previews[:1] + previews[1:][-1:]):
        ax.imshow(pyplot.imread(path))
        ax.set_title(path.name)
    for ax in grid[:, 1]:
        ax.axis("off")
    figure.savefig(out / "log.png")
    print(f"wrote {out}/log.png")


if __name__ == "__main__":
    main()
