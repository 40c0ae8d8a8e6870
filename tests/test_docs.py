"""The documents: their links work, and so do their commands and every flag."""

import os
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dit_dh
import rae
from extras.to_official import to_official_names
from tests.conftest import DOCS, TINY, load, save_images


def test_links_are_alive():
    """Links to files, and to headings by the names that GitHub gives them."""
    for page in DOCS:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if target.startswith("https://"):
                continue
            name, _, heading = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), (page.name, target)
            if heading:
                titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
                anchors = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
                assert heading in anchors, (page.name, target)


def documented_commands():
    """Every python or torchrun command in the docs' bash blocks, as (script, arguments)."""
    commands = []
    for page in DOCS:
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
        text = "\n".join(blocks).replace("\\\n", " ")
        pattern = r"^(?:python|torchrun(?: --\S+)*(?: --)?) +((?:\w+/)*\w+\.py) *([^#\n&]*)"
        for script, arguments in re.findall(pattern, text, re.M):
            commands.append((script, arguments.strip()))
    return commands


@pytest.mark.slow
def test_documented_commands(run, photos, tmp_path):
    """In the order of the pages, so that each command finds the files of earlier ones.

    Not those that need ImageNet or a download, nor scripts that have tests of their own.
    """
    for split, n in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            save_images(tmp_path / "cifar10" / split / name, n, size=(32, 32))
    ran = set()
    for script, arguments in documented_commands():
        if script in TINY and "imagenet" not in arguments and "released:" not in arguments:
            run(script, arguments)
            ran.add(script)
    assert ran == set(TINY), "each script has a command"
    assert Image.open("out/samples.png").size[0] > 300
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


TIMM = "--encoder timm:vit_tiny_patch16_224 --encoder-weights tiny.pt"
PHOTOS = "--data photos --encoder e/enc.pt --image-size 24 --global-batch-size 4"
STAGE2 = "--data photos --decoder d/b/checkpoint.pt --global-batch-size 4 --backbone 16,1,2"
BARE = f"--decoder bare.pt {TIMM} --stats stat.pt"
FEW = "--global-batch-size 2 --steps 1 --workers 0 --no-compile"
# Every flag and choice off its default, but for those of the published loss networks.
COMMANDS = [
    ("extras/pretrain_encoder.py", "--data photos --out e/enc.pt --image-size 24 --patch 12 "
     "--width 16 --depth 1 --heads 2 --mask 0.25 --steps 3 --batch-size 4 --lr 0.001 --seed 3 "
     "--workers 1 --device cpu"),
    ("train_decoder.py", f"{PHOTOS} --val-data photos_val --resize 26 --noise-tau 0.5 "
     "--noise-dist half-normal --disc-weight 0.3 --starts 0 0.3 0.4 "
     "--steps 3 --lr 0.001 --lr-end 0.0001 --warmup 1 --ema 0.9 --seed 2 --out d/a --log-every 1 "
     "--eval-every 2 --eval-num 3 --eval-sigma 0.1 --save-every 2 --workers 1 --device cpu "
     "--precision bf16 --micro-batch-size 3 --checkpoint-activations"),
    ("train_decoder.py", f"{PHOTOS} --steps 2 --out d/b --precision fp32"),
    ("train_decoder.py", f"{PHOTOS} --steps 2 --out d/c --init d/b/checkpoint.pt"),
    ("train_decoder.py", f"{FEW} --out d/tf32 --precision tf32 --eval-num 2 --size L"),
    ("train_decoder.py", f"--preset imagenet256 --data photos {TIMM} --size B --image-size 32 "
     f"--resize 40 --loss-networks encoder --eval-num 2 --out d/preset {FEW}"),
    ("train_decoder.py", f"--preset imagenet512 --data photos {TIMM} --size toy --image-size 32 "
     f"--resize 40 --loss-networks encoder --eval-num 2 --out d/preset512 {FEW}"),
    ("train_diffusion.py", "--steps 1 --global-batch-size 4 --out f/toy"),
    ("train_diffusion.py", f"{STAGE2} --wide-head 24,1,2 --alpha 2.5 --time uniform "
     "--label-drop 0.5 --steps 3 --lr 0.001 --lr-end 0.0001 --hold 1 --clip 0 --ema 0.9 "
     "--seed 4 --out f/a --log-every 1 --sample-every 2 --save-every 2 "
     "--keep-every 2 --workers 1 --device cpu --precision bf16 --micro-batch-size 3 "
     "--checkpoint-activations --stop-at 2"),
    ("train_diffusion.py", f"{STAGE2} --wide-head none --label-drop 1 --no-flip --steps 2 "
     "--out f/plain"),
    ("train_diffusion.py", "--init f/toy/checkpoint.pt --steps 1 --out f/init"),
    ("train_diffusion.py", f"--preset imagenet512 --data photos {BARE} --backbone S "
     f"--wide-head 16,1,2 --precision tf32 --out f/preset {FEW}"),
    ("train_diffusion.py", f"--preset imagenet256 --data photos {BARE} --backbone 16,1,2 "
     f"--wide-head S --precision fp32 --out f/preset256 {FEW}"),
    ("sample.py", "--ckpt f/a/checkpoint.pt --num 3 --steps 4 --t-last 0.001 --alpha 2 "
     "--cfg-scale 1.2 --interval 0.1 0.9 --seed 5 --batch-size 2 --out s/a --device cpu "
     "--precision bf16 --classes 1"),
    ("sample.py", "--ckpt f/toy/checkpoint.pt --guidance-model f/init/checkpoint.pt "
     "--guidance-scale 1.7 --num 2 --steps 2 --out s/guided --decoder toy"),
    ("sample.py", "--ckpt f/a/ema_0000002.pt --num 2 --steps 2 --out s/kept"),
    ("sample.py", f"--preset imagenet256 --ckpt f/preset/checkpoint.pt {BARE} --num 1 --steps 2 "
     "--out s/preset --precision fp32"),
    ("sample.py", "--preset imagenet512 --ckpt f/preset256/checkpoint.pt --num 1 --steps 2 "
     "--out s/preset512 --precision tf32"),
    ("fid.py", "s/a photos_fid --crop 24 --features encoder:e/enc.pt --batch-size 2 --device cpu"),
    ("fid.py", "s/guided.npz toy --weights inception.pt --mode pytorch-fid --metrics fid,is,pr "
     "--crop 24"),
    ("fid.py", "s/guided.npz --save s/stats.npz --features encoder:toy"),
]  # fmt: skip


@pytest.mark.slow
def test_every_flag_runs(run, photos, tmp_path, monkeypatch):
    """All COMMANDS; each uses files of earlier ones."""
    # One block is enough of the large networks.
    monkeypatch.setitem(dit_dh.SIZES, "S", (384, 1, 6))
    for size in ("B", "L"):
        width, _, num_heads, mlp_dim = rae.DECODERS[size]
        monkeypatch.setitem(rae.DECODERS, size, (width, 1, num_heads, mlp_dim))
    save_images(tmp_path / "photos_fid", 4, size=(24, 24))
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), "tiny.pt")
    inception = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
    torch.save(inception.state_dict(), "inception.pt")
    said = ""
    for script, arguments in COMMANDS:
        said += run(script, arguments, tiny=False)
        if "--out d/preset " in arguments:  # as an official file, and its statistics
            file = load("d/preset/checkpoint.pt")
            torch.save(to_official_names(file["ema"]), "bare.pt")
            torch.save({"mean": file["mean"], "var": file["var"]}, "stat.pt")

    assert rae.load_rae("d/a/checkpoint.pt").image_size == 24
    assert load("f/plain/checkpoint.pt")["config"]["wide_head"] is None
    assert sorted(os.listdir("s/a")) == ["000000.png", "000001.png", "000002.png", "settings.json"]
    for word in ("Frechet distance", "3 samples", "FID ", "precision"):
        assert word in said
    assert "mu" in np.load("s/stats.npz")
