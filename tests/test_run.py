"""The scripts as users run them: README commands, all flags, resume, determinism, mistakes."""

import argparse
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from test_rae import save_images

DIFFUSION = "out/diffusion/checkpoint.pt"


def readme_commands():
    """Every python or torchrun command of the README's bash blocks, as (script, arguments)."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    pattern = r"^(?:python|torchrun(?: --\S+)*) +((?:assets/|tests/)?\w+\.py) *([^#\n&]*)"
    found = re.findall(pattern, text, re.M)
    return [(script, arguments.strip()) for script, arguments in found]


def same(a, b):
    """Bit-equal, through nested dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def photos(tmp_path):
    """photos/: two classes of small images, and what the README's own-image commands name."""
    for i, name in enumerate(("cat", "dog")):
        save_images(tmp_path / "photos" / name, 6, size=(44, 40), seed=i)
        save_images(tmp_path / "photos_val" / name, 3, size=(44, 40), seed=9 + i)
    return tmp_path / "photos"


def test_readme_commands(run, photos):
    """In the README's own order, so that each finds what the one before it made."""
    commands = [c for c in readme_commands() if c[0] in TINY and "imagenet" not in c[1]
                and "released:" not in c[1]]
    assert {script for script, _ in commands} == set(TINY), "each script has a command in the README"
    for script, arguments in commands:
        run(script, arguments)
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        exec(block, {})                                # the export to the released names
    assert load("stage2_model.pt").keys() == load(DIFFUSION)["ema"].keys()
    assert Image.open("out/samples.png").size[0] > 300
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


def test_readme_says_how_long_the_files_are_and_holds_the_claims():
    """The map of the six files, which stay below 2,000 lines together, and the table of assets/claims.py."""
    readme = (ROOT / "README.md").read_text()
    said = {name: int(n) for name, n in re.findall(r"\| \[(\w+\.py)\]\(\1\), (\d+) lines", readme)}
    assert said == {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert len(said) == 6 and sum(said.values()) < 2000
    table = [x for x in (ROOT / "assets/claims.md").read_text().splitlines() if x.startswith("| ")]
    assert len(table) > 15 and [x for x in readme.splitlines() if x in table] == table


# Every flag appears here off its default (test_every_flag_is_run), with a tiny world behind it.
FLAGS = {
    "assets/pretrain_encoder.py": [
        "--data photos --out e/enc.pt --image-size 24 --patch 12 --width 16 --depth 1 --heads 2 --mask "
        "0.25 --steps 3 --batch-size 4 --lr 0.001 --seed 3 --device cpu",
    ],
    "train_decoder.py": [
        "--data photos --val-data photos_val --encoder e/enc.pt --image-size 24 --resize 26 --noise-tau 0.5 "
        "--noise-dist half-normal --perceptual 0 --gan 0.3 --starts 0 0.3 0.4 --betas 0.5 0.9 --steps 3 "
        "--batch-size 4 --lr 0.001 --lr-end 0.0001 --warmup 1 --ema 0.9 --seed 2 --out d/a --log-every 1 "
        "--eval-every 2 --eval-num 3 --eval-sigma 0.1 --save-every 2 --workers 1 --device cpu "
        "--precision bf16 --micro-batch 3 --checkpoint-activations --resume never",
        "--image-size 64 --upsample 2 --steps 2 --batch-size 4 --out d/up",
        "--data photos --encoder e/enc.pt --image-size 24 --steps 2 --batch-size 4 --out d/b "
        "--precision fp32",
        "--size L --steps 1 --batch-size 2 --out d/L --eval-num 2",
        "--size XL --steps 1 --batch-size 2 --out d/XL --eval-num 2",
        "--data photos --encoder e/enc.pt --image-size 24 --steps 2 --batch-size 4 --out d/c "
        "--init d/b/checkpoint.pt",
        "--preset imagenet256 --data photos --encoder timm:vit_tiny_patch16_224 --encoder-weights tiny.pt "
        "--size B --image-size 32 --resize 40 --steps 1 --batch-size 2 --workers 0 --out d/preset "
        "--critics encoder --eval-num 2",
        "--preset imagenet512 --data photos --encoder timm:vit_tiny_patch16_224 --encoder-weights tiny.pt "
        "--size toy --image-size 32 --resize 40 --steps 1 --batch-size 2 --workers 0 --out d/preset512 "
        "--critics encoder --eval-num 2",
        "--eval-only --ckpt bare.pt --stats stat.pt --encoder timm:vit_tiny_patch16_224 --encoder-weights "
        "tiny.pt --data photos --eval-num 3 --batch-size 2 --out d/judged "
        "--inception inception.pt",
    ],
    "train_diffusion.py": [
        "--data photos --decoder d/b/checkpoint.pt --backbone 16,1,2 --head 24,1,2 "
        "--alpha 2.5 --time uniform --label-drop 0.5 --steps 3 --batch-size 4 --lr 0.001 --lr-end 0.0001 "
        "--hold 1 --clip 0 --ema 0.9 --cfg 2 --seed 4 --out f/a --log-every 1 --sample-every 2 "
        "--save-every 2 --workers 1 --device cpu --precision bf16 --micro-batch 3 --checkpoint-activations "
        "--resume never --cache-latents f/cache",
        "--data photos --decoder d/b/checkpoint.pt --backbone 16,1,2 --head none "
        "--label-drop 1 --no-flip --steps 2 --batch-size 4 --out f/plain",
        "--data toy --init f/toy/checkpoint.pt --steps 1 --batch-size 4 --out f/init --fid-every 1 "
        "--fid-num 4 --fid-reference photos_fid32 --inception inception.pt",
        "--decoder d/up/checkpoint.pt --steps 1 --batch-size 4 --out f/up",
        "--preset imagenet512 --data photos --decoder bare.pt --encoder timm:vit_tiny_patch16_224 "
        "--encoder-weights tiny.pt --stats stat.pt --backbone S --head 16,1,2 --steps 1 "
        "--batch-size 2 --workers 0 --out f/preset",
        "--preset imagenet256 --data photos --decoder bare.pt --encoder timm:vit_tiny_patch16_224 "
        "--encoder-weights tiny.pt --stats stat.pt --backbone 16,1,2 --head S --steps 1 "
        "--batch-size 2 --workers 0 --out f/preset256 --precision fp32",
    ],
    "sample.py": [
        "--ckpt f/a/checkpoint.pt --num 3 --steps 4 --t-last 0.001 --alpha 2 --cfg 1.2 --interval 0.1 0.9 "
        "--seed 5 --batch-size 2 --out s/folder --device cpu --precision bf16 --classes 1",
        "--ckpt f/toy/checkpoint.pt --guide f/init/checkpoint.pt --scale 1.7 --num 2 --steps 2 --out "
        "s/guided.npz",
        "--ckpt f/toy/checkpoint.pt --decoder toy --num 2 --steps 2 --out s/grid.png",
        "--ckpt f/plain/checkpoint.pt --num 2 --steps 2 --out s/plain.png",
        "--preset imagenet256 --ckpt f/preset/checkpoint.pt --decoder bare.pt --encoder "
        "timm:vit_tiny_patch16_224 --encoder-weights tiny.pt --stats stat.pt --num 1 --steps 2 --out "
        "s/preset.png --precision fp32",
        "--preset imagenet512 --ckpt f/preset256/checkpoint.pt --num 1 --steps 2 --out s/preset512.png",
        "--ckpt f/toy/checkpoint.pt --like photos/cat/0.png --strength 0.4 --steps 2 --out s/like.npz",
        "--ckpt f/toy/checkpoint.pt --interpolate photos/cat/0.png photos/cat/1.png --classes 3 --steps 2 "
        "--neighbours photos --out s/row.png",
    ],
    "fid.py": [
        "s/folder photos_fid --features encoder:e/enc.pt --num 3 --batch 2 --device cpu --json",
        "s/guided.npz toy --weights inception.pt --mode pytorch-fid --metrics fid,sfid,is,pr --crop 24",
        "s/guided.npz --save s/stats.npz --features encoder:toy",
    ],
}


def test_every_flag_runs(run, photos, tmp_path, monkeypatch):
    """All commands of FLAGS, in an order in which each finds what it needs; large decoders in one block."""
    import timm
    from fid import InceptionV3
    from rae import DECODERS
    for size in ("L", "XL"):
        width, _, heads, mlp_dim = DECODERS[size]
        monkeypatch.setitem(DECODERS, size, (width, 1, heads, mlp_dim))
    save_images(tmp_path / "photos_fid", 4, size=(24, 24))
    save_images(tmp_path / "photos_fid32", 4, size=(32, 32))
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), "tiny.pt")
    torch.save(InceptionV3().state_dict(), "inception.pt")
    for arguments in FLAGS["assets/pretrain_encoder.py"]:
        run("assets/pretrain_encoder.py", arguments, tiny=False)
    for arguments in FLAGS["train_decoder.py"][:-1]:
        run("train_decoder.py", arguments, tiny=False)
    file = load("d/preset/checkpoint.pt")
    assert file["config"]["width"] == 768 and file["config"]["grid"] == 2
    torch.save(file["ema"], "bare.pt")                 # what a released decoder and its statistics look like
    torch.save({"mean": file["mean"], "var": file["var"]}, "stat.pt")
    said = run("train_decoder.py", FLAGS["train_decoder.py"][-1], tiny=False)
    assert json.loads(said.splitlines()[-1])["rfid"] > 0
    file = load("d/up/checkpoint.pt")                  # 32 px latents decoded to 64 px
    assert file["config"]["patch_size"] == 16 and file["config"]["grid"] == 4 and file["image_size"] == 32
    run("train_diffusion.py", "--steps 1 --batch-size 4 --out f/toy", tiny=False)
    for arguments in FLAGS["train_diffusion.py"]:
        run("train_diffusion.py", arguments, tiny=False)
    assert same(load("f/plain/checkpoint.pt")["config"]["depth"], (1, 0))
    for arguments in FLAGS["sample.py"]:
        run("sample.py", arguments, tiny=False)
    assert sorted(os.listdir("s/folder")) == ["000000.png", "000001.png", "000002.png", "record.json"]
    said = [run("fid.py", arguments, tiny=False) for arguments in FLAGS["fid.py"]]
    assert json.loads(said[0])["num"] == 3 and "precision" in said[1] and "FID " in said[1]


def test_editing(run):
    run("train_diffusion.py")
    run("sample.py", "--out pictures --cfg 2")
    a, b = "pictures/000001.png", "pictures/000002.png"
    run("sample.py", f"--like {a} --strength 0 --classes 3,7,8 --out like.png")
    run("sample.py", f"--like {a} --strength 0.7 --classes 3,7 --out edited.png")
    run("sample.py", f"--interpolate {a} {b} --strength 0 --out row.png")
    like, edited, row = (np.load(f"{name}.npz")["arr_0"] for name in ("like", "edited", "row"))
    assert len(like) == 3 and len(edited) == 2 and len(row) == 8 and (like == like[0]).all()
    assert (like[0] == row[0]).all() and (row[0] != row[-1]).any() and (edited[0] != like[0]).any()
    assert Image.open("row.png").size[0] == 8 * 34 * 2
    said = run("sample.py", "--cfg 2 --neighbours pictures --out again.png")      # each is its own nearest
    assert "the nearest of 20 images (cosine 1.000)" in said
    sheet = np.asarray(Image.open("again_neighbours.png"))[::2, ::2]
    assert sheet.shape == (8 * 34, 8 * 34, 3) and (sheet[:, :34] == sheet[:, 34:68]).all()


@pytest.mark.parametrize("script", TINY)
def test_every_flag_and_choice_is_run(script, run, monkeypatch):
    """A flag exists only if a test runs it off its default, and so for each of its choices."""
    def caught(parser):
        raise SystemExit(parser)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    with pytest.raises(SystemExit) as parser:
        run(script)
    actions = [a for a in parser.value.code._actions if a.option_strings and a.dest != "help"]
    apart = {"test_stage1.py": ("--critics", "--lpips-weights", "--vgg-weights", "--dino-weights"),
             "test_trust.py": ("--compile",)}          # tests of their own: they need critics, or a minute
    text = " ".join(FLAGS[script])
    for name, flags in apart.items():
        text += " ".join(re.findall(rf"(?:{'|'.join(flags)})[ \w]*", (ROOT / "tests" / name).read_text()))
    for action in actions:
        flag, = action.option_strings
        assert re.search(rf"{flag}\b", text), flag
        for choice in action.choices or ():
            assert choice == action.default or f"{flag} {choice}" in text, (flag, choice)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices(run, device):
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())[device]
    if not there:
        pytest.skip(f"no {device} here")
    for script in ("train_decoder.py", "train_diffusion.py", "sample.py"):
        said = run(script, f"--device {device}")
        assert f"{device}" in said
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


# ----------------------------------------------------------------------------------------------- the same run

def test_same_command_twice_is_bit_equal_and_resume_is_exact(run):
    for script, out in (("train_decoder.py", "--out "), ("train_diffusion.py", "--out ")):
        run(script, out + "a")
        run(script, out + "b")
        a = load("a/checkpoint.pt")
        assert same(a, load("b/checkpoint.pt"))
        os.replace("b/previous.pt", "b/checkpoint.pt")                # as if killed after step 2 of 4
        said = run(script, out + "b")
        assert "continuing at step 2" in said and same(a, load("b/checkpoint.pt"))
        assert (open("a/log.jsonl").read().count("\n") == open("b/log.jsonl").read().count("\n"))
        assert "finished already" in run(script, out + "b")
        with pytest.raises(SystemExit, match="seed 0 there, 1 here"):
            run(script, out + "b --seed 1")
        os.system("rm -r a b")


def test_a_changed_seed_changes_the_run(run):
    run("train_diffusion.py", "--out a")
    run("train_diffusion.py", "--out b --seed 1")
    assert not same(load("a/checkpoint.pt")["model"], load("b/checkpoint.pt")["model"])


def test_samples_do_not_depend_on_the_batch(run):
    run("train_diffusion.py")
    run("sample.py", "--out a.npz --batch-size 20")
    run("sample.py", "--out b.npz --batch-size 3")
    a, b = (np.load(f)["arr_0"].astype(int) for f in ("a.npz", "b.npz"))
    assert a.shape == (20, 32, 32,
                       3) and abs(a - b).max() <= 1  # a product's rounding may depend on the batch


@pytest.mark.slow
def test_two_processes_do_the_run_of_one(tmp_path, photos):
    """torchrun, gloo: ranks end with the same weights as one process, up to the order of a sum."""
    logs, pictures = [], []
    for launch in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                      "--nproc_per_node=2"]):
        out = tmp_path / str(len(launch))
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        for script, extra in (("train_decoder.py", "--eval-every 1"),
                              ("train_diffusion.py", "--log-every 1")):
            if script == "train_diffusion.py":
                extra += " --backbone 16,1,2 --head 24,1,2 --sample-every 4"
            command = (f"{ROOT / script} --data {photos} --steps 3 --batch-size 4 --save-every 3 "
                       f"--out {out}/{script} {extra}")
            done = subprocess.run(launch + command.split(), env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
        command = (f"{ROOT}/sample.py --ckpt {tmp_path}/1/train_diffusion.py/checkpoint.pt --num 7 --steps 2 "
                   f"--batch-size 2 --out {out}/samples.npz")         # both from the model of the one process
        end = ["--"] if len(launch) > 1 else []        # else torchrun takes --num for an option of its own
        done = subprocess.run(launch + end + command.split(), env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        pictures.append(np.load(out / "samples.npz")["arr_0"])
        logs.append([[json.loads(line) for line in open(out / script / "log.jsonl")]
                     for script in ("train_decoder.py", "train_diffusion.py")])
    assert pictures[0].shape == (7, 32, 32, 3) and np.array_equal(*pictures)
    for one, two in zip(*logs):
        for a, b in zip(one, two, strict=True):
            key = next(k for k in ("psnr", "l1", "loss") if k in a)
            assert a[key] == pytest.approx(b[key], rel=1e-4)


# --------------------------------------------------------------------------------------------------- mistakes

def test_mistakes_end_in_one_line(run, tmp_path, photos):
    with pytest.raises(SystemExit, match="run train_diffusion.py first"):
        run("sample.py")
    with pytest.raises(SystemExit, match="run sample.py first"):
        run("fid.py")
    run("train_diffusion.py")
    save_images(tmp_path / "used", 1)
    (tmp_path / "empty").mkdir()
    torch.save({"ema": {}}, "nothing.pt")
    open("half.pt", "wb").write(open(DIFFUSION, "rb").read()[:4000])
    wrong = load(DIFFUSION)
    torch.save(wrong | {"latents": "0" * 16}, "other.pt")
    run("assets/pretrain_encoder.py", "--width 32 --out small.pt")
    run("train_decoder.py", "--encoder small.pt --out small")
    toy = str(ROOT / "assets" / "toy_decoder.pt")
    cases = [
        ("train_decoder.py", "--data nowhere", "nowhere: no such folder"),
        ("train_decoder.py", "--data empty", "empty: no images"),
        ("train_decoder.py", "--encoder nothing.pt", "not an encoder file"),
        ("train_decoder.py", "--encoder no", "encoder no: no such file"),
        ("train_decoder.py", "--out used", "used: not empty"),
        ("train_decoder.py", "--out out/diffusion", "kind diffusion there, decoder here"),
        ("train_decoder.py", f"--init {DIFFUSION}", "diffusion model, not an RAE decoder"),
        ("train_diffusion.py", f"--out x --decoder {DIFFUSION}", "diffusion model, not an RAE decoder"),
        ("train_diffusion.py", "--out x --decoder half.pt", "half.pt: cannot be read, truncated"),
        ("train_diffusion.py", "--out x --decoder nothing.pt", "not an RAE decoder"),
        ("train_diffusion.py", f"--out x --init {toy}", "this is an RAE decoder"),
        ("train_diffusion.py", "--seed 7", "seed 0 there, 7 here"),
        ("sample.py", f"--ckpt {toy}", "this is an RAE decoder"),
        ("sample.py", "--ckpt half.pt", "half.pt: cannot be read, truncated"),
        ("sample.py", "--ckpt other.pt", "trained in other latents"),
        ("sample.py", "--decoder small/checkpoint.pt", "16 tokens x 64, the decoder's are 16 x 32"),
        ("sample.py", "--classes 3,10", r"--classes \[10\]: out of range 0 to 9"),
        ("sample.py", "--classes a", "--classes: invalid class_list value: 'a'"),
        ("sample.py", "--out used", "used: not empty"),
        ("sample.py", "--device cuda", "--device: invalid choice: 'cuda'"),
        ("fid.py", "--device cuda", "--device: invalid choice: 'cuda'"),
        ("train_diffusion.py", "--steps 0 --out x", "--steps: invalid positive value: '0'"),
        ("fid.py", "used toy", "1 images"),
        ("fid.py", f"{DIFFUSION} toy", "wants arr_0 of uint8"),
        ("fid.py", "photos toy", "40 px|several sizes|44"),
        ("fid.py", "photos photos_val", "FID needs the Inception weights"),
        ("fid.py", "photos photos --features nothing", "wants inception or encoder"),
    ]
    for script, arguments, message in cases:
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as stop:
            run(script, arguments)
        text = str(stop.value)
        assert re.search(message, text), (script, arguments, text)
        assert "\n" not in text and text.startswith("error: "), (script, arguments, text)


def test_a_broken_image_stops_a_run_with_its_name(run, photos):
    (photos / "cat" / "3.png").write_text("not an image")
    for workers in (0, 1):
        with pytest.raises(SystemExit, match="^error: .*3.png: not readable"):
            run("train_diffusion.py", f"--data photos --workers {workers} --batch-size 12 --out w{workers}")


def test_an_untrained_decoder_is_noticed(run):
    run("train_decoder.py", "--steps 1 --save-every 1 --lr 0 --lr-end 0", tiny=False)
    said = run("train_diffusion.py", "--decoder out/decoder/checkpoint.pt")
    assert "WARNING: the decoder looks untrained" in said


def test_class_count_change_redraws_the_label_table(run, photos):
    run("train_diffusion.py", "--out a")
    said = run("train_diffusion.py", "--data photos --out b --init a/checkpoint.pt --lr 0 --lr-end 0")
    assert "10 classes there, 2 here; the label table is new" in said
    a, b = load("a/checkpoint.pt")["ema"], load("b/checkpoint.pt")["model"]
    assert torch.equal(a["blocks.0.attn.qkv.weight"], b["blocks.0.attn.qkv.weight"])
    assert b["y_embedder.embedding_table.weight"].shape == (3, 96)
