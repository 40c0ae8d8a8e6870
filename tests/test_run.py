"""The scripts as users run them: README commands, all flags, resume, determinism, mistakes."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import DOCS, ROOT, TINY, docs
from PIL import Image
from test_rae import save_images

import dit_dh
import rae
import sample

DIFFUSION = "out/diffusion/checkpoint.pt"


def readme_commands():
    """Every python or torchrun command in the docs' bash blocks, as (script, arguments)."""
    blocks = re.findall(r"```bash\n(.*?)```", docs(), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    pattern = r"^(?:python|torchrun(?: --\S+)*) +((?:extras/\w*/?)?\w+\.py) *([^#\n&]*)"
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


def load_run(out):
    """A run's checkpoint, but for the name of its folder."""
    checkpoint = load(f"{out}/checkpoint.pt")
    del checkpoint["args"]["out"]
    return checkpoint


def log_of(out):
    """A run's log, but for the speed."""
    lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    for line in lines:
        line.pop("images_per_s", None)
    return lines


@pytest.fixture
def photos(tmp_path):
    """photos/: two classes of small images, and what the README's own-image commands name."""
    for i, name in enumerate(("cat", "dog")):
        save_images(tmp_path / "photos" / name, 6, size=(44, 40), seed=i)
        save_images(tmp_path / "photos_val" / name, 3, size=(44, 40), seed=9 + i)
        save_images(tmp_path / "cifar10/train" / name, 6, size=(32, 32), seed=i)
        save_images(tmp_path / "cifar10/test" / name, 3, size=(32, 32), seed=9 + i)
    return tmp_path / "photos"


@pytest.fixture
def every_checkpoint(monkeypatch):
    """Keep each checkpoint of a run beside it, as checkpoint.pt.STEP."""
    save_file = rae.save_file

    def keeping(content, path):
        save_file(content, path)
        if "step" in content:
            shutil.copy(path, f"{path}.{content['step']}")

    monkeypatch.setattr(rae, "save_file", keeping)


def test_readme_commands(run, photos):
    """In the README's own order, so that each finds what the one before it made."""
    commands = []
    for script, arguments in readme_commands():
        if script in TINY and "imagenet" not in arguments and "released:" not in arguments:
            commands.append((script, arguments))
    assert {script for script, _ in commands} == set(TINY), "each script has a command"
    for script, arguments in commands:
        run(script, arguments)
    for block in re.findall(r"```python\n(.*?)```", docs(), re.S):
        exec(block, {})  # the export to the released names
    assert load("stage2_model.pt").keys() == load(DIFFUSION)["ema"].keys()
    assert Image.open("out/samples.png").size[0] > 300
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


def test_presets_have_the_papers_epochs():
    """1,281,167 images are 1,251 steps of 1,024 and 2,502 of 512, incomplete batches dropped."""
    import train_decoder
    import train_diffusion

    for name, epochs in (("imagenet256", 800), ("imagenet512", 400)):
        preset = train_diffusion.PRESETS[name]
        assert preset["global_batch_size"] == 1024
        assert preset["steps"] == epochs * 1251
        assert preset["hold"] == 40 * 1251
        preset = train_decoder.PRESETS[name]
        assert preset["global_batch_size"] == 512
        assert preset["steps"] == 16 * 2502
        assert preset["warmup"] == 2502


def test_links_are_alive():
    """To files, and to headings as GitHub names them."""
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


def test_readme_names_tests_that_are_there():
    named = set(re.findall(r"\btest_\w+", docs()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    there = set(re.findall(r"def (test_\w+)", sources))
    there |= {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert len(named) > 30
    assert named <= there


def test_readme_says_how_long_the_files_are():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"\| \[(\w+\.py)\]\(\1\), (\d+) lines", readme)
    said = {name: int(n) for name, n in rows}
    there = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert said == there
    assert len(said) == 6


def test_readme_has_the_numbers_of_the_claims():
    """Each cell "distance / distance (share)" of the README is one of claims.md, rounded."""

    def cells(path):
        found = re.findall(r"(\d+\.?\d*) / (\d+\.?\d*) \((\d\.\d\d)\)", path.read_text())
        return np.array(found, dtype=float)  # (n, 3)

    there = cells(ROOT / "docs/claims.md")
    said = cells(ROOT / "README.md")
    assert len(said) >= 15
    for cell in said:
        rounding = np.where(cell < 1, 0.0051, 0.051)
        assert (abs(there - cell) <= rounding).all(axis=1).any(), cell


def test_released_names_stand_on_their_page():
    page = (ROOT / "docs/released.md").read_text()
    for name, files in json.loads((ROOT / "toy/released.json").read_text()).items():
        row = next(line for line in page.splitlines() if f"released:{name}`" in line)
        assert files[0] in row


# Every flag appears here off its default (test_every_flag_is_run), with a tiny world behind it.
FLAGS = {
    "extras/pretrain_encoder.py": [
        "--data photos --out e/enc.pt --image-size 24 --patch 12 --width 16 --depth 1 --heads 2 "
        "--mask 0.25 --steps 3 --batch-size 4 --lr 0.001 --seed 3 --device cpu",
    ],
    "train_decoder.py": [
        "--data photos --val-data photos_val --encoder e/enc.pt --image-size 24 --resize 26 "
        "--noise-tau 0.5 --noise-dist half-normal --perceptual 0 --gan 0.3 --starts 0 0.3 0.4 "
        "--betas 0.5 0.9 --steps 3 --global-batch-size 4 --lr 0.001 --lr-end 0.0001 --warmup 1 "
        "--ema 0.9 --seed 2 --out d/a --log-every 1 --eval-every 2 --eval-num 3 --eval-sigma 0.1 "
        "--save-every 2 --keep-every 2 --workers 1 --device cpu --precision bf16 --micro-batch 3 "
        "--checkpoint-activations",
        "--image-size 64 --upsample 2 --steps 2 --global-batch-size 4 --out d/up",
        "--data photos --encoder e/enc.pt --image-size 24 --steps 2 --global-batch-size 4 "
        "--out d/b --precision fp32",
        "--steps 1 --global-batch-size 2 --out d/tf32 --precision tf32 --eval-num 2",
        "--size L --steps 1 --global-batch-size 2 --out d/L --eval-num 2",
        "--size XL --steps 1 --global-batch-size 2 --out d/XL --eval-num 2",
        "--data photos --encoder e/enc.pt --image-size 24 --steps 2 --global-batch-size 4 "
        "--out d/c --init d/b/checkpoint.pt",
        "--preset imagenet256 --data photos --encoder timm:vit_tiny_patch16_224 "
        "--encoder-weights tiny.pt --size B --image-size 32 --resize 40 --steps 1 "
        "--global-batch-size 2 --workers 0 --out d/preset --critics encoder --eval-num 2 "
        "--no-compile",
        "--preset imagenet512 --data photos --encoder timm:vit_tiny_patch16_224 "
        "--encoder-weights tiny.pt --size toy --image-size 32 --resize 40 --steps 1 "
        "--global-batch-size 2 --workers 0 --out d/preset512 --critics encoder --eval-num 2 "
        "--no-compile",
        "--eval-only --ckpt bare.pt --stats stat.pt --encoder timm:vit_tiny_patch16_224 "
        "--encoder-weights tiny.pt --data photos --eval-num 3 --global-batch-size 2 "
        "--out d/judged --inception inception.pt",
    ],
    "train_diffusion.py": [
        "--data photos --decoder d/b/checkpoint.pt --backbone 16,1,2 --wide-head 24,1,2 "
        "--alpha 2.5 --time uniform --label-drop 0.5 --steps 3 --global-batch-size 4 --lr 0.001 "
        "--lr-end 0.0001 --hold 1 --clip 0 --ema 0.9 --cfg-scale 2 --seed 4 --out f/a "
        "--log-every 1 --sample-every 2 --save-every 2 --keep-every 2 --workers 1 --device cpu "
        "--precision bf16 --micro-batch 3 --checkpoint-activations --stop-at 2",
        "--data photos --decoder d/b/checkpoint.pt --backbone 16,1,2 --wide-head none "
        "--label-drop 1 --no-flip --steps 2 --global-batch-size 4 --out f/plain",
        "--data toy --init f/toy/checkpoint.pt --steps 1 --global-batch-size 4 --out f/init",
        "--predict x --backbone 16,1,2 --steps 1 --global-batch-size 4 --out f/x",
        "--decoder d/up/checkpoint.pt --steps 1 --global-batch-size 4 --out f/up",
        "--preset imagenet512 --data photos --decoder bare.pt --encoder timm:vit_tiny_patch16_224 "
        "--encoder-weights tiny.pt --stats stat.pt --backbone S --wide-head 16,1,2 --steps 1 "
        "--global-batch-size 2 --workers 0 --out f/preset --no-compile --precision tf32",
        "--preset imagenet256 --data photos --decoder bare.pt --encoder timm:vit_tiny_patch16_224 "
        "--encoder-weights tiny.pt --stats stat.pt --backbone 16,1,2 --wide-head S --steps 1 "
        "--global-batch-size 2 --workers 0 --out f/preset256 --precision fp32 --no-compile",
    ],
    "sample.py": [
        "--ckpt f/a/checkpoint.pt --num 3 --steps 4 --t-last 0.001 --alpha 2 --cfg-scale 1.2 "
        "--interval 0.1 0.9 --seed 5 --batch-size 2 --out s/folder --device cpu --precision bf16 "
        "--classes 1",
        "--ckpt f/toy/checkpoint.pt --guide f/init/checkpoint.pt --guide-scale 1.7 --num 2 "
        "--steps 2 --out s/guided.npz",
        "--ckpt f/toy/checkpoint.pt --decoder toy --num 2 --steps 2 --out s/grid.png",
        "--ckpt f/plain/checkpoint.pt --num 2 --steps 2 --out s/plain.png",
        "--ckpt f/a/ema_0000002.pt --num 2 --steps 2 --out s/kept.png",
        "--preset imagenet256 --ckpt f/preset/checkpoint.pt --decoder bare.pt --encoder "
        "timm:vit_tiny_patch16_224 --encoder-weights tiny.pt --stats stat.pt --num 1 --steps 2 "
        "--out s/preset.png --precision fp32",
        "--preset imagenet512 --ckpt f/preset256/checkpoint.pt --num 1 --steps 2 "
        "--out s/preset512.png --precision tf32",
    ],
    "fid.py": [
        "s/folder photos_fid --features encoder:e/enc.pt --num 3 --batch-size 2 --device cpu "
        "--json",
        "s/guided.npz toy --weights inception.pt --mode pytorch-fid --metrics fid,sfid,is,pr "
        "--crop 24",
        "s/guided.npz --save s/stats.npz --features encoder:toy",
    ],
}


@pytest.mark.slow
def test_every_flag_runs(run, photos, tmp_path, monkeypatch):
    """All commands of FLAGS, in an order in which each finds what it needs."""
    import timm

    from fid import InceptionV3

    # One block is enough of the large ones.
    monkeypatch.setitem(dit_dh.SIZES, "S", (384, 1, 6))
    for size in ("B", "L", "XL"):
        width, _, num_heads, mlp_dim = rae.DECODERS[size]
        monkeypatch.setitem(rae.DECODERS, size, (width, 1, num_heads, mlp_dim))
    save_images(tmp_path / "photos_fid", 4, size=(24, 24))
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(vit.state_dict(), "tiny.pt")
    torch.save(InceptionV3().state_dict(), "inception.pt")
    for arguments in FLAGS["extras/pretrain_encoder.py"]:
        run("extras/pretrain_encoder.py", arguments, tiny=False)
    for arguments in FLAGS["train_decoder.py"][:-1]:
        run("train_decoder.py", arguments, tiny=False)
    assert rae.load_rae("d/a/ema_0000002.pt").image_size == 24
    file = load("d/preset/checkpoint.pt")
    assert file["ema"]["decoder_norm.weight"].shape == (768,)
    torch.save(file["ema"], "bare.pt")  # what a released decoder and its statistics look like
    torch.save({"mean": file["mean"], "var": file["var"]}, "stat.pt")
    said = run("train_decoder.py", FLAGS["train_decoder.py"][-1], tiny=False)
    assert json.loads(said.splitlines()[-1])["rfid"] > 0
    upsampling = rae.load_rae("d/up/checkpoint.pt")  # latents of 32 px, decoded to 64 px
    assert (upsampling.image_size, upsampling.encoder.input_size) == (64, 32)

    run("train_diffusion.py", "--steps 1 --global-batch-size 4 --out f/toy", tiny=False)
    for arguments in FLAGS["train_diffusion.py"]:
        run("train_diffusion.py", arguments, tiny=False)
    assert load("f/plain/checkpoint.pt")["config"]["wide_head"] is None
    assert sample.load_model("f/x/checkpoint.pt")[0].predict == "x"
    for arguments in FLAGS["sample.py"]:
        run("sample.py", arguments, tiny=False)
    files = ["000000.png", "000001.png", "000002.png", "record.json"]
    assert sorted(os.listdir("s/folder")) == files
    said = [run("fid.py", arguments, tiny=False) for arguments in FLAGS["fid.py"]]
    assert json.loads(said[0])["num"] == 3
    assert "precision" in said[1]
    assert "FID " in said[1]


@pytest.mark.parametrize("script", TINY)
def test_every_flag_and_choice_is_run(script, run, monkeypatch):
    """A flag exists only if a test runs it off its default, and so for each of its choices."""

    def caught(parser):
        raise SystemExit(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    with pytest.raises(SystemExit) as stop:
        run(script)
    parser = stop.value.code
    text = " ".join(FLAGS[script])
    # Flags with tests of their own: they need critics, or a minute.
    apart = {
        "test_stage1.py": ("--critics", "--lpips-weights", "--vgg-weights", "--dino-weights"),
        "test_trust.py": ("--compile",),
    }
    for name, flags in apart.items():
        source = (ROOT / "tests" / name).read_text()
        text += " ".join(re.findall(rf"(?:{'|'.join(flags)})[ \w]*", source))
    for action in parser._actions:
        if action.dest == "help" or not action.option_strings:
            continue
        flag = action.option_strings[0]
        for name in action.option_strings:  # --compile has --no-compile
            assert re.search(rf"{name}\b", text), name
        for choice in action.choices or ():
            default = parser.get_default(action.dest)
            assert choice == default or f"{flag} {choice}" in text, (flag, choice)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices(run, device):
    if device not in rae.available_devices():
        pytest.skip(f"no {device} here")
    for script in ("train_decoder.py", "train_diffusion.py", "sample.py"):
        run(script, f"--device {device}")
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


# ---------------------------------------------------------------------------------------------
# The same run


@pytest.mark.parametrize("script", ["train_decoder.py", "train_diffusion.py"])
def test_same_command_twice_is_bit_equal_and_resume_is_exact(run, every_checkpoint, script):
    run(script, "--out a")
    run(script, "--out b")
    assert same(load_run("a"), load_run("b"))
    pictures = {path: open(f"b/{path}", "rb").read() for path in os.listdir("b") if ".png" in path}

    # As if killed after step 2 of 4, between the checkpoint and all that was due after it.
    os.replace("b/checkpoint.pt.2", "b/checkpoint.pt")
    for path in pictures:
        if path != "pairs.png":
            os.remove(f"b/{path}")
    said = run(script, "--out b")
    assert "going on at step 2 of 4" in said
    assert same(load_run("a"), load_run("b"))
    assert log_of("a") == log_of("b")
    again = {path: open(f"b/{path}", "rb").read() for path in os.listdir("b") if ".png" in path}
    assert again == pictures

    # A finished run draws its last pictures once more, and that is all.
    run(script, "--out b")
    assert same(load_run("a"), load_run("b"))
    assert log_of("a") == log_of("b")


def test_a_run_stopped_on_the_way(run):
    """It has the learning rates of the whole, and goes on to it."""
    run("train_diffusion.py", "--out a --keep-every 2")
    said = run("train_diffusion.py", "--out b --keep-every 2 --stop-at 2")
    assert "b: step 2 of 4" in said
    kept = load("a/ema_0000002.pt")["ema"]
    assert same(load("b/checkpoint.pt")["ema"], kept)
    run("train_diffusion.py", "--out b --keep-every 2")
    assert same(load_run("a"), load_run("b"))
    assert log_of("a") == log_of("b")
    with pytest.raises(SystemExit, match="--stop-at 3: b is at step 4 already"):
        run("train_diffusion.py", "--out b --keep-every 2 --stop-at 3")


@pytest.mark.parametrize("script", ["train_decoder.py", "train_diffusion.py"])
def test_another_run_is_refused(run, photos, script):
    """Other flags or data, a renamed class, another encoder under the same name."""
    run("extras/pretrain_encoder.py", "--out enc.pt")
    run("train_decoder.py", "--encoder enc.pt --out dec")
    latents = "--encoder enc.pt" if script == "train_decoder.py" else "--decoder dec/checkpoint.pt"
    command = f"--data photos {latents} --out run"
    run(script, command)

    def refused(flags, message):
        before = {name: open(f"run/{name}", "rb").read() for name in os.listdir("run")}
        with pytest.raises(SystemExit, match=message) as stop:
            run(script, flags)
        assert "\n" not in str(stop.value)
        assert before == {name: open(f"run/{name}", "rb").read() for name in os.listdir("run")}

    refused(f"{command} --seed 1", r"run: holds a run with other settings \(seed 0 there, 1 here\)")
    refused(f"{command} --init toy", "init None there, toy here")
    os.rename("photos/cat", "photos/zebra")  # would swap the labels
    refused(command, r"images \w{16} there, \w{16} here")
    os.rename("photos/zebra", "photos/cat")
    shutil.copytree("photos/cat", "photos/cow")
    refused(command, r"images \w{16} there, \w{16} here")
    shutil.rmtree("photos/cow")
    os.remove("enc.pt")
    run("extras/pretrain_encoder.py", "--seed 1 --out enc.pt")
    if script == "train_decoder.py":
        refused(command, r"encoder_hash \w{16} there, \w{16} here")
    else:
        refused(command, "made for encoder weights")
        shutil.rmtree("dec")
        run("train_decoder.py", "--encoder enc.pt --out dec")
        refused(command, r"latents \w{16} there, \w{16} here")


def test_a_changed_seed_changes_the_run(run):
    run("train_diffusion.py", "--out a")
    run("train_diffusion.py", "--out b --seed 1")
    assert not same(load("a/checkpoint.pt")["model"], load("b/checkpoint.pt")["model"])


def test_kept_weights_are_those_of_their_step(run, every_checkpoint):
    for script in ("train_decoder.py", "train_diffusion.py"):
        run(script, "--out a --keep-every 2")
        kept = load("a/ema_0000002.pt")
        assert same(kept["ema"], load("a/checkpoint.pt.2")["ema"])
        assert "optimizer" not in kept
        shutil.rmtree("a")


def test_samples_do_not_depend_on_the_batch(run):
    run("train_diffusion.py")
    run("sample.py", "--out a.npz --batch-size 20")
    run("sample.py", "--out b.npz --batch-size 3")
    a = np.load("a.npz")["arr_0"].astype(int)
    b = np.load("b.npz")["arr_0"].astype(int)
    assert a.shape == (20, 32, 32, 3)
    assert abs(a - b).max() <= 1  # a product's rounding may depend on the batch


@pytest.mark.parametrize("out", ["s.npz", "s.png", "s"])
def test_sampling_goes_on_where_it_was_stopped(run, monkeypatch, out):
    """Stopped in the fourth of seven batches; the others are not drawn again."""
    run("train_diffusion.py")
    flags = f"--num 20 --batch-size 3 --steps 2 --out {out}"
    run("sample.py", flags, tiny=False)

    def pictures():
        if out == "s":
            return {name: open(f"s/{name}", "rb").read() for name in sorted(os.listdir("s"))}
        return open("s.npz", "rb").read()

    whole = pictures()
    assert not os.path.exists("s.parts")
    shutil.rmtree("s", ignore_errors=True)
    for name in ("s.npz", "s.png"):
        if os.path.exists(name):
            os.remove(name)

    decode = rae.RAE.decode
    drawn = []

    def stopped(self, z):
        drawn.append(len(z))
        if len(drawn) == 4:
            raise ValueError("stopped")
        return decode(self, z)

    monkeypatch.setattr(rae.RAE, "decode", stopped)
    with pytest.raises(SystemExit, match="stopped"):
        run("sample.py", flags, tiny=False)
    with pytest.raises(SystemExit, match="not empty, and its images would mix"):
        run("sample.py", f"{flags} --seed 1", tiny=False)
    assert drawn == [3, 3, 3, 3]
    run("sample.py", flags, tiny=False)
    assert drawn == [3, 3, 3, 3] + [3, 3, 3, 2]
    assert pictures() == whole
    assert os.path.exists("s.png") == (out == "s.png")
    said = run("sample.py", flags, tiny=False)
    assert len(drawn) == 8, "the same command once more draws nothing"
    assert (f"{out}: these images are there already" in said) == (out != "s")


def test_no_file_is_made_of_a_part(tmp_path):
    """As if another node's processes had written to a disk of their own."""
    np.save(tmp_path / "00000000.npy", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="holds 3 of 6 images; put --out where all processes see"):
        sample.pack_npz(tmp_path, 6, tmp_path / "s.npz", "{}")
    assert not (tmp_path / "s.npz").exists()


@pytest.mark.slow
def test_killed_sampling_ends_as_if_it_had_not_been(run, tmp_path):
    """kill -9, three times."""
    run("train_diffusion.py")
    command = [sys.executable, f"{ROOT}/sample.py"]
    command += "--num 60 --batch-size 3 --steps 20 --device cpu".split()
    subprocess.run([*command, "--out", "whole.npz"], check=True, capture_output=True)
    parts = tmp_path / "killed.parts"
    for kill in range(3):
        process = subprocess.Popen([*command, "--out", "killed.npz"], stdout=subprocess.DEVNULL)
        while len(list(parts.glob("*.npy"))) < 5 * (kill + 1):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert 15 <= len(list(parts.glob("*.npy"))) < 20
    subprocess.run([*command, "--out", "killed.npz"], check=True, capture_output=True)
    assert open("killed.npz", "rb").read() == open("whole.npz", "rb").read()
    assert not parts.exists()


@pytest.mark.slow
def test_two_processes_sample_as_one(run, tmp_path):
    """7 samples in batches of 2: four batches, the last one short, over two and three."""
    run("train_diffusion.py")
    pictures = []
    for processes in (1, 2, 3):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = f"--num 7 --steps 2 --batch-size 2 --out {processes}.npz"
        done = subprocess.run(
            [*launch, f"--nproc_per_node={processes}", "--", f"{ROOT}/sample.py", *command.split()],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        pictures.append(np.load(f"{processes}.npz")["arr_0"])
    assert pictures[0].shape == (7, 32, 32, 3)
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


def test_statistics_outlive_a_stopped_run(run, photos, monkeypatch):
    """They are in the folder before the first checkpoint, and are used if of the same latents."""
    run("train_decoder.py", "--data photos --out whole")
    os.makedirs("run")
    shutil.copy("whole/stats.pt", "run/stats.pt")
    open("run/log.jsonl", "w").close()
    calls = []
    statistics = rae.latent_statistics

    def counting(*args):
        calls.append(1)
        return statistics(*args)

    monkeypatch.setattr(rae, "latent_statistics", counting)
    run("train_decoder.py", "--data photos --out run")
    assert not calls
    assert same(load_run("whole"), load_run("run"))
    file = load("run/stats.pt")
    assert file["mean"].shape == file["var"].shape == (128, 4, 4)

    os.remove("run/checkpoint.pt")
    run("train_decoder.py", "--data photos_val --out run")  # of other images
    assert len(calls) == 1
    assert not same(load("run/stats.pt"), file)
    os.remove("run/stats.pt")
    run("train_decoder.py", "--data photos_val --out run")  # the checkpoint has them too
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------
# Mistakes


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
    wrong["args"]["latents"] = "0" * 16
    torch.save(wrong, "other.pt")
    run("extras/pretrain_encoder.py", "--width 32 --out small.pt")
    run("train_decoder.py", "--encoder small.pt --out small")
    (tmp_path / "cut").mkdir()
    shutil.copy("half.pt", "cut/checkpoint.pt")
    toy = str(ROOT / "toy/decoder.pt")
    cases = [
        ("train_decoder.py", "--data nowhere", "nowhere: no such folder"),
        ("train_decoder.py", "--data empty", "empty: no images"),
        ("train_decoder.py", "--encoder nothing.pt", "not an encoder file"),
        ("train_decoder.py", "--encoder no", "encoder no: no such file"),
        ("train_decoder.py", "--out used", "used: not empty, and not a run of ours"),
        ("train_decoder.py", "--out cut", "cut/checkpoint.pt: cannot be read, truncated"),
        ("train_decoder.py", "--out out/diffusion", "out/diffusion: holds a run with other"),
        ("train_decoder.py", f"--init {DIFFUSION}", "diffusion model, not an RAE decoder"),
        ("train_decoder.py", "--upsample 3", "--image-size 32 is not a multiple of --upsample 3"),
        ("train_decoder.py", "--resize 30", "--resize 30 is below --image-size 32"),
        ("train_diffusion.py", f"--out x --decoder {DIFFUSION}", "model, not an RAE decoder"),
        ("train_diffusion.py", "--out x --decoder half.pt", "half.pt: cannot be read, truncated"),
        ("train_diffusion.py", "--out x --decoder nothing.pt", "not an RAE decoder"),
        ("train_diffusion.py", f"--out x --init {toy}", "this is an RAE decoder"),
        ("train_diffusion.py", "--seed 7", "seed 0 there, 7 here"),
        ("train_diffusion.py", "--out x --backbone 30,1,4", "width 30 with 4 heads"),
        ("train_diffusion.py", "--out x --backbone a", "--backbone: invalid backbone_size value"),
        ("train_diffusion.py", "--steps 0 --out x", "--steps: '0': wants a whole number from 1"),
        ("sample.py", f"--ckpt {toy}", "this is an RAE decoder"),
        ("sample.py", "--ckpt half.pt", "half.pt: cannot be read, truncated"),
        ("sample.py", "--ckpt other.pt", "trained in other latents"),
        ("sample.py", "--decoder small/checkpoint.pt", "tokens x 128, the decoder's are 16 x 32"),
        ("sample.py", "--classes 3,10", r"--classes \[3, 10\]: out of range 0 to 9"),
        ("sample.py", "--classes a", "--classes: invalid class_list value: 'a'"),
        ("sample.py", "--out used", "used: not empty"),
        ("sample.py", "--device cuda", "--device: invalid choice: 'cuda'"),
        ("fid.py", "--device cuda", "--device: invalid choice: 'cuda'"),
        ("fid.py", "used toy", "1 images"),
        ("fid.py", f"{DIFFUSION} toy", "wants images, an arr_0 of uint8"),
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
        assert "\n" not in text, (script, arguments, text)
        assert text.startswith("error: "), (script, arguments, text)


def test_a_macs_gpu_takes_one_process(run, monkeypatch):
    monkeypatch.setattr(rae, "available_devices", lambda: ["mps", "cpu"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_of_one = "--device mps: a Mac's GPU takes one process; run without torchrun"
    for script in ("train_decoder.py", "train_diffusion.py"):
        with pytest.raises(SystemExit, match=run_of_one):
            run(script)
    open("model.pt", "w").close()
    with pytest.raises(SystemExit, match=run_of_one):
        run("sample.py", "--ckpt model.pt")


def test_without_file_locks_runs_are_made_all_the_same(run, monkeypatch):
    """Windows has none."""
    monkeypatch.setattr(rae, "fcntl", None)
    run("train_diffusion.py", "--out a")
    assert load("a/checkpoint.pt")["step"] == 4


def test_a_model_without_labels_takes_none(run):
    run("train_diffusion.py", "--label-drop 1")
    said = run("sample.py")
    assert "CFG 1.0" in said, "there is nothing to be guided from"
    with pytest.raises(SystemExit, match="was trained without labels; pass null or nothing"):
        run("sample.py", "--classes 3")


def test_a_broken_image_stops_a_run_with_its_name(run, photos):
    (photos / "cat" / "3.png").write_text("not an image")
    for workers in (0, 1):
        flags = f"--data photos --workers {workers} --global-batch-size 12 --out w{workers}"
        with pytest.raises(SystemExit, match="^error: .*3.png: not readable"):
            run("train_diffusion.py", flags)


def test_an_untrained_decoder_is_noticed(run):
    flags = "--steps 1 --global-batch-size 8 --eval-num 2 --lr 0 --lr-end 0"
    run("train_decoder.py", flags, tiny=False)
    said = run("train_diffusion.py", "--decoder out/decoder/checkpoint.pt")
    assert "WARNING: the decoder looks untrained" in said


def test_class_count_change_redraws_the_label_table(run, photos):
    run("train_diffusion.py", "--out a")
    flags = "--data photos --out b --init a/checkpoint.pt --lr 0 --lr-end 0"
    said = run("train_diffusion.py", flags)
    assert "10 classes there, 2 here; the label table is new" in said
    a = load("a/checkpoint.pt")["ema"]
    b = load("b/checkpoint.pt")["model"]
    assert torch.equal(a["blocks.0.attn.qkv.weight"], b["blocks.0.attn.qkv.weight"])
    assert b["y_embedder.embedding_table.weight"].shape == (3, 64)
