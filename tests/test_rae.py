"""rae.py: images, the toy world, encoder, decoder, statistics, files, and the shared plumbing."""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, gap
from PIL import Image

import rae as R
from fid import psnr
from rae import UsageError
from sample import save_grid, to_uint8
from toy import world
from train_decoder import latent_statistics
from train_diffusion import StepBatches


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
        ("RGB", ".webp"),
        ("CMYK", ".jpg"),
        ("1", ".bmp"),
    ]
    for mode, suffix in kinds:
        save_images(tmp_path / "deep" / (mode + suffix), 1, mode=mode, suffix=suffix)
    data = R.ImageFolder(tmp_path, 32)
    assert len(data) == len(data.classes) == 7
    assert data.classes == sorted(data.classes)
    for i in range(7):
        image = data[i]
        assert image.shape == (3, 32, 32)
        assert image.dtype == np.uint8
        assert np.array_equal(data.load(i, None, False), image)
        assert np.array_equal(data.load(i, None, True), image[:, :, ::-1])


def test_flat_folder_is_one_class(tmp_path):
    save_images(tmp_path, 3)
    data = R.ImageFolder(tmp_path, 32)
    assert len(data.classes) == 1
    assert data.labels.tolist() == [0, 0, 0]


def test_links_to_folders_are_followed(tmp_path):
    save_images(tmp_path / "elsewhere", 2)
    save_images(tmp_path / "photos" / "cat", 3)
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "ant")
    data = R.ImageFolder(tmp_path / "photos", 16)
    assert data.classes == ["ant", "cat"]
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    names = [os.path.relpath(path, tmp_path / "photos") for path in data.paths]
    assert names == ["ant/0.png", "ant/1.png", "cat/0.png", "cat/1.png", "cat/2.png"]
    assert data[1].shape == (3, 16, 16)


def test_hidden_files_and_other_files_are_skipped(tmp_path, capsys):
    for name in ("cat", "dog/brown", ".cache"):
        save_images(tmp_path / name, 2)
    data = R.ImageFolder(tmp_path, 16)
    assert data.classes == ["cat", "dog/brown"]
    assert len(data) == 4
    assert capsys.readouterr().out == ""

    (tmp_path / "cat" / "notes.txt").write_text("")
    (tmp_path / "dog" / "brown" / "._0.png").write_text("what a Mac adds to zip files")
    assert len(R.ImageFolder(tmp_path, 16)) == 4
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}: skipped 2 files that are not images, such as ")
    assert "notes.txt" in said


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
    start = time.perf_counter()
    data = R.ImageFolder(tmp_path / "photos", 16)
    seconds = time.perf_counter() - start
    print(f"200,000 files open in {seconds:.2f} s")
    assert len(data) == 200000
    assert len(data.classes) == 1000
    assert seconds < 5


def test_16_bits_exif_and_transparency(tmp_path):
    """16 bits keep their range, images are turned upright, transparent pixels become white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        pixels = np.asarray(R.open_image(tmp_path / name))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels - ramp[..., None] / 257).max() <= 0.5

    for dtype in (np.float32, np.int32):
        Image.fromarray(np.full((4, 4), 100000, dtype)).save(tmp_path / "32.tif")
        with pytest.raises(UsageError, match="32.tif' cannot be read as an image: .*32 bits"):
            R.open_image(tmp_path / "32.tif")

    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise to view
    image = Image.new("RGB", (10, 4))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "rotated.png", exif=exif)
    rotated = R.open_image(tmp_path / "rotated.png")
    assert rotated.size == (4, 10)
    assert rotated.getpixel((3, 0)) == (255, 255, 255)

    rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    rgba.putpixel((1, 1), (0, 0, 0, 255))
    rgba.putpixel((2, 2), (200, 0, 0, 128))
    rgba.save(tmp_path / "rgba.png")
    gray = Image.new("L", (4, 4))
    gray.putpixel((1, 1), 50)
    gray.save(tmp_path / "gray.png", transparency=0)
    image = R.open_image(tmp_path / "rgba.png")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (0, 0, 0)
    assert image.getpixel((2, 2)) == (227, 127, 127)
    image = R.open_image(tmp_path / "gray.png")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (50, 50, 50)


def test_broken_images_are_named(tmp_path):
    save_images(tmp_path, 2, size=(200, 200))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_text("text")
    (tmp_path / "3.png").write_bytes(b"")
    data = R.ImageFolder(tmp_path, 32)
    assert data[0].shape == (3, 32, 32)
    for i in (1, 2, 3):
        for read in (data.__getitem__, lambda i: data.load(i, None, False)):
            with pytest.raises(UsageError, match=f"{i}.png' cannot be read as an image"):
                read(i)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        with pytest.raises(UsageError, match=f"{name}: no such folder, or no images in it"):
            R.ImageFolder(tmp_path / name, 32)


def test_damaged_images_are_not_half_black(tmp_path):
    """64 bytes of a PNG are overwritten, at many places. (Pillow misses damage near the end.)"""
    y, x = np.mgrid[:40, :40]
    noise = np.random.default_rng(0).integers(9, size=(40, 40, 3))
    pixels = (np.stack([6 * x, 6 * y, 3 * (x + y)], 2) + noise).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    for start in range(len(whole) // 3, len(whole) * 5 // 6, 16):
        path.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
        with pytest.raises(UsageError, match="a.png' cannot be read as an image"):
            R.open_image(path)


def test_a_dark_16_bit_image_is_warned_about(tmp_path):
    """Scanners write 12 bits into 16-bit files."""
    path = tmp_path / "a.png"
    Image.fromarray(np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)).save(path)
    with pytest.warns(UserWarning, match="4,095"):
        R.open_image(path)


def test_a_named_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UsageError, match="a.png' cannot be read as an image"):
        R.open_image(tmp_path / "a.png")


def test_a_folder_is_known_by_its_names(tmp_path):
    save_images(tmp_path / "photos" / "cats", 2)
    save_images(tmp_path / "photos" / "dogs", 2)
    first = R.ImageFolder(tmp_path / "photos", 32).fingerprint
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert R.ImageFolder(tmp_path / "moved", 32).fingerprint == first

    (tmp_path / "moved" / "cats").rename(tmp_path / "moved" / "birds")
    renamed = R.ImageFolder(tmp_path / "moved", 32).fingerprint
    save_images(tmp_path / "moved" / "dogs", 3)
    grown = R.ImageFolder(tmp_path / "moved", 32).fingerprint
    assert len({first, renamed, grown}) == 3


@pytest.mark.parametrize("folder", ["imagenet_native", "imagenette/val", "cifar10/test"])
def test_real_photographs(folder):
    root = ROOT.parent / "shared" / "data" / folder
    if not root.is_dir():
        pytest.skip(f"needs the photographs of {folder} beside the repository")
    data = R.ImageFolder(root, 64)
    for i in range(0, len(data), max(1, len(data) // 30)):
        assert data[i].shape == (3, 64, 64)


def test_uint8_rounds():
    x = torch.tensor([-1, 0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 2])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


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
        assert data[1].shape == (3, 32, 32)
        assert data[1].dtype == np.uint8
        assert np.array_equal(data.load(1, None, False), data[1])
        assert np.array_equal(data.load(1, None, True), data[1][:, :, ::-1])
        assert len(data.fingerprint) == 16
        (images,) = R.read_batches(data, [[1, 0]], 0, "cpu")
        assert images.shape == (2, 3, 32, 32)
        assert np.array_equal(to_uint8(images[0]), data[1])
    assert len(R.open_data("toy", 32, "val")) == 20
    assert R.open_data("toy", 32, "val").fingerprint != toy.fingerprint


# ---------------------------------------------------------------------------------------------
# Encoder and decoder


@pytest.fixture(scope="module")
def toy():
    return R.load_rae("toy")


def test_latents_are_normalized_and_decode(toy):
    images = torch.from_numpy(world.toy_images(500, seed=1)[0]).float() / 255
    with torch.no_grad():
        z = toy.encode(images)
        again = toy.decode(z)
    assert z.shape == (500, 16, 128)
    assert z.mean().abs() < 0.02
    assert 0.95 < z.std() < 1.05
    assert again.shape == (500, 3, toy.image_size, toy.image_size)
    assert psnr(again.clamp(0, 1), images).mean() > 24
    assert not any("vit" in name for name in toy.decoder.state_dict())


def test_normalization_by_hand(toy):
    images = torch.rand(2, 3, 32, 32)
    mean = torch.randn(128, 4, 4)
    var = torch.rand(128, 4, 4) + 0.5
    rae = R.RAE(toy.encoder, toy.decoder, mean, var)
    with torch.no_grad():
        tokens = toy.encoder(images)
        z = rae.encode(images)
        grid = z.transpose(1, 2).unflatten(2, (4, 4))  # (B, C, h, w)
        want = (tokens.transpose(1, 2).unflatten(2, (4, 4)) - mean) / (var + 1e-5).sqrt()
        assert gap(grid, want) < 1e-5
        assert gap(rae.decode(z), toy.encoder.denormalize(toy.decoder(tokens))) < 1e-4
    with pytest.raises(UsageError, match="encoder, decoder and statistics are for different"):
        R.RAE(toy.encoder, toy.decoder, mean[:, :2, :2], var[:, :2, :2])


@pytest.mark.parametrize("batch_size, num", [(7, 29), (4, 33), (100, 30)])
def test_statistics_equal_numpy(toy, batch_size, num, monkeypatch):
    """33 images in batches of 4 have a last batch of one. Some are read by a worker."""
    monkeypatch.setattr(world, "TOY", {"train": (num, 0)})
    data = world.ToyShapes()
    mean, var = latent_statistics(
        toy.encoder, data, batch_size, torch.device("cpu"), workers=num % 2
    )
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


def test_only_images_get_gradients_from_the_encoder(toy):
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    toy.encoder(images).square().mean().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in toy.encoder.parameters())
    assert not toy.encoder(torch.rand(1, 3, 32, 32)).requires_grad


def toy_statistics():
    file = R.load(R.find_file("toy"))
    return file["mean"], file["var"]


def test_latent_hash(toy):
    same = R.RAE(toy.encoder, copy.deepcopy(toy.decoder), *toy_statistics())
    assert same.latent_hash() == R.load_rae("toy").latent_hash() == toy.latent_hash()
    mean, var = toy_statistics()
    assert R.RAE(toy.encoder, toy.decoder, mean + 1e-3, var).latent_hash() != toy.latent_hash()
    assert R.RAE(toy.encoder, toy.decoder, mean, 1.01 * var).latent_hash() != toy.latent_hash()
    encoder = copy.deepcopy(toy.encoder)
    encoder.vit.blocks[-1].mlp.fc2.bias += 1e-3
    assert R.RAE(encoder, toy.decoder, mean, var).latent_hash() != toy.latent_hash()


# ---------------------------------------------------------------------------------------------
# Files


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_files_that_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.zeros(1000)}, "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "page.pt").write_text("<!doctype html><html>")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"x": Evil()}, "evil.pt")
    torch.save([1, 2, 3], "list.pt")
    for name in ("half.pt", "text.pt", "page.pt", "empty.pt", "evil.pt", "list.pt"):
        with pytest.raises(UsageError, match=f"{name}: not a readable checkpoint"):
            R.load(name)
    assert not os.path.exists("hacked")
    for name in ("none.pt", "."):
        with pytest.raises(UsageError, match="no such file"):
            R.load(name)
    assert torch.equal(R.load("good.pt")["x"], torch.zeros(1000))


class Broken:
    """Fails while it is pickled, like a full disk: the file has been started."""

    def __reduce__(self):
        raise OSError("No space left on device")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    R.atomic_save({"step": 1}, path)
    with pytest.raises(OSError, match="No space"):
        R.atomic_save({"step": 2, "broken": Broken()}, path)
    assert R.load(path) == {"step": 1}
    R.atomic_save({"step": 2}, path)
    assert R.load(path) == {"step": 2}
    assert [f.name for f in tmp_path.iterdir()] == ["x.pt"], "no temporary file is left"


def test_encoder_errors(tmp_path):
    with pytest.raises(UsageError, match="dinov9: no such file, and not one of .*dinov2-b"):
        R.load_encoder("dinov9", 32)
    with pytest.raises(UsageError, match="released:dinov2-b: no such file"):
        R.load_encoder("released:dinov2-b", 32)
    with pytest.raises(UsageError, match="Unknown model"):
        R.load_encoder("timm:no_such_model", 32)
    torch.save({"ema": {}}, tmp_path / "decoder.pt")
    with pytest.raises(UsageError, match="decoder.pt: not an encoder"):
        R.load_encoder(str(tmp_path / "decoder.pt"), 32)
    with pytest.raises(UsageError, match="encoder input of 30 px: not a multiple of 8"):
        R.load_encoder("toy", 30)


@pytest.mark.parametrize(
    "model, message",
    [("resnet18", "resnet18"), ("eva02_tiny_patch14_224", "eva02.* not a plain ViT")],
)
def test_encoders_that_are_not_plain_vits(tmp_path, model, message):
    import timm

    torch.save(timm.create_model(model, pretrained=False).state_dict(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match=message):
        R.load_encoder(f"timm:{model}", 224, tmp_path / "net.pt")


def test_encoder_that_cannot_be_downloaded(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="cannot load vit_tiny_patch16_224 from timm: "):
        R.load_encoder("timm:vit_tiny_patch16_224", 32)
    with pytest.raises(UsageError, match="cannot load vit_small_patch8_224.dino from .*x.pt: "):
        R.load_encoder("dino-s8", 224, tmp_path / "x.pt")


def test_encoder_file_is_the_toy_encoder(toy, tmp_path):
    torch.save(torch.load(R.TOY / "encoder.pt", weights_only=True), tmp_path / "mine.pt")
    encoder = R.load_encoder(str(tmp_path / "mine.pt"), 32)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder(images), toy.encoder(images))
    assert R.load_encoder("toy", 64)(images).shape == (2, 64, 128)


@pytest.fixture(scope="module")
def vit():
    """A small timm ViT with random weights and its classifier."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_encoder_from_a_local_file(vit, suffix, tmp_path):
    from safetensors.torch import save_file

    def save(state, path):
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)

    path = tmp_path / f"weights{suffix}"
    save(vit.state_dict(), path)
    encoder = R.load_encoder("timm:vit_tiny_patch16_224", 224, path)
    images = torch.rand(2, 3, 224, 224)
    want = copy.deepcopy(vit).eval()
    want.norm = torch.nn.LayerNorm(192, eps=1e-6, elementwise_affine=False)
    with torch.no_grad():
        assert gap(encoder(images), want.forward_features(2 * images - 1)[:, 1:]) < 1e-5
    small = R.load_encoder("timm:vit_tiny_patch16_224", 64, path)
    assert small(torch.rand(1, 3, 64, 64)).shape == (1, 16, 192)

    state = vit.state_dict()
    del state["blocks.0.norm1.bias"]
    save(state, path)
    with pytest.raises(UsageError, match="cannot load vit_tiny(?s:.*)blocks.0.norm1.bias"):
        R.load_encoder("timm:vit_tiny_patch16_224", 64, path)


def test_patches_of_14_px_see_224(monkeypatch):
    """256 px images give 16 x 16 tokens with every encoder, and 512 px ones 32 x 32."""
    from timm.models.vision_transformer import VisionTransformer

    def load_timm(model, weights, **options):
        patch_size = 14 if "patch14" in model else 16
        net = VisionTransformer(patch_size=patch_size, embed_dim=12, depth=1, num_heads=1)
        net.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        return net

    monkeypatch.setattr(R, "load_timm", load_timm)
    for name, image_size, input_size, grid_size in (
        ("dinov2-b", 256, 224, 16),
        ("dinov2-b", 512, 448, 32),
        ("mae-b", 256, 256, 16),
    ):
        encoder = R.load_encoder(name, image_size)
        assert encoder.input_size == input_size
        assert encoder.grid_size == grid_size


def test_decoder_of_a_changed_encoder(tmp_path):
    """The decoder's file names a file that was retrained in the meantime."""
    file = R.load(R.find_file("toy")) | {"encoder": str(tmp_path / "mine.pt")}
    encoder = torch.load(R.TOY / "encoder.pt", weights_only=True)
    torch.save(file, tmp_path / "d.pt")
    torch.save(encoder, tmp_path / "mine.pt")
    assert R.load_rae(tmp_path / "d.pt").latent_hash() == file["latent_hash"]

    encoder["state_dict"]["blocks.1.attn.proj.bias"] += 1e-3
    torch.save(encoder, tmp_path / "mine.pt")
    with pytest.raises(UsageError, match="d.pt: its encoder has changed"):
        R.load_rae(tmp_path / "d.pt")


def test_decoders_that_are_not_whole(tmp_path):
    file = R.load(R.find_file("toy"))
    torch.save(file["ema"], tmp_path / "bare.pt")
    with pytest.raises(UsageError, match="bare.pt: .*pass --encoder and --stats"):
        R.load_rae(tmp_path / "bare.pt")
    with pytest.raises(UsageError, match="bare.pt: .*pass --encoder and --stats"):
        R.load_rae(tmp_path / "bare.pt", encoder="toy")
    with pytest.raises(UsageError, match="encoder.pt: not an RAE decoder"):
        R.load_rae(R.TOY / "encoder.pt")
    del file["ema"]["decoder_norm.bias"]
    with pytest.raises(RuntimeError, match="decoder_norm.bias"):
        R.load_decoder(file)


def test_a_bare_decoder_with_its_statistics(vit, tmp_path):
    """As in the official release: only a state dict, with one token per 16 encoded px."""
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    state = R.Decoder(192, 2, 8, 768, 1, 12, 64).state_dict()
    for ours, official in R.OFFICIAL_NAMES:
        state = {re.sub(rf"(layers\.0\.){ours}", rf"\1{official}", k): v for k, v in state.items()}
    assert "decoder_layers.0.attention.attention.query.weight" in state
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"var": torch.full((192, 2, 2), 4.0)}, tmp_path / "stats.pt")
    rae = R.load_rae(
        tmp_path / "bare.pt",
        encoder="timm:vit_tiny_patch16_224",
        encoder_weights=tmp_path / "vit.pt",
        stats=tmp_path / "stats.pt",
    )
    assert rae.encoder.input_size == 32
    assert rae.image_size == 16  # this decoder has patches of 8 px
    assert not rae.training
    assert not any(p.requires_grad for p in rae.parameters())
    images = torch.rand(2, 3, 32, 32)
    assert gap(rae.encode(images), rae.encoder(images) / (4 + 1e-5) ** 0.5) < 1e-6
    assert rae.decode(rae.encode(images)).shape == (2, 3, 16, 16)


def test_released_names(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants, errors

    asked = []

    def download(repository, file, revision):
        assert repository == "nyu-visionx/RAE-collections"
        assert re.fullmatch("[0-9a-f]{40}", revision)
        asked.append(file)
        return "x"

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", download)
        assert R.find_file("a/b.pt") == "a/b.pt"
        assert R.find_file(tmp_path) == tmp_path
        assert R.find_file("toy") == R.TOY / "decoder.pt"
        assert asked == []
        assert R.find_file("released:mae-b") == "x"
        assert R.find_file("released:ImageNet256/DiTDH-XL") == "x"
    assert asked == [
        "decoders/mae/base_p16/ViTXL_n08/model.pt",
        "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
    ]

    def missing(repository, file, revision):
        raise errors.LocalEntryNotFoundError(f"{file} is not there")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", missing)
        with pytest.raises(UsageError, match="cannot download DiTs/.*/nothing/stage2_model.pt"):
            R.find_file("released:nothing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="cannot download decoders/dinov2/.* from huggingface.co"):
        R.find_file("released:dinov2-b")


def test_a_released_rae_is_put_together(vit, tmp_path, monkeypatch):
    """Decoder and statistics are downloaded; the encoder is the one of its training."""
    monkeypatch.setitem(R.ENCODERS, "mae-b", ("vit_tiny_patch16_224", False, {}))
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    torch.save(R.Decoder(192, 2, 16, 768, 1, 12, 64).state_dict(), tmp_path / "model.pt")
    torch.save({"var": torch.ones(192, 2, 2)}, tmp_path / "stat.pt")
    asked = []

    def download(file):
        asked.append(file)
        return tmp_path / file.split("/")[-1]

    monkeypatch.setattr(R, "download", download)
    rae = R.load_rae("released:mae-b", encoder_weights=tmp_path / "vit.pt")
    assert rae.image_size == 32
    assert torch.equal(rae.encoder.vit.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
    assert asked == [
        "decoders/mae/base_p16/ViTXL_n08/model.pt",
        "stats/mae/base_p16/ImageNet1k/stat.pt",
    ]


# ---------------------------------------------------------------------------------------------
# Processes and random numbers


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


def test_seeded_generators():
    def numbers(*key):
        return torch.randn(4, generator=R.seeded_generator(*key)).tolist()

    assert numbers("noise", 1, 2) == numbers("noise", 1, 2)
    keys = [(0, 1, 2), (0, 2, 1), (0, 1), (0, 1, 0), (1, 0, 0), (), (12,), (1, 2)]
    keys += [("noise", 0, 1), ("crop", 0, 1), ("noise", 0)]
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)

    both = R.seeded_noise([("noise", 0, 1), ("noise", 0, 2)], (3, 2), "cpu")
    assert both.shape == (2, 3, 2)
    assert torch.equal(both[1:], R.seeded_noise([("noise", 0, 2)], (3, 2), "cpu"))
    many = R.seeded_noise([(0, i) for i in range(500)], (40,), "cpu")
    assert many.mean().abs() < 0.04  # five standard deviations
    assert abs(many.std() - 1) < 0.03
    assert abs(many.mean(1).std() - 40**-0.5) < 0.03, "rows are independent"


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_precision(monkeypatch, capsys):
    """auto is bf16 on GPUs that compute in it; fp32 means no TF32 either."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def setup(precision, device):
        args = SimpleNamespace(precision=precision, device=device)
        rank, world_size, got, autocast = R.setup_distributed(args)
        assert (rank, world_size, got.type) == (0, 1, device)
        name = capsys.readouterr().out.split()[-1]
        tf32 = torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == tf32
        if device == "cpu":
            with autocast:
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert (product.dtype == torch.bfloat16) == (name == "bf16")
        return name, tf32

    for native, want in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert setup("auto", "cuda") == (want, native)
    for name in ("bf16", "tf32", "fp32"):
        assert setup(name, "cuda") == (name, name != "fp32")
    assert setup("bf16", "cpu")[0] == "bf16"
    assert setup("auto", "cpu") == ("fp32", False)


def test_batches_are_dealt_in_turn(monkeypatch):
    assert R.rank_batches(10, 3) == [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    monkeypatch.setattr(R.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(R.dist, "get_world_size", lambda: 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(R.dist, "get_rank", lambda rank=rank: rank)
        dealt.append(R.rank_batches(10, 3))
    assert dealt == [[range(0, 3), range(9, 10)], [range(3, 6)], [range(6, 9)]]


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
    with R.open_log(tmp_path, 0) as log:
        R.write_log(log, {"step": 1, "loss": 0.25, "by_t": [1, 2]})
        assert capsys.readouterr().out.rstrip() == "step 1  loss 0.25"
        assert steps_of(tmp_path) == [1], "a line is on disk as soon as it is written"
        R.write_log(log, {"step": 2, "loss": 0.125, "by_t": [3, 4]})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.25, "by_t": [1, 2]}
    assert steps_of(tmp_path) == [1, 2]


def test_a_resumed_log_drops_what_will_be_repeated(tmp_path):
    """The checkpoint is of step 3, and the run was killed while it wrote the line of step 5."""
    lines = "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in (1, 2, 3, 3, 4))
    path = tmp_path / "log.jsonl"
    path.write_text(lines + '{"step": 5, "lo')
    with R.open_log(tmp_path, 3) as log:
        assert steps_of(tmp_path) == [1, 2, 3, 3]
        R.write_log(log, {"step": 4, "loss": 0.25})
    assert path.read_text() == lines.replace('4, "loss": 0.5', '4, "loss": 0.25')
    with open(path, "a") as file:
        file.write('{"step": 5, "loss": 0.5}')  # cut right before the end of its line
    with R.open_log(tmp_path, 9) as log:
        R.write_log(log, {"step": 5, "loss": 0.75})
    assert steps_of(tmp_path)[:5] == [1, 2, 3, 3, 4]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 5, "loss": 0.75}


def test_a_log_without_a_checkpoint_is_kept(tmp_path):
    """It may be another program's."""
    (tmp_path / "log.jsonl").write_text('{"step": 7}\n')
    with R.open_log(tmp_path, 0) as log:
        R.write_log(log, {"step": 1})
    assert (tmp_path / "log.jsonl.old").read_text() == '{"step": 7}\n'
    assert steps_of(tmp_path) == [1]


def test_log_lines_of_others_are_kept(tmp_path):
    others = 'no JSON, caf\u00e9\n{"loss": 1}\n[2]\n\n'
    path = tmp_path / "log.jsonl"
    path.write_text(f'{others}{{"step": 1}}\n{others}{{"step": 2}}\n', encoding="utf-8")
    with R.open_log(tmp_path, 1) as log:
        R.write_log(log, {"step": 2, "loss": 0.5})
    want = f'{others}{{"step": 1}}\n{others}{{"step": 2, "loss": 0.5}}\n'
    assert path.read_text(encoding="utf-8") == want


def adamw(**options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **options)
    return model, optimizer


def adamw_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_the_optimizer_resumes_exactly():
    """Its moments come from the file, its settings from the code."""
    model, optimizer = adamw(lr=0.1, betas=(0.5, 0.9))
    adamw_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    want = adamw_step(model, optimizer)

    other, resumed = adamw(lr=0.1, betas=(0.5, 0.9))
    other.load_state_dict(weights)
    saved["param_groups"][0].update(lr=9.0, betas=(0.0, 0.0), weight_decay=5.0)
    R.load_optimizer(resumed, saved)
    got = adamw_step(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_damaged_moments_cannot_crash_the_fused_optimizer():
    model, optimizer = adamw()
    adamw_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(()).expand(2, 3)  # one number, stride 0
    R.load_optimizer(optimizer, saved)
    adamw_step(model, optimizer)
    saved["state"][0]["exp_avg_sq"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match="7"):
        R.load_optimizer(optimizer, saved)


def test_a_run_with_other_settings_is_named():
    saved = {"seed": 0, "lr": 0.1}
    R.check_same_run("out", saved, dict(saved))
    with pytest.raises(UsageError, match="out .*a run with seed 0, not 1; .*--out"):
        R.check_same_run("out", saved, {"seed": 1, "lr": 0.1})
    with pytest.raises(UsageError, match="a run with new_flag None, not 4"):
        R.check_same_run("out", saved, saved | {"new_flag": 4})
    with pytest.raises(UsageError, match="a run with old_flag 3, not None"):
        R.check_same_run("out", saved | {"old_flag": 3}, saved)


# ---------------------------------------------------------------------------------------------
# Pictures and scores, flags and errors


def test_grid(tmp_path):
    """Seven images of 16 px in three columns: white borders, enlarged by 4, two blank places."""
    images = torch.rand(7, 3, 16, 16)
    save_grid(images, tmp_path / "x.png", columns=3)
    grid = Image.open(tmp_path / "x.png")
    assert grid.size == (3 * 18 * 4, 3 * 18 * 4)
    pixels = np.asarray(grid)[::4, ::4]  # (54, 54, 3)
    assert np.array_equal(np.asarray(grid), pixels.repeat(4, 0).repeat(4, 1))
    for i in range(7):
        top = 18 * (i // 3)
        left = 18 * (i % 3)
        place = pixels[top : top + 18, left : left + 18]
        assert np.array_equal(place[1:-1, 1:-1].transpose(2, 0, 1), to_uint8(images[i]))
        assert (place[0] == 255).all() and (place[:, -1] == 255).all()
    assert (pixels[36:, 18:] == 255).all()


def test_psnr():
    a = torch.zeros(3, 3, 4, 4)
    error = torch.tensor([0.1, 1.0, 0.0]).view(3, 1, 1, 1)
    assert torch.allclose(psnr(a + error, a), torch.tensor([20.0, 0.0, 100.0]), atol=1e-4)


def test_bounded():
    assert R.positive_int("7") == 7
    assert R.non_negative_int("0") == 0
    assert R.bounded(0, 1)("0.5") == 0.5
    assert R.bounded(0)("1e9") == 1e9
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=R.positive_int)
    parser.add_argument("--share", type=R.bounded(0, 1))
    parser.add_argument("--lr", type=R.bounded(0))
    for flag, texts in {
        "--count": ("0", "-1", "1.5", "x", "1e400", ""),
        "--share": ("nan", "inf", "-0.1", "1.1", "x"),
        "--lr": ("nan", "inf", "1e400", "-1"),
    }.items():
        for text in texts:
            with pytest.raises(SystemExit) as stop:
                parser.parse_args([f"{flag}={text}"])
            assert stop.value.code == 2


def test_an_error_is_one_line(tmp_path):
    def fail():
        raise UsageError("x.pt: no such file (line one\n  line two)")

    with pytest.raises(SystemExit) as stop:
        R.run_script(fail)
    assert stop.value.code == "error: x.pt: no such file (line one line two)"  # exit code 1

    # A DataLoader worker sends its traceback as the message.
    try:
        R.open_image(tmp_path / "none.png")
    except UsageError:
        wrapper = torch._utils.ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UsageError, match="Traceback"):
        wrapper.reraise()
    with pytest.raises(SystemExit) as stop:
        R.run_script(wrapper.reraise)
    message = str(stop.value.code)
    assert message.startswith(f"error: '{tmp_path}/none.png' cannot be read as an image: ")
    assert "Traceback" not in message
    assert "\n" not in message


@pytest.mark.parametrize("value", ["", "-2", "0", "1"])
def test_an_odd_world_size_is_one_process(monkeypatch, capsys, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.setenv("RANK", "3")
    args = SimpleNamespace(precision="fp32", device="cpu")
    assert R.setup_distributed(args)[:2] == (0, 1)
    assert capsys.readouterr().out == "cpu x 1, fp32\n"


def test_closed_output_does_not_end_a_run(tmp_path):
    """After `| head -1` every print fails, and without stderr there is no progress bar."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import rae
for i in rae.progress(range(20000), "steps"):
    rae.print0(i)
open("done", "w").close()
"""
    command = f'{sys.executable} -c "$CODE" 2>&- | head -n 1; exit ${{PIPESTATUS[0]}}'
    env = os.environ | {"CODE": code}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "0\n")
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_found_early(tmp_path):
    (tmp_path / "read_only").mkdir(mode=0o555)
    with pytest.raises(UsageError, match="no permission"):
        R.make_folder(tmp_path / "read_only")
    with pytest.raises(SystemExit, match="Permission denied"):
        R.run_script(lambda: R.make_folder(tmp_path / "read_only/run"))


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    for path in ("run", "run/run"):
        with pytest.raises(SystemExit, match="^error: .*run"):
            R.run_script(lambda path=path: R.make_folder(tmp_path / path))


def test_other_endings_of_a_script(capsys):
    R.run_script(lambda: print("done"))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        R.run_script(interrupt)
    assert stop.value.code == 130
    assert "stopped; " in capsys.readouterr().out

    def bug():
        raise ValueError("a bug keeps its traceback")

    with pytest.raises(ValueError, match="keeps its traceback"):
        R.run_script(bug)
