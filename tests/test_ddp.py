"""Several processes, and micro-batches: the same numbers as one process with whole batches."""

import re
import shutil
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rae as R
from tests.conftest import (
    NUMBERS,
    SMALL_MODEL,
    TINY,
    assert_close_logs,
    begin,
    compiler,
    first_gradients,
    launch,
    load,
    log_of,
    relative_distance,
    same,
    save_images,
)


@pytest.fixture
def data(tmp_path):
    """The flag for a folder of 40 images."""
    save_images(tmp_path / "photos", 40, size=(32, 32))
    return f"--data {tmp_path}/photos"


def test_batches_are_dealt_in_turn(monkeypatch):
    assert R.rank_batches(10, 3) == [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    monkeypatch.setattr(R.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(R.dist, "get_world_size", lambda: 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(R.dist, "get_rank", lambda rank=rank: rank)
        dealt.append(R.rank_batches(10, 3))
    assert dealt == [[range(0, 3), range(9, 10)], [range(3, 6)], [range(6, 9)]]


@pytest.mark.parametrize("value", ["", "-2", "0", "1"])
def test_an_odd_world_size_is_one_process(monkeypatch, capsys, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.setenv("RANK", "3")
    args = SimpleNamespace(precision="fp32", device="cpu")
    assert R.setup_distributed(args)[:2] == (0, 1)
    assert capsys.readouterr().out == "cpu x 1, fp32\n"


# ---------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(
    "script, flags", [("train_decoder.py", "--disc-weight 0"), ("train_diffusion.py", SMALL_MODEL)]
)
def test_micro_batches_equal_one(run, monkeypatch, script, flags):
    seen = first_gradients(monkeypatch)
    flags += " --checkpoint-activations --steps 1 --global-batch-size 8 --log-every 1"
    run(script, f"{flags} --precision fp32 --out whole", tiny=False)
    run(script, f"{flags} --precision fp32 --out parts --micro-batch-size 3", tiny=False)  # 3, 3, 2
    assert relative_distance(*seen) < 1e-5
    assert_close_logs(log_of("whole")[:1], log_of("parts")[:1], 1e-4, [*NUMBERS, "grad_norm"])


def records_of_ranks(folder, processes, script, flags):
    """What _ddp_worker.py recorded on every rank, and the training lines of the run's log."""
    folder.mkdir(parents=True)
    flags = f"{folder} {script} {flags} --out {folder}/run"
    launch("tests/_ddp_worker.py", flags, processes, EPS="1")
    kept = [load(path) for path in sorted(folder.glob("[0-9].pt"))]
    assert len(kept) == processes
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
        ("train_diffusion.py", f"{SMALL_MODEL} --sample-every 20", ["DiTDH"]),
    ],
)
def test_processes_and_micro_batches_equal_one(tmp_path, data, script, flags, wrapped):
    """20 steps of 8 images, without the GAN. AdamW's eps is 1: with the usual eps, rounding becomes
    a step wherever the gradient is near zero.
    """
    flags += f" {data} --global-batch-size 8 --log-every 1 --save-every 20 --workers 0 --steps 20"
    one, log = records_of_ranks(tmp_path / "one", 1, script, flags)
    assert one[0]["wrapped"] == []
    assert len(log) == 20
    for name, processes, micro in (
        ("parts", 1, "--micro-batch-size 3"),
        ("two", 2, ""),
        ("two_parts", 2, "--micro-batch-size 3"),
    ):
        kept, other = records_of_ranks(tmp_path / name, processes, script, f"{flags} {micro}")
        if processes == 2:
            assert kept[0]["wrapped"] == wrapped, "gradients are averaged by torch's DDP"
            assert same(kept[0], kept[1]), "ranks differ"
        for key in ("grads", "params"):
            a = one[0]["optimizers"][0][key]
            assert relative_distance(a, kept[0]["optimizers"][0][key]) <= 1e-5, (name, key)
        assert_close_logs(log, other, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("micro", ["", "--micro-batch-size 3"])
def test_processes_stay_equal_with_the_gan(tmp_path, data, micro):
    """Decoder and discriminator are bit-equal after ten steps of both."""
    flags = f"{data} --global-batch-size 8 --steps 10 --starts 0 0 0 --workers 0 --log-every 1"
    flags += f" --eval-num 8 {micro}"
    kept, log = records_of_ranks(tmp_path / "two", 2, "train_decoder.py", flags)
    assert kept[0]["wrapped"] == ["Decoder", "Discriminator"]
    assert len(kept[0]["optimizers"]) == 2
    assert same(kept[0], kept[1])
    assert all(line["gan_weight"] > 0 and line["d_loss"] > 0 for line in log)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize(
    "script, flags, graphs",
    [
        ("train_decoder.py", "--disc-weight 0 --noise-tau 0", 1),
        ("train_diffusion.py", "--backbone 16,3,2 --wide-head 24,1,2", 2),
    ],
)
def test_compiled_blocks_under_ddp_and_autocast(tmp_path, data, script, flags, graphs):
    """Two processes, bfloat16, activation checkpointing: one compilation per block shape."""
    flags += f" {data} --global-batch-size 8 --steps 3 --log-every 1 --workers 0"
    flags += " --precision bf16 --checkpoint-activations --micro-batch-size 2"
    logs = []
    files = []
    for name, extra in (("plain", ""), ("compiled", "--compile")):
        kept, log = records_of_ranks(tmp_path / name, 2, script, f"{flags} {extra}")
        assert same(kept[0]["optimizers"], kept[1]["optimizers"])
        assert kept[0]["graphs"] == (graphs if extra else 0)
        logs.append(log)
        files.append(load(tmp_path / name / "run/checkpoint.pt"))
    assert_close_logs(*logs, 0.01, ("l1", "loss"))
    for key in ("ema", "model"):
        assert files[0][key].keys() == files[1][key].keys()


@pytest.mark.slow
def test_four_processes_end_as_one(tmp_path, data):
    """Both stages. The ranks have unequal shares of the 40 images of the latent statistics and of
    the 19 images to evaluate.
    """
    save_images(tmp_path / "photos_val", 19, size=(32, 32), seed=1)
    train = f"{data} --global-batch-size 16 --workers 0 --steps 6 --micro-batch-size 3"
    commands = [
        f"train_decoder.py {train} --val-data {tmp_path}/photos_val --disc-weight 0 "
        "--log-every 6 --eval-every 6 --out decoder",
        f"train_diffusion.py {train} {SMALL_MODEL} --decoder decoder/checkpoint.pt "
        "--log-every 1 --save-every 4 --out diffusion",
    ]
    results = []
    for processes in (1, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        for command in commands:
            launch(*command.split(" ", 1), processes, folder)
        result = {name: load(folder / name / "checkpoint.pt") for name in ("decoder", "diffusion")}
        results.append(result | {"log": log_of(folder / "decoder") + log_of(folder / "diffusion")})
    one, four = results
    for name in ("mean", "var"):
        assert torch.allclose(one["decoder"][name], four["decoder"][name], rtol=1e-6)
    for name in ("decoder", "diffusion"):
        a, b = [list(result[name]["ema"].values()) for result in results]
        assert relative_distance(a, b) < 1e-3, name
    assert_close_logs(one["log"], four["log"], rel=1e-3)


@pytest.mark.slow
def test_two_nodes_on_loopback(tmp_path, data):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    rendezvous = "--nnodes=2 --nproc_per_node=1 --rdzv-id=x --rdzv-backend=c10d "
    rendezvous += f"--rdzv-endpoint=127.0.0.1:{port} --local-addr=127.0.0.1"
    flags = f"{data} --out {tmp_path}/run {TINY['train_diffusion.py']}"
    nodes = [begin("train_diffusion.py", flags, torchrun=rendezvous.split()) for _ in range(2)]
    # A launcher can wait 300 s for another one that left before it was asked.
    said = [node.communicate(timeout=400) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("cpu x 2" in out for out, _ in said) == 1
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 4


# ---------------------------------------------------------------------------------------------
# Sampling and scoring


@pytest.mark.slow
def test_two_processes_sample_as_one(trained, tmp_path):
    """7 samples in four batches, the last one short, on one, two and three ranks."""
    images = []
    for processes in (1, 2, 3):
        flags = f"--num 7 --steps 2 --batch-size 2 --out {processes}"
        launch("sample.py", flags, processes, tmp_path)
        images.append(np.load(f"{processes}.npz")["arr_0"])
    assert images[0].shape == (7, 32, 32, 3)
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


@pytest.mark.slow
def test_two_processes_score_as_one(inception_file, tmp_path):
    """Batches, not images, go to the processes in turn, so all numbers are the same.

    13 images, 4 at a time; 3 images, which leave the second process without any; and 67 against
    2,000 toys.
    """
    for name, n in (("a", 13), ("b", 3), ("c", 67)):
        save_images(tmp_path / name, n, size=(32, 32), seed=n)
    weights = f"--weights {inception_file}"
    results = []
    for processes in (1, 2):
        launch("fid.py", f"a {weights} --save a.npz --batch-size 4", processes, tmp_path)
        saved = dict(np.load(tmp_path / "a.npz"))
        lines = []
        for command in (f"a b --metrics is,pr --batch-size 4 {weights}", "c toy"):
            lines.append(launch("fid.py", command, processes, tmp_path).splitlines()[-1])
        results.append((saved, lines))
    (saved, lines), (other, other_lines) = results
    assert saved.keys() == other.keys()
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.array_equal(saved[name], other[name]), name
    assert lines == other_lines
    assert "(67 samples," in lines[1]


NO_GLOO_LEFT = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import fid
fid.rae.run_script(fid.main)
threads = [Path(f"/proc/self/task/{i}/comm").read_text() for i in os.listdir("/proc/self/task")]
sys.exit(any("gloo" in name for name in threads))
"""


@pytest.mark.slow
def test_no_thread_of_the_group_is_left(tmp_path):
    """A thread left over aborts the process now and then, when Python ends before it."""
    save_images(tmp_path / "c", 7, size=(32, 32))
    (tmp_path / "scored.py").write_text(NO_GLOO_LEFT)
    root = R.TOY.parent
    assert "(7 samples," in launch(tmp_path / "scored.py", f"{root} c toy", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_decoder.py", "train_diffusion.py", "fid.py"])
def test_an_error_in_one_process_ends_both(tmp_path, data, script):
    """An image that only one of them reads breaks. The other does not wait for it.

    In stage 1 it breaks after the latent statistics, which read all images.
    """
    photos = tmp_path / "photos"
    if script == "fid.py":
        flags = f"{photos} toy --batch-size 3"
        broken = "9.png"  # the last one
    else:
        flags = f"{data} --steps 200 --global-batch-size 4 --workers 1 --save-every 1"
        flags += f" --out {tmp_path}/run {SMALL_MODEL if 'diffusion' in script else '--eval-num 2'}"
        broken = "7.png"
    (tmp_path / "text").write_text("not an image")
    if script != "train_decoder.py":
        shutil.copy(tmp_path / "text", photos / broken)
    process = begin(script, flags, 2)
    if script == "train_decoder.py":
        while not (tmp_path / "run/checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.1)
        shutil.copy(tmp_path / "text", photos / broken)
    began = time.time()
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert time.time() - began < 60
    assert re.search(rf"^error: .*/{broken}", said, re.M), said
