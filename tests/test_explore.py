"""extras/explore.py: what it draws, each of its flags off its default, and mistakes in one line."""

import argparse
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

EXPLORE = "extras/explore.py"
# Every flag off its default (test_every_flag_is_run), on what the fixture `explore` makes.
EVERY_FLAG = [
    "--like photo.png --ckpt moved/checkpoint.pt --decoder toy_decoder.pt --strength 0.9 "
    "--steps 2 --cfg-scale 1 --seed 3 --classes 1,2 --out deep/like.png",
    "--interpolate photo.png pictures/000001.png --steps 2 --classes 4 --out row.png",
    "--query photo.png toy --steps 2 --classes 4,5 --out query.png",
    "--neighbours toy --steps 2 --classes null --out nearest.png",
]


@pytest.fixture
def explore(run, tmp_path):
    """Run the script where there is a tiny model, pictures/ of it, and a photo of another size."""
    # A small model for speed; a high rate, so that four steps give it something to say of classes.
    run("train_diffusion.py", "--backbone 16,1,2 --wide-head 24,1,2 --lr 0.1 --ema 0")
    run("sample.py", "--cfg-scale 2 --out pictures")
    noise = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.png")
    return lambda arguments: run(EXPLORE, arguments, tiny=False)


def cells(path, columns):
    """The pictures of a sheet, row by row: without frames, and as small as they were."""
    sheet = np.asarray(Image.open(path))[::2, ::2]  # images of 32 px are drawn twice as large
    assert sheet.shape[1] == columns * 34
    rows = sheet.reshape(-1, 34, columns, 34, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, 34, 34, 3)[:, 1:-1, 1:-1]


def test_editing(explore):
    a, b = "pictures/000001.png", "pictures/000002.png"
    explore(f"--like {a} --strength 0 --steps 2 --classes 3,7,8 --out like.png")
    explore(f"--like {a} --strength 0.7 --steps 2 --classes 3,7 --out edited.png")
    explore(f"--interpolate {a} {b} --strength 0 --steps 2 --out row.png")
    like = cells("like.png", columns=3)
    edited = cells("edited.png", columns=2)
    row = cells("row.png", columns=8)
    assert len(like) == 3
    assert len(edited) == 2
    assert len(row) == 8

    # Without noise every class gives the reconstruction, and so does the first of the row.
    assert (like == like[0]).all()
    assert (row[0] == like[0]).all()
    assert (row[0] != row[-1]).any()
    assert (edited[0] != like[0]).any()


def test_reconstruction_without_noise(explore):
    """--strength 0 decodes the latent of the image's central square, as rae.py does."""
    import rae

    explore("--interpolate photo.png photo.png --strength 0 --steps 1 --out row.png")
    autoencoder = rae.load_rae("toy")
    square = np.asarray(rae.center_crop(rae.open_image("photo.png"), 32))
    image = torch.tensor(square).permute(2, 0, 1)[None] / 255
    expected = rae.to_uint8(autoencoder.decode(autoencoder.encode(image)))[0].permute(1, 2, 0)
    row = cells("row.png", columns=8).astype(int)
    assert np.abs(row - expected.numpy()).max() <= 1  # a batch of 8 may round otherwise


def test_neighbours(explore):
    """Samples that are in the folder are their own nearest images."""
    flags = "--cfg-scale 2 --steps 2 --classes 0,1,2,3,4,5,6,7"  # pictures/ begins with these
    said = explore(f"--neighbours pictures {flags} --out nearest.png")
    assert "the nearest of 20 images (cosine 1.000)" in said
    sheet = cells("nearest.png", columns=8)
    assert len(sheet) == 64
    assert (sheet[::8] == sheet[1::8]).all()
    assert (sheet[1::8] != sheet[2::8]).any(axis=(1, 2, 3)).all()


def test_query(explore):
    """An image that is in the folder is its own nearest; without noise the rows are the decoded."""
    flags = "--strength 0 --steps 2 --classes 3,7"
    said = explore(f"--query pictures/000004.png pictures {flags} --out query.png")
    assert "the nearest of 20 images (cosine 1.000)" in said
    sheet = cells("query.png", columns=8).reshape(3, 8, 32, 32, 3)
    assert (sheet[0, 0] == np.asarray(Image.open("pictures/000004.png"))).all()
    assert (sheet[0, 1] == sheet[0, 0]).all()
    assert (sheet[0, 2] != sheet[0, 0]).any()
    assert (sheet[1] == sheet[2]).all()
    same = "pictures/000004.png pictures/000004.png"
    explore(f"--interpolate {same} --strength 0 --steps 2 --out row.png")
    decoded = cells("row.png", columns=8)[0].astype(int)
    assert np.abs(sheet[1, 0] - decoded).max() <= 1  # another batch may round otherwise
    # With noise the class matters.
    explore("--query pictures/000004.png pictures --steps 2 --classes 3,7 --out query.png")
    sheet = cells("query.png", columns=8).reshape(3, 8, 32, 32, 3)
    assert (sheet[1] != sheet[2]).any()


def test_every_flag_runs(explore, tmp_path):
    shutil.copytree("out/diffusion", "moved")
    shutil.copy(ROOT / "toy/decoder.pt", "toy_decoder.pt")
    outputs = []
    for arguments in EVERY_FLAG:
        said = explore(arguments)
        outputs.append(re.search(r"--out (\S+)", arguments).group(1))
        assert f"wrote {outputs[-1]}" in said
    first = cells("deep/like.png", columns=2)

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
        assert (cells("deep/like.png", columns=2) != first).any(), old


def test_every_flag_is_run(run, monkeypatch):
    """A flag exists only if a test runs it off its default."""

    def caught(parser):
        raise SystemExit(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    with pytest.raises(SystemExit) as stop:
        run(EXPLORE, tiny=False)
    for action in stop.value.code._actions:
        flag = action.option_strings[-1]
        assert flag == "--help" or re.search(rf"{flag}\b", " ".join(EVERY_FLAG)), flag


MISTAKES = {
    "": "one of the arguments --like --interpolate --query --neighbours is required",
    "--like a.png --neighbours toy": "not allowed with argument --like",
    "--like missing.png": "missing.png: not readable as an image",
    "--interpolate photo.png": "expected 2 arguments",
    "--neighbours missing": "missing: no such folder",
    "--query photo.png missing": "missing: no such folder",
    "--like photo.png --ckpt missing.pt": "missing.pt: no such file",
    "--like photo.png --ckpt bare.pt": "does not name its decoder; pass --decoder",
    "--like photo.png --classes 3,10": "out of range 0 to 9",
    "--like photo.png --classes x": "argument --classes: invalid class_list value",
    "--like photo.png --strength 1.1": "wants a number from 0 to 1",
    "--like photo.png --steps 0": "argument --steps: '0': wants a whole number from 1",
    "--like photo.png --out x.npz": "wants a .png",
    f"--like photo.png --classes {','.join('1' * 101)}": "101 classes do not fit a sheet",
}


def test_mistakes_in_one_line(explore):
    checkpoint = torch.load("out/diffusion/checkpoint.pt")
    torch.save({"ema": checkpoint["ema"], "config": checkpoint["config"]}, "bare.pt")
    for arguments, text in MISTAKES.items():
        with pytest.raises(SystemExit) as stop:
            explore(arguments)
        assert stop.value.code.startswith("error: "), arguments
        assert text in stop.value.code, arguments
        assert "\n" not in stop.value.code, arguments
