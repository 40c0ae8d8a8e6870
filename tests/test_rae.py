"""rae.py: images, the toy world, encoder, noise, statistics, files, and what the scripts share."""

import argparse
import copy
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, gap
from PIL import Image

import rae as R
from dit_dh import DiTDH, load_released
from toy import world


def save_images(folder, n, size=(40, 36), mode="RGB", suffix=".png", seed=0):
    """Write n images of random pixels, 0.png, 1.png, ..., of `size` (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    width, height = size
    for i in range(n):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}{suffix}")


# ---------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (70, 64), (64, 64), (33, 500), (20, 30)])
def test_center_crop_is_adm(size):
    """ADM's crop, written out a second time on its own."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
    want = image
    while min(want.size) >= 64:
        want = want.resize(tuple(x // 2 for x in want.size), resample=Image.BOX)
    scale = 32 / min(want.size)
    want = want.resize(tuple(round(x * scale) for x in want.size), resample=Image.BICUBIC)
    want = np.array(want)
    y = (want.shape[0] - 32) // 2
    x = (want.shape[1] - 32) // 2
    assert np.array_equal(np.asarray(R.center_crop(image, 32)), want[y : y + 32, x : x + 32])


def test_folder_reads_every_kind_of_image(tmp_path):
    kinds = [
        ("RGB", ".png"),
        ("L", ".JPEG"),
        ("P", ".gif"),
        ("RGBA", ".PNG"),
        ("CMYK", ".jpg"),
        ("1", ".bmp"),
    ]
    for mode, suffix in kinds:
        save_images(tmp_path / "deep" / mode, 1, mode=mode, suffix=suffix)
    (tmp_path / "deep" / "notes.txt").write_text("not an image")
    data = R.ImageFolder(tmp_path, 32)
    assert len(data) == 6
    assert len(data.classes) == 6
    assert data.classes == sorted(data.classes)
    for i in range(6):
        image = data.load(i)
        assert image.shape == (3, 32, 32)
        assert image.dtype == np.uint8
        assert np.array_equal(data.load(i, flip=True), image[:, :, ::-1])


def test_flat_folder_is_one_class(tmp_path):
    save_images(tmp_path, 3)
    data = R.ImageFolder(tmp_path, 32)
    assert data.classes == ["."]
    assert data.labels.tolist() == [0, 0, 0]


def test_links_to_folders_are_followed(tmp_path):
    save_images(tmp_path / "elsewhere", 2)
    save_images(tmp_path / "photos" / "cat", 3)
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "ant")
    data = R.ImageFolder(tmp_path / "photos", 16)
    assert data.classes == ["ant", "cat"]
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.names == ["ant/0.png", "ant/1.png", "cat/0.png", "cat/1.png", "cat/2.png"]
    assert data[1].shape == (3, 16, 16)

    # Twice the same folder is no loop; a link to a folder above is, also by way of another.
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "bee")
    assert len(R.ImageFolder(tmp_path / "photos", 16)) == 7
    os.symlink(tmp_path / "photos", tmp_path / "elsewhere" / "up")
    with pytest.raises(ValueError, match="ant/up: a link to a folder that it lies in"):
        R.ImageFolder(tmp_path / "photos", 16)


def test_what_is_no_class_is_skipped_or_refused(tmp_path):
    for name in ("cat", "dog/brown", ".cache", "__MACOSX/cat"):
        save_images(tmp_path / name, 2)
    (tmp_path / "cat" / "._0.png").write_text("what a Mac adds to zip files")
    (tmp_path / "cat" / "notes.txt").write_text("")
    data = R.ImageFolder(tmp_path, 16)
    assert data.classes == ["cat", "dog/brown"]
    assert len(data) == 4

    # An image beside class folders would be a class of its own, which nobody means.
    save_images(tmp_path / "dog", 1)
    with pytest.raises(ValueError, match="images in the folder dog beside the class .* dog/brown"):
        R.ImageFolder(tmp_path, 16)
    os.remove(tmp_path / "dog" / "0.png")
    save_images(tmp_path, 1)
    with pytest.raises(ValueError, match=r"images in the folder \. beside the class folder cat"):
        R.ImageFolder(tmp_path, 16)


OPENING = """
import sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/extras"]
import bench
import rae

imports = bench.held_at_most()
began = time.time()
data = rae.ImageFolder("photos", 16)
data.fingerprint()
print(len(data), len(data.classes), time.time() - began, bench.held_at_most() - imports)
"""


@pytest.mark.slow
def test_a_large_folder_opens_quickly(tmp_path):
    """200,000 files in 1,000 class folders, half of them links."""
    (tmp_path / "photos").mkdir()
    for i in range(1000):
        folder = tmp_path / ("photos" if i % 2 else "elsewhere") / f"n{i:08d}"
        folder.mkdir(parents=True)
        for j in range(200):
            (folder / f"n{i:08d}_{j}.JPEG").touch()
        if i % 2 == 0:
            os.symlink(folder, tmp_path / "photos" / folder.name)
    command = [sys.executable, "-c", OPENING, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images, classes, seconds, held = map(float, done.stdout.split())
    print(f"200,000 files open in {seconds:.2f} s and {held / 1e6:.0f} MB")
    assert (images, classes) == (200000, 1000)
    assert seconds < 4
    assert held < 60e6


def test_images_of_every_depth_turn_and_transparency(tmp_path):
    """16 bits keep their range, EXIF turns, what is transparent is white; 32 bits are refused."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = np.asarray(R.open_image(tmp_path / "deep.png"))
    assert np.abs(pixels[..., 0] - ramp / 257).max() < 1

    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to look at it
    image = Image.new("RGB", (10, 4))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "turned.png", exif=exif)
    turned = R.open_image(tmp_path / "turned.png")
    assert turned.size == (4, 10)
    assert turned.getpixel((3, 0)) == (255, 255, 255)

    half = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half.putpixel((1, 1), (0, 0, 0, 255))
    half.save(tmp_path / "clear.png")
    clear = R.open_image(tmp_path / "clear.png")
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert clear.getpixel((1, 1)) == (0, 0, 0)

    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif: not readable.*32 bits"):
        R.open_image(tmp_path / "float.tif")


def test_thin_images_stay_small():
    """Of a line of 1 x 65,000 pixels the middle is cropped, and then resized."""
    line = Image.new("RGB", (1, 65000))
    line.putpixel((0, 32500), (255, 255, 255))
    for crop in (R.center_crop(line, 32), R.random_crop(line, 32, 40, np.random.default_rng(0))):
        assert crop.size == (32, 32)
    assert R.shorten(line).size == (1, 16)
    assert np.asarray(R.shorten(line)).max() == 255


READING_AN_IMAGE = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/extras"]
import bench
import rae

imports = bench.held_at_most()
rae.center_crop(rae.open_image(sys.argv[2]), 256)
print(bench.held_at_most() - imports)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_the_largest_images_take_less_than_a_gigabyte(tmp_path, mode):
    path = tmp_path / "large.png"
    Image.new(mode, (2**13, R.MAX_PIXELS // 2**13)).save(path)
    command = [sys.executable, "-c", READING_AN_IMAGE, str(ROOT), path]
    assert 1e8 < float(subprocess.check_output(command)) < 1e9
    Image.new("1", (2**13 + 1, R.MAX_PIXELS // 2**13)).save(path)
    with pytest.raises(ValueError, match="8193 x 8192 pixels; reduce it first"):
        R.open_image(path)


def test_a_folder_says_what_it_skips(tmp_path, capsys):
    save_images(tmp_path / "a", 2)
    (tmp_path / "a" / "notes.txt").write_text("")
    assert len(R.ImageFolder(tmp_path, 32)) == 2
    assert "skipped 1 non-images, as 'notes.txt'" in capsys.readouterr().err


def test_what_is_not_finite_is_neither_saved_nor_drawn(tmp_path):
    R.save_file({"ema": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt: ema: w is not finite"):
        R.save_file({"ema": {"w": torch.tensor([1, torch.nan])}}, tmp_path / "a.pt")
    assert R.read_file(tmp_path / "a.pt")["ema"]["w"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="pictures are not finite"):
        R.save_sheet(torch.full((1, 3, 8, 8), torch.nan), tmp_path / "a.png", 1)
    assert not (tmp_path / "a.png").exists()


def test_broken_images_are_named(tmp_path):
    save_images(tmp_path, 2, size=(200, 200))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_text("text")
    data = R.ImageFolder(tmp_path, 32)
    data.load(0)
    for i in (1, 2):
        with pytest.raises(ValueError, match=f"{i}.png: not readable"):
            data.load(i)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        R.ImageFolder(tmp_path / "empty", 32)
    with pytest.raises(ValueError, match="no such folder"):
        R.ImageFolder(tmp_path / "none", 32)


def test_random_crops_differ_and_stay_inside(tmp_path):
    save_images(tmp_path, 1, size=(64, 48))
    data = R.ImageFolder(tmp_path, 32, short_side=40)
    crops = [data.load(0, np.random.default_rng(i)) for i in range(8)]
    assert len({crop.tobytes() for crop in crops}) > 4
    assert {crop.shape for crop in crops} == {(3, 32, 32)}


def test_random_crops_are_cut_from_one_bicubic_step(tmp_path):
    """As in the released training: no halving first, whatever the size."""
    save_images(tmp_path, 1, size=(100, 64))
    image = R.open_image(tmp_path / "0.png")
    crop = np.asarray(R.random_crop(image, 16, 16, np.random.default_rng(0)))
    resized = np.asarray(image.resize((25, 16), Image.BICUBIC))
    assert any(np.array_equal(crop, resized[:, left : left + 16]) for left in range(10))


def test_a_folder_is_known_by_its_names(tmp_path):
    save_images(tmp_path / "photos" / "cats", 2)
    save_images(tmp_path / "photos" / "dogs", 2)
    first = R.ImageFolder(tmp_path / "photos", 32).fingerprint()
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert R.ImageFolder(tmp_path / "moved", 32).fingerprint() == first

    (tmp_path / "moved" / "cats").rename(tmp_path / "moved" / "birds")
    renamed = R.ImageFolder(tmp_path / "moved", 32).fingerprint()
    save_images(tmp_path / "moved" / "dogs", 3)
    grown = R.ImageFolder(tmp_path / "moved", 32).fingerprint()
    assert len({first, renamed, grown}) == 3


@pytest.mark.parametrize("folder", ["imagenet_native", "imagenette/val", "cifar10/test"])
def test_real_photographs(folder):
    root = R.TOY.parent.parent / "shared" / "data" / folder
    if not root.is_dir():
        pytest.skip(f"needs the photographs of {folder} beside the repository")
    data = R.ImageFolder(root, 64)
    for i in range(0, len(data), max(1, len(data) // 60)):
        assert data.load(i).shape == (3, 64, 64)


def test_uint8_rounds():
    x = torch.tensor([-1, 0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 2])
    assert R.to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


# ---------------------------------------------------------------------------------------------
# The toy world


def test_toy_images():
    images, labels = world.toy_images(40, seed=0)
    again, _ = world.toy_images(20, seed=0)
    other, _ = world.toy_images(40, seed=1)
    assert images.shape == (40, 3, 32, 32)
    assert labels[:12].tolist() == [*range(10), 0, 1]
    assert np.array_equal(images[:20], again), "the first images do not depend on their number"
    assert not np.array_equal(images, other)
    assert len({image.tobytes() for image in images}) == 40


@pytest.mark.parametrize("name", world.SHAPES)
def test_toy_shapes_are_their_own_mirror_image(name):
    y, x = np.mgrid[-1.2:1.2:25j, -1.2:1.2:25j]
    d = world.SHAPES[name](x, y)
    assert np.allclose(d, d[:, ::-1], atol=1e-6)
    assert (d < 0).mean() > 0.08
    assert (d > 0).mean() > 0.4
    # About a distance: else edges are not one pixel wide.
    slope = np.hypot(*np.gradient(d, 0.1))
    assert np.median(slope) < 1.1
    assert slope.max() < 1.5


def test_the_toy_world_offers_what_a_folder_does(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "TOY", {"train": (30, 0), "val": (20, 1)})
    save_images(tmp_path, 2)
    folder = R.open_data(str(tmp_path), 32)
    toy = R.open_data("toy", 32)
    for data in (toy, folder):
        assert len(data) == len(data.labels)
        assert data.load(1, None, False).shape == (3, 32, 32)
        assert np.array_equal(data.load(1, flip=True), data.load(1)[:, :, ::-1])
        assert len(data.fingerprint()) == 16
        images = R.read_images(data, [1, 0], "cpu")
        assert images.shape == (2, 3, 32, 32)
        assert np.array_equal(R.to_uint8(images[0]), data.load(1))
    assert len(R.open_data("toy", 32, "val")) == 20
    assert R.open_data("toy", 32, "val").fingerprint() != toy.fingerprint()


# ---------------------------------------------------------------------------------------------
# Encoder and decoder


@pytest.fixture(scope="module")
def toy():
    return R.load_rae("toy")


def test_latents_are_normalised_and_decode(toy):
    images = torch.from_numpy(world.toy_images(500, seed=1)[0]).float() / 255
    with torch.no_grad():
        z = toy.encode(images)
        again = toy.decode(z)
    assert z.shape == (500, 16, 128)
    assert z.mean().abs() < 0.02
    assert 0.95 < z.std() < 1.05
    assert again.shape == (500, 3, toy.image_size, toy.image_size)
    assert R.psnr(again.clamp(0, 1), images).mean() > 24
    assert not any("vit" in name for name in toy.decoder.state_dict())


def test_without_statistics_the_latent_is_the_raw_tokens(toy):
    rae = R.RAE(toy.encoder, toy.decoder).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens = toy.encoder(images)
        assert torch.equal(rae.encode(images), tokens)
        assert torch.equal(rae.decode(tokens), rae.decode_tokens(tokens))
        assert gap(toy.decode(toy.encode(images)), toy.decode_tokens(tokens)) < 1e-4


@pytest.mark.parametrize(
    "dist, mean", [("uniform", 0.4), ("half-normal", 0.8 * (2 / np.pi) ** 0.5)]
)
def test_noise_in_training_only(toy, dist, mean):
    """The bounds are five standard deviations or more of what 2,000 images leave to chance."""
    var = torch.full((128, 4, 4), 9.0)  # not heeded: the noise is of raw tokens
    rae = R.RAE(toy.encoder, toy.decoder, var=var, tau=0.8, noise_dist=dist)
    tokens = torch.ones(2000, 16, 128)
    noise = rae.train().noised(tokens) - tokens
    sigma = noise.std(dim=(1, 2))  # (2000,), each to 2%
    assert abs(sigma.mean() - mean) < 0.06
    assert sigma.std() > 0.2, "every image has a sigma of its own"
    assert (sigma.max() < 0.92) == (dist == "uniform")
    of_tokens = noise.std(dim=2) / sigma[:, None]  # (2000, 16), each to 6%
    assert (of_tokens - 1).abs().max() < 0.4, "all tokens of an image share its sigma"
    normal = noise / sigma[:, None, None]
    assert abs(normal.mean()) < 0.01
    assert abs((normal[0] * normal[1]).mean()) < 0.12, "every image has noise of its own"

    assert torch.equal(rae.eval().noised(tokens), tokens)
    assert torch.equal(R.RAE(toy.encoder, toy.decoder, tau=0.0).train().noised(tokens), tokens)

    # Noise belongs to the image, not to the batch.
    rae.train()
    four = rae.noised(tokens[:4], [R.keyed_generator("cpu", 1, i) for i in range(4)])
    two = rae.noised(tokens[:2], [R.keyed_generator("cpu", 1, i) for i in range(2, 4)])
    assert torch.equal(four[2:], two)
    assert len({image.std().item() for image in four}) == 4
    assert four.std(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("batch_size, num", [(7, 29), (4, 33), (100, 30)])
def test_statistics_equal_numpy(toy, batch_size, num, monkeypatch):
    """33 images in batches of 4 have a last batch of one. Some are read by a worker."""
    monkeypatch.setattr(world, "TOY", {"train": (num, 0)})
    data = world.ToyShapes()
    mean, var = R.latent_statistics(toy.encoder, data, batch_size, "cpu", workers=num % 2)
    assert mean.shape == var.shape == (128, 4, 4)

    # In the same batches: the encoder's rounding depends on their size.
    images = torch.from_numpy(data.images).float() / 255
    parts = []
    for part in images.split(batch_size):
        parts.append(toy.encoder(part))
        parts.append(toy.encoder(part.flip(-1)))
    tokens = torch.cat(parts).double().numpy()  # (2 num, N, C)
    want = tokens.mean(0)
    off = np.abs(mean.flatten(1).T.numpy() - want).max() / np.abs(want).max()
    assert off < 1e-6, "the mean: of both flips? the places in their order?"
    off = np.abs(var.flatten(1).T.numpy() / tokens.var(0) - 1).max()
    assert off < 1e-6, "the variance: divided by the number of views? summed in float64?"


def test_encoder_gradients_reach_the_image_alone(toy):
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    toy.encoder(images).square().mean().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in toy.encoder.parameters())
    assert not toy.encoder(torch.rand(1, 3, 32, 32)).requires_grad


def test_fingerprints(toy):
    rae = R.RAE(toy.encoder, toy.decoder)
    assert rae.fingerprint() == R.RAE(toy.encoder, toy.decoder).fingerprint()
    assert rae.fingerprint() != toy.fingerprint(), "other statistics"
    assert rae.fingerprint() != toy.encoder.fingerprint()
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    assert R.hash_tensors(tensors) == R.hash_tensors({"a": torch.zeros(2), "b": torch.ones(2)})
    assert R.hash_tensors(tensors) != R.hash_tensors(tensors | {"b": torch.zeros(2)})
    assert R.hash_tensors(tensors) != R.hash_tensors({"a": torch.zeros(2), "c": torch.ones(2)})


# ---------------------------------------------------------------------------------------------
# Files


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


READING = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/extras"]
import bench
import sample

imports = bench.held_at_most()
model, trained_with = sample.load_model("big.pt")
print(bench.held_at_most() - imports, trained_with["seed"])
"""


def test_only_what_is_used_of_a_checkpoint_is_read(tmp_path):
    """sample.py wants the EMA weights of a file that holds 400 MB of optimiser besides."""
    model = DiTDH(8, 4, (16, 1, 2), None, num_classes=2)
    optimizer = {"moments": torch.zeros(10**8)}
    file = {"ema": model.state_dict(), "config": model.config, "args": {"seed": 3}}
    torch.save(file | {"optimizer": optimizer}, tmp_path / "big.pt")
    command = [sys.executable, "-c", READING, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, seed = done.stdout.split()
    assert int(held) < 50e6
    assert seed == "3"
    assert R.read_file(tmp_path / "big.pt")["optimizer"]["moments"].shape == (10**8,)

    # A file in torch's old format cannot be mapped, and is read.
    torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert R.read_file(tmp_path / "old.pt")["x"].tolist() == [1, 1]


def test_files_that_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, "evil.pt")
    torch.save({"x": torch.zeros(1000)}, "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("evil.pt", "half.pt", "text.pt", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read, truncated, or refused"):
            R.read_file(name)
    with pytest.raises(ValueError, match="none.pt: no such file"):
        R.read_file("none.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_released("evil.pt")
    assert not os.path.exists("hacked")
    assert torch.equal(R.read_file("good.pt")["x"], torch.zeros(1000))


class Broken:
    """Its pickling fails as a full disk does, with the file begun."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), RuntimeError("write\nfailed")]
)
def test_a_failed_save_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "x.pt"
    R.save_file({"step": 1}, path)
    with pytest.raises(ValueError, match=r"x.pt: cannot be saved \((No space|write\))") as caught:
        R.save_file({"step": 2, "broken": Broken(error)}, path)
    assert "\n" not in str(caught.value)
    assert R.read_file(path) == {"step": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["x.pt"], "the temporary file is gone"
    R.save_file({"step": 2}, path)
    assert R.read_file(path) == {"step": 2}
    assert [f.name for f in tmp_path.iterdir()] == ["x.pt"]


def test_encoder_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="dinov9: no such file, nor one of toy, .*dinov2-b"):
        R.build_encoder("dinov9", 32)
    with pytest.raises(ValueError, match="released:dinov2-b: no such file"):
        R.build_encoder("released:dinov2-b", 32)
    with pytest.raises(ValueError, match="Unknown model"):
        R.build_encoder("timm:no_such_model", 32)
    with pytest.raises(ValueError, match="a plain ViT"):
        R.build_encoder("timm:resnet18", 32, weights="x.pt")
    torch.save({"ema": {}}, tmp_path / "decoder.pt")
    with pytest.raises(ValueError, match="decoder.pt: not an encoder file"):
        R.build_encoder(str(tmp_path / "decoder.pt"), 32)
    with pytest.raises(ValueError, match="encoder input 30 is not a multiple of its patch"):
        R.build_encoder("toy", 30)


def test_encoder_that_cannot_be_fetched(monkeypatch):
    import timm

    def offline(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="the weights of vit_base.*--encoder-weights"):
        R.build_encoder("dinov2-b", 256)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_encoder_from_a_local_file(suffix, tmp_path):
    import timm
    from safetensors.torch import save_file

    path = tmp_path / f"weights{suffix}"
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5)  # its classifier is not needed
    if suffix == ".safetensors":
        save_file(vit.state_dict(), path)
    else:
        torch.save(vit.state_dict(), path)
    encoder = R.build_encoder("timm:vit_tiny_patch16_224", 64, path)
    assert torch.equal(encoder.vit.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
    assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, 16, 192)

    state = vit.state_dict()
    del state["blocks.0.norm1.bias"]
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="Missing key.*blocks.0.norm1.bias"):
        R.build_encoder("timm:vit_tiny_patch16_224", 64, tmp_path / "bad.pt")


def test_decoder_of_other_encoder_weights(tmp_path):
    file = R.read_file(R.released_file("toy"))
    torch.save(file | {"encoder_hash": "0" * 16}, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="made for encoder weights 0000"):
        R.load_rae(tmp_path / "d.pt")
    torch.save(file["ema"], tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="does not name its encoder"):
        R.load_rae(tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="no latent statistics"):
        R.load_rae(tmp_path / "bare.pt", encoder="toy")


def test_a_bare_decoder_with_its_statistics(tmp_path):
    """As released: a state dict alone, whose tokens stand for 16 px each."""
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    torch.save(R.Decoder(192, 2, 8, 768, 1, 12, 64).state_dict(), tmp_path / "bare.pt")
    torch.save({"var": torch.full((192, 2, 2), 4.0)}, tmp_path / "stats.pt")
    rae = R.load_rae(
        tmp_path / "bare.pt",
        encoder="timm:vit_tiny_patch16_224",
        encoder_weights=tmp_path / "vit.pt",
        stats=tmp_path / "stats.pt",
    )
    assert rae.encoder.input_size == 32
    assert rae.image_size == 16  # this decoder draws 8 px for each token
    assert not rae.training
    images = torch.rand(2, 3, 32, 32)
    assert gap(rae.encode(images), rae.encoder(images) / (4 + 1e-5) ** 0.5) < 1e-6
    assert rae.decode(rae.encode(images)).shape == (2, 3, 16, 16)


def test_released_names(monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, file, revision):
        assert re.fullmatch("[0-9a-f]{40}", revision)
        asked.append((repository, file))
        return "x"

    def offline(repository, file, revision):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert R.released_file("a/b.pt") == "a/b.pt"
    assert asked == []
    assert R.released_file("released:mae-b", statistics=True) == "x"
    assert asked == [("nyu-visionx/RAE-collections", "stats/mae/base_p16/ImageNet1k/stat.pt")]
    with pytest.raises(ValueError, match="DiTDH-XL-256"):
        R.released_file("released:nothing")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="cannot be fetched .* pass its path"):
        R.released_file("released:dinov2-b")


# ---------------------------------------------------------------------------------------------
# Processes and random numbers


def test_one_process_without_a_group():
    assert R.rank_and_world_size() == (0, 1)
    x = torch.tensor([1.0, 2.0])
    assert R.all_reduce_mean(x) is x
    assert x.tolist() == [1, 2]


def test_one_process_in_a_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert R.rank_and_world_size() == (0, 1)
        assert R.all_reduce_mean(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    finally:
        dist.destroy_process_group()


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    save_images(tmp_path, 11, size=(48, 40))
    data = R.ImageFolder(tmp_path, 32, short_side=36)
    whole = R.StepBatches(data, 6, 0, flip=True)
    again = R.StepBatches(data, 6, 0, flip=True)
    other = R.StepBatches(data, 6, 1, flip=True)
    halves = [R.StepBatches(data, 6, 0, flip=True, rank=rank, world_size=2) for rank in (0, 1)]
    assert list(halves[1].rows) == [3, 4, 5]
    for step in (5, 0, 3):  # in any order
        images = torch.cat([half[step][0] for half in halves])
        assert images.dtype == torch.uint8
        assert torch.equal(images, whole[step][0])
        assert torch.equal(images, again[step][0])
    assert not torch.equal(whole[0][0], other[0][0])
    with pytest.raises(ValueError, match="--global-batch-size 6: not a multiple of 4 processes"):
        R.StepBatches(data, 6, 0, flip=True, rank=0, world_size=4)


def test_an_epoch_visits_every_image_once(tmp_path):
    save_images(tmp_path, 11)
    data = R.ImageFolder(tmp_path, 32)
    data.labels = np.arange(11)  # each image its own, to see the order
    batches = R.StepBatches(data, 6, 0, flip=False)
    seen = torch.cat([batches[step][1] for step in range(4)]).tolist()
    assert sorted(seen[:11]) == sorted(seen[11:22]) == list(range(11))
    assert seen[:11] != seen[11:22]


def test_flips_are_half_of_the_images(tmp_path):
    save_images(tmp_path, 8)
    data = R.ImageFolder(tmp_path, 32)
    data.labels = np.arange(8)
    batches = R.StepBatches(data, 100, 0, flip=True)
    images, labels = batches[0]
    flipped = 0
    for image, label in zip(images, labels):
        plain = torch.from_numpy(data.load(label).copy())
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
        flipped += torch.equal(image, plain.flip(-1))
    assert 25 < flipped < 75


def test_keyed_generators():
    def numbers(*key):
        return torch.randn(4, generator=R.keyed_generator("cpu", *key)).tolist()

    assert numbers(0, 1, 2) == numbers(0, 1, 2)
    keys = [(0, 1, 2), (0, 2, 1), (0, 1), (0, 1, 0), (1, 0, 0)]
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)

    both = R.keyed_noise([(0, 1), (0, 2)], (3, 2), "cpu")
    assert both.shape == (2, 3, 2)
    assert torch.equal(both[1:], R.keyed_noise([(0, 2)], (3, 2), "cpu"))


# ---------------------------------------------------------------------------------------------
# The average


def test_precision(monkeypatch):
    """auto is bf16 only on a GPU that computes in it; fp32 means no TF32 either."""
    cuda = torch.device("cuda")
    for native, want in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert R.set_precision("auto", cuda) == want
        assert torch.backends.cuda.matmul.allow_tf32 == native
        assert R.set_precision("auto", torch.device("cpu")) == "fp32"
    for name in ("bf16", "tf32", "fp32"):
        assert R.set_precision(name, cuda) == name
        assert torch.backends.cuda.matmul.allow_tf32 == (name != "fp32")
        assert torch.backends.cudnn.allow_tf32 == (name != "fp32")


def test_frozen_matrices_are_cast_once(toy):
    """Under autocast the same numbers, to the bit, from half the bytes."""
    tokens = torch.randn(3, 16, 128)
    decoder = copy.deepcopy(toy.decoder)
    R.cast_matrices(decoder)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(decoder(tokens), toy.decoder(tokens))
    assert decoder.decoder_pred.weight.dtype == torch.bfloat16
    assert decoder.decoder_norm.weight.dtype == torch.float32
    assert decoder.decoder_pos_embed.dtype == torch.float32


def test_batches_are_dealt_in_turn(monkeypatch):
    dealt = {}
    for world_size in (1, 3):
        shares = []
        for rank in range(world_size):
            monkeypatch.setattr(R, "rank_and_world_size", lambda r=rank, w=world_size: (r, w))
            shares.append(R.deal_batches(10, 3))
        dealt[world_size] = shares
    assert dealt[1] == [[range(0, 3), range(3, 6), range(6, 9), range(9, 10)]]
    assert dealt[3] == [[range(0, 3), range(9, 10)], [range(3, 6)], [range(6, 9)]]


def test_ema_warms_up_and_is_no_alias():
    """All parameters of all layers, weights and biases."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    ema = copy.deepcopy(model)
    for p in ema.parameters():
        torch.nn.init.normal_(p)
    model[1].bias.requires_grad_(False)  # is averaged like the others

    def weights(network):
        return torch.cat([p.detach().flatten() for p in network.parameters()])  # a copy

    start = weights(ema)
    target = weights(model)
    R.update_ema(ema, model, 0.999, 0)
    assert gap(weights(ema), 0.1 * start + 0.9 * target) < 1e-6  # d = 1 / 10
    before = weights(ema)
    R.update_ema(ema, model, 0.999, 20)
    assert gap(weights(ema), 0.7 * before + 0.3 * target) < 1e-6  # d = 21 / 30
    assert torch.equal(weights(model), target)

    before = weights(ema)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(weights(ema), before)
    R.update_ema(ema, model, 0.5, 10**6)
    assert gap(weights(ema), 0.5 * before) < 1e-6


# ---------------------------------------------------------------------------------------------
# The folder of a run


def steps_of(out):
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_new_log(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    with R.open_log(out, 0) as log:
        R.write_log(log, {"step": 1, "loss": 0.25, "by_t": [1, 2]})
        assert capsys.readouterr().out == "step 1  loss 0.25\n"
        R.write_log(log, {"step": 2, "loss": 0.125, "by_t": [3, 4]})
    lines = (out / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.25, "by_t": [1, 2]}
    assert steps_of(out) == [1, 2]


def test_a_resumed_log_forgets_what_will_come_again(tmp_path):
    """It goes on at step 3, whose line was written before the save, and was killed as it wrote."""
    lines = "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in (1, 2, 3, 4))
    path = tmp_path / "log.jsonl"
    path.write_text(lines + '{"step": 5, "lo')
    with R.open_log(tmp_path, 3) as log:
        assert steps_of(tmp_path) == [1, 2]
        R.write_log(log, {"step": 3, "loss": 0.25})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n' + (
        '{"step": 3, "loss": 0.25}\n'
    )
    with open(path, "a") as file:
        file.write('{"step": 4, "loss": 0.5}')  # cut right before its end
    with R.open_log(tmp_path, 9):
        assert steps_of(tmp_path) == [1, 2, 3]
    with R.open_log(tmp_path, 0):
        assert path.read_text() == ""


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty, and not a run of ours") as caught:
        R.open_log(tmp_path, 0)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_in_use_is_refused(tmp_path):
    """By another process, which holds a lock until it ends; one that is shared will do."""
    out = tmp_path / "run"
    R.open_log(out, 0).close()
    (out / "log.jsonl").write_text('{"step": 1}\n')
    hold = (
        "import fcntl, sys\n"
        "log = open(sys.argv[1], 'a+')\n"
        "fcntl.lockf(log, fcntl.LOCK_SH)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(out / "log.jsonl")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=re.escape(f"{out}: another run is writing here")):
        R.open_log(out, 0)
    assert steps_of(out) == [1], "nothing is cut off from a log in use"
    holder.communicate()
    R.open_log(out, 0).close()
    assert steps_of(out) == []


def test_a_run_with_other_settings_is_named():
    saved = {"seed": 0, "lr": 0.1, "out": "a", "old_flag": 3}
    R.check_same_run("out", saved, dict(saved), may_change=set())
    R.check_same_run("out", saved, saved | {"out": "b"}, may_change={"out"})

    settings = {"seed": 1, "lr": 0.1, "out": "b", "new_flag": 4}
    with pytest.raises(ValueError) as caught:
        R.check_same_run("out", saved, settings, may_change={"out"})
    message = str(caught.value)
    assert message.startswith("out: holds a run with other settings (")
    assert "seed 0 there, 1 here" in message
    assert "old_flag 3 there, None here" in message
    assert "new_flag None there, 4 here" in message
    assert "lr" not in message.replace("there", "")
    assert " b" not in message
    assert "\n" not in message


# ---------------------------------------------------------------------------------------------
# Pictures and scores, flags and errors


def test_sheet(tmp_path):
    """Seven images of 16 px in three columns: frames, a zoom of 4, and two white places."""
    images = torch.rand(7, 3, 16, 16)
    R.save_sheet(images, tmp_path / "x.png", columns=3)
    sheet = Image.open(tmp_path / "x.png")
    assert sheet.size == (3 * 18 * 4, 3 * 18 * 4)
    pixels = np.asarray(sheet)[::4, ::4]  # (54, 54, 3)
    fifth = pixels[19:35, 19:35]  # the middle
    assert np.array_equal(fifth.transpose(2, 0, 1), R.to_uint8(images[4]))
    assert (pixels[36:, 18:] == 255).all()


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    error = torch.tensor([0.1, 1.0]).view(2, 1, 1, 1)
    assert torch.allclose(R.psnr(a + error, a), torch.tensor([20.0, 0.0]), atol=1e-4)


def test_number():
    assert R.positive_int("7") == 7
    assert R.number(0, 1)("0.5") == 0.5
    for text in ("0", "-1", "1.5", "x", "1e400"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number from 1"):
            R.positive_int(text)
    for text in ("nan", "inf", "-0.1", "1.1"):
        with pytest.raises(argparse.ArgumentTypeError, match="number from 0 to 1"):
            R.number(0, 1)(text)


def test_an_error_is_one_line(monkeypatch):
    assert R.error_line(ValueError("x.pt: no such file")) == "error: x.pt: no such file"
    worker = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        "last):\n  ...\nValueError: 7.png: not readable as an image\n"
    )
    assert R.error_line(worker) == "error: 7.png: not readable as an image"
    library = ValueError("a.pt: not readable (line one\n  line two)")
    assert R.error_line(library) == "error: a.pt: not readable (line one line two)"
    monkeypatch.setenv("RANK", "3")
    assert R.error_line(ValueError("a")) == "error of process 3: a"
