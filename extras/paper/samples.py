"""Draw samples.png: the first 60 samples of the default run, one column per class.

    pip install matplotlib
    python train_diffusion.py && python sample.py
    python extras/paper/samples.py       # out/samples.npz -> out/samples_named.png

(docs/images/samples.png is a copy. sample.py itself writes the plain grid, out/samples.png.)
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from toy.world import SHAPES  # noqa: E402

with np.load("out/samples.npz") as file:
    images = file["arr_0"][:60]  # (60, 32, 32, 3); image i is of class i % 10
figure, grid = pyplot.subplots(6, 10, figsize=(9, 5.7))
for ax, image in zip(grid.flat, images):
    ax.imshow(image, interpolation="nearest")
    ax.axis("off")
for ax, name in zip(grid[0], SHAPES):
    ax.set_title(name, fontsize=12)
figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=0.95, wspace=0.05, hspace=0.05)
figure.savefig("out/samples_named.png", dpi=150)
print("wrote out/samples_named.png")
