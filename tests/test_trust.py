"""What makes a run trustworthy: parallel gradients, kills, full disks, the average, the latent cache."""

import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, gap
from test_rae import save_images
from test_run import load, same

import rae as R
from dit_dh import DiTDH, flow_loss

SMALL = "--backbone 16,1,2 --head 24,1,2"


def log_of(out):
    return [json.loads(line) for line in open(f"{out}/log.jsonl")]


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def distance(a, b):
    """Of two lists of tensors, relative to the first's norm."""
    a, b = (torch.cat([x.flatten() for x in side]) for side in (a, b))
    return ((a - b).norm() / a.norm()).item()


# ---------------------------------------------------------------------------------- one batch, many processes

@pytest.mark.parametrize("script, flags", [
    ("train_decoder.py", "--starts 0 0 0"),
    ("train_decoder.py", "--gan 0 --checkpoint-activations"),
    ("train_diffusion.py", f"{SMALL} --checkpoint-activations")])
def test_micro_batches_equal_one(run, monkeypatch, script, flags):
    """Gradients of the first step (the discriminator's on what the decoder's left: so its rate is 0)."""
    update, seen = R.Optimizer.update, []

    def spy(self, *args):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return update(self, *args)
    monkeypatch.setattr(R.Optimizer, "update", spy)
    for out, micro in (("whole", ""), ("parts", "--micro-batch 3")):      # of 8: 3, 3 and 2
        run(script, f"{flags} {micro} --steps 1 --batch-size 8 --lr 0 --lr-end 0 --log-every 1 --out {out}",
            tiny=False)
    half = len(seen) // 2
    assert half == (2 if "0 0 0" in flags else 1)
    for a, b in zip(seen[:half], seen[half:]):
        assert distance(a, b) < 1e-5
    a, b = (log_of(out)[0] for out in ("whole", "parts"))
    keys = {"l1", "perceptual", "gan", "d_loss", "gan_weight", "loss", "grad_norm"} & a.keys()
    assert len(keys) in (2, 5) and all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-7) for k in keys)


def of_ranks(tmp_path, name, launch, script, flags):
    """What ranks.py kept of each process, and the run's log."""
    (tmp_path / name).mkdir(parents=True)
    command = f"{ROOT}/tests/ranks.py {tmp_path / name} {script} {flags} --out {tmp_path / name}/run"
    done = subprocess.run(launch + command.split(), capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "EPS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    kept = [load(tmp_path / name / f"{rank}.pt") for rank in range(2)
            if (tmp_path / name / f"{rank}.pt").exists()]
    return kept, [x for x in log_of(tmp_path / name / "run") if "lr" in x]


TWO = torchrun("--standalone", "--nproc_per_node=2")


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [
    ("train_decoder.py", "--starts 0 0 0 --eval-every 20 --eval-num 8"),
    ("train_diffusion.py", f"{SMALL} --sample-every 20")])
def test_processes_and_micro_batches_equal_one(tmp_path, script, flags):
    """20 steps of 8 images, the GAN on from the first; AdamW's eps is 1, since with the usual one a parameter
    whose gradient is near zero turns rounding into steps. The discriminator sees 8-bit images of the decoder
    after its step, where rounding flips pixels: its first gradient is compared at a rate of 0."""
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags = f"--data {tmp_path}/photos --batch-size 8 --log-every 1 --save-every 20 --workers 0 {flags}"
    (one,), log = of_ranks(tmp_path, "one", [sys.executable], script, f"{flags} --steps 20")
    (parts,), log_parts = of_ranks(tmp_path, "parts", [sys.executable], script,
                                   f"{flags} --steps 20 --micro-batch 2")
    (two, other), log_two = of_ranks(tmp_path, "two", TWO, script, f"{flags} --steps 20")
    assert same(two, other), "ranks differ"
    assert len(log) == len(log_parts) == len(log_two) == 20
    keys = {"l1", "perceptual", "gan", "d_loss", "gan_weight", "loss", "grad_norm"} & log[0].keys()
    for kept, theirs in ((parts, log_parts), (two, log_two)):
        assert distance(one[0]["grads"], kept[0]["grads"]) < 1e-5
        for a, b in zip(one, kept, strict=True):
            print(script, distance(a["grads"], b["grads"]), distance(a["params"], b["params"]))
            assert distance(a["params"], b["params"]) < 1e-5
        for a, b in zip(log, theirs):
            assert all(a[k] == pytest.approx(b[k], rel=1e-3) for k in keys), a["step"]
    if len(one) == 2:
        still = f"{flags} --steps 1 --lr 0 --lr-end 0"
        (one,), _ = of_ranks(tmp_path, "one_still", [sys.executable], script, still)
        (two, other), _ = of_ranks(tmp_path, "two_still", TWO, script, still)
        assert same(two, other) and all(distance(a["grads"], b["grads"]) < 1e-5 for a, b in zip(one, two))


@pytest.mark.slow
def test_two_nodes_on_loopback(tmp_path):
    save_images(tmp_path / "photos", 12, size=(32, 32))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = (f"{ROOT}/train_diffusion.py --data {tmp_path}/photos {SMALL} {TINY['train_diffusion.py']} "
               f"--out {tmp_path}/run --cache-latents {tmp_path}/cache")
    launch = torchrun("--nnodes=2", "--nproc_per_node=1", "--rdzv-id=x", "--rdzv-backend=c10d",
                      f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1")
    nodes = [subprocess.Popen(launch + command.split(), text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("cpu x 2" in text for text in said) == 1 and load(tmp_path / "run/checkpoint.pt")["step"] == 4


# -------------------------------------------------------------------------------------------- kills and disks

CASES = [("train_diffusion.py", "", 1, ("any", "save", "any")),
         ("train_diffusion.py", "cache", 1, ("any", "any")),
         ("train_diffusion.py", "", 2, ("any",)), ("train_diffusion.py", "cache", 2, ("any",)),
         ("train_decoder.py", "", 1, ("save", "any")), ("train_decoder.py", "", 2, ("any",))]


def passed_step_10(log):
    return log.exists() and log.read_text().count("\n") >= 5


@pytest.mark.slow
@pytest.mark.parametrize("script, cache, world, moments", CASES)
def test_a_killed_run_resumes_exactly(tmp_path, script, cache, world, moments):
    """20 steps, and the same in pieces: kill -9 at a random moment after step 10, or within a save."""
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags = {"train_decoder.py": "--starts 0 0.2 0.5 --eval-every 20 --eval-num 8",
             "train_diffusion.py": "--sample-every 20"}[script]
    flags += f" --data {tmp_path}/photos --steps 20 --batch-size 16 --save-every 2 --log-every 2 --workers 1"
    flags += f" --cache-latents {tmp_path}/cache" if cache else ""
    launch = [sys.executable] if world == 1 else torchrun("--standalone", f"--nproc_per_node={world}")

    def begin(out):
        return subprocess.Popen([*launch, f"{ROOT}/{script}", *flags.split(), "--out", str(out)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
    whole = begin(tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout.read()
    out, new = tmp_path / "killed", tmp_path / "killed" / "checkpoint.tmp"
    rng = random.Random(f"{script}{cache}{world}")
    for moment in moments:
        hit = False
        while not hit:
            start, process = time.time(), begin(out)
            while process.poll() is None:
                if new.exists() if moment == "save" else passed_step_10(out / "log.jsonl"):
                    time.sleep(rng.random() * 0.3 if moment == "any" else 0)
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                assert time.time() < start + 200
            assert process.returncode == -signal.SIGKILL, "the run was over before its kill"
            hit = moment == "any" or new.exists()      # a save that is cut leaves its temporary file
    process = begin(out)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert same(load(tmp_path / "whole" / "checkpoint.pt"), load(out / "checkpoint.pt"))
    steps = [[x["step"] for x in log_of(x)] for x in (tmp_path / "whole", out)]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_sigterm_saves(tmp_path):
    save_images(tmp_path / "photos", 40, size=(32, 32))
    process = subprocess.Popen([sys.executable, f"{ROOT}/train_diffusion.py", "--data", f"{tmp_path}/photos",
                                "--out", f"{tmp_path}/run", "--log-every", "1", "--workers", "1"],
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 3 "):                 # as torchrun does: to the worker too
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 0 and not list((tmp_path / "run").glob("samples_*.png"))
    saved = load(tmp_path / "run" / "checkpoint.pt")["step"]
    assert saved == log_of(tmp_path / "run")[-1]["step"] and 3 < saved < 20


def test_a_full_disk_keeps_the_old_checkpoint(run, tmp_path):
    """The run goes on from step 2 in a process that may write files of up to 1 MB."""
    run("train_diffusion.py", "--out run")
    os.replace("run/previous.pt", "run/checkpoint.pt")
    before = open("run/checkpoint.pt", "rb").read()
    code = (f"import sys; sys.path.insert(0, '{ROOT}'); import rae, train_diffusion; "
            "from assets import toy_world; toy_world.TOY = {'train': (60, 0), 'val': (30, 1)}; "
            "rae.cli(train_diffusion.main)")
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY["train_diffusion.py"].split(), "--out", "run"], text=True,
        capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6)))
    assert done.returncode == 1 and "continuing at step 2" in done.stdout
    assert re.fullmatch(r"error: run: step 4 cannot be saved \(.*\); the checkpoint before is kept: .*\n",
                        done.stderr), done.stderr
    assert open("run/checkpoint.pt", "rb").read() == before and not os.path.exists("run/checkpoint.tmp")


class NoBatches(torch.utils.data.Dataset):
    pass


def run_args(out, **changed):
    return SimpleNamespace(**dict(out=out, resume="auto", lr=1, steps=9, batch_size=1, workers=0) | changed)


def test_checkpoints_survive(tmp_path, group, monkeypatch):
    part, other = torch.nn.Linear(90, 90), torch.nn.Linear(90, 90)
    run = R.Run(run_args(tmp_path), "decoder")
    run.restore(model=part)
    for _ in zip(range(2), run.steps(NoBatches(), torch.device("cpu"), 0)):
        run.save(note=3)                               # at steps 0 and 1
    run = R.Run(run_args(tmp_path), "decoder")
    assert run.first == 1 and run.saved["note"] == 3
    assert run.saved["settings"] == dict(kind="decoder", lr=1, steps=9, batch_size=1)
    run.restore(model=other)
    assert torch.equal(other.weight, part.weight) and "model" not in run.saved
    for changed, kind, message in ((dict(lr=2), "decoder", "lr 1 there, 2 here"),
                                   (dict(resume="never"), "decoder", "holds a run, and --resume never"),
                                   (dict(), "diffusion", "kind decoder there, diffusion here")):
        with pytest.raises(ValueError, match=message):
            R.Run(run_args(tmp_path, **changed), kind)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:3000])
    run = R.Run(run_args(tmp_path), "decoder")
    assert run.first == 0 and run.saved["step"] == 0
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(ValueError, match="without a whole checkpoint"):
        R.Run(run_args(tmp_path), "decoder")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="without a whole checkpoint"):
        R.Run(run_args(tmp_path / "other"), "decoder")
    shutil.rmtree(tmp_path / "other")
    path.unlink()
    assert not R.Run(run_args(tmp_path), "decoder").saved
    monkeypatch.setattr(torch.distributed, "all_gather_object",
                        lambda steps, step: steps.__setitem__(slice(2), [step, None]))
    with pytest.raises(ValueError, match="not the same on all nodes"):
        R.Run(run_args(tmp_path), "decoder")


def test_log_forgets_what_a_resumed_run_repeats(tmp_path, group):
    run = R.Run(run_args(tmp_path), "decoder")
    for run.first, logged in ((1, (1, 2, 3)), (2, (3,))):
        for step in run.steps(NoBatches(), torch.device("cpu"), 0):
            if step in logged:
                run.log(loss=run.first)
            if step == 3:
                break
        if run.first == 1:
            with open(tmp_path / "log.jsonl", "a") as f:
                f.write('{"step": 4, "lo')             # killed while it wrote
    assert [(x["step"], x["loss"]) for x in log_of(tmp_path)] == [(1, 1), (2, 1), (3, 2)]


# ------------------------------------------------------------------------------------ the average and compile

def test_ema_warms_up_and_is_no_alias():
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    start, target = ema.weight.detach().clone(), model.weight.detach().clone()
    R.update_ema(ema, model, 0.999, 0)
    assert gap(ema.weight.detach(), 0.1 * start + 0.9 * target) < 1e-6            # d = 1 / 10
    before = ema.weight.detach().clone()
    model.weight.data.zero_()
    assert torch.equal(ema.weight, before)
    R.update_ema(ema, model, 0.5, 10 ** 6)
    assert gap(ema.weight.detach(), 0.5 * before) < 1e-6


def random_model(seed=0, **changed):
    torch.manual_seed(seed)
    sizes = dict(latent_dim=6, grid=4, width=(16, 32), depth=(2, 2), heads=(2, 4), num_classes=3)
    model = DiTDH(**sizes | changed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None,
                              reason="torch.compile wants a C++ compiler")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.slow, compiler])])
def test_the_average_is_isolated(compiled):
    model = random_model()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    x, t, y = torch.randn(2, 16, 6), torch.rand(2), torch.tensor([0, 3])
    before = ema(x, t, y)
    if compiled:
        model.compile()
    online = model(x, t, y)
    assert gap(online, before) < 1e-5 and online.requires_grad
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert gap(model(x, t, y), before) > 0.01 and torch.equal(ema(x, t, y), before)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("script, flags", [
    ("train_decoder.py", "--starts 0 0 0 --micro-batch 3"),
    ("train_diffusion.py", f"{SMALL} --checkpoint-activations")])
def test_compiled_runs_are_the_same_runs(run, script, flags):
    for out, extra in (("plain", ""), ("compiled", "--compile")):
        run(script, f"{flags} --steps 3 --batch-size 6 --log-every 1 --out {out} {extra}", tiny=False)
    a, b = (load(f"{out}/checkpoint.pt") for out in ("plain", "compiled"))
    assert a["ema"].keys() == b["ema"].keys() and all(k in a["model"] for k in b["model"])
    a, b = ([x for x in log_of(out) if "lr" in x] for out in ("plain", "compiled"))
    for x, y in zip(a, b, strict=True):
        assert all(x[k] == pytest.approx(y[k], rel=1e-3) for k in ("l1", "loss") if k in x)


@pytest.mark.parametrize("make", [
    random_model, lambda: random_model(depth=(2, 0)), lambda: R.Decoder(6, 4, 2, 16, 2, 2, 24)])
def test_checkpointed_activations_have_equal_gradients(make):
    model, grads = make(), []
    for on in (False, True):
        model.checkpoint_activations = on
        x = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(1))
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if isinstance(model, R.Decoder):
                loss = model(x).square().mean()
            else:
                t = torch.tensor([0.2, 0.7])
                loss = flow_loss(model, x, torch.tensor([0, 3]), 1.0, t, x.flip(0)).mean()
        model.zero_grad()
        loss.backward()
        grads.append((kept, [p.grad.clone() for p in model.parameters()]))
    (more, a), (less, b) = grads
    assert all(map(torch.equal, a, b)) and less < more / 2


# ------------------------------------------------------------------------------------------- the latent cache

def test_cached_latents(run, tmp_path):
    save_images(tmp_path / "photos", 9, size=(44, 40))
    flags = "--data photos --micro-batch 4 --log-every 1"
    run("train_diffusion.py", f"{flags} --out online")
    said = run("train_diffusion.py", f"{flags} --out cached --cache-latents cache")
    assert "encoding 9 images in both flips, 3.69e-05 GB" in said
    about, mine = os.stat("cache/latents.npy"), [log_of(out) for out in ("online", "cached")]
    for a, b in zip(*mine, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and 0 <= b["waiting"] <= 1
    said = run("train_diffusion.py", f"{flags} --out again --cache-latents cache --workers 1")
    assert "cache: latents of 9 images" in said
    assert os.stat("cache/latents.npy").st_mtime_ns == about.st_mtime_ns
    assert same(load("cached/checkpoint.pt")["model"], load("again/checkpoint.pt")["model"])
    os.replace("cached/previous.pt", "cached/checkpoint.pt")
    run("train_diffusion.py", f"{flags} --out cached --cache-latents cache")
    assert same(load("cached/checkpoint.pt")["model"], load("again/checkpoint.pt")["model"])
    run("assets/pretrain_encoder.py", "--out enc.pt")
    run("train_decoder.py", "--encoder enc.pt --out dec")
    changed = "cache: latents of another encoder or of other images"
    with pytest.raises(SystemExit, match=changed):
        run("train_diffusion.py", f"{flags} --out c --cache-latents cache --decoder dec/checkpoint.pt")
    os.utime("photos/3.png", (1, 1))
    with pytest.raises(SystemExit, match=changed):
        run("train_diffusion.py", f"{flags} --out d --cache-latents cache")


def test_no_room_for_the_cache(run, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SystemExit, match="cache: no room for 0.000246 GB"):
        run("train_diffusion.py", "--cache-latents cache")
    assert not os.path.exists("cache/about.json")


# ---------------------------------------------------------------------------------------------- the benchmark

def bench(*arguments):
    done = subprocess.run([sys.executable, f"{ROOT}/tests/bench.py", *arguments], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_what_the_benchmark_computes():
    plain, less = bench("--sizes", "S", "--seconds", "0")["fits"][:2]
    assert not plain["checkpoint_activations"] and less["checkpoint_activations"]
    for fits in (plain["images"], less["images"]):
        assert list(fits) == ["8 GB", "12 GB", "24 GB", "80 GB"]
        assert 0 < fits["8 GB"] < fits["12 GB"] < fits["24 GB"] < fits["80 GB"]
    assert all(less["images"][gb] > 2 * plain["images"][gb] for gb in less["images"])


@pytest.mark.slow
@compiler
def test_the_benchmark_measures():
    result = bench("--sizes", "toy", "--seconds", "1")
    assert [(x["precision"], x["compile"]) for x in result["train"]] == [
        ("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)]
    assert all(x["images_per_s"] > 0 and x["memory_gb"] > 0 and 0 < x["share"] < 1 for x in result["train"])
