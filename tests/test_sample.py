"""sample.py: what the images depend on, labels and guidance, checkpoints of others, the files."""

import json
import multiprocessing
import os
import resource

import numpy as np
import pytest
import torch
from PIL import Image

import dit_dh
from fid import psnr
from sample import claim_folder, save_grid, to_uint8
from tests.conftest import begin, load, pictures_of


def test_uint8_rounds():
    x = torch.tensor([-1, 0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 2])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


def test_psnr():
    a = torch.zeros(3, 3, 4, 4)
    error = torch.tensor([0.1, 1.0, 0.0]).view(3, 1, 1, 1)
    assert torch.allclose(psnr(a + error, a), torch.tensor([20.0, 0.0, 100.0]), atol=1e-4)


def test_grid(tmp_path):
    """Seven images of 16 px in three columns: white borders, enlarged by 4, two blank places."""
    images = to_uint8(torch.rand(7, 3, 16, 16))
    save_grid(images, tmp_path / "x.png", columns=3)
    grid = Image.open(tmp_path / "x.png")
    assert grid.size == (3 * 18 * 4, 3 * 18 * 4)
    pixels = np.asarray(grid)[::4, ::4]  # (54, 54, 3)
    assert np.array_equal(np.asarray(grid), pixels.repeat(4, 0).repeat(4, 1))
    for i in range(7):
        top = 18 * (i // 3)
        left = 18 * (i % 3)
        place = pixels[top : top + 18, left : left + 18]
        assert np.array_equal(place[1:-1, 1:-1].transpose(2, 0, 1), images[i])
        assert (place[0] == 255).all() and (place[:, -1] == 255).all()
    assert (pixels[36:, 18:] == 255).all()


def test_samples_do_not_depend_on_the_batch(trained, monkeypatch):
    labels = []
    sample = dit_dh.sample

    def record(model, noise, y, *args, **kw):
        labels.extend(y.tolist())
        assert kw["interval"] == [0.1, 0.9]
        return sample(model, noise, y, *args, **kw)

    monkeypatch.setattr(dit_dh, "sample", record)
    trained("sample.py", "--out a --batch-size 20 --interval 0.1 0.9")
    trained("sample.py", "--out b --batch-size 3 --interval 0.9 0.1")
    assert labels == [*range(10)] * 4
    a, b = [np.load(f"{name}.npz")["arr_0"].astype(int) for name in "ab"]
    assert a.shape == (20, 32, 32, 3)
    assert abs(a - b).max() <= 1  # rounding of matrix products may depend on the batch


def test_an_unconditional_model_takes_no_classes(run):
    run("train_diffusion.py", "--label-drop 1 --alpha 0")
    assert load("out/diffusion/checkpoint.pt")["settings"]["alpha"] == 1, "the formula's"
    run("sample.py", "--out a --cfg-scale 1")
    run("sample.py", "--out b --cfg-scale 3")
    assert pictures_of("a") == pictures_of("b"), "without labels there is no guidance"
    with pytest.raises(SystemExit, match="--classes null"):
        run("sample.py", "--out c --classes 3")


def test_guidance_needs_a_model_that_saw_the_label(run):
    run("train_diffusion.py", "--label-drop 0 --out no_null")
    run("train_diffusion.py", "--label-drop 1 --out null_only")

    ckpt = "--ckpt no_null/checkpoint.pt"
    with pytest.raises(SystemExit, match="pass --cfg-scale 1"):
        run("sample.py", ckpt)
    guide = "--guidance-scale 2 --guidance-model null_only/checkpoint.pt"
    with pytest.raises(SystemExit, match="null_only/checkpoint.pt was trained without classes"):
        run("sample.py", f"{ckpt} {guide}")
    assert not os.path.exists("out/samples")
    run("sample.py", f"{ckpt} --cfg-scale 1")


def test_checkpoints_of_other_trainers(trained):
    """With a config of their own, or with the prefixes of DDP and torch.compile."""
    trained("sample.py", "--out want")
    file = load("out/diffusion/checkpoint.pt")
    model = dit_dh.load_dit("out/diffusion/checkpoint.pt")
    inputs = (torch.randn(2, 16, 128), torch.rand(2), torch.tensor([1, 2]))
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        state = {prefix + name: w for name, w in file["ema"].items()}
        for content in (state, {"ema": state, "config": {"model": "XL"}}):
            torch.save(content, "theirs.pt")
            assert torch.equal(dit_dh.load_dit("theirs.pt")(*inputs), model(*inputs))
    trained("sample.py", "--ckpt theirs.pt --decoder toy --alpha 4 --out got")
    assert pictures_of("got") == pictures_of("want")

    for content in ({"ema": None, "model": state}, {"state_dict": state}, {"ema": [1]}):
        torch.save(content, "theirs.pt")
        with pytest.raises(SystemExit, match="theirs.pt: not a diffusion model"):
            trained("sample.py", "--ckpt theirs.pt")


@pytest.mark.slow
def test_two_copies_of_a_command_sample_the_same(trained, tmp_path):
    flags = "--num 40 --steps 2 --batch-size 2 --device cpu --out"
    for process in [begin("sample.py", f"{flags} s", cwd=tmp_path) for _ in range(2)]:
        assert process.communicate()[1] == ""
    trained("sample.py", f"{flags} want", tiny=False)
    assert pictures_of("s") == pictures_of("want")
    assert len(np.load("s.npz")["arr_0"]) == 40


def test_one_of_many_settings_claims_a_folder(tmp_path):
    """Eight processes at once. The losers leave nothing behind."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)

    def claim(seed):
        barrier.wait()
        claim_folder(tmp_path / "s", {"seed": seed})

    processes = [context.Process(target=claim, args=(seed,)) for seed in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    winners = [seed for seed, process in enumerate(processes) if process.exitcode == 0]
    assert [json.loads((tmp_path / "s/settings.json").read_text())["seed"]] == winners
    assert os.listdir(tmp_path) == ["s"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    claim_folder(tmp_path / "link", {"seed": 8})
    assert (tmp_path / "empty/settings.json").exists()


def test_many_samples_need_few_open_files(trained):
    """50,000 images are packed into one file, and systems allow 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        trained("sample.py", "--num 120 --steps 1 --cfg-scale 1", tiny=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(np.load("out/samples.npz")["arr_0"]) == 120


def test_files_are_not_replaced_while_open(run, monkeypatch):
    """Windows would refuse."""
    replace = os.replace

    def replace_as_on_windows(source, target):
        if os.path.exists(target):
            maps = open("/proc/self/maps").read()
            assert os.path.realpath(target) not in maps, f"{target} is mapped"
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
