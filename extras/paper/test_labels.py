"""extras/paper/labels.py: names are outside the grid, whose pixels are kept."""

import sys

import numpy as np
from PIL import Image

from extras.paper import labels


def test_names_are_outside_the_grid(tmp_path, monkeypatch):
    grid = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(grid).save("grid.png")
    command = "labels.py grid.png --zoom 3 --columns one 2*two --rows a b --out named.png"
    monkeypatch.setattr(sys, "argv", command.split())
    labels.main()
    named = np.array(Image.open("named.png"))
    top, left = named.shape[0] - 120, named.shape[1] - 180
    assert (named[top:, left:] == grid.repeat(3, axis=0).repeat(3, axis=1)).all()
    assert named[:top, left:].min() < 50 and named[top:, :left].min() < 50  # dark letters


def test_shares():
    assert list(labels.centers(["sample", "3*near"])) == [("sample", 0.125), ("near", 0.625)]
