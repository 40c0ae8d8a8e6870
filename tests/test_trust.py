"""What makes a run trustworthy: parallel gradients, kills, EMA, compilation, few GPU syncs."""

import copy
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import HostReads
from conftest import ROOT, TINY, gap
from test_rae import save_images
from test_run import assert_same_run, load, log_of, same
from test_stage1 import first_gradients

import rae as R
from dit_dh import DiTDH, flow_loss

SMALL = "--backbone 16,1,2 --wide-head 24,1,2"


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


TWO = torchrun("--standalone", "--nproc_per_node=2")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def distance(a, b):
    """The norm of the difference of two lists of tensors, relative to the first's norm."""
    a = torch.cat([x.flatten() for x in a])
    b = torch.cat([x.flatten() for x in b])
    return ((a - b).norm() / a.norm()).item()


# ---------------------------------------------------------------------------------------------
# One batch, many processes


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_decoder.py", "--disc-weight 0 --checkpoint-activations"),
        ("train_diffusion.py", f"{SMALL} --checkpoint-activations"),
    ],
)
def test_micro_batches_equal_one(run, monkeypatch, script, flags):
    seen = first_gradients(monkeypatch)
    for out, micro in (("whole", ""), ("parts", "--micro-batch-size 3")):  # of 8: 3, 3 and 2
        run(
            script,
            f"{flags} {micro} --steps 1 --global-batch-size 8 --log-every 1 --precision fp32 "
            f"--out {out}",
            tiny=False,
        )
    assert len(seen) == 2
    assert distance(*seen) < 1e-5
    a = log_of("whole")[0]
    b = log_of("parts")[0]
    for key in {"l1", "perceptual", "loss", "grad_norm"} & a.keys():
        assert a[key] == pytest.approx(b[key], rel=1e-4)


def records_of_ranks(folder, launch, script, flags):
    """What _ddp_worker.py recorded on every rank, and the training lines of the run's log."""
    folder.mkdir(parents=True)
    command = f"{ROOT}/tests/_ddp_worker.py {folder} {script} {flags} --out {folder}/run"
    done = subprocess.run(
        launch + command.split(), capture_output=True, text=True, env=ONE_THREAD | {"EPS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kept = [load(path) for path in sorted(folder.glob("[0-9].pt"))]
    return kept, [line for line in log_of(folder / "run") if "lr" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags, wrapped",
    [
        (
            "train_decoder.py",
            "--disc-weight 0 --eval-every 20 --eval-num 8",
            ["Decoder", "Discriminator"],
        ),
        ("train_diffusion.py", f"{SMALL} --sample-every 20", ["DiTDH"]),
    ],
)
def test_processes_and_micro_batches_equal_one(tmp_path, script, flags, wrapped):
    """20 steps of 8 images, without the GAN. AdamW's eps is 1: with the usual eps, rounding becomes
    a step wherever the gradient is near zero.
    """
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags += f" --data {tmp_path}/photos --global-batch-size 8 --log-every 1 --save-every 20"
    flags += " --workers 0 --steps 20"
    one, log = records_of_ranks(tmp_path / "one", [sys.executable], script, flags)
    assert one[0]["wrapped"] == []
    assert len(log) == 20
    for name, launch, micro in (
        ("parts", [sys.executable], "--micro-batch-size 3"),
        ("two", TWO, ""),
        ("two_parts", TWO, "--micro-batch-size 3"),
    ):
        kept, their_log = records_of_ranks(tmp_path / name, launch, script, f"{flags} {micro}")
        if launch == TWO:
            assert len(kept) == 2
            assert kept[0]["wrapped"] == wrapped, "gradients are averaged by torch's DDP"
            assert same(kept[0], kept[1]), "ranks differ"
        a = one[0]["optimizers"][0]
        b = kept[0]["optimizers"][0]
        print(script, name, distance(a["grads"], b["grads"]), distance(a["params"], b["params"]))
        assert distance(a["grads"], b["grads"]) <= 1e-5
        assert distance(a["params"], b["params"]) <= 1e-5
        for x, y in zip(log, their_log, strict=True):
            for key in {"l1", "perceptual", "loss"} & x.keys():
                assert x[key] == pytest.approx(y[key], rel=1e-4), (name, x["step"])


@pytest.mark.slow
@pytest.mark.parametrize("micro", ["", "--micro-batch-size 3"])
def test_processes_stay_equal_with_the_gan(tmp_path, micro):
    """Decoder and discriminator are bit-equal after ten steps of both."""
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags = f"--data {tmp_path}/photos --global-batch-size 8 --steps 10 --starts 0 0 0 --workers 0"
    flags += f" --log-every 1 --eval-num 8 {micro}"
    kept, log = records_of_ranks(tmp_path / "two", TWO, "train_decoder.py", flags)
    assert kept[0]["wrapped"] == ["Decoder", "Discriminator"]
    assert len(kept[0]["optimizers"]) == 2
    assert same(kept[0], kept[1])
    assert all(line["disc_weight"] > 0 and line["d_loss"] > 0 for line in log)


@pytest.mark.slow
def test_eight_processes_end_as_one(tmp_path):
    """Both stages, sampling and scoring. Batches of 2 and 3 leave the ranks unequal shares of 21
    samples, of 19 images to score against, and of 40 to compute statistics of.
    """
    save_images(tmp_path / "photos", 40, size=(32, 32))
    save_images(tmp_path / "photos_val", 19, size=(32, 32), seed=1)
    results = {}
    for world in (1, 8):
        folder = tmp_path / str(world)
        folder.mkdir()
        data = f"--data {tmp_path}/photos --global-batch-size 16 --workers 1 --steps 6"
        commands = [
            f"train_decoder.py {data} --val-data {tmp_path}/photos_val --disc-weight 0 "
            "--micro-batch-size 3 --log-every 6 --eval-every 6 --out decoder",
            f"train_diffusion.py {data} {SMALL} --decoder decoder/checkpoint.pt "
            "--micro-batch-size 3 --log-every 1 --save-every 4 --out diffusion",
            "sample.py --ckpt diffusion/checkpoint.pt --num 21 --batch-size 2 --out s",
            f"fid.py s.npz {tmp_path}/photos_val --features encoder:toy --batch-size 3",
        ]
        for command in commands:
            launch = torchrun("--standalone", f"--nproc_per_node={world}", "--")
            script, *flags = command.split()
            done = subprocess.run(
                [*launch, f"{ROOT}/{script}", *flags],
                cwd=folder,
                env=ONE_THREAD,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, (world, script, done.stderr[-3000:])
        results[world] = {
            "decoder": load(folder / "decoder/checkpoint.pt"),
            "diffusion": load(folder / "diffusion/checkpoint.pt"),
            "logs": log_of(folder / "decoder") + log_of(folder / "diffusion"),
            "images": np.load(folder / "s.npz")["arr_0"].astype(int),
            "score": float(re.search(r"Frechet distance (\S+)", done.stdout)[1]),
        }

    one = results[1]
    eight = results[8]
    for name in ("mean", "var"):
        assert torch.allclose(one["decoder"][name], eight["decoder"][name], rtol=1e-6)
    for name in ("decoder", "diffusion"):
        a, b = [list(result[name]["ema"].values()) for result in (one, eight)]
        print(name, distance(a, b))
        assert distance(a, b) < 1e-3
    for a, b in zip(one["logs"], eight["logs"], strict=True):
        for key in {"l1", "perceptual", "loss", "psnr", "psnr_noisy"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3), (key, a, b)
    assert one["images"].shape == eight["images"].shape == (21, 32, 32, 3)
    assert abs(one["images"] - eight["images"]).mean() < 1
    assert one["score"] == pytest.approx(eight["score"], rel=0.01)


@pytest.mark.slow
def test_two_nodes_on_loopback(tmp_path):
    save_images(tmp_path / "photos", 12, size=(32, 32))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = f"{ROOT}/train_diffusion.py --data {tmp_path}/photos --out {tmp_path}/run"
    command += f" {TINY['train_diffusion.py']}"
    launch = torchrun(
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-id=x",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--local-addr=127.0.0.1",
    )
    nodes = []
    for _ in range(2):
        node = subprocess.Popen(
            launch + command.split(),
            text=True,
            env=ONE_THREAD,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        nodes.append(node)
    # A launcher can wait 300 s for another one that left before it was asked.
    said = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("cpu x 2" in text for text in said) == 1
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_decoder.py", "train_diffusion.py"])
def test_an_error_in_one_process_ends_both(tmp_path, script):
    """An image that only one of them reads is broken."""
    save_images(tmp_path / "photos", 40, size=(32, 32))
    (tmp_path / "photos" / "7.png").write_text("not an image")
    flags = "--steps 200 --eval-num 2" if script == "train_decoder.py" else f"--steps 200 {SMALL}"
    if script == "train_decoder.py":
        # Break the image after the latent statistics, which read all images.
        shutil.move(tmp_path / "photos" / "7.png", tmp_path / "7.png")
        save_images(tmp_path / "photos", 8, size=(32, 32))
    command = f"{ROOT}/{script} --data {tmp_path}/photos --global-batch-size 4 --workers 1 {flags}"
    command += f" --out {tmp_path}/run --save-every 1"
    process = subprocess.Popen(
        TWO + command.split(),
        text=True,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if script == "train_decoder.py":
        while not (tmp_path / "run/checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.1)
        shutil.copy(tmp_path / "7.png", tmp_path / "photos" / "7.png")
    began = time.time()
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert time.time() - began < 60
    assert re.search(r"^error: .*/7.png", said, re.M), said


# ---------------------------------------------------------------------------------------------
# Kills


def processes_of(folder):
    """The ids of all processes with this folder in their command line."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder) in (entry / "cmdline").read_text():
                pids.append(int(entry.name))
        except OSError:
            pass  # it ended meanwhile
    return pids


def kill_all(folder):
    """kill -9 launcher, ranks and workers. (torchrun starts ranks in sessions of their own.)"""
    while pids := [pid for pid in processes_of(folder) if pid != os.getpid()]:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def begin(script, out, flags, world=1):
    launch = [sys.executable]
    if world > 1:
        launch = torchrun("--standalone", f"--nproc_per_node={world}")
    return subprocess.Popen(
        [*launch, f"{ROOT}/{script}", *flags.split(), "--out", str(out)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=ONE_THREAD,
    )


# Ten kills, two of them within a save: (script, processes, moments).
KILLS = [
    ("train_diffusion.py", 1, ("any", "save", "any", "any")),
    ("train_diffusion.py", 2, ("any", "any")),
    ("train_decoder.py", 1, ("save", "any")),
    ("train_decoder.py", 2, ("any", "any")),
]


@pytest.mark.slow
@pytest.mark.parametrize("script, world, moments", KILLS)
def test_a_killed_run_resumes_exactly(tmp_path, script, world, moments):
    """kill -9 at a random moment after a save, or within one. --save-every is a multiple of
    --log-every, so the logs are equal too; pictures are due at other steps.
    """
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags = {
        "train_decoder.py": "--starts 0 0.2 0.5 --eval-every 5 --eval-num 8",
        "train_diffusion.py": "--sample-every 5",
    }[script]
    flags += f" --data {tmp_path}/photos --steps 30 --global-batch-size 16 --save-every 4"
    flags += " --log-every 2 --workers 1"
    whole = begin(script, tmp_path / "whole", flags, world)
    said = whole.communicate()[0]
    assert whole.returncode == 0, said
    out = tmp_path / "killed"
    temporary = out / "checkpoint.pt.tmp"
    rng = random.Random(f"{script}{world}")
    for moment in moments:
        hit = False
        while not hit:
            temporary.unlink(missing_ok=True)
            path = out / "checkpoint.pt"
            saved = path.stat().st_mtime_ns if path.exists() else 0
            began = time.time()
            process = begin(script, out, flags, world)
            while process.poll() is None:
                if moment == "save":
                    now = temporary.exists()
                else:
                    now = path.exists() and path.stat().st_mtime_ns != saved
                    if now:
                        time.sleep(rng.random() * 0.5)
                if now:
                    kill_all(out)
                    process.wait()
                assert time.time() < began + 200
            process.stdout.close()
            assert process.returncode != 0, "the run was over before its kill"
            hit = moment == "any" or temporary.exists()  # an interrupted save leaves this file
    process = begin(script, out, flags, world)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_ctrl_c_ends_without_a_traceback(tmp_path):
    """SIGINT reaches the data loading workers too, as Ctrl-C does."""
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags = f"--data {tmp_path}/photos {SMALL} --log-every 1 --save-every 2 --workers 1"
    process = begin("train_diffusion.py", tmp_path / "run", flags)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 3 "):
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert any("same command" in line for line in lines), "how to resume"
    assert not any('train_diffusion.py", line' in line for line in lines), "".join(lines)


# ---------------------------------------------------------------------------------------------
# EMA and compilation


def random_model(**changed):
    torch.manual_seed(0)
    sizes = {
        "latent_dim": 6,
        "grid_size": 4,
        "backbone": (16, 2, 2),
        "wide_head": (32, 2, 4),
        "num_classes": 3,
    }
    model = DiTDH(**sizes | changed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler",
)


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[pytest.mark.slow, compiler])]
)
def test_the_ema_is_isolated(compiled):
    model = random_model()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    x = torch.randn(2, 16, 6)
    t = torch.rand(2)
    y = torch.tensor([0, 3])
    before = ema(x, t, y)
    if compiled:
        model.compile()
    online = model(x, t, y)
    assert gap(online, before) < 1e-5
    assert online.requires_grad
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert gap(model(x, t, y), before) > 0.01
    assert torch.equal(ema(x, t, y), before)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_decoder.py", "--starts 0 0 0 --micro-batch-size 3"),
        ("train_diffusion.py", f"{SMALL} --checkpoint-activations"),
    ],
)
def test_compiled_runs_are_the_same_runs(run, script, flags):
    for out, extra in (("plain", ""), ("compiled", "--compile")):
        command = f"{flags} --steps 3 --global-batch-size 6 --log-every 1 --out {out} {extra}"
        run(script, command, tiny=False)
    a = load("plain/checkpoint.pt")
    b = load("compiled/checkpoint.pt")
    assert a["ema"].keys() == b["ema"].keys()
    assert a["model"].keys() == b["model"].keys()
    for x, y in zip(log_of("plain"), log_of("compiled"), strict=True):
        for key in {"l1", "loss"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=1e-3)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize(
    "script, flags, graphs",
    [
        ("train_decoder.py", "--disc-weight 0 --noise-tau 0", 1),
        ("train_diffusion.py", f"{SMALL} --backbone 16,3,2", 2),
    ],
)
def test_compiled_blocks_under_ddp_and_autocast(tmp_path, script, flags, graphs):
    """Two processes, bfloat16, activation checkpointing: one compilation per block shape."""
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags += f" --data {tmp_path}/photos --global-batch-size 8 --steps 3 --log-every 1 --workers 0"
    flags += " --precision bf16 --checkpoint-activations --micro-batch-size 2"
    logs = {}
    for name, extra in (("plain", ""), ("compiled", "--compile")):
        kept, logs[name] = records_of_ranks(tmp_path / name, TWO, script, f"{flags} {extra}")
        assert same(kept[0]["optimizers"], kept[1]["optimizers"])
        assert kept[0]["graphs"] == (graphs if extra else 0)
    for a, b in zip(logs["plain"], logs["compiled"], strict=True):
        for key in {"l1", "loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=0.01)
    a, b = [load(tmp_path / name / "run/checkpoint.pt") for name in ("plain", "compiled")]
    assert a["ema"].keys() == b["ema"].keys()
    assert a["model"].keys() == b["model"].keys()


# ---------------------------------------------------------------------------------------------
# Host-device syncs and activation checkpointing


# A step of stage 2 reads the gradient's norm. A step of stage 1 reads two, the decoder's and the
# discriminator's.
READS = [("train_diffusion.py", SMALL, 1), ("train_decoder.py", "--starts 0 0 0", 2)]


@pytest.mark.parametrize("script, flags, reads", READS)
def test_host_reads_of_a_step(run, script, flags, reads):
    counts = []
    # A worker makes the batches, and nothing else is due.
    rare = "--workers 1 --log-every 99 --save-every 99"
    rare += " --sample-every 99" if "diffusion" in script else " --eval-every 99 --eval-num 4"
    for steps in (2, 6):
        with HostReads() as mode:
            command = f"{flags} {rare} --steps {steps} --global-batch-size 8 --micro-batch-size 4"
            run(script, f"{command} --out {steps}", tiny=False)
        counts.append(mode.count)
    assert counts[1] - counts[0] == 4 * reads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("script, flags, reads", READS)
def test_gpu_syncs_of_a_step(run, script, flags, reads):
    counts = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for steps in (2, 6):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                command = f"{flags} --steps {steps} --global-batch-size 8 --micro-batch-size 4"
                run(script, f"{command} --log-every 99 --save-every 99 --out {steps}", tiny=False)
            counts.append(sum("synchronizing" in str(w.message) for w in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts[1] - counts[0] == 4 * reads


@pytest.mark.parametrize("kind", ["DiT^DH", "DiT", "decoder"])
def test_checkpointed_activations_have_equal_gradients(kind):
    if kind == "decoder":
        torch.manual_seed(0)
        model = R.Decoder(6, 4, 2, 16, 2, 2, 24)
    elif kind == "DiT":
        model = random_model(wide_head=None)
    else:
        model = random_model()
    x = torch.randn(2, 16, 6)
    t = torch.tensor([0.2, 0.7])
    y = torch.tensor([0, 3])
    kept = []
    gradients = []
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if kind == "decoder":
                loss = model(x).square().mean()
            else:
                loss = flow_loss(model, x, y, 1.0, t, x.flip(0)).mean()
        model.zero_grad()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < kept[0] / 2
