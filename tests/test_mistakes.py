"""Mistakes: each ends in one line that names the flag or the file, and writes nothing."""

import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

TRAIN = "train_diffusion.py"
DECODER = "train_decoder.py"
SAMPLE = "sample.py"
FID = "fid.py"
PRETRAIN = "extras/pretrain_encoder.py"
EXPLORE = "extras/explore.py --neighbours toy"

# What a flag's text may be, and texts that it may not be.
COUNT = ["0", "-1", "1.5", "nan", "a"]  # 1 and more
NATURAL = ["-1", "0.5", "inf"]  # 0 and more
POSITIVE = ["nan", "inf", "-1", "0"]  # more than 0
AMOUNT = ["nan", "inf", "-0.1", "1e30", "a"]  # 0 and more
SHARE = ["nan", "-0.1", "1.1", "inf"]  # 0 to 1
SEED = ["-1", str(2**64), "0.5"]
NUMBERS = {
    TRAIN: {
        "--steps": COUNT,
        "--global-batch-size": COUNT,
        "--micro-batch": COUNT,
        "--log-every": COUNT,
        "--sample-every": COUNT,
        "--save-every": COUNT,
        "--keep-every": NATURAL,
        "--hold": NATURAL,
        "--workers": NATURAL,
        "--alpha": POSITIVE,
        "--lr": AMOUNT,
        "--lr-end": AMOUNT,
        "--clip": AMOUNT,
        "--cfg-scale": AMOUNT,
        "--label-drop": SHARE,
        "--ema": SHARE,
        "--seed": SEED,
    },
    DECODER: {
        "--image-size": COUNT,
        "--upsample": COUNT,
        "--resize": COUNT,
        "--eval-num": COUNT,
        "--warmup": NATURAL,
        "--noise-tau": AMOUNT,
        "--perceptual": AMOUNT,
        "--gan": AMOUNT,
        "--lr": AMOUNT,
        "--lr-end": AMOUNT,
        "--eval-sigma": AMOUNT,
        "--ema": SHARE,
        "--betas": ["0.9 1", "0.9 nan", "-1 0.9"],
        "--starts": ["0 0 2", "nan 0 0", "0 -1 0"],
        "--seed": SEED,
    },
    SAMPLE: {
        "--num": COUNT,
        "--steps": COUNT,
        "--batch-size": COUNT,
        "--t-last": ["nan", "1", "2", "-0.1"],
        "--alpha": POSITIVE,
        "--cfg-scale": AMOUNT,
        "--guide-scale": AMOUNT,
        "--interval": ["0 2", "nan 1", "0.9 0.1", "a 1"],
        "--seed": SEED,
    },
    FID: {"--num": COUNT, "--crop": COUNT, "--batch-size": COUNT},
    PRETRAIN: {
        "--steps": COUNT,
        "--image-size": COUNT,
        "--mask": SHARE,
        "--lr": AMOUNT,
        "--seed": SEED,
    },
    EXPLORE: {"--steps": COUNT, "--strength": SHARE, "--cfg-scale": AMOUNT, "--seed": SEED},
}
EMPTY = {
    TRAIN: ["--data", "--decoder", "--out", "--init"],
    DECODER: ["--data", "--val-data", "--encoder", "--out"],
    SAMPLE: ["--ckpt", "--decoder", "--out", "--guide"],
    FID: ["--save", "--weights"],
    PRETRAIN: ["--data", "--out"],
    EXPLORE: ["--ckpt", "--out"],
}
# script, flags, what the line must have in it
OTHERS = [
    (TRAIN, "--backbone 64,0,4", "--backbone"),
    (TRAIN, "--backbone 64,1", "--backbone"),
    (TRAIN, "--wide-head 1,2,3,4", "--wide-head"),
    (TRAIN, "--backbone 64,1,3", "width 64 with 3 heads"),
    (TRAIN, "--data nowhere", "nowhere"),
    (TRAIN, "--data empty", "empty"),
    (TRAIN, "--data broken", "broken/0.png"),
    (TRAIN, "--data deep", "deep/0.tif"),
    (TRAIN, "--data bomb", "bomb/0.png"),
    (TRAIN, "--data lines", "a\\nb.png"),
    (TRAIN, "--decoder nowhere.pt", "nowhere.pt"),
    (TRAIN, "--decoder half.pt", "half.pt"),
    (TRAIN, "--decoder code.pt", "code.pt"),
    (TRAIN, "--decoder text.pt", "text.pt"),
    (TRAIN, "--decoder folder", "folder"),
    (TRAIN, "--decoder nan.pt", "nan.pt"),
    (TRAIN, "--decoder flat.pt", "statistics var"),
    (TRAIN, "--decoder nan_stats.pt", "nan_stats.pt"),
    (TRAIN, "--decoder hub.pt", "timm:hf-hub:someone/model"),
    (TRAIN, "--decoder folder.pt", "timm:local-dir:folder"),
    (TRAIN, "--init half.pt", "half.pt"),
    (TRAIN, "--init nan_model.pt", "nan_model.pt"),
    (TRAIN, "--encoder-weights half.pt", "--encoder-weights half.pt"),
    (TRAIN, "--out run --seed 1", "seed 0 there, 1 here"),
    (TRAIN, "--out other_optimizer", "other_optimizer/checkpoint.pt"),
    (TRAIN, "--out no_optimizer", "no_optimizer/checkpoint.pt"),
    (TRAIN, "--out other_model", "other_model/checkpoint.pt"),
    (TRAIN, "--out photos", "photos"),
    (TRAIN, "--out half.pt", "half.pt"),
    (DECODER, "--ckpt decoder.pt", "--ckpt"),
    (DECODER, "--stats decoder.pt", "--stats"),
    (DECODER, "--eval-only", "--ckpt"),
    (DECODER, "--eval-only --ckpt half.pt", "half.pt"),
    (DECODER, "--eval-only --ckpt nan.pt", "nan.pt"),
    (DECODER, "--eval-only --ckpt decoder.pt --out half.pt", "half.pt"),
    (DECODER, "--encoder nowhere", "nowhere"),
    (DECODER, "--encoder half.pt", "half.pt"),
    (DECODER, "--encoder nan_encoder.pt", "nan_encoder.pt"),
    (DECODER, "--encoder timm:hf-hub:someone/model", "timm:hf-hub:someone/model"),
    (DECODER, "--encoder-weights half.pt", "--encoder-weights half.pt"),
    (DECODER, "--upsample 3", "--upsample 3"),
    (DECODER, "--resize 8", "--resize 8"),
    (DECODER, "--init run/checkpoint.pt", "run/checkpoint.pt"),
    (DECODER, "--val-data nowhere", "nowhere"),
    (DECODER, "--vgg-weights half.pt", "--vgg-weights"),
    (DECODER, "--dino-weights half.pt", "--dino-weights"),
    (DECODER, "--data photos --image-size 8", "--gan 0"),
    (DECODER, "--data same", "statistics var"),
    (SAMPLE, "--ckpt nowhere.pt", "nowhere.pt"),
    (SAMPLE, "--ckpt half.pt", "half.pt"),
    (SAMPLE, "--ckpt code.pt", "code.pt"),
    (SAMPLE, "--ckpt nan_model.pt", "nan_model.pt"),
    (SAMPLE, "--ckpt run/checkpoint.pt --guide half.pt", "half.pt"),
    (SAMPLE, "--ckpt run/checkpoint.pt --decoder nan.pt", "nan.pt"),
    (SAMPLE, "--ckpt run/checkpoint.pt --classes 3,10", "--classes"),
    (SAMPLE, "--ckpt run/checkpoint.pt --classes -1", "--classes"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out a.jpg", "--out a.jpg"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out a.npy", "--out a.npy"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out images.npz", "images.npz"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out images.png", "images.npz"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out photos/0.png", "photos/0.png"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out photos", "photos"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out half.pt/a.npz", "half.pt"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out folder.npz", "folder.npz"),
    (FID, "nowhere toy", "nowhere"),
    (FID, "half.pt toy", "half.pt"),
    (FID, "images.npz nowhere.npz", "nowhere.npz"),
    (FID, "text.npz toy", "text.npz"),
    (FID, "nan_stats.npz toy", "nan_stats.npz"),
    (FID, "images.npz toy --metrics fad", "--metrics fad"),
    (FID, "images.npz toy --features dino", "--features dino"),
    (FID, "images.npz toy --features encoder:toy --weights half.pt", "--weights half.pt"),
    (FID, "images.npz images.npz --weights half.pt", "half.pt"),
    (FID, "images.npz --save a.txt", "--save a.txt"),
    (FID, "images.npz --features encoder:toy --save images.npz", "--save images.npz"),
    (FID, "broken toy", "broken/0.png"),
    (PRETRAIN, "--data nowhere", "nowhere"),
    (PRETRAIN, "--patch 7", "--patch"),
    (PRETRAIN, "--out decoder.pt", "decoder.pt"),
    (PRETRAIN, "--out half.pt/encoder.pt", "half.pt"),
    (EXPLORE, "--ckpt half.pt", "half.pt"),
    (EXPLORE, "--ckpt run/checkpoint.pt --out a.jpg", "--out a.jpg"),
    (EXPLORE, "--ckpt run/checkpoint.pt --out folder.png", "folder.png"),
    (EXPLORE, "--ckpt run/checkpoint.pt --classes 10", "--classes"),
]


class Code:
    """Unpickled, it would run code."""

    def __reduce__(self):
        return print, ("code ran",)


def write_png_of_zeros(path, width, height):
    """A grey PNG of so many pixels, without holding them."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + width)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    path.write_bytes(file)


@pytest.fixture
def bad_files(run, tmp_path):
    """One run, and beside it what OTHERS names."""
    for name in ("empty", "broken", "deep", "bomb", "lines", "photos", "same", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.npz").mkdir()
    grey = Image.new("RGB", (40, 40), "grey")
    for i in range(3):
        grey.save(tmp_path / f"same/{i}.png")
        noise = np.random.default_rng(i).integers(256, size=(40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"photos/{i}.png")
    for i in range(8):  # so that every batch has one of them
        (tmp_path / f"broken/{i}.png").write_bytes(b"\x89PNG no image")
        Image.new("F", (40, 40)).save(tmp_path / f"deep/{i}.tif")
    (tmp_path / "lines/a\nb.png").write_bytes(b"no image")
    write_png_of_zeros(tmp_path / "bomb/0.png", 10000, 10000)

    run(TRAIN, "--out run")
    run(DECODER, "--out decoder")
    shutil.copy("decoder/checkpoint.pt", "decoder.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "decoder.pt").read_bytes()[:5000])
    torch.save({"ema": Code()}, "code.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez("images.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    np.savez("nan_stats.npz", mu=np.full(128, np.nan), sigma=np.eye(128))

    def spoiled(source, name, change):
        content = torch.load(source, weights_only=True)
        change(content)
        torch.save(content, name)

    def nan(tensors):
        next(iter(tensors.values())).view(-1)[0] = torch.nan

    spoiled("decoder.pt", "nan.pt", lambda file: nan(file["ema"]))
    spoiled("decoder.pt", "flat.pt", lambda file: file["var"].zero_())
    spoiled("decoder.pt", "nan_stats.pt", lambda file: file["mean"].fill_(torch.nan))
    spoiled("decoder.pt", "hub.pt", lambda f: f.update(encoder="timm:hf-hub:someone/model"))
    spoiled("decoder.pt", "folder.pt", lambda f: f.update(encoder="timm:local-dir:folder"))
    spoiled("run/checkpoint.pt", "nan_model.pt", lambda file: nan(file["ema"]))
    toy_encoder = ROOT / "toy/encoder.pt"
    spoiled(toy_encoder, "nan_encoder.pt", lambda file: nan(file["state_dict"]))
    for name in ("other_optimizer", "no_optimizer", "other_model"):
        shutil.copytree("run", name)

    def short(file):
        moments = file["optimizer"]["state"][0]
        moments["exp_avg"] = moments["exp_avg"].flatten()[:1].clone()

    def first_short(file):
        name = next(iter(file["model"]))
        file["model"][name] = file["model"][name][..., :1].clone()

    run_file = "run/checkpoint.pt"
    spoiled(run_file, "other_optimizer/checkpoint.pt", short)
    spoiled(run_file, "no_optimizer/checkpoint.pt", lambda f: f.update(optimizer={}))
    spoiled(run_file, "other_model/checkpoint.pt", first_short)


def contents(folder):
    """The bytes of all files and the names of all folders below a folder."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def check(run, script, flags, named):
    """One line with the flag or file in it. What makes runs tiny goes first, so that flags win."""
    script, *before = script.split()
    with pytest.raises(SystemExit) as stop:
        run(script, [*before, *TINY.get(script, "").split(), *flags], tiny=False)
    line = str(stop.value)
    assert line.startswith("error: ") and "\n" not in line, (script, flags, line)
    assert named in line, (script, flags, line)


def test_numbers_out_of_range_and_empty_texts(run, tmp_path):
    for script, flags in NUMBERS.items():
        for flag, texts in flags.items():
            for text in texts:
                check(run, script, [flag, *text.split()], flag)
    for script, flags in EMPTY.items():
        for flag in flags:
            check(run, script, [flag, ""], flag.removeprefix("--"))
    assert contents(tmp_path) == {}


def test_there_are_enough_cases():
    counts = [len(texts) for flags in NUMBERS.values() for texts in flags.values()]
    assert sum(counts) + sum(map(len, EMPTY.values())) + len(OTHERS) >= 150


@pytest.mark.slow
def test_files_folders_images_and_outputs(run, tmp_path, bad_files):
    before = contents(tmp_path)
    for script, flags, named in OTHERS:
        check(run, script, flags.split(), named)
        after = contents(tmp_path)
        assert before.items() <= after.items(), (script, flags)
        # A broken image shows when it is read: the run has a folder and an empty log then.
        new = [after[path] for path in after.keys() - before.keys()]
        assert not any(new), (script, flags)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
