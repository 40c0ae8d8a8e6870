"""extras/reconstruct.py: SSIM, the printed numbers, the .npz, and two processes against one."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from reconstruct import ssim

import rae
from tests.conftest import gap, launch
from toy.world import toy_images

RECONSTRUCT = "extras/reconstruct.py"


def test_ssim_against_its_definition():
    rng = np.random.default_rng(0)
    a = rng.random((14, 13))
    b = np.clip(a + 0.1 * rng.normal(size=a.shape), 0, 1)
    g = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    values = []
    for y in range(4):
        for x in range(3):
            p = a[y : y + 11, x : x + 11]
            q = b[y : y + 11, x : x + 11]
            mp = (w * p).sum()
            mq = (w * q).sum()
            vp = (w * (p - mp) ** 2).sum()
            vq = (w * (q - mq) ** 2).sum()
            c = (w * (p - mp) * (q - mq)).sum()
            luminance = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
            values.append(luminance * (2 * c + 9e-4) / (vp + vq + 9e-4))
    a = torch.tensor(a, dtype=torch.float32).expand(2, 3, -1, -1)
    b = torch.tensor(b, dtype=torch.float32).expand(2, 3, -1, -1)
    assert gap(ssim(a, b), torch.full((2,), float(np.mean(values)))) < 1e-5
    assert gap(ssim(a, a), torch.ones(2)) < 1e-6


@pytest.fixture
def photos(tmp_path):
    """A folder of toy images of several sizes, so that they are resized and cropped."""
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = [(40, 52), (64, 64), (33, 32), (70, 90), (32, 32), (48, 40), (50, 50)]
    images, _ = toy_images(len(sizes), seed=5, size=64)
    for i, (image, size) in enumerate(zip(images.transpose(0, 2, 3, 1), sizes)):
        Image.fromarray(image).resize(size).save(folder / f"{i}.png")
    return folder


def printed(output, name):
    return float(re.search(rf"{name} (\S+)", output)[1])


def test_a_folder(run, photos):
    output = run(RECONSTRUCT, f"--data {photos} --batch-size 3 --out deep/rec", tiny=False)
    autoencoder = rae.load_rae("toy")
    data = rae.ImageFolder(photos, 32)
    images = torch.stack([torch.from_numpy(data[i]) for i in range(7)]) / 255  # (7, 3, 32, 32)
    decoded = autoencoder.decode(autoencoder.encode(images)).clamp(0, 1)
    saved = np.load("deep/rec.npz")["arr_0"]
    assert saved.dtype == np.uint8
    assert saved.shape == (7, 32, 32, 3)
    saved = torch.from_numpy(saved).permute(0, 3, 1, 2) / 255
    assert gap(saved, decoded) < 0.51 / 255  # rounded to 8 bits

    mse = (saved - images).double().square().mean((1, 2, 3))
    assert printed(output, "PSNR") == pytest.approx((-10 * mse.log10()).mean().item(), abs=1e-3)
    assert printed(output, "SSIM") == pytest.approx(ssim(saved, images).mean().item(), abs=1e-4)
    assert "(7 images, toy, sigma 0)" in output

    # fid.py reads it, with the folder as the reference.
    flags = "--crop 32 --features encoder:toy --device cpu"
    assert "(7 samples," in run("fid.py", f"deep/rec.npz {photos} {flags}")
    noisy = run(RECONSTRUCT, f"--data {photos} --sigma 0.8 --out noisy", tiny=False)
    assert printed(noisy, "PSNR") < printed(output, "PSNR") - 1
    again = run(RECONSTRUCT, f"--data {photos} --sigma 0.8 --out again", tiny=False)
    assert printed(again, "PSNR") == printed(noisy, "PSNR")
    other = run(RECONSTRUCT, f"--data {photos} --sigma 0.8 --seed 1 --out other", tiny=False)
    assert printed(other, "PSNR") != printed(noisy, "PSNR")


def test_bare_weights_need_encoder_and_statistics(run, photos):
    file = rae.load(rae.find_file("toy"))
    weights = {name: file[name] for name in ("ema", "num_heads", "encoder_image_size")}
    torch.save(weights, "weights.pt")
    torch.save({"mean": file["mean"], "var": file["var"]}, "stats.pt")
    flags = f"--data {photos} --decoder weights.pt --out bare"
    with pytest.raises(SystemExit, match="pass --encoder and --stats"):
        run(RECONSTRUCT, flags, tiny=False)
    run(RECONSTRUCT, f"{flags} --encoder toy --stats stats.pt", tiny=False)
    run(RECONSTRUCT, f"--data {photos} --out toy", tiny=False)
    assert (np.load("bare.npz")["arr_0"] == np.load("toy.npz")["arr_0"]).all()


@pytest.mark.slow
def test_two_processes_equal_one(photos, tmp_path):
    outputs = []
    for processes in (1, 2):
        flags = f"--data {photos} --batch-size 2 --sigma 0.5 --device cpu --out {processes}"
        outputs.append(launch(RECONSTRUCT, flags, processes, tmp_path))
    assert "cpu x 2" in outputs[1]
    for name in ("PSNR", "SSIM"):
        assert printed(outputs[0], name) == printed(outputs[1], name)
    one, two = [np.load(tmp_path / f"{processes}.npz")["arr_0"] for processes in (1, 2)]
    assert one.shape == (7, 32, 32, 3)
    assert (one == two).all()
