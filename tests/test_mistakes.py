"""Users' mistakes: each ends in one line that names the flag or the file, and writes nothing."""

import shutil

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

# Texts that flags of these types must refuse.
POSITIVE_INT = ["0", "-1", "1.5", "nan", "a"]
NON_NEGATIVE_INT = ["-1", "0.5", "inf", str(2**64)]
POSITIVE = ["nan", "inf", "-1", "0"]
NON_NEGATIVE = ["nan", "inf", "-0.1", "a"]
FRACTION = ["nan", "-0.1", "1.1", "inf"]
NUMBERS = {
    TRAIN: {
        "--steps": POSITIVE_INT,
        "--stop-at": POSITIVE_INT,
        "--global-batch-size": POSITIVE_INT,
        "--micro-batch-size": POSITIVE_INT,
        "--log-every": POSITIVE_INT,
        "--sample-every": POSITIVE_INT,
        "--save-every": POSITIVE_INT,
        "--keep-every": POSITIVE_INT,
        "--hold": NON_NEGATIVE_INT,
        "--workers": NON_NEGATIVE_INT,
        "--seed": NON_NEGATIVE_INT,
        "--alpha": POSITIVE,
        "--lr": NON_NEGATIVE,
        "--lr-end": NON_NEGATIVE,
        "--clip": NON_NEGATIVE,
        "--cfg-scale": NON_NEGATIVE,
        "--label-drop": FRACTION,
        "--ema": FRACTION,
        "--backbone": ["64,0,4", "64,1", "64,1,3", "a"],
        "--wide-head": ["1,2,3,4", "64,1,3"],
    },
    DECODER: {
        "--image-size": POSITIVE_INT,
        "--upsample": POSITIVE_INT,
        "--resize": POSITIVE_INT,
        "--eval-num": POSITIVE_INT,
        "--warmup": NON_NEGATIVE_INT,
        "--seed": NON_NEGATIVE_INT,
        "--noise-tau": NON_NEGATIVE,
        "--perceptual-weight": NON_NEGATIVE,
        "--disc-weight": NON_NEGATIVE,
        "--lr": NON_NEGATIVE,
        "--lr-end": NON_NEGATIVE,
        "--eval-sigma": NON_NEGATIVE,
        "--ema": FRACTION,
        "--starts": ["0 0 2", "nan 0 0", "0 -1 0"],
    },
    SAMPLE: {
        "--num": POSITIVE_INT,
        "--steps": POSITIVE_INT,
        "--batch-size": POSITIVE_INT,
        "--seed": NON_NEGATIVE_INT,
        "--t-last": ["nan", "1", "2", "-0.1"],
        "--alpha": POSITIVE,
        "--cfg-scale": NON_NEGATIVE,
        "--guidance-scale": NON_NEGATIVE,
        "--interval": ["0 2", "nan 1", "a 1"],
        "--classes": ["a", "1.5"],
    },
    FID: {"--num": POSITIVE_INT, "--crop": POSITIVE_INT, "--batch-size": POSITIVE_INT},
    PRETRAIN: {
        "--steps": POSITIVE_INT,
        "--image-size": POSITIVE_INT,
        "--mask": FRACTION,
        "--lr": NON_NEGATIVE,
        "--seed": NON_NEGATIVE_INT,
    },
}
# script, flags, what the line must contain. The fixture `files` makes the files.
OTHERS = [
    (TRAIN, "--preset cifar", "--preset"),
    (TRAIN, "--time cosine", "--time"),
    (TRAIN, "--step 4", "--step"),  # no abbreviations
    (TRAIN, "--data nowhere", "nowhere"),
    (TRAIN, "--data empty", "empty"),
    (TRAIN, "--data broken", "broken/0.png"),
    (TRAIN, "--decoder nowhere.pt", "nowhere.pt"),
    (TRAIN, "--decoder folder", "folder"),
    (TRAIN, "--decoder half.pt", "half.pt"),
    (TRAIN, "--decoder code.pt", "code.pt"),
    (TRAIN, "--decoder text.pt", "text.pt"),
    (TRAIN, "--decoder bare.pt", "--stats"),
    (TRAIN, "--decoder run/checkpoint.pt", "run/checkpoint.pt"),
    (TRAIN, "--init half.pt", "half.pt"),
    (TRAIN, "--init decoder/checkpoint.pt", "decoder/checkpoint.pt"),
    (TRAIN, "--decoder decoder/checkpoint.pt --out run --seed 1", "seed 0, not 1"),
    (TRAIN, "--out decoder", "decoder"),
    (TRAIN, "--out cut", "cut/checkpoint.pt"),
    (DECODER, "--size M", "--size"),
    (DECODER, "--data nowhere", "nowhere"),
    (DECODER, "--data broken", "broken/0.png"),
    (DECODER, "--val-data nowhere", "nowhere"),
    (DECODER, "--eval-num 1", "--eval-num"),
    (DECODER, "--encoder nowhere", "nowhere"),
    (DECODER, "--encoder half.pt", "half.pt"),
    (DECODER, "--encoder decoder/checkpoint.pt", "decoder/checkpoint.pt"),
    (DECODER, "--encoder timm:vit_no_such", "vit_no_such"),
    (DECODER, "--encoder mae-b --encoder-weights half.pt", "half.pt"),
    (DECODER, "--loss-networks published --lpips-weights half.pt", "half.pt"),
    (DECODER, "--upsample 3", "--upsample"),
    (DECODER, "--resize 8", "--resize"),
    (DECODER, "--init run/checkpoint.pt", "run/checkpoint.pt"),
    (DECODER, "--out decoder --seed 1", "seed 0, not 1"),
    (DECODER, "--out run", "run"),
    (DECODER, "--out cut", "cut/checkpoint.pt"),
    (SAMPLE, "", "out/diffusion/checkpoint.pt"),
    (SAMPLE, "--ckpt half.pt", "half.pt"),
    (SAMPLE, "--ckpt code.pt", "code.pt"),
    (SAMPLE, "--ckpt decoder/checkpoint.pt", "decoder/checkpoint.pt"),
    (SAMPLE, "--ckpt run/checkpoint.pt --guidance-model half.pt --guidance-scale 2", "half.pt"),
    (SAMPLE, "--ckpt run/checkpoint.pt --guidance-scale 2", "--guidance-model"),
    (
        SAMPLE,
        "--ckpt run/checkpoint.pt --guidance-model small_run/checkpoint.pt --guidance-scale 2",
        "small_run",
    ),
    (SAMPLE, "--ckpt run/checkpoint.pt --decoder half.pt", "half.pt"),
    (SAMPLE, "--ckpt run/checkpoint.pt --decoder run/checkpoint.pt", "run/checkpoint.pt"),
    (SAMPLE, "--ckpt run/checkpoint.pt --decoder small/checkpoint.pt", "--decoder"),
    (SAMPLE, "--ckpt run/checkpoint.pt --classes 3,10", "--classes"),
    (SAMPLE, "--ckpt run/checkpoint.pt --classes -1", "--classes"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out a.png", "--out a.png"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out a.npz", "--out a.npz"),
    (SAMPLE, "--ckpt run/checkpoint.pt --out photos", "photos"),
    (FID, "", "out/samples.npz"),
    (FID, "nowhere toy", "nowhere"),
    (FID, "half.pt toy", "half.pt"),
    (FID, "images.npz nowhere.npz --features encoder:toy", "nowhere.npz"),
    (FID, "text.npz toy", "text.npz"),
    (FID, "floats.npz toy", "floats.npz"),
    (FID, "one.npz toy", "one.npz"),
    (FID, "broken toy", "broken/0.png"),
    (FID, "images.npz photos --features encoder:toy", "--crop"),
    (FID, "images.npz toy --metrics fad", "--metrics fad"),
    (FID, "images.npz toy --features dino", "--features"),
    (FID, "images.npz toy --features encoder:toy --metrics fid,pr", "--features"),
    (FID, "images.npz toy --features encoder:nowhere", "nowhere"),
    (FID, "images.npz images.npz --weights half.pt", "half.pt"),
    (PRETRAIN, "--data nowhere", "nowhere"),
    (PRETRAIN, "--patch 7", "--patch"),
    (PRETRAIN, "--out text.pt", "text.pt"),
]


class Code:
    """Loading a pickle of this would run code."""

    def __reduce__(self):
        return print, ("code ran",)


@pytest.fixture
def files(run, tmp_path):
    """Runs of both stages, with the toy encoder and a narrower one, and what OTHERS names."""
    run(DECODER, "--out decoder")
    run(TRAIN, "--decoder decoder/checkpoint.pt --out run")
    run(PRETRAIN, "--width 32 --out small.pt")
    run(DECODER, "--encoder small.pt --out small")
    run(TRAIN, "--decoder small/checkpoint.pt --out small_run")

    for name in ("empty", "broken", "photos", "folder", "cut"):
        (tmp_path / name).mkdir()
    for i in range(8):  # every batch has a broken image
        (tmp_path / f"broken/{i}.png").write_bytes(b"\x89PNG no image")
    for i in range(3):
        noise = np.random.default_rng(i).integers(256, size=(40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"photos/{i}.png")
    half = (tmp_path / "decoder/checkpoint.pt").read_bytes()[:5000]
    (tmp_path / "half.pt").write_bytes(half)
    (tmp_path / "cut/checkpoint.pt").write_bytes(half)
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "text.npz").write_text("no arrays")
    torch.save({"ema": Code()}, "code.pt")
    decoder = torch.load(ROOT / "toy/decoder.pt", weights_only=True)
    torch.save({"ema": decoder["ema"], "num_heads": decoder["num_heads"]}, "bare.pt")
    np.savez("images.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    np.savez("floats.npz", arr_0=np.zeros((4, 32, 32, 3)))
    np.savez("one.npz", arr_0=np.zeros((1, 32, 32, 3), np.uint8))


def contents(folder):
    """The bytes of all files and the names of all folders below a folder."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def assert_refused(run, capsys, script, flags, named):
    """argparse exits with code 2, our UsageError in one line, which is code 1."""
    with pytest.raises(SystemExit) as stop:
        run(script, [*TINY[script].split(), *flags], tiny=False)  # the last flags win
    line = stop.value.code
    if line == 2:
        line = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in line, (script, flags, line)
    else:
        assert line.startswith("error: ") and "\n" not in line, (script, flags, line)
    assert named in line, (script, flags, line)


@pytest.mark.parametrize("script", NUMBERS)
def test_values_out_of_range(run, capsys, tmp_path, script):
    for flag, texts in NUMBERS[script].items():
        for text in texts:
            assert_refused(run, capsys, script, [flag, *text.split()], flag)
    assert contents(tmp_path) == {}


def test_files_and_names(run, capsys, tmp_path, files):
    before = contents(tmp_path)
    for script, flags, named in OTHERS:
        assert_refused(run, capsys, script, flags.split(), named)
        after = contents(tmp_path)
        assert before.items() <= after.items(), (script, flags)
        # Training finds broken images when it has made its folder and an empty log.
        new = [after[path] for path in after.keys() - before.keys()]
        assert not any(new), (script, flags)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
