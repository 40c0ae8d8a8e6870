"""rae.py: images, the toy world, encoder, decoder, files, and the plumbing that scripts share."""

import copy
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import rae as R
from extras.to_official import to_official_names
from fid import psnr
from rae import UsageError
from sample import to_uint8
from tests.conftest import gap, load, save_images
from toy import world

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
    kinds = "RGB.png L.JPEG P.gif RGBA.PNG RGB.webp CMYK.jpg 1.bmp".split()
    for i, kind in enumerate(kinds):
        mode, suffix = kind.split(".")
        save_images(tmp_path / "deep" / str(i), 1, mode=mode, suffix=f".{suffix}")
    data = R.ImageFolder(tmp_path, 32)
    assert data.classes == [f"deep/{i}" for i in range(7)]
    for i in range(7):
        image = data[i]
        assert (image.shape, image.dtype) == ((3, 32, 32), np.uint8)
        assert np.array_equal(data.load(i, None, False), image)
        assert np.array_equal(data.load(i, None, True), image[:, :, ::-1])


def test_links_to_folders_are_followed(tmp_path):
    save_images(tmp_path / "elsewhere", 2)
    save_images(tmp_path / "photos" / "cat", 3)
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "ant")
    data = R.ImageFolder(tmp_path / "photos", 16)
    assert data.classes == ["ant", "cat"]
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    names = [os.path.relpath(path, tmp_path / "photos") for path in data.paths]
    assert names == ["ant/0.png", "ant/1.png", "cat/0.png", "cat/1.png", "cat/2.png"]
    assert len(R.ImageFolder(tmp_path / "elsewhere", 16).classes) == 1, "a flat folder is one class"


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
    assert said.startswith(f"{tmp_path}: skipped 1 files that are not images, such as ")
    assert "notes.txt" in said


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
        with pytest.raises(UsageError, match="32.tif' cannot be read as an image: .*32"):
            R.open_image(tmp_path / "32.tif")
    # Scanners write 12 bits into 16-bit files.
    Image.fromarray(ramp // 16).save(tmp_path / "dark.png")
    with pytest.warns(UserWarning, match="4,095"):
        R.open_image(tmp_path / "dark.png")

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
    image = R.open_image(tmp_path / "rgba.png")
    colors = [image.getpixel((i, i)) for i in range(3)]
    assert colors == [(255, 255, 255), (0, 0, 0), (227, 127, 127)]
    gray = Image.new("L", (4, 4))
    gray.putpixel((1, 1), 50)
    gray.save(tmp_path / "gray.png", transparency=0)
    image = R.open_image(tmp_path / "gray.png")
    assert [image.getpixel((i, i)) for i in range(2)] == [(255, 255, 255), (50, 50, 50)]


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


def test_toy_images():
    images, labels = world.toy_images(40, seed=0)
    again, _ = world.toy_images(20, seed=0)
    other, _ = world.toy_images(40, seed=1)
    assert images.shape == (40, 3, 32, 32)
    assert labels[:12].tolist() == [*range(10), 0, 1]
    assert np.array_equal(images[:20], again), "the first images do not depend on their number"
    assert not np.array_equal(images, other)
    assert len({image.tobytes() for image in images}) == 40


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


def test_only_images_get_gradients_from_the_encoder(toy):
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    toy.encoder(images).square().mean().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in toy.encoder.parameters())
    assert not toy.encoder(torch.rand(1, 3, 32, 32)).requires_grad


def test_latent_hash(toy):
    """Of the encoder and of the statistics."""
    file = load(R.TOY / "decoder.pt")
    mean, var = file["mean"], file["var"]
    encoder = copy.deepcopy(toy.encoder)
    encoder.vit.blocks[-1].mlp.fc2.bias += 1e-3
    assert toy.encoder.latent_hash(mean, var) == toy.latent_hash == file["latent_hash"]
    assert toy.encoder.latent_hash(mean + 1e-3, var) != toy.latent_hash
    assert toy.encoder.latent_hash(mean, 1.01 * var) != toy.latent_hash
    assert encoder.latent_hash(mean, var) != toy.latent_hash


# ---------------------------------------------------------------------------------------------
# Files


def test_encoder_file_is_the_toy_encoder(toy, tmp_path):
    shutil.copy(R.TOY / "encoder.pt", tmp_path / "mine.pt")
    encoder = R.load_encoder(str(tmp_path / "mine.pt"), 32)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder(images), toy.encoder(images))
    assert R.load_encoder("toy", 64)(images).shape == (2, 64, 128)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_encoder_from_a_local_file(suffix, tmp_path):
    from safetensors.torch import save_file

    def save(state, path):
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)

    path = tmp_path / f"weights{suffix}"
    vit = timm.create_model("vit_tiny_patch16_224")
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


def test_a_bare_decoder_with_its_statistics(tmp_path):
    """As in the official release: only a state dict, with one token per 16 encoded px."""
    vit = timm.create_model("vit_tiny_patch16_224")
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    state = to_official_names(R.Decoder(192, 2, 8, 768, 1, 12, 64).state_dict())
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

    asked = []

    def download(repository, file, revision):
        assert repository == "nyu-visionx/RAE-collections"
        assert re.fullmatch("[0-9a-f]{40}", revision)
        asked.append(file)
        return tmp_path / file.split("/")[-1]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert R.find_file("a/b.pt") == "a/b.pt"
    assert R.find_file(tmp_path) == tmp_path
    assert R.find_file("toy") == R.TOY / "decoder.pt"
    assert asked == []
    assert R.find_file("released:ImageNet256/DiTDH-XL") == tmp_path / "stage2_model.pt"
    assert asked.pop() == "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"

    # Decoder and statistics are downloaded; the encoder is the one of its training.
    monkeypatch.setitem(R.ENCODERS, "mae-b", ("vit_tiny_patch16_224", False, {}))
    vit = timm.create_model("vit_tiny_patch16_224")
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    torch.save(R.Decoder(192, 2, 16, 768, 1, 12, 64).state_dict(), tmp_path / "model.pt")
    torch.save({"var": torch.ones(192, 2, 2)}, tmp_path / "stat.pt")
    rae = R.load_rae("released:mae-b", encoder_weights=tmp_path / "vit.pt")
    assert rae.image_size == 32
    assert torch.equal(rae.encoder.vit.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
    assert asked == [
        "decoders/mae/base_p16/ViTXL_n08/model.pt",
        "stats/mae/base_p16/ImageNet1k/stat.pt",
    ]


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
    for device, native, precision, want in (
        ("cuda", True, "auto", "bf16"),
        ("cuda", False, "auto", "fp32"),
        ("cuda", True, "bf16", "bf16"),
        ("cuda", True, "tf32", "tf32"),
        ("cuda", True, "fp32", "fp32"),
        ("cpu", False, "bf16", "bf16"),
        ("cpu", False, "auto", "fp32"),
    ):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        args = SimpleNamespace(precision=precision, device=device)
        rank, world_size, got, autocast = R.setup_distributed(args)
        assert (rank, world_size, got.type) == (0, 1, device)
        assert capsys.readouterr().out.split()[-1] == want
        assert torch.backends.cuda.matmul.allow_tf32 == (want != "fp32")
        assert torch.backends.cudnn.allow_tf32 == (want != "fp32")
        if device == "cpu":
            with autocast:
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert (product.dtype == torch.bfloat16) == (want == "bf16")


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
