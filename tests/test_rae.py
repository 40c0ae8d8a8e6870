"""rae.py: images, the toy world, encoder, noise, statistics, files, and what the loops share."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import rae as R
from assets import toy_world
from dit_dh import load_released


def save_images(folder, n, size=(40, 36), mode="RGB", suffix=".png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3),
                                     np.uint8)).convert(mode).save(folder / f"{i}{suffix}")


# ---------------------------------------------------------------------------------------------------- images

@pytest.mark.parametrize("size", [(300, 200), (200, 300), (70, 64), (64, 64), (33, 500), (20, 30)])
def test_center_crop_is_adm(size):
    """ADM's crop, written out a second time on its own."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
    want = image
    while min(want.size) >= 64:
        want = want.resize(tuple(x // 2 for x in want.size), resample=Image.BOX)
    scale = 32 / min(want.size)
    want = np.array(want.resize(tuple(round(x * scale) for x in want.size), resample=Image.BICUBIC))
    y, x = (want.shape[0] - 32) // 2, (want.shape[1] - 32) // 2
    assert np.array_equal(np.asarray(R.center_crop(image, 32)), want[y:y + 32, x:x + 32])


def test_folder_reads_every_kind_of_image(tmp_path):
    for mode, suffix in (("RGB", ".png"), ("L", ".JPEG"), ("P", ".gif"), ("RGBA", ".PNG"), ("CMYK", ".jpg"),
                         ("1", ".bmp")):
        save_images(tmp_path / "deep" / mode, 1, mode=mode, suffix=suffix)
    (tmp_path / "deep" / "notes.txt").write_text("not an image")
    data = R.ImageFolder(tmp_path, 32)
    assert len(data) == 6 and len(data.classes) == 6 and data.classes == sorted(data.classes)
    assert all(data.load(i, None).shape == (3, 32, 32) and data.load(i, None).dtype == np.uint8
               for i in range(6))


def test_flat_folder_is_one_class(tmp_path):
    save_images(tmp_path, 3)
    data = R.ImageFolder(tmp_path, 32)
    assert data.classes == ["."] and data.labels.tolist() == [0, 0, 0]


def test_broken_images_are_named(tmp_path):
    save_images(tmp_path, 2, size=(200, 200))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "2.png").write_text("text")
    data = R.ImageFolder(tmp_path, 32)
    data.load(0, None)
    for i in (1, 2):
        with pytest.raises(ValueError, match=f"{i}.png: not readable"):
            data.load(i, None)
    for bad, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no images")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            R.ImageFolder(bad, 32)


def test_random_crops_differ_and_stay_inside(tmp_path):
    save_images(tmp_path, 1, size=(64, 48))
    data = R.ImageFolder(tmp_path, 32, short=40)
    crops = [data.load(0, np.random.default_rng(i)) for i in range(8)]
    assert len({c.tobytes() for c in crops}) > 4 and {c.shape for c in crops} == {(3, 32, 32)}


@pytest.mark.parametrize("folder", ["imagenet_native", "imagenette/val", "cifar10/test"])
def test_real_photographs(folder):
    root = R.ASSETS.parent.parent / "shared" / "data" / folder
    if not root.is_dir():
        pytest.skip(f"needs the photographs of {folder} beside the repository")
    data = R.ImageFolder(root, 64)
    for i in range(0, len(data), max(1, len(data) // 60)):
        assert data.load(i, None).shape == (3, 64, 64)


def test_uint8_rounds():
    x = torch.tensor([-1, 0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 2])
    assert R.to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


# ---------------------------------------------------------------------------------------------- the toy world

def test_toy_images():
    images, labels = toy_world.toy_images(40, seed=0)
    again, _ = toy_world.toy_images(20, seed=0)
    other, _ = toy_world.toy_images(40, seed=1)
    assert images.shape == (40, 3, 32, 32) and labels[:12].tolist() == [*range(10), 0, 1]
    assert np.array_equal(images[:20], again), "the first images do not depend on how many are drawn"
    assert not np.array_equal(images, other) and len({x.tobytes() for x in images}) == 40


@pytest.mark.parametrize("name", toy_world.SHAPES)
def test_toy_shapes_are_their_own_mirror_image(name):
    y, x = np.mgrid[-1.2:1.2:25j, -1.2:1.2:25j]
    d = toy_world.SHAPES[name](x, y)
    assert np.allclose(d, d[:, ::-1], atol=1e-6) and (d < 0).mean() > 0.08 and (d > 0).mean() > 0.4
    slope = np.hypot(*np.gradient(d, 0.1))
    assert np.median(slope) < 1.1 and slope.max() < 1.5, "about a distance, else edges are not one pixel wide"


# ------------------------------------------------------------------------------------------- encoder, decoder

@pytest.fixture(scope="module")
def toy():
    return R.load_rae("assets/toy_decoder.pt"
                      if os.path.exists("assets/toy_decoder.pt") else R.released_file("toy"))


def test_latents_are_normalised_and_decode(toy):
    images = torch.from_numpy(toy_world.toy_images(500, seed=1)[0]).float() / 255
    with torch.no_grad():
        z = toy.encode(images)
        again = toy.decode(z)
    assert z.shape == (500, 16, 64) and z.mean().abs() < 0.02 and 0.95 < z.std() < 1.05
    assert R.psnr(again.clamp(0, 1), images).mean() > 24
    assert not any("vit" in k for k in toy.decoder.state_dict())


@pytest.mark.parametrize("dist, mean", [("uniform", 0.4), ("half-normal", 0.8 * (2 / np.pi) ** 0.5)])
def test_noise_in_training_only(toy, dist, mean):
    rae = R.RAE(toy.encoder, toy.decoder, tau=0.8, noise_dist=dist)
    tokens = torch.zeros(2000, 16, 64)
    sigma = rae.train().noised(tokens).std(dim=(1, 2))
    assert abs(sigma.mean() - mean) < 0.03 and (sigma.max() < 0.85) == (dist == "uniform")
    assert rae.eval().noised(tokens) is tokens
    assert R.RAE(toy.encoder, toy.decoder, tau=0.0).train().noised(tokens) is tokens
    g = [[R.keyed("cpu", 1, i) for i in rows] for rows in (range(4), range(2, 4))]
    four, two = (rae.train().noised(tokens[:len(k)], k) for k in g)
    assert torch.equal(four[2:], two), "noise belongs to the image, not to the batch"


@pytest.mark.parametrize("batch, n", [(7, 29), (4, 33), (100, 30)])
def test_statistics_equal_numpy(toy, batch, n, monkeypatch):
    monkeypatch.setattr(toy_world, "TOY", {"train": (n, 0)})
    data = toy_world.ToyShapes()
    mean, var = R.latent_statistics(toy.encoder, data, batch, "cpu")
    images = torch.from_numpy(data.images).float() / 255
    parts = [toy.encoder(x) for part in images.split(batch) for x in (part, part.flip(-1))]
    tokens = torch.cat(parts).double().numpy()                        # (2 n, N, C)
    assert (batch, n) != (4, 33) or len(parts[-1]) == 1, "an uneven last batch"
    assert np.abs(mean.flatten(1).T.numpy() - tokens.mean(0)).max() < 1e-6 * np.abs(tokens.mean(0)).max()
    assert np.allclose(var.flatten(1).T, tokens.var(0), rtol=1e-6, atol=0)


def test_encoder_gradients_reach_the_image_alone(toy):
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    toy.encoder(images).square().mean().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in toy.encoder.parameters())
    assert not toy.encoder(torch.rand(1, 3, 32, 32)).requires_grad


# ------------------------------------------------------------------------------------------------------ files

class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_files_that_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, "evil.pt")
    torch.save({"x": torch.zeros(1000)}, "good.pt")
    data = open("good.pt", "rb").read()
    open("half.pt", "wb").write(data[:len(data) // 2])
    open("text.pt", "w").write("hello")
    for name, message in (("evil.pt", "refused"), ("half.pt", "half.pt"), ("text.pt", "text.pt"),
                          ("none.pt", "no such file")):
        with pytest.raises(ValueError, match=message):
            R.read_file(name)
    with pytest.raises(pickle.UnpicklingError):
        load_released("evil.pt")
    assert not os.path.exists("hacked") and torch.equal(R.read_file("good.pt")["x"], torch.zeros(1000))


def test_encoder_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name, message in (("dinov9", "dinov2-b"), ("timm:no_such_model", "Unknown model"),
                          ("timm:resnet18", "a plain ViT"),
                          ("released:dinov2-b", "no such file")):
        with pytest.raises(ValueError, match=message):
            R.build_encoder(name, 32, weights=None if name != "timm:resnet18" else "x.pt")


def test_encoder_that_cannot_be_fetched(monkeypatch):
    import timm

    def offline(*args, **kw):
        raise ConnectionError("no route")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="the weights of vit_base.*--encoder-weights"):
        R.build_encoder("dinov2-b", 256)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_encoder_from_a_local_file(suffix, tmp_path):
    import timm
    from safetensors.torch import save_file
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5)    # a classifier: its head is not needed
    (save_file if suffix == ".safetensors" else torch.save)(vit.state_dict(), tmp_path / f"w{suffix}")
    encoder = R.build_encoder("timm:vit_tiny_patch16_224", 64, tmp_path / f"w{suffix}")
    assert torch.equal(encoder.vit.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
    assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, 16, 192)
    torch.save({k: v for k, v in vit.state_dict().items() if k != "blocks.0.norm1.bias"}, tmp_path / "bad.pt")
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


def test_released_names(monkeypatch, tmp_path):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: asked.append(a) or "x")
    assert R.released_file("released:mae-b", 1) == "x" and R.released_file("a/b.pt") == "a/b.pt"
    assert asked == [("nyu-visionx/RAE-collections", "stats/mae/base_p16/ImageNet1k/stat.pt")]
    with pytest.raises(ValueError, match="DiTDH-XL-256"):
        R.released_file("released:nothing")

    def offline(repo, file):
        raise ConnectionError
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="cannot be fetched .* pass its path"):
        R.released_file("released:dinov2-b")


# --------------------------------------------------------------------------------------- what the loops share

def test_batches_depend_on_seed_and_step_alone(tmp_path):
    save_images(tmp_path, 11, size=(48, 40))
    data = R.ImageFolder(tmp_path, 32, short=36)
    whole = R.Batches(data, 6, 0, True)
    halves = [R.Batches(data, 6, 0, True, None, rank, 2) for rank in (0, 1)]
    for step in (5, 0, 3):                             # in any order
        images = torch.cat([h[step][0] for h in halves])
        again = R.Batches(data, 6, 0, True)
        assert torch.equal(images, whole[step][0]) and torch.equal(images, again[step][0])
    assert not torch.equal(whole[0][0], R.Batches(data, 6, 1, True)[0][0])
    data.labels = np.arange(11)                        # each image its own, to see the order
    seen = torch.cat([whole[step][1] for step in range(4)]).tolist()
    assert sorted(seen[:11]) == sorted(seen[11:22]) == list(range(11)) and seen[:11] != seen[11:22]
    with pytest.raises(ValueError, match="--batch-size 6"):
        R.Batches(data, 6, 0, True, None, 0, 4)


def test_keyed_generators():
    a, b, c = (torch.randn(4, generator=R.keyed("cpu", *key)) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 1)))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_grid(tmp_path):
    R.save_grid(torch.rand(7, 3, 16, 16), tmp_path / "new" / "x.png", columns=3)
    assert Image.open(tmp_path / "new" / "x.png").size == (3 * 18 * 4, 3 * 18 * 4)


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    error = torch.tensor([0.1, 1.0]).view(2, 1, 1, 1)
    assert torch.allclose(R.psnr(a + error, a), torch.tensor([20.0, 0.0]), atol=1e-4)
