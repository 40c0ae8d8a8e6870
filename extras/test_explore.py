"""extras/explore.py: the pictures it draws, all of its flags, and its error messages."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, run_here, small_world

EXPLORE = "extras/explore.py"
# Every flag off its default, on the files that the fixture `explore` makes.
EVERY_FLAG = [
    "--like photo.png --ckpt moved/checkpoint.pt --decoder toy_decoder.pt --strength 0.9 "
    "--steps 2 --cfg-scale 1 --seed 3 --classes 1,2 --out deep/like.png",
    "--interpolate photo.png samples/000001.png --steps 2 --classes 4 --out row.png",
    "--query photo.png toy --steps 2 --classes 4,5 --out query.png",
    "--neighbors toy --steps 2 --classes null --out nearest.png",
]


@pytest.fixture(scope="session")
def explored_once(tmp_path_factory):
    """A folder with a tiny model, its samples, and a photo of another size."""
    folder = tmp_path_factory.mktemp("explored")
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_world(monkeypatch, folder)
        # A high learning rate, so that four steps teach the model something about classes.
        run_here("train_diffusion.py", "--lr 0.1 --ema 0")
        run_here("sample.py", "--cfg-scale 2 --out samples")
    noise = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    return folder


@pytest.fixture
def explore(run, explored_once, tmp_path):
    """Run the script in a copy of that folder."""
    shutil.copytree(explored_once, tmp_path, dirs_exist_ok=True)
    return lambda arguments: run(EXPLORE, arguments, tiny=False)


def read_grid(path, columns):
    """The images of a grid, row by row, without borders and at their original size."""
    grid = np.asarray(Image.open(path))[::2, ::2]  # images of 32 px are enlarged twice
    assert grid.shape[1] == columns * 34
    rows = grid.reshape(-1, 34, columns, 34, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, 34, 34, 3)[:, 1:-1, 1:-1]


def test_editing(explore):
    a, b = "samples/000001.png", "samples/000002.png"
    explore(f"--like {a} --strength 0 --steps 2 --classes 3,7,8 --out like.png")
    explore(f"--like {a} --strength 0.7 --steps 2 --classes 3,7 --out edited.png")
    explore(f"--interpolate {a} {b} --strength 0 --steps 2 --out row.png")
    like = read_grid("like.png", columns=3)
    edited = read_grid("edited.png", columns=2)
    row = read_grid("row.png", columns=8)
    assert len(like) == 3
    assert len(edited) == 2
    assert len(row) == 8

    # Without noise, every class gives the reconstruction, and so does the start of the row.
    assert (like == like[0]).all()
    assert (row[0] == like[0]).all()
    assert (row[0] != row[-1]).any()
    assert (edited[0] != like[0]).any()


def test_reconstruction_without_noise(explore):
    """--strength 0 decodes the latent of the center crop."""
    import rae
    from sample import to_uint8

    explore("--interpolate photo.png photo.png --strength 0 --steps 1 --out row.png")
    autoencoder = rae.load_rae("toy")
    crop = np.asarray(rae.center_crop(rae.open_image("photo.png"), 32))
    image = torch.tensor(crop).permute(2, 0, 1)[None] / 255
    expected = to_uint8(autoencoder.decode(autoencoder.encode(image)))[0].permute(1, 2, 0)
    row = read_grid("row.png", columns=8).astype(int)
    assert np.abs(row - expected.numpy()).max() <= 1  # a batch of 8 may round differently


def test_neighbors(explore):
    """Samples in the folder are their own nearest images."""
    flags = "--cfg-scale 2 --steps 2 --classes 0,1,2,3,4,5,6,7"  # as in samples/
    output = explore(f"--neighbors samples {flags} --out nearest.png")
    assert "the nearest of 20 images (cosine 1.000)" in output
    grid = read_grid("nearest.png", columns=8)
    assert len(grid) == 64
    assert (grid[::8] == grid[1::8]).all()
    assert (grid[1::8] != grid[2::8]).any(axis=(1, 2, 3)).all()


def test_query(explore):
    """An image in the folder is its own neighbor; without noise, rows are reconstructions."""
    flags = "--strength 0 --steps 2 --classes 3,7"
    output = explore(f"--query samples/000004.png samples {flags} --out query.png")
    assert "the nearest of 20 images (cosine 1.000)" in output
    grid = read_grid("query.png", columns=8).reshape(3, 8, 32, 32, 3)
    assert (grid[0, 0] == np.asarray(Image.open("samples/000004.png"))).all()
    assert (grid[0, 1] == grid[0, 0]).all()
    assert (grid[0, 2] != grid[0, 0]).any()
    assert (grid[1] == grid[2]).all()
    same = "samples/000004.png samples/000004.png"
    explore(f"--interpolate {same} --strength 0 --steps 2 --out row.png")
    decoded = read_grid("row.png", columns=8)[0].astype(int)
    assert np.abs(grid[1, 0] - decoded).max() <= 1  # batches may round differently
    # With noise the class matters.
    explore("--query samples/000004.png samples --steps 2 --classes 3,7 --out query.png")
    grid = read_grid("query.png", columns=8).reshape(3, 8, 32, 32, 3)
    assert (grid[1] != grid[2]).any()


def test_every_flag_runs(explore, tmp_path):
    shutil.copytree("out/diffusion", "moved")
    shutil.copy(ROOT / "toy/decoder.pt", "toy_decoder.pt")
    outputs = []
    for arguments in EVERY_FLAG:
        output = explore(arguments)
        outputs.append(re.search(r"--out (\S+)", arguments).group(1))
        assert f"wrote {outputs[-1]}" in output
    first = read_grid("deep/like.png", columns=2)

    # Seed, guidance, steps and strength each change the picture.
    base = EVERY_FLAG[0]
    for old, new in (
        ("--seed 3", "--seed 4"),
        ("--cfg-scale 1", "--cfg-scale 3"),
        ("--steps 2", "--steps 3"),
        ("--strength 0.9", "--strength 0.8"),
        ("--classes 1,2", "--classes 3,4"),
    ):
        explore(base.replace(old, new))
        assert (read_grid("deep/like.png", columns=2) != first).any(), old


ERRORS = {
    "--like missing.png": "missing.png",
    "--neighbors missing": "missing: no such folder",
    "--query photo.png missing": "missing: no such folder",
    "--like photo.png --ckpt missing.pt": "missing.pt",
    "--like photo.png --ckpt bare.pt": "names no decoder; pass --decoder",
    "--like photo.png --classes 3,10": "--classes takes numbers from 0 to 9",
}
ARGPARSE_ERRORS = {
    "": "one of the arguments --like --interpolate --query --neighbors is required",
    "--like a.png --neighbors toy": "not allowed with argument --like",
    "--interpolate photo.png": "expected 2 arguments",
    "--like photo.png --classes x": "argument --classes",
    "--like photo.png --strength 1.1": "argument --strength",
    "--like photo.png --steps 0": "argument --steps",
}


def test_errors(explore, capsys):
    checkpoint = torch.load("out/diffusion/checkpoint.pt")
    torch.save({"ema": checkpoint["ema"], "config": checkpoint["config"]}, "bare.pt")
    for arguments, text in ERRORS.items():
        with pytest.raises(SystemExit) as stop:
            explore(arguments)
        assert stop.value.code.startswith("error: "), arguments
        assert text in stop.value.code, arguments
        assert "\n" not in stop.value.code, arguments
    for arguments, text in ARGPARSE_ERRORS.items():
        with pytest.raises(SystemExit) as stop:
            explore(arguments)
        assert stop.value.code == 2, arguments
        assert text in capsys.readouterr().err, arguments
