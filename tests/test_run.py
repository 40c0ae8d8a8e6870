"""The scripts as users run them: documented commands, every flag, resume, determinism."""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
import torchgen
import yaml
from conftest import DOCS, ROOT, TINY
from PIL import Image
from test_rae import save_images
from torch.utils._python_dispatch import TorchDispatchMode

import dit_dh
import rae
from extras.to_official import to_official_names

TRAINING = ["train_decoder.py", "train_diffusion.py"]
DIFFUSION = "out/diffusion/checkpoint.pt"


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


def log_of(out):
    """The lines of a run's log, without the speed."""
    lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    for line in lines:
        line.pop("images_per_s", None)
    return lines


def files_of(folder):
    return {name: open(f"{folder}/{name}", "rb").read() for name in sorted(os.listdir(folder))}


def pictures_of(folder):
    return {name: content for name, content in files_of(folder).items() if name.endswith(".png")}


def assert_same_run(a, b):
    """Equal checkpoints, logs and pictures."""
    assert same(load(f"{a}/checkpoint.pt"), load(f"{b}/checkpoint.pt"))
    assert log_of(a) == log_of(b)
    assert pictures_of(a) == pictures_of(b)


@pytest.fixture
def photos(tmp_path):
    """photos/: two classes of small images, and the other folders that the docs' commands name."""
    for i, name in enumerate(("cat", "dog")):
        save_images(tmp_path / "photos" / name, 6, size=(44, 40), seed=i)
        save_images(tmp_path / "photos_val" / name, 3, size=(44, 40), seed=9 + i)
        save_images(tmp_path / "cifar10/train" / name, 6, size=(32, 32), seed=i)
        save_images(tmp_path / "cifar10/test" / name, 3, size=(32, 32), seed=9 + i)
    return tmp_path / "photos"


@pytest.fixture
def snapshots(monkeypatch):
    """Copy a run's folder OUT to OUT.STEP after each save: what a kill at that time leaves."""
    atomic_save = rae.atomic_save

    def save_and_copy(content, path):
        atomic_save(content, path)
        if "step" in content:
            shutil.copytree(path.parent, f"{path.parent}.{content['step']}", dirs_exist_ok=True)

    monkeypatch.setattr(rae, "atomic_save", save_and_copy)


# ---------------------------------------------------------------------------------------------
# Documentation


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


def why_skipped(script, arguments):
    """Why the test below cannot run a command, or None."""
    if script not in TINY:
        return "has tests of its own"
    if "imagenet" in arguments:
        return "needs ImageNet or full-size networks"
    if "released:" in arguments:
        return "needs a download"


@pytest.mark.slow
def test_documented_commands(run, photos):
    """In the order of the pages, so that each command finds the files of earlier ones."""
    ran = set()
    skipped = []
    for script, arguments in documented_commands():
        reason = why_skipped(script, arguments)
        if reason:
            skipped.append(f"skipped, {reason}: {script} {arguments}")
        else:
            run(script, arguments)
            ran.add(script)
    print(*skipped, sep="\n")
    assert ran == set(TINY), "each script has a command"
    assert Image.open("out/samples.png").size[0] > 300
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


def test_presets_have_the_papers_epochs():
    """1,281,167 images are 1,251 steps of 1,024 or 2,502 of 512, without the last, short batch."""
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


# ---------------------------------------------------------------------------------------------
# Flags

# Every flag and choice appears here off its default, on a tiny world.
FLAGS = {
    "extras/pretrain_encoder.py": [
        "--data photos --out e/enc.pt --image-size 24 --patch 12 --width 16 --depth 1 --heads 2 "
        "--mask 0.25 --steps 3 --batch-size 4 --lr 0.001 --seed 3 --device cpu",
    ],
    "train_decoder.py": [
        "--data photos --val-data photos_val --encoder e/enc.pt --image-size 24 --resize 26 "
        "--noise-tau 0.5 --noise-dist half-normal --perceptual-weight 0 --disc-weight 0.3 "
        "--starts 0 0.3 0.4 --steps 3 --global-batch-size 4 --lr 0.001 --lr-end 0.0001 --warmup 1 "
        "--ema 0.9 --seed 2 --out d/a --log-every 1 --eval-every 2 --eval-num 3 --eval-sigma 0.1 "
        "--save-every 2 --workers 1 --device cpu --precision bf16 "
        "--micro-batch-size 3 --checkpoint-activations",
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
        "--global-batch-size 2 --workers 0 --out d/preset --loss-networks encoder --eval-num 2 "
        "--no-compile",
        "--preset imagenet512 --data photos --encoder timm:vit_tiny_patch16_224 "
        "--encoder-weights tiny.pt --size toy --image-size 32 --resize 40 --steps 1 "
        "--global-batch-size 2 --workers 0 --out d/preset512 --loss-networks encoder --eval-num 2 "
        "--no-compile",
    ],
    "train_diffusion.py": [
        "--data photos --decoder d/b/checkpoint.pt --backbone 16,1,2 --wide-head 24,1,2 "
        "--alpha 2.5 --time uniform --label-drop 0.5 --steps 3 --global-batch-size 4 --lr 0.001 "
        "--lr-end 0.0001 --hold 1 --clip 0 --ema 0.9 --cfg-scale 2 --seed 4 --out f/a "
        "--log-every 1 --sample-every 2 --save-every 2 --keep-every 2 --workers 1 --device cpu "
        "--precision bf16 --micro-batch-size 3 --checkpoint-activations --stop-at 2",
        "--data photos --decoder d/b/checkpoint.pt --backbone 16,1,2 --wide-head none "
        "--label-drop 1 --no-flip --steps 2 --global-batch-size 4 --out f/plain",
        "--data toy --init f/toy/checkpoint.pt --steps 1 --global-batch-size 4 --out f/init",
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
        "--interval 0.1 0.9 --seed 5 --batch-size 2 --out s/a --device cpu --precision bf16 "
        "--classes 1",
        "--ckpt f/toy/checkpoint.pt --guidance-model f/init/checkpoint.pt --guidance-scale 1.7 "
        "--num 2 --steps 2 --out s/guided",
        "--ckpt f/toy/checkpoint.pt --decoder toy --num 2 --steps 2 --out s/decoder",
        "--ckpt f/plain/checkpoint.pt --num 2 --steps 2 --out s/plain",
        "--ckpt f/a/ema_0000002.pt --num 2 --steps 2 --out s/kept",
        "--preset imagenet256 --ckpt f/preset/checkpoint.pt --decoder bare.pt --encoder "
        "timm:vit_tiny_patch16_224 --encoder-weights tiny.pt --stats stat.pt --num 1 --steps 2 "
        "--out s/preset --precision fp32",
        "--preset imagenet512 --ckpt f/preset256/checkpoint.pt --num 1 --steps 2 "
        "--out s/preset512 --precision tf32",
    ],
    "fid.py": [
        "s/a photos_fid --features encoder:e/enc.pt --num 3 --batch-size 2 --device cpu",
        "s/guided.npz toy --weights inception.pt --mode pytorch-fid --metrics fid,is,pr --crop 24",
        "s/guided.npz --save s/stats.npz --features encoder:toy",
    ],
}
# test_stage1.py trains with the published loss networks, test_trust.py compiles.
FLAGS_ELSEWHERE = "--loss-networks published --lpips-weights --vgg-weights --dino-weights --compile"


@pytest.mark.slow
def test_every_flag_runs(run, photos, tmp_path, monkeypatch):
    """All commands of FLAGS; each uses files of earlier ones."""
    # One block is enough of the large networks.
    monkeypatch.setitem(dit_dh.SIZES, "S", (384, 1, 6))
    for size in ("B", "L", "XL"):
        width, _, num_heads, mlp_dim = rae.DECODERS[size]
        monkeypatch.setitem(rae.DECODERS, size, (width, 1, num_heads, mlp_dim))
    save_images(tmp_path / "photos_fid", 4, size=(24, 24))
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), "tiny.pt")
    inception = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
    torch.save(inception.state_dict(), "inception.pt")

    for script in ("extras/pretrain_encoder.py", "train_decoder.py"):
        for arguments in FLAGS[script]:
            run(script, arguments, tiny=False)
    assert rae.load_rae("d/a/checkpoint.pt").image_size == 24
    upsampling = rae.load_rae("d/up/checkpoint.pt")  # latents of 32 px, decoded to 64 px
    assert (upsampling.image_size, upsampling.encoder.input_size) == (64, 32)
    file = load("d/preset/checkpoint.pt")
    assert file["ema"]["decoder_norm.weight"].shape == (768,)
    torch.save(to_official_names(file["ema"]), "bare.pt")
    torch.save({"mean": file["mean"], "var": file["var"]}, "stat.pt")

    run("train_diffusion.py", "--steps 1 --global-batch-size 4 --out f/toy", tiny=False)
    for script in ("train_diffusion.py", "sample.py"):
        for arguments in FLAGS[script]:
            run(script, arguments, tiny=False)
    assert load("f/plain/checkpoint.pt")["config"]["wide_head"] is None
    assert sorted(os.listdir("s/a")) == ["000000.png", "000001.png", "000002.png", "settings.json"]
    said = [run("fid.py", arguments, tiny=False) for arguments in FLAGS["fid.py"]]
    assert "Frechet distance" in said[0]
    assert "3 samples" in said[0]
    assert "FID " in said[1]
    assert "precision" in said[1]
    assert "mu" in np.load("s/stats.npz")


@pytest.mark.parametrize("script", FLAGS)
def test_every_flag_is_run(script, run, monkeypatch):
    """Every flag is in FLAGS off its default, and so is each of its choices."""

    def stop_with(parser):
        raise SystemExit(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_with)
    with pytest.raises(SystemExit) as stop:
        run(script)
    parser = stop.value.code
    text = " ".join([*FLAGS[script], FLAGS_ELSEWHERE])
    for action in parser._actions:
        if action.dest == "help" or not action.option_strings:
            continue
        for name in action.option_strings:  # --compile has --no-compile
            assert re.search(rf"{name}\b", text), name
        for choice in action.choices or ():
            default = parser.get_default(action.dest)
            flag = action.option_strings[0]
            assert choice == default or f"{flag} {choice}" in text, (flag, choice)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices(run, device):
    if device not in rae.available_devices():
        pytest.skip(f"no {device} here")
    for script in ("train_decoder.py", "train_diffusion.py", "sample.py"):
        run(script, f"--device {device}")
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


# ---------------------------------------------------------------------------------------------
# Training: the same run


@pytest.mark.parametrize("script", TRAINING)
def test_runs_are_deterministic_and_resume_is_exact(run, snapshots, script):
    run(script, "--out a")
    run(script, "--out b")
    assert_same_run("a", "b")

    # What a kill right after the save of step 2 leaves.
    assert "resuming a.2 at step 2" in run(script, "--out a.2")
    assert_same_run("a", "a.2")

    # What a kill right before the save of step 4 leaves: log and pictures ahead of the checkpoint.
    shutil.copy("b.2/checkpoint.pt", "b/checkpoint.pt")
    run(script, "--out b")
    assert_same_run("a", "b")

    # A finished run stays as it is.
    before = files_of("a")
    run(script, "--out a")
    assert files_of("a") == before


def test_stop_at(run):
    """The first part of a run has the learning rates of the whole, and can be continued."""
    run("train_diffusion.py", "--out a --keep-every 2")
    run("train_diffusion.py", "--out b --keep-every 2 --stop-at 2")
    assert load("b/checkpoint.pt")["step"] == 2
    assert same(load("b/checkpoint.pt")["ema"], load("a/ema_0000002.pt")["ema"])
    run("train_diffusion.py", "--out b --keep-every 2")
    assert same(load("a/checkpoint.pt"), load("b/checkpoint.pt"))
    assert log_of("a") == log_of("b")

    before = files_of("b")
    run("train_diffusion.py", "--out b --keep-every 2 --stop-at 3")
    assert files_of("b") == before


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINING)
def test_another_run_is_refused(run, photos, script):
    """Other flags or data, a renamed class, another encoder under the same name."""
    run("extras/pretrain_encoder.py", "--out enc.pt")
    run("train_decoder.py", "--encoder enc.pt --out dec")
    latents = "--encoder enc.pt" if script == "train_decoder.py" else "--decoder dec/checkpoint.pt"
    command = f"--data photos {latents} --out run"
    run(script, command)

    def assert_refused(flags, message):
        before = files_of("run")
        with pytest.raises(SystemExit, match=message) as stop:
            run(script, flags)
        assert "\n" not in str(stop.value)
        assert files_of("run") == before

    assert_refused(f"{command} --seed 1", "^error: run .* seed 0, not 1")
    assert_refused(f"{command} --init toy", "init None, not toy")
    os.rename("photos/cat", "photos/zebra")  # would swap the labels
    assert_refused(command, r"images \w{16}, not \w{16}")
    os.rename("photos/zebra", "photos/cat")
    shutil.copytree("photos/cat", "photos/cow")
    assert_refused(command, r"images \w{16}, not \w{16}")
    shutil.rmtree("photos/cow")
    os.remove("enc.pt")
    run("extras/pretrain_encoder.py", "--seed 1 --out enc.pt")
    if script == "train_diffusion.py":
        assert_refused(command, "dec/checkpoint.pt: .*encoder")
        shutil.rmtree("dec")
        run("train_decoder.py", "--encoder enc.pt --out dec")
    assert_refused(command, r"latents \w{16}, not \w{16}")


def test_a_moved_data_folder_is_the_same_run(run, photos, snapshots):
    """And so is another spelling of its path."""
    run("train_diffusion.py", "--data photos --out a")
    os.rename("photos", "moved")
    assert "resuming a.2" in run("train_diffusion.py", "--data ./moved/ --out a.2")
    assert_same_run("a", "a.2")


def test_another_seed_is_another_run(run):
    run("train_diffusion.py", "--out a")
    run("train_diffusion.py", "--out b --seed 1")
    assert not same(load("a/checkpoint.pt")["model"], load("b/checkpoint.pt")["model"])


def test_kept_weights_are_those_of_their_step(run, snapshots):
    run("train_diffusion.py", "--out a --keep-every 2")
    kept = load("a/ema_0000002.pt")
    assert same(kept["ema"], load("a.2/checkpoint.pt")["ema"])
    assert "optimizer" not in kept


def test_init_with_other_classes_starts_a_new_label_table(run, photos):
    run("train_diffusion.py", "--out a")
    flags = "--data photos --out b --init a/checkpoint.pt --lr 0 --lr-end 0"
    run("train_diffusion.py", flags)
    a = load("a/checkpoint.pt")["ema"]
    b = load("b/checkpoint.pt")["model"]
    assert torch.equal(a["blocks.0.attn.qkv.weight"], b["blocks.0.attn.qkv.weight"])
    assert b["y_embedder.embedding_table.weight"].shape == (3, 16)


def test_a_broken_image_is_named(run, photos):
    """Read by the main process, and by a worker."""
    (photos / "cat" / "3.png").write_text("not an image")
    for workers in (0, 1):
        flags = f"--data photos --workers {workers} --global-batch-size 12 --out w{workers}"
        with pytest.raises(SystemExit, match="^error: .*cat/3.png") as stop:
            run("train_diffusion.py", flags)
        assert "\n" not in str(stop.value)


def test_mps_has_every_operator(run):
    """Torch's own table lists which operators have a kernel for Macs."""
    used = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            used.add(function.name().removeprefix("aten::"))
            return function(*args, **(kwargs or {}))

    with Record():
        run("train_decoder.py", "--starts 0 0 0 --resize 40 --upsample 2")
        run("train_diffusion.py", "--decoder out/decoder/checkpoint.pt")
        run("sample.py")
        run("fid.py")
    assert {"_fused_adamw_.tensor", "upsample_bicubic2d", "randn.generator"} & used

    table = f"{os.path.dirname(torchgen.__file__)}/packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.safe_load(open(table))}
    missing = []
    for name in used & entries.keys():
        entry = entries[name]
        entry = entries.get(entry.get("structured_delegate"), entry)
        kernels = ",".join(entry.get("dispatch", {"Composite": 0}))
        attention_on_cpus = "flash_attention_for_cpu" in name  # MPS has another kernel for it
        if "MPS" not in kernels and "Composite" not in kernels and not attention_on_cpus:
            missing.append(name)
    assert not missing


@pytest.mark.slow
def test_compiling_without_a_compiler(run, tmp_path):
    command = f"--compile --device cpu {TINY['train_diffusion.py']}"
    done = subprocess.run(
        [sys.executable, f"{ROOT}/train_diffusion.py", *command.split()],
        env=os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.fullmatch("error: .*--no-compile\n", done.stderr)


# ---------------------------------------------------------------------------------------------
# Sampling


def test_samples_do_not_depend_on_the_batch(run):
    run("train_diffusion.py")
    run("sample.py", "--out a --batch-size 20")
    run("sample.py", "--out b --batch-size 3")
    a = np.load("a.npz")["arr_0"].astype(int)
    b = np.load("b.npz")["arr_0"].astype(int)
    assert a.shape == (20, 32, 32, 3)
    assert abs(a - b).max() <= 1  # rounding of matrix products may depend on the batch


def test_sampling_resumes(run, monkeypatch):
    """Stopped in the fourth of seven batches. The first three are not drawn again."""
    run("train_diffusion.py")
    flags = "--num 20 --batch-size 3 --steps 2"
    run("sample.py", f"{flags} --out whole", tiny=False)

    decode = rae.RAE.decode
    drawn = []

    def stop_in_fourth(self, z):
        drawn.append(len(z))
        if len(drawn) == 4:
            raise rae.UsageError("stopped")
        return decode(self, z)

    monkeypatch.setattr(rae.RAE, "decode", stop_in_fourth)
    with pytest.raises(SystemExit, match="stopped"):
        run("sample.py", f"{flags} --out s", tiny=False)
    assert not os.path.exists("s.npz")
    before = files_of("s")
    with pytest.raises(SystemExit, match="^error: s .*seed"):
        run("sample.py", f"{flags} --out s --seed 1", tiny=False)
    assert files_of("s") == before
    run("sample.py", f"{flags} --out s", tiny=False)
    assert drawn == [3, 3, 3, 3] + [3, 3, 3, 2]
    assert pictures_of("s") == pictures_of("whole")
    for name in ("npz", "png"):
        assert open(f"s.{name}", "rb").read() == open(f"whole.{name}", "rb").read()
    run("sample.py", f"{flags} --out s", tiny=False)
    assert len(drawn) == 8, "the same command again draws nothing"


def test_samples_of_two_checkpoints_do_not_mix(run):
    """The same path may hold a retrained model."""
    run("train_diffusion.py")
    run("sample.py", "--out s")
    before = files_of("s")
    shutil.rmtree("out/diffusion")
    run("train_diffusion.py", "--seed 1")
    with pytest.raises(SystemExit, match="^error: s "):
        run("sample.py", "--out s")
    assert files_of("s") == before


def test_an_unconditional_model_takes_no_classes(run):
    run("train_diffusion.py", "--label-drop 1")
    run("sample.py", "--out a --cfg-scale 1")
    run("sample.py", "--out b --cfg-scale 3")
    assert pictures_of("a") == pictures_of("b"), "without labels there is no guidance"
    with pytest.raises(SystemExit, match="--classes 3"):
        run("sample.py", "--out c --classes 3")


def test_guidance_needs_a_model_that_saw_the_label(run):
    run("train_diffusion.py", "--label-drop 0 --out no_null")
    run("train_diffusion.py", "--label-drop 0 --cfg-scale 1 --out no_null_unguided")
    run("train_diffusion.py", "--label-drop 1 --out null_only")
    assert pictures_of("no_null") == pictures_of("no_null_unguided")

    with pytest.raises(SystemExit, match="pass --cfg-scale 1"):
        run("sample.py", "--ckpt no_null/checkpoint.pt")
    with pytest.raises(SystemExit, match="null_only/checkpoint.pt was not trained on this class"):
        run(
            "sample.py",
            "--ckpt no_null/checkpoint.pt --guidance-scale 2 "
            "--guidance-model null_only/checkpoint.pt",
        )
    assert not os.path.exists("out/samples")
    run("sample.py", "--ckpt no_null/checkpoint.pt --cfg-scale 1")


def test_checkpoints_of_other_trainers(run):
    """With a config of their own, or with the prefixes of DDP and torch.compile."""
    run("train_diffusion.py")
    run("sample.py", "--out want")
    file = load(DIFFUSION)
    model = dit_dh.load_dit(DIFFUSION)
    inputs = (torch.randn(2, 16, 128), torch.rand(2), torch.tensor([1, 2]))
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        state = {prefix + name: w for name, w in file["ema"].items()}
        for content in (state, {"ema": state, "config": {"model": "XL"}}):
            torch.save(content, "theirs.pt")
            assert torch.equal(dit_dh.load_dit("theirs.pt")(*inputs), model(*inputs))
    run("sample.py", "--ckpt theirs.pt --decoder toy --alpha 4 --out got")
    assert pictures_of("got") == pictures_of("want")

    for content in ({"ema": None, "model": state}, {"state_dict": state}, {"ema": [1]}):
        torch.save(content, "theirs.pt")
        with pytest.raises(SystemExit, match="theirs.pt: not a diffusion model"):
            run("sample.py", "--ckpt theirs.pt")
    os.makedirs("run")
    shutil.copy("theirs.pt", "run/checkpoint.pt")
    with pytest.raises(SystemExit, match="^error: run .*--out"):
        run("train_diffusion.py", "--out run")


def test_two_copies_of_a_command_sample_the_same(run):
    run("train_diffusion.py")
    command = [sys.executable, f"{ROOT}/sample.py"]
    command += "--num 40 --steps 2 --batch-size 2 --device cpu".split()
    copies = [
        subprocess.Popen([*command, "--out", "s"], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in copies:
        assert process.communicate()[1] == ""
    run("sample.py", "--num 40 --steps 2 --batch-size 2 --out want", tiny=False)
    assert pictures_of("s") == pictures_of("want")
    assert len(np.load("s.npz")["arr_0"]) == 40


def test_files_are_not_replaced_while_open(run, monkeypatch):
    """Windows would refuse."""
    replace = os.replace

    def replace_as_on_windows(source, target):
        if os.path.exists(target):
            maps = open("/proc/self/maps").read()
            assert str(os.path.realpath(target)) not in maps, f"{target} is mapped"
        opened = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
        assert not opened & {os.path.realpath(source), os.path.realpath(target)}
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_as_on_windows)
    run("train_decoder.py", "--steps 2")
    for stop_at in (2, 4):
        run("train_diffusion.py", f"--decoder out/decoder/checkpoint.pt --stop-at {stop_at}")
    for _ in range(2):
        run("sample.py")
    run("train_decoder.py")


def test_a_folder_whose_name_is_not_utf_8(run):
    out = os.fsdecode(b"run\xff")
    for stop_at in ("2", "4"):
        run("train_diffusion.py", ["--out", out, "--stop-at", stop_at])
    run("sample.py", ["--ckpt", f"{out}/checkpoint.pt", "--out", f"{out}/samples"])


def test_many_samples_need_few_open_files(run):
    """50,000 images are packed into one file, and systems allow 1,024 open files."""
    run("train_diffusion.py")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        run("sample.py", "--num 120 --steps 1 --cfg-scale 1", tiny=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(np.load("out/samples.npz")["arr_0"]) == 120


@pytest.mark.slow
def test_killed_sampling_resumes_exactly(run, tmp_path):
    """kill -9, three times."""
    run("train_diffusion.py")
    command = [sys.executable, f"{ROOT}/sample.py"]
    command += "--num 60 --batch-size 3 --steps 20 --device cpu".split()
    subprocess.run([*command, "--out", "whole"], check=True, capture_output=True)
    folder = tmp_path / "killed"
    for kill in range(3):
        process = subprocess.Popen(
            [*command, "--out", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while len(list(folder.glob("*.png"))) < 15 * (kill + 1):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert 45 <= len(list(folder.glob("*.png"))) < 60
    subprocess.run([*command, "--out", "killed"], check=True, capture_output=True)
    assert open("killed.npz", "rb").read() == open("whole.npz", "rb").read()


@pytest.mark.slow
def test_two_processes_sample_as_one(run):
    """7 samples in four batches, the last one short, on one, two and three ranks."""
    run("train_diffusion.py")
    images = []
    for processes in (1, 2, 3):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = f"--num 7 --steps 2 --batch-size 2 --out {processes}"
        done = subprocess.run(
            [*launch, f"--nproc_per_node={processes}", "--", f"{ROOT}/sample.py", *command.split()],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        images.append(np.load(f"{processes}.npz")["arr_0"])
    assert images[0].shape == (7, 32, 32, 3)
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
