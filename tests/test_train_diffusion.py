"""train_diffusion.py: batches and the loop; and what both training loops have in common."""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchgen
import yaml
from budget import HostReads
from torch.utils._python_dispatch import TorchDispatchMode

import dit_dh
import rae as R
import train_decoder
import train_diffusion
from rae import UsageError
from tests.conftest import (
    SMALL_MODEL,
    TINY,
    assert_close_logs,
    begin,
    compiler,
    files_of,
    first_gradients,
    load,
    log_of,
    relative_distance,
    same,
    save_images,
)
from train_diffusion import StepBatches


def step_batches(data, n=6, seed=0, flip=True, rank=0, world_size=1, micro=None):
    args = SimpleNamespace(global_batch_size=n, micro_batch_size=micro, seed=seed)
    return StepBatches(data, args, flip, rank, world_size)


def corner_crop(image, size, generator):
    left = int(torch.randint(image.width - size + 1, (), generator=generator))
    return image.crop((left, 0, left + size, size))


def test_batches_depend_only_on_seed_and_step(tmp_path):
    save_images(tmp_path, 11, size=(48, 40))
    data = R.ImageFolder(tmp_path, 32, corner_crop)
    whole = step_batches(data)
    again = step_batches(data)
    other = step_batches(data, seed=1)
    halves = [step_batches(data, rank=rank, world_size=2) for rank in (0, 1)]
    assert list(halves[1].rows) == [3, 4, 5]
    assert whole.micro_batches == [slice(0, 6)]
    micro = step_batches(data, rank=1, world_size=2, micro=2)
    assert [list(micro.rows[m]) for m in micro.micro_batches] == [[3, 4], [5]]
    for step in (5, 0, 3):  # in any order
        images = torch.cat([half[step][0] for half in halves])
        labels = torch.cat([half[step][1] for half in halves])
        assert images.dtype == torch.uint8
        assert torch.equal(images, whole[step][0])
        assert torch.equal(labels, whole[step][1])
        assert torch.equal(images, again[step][0])
    assert not torch.equal(whole[0][0], other[0][0])
    with pytest.raises(UsageError, match="--global-batch-size must be a multiple of 4 processes"):
        step_batches(data, world_size=4)


def test_an_epoch_visits_every_image_once(tmp_path):
    save_images(tmp_path, 11)
    data = R.ImageFolder(tmp_path, 32)
    data.labels = np.arange(11)  # each image its own, to see the order
    batches = step_batches(data, flip=False)
    seen = torch.cat([batches[step][1] for step in range(4)]).tolist()
    assert sorted(seen[:11]) == sorted(seen[11:22]) == list(range(11))
    assert seen[:11] != seen[11:22]
    images, labels = batches[2]
    for image, label in zip(images, labels):
        assert np.array_equal(image, data[label])


def test_flips_are_half_of_the_images(tmp_path):
    save_images(tmp_path, 8)
    data = R.ImageFolder(tmp_path, 32)
    data.labels = np.arange(8)
    images, labels = step_batches(data, n=100)[0]
    flipped = 0
    for image, label in zip(images, labels):
        plain = torch.from_numpy(data[label])
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
        flipped += torch.equal(image, plain.flip(-1))
    assert 25 < flipped < 75


# ---------------------------------------------------------------------------------------------
# Runs


def test_presets_have_the_papers_epochs():
    """1,281,167 images are 1,251 steps of 1,024 or 2,502 of 512, without the last, short batch."""
    for name, stop_at in (("imagenet256", None), ("imagenet512", 400 * 1251)):
        preset = train_diffusion.PRESETS[name]
        assert preset["global_batch_size"] == 1024
        assert preset["steps"] == 800 * 1251
        assert preset.get("stop_at") == stop_at
        assert preset["hold"] == 40 * 1251
        preset = train_decoder.PRESETS[name]
        assert preset["global_batch_size"] == 512
        assert preset["steps"] == 16 * 2502
        assert preset["warmup"] == 2502


def test_learning_rate():
    args = SimpleNamespace(lr=1.0, lr_end=0.1, hold=10, steps=20)
    rates = [train_diffusion.learning_rate(step, args) for step in (0, 10, 15, 20)]
    assert rates == pytest.approx([1, 1, 0.55, 0.1])


def test_the_first_step_by_hand(run, monkeypatch):
    """The clipped gradient of a model with nonzero weights, with a third of the labels dropped."""
    model = dit_dh.DiTDH(128, 4, (16, 1, 2), (24, 1, 2), num_classes=10)
    for p in model.parameters():
        p.data = 0.3 * torch.randn_like(p)
    torch.save({"ema": model.state_dict(), "config": model.config}, "init.pt")
    gradients = first_gradients(monkeypatch)
    flags = "--init init.pt --steps 1 --global-batch-size 8 --label-drop 0.3 --clip 0.01"
    run("train_diffusion.py", f"{flags} {SMALL_MODEL}", tiny=False)

    args = SimpleNamespace(seed=0, global_batch_size=8, micro_batch_size=None)
    images, labels = StepBatches(R.open_data("toy", 32), args, True, 0, 1)[0]
    z = R.load_rae("toy").encode(images / 255)
    generator = R.seeded_generator("step", 0, 0)
    t = dit_dh.draw_time(8, "logit-normal", generator)
    y = torch.where(torch.rand(8, generator=generator) < 0.3, 10, labels)
    assert 0 < (y == 10).sum() < 8
    eps = R.seeded_noise([("noise", 0, 0, row) for row in range(8)], z.shape[1:], "cpu")
    dit_dh.flow_loss(model, z, y, 4.0, t, eps).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert relative_distance(gradients[0], [p.grad for p in model.parameters()]) < 1e-5


def test_stop_at_and_kept_weights(run):
    """The first part of a run has the learning rates of the whole, and can be continued. The EMA
    weights of --keep-every are those of their step.
    """
    run("train_diffusion.py", "--out a --keep-every 2")
    run("train_diffusion.py", "--out b --keep-every 2 --stop-at 2")
    kept = load("a/ema_0000002.pt")
    assert "optimizer" not in kept
    assert load("b/checkpoint.pt")["step"] == 2
    assert same(load("b/checkpoint.pt")["ema"], kept["ema"])
    run("train_diffusion.py", "--out b --keep-every 2")
    assert same(load("a/checkpoint.pt"), load("b/checkpoint.pt"))
    assert log_of("a") == log_of("b")

    before = files_of("b")
    run("train_diffusion.py", "--out b --keep-every 2 --stop-at 3")
    assert files_of("b") == before


def test_init_with_other_classes_starts_a_new_label_table(trained, photos):
    flags = "--data photos --out b --init out/diffusion/checkpoint.pt --lr 0 --lr-end 0"
    trained("train_diffusion.py", flags)
    a = load("out/diffusion/checkpoint.pt")["ema"]
    b = load("b/checkpoint.pt")["model"]
    assert torch.equal(a["blocks.0.attn.qkv.weight"], b["blocks.0.attn.qkv.weight"])
    assert b["y_embedder.embedding_table.weight"].shape == (3, 16)


# ---------------------------------------------------------------------------------------------
# Both loops


@pytest.mark.parametrize("script", ["train_decoder.py", "train_diffusion.py"])
def test_the_encoder_runs_outside_autocast(run, monkeypatch, script):
    """In training as in the pass that makes the statistics: the latents are the same."""
    forward = R.Encoder.forward
    seen = []

    def noting(self, images):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, images)

    monkeypatch.setattr(R.Encoder, "forward", noting)
    run(script, "--precision bf16")
    assert len(seen) >= 4
    assert not any(seen)


def poison_noise(monkeypatch, bad):
    """Make the training noise of the steps in `bad`, counted from 0, NaN."""
    seeded_noise = R.seeded_noise

    def poisoned(keys, shape, device):
        noise = seeded_noise(keys, shape, device)
        return noise * torch.nan if keys[0][0] == "noise" and keys[0][2] in bad else noise

    monkeypatch.setattr(R, "seeded_noise", poisoned)


SHORT = "--global-batch-size 8 --log-every 1 --save-every 2"
TWO_SCRIPTS = [
    ("train_decoder.py", f"{SHORT} --eval-every 20 --eval-num 8", "l1"),
    ("train_diffusion.py", f"{SHORT} --sample-every 20 {SMALL_MODEL}", "loss"),
]


@pytest.mark.parametrize("script, flags, loss", TWO_SCRIPTS)
def test_a_step_that_is_not_finite_is_skipped(run, monkeypatch, script, flags, loss):
    """Also in the last step of all: the run is not lost."""
    poison_noise(monkeypatch, {1, 3, 4, 7})
    run(script, f"--steps 8 {flags} --out run", tiny=False)
    log = [x for x in log_of("run") if loss in x]
    assert [x["skipped"] for x in log] == [0, 1, 1, 2, 3, 3, 3, 4]
    assert log[2][loss] > 0
    file = load("run/checkpoint.pt")
    assert file["step"] == 8
    for name in ("model", "ema"):
        assert all(v.isfinite().all() for v in file[name].values())
    assert {int(state["step"]) for state in file["optimizer"]["state"].values()} == {4}


@pytest.mark.parametrize("script, flags, loss", TWO_SCRIPTS)
def test_five_steps_that_are_not_finite_end_the_run(run, monkeypatch, script, flags, loss):
    poison_noise(monkeypatch, range(3, 99))
    with pytest.raises(SystemExit, match="error: five non-finite gradients in a row.*--lr"):
        run(script, f"--steps 20 {flags} --out run", tiny=False)
    log = log_of("run")
    assert [x["step"] for x in log] == list(range(1, 8)), "the eighth step, the fifth bad, ends it"
    file = load("run/checkpoint.pt")
    assert all(v.isfinite().all() for v in file["ema"].values())


@pytest.mark.slow
@compiler
@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_decoder.py", "--starts 0 0 0 --micro-batch-size 3"),
        ("train_diffusion.py", f"{SMALL_MODEL} --checkpoint-activations"),
    ],
)
def test_compiled_runs_are_the_same_runs(run, script, flags):
    flags += " --steps 3 --global-batch-size 6 --log-every 1"
    run(script, f"{flags} --out plain", tiny=False)
    run(script, f"{flags} --out compiled --compile", tiny=False)
    plain, compiled = load("plain/checkpoint.pt"), load("compiled/checkpoint.pt")
    assert plain["ema"].keys() == compiled["ema"].keys()
    assert plain["model"].keys() == compiled["model"].keys()
    assert_close_logs(log_of("plain"), log_of("compiled"), 1e-3, ("l1", "loss"))


@pytest.mark.slow
def test_compiling_without_a_compiler(tmp_path):
    flags = f"--compile --device cpu {TINY['train_diffusion.py']}"
    cache = str(tmp_path / "cache")
    process = begin(
        "train_diffusion.py", flags, cwd=tmp_path, CXX="/nowhere", TORCHINDUCTOR_CACHE_DIR=cache
    )
    said = process.communicate()[1]
    assert process.returncode == 1
    assert re.fullmatch("error: .*--no-compile\n", said)


# A step of stage 2 reads the gradient's norm. A step of stage 1 reads two, the decoder's and the
# discriminator's. extras/test_gpu.py counts them on a GPU.
@pytest.mark.parametrize(
    "script, flags, reads",
    [
        ("train_diffusion.py", f"{SMALL_MODEL} --sample-every 99", 1),
        ("train_decoder.py", "--starts 0 0 0 --eval-every 99 --eval-num 4", 2),
    ],
)
def test_host_reads_of_a_step(run, script, flags, reads):
    """A worker makes the batches, and nothing else is due."""
    flags += " --workers 1 --global-batch-size 8 --micro-batch-size 4 --log-every 99"
    flags += " --save-every 99 --device cpu"
    counts = []
    for steps in (2, 4):
        with HostReads() as mode:
            run(script, f"{flags} --steps {steps} --out {steps}", tiny=False)
        counts.append(mode.count)
    assert counts[1] - counts[0] == 2 * reads


def test_mps(run):
    if "mps" not in R.available_devices():
        pytest.skip("no mps here")
    for script in ("train_decoder.py", "train_diffusion.py", "sample.py"):
        run(script, "--device mps")
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


@pytest.mark.slow
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
        if "MPS" not in kernels and "Composite" not in kernels:
            missing.append(name)
    # MPS has another kernel for attention; positions are resized before the encoder is moved.
    known = ("flash_attention_for_cpu", "upsample_bicubic2d_aa")
    assert not [name for name in missing if not any(k in name for k in known)]
