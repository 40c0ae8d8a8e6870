"""Bad input ends in one line that names the flag or the file, and nothing is written."""

import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

import rae
from dit_dh import DiTDH
from rae import UsageError
from tests.conftest import ROOT, TINY, load, run_here, save_images, small_world

TRAIN = "train_diffusion.py"
DECODER = "train_decoder.py"
SAMPLE = "sample.py"
FID = "fid.py"
PRETRAIN = "extras/pretrain_encoder.py"

# script, flags, values that these must refuse
COUNT = "0 -1 1.5 nan a"
INDEX = f"-1 0.5 inf {2**64}"
POSITIVE = "nan inf -1 0"
NON_NEGATIVE = "nan inf -0.1 a"
SHARE = "nan inf -0.1 1.1"
LIMITS = [
    (TRAIN, "--steps --stop-at --global-batch-size --micro-batch-size --log-every", COUNT),
    (TRAIN, "--sample-every --save-every --keep-every", COUNT),
    (TRAIN, "--hold --workers --seed", INDEX),
    (TRAIN, "--alpha --lr --lr-end --clip", NON_NEGATIVE),
    (TRAIN, "--label-drop --ema", SHARE),
    (TRAIN, "--backbone --wide-head", "64,0,4 64,1 64,1,3 a 1,2,3,4"),
    (DECODER, "--image-size --upsample --resize --eval-num --eval-every", COUNT),
    (DECODER, "--warmup --workers --seed", INDEX),
    (DECODER, "--lr --lr-end --noise-tau", NON_NEGATIVE),
    (DECODER, "--disc-weight --eval-sigma", NON_NEGATIVE),
    (DECODER, "--ema", SHARE),
    (SAMPLE, "--num --steps --batch-size", COUNT),
    (SAMPLE, "--seed", INDEX),
    (SAMPLE, "--alpha", POSITIVE),
    (SAMPLE, "--cfg-scale --guidance-scale", NON_NEGATIVE),
    (SAMPLE, "--t-last", SHARE),
    (SAMPLE, "--classes", "a 1.5"),
    (FID, "--crop --batch-size", COUNT),
    (PRETRAIN, "--steps --image-size", COUNT),
    (PRETRAIN, "--lr", NON_NEGATIVE),
    (PRETRAIN, "--mask", SHARE),
]
GUIDED = "--ckpt run/checkpoint.pt --guidance-scale 2"
RUN = "--ckpt run/checkpoint.pt"
TOY = "--features encoder:toy"
# script, flags, what the line must contain. `folder` has the files.
ROWS = [
    (TRAIN, "--step 4", "--step"),  # no abbreviations
    (TRAIN, "--data nowhere", "nowhere"),
    (TRAIN, "--data empty", "empty"),
    (TRAIN, "--data broken", "broken/0.png"),
    (TRAIN, "--data broken --workers 1", "broken/0.png"),
    (TRAIN, "--decoder nowhere.pt", "nowhere.pt"),
    (TRAIN, "--decoder bare.pt", "--stats"),
    (TRAIN, "--decoder bare.pt --encoder toy", "--stats"),
    (TRAIN, "--decoder run/checkpoint.pt", "run/checkpoint.pt"),
    (TRAIN, "--init half.pt", "half.pt"),
    (TRAIN, "--init decoder/checkpoint.pt", "decoder/checkpoint.pt"),
    (TRAIN, "--out run --seed 1", "seed 0, not 1"),
    (TRAIN, "--out decoder", "decoder"),
    (TRAIN, "--out cut", "cut/checkpoint.pt"),
    (TRAIN, "--out theirs", "--out"),
    (TRAIN, "--out text.pt", "text.pt"),
    (DECODER, "--starts 0 0 2", "--starts"),
    (DECODER, "--size M", "--size"),
    (DECODER, "--data broken", "broken/0.png"),
    (DECODER, "--val-data nowhere", "nowhere"),
    (DECODER, "--eval-num 1", "--eval-num"),
    (DECODER, "--encoder nowhere", "nowhere"),
    (DECODER, "--encoder released:dinov2-b", "released:dinov2-b"),
    (DECODER, "--encoder decoder/checkpoint.pt", "decoder/checkpoint.pt"),
    (DECODER, "--encoder timm:vit_no_such", "vit_no_such"),
    (DECODER, "--encoder timm:resnet18 --encoder-weights resnet18.pt", "resnet18"),
    (DECODER, "--encoder timm:eva02_tiny_patch14_224 --encoder-weights eva02.pt", "plain ViT"),
    (DECODER, "--encoder mae-b --encoder-weights half.pt", "half.pt"),
    (DECODER, "--image-size 30", "30 px"),
    (DECODER, "--loss-networks published --lpips-weights nowhere.pt", "nowhere.pt"),
    (DECODER, "--resize 8", "--resize"),
    (DECODER, "--init run/checkpoint.pt", "run/checkpoint.pt"),
    (DECODER, "--out decoder --seed 1", "seed 0, not 1"),
    (DECODER, "--out run", "run"),
    (DECODER, "--out cut", "cut/checkpoint.pt"),
    (SAMPLE, "", "out/diffusion/checkpoint.pt"),
    (SAMPLE, "--ckpt folder", "folder"),
    (SAMPLE, "--ckpt half.pt", "half.pt"),
    (SAMPLE, "--ckpt code.pt", "code.pt"),
    (SAMPLE, "--ckpt page.pt", "page.pt"),
    (SAMPLE, "--ckpt empty.pt", "empty.pt"),
    (SAMPLE, "--ckpt theirs/checkpoint.pt", "theirs/checkpoint.pt"),
    (SAMPLE, "--ckpt decoder/checkpoint.pt", "decoder/checkpoint.pt"),
    (SAMPLE, GUIDED, "--guidance-model"),
    (SAMPLE, f"{GUIDED} --guidance-model half.pt", "half.pt"),
    (SAMPLE, f"{GUIDED} --guidance-model narrow.pt", "narrow.pt"),
    (SAMPLE, f"{GUIDED} --guidance-model other_latents.pt", "other_latents.pt"),
    (SAMPLE, f"{GUIDED} --guidance-model few_classes.pt", "few_classes.pt and run"),
    (SAMPLE, f"{RUN} --decoder half.pt", "half.pt"),
    (SAMPLE, f"{RUN} --decoder run/checkpoint.pt", "run/checkpoint.pt"),
    (SAMPLE, f"{RUN} --decoder other_statistics.pt", "--decoder"),
    (SAMPLE, f"{RUN} --decoder other_encoder.pt", "other_encoder.pt"),
    (SAMPLE, f"{RUN} --classes 3,10", "--classes"),
    (SAMPLE, f"{RUN} --classes -1", "--classes"),
    (SAMPLE, f"{RUN} --interval 0 2", "--interval"),
    (SAMPLE, f"{RUN} --out a.png", "--out a.png"),
    (SAMPLE, f"{RUN} --out photos", "photos"),
    (FID, "", "out/samples.npz"),
    (FID, "nowhere toy", "nowhere"),
    (FID, f"images.npz nowhere.npz {TOY}", "nowhere.npz"),
    (FID, "text.npz toy", "text.npz"),
    (FID, "half.npz toy", "half.npz"),
    (FID, "damaged.npz toy", "damaged.npz"),
    (FID, "code.npz toy", "code.npz"),
    (FID, "floats.npz toy", "floats.npz"),
    (FID, "channels_first.npz toy", "channels_first.npz"),
    (FID, "one.npz toy", "one.npz"),
    (FID, "no_images.npz toy", "no_images.npz"),
    (FID, "broken toy", "broken/0.png"),
    (FID, f"images.npz photos {TOY}", "--crop"),
    (FID, f"wide wide {TOY}", "--crop"),
    (FID, f"big.npz statistics.npz {TOY} --crop 64", "big.npz is 64x64"),
    (FID, f"images.npz other_label.npz {TOY}", "other_label.npz is "),
    (FID, f"images.npz adm.npz {TOY}", "adm.npz is inception"),
    (FID, f"statistics.npz {TOY} --save new.npz", "statistics.npz"),
    (FID, "images.npz toy --metrics fid,kid", "--metrics"),
    (FID, "images.npz toy --features dino", "--features"),
    (FID, f"images.npz toy {TOY} --metrics fid,pr", "--features"),
    (FID, "images.npz toy --features encoder:nowhere", "nowhere"),
    (FID, "images.npz images.npz --weights nowhere.pth", "nowhere.pth"),
    (FID, "images.npz images.npz --weights half.pt", "half.pt"),
    (PRETRAIN, "--patch 7", "--patch"),
    (PRETRAIN, "--out text.pt", "text.pt"),
]
# Without a network.
DOWNLOADS = [
    (TRAIN, "--decoder released:dinov2-b", "huggingface.co"),
    (SAMPLE, "--ckpt released:ImageNet256/DiTDH-XL", "huggingface.co"),
    (DECODER, "--encoder timm:vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    (DECODER, "--loss-networks published", "--lpips-weights"),
    (FID, "images.npz images.npz", "--weights"),
]


class Code:
    """Loading a pickle of this would run code."""

    def __reduce__(self):
        return os.system, ("echo hacked > hacked",)


def write_checkpoints(folder, trained):
    """Runs of both stages and all kinds of wrong .pt files."""
    decoder = load(trained / "out/decoder/checkpoint.pt")
    run = load(trained / "out/diffusion/checkpoint.pt")
    toy = load(ROOT / "toy/decoder.pt")
    encoder = load(ROOT / "toy/encoder.pt")
    encoder["state_dict"]["blocks.1.attn.proj.bias"] += 1e-3
    narrow = DiTDH(32, 4, (16, 1, 2), None, 10)
    few_classes = DiTDH(128, 4, (16, 1, 2), None, 3)
    contents = {
        "decoder/checkpoint.pt": decoder,
        "run/checkpoint.pt": run,
        "theirs/checkpoint.pt": {"state_dict": run["ema"]},  # of another program
        "code.pt": {"ema": Code()},
        "bare.pt": {"ema": toy["ema"], "num_heads": toy["num_heads"]},
        "narrow.pt": {"ema": narrow.state_dict(), "config": narrow.config},
        "few_classes.pt": {"ema": few_classes.state_dict(), "config": few_classes.config},
        "other_latents.pt": run | {"settings": run["settings"] | {"latents": "0123"}},
        "other_statistics.pt": toy | {"mean": toy["mean"] + 1, "latent_hash": None},
        "changed_encoder.pt": encoder,
        "other_encoder.pt": toy | {"encoder": "changed_encoder.pt"},
        "resnet18.pt": timm.create_model("resnet18").state_dict(),
        "eva02.pt": timm.create_model("eva02_tiny_patch14_224").state_dict(),
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(content, folder / name)
    whole = (folder / "run/checkpoint.pt").read_bytes()
    for name, content in {
        "half.pt": whole[: len(whole) // 2],
        "cut/checkpoint.pt": whole[:5000],
        "text.pt": b"no tensors",
        "page.pt": b"<!doctype html><html>",
        "empty.pt": b"",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def write_images(folder):
    """Folders of images, and .npz files of images and statistics."""
    for name in ("empty", "broken", "folder"):
        (folder / name).mkdir()
    for i in range(8):  # every batch has a broken image
        (folder / f"broken/{i}.png").write_bytes(b"\x89PNG no image")
    save_images(folder / "photos", 3, size=(40, 40))
    save_images(folder / "wide", 3, size=(40, 32))
    images = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    arrays = {
        "images": images,
        "big": images.repeat(2, 1).repeat(2, 2),
        "one": images[:1],
        "floats": images / 255,
        "channels_first": images.transpose(0, 3, 1, 2),
        "code": np.array([print], dtype=object),
    }
    for name, array in arrays.items():
        np.savez(folder / f"{name}.npz", arr_0=array)
    np.savez(folder / "no_images.npz", x=images)
    np.savez(folder / "adm.npz", mu=np.zeros(128), sigma=np.eye(128))
    whole = (folder / "images.npz").read_bytes()
    (folder / "half.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.npz").write_bytes(whole[:5000] + bytes(4000) + whole[9000:])
    (folder / "text.npz").write_text("no arrays")


@pytest.fixture(scope="session")
def folder_once(tmp_path_factory, trained_once):
    folder = tmp_path_factory.mktemp("bad_input")
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_world(monkeypatch, folder)
        write_checkpoints(folder, trained_once)
        write_images(folder)
        run_here(FID, f"images.npz {TOY} --save statistics.npz")
    arrays = dict(np.load(folder / "statistics.npz"))
    np.savez(folder / "other_label.npz", **arrays | {"label": "encoder toy 0123456789abcdef"})
    return folder


@pytest.fixture
def folder(folder_once, monkeypatch):
    """The folder that ROWS are about, as the current one. No test changes it."""
    small_world(monkeypatch, folder_once)
    return folder_once


def state_of(folder):
    """Size and time of every file below a folder; None for folders."""
    state = {}
    for path in sorted(folder.rglob("*")):
        stat = path.stat()
        state[path] = (stat.st_size, stat.st_mtime_ns) if path.is_file() else None
    return state


def assert_refused(capsys, script, flags, named):
    """argparse exits with code 2, our UsageError in one line, which is code 1."""
    with pytest.raises(SystemExit) as stop:
        run_here(script, f"{TINY[script]} {flags}", tiny=False)  # the last flags win
    line = stop.value.code
    if line == 2:
        line = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in line
    else:
        assert line.startswith("error: ") and "\n" not in line and "Traceback" not in line
    assert named in line


@pytest.mark.parametrize("script, flags, values", LIMITS)
def test_values_out_of_range(run, capsys, tmp_path, script, flags, values):
    for flag in flags.split():
        for value in values.split():
            assert_refused(capsys, script, f"{flag} {value}", flag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, flags, named", ROWS)
def test_bad_input(folder, capsys, script, flags, named):
    before = state_of(folder)
    try:
        assert_refused(capsys, script, flags, named)
    finally:
        after = state_of(folder)
        new = after.keys() - before.keys()
        for path in sorted(new, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert before.items() <= after.items()
    # Training finds broken images when it has made its folder and an empty log.
    assert not any(after[path] and after[path][0] for path in new), new


@pytest.mark.parametrize("script, flags, named", DOWNLOADS)
def test_downloads_that_fail(folder, capsys, tmp_path, monkeypatch, script, flags, named):
    from huggingface_hub import constants

    def offline(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if script != FID:
        flags += f" --out {tmp_path}/out"
    assert_refused(capsys, script, flags, named)


def test_broken_images_are_named(tmp_path):
    save_images(tmp_path, 2, size=(200, 200))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_text("text")
    (tmp_path / "3.png").write_bytes(b"")
    os.mkfifo(tmp_path / "4.png")  # opening a named pipe would wait forever
    data = rae.ImageFolder(tmp_path, 32)
    assert data[0].shape == (3, 32, 32)
    for i in (1, 2, 3, 4):
        for read in (data.__getitem__, lambda i: data.load(i, None, False)):
            with pytest.raises(UsageError, match=f"{i}.png' cannot be read as an image"):
                read(i)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_found_early(tmp_path):
    (tmp_path / "read_only").mkdir(mode=0o555)
    with pytest.raises(UsageError, match="no permission"):
        rae.make_folder(tmp_path / "read_only")
    with pytest.raises(SystemExit, match="Permission denied"):
        rae.run_script(lambda: rae.make_folder(tmp_path / "read_only/run"))


def test_endings_of_a_script(capsys):
    def ending(error):
        def fail():
            raise error

        with pytest.raises(BaseException) as stop:
            rae.run_script(fail)
        return stop.value

    rae.run_script(lambda: None)
    stop = ending(UsageError("x.pt: no such file (line one\n  line two)"))
    assert stop.code == "error: x.pt: no such file (line one line two)"  # exit code 1
    assert ending(KeyboardInterrupt()).code == 130
    assert "stopped; " in capsys.readouterr().out
    bug = ValueError("a bug keeps its traceback")
    assert ending(bug) is bug


def test_closed_output_does_not_end_a_run(tmp_path):
    """After `| head -1` every print fails, and without stderr there is no progress bar."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import rae
for i in rae.progress(range(20000), "steps"):
    rae.print0(i)
open("done", "w").close()
"""
    command = f'{sys.executable} -c "$CODE" 2>&- | head -n 1; exit ${{PIPESTATUS[0]}}'
    env = os.environ | {"CODE": code}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "0\n")
    assert (tmp_path / "done").exists()
