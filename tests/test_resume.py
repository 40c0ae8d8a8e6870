"""Rerunning a command: resume, determinism, kills, other runs refused, the log."""

import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import rae as R
from rae import UsageError
from tests.conftest import (
    SMALL_MODEL,
    TRAINING,
    assert_same_run,
    begin,
    files_of,
    launch,
    load,
    pictures_of,
    same,
    save_images,
)

# ---------------------------------------------------------------------------------------------
# The same run


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

    checkpoint = load("a/checkpoint.pt")
    assert not same(checkpoint["model"], checkpoint["ema"])
    run(script, "--out c --seed 1")
    assert not same(load("a/checkpoint.pt")["model"], load("c/checkpoint.pt")["model"])


def test_a_moved_data_folder_is_the_same_run(run, photos, snapshots):
    """And so is another spelling of its path."""
    run("train_diffusion.py", "--data photos --out a")
    os.rename("photos", "moved")
    assert "resuming a.2" in run("train_diffusion.py", "--data ./moved/ --out a.2")
    assert_same_run("a", "a.2")


def test_stage_1_keeps_its_micro_batches(run):
    """Without the flag, they are all of a process's batch. The GAN's weight depends on them."""
    run("train_decoder.py", "--out a")
    size = load("a/checkpoint.pt")["settings"]["micro_batch_size"]
    assert "resuming" in run("train_decoder.py", f"--out a --micro-batch-size {size}")
    with pytest.raises(SystemExit, match=f"micro_batch_size {size}, not {size // 2};"):
        run("train_decoder.py", f"--out a --micro-batch-size {size // 2}")


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
    os.remove("enc.pt")
    run("extras/pretrain_encoder.py", "--seed 1 --out enc.pt")
    if script == "train_diffusion.py":
        assert_refused(command, "dec/checkpoint.pt was trained with another encoder")
        shutil.rmtree("dec")
        run("train_decoder.py", "--encoder enc.pt --out dec")
    assert_refused(command, r"latents \w{16}, not \w{16}")


def test_a_run_with_other_settings_is_named():
    saved = {"seed": 0, "old": 3}
    R.check_same_run("out", saved, dict(saved))
    for changed, message in (
        ({"seed": 1, "old": 3}, "seed 0, not 1; .*--out"),
        ({"seed": 0, "old": 3, "new": 4}, "new None, not 4"),
        ({"seed": 0}, "old 3, not None"),
    ):
        with pytest.raises(UsageError, match=f"out holds a run with {message}"):
            R.check_same_run("out", saved, changed)


def stepped_adamw():
    """A layer and its AdamW after one step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.5, 0.9), fused=True)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(3)).sum().backward()
    optimizer.step()


def test_the_optimizer_resumes_exactly():
    """Its moments come from the file, its settings from the code."""
    model, optimizer = stepped_adamw()
    other, resumed = stepped_adamw()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(lr=9.0, betas=(0.0, 0.0), weight_decay=5.0)
    for moments in resumed.state.values():  # as if it had not stepped
        moments["exp_avg"].zero_()
        moments["exp_avg_sq"].zero_()
        moments["step"].zero_()
    R.load_optimizer(resumed, saved)
    step(model, optimizer)
    step(other, resumed)
    assert same(model.state_dict(), other.state_dict())


def test_damaged_moments_cannot_crash_the_fused_optimizer():
    model, optimizer = stepped_adamw()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(()).expand(2, 3)  # one number, stride 0
    R.load_optimizer(optimizer, saved)
    step(model, optimizer)
    saved["state"][0]["exp_avg_sq"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match="7"):
        R.load_optimizer(optimizer, saved)


def test_sampling_resumes(trained, monkeypatch):
    """Stopped in the fourth of seven batches. The first three are not drawn again."""
    run = trained
    flags = "--num 20 --batch-size 3 --steps 2"
    run("sample.py", f"{flags} --out whole", tiny=False)

    decode = R.RAE.decode
    drawn = []

    def stop_in_fourth(self, z):
        drawn.append(len(z))
        if len(drawn) == 4:
            raise UsageError("stopped")
        return decode(self, z)

    monkeypatch.setattr(R.RAE, "decode", stop_in_fourth)
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


def test_samples_of_two_checkpoints_do_not_mix(trained):
    """The same path may hold a retrained model."""
    trained("sample.py", "--out s")
    before = files_of("s")
    shutil.rmtree("out/diffusion")
    trained("train_diffusion.py", "--seed 1")
    with pytest.raises(SystemExit, match="^error: s "):
        trained("sample.py", "--out s")
    assert files_of("s") == before


@pytest.mark.slow
def test_killed_sampling_resumes_exactly(trained, tmp_path):
    """kill -9, three times."""
    flags = "--num 60 --batch-size 3 --steps 20 --device cpu"
    launch("sample.py", f"{flags} --out whole", cwd=tmp_path)
    folder = tmp_path / "killed"
    for kill in range(3):
        process = begin("sample.py", f"{flags} --out killed", cwd=tmp_path)
        while len(list(folder.glob("*.png"))) < 15 * (kill + 1):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert 45 <= len(list(folder.glob("*.png"))) < 60
    launch("sample.py", f"{flags} --out killed", cwd=tmp_path)
    assert open("killed.npz", "rb").read() == open("whole.npz", "rb").read()


# ---------------------------------------------------------------------------------------------
# Kills


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    R.atomic_save({"step": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        R.atomic_save({"step": 2, "broken": lambda: None}, path)  # the file has been started
    assert R.load(path) == {"step": 1}
    R.atomic_save({"step": 2}, path)
    assert R.load(path) == {"step": 2}
    assert [f.name for f in tmp_path.iterdir()] == ["x.pt"], "no temporary file is left"


def kill_all(folder):
    """kill -9 launcher, ranks and workers: all that name this folder. (torchrun starts ranks in
    sessions of their own.)
    """
    alive = True
    while alive:
        alive = False
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if os.fsencode(folder) in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
                    alive = True
        time.sleep(0.05)


# Ten kills, two of them within a save: (script, processes, moments).
KILLS = [
    ("train_diffusion.py", 1, ("any", "save", "any", "any")),
    ("train_diffusion.py", 2, ("any", "any")),
    ("train_decoder.py", 1, ("save", "any")),
    ("train_decoder.py", 2, ("any", "any")),
]


@pytest.mark.slow
@pytest.mark.parametrize("script, processes, moments", KILLS)
def test_a_killed_run_resumes_exactly(tmp_path, script, processes, moments):
    """kill -9 at a random moment after a save, or within one. --save-every is a multiple of
    --log-every, so the logs are equal too; pictures are due at other steps.
    """
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags = "--sample-every 5"
    if script == "train_decoder.py":
        flags = "--starts 0 0.2 0.5 --eval-every 5 --eval-num 8"
    flags += f" --data {tmp_path}/photos --steps 30 --global-batch-size 16 --save-every 4"
    flags += " --log-every 2 --workers 1"
    launch(script, f"{flags} --out {tmp_path}/whole", processes)
    out = tmp_path / "killed"
    path = out / "checkpoint.pt"
    temporary = out / "checkpoint.pt.tmp"
    rng = random.Random(f"{script}{processes}")
    for moment in moments:
        hit = False
        while not hit:
            temporary.unlink(missing_ok=True)
            saved = path.stat().st_mtime_ns if path.exists() else 0
            process = begin(script, f"{flags} --out {out}", processes)
            while not hit:
                assert process.poll() is None, "the run was over before its kill"
                if moment == "save":
                    hit = temporary.exists()
                else:
                    hit = path.exists() and path.stat().st_mtime_ns != saved
            if moment == "any":
                time.sleep(rng.random() * 0.5)
            kill_all(out)
            assert process.wait() != 0, "the run was over before its kill"
            hit = moment == "any" or temporary.exists()  # an interrupted save leaves this file
    launch(script, f"{flags} --out {out}", processes)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_ctrl_c_ends_without_a_traceback(tmp_path):
    """SIGINT reaches the data loading workers too, as Ctrl-C does."""
    save_images(tmp_path / "photos", 40, size=(32, 32))
    flags = f"--data {tmp_path}/photos {SMALL_MODEL} --steps 100 --log-every 1 --workers 1"
    for attempt in range(3):  # Python drops an interrupt that meets a destructor or a callback
        process = begin("train_diffusion.py", f"{flags} --out {tmp_path}/run{attempt}")
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("step 3 "):
                os.killpg(process.pid, signal.SIGINT)
        said += process.stderr.read()
        if process.wait() != 0:
            break
    assert process.returncode == 130
    assert "same command" in said, "how to resume"
    assert 'train_diffusion.py", line' not in said


def test_a_new_log(tmp_path, capsys):
    numbers = {"step": 1, "loss": 0.25, "by_t": [1, 2]}
    with R.open_log(tmp_path, 0) as log:
        R.write_log(log, numbers)
        assert capsys.readouterr().out.rstrip() == "step 1  loss 0.25"
        # A line is on disk as soon as it is written.
        assert json.loads((tmp_path / "log.jsonl").read_text()) == numbers


def test_a_resumed_log_drops_what_will_be_repeated(tmp_path):
    """The checkpoint is of step 3, and the run was killed while it wrote the line of step 5. Lines
    of others stay.
    """
    lines = 'no JSON, caf\u00e9\n{"loss": 1}\n[2]\n\n'
    lines += "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in (1, 2, 3, 3, 4))
    path = tmp_path / "log.jsonl"
    path.write_text(lines + '{"step": 5, "lo', encoding="utf-8")
    with R.open_log(tmp_path, 3) as log:
        R.write_log(log, {"step": 4, "loss": 0.25})
    want = lines.replace('4, "loss": 0.5', '4, "loss": 0.25')
    assert path.read_text(encoding="utf-8") == want
    with open(path, "a") as file:
        file.write('{"step": 5, "loss": 0.5}')  # cut right before the end of its line
    with R.open_log(tmp_path, 9) as log:
        R.write_log(log, {"step": 5, "loss": 0.75})
    assert path.read_text(encoding="utf-8") == want + '{"step": 5, "loss": 0.75}\n'


def test_a_log_without_a_checkpoint_is_kept(tmp_path):
    """It may be another program's."""
    (tmp_path / "log.jsonl").write_text('{"step": 7}\n')
    with R.open_log(tmp_path, 0) as log:
        R.write_log(log, {"step": 1})
    assert (tmp_path / "log.jsonl.old").read_text() == '{"step": 7}\n'
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
