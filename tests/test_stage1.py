"""Stage 1: losses, the discriminator, DiffAug, noise, and the whole training loop."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, gap
from PIL import Image
from test_rae import save_images

import rae as R
import train_decoder as T


@pytest.fixture(scope="module")
def toy():
    return R.load_rae("toy")


# ---------------------------------------------------------------------------------------------
# The loss terms


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16 with random weights, in timm's names, with its classifier."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg.pt"
    vgg = timm.create_model("vgg16.tv_in1k", pretrained=False)
    for module in vgg.modules():
        if isinstance(module, torch.nn.Conv2d):  # features of later layers must not vanish
            torch.nn.init.kaiming_normal_(module.weight)
            torch.nn.init.normal_(module.bias, std=0.1)
    torch.save(vgg.state_dict(), path)
    return path


@pytest.mark.slow
def test_lpips_is_lpips(vgg_file):
    lpips = pytest.importorskip("lpips", reason="pip install lpips")
    file = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    ours = T.load_lpips(SimpleNamespace(lpips_weights=str(file), vgg_weights=vgg_file), "cpu")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, model_path=str(file), verbose=False)
    vgg = torch.load(vgg_file, weights_only=True)
    state = {k: vgg[f"features.{k.split('.', 1)[1]}"] for k in theirs.net.state_dict()}
    theirs.net.load_state_dict(state)
    a = torch.rand(3, 3, 64, 64)
    b = torch.rand(3, 3, 64, 64)
    b[0] = a[0] + 0.05 * torch.randn(3, 64, 64)
    want = theirs(2 * a - 1, 2 * b - 1).flatten()
    assert gap(ours(a, b), want) < 1e-6
    assert want.min() > 0.005
    a.requires_grad_(True)
    (g,) = torch.autograd.grad(ours(a, b).sum(), a)
    (h,) = torch.autograd.grad(theirs(2 * a - 1, 2 * b - 1).sum(), a)
    assert (g - h).norm() < 1e-4 * h.norm()


def test_lpips_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    args = SimpleNamespace(lpips_weights=None, vgg_weights=None)
    with pytest.raises(R.UsageError, match="cannot download .*vgg.pth.*pass --lpips-weights FILE"):
        T.load_lpips(args, "cpu")
    args.lpips_weights = tmp_path / "none.pth"
    with pytest.raises(R.UsageError, match="none.pth: no such file"):
        T.load_lpips(args, "cpu")


def test_perceptual_loss_of_the_encoder(toy):
    features = T.ViTFeatures(toy.encoder)
    distance = T.PerceptualLoss(features)
    a = torch.rand(2, 3, 32, 32)
    b = torch.rand(2, 3, 32, 32)
    assert distance(a, a).abs().max() < 1e-6
    assert distance(a, b).min() > 0.01
    want = 0
    for x in features(torch.cat([a, b])):
        x = F.normalize(x, dim=2)
        want = want + (x[:2] - x[2:]).square().sum(2).mean(1) / 5
    assert gap(distance(a, b), want) < 1e-5

    weights = list(torch.rand(5, 128))
    want = 0
    for x, w in zip(features(torch.cat([a, b])), weights):
        x = F.normalize(x, dim=2)
        want = want + ((x[:2] - x[2:]).square() * w).sum(2).mean(1)
    assert gap(T.PerceptualLoss(features, weights)(a, b), want) < 1e-5


def test_perceptual_losses_are_float32_under_autocast(toy):
    distance = T.PerceptualLoss(T.ViTFeatures(toy.encoder))
    a, b = torch.rand(2, 4, 3, 32, 32)
    exact = distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(a, b), exact)


def test_features_are_the_blocks_of_the_paper():
    """DINO-S/8 at 224 px: 784 tokens of the last block, then of 2, 5, 8, 11, without a norm."""
    import timm

    assert R.ENCODERS["dino-s8"] == (
        "vit_small_patch8_224.dino",
        True,
        {"act_layer": "gelu_tanh"},
    )
    vit = timm.create_model(
        "vit_small_patch8_224.dino",
        pretrained=False,
        num_classes=0,
        dynamic_img_size=True,
        act_layer="gelu_tanh",
    )
    encoder = R.Encoder(vit, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    features = T.ViTFeatures(encoder)
    assert features.blocks == [2, 5, 8, 11]
    assert features.num_layers == 5
    assert features.width == 384
    seen = {}
    for i in features.blocks:
        vit.blocks[i].register_forward_hook(lambda m, x, y, i=i: seen.update({i: y}))
    images = torch.rand(1, 3, 32, 32)
    out = features(images)
    assert [x.shape for x in out] == [(1, 784, 384)] * 5
    for got, i in zip(out, (11, 2, 5, 8, 11)):
        assert torch.equal(got, seen[i][:, 1:])


@pytest.mark.parametrize("depth, blocks", [(1, [0]), (2, [0, 1]), (5, [0, 1, 2, 4])])
def test_features_of_shallow_networks(depth, blocks):
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=depth, num_heads=2)
    features = T.ViTFeatures(R.Encoder(vit, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    assert features.blocks == blocks
    out = features(torch.rand(2, 3, 16, 16))
    assert [x.shape for x in out] == [(2, 4, 12)] * features.num_layers


def test_discriminator_norms():
    discriminator = T.Discriminator(24, num_layers=2)
    features = [torch.randn(3, 16, 24) for _ in range(2)]
    for _ in range(50):  # power iterations, in train mode only
        discriminator(features)
    convolutions = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv1d)]
    assert len(convolutions) == 6
    for conv in convolutions:
        norm = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1, abs=1e-3)
    discriminator.eval()
    whole = discriminator(features)
    assert torch.equal(whole, discriminator(features)), "no power iteration in eval mode"
    one = discriminator([x[1:2] for x in features])
    assert whole.shape == (3, 32)
    assert gap(one[0], whole[1]) < 1e-5, "norms are per image"

    # One head by hand.
    def norm(x, m):
        mean = x.mean(2, keepdim=True)
        var = x.var(2, unbiased=False, keepdim=True)
        y = (x - mean) / (var + 1e-6).sqrt()
        return F.leaky_relu(y * m.weight[:, None] + m.bias[:, None], 0.2)

    head = discriminator.heads[0]
    with torch.no_grad():
        x = features[0].transpose(1, 2)
        x = norm(F.conv1d(x, head.first[0].weight, head.first[0].bias), head.first[1])
        around = torch.cat([x[:, :, -4:], x, x[:, :, :4]], 2)
        y = norm(F.conv1d(around, head.mix[0].weight, head.mix[0].bias), head.mix[1])
        want = F.conv1d((x + y) / 2**0.5, head.last.weight, head.last.bias)
    assert gap(want[:, 0], whole[:, :16]) < 1e-5


def test_discriminator_norms_are_float32_under_autocast():
    head = T.DiscriminatorHead(8).eval()
    x = torch.randn(2, 30, 8)
    dtypes = []
    for layer in (head.first, head.mix):
        layer[0].register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
        layer[1].register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
    exact = head(x)
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        low = head(x).float()
    assert dtypes == [torch.bfloat16, torch.float32] * 2
    assert 0 < gap(low, exact) < 0.1 * exact.abs().max()


@pytest.mark.slow
def test_vgg_keeps_only_its_convolutions(vgg_file):
    vgg = T.VGGFeatures(vgg_file)
    assert sum(p.numel() for p in vgg.parameters()) == 14_714_688
    features = vgg(torch.rand(2, 3, 32, 32))
    sizes = [(2, 32 * 32, 64), (2, 16 * 16, 128), (2, 8 * 8, 256), (2, 4 * 4, 512), (2, 2 * 2, 512)]
    assert [x.shape for x in features] == sizes
    assert all(x.min() == 0 for x in features), "after the ReLU"


def test_diffaug():
    x = torch.rand(2, 3, 16, 16)
    neutral = torch.full((2, 5), 0.5)
    assert gap(T.diffaug(x, neutral), x) < 1e-6, "no shift, brightness + 0, the others x 1"
    u = neutral.clone()
    u[0, :2] = torch.tensor([0.0, 0.999])
    moved = T.diffaug(x, u)  # the window starts 2 px above and 2 px to the right
    assert gap(moved[0, :, 2:, :-2], x[0, :, :-2, 2:]) < 1e-6
    assert gap(moved[1], x[1]) < 1e-6
    assert (moved[0, :, :2] - 0.5).abs().max() < 1e-6, "gray outside"
    assert (moved[0, :, :, -2:] - 0.5).abs().max() < 1e-6

    x = 2 * x - 1  # what the definitions are about
    cases = (
        (2, x + 0.25),
        (3, 1.5 * x - 0.5 * x.mean(1, keepdim=True)),
        (4, 1.25 * x - 0.25 * x.mean((1, 2, 3), keepdim=True)),
    )
    for column, want in cases:
        u = neutral.clone()
        u[:, column] = 0.75
        assert gap(2 * T.diffaug((x + 1) / 2, u) - 1, want) < 1e-5
    image = x.clone().requires_grad_(True)
    T.diffaug(image, torch.rand(2, 5)).square().sum().backward()
    assert image.grad.abs().sum() > 0


def test_hinge_loss_by_hand():
    real = torch.tensor([2.0, 0.5])
    fake = torch.tensor([-3.0, 1.0])
    assert T.hinge_d_loss(real, fake).item() == pytest.approx((0.25 + 1.0) / 2)


def test_adaptive_weight_by_hand():
    g_rec = torch.tensor([[3.0, 3.0]])
    g_gan = torch.tensor([[2.0, 0.0]])
    weight = T.adaptive_weight(g_rec, g_gan)
    assert weight.item() == pytest.approx(18**0.5 / (2 + 1e-6), rel=1e-6)
    square = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = T.adaptive_weight(square, torch.eye(2))
    assert weight.item() == pytest.approx(30**0.5 / 2**0.5, rel=1e-5), "of all entries alike"
    assert T.adaptive_weight(g_rec, 0 * g_gan).item() == 1e4
    assert T.adaptive_weight(1e6 * g_rec, g_gan).item() == 1e4
    assert T.adaptive_weight(2e3 * g_rec, g_gan).item() == pytest.approx(2e3 * 18**0.5 / 2)
    assert T.adaptive_weight(0 * g_rec, 0 * g_gan).item() == 0
    assert not T.adaptive_weight(g_rec.requires_grad_(), g_gan.requires_grad_()).requires_grad


def test_learning_rate_of_the_published_discriminator():
    """Its own steps over the whole run's schedule: it begins with a warm-up and ends at 8.2e-5."""
    args = SimpleNamespace(**T.IMAGENET)
    start_d = round(0.375 * args.steps)
    assert T.learning_rate(0, args) == pytest.approx(2e-4 / 2502)
    assert T.learning_rate(2502, args) == pytest.approx(2e-4)
    assert T.learning_rate(args.steps, args) == pytest.approx(2e-5)
    assert T.learning_rate(args.steps - 1 - start_d, args) == pytest.approx(8.2e-5, rel=0.01)


def first_gradients(monkeypatch):
    """A list to which every optimizer adds its gradients when it first steps."""
    seen = []

    class AdamW(torch.optim.AdamW):
        fresh = True

        def step(self):
            if self.fresh:
                parameters = self.param_groups[0]["params"]
                seen.append([p.grad.to("cpu", copy=True) for p in parameters])
                self.fresh = False
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    return seen


def test_the_gan_joins_in_the_last_layers_proportion(run, monkeypatch):
    """The GAN's gradient at the last layer has --disc-weight times the reconstruction's norm."""
    seen = first_gradients(monkeypatch)
    for weight in (0.0, 0.3):
        flags = f"--disc-weight {weight} --starts 0 0.9 0 --steps 1 --global-batch-size 4"
        run("train_decoder.py", f"{flags} --eval-num 2 --out {weight}", tiny=False)
    plain = seen[0][-2]  # decoder_pred.weight
    both = seen[1][-2]
    assert (both - plain).norm() / plain.norm() == pytest.approx(0.3, rel=1e-4)
    assert T.adaptive_weight(plain, both - plain) == pytest.approx(1 / 0.3, rel=1e-4)


# ---------------------------------------------------------------------------------------------
# Noise and random crops


@pytest.mark.parametrize(
    "dist, mean", [("uniform", 0.4), ("half-normal", 0.8 * (2 / np.pi) ** 0.5)]
)
def test_noise_levels_and_noise(dist, mean):
    """Bounds of five standard deviations or more."""
    generator = torch.Generator().manual_seed(0)
    sigma = T.draw_sigma(4000, 0.8, dist, generator, "cpu")
    assert sigma.shape == (4000,)
    assert sigma.min() >= 0
    assert abs(sigma.mean() - mean) < 0.04
    second_moment = 0.8**2 / (3 if dist == "uniform" else 1)
    assert sigma.square().mean() == pytest.approx(second_moment, rel=0.12)
    assert (sigma.max() <= 0.8) == (dist == "uniform")
    assert torch.equal(sigma, T.draw_sigma(4000, 0.8, dist, generator.manual_seed(0), "cpu"))
    assert (T.draw_sigma(9, 0.0, dist) == 0).all()

    tokens = torch.randn(3, 5, 7)
    eps = torch.randn(3, 5, 7)
    noisy = T.add_noise(tokens, torch.tensor([0.0, 0.5, 2.0]), eps)
    assert torch.equal(noisy[0], tokens[0])
    assert gap(noisy[1], tokens[1] + 0.5 * eps[1]) < 1e-6
    assert gap(noisy[2], tokens[2] + 2 * eps[2]) < 1e-6


def test_random_crops_differ_and_stay_inside(tmp_path):
    save_images(tmp_path, 1, size=(64, 48))
    data = R.ImageFolder(tmp_path, 32, partial(T.random_crop, short_side=40))
    crops = [data.load(0, torch.Generator().manual_seed(i), False) for i in range(8)]
    assert len({crop.tobytes() for crop in crops}) > 4
    assert {crop.shape for crop in crops} == {(3, 32, 32)}
    again = data.load(0, torch.Generator().manual_seed(3), False)
    assert np.array_equal(again, crops[3])


def test_random_crops_are_cut_from_one_bicubic_step(tmp_path):
    """As in the official training: no halving first, whatever the size; every place is reached."""
    save_images(tmp_path, 1, size=(100, 64))
    image = R.open_image(tmp_path / "0.png")
    resized = np.asarray(image.resize((31, 20), Image.BICUBIC))
    places = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        crop = np.asarray(T.random_crop(image, 16, generator, 20))
        for top in range(5):
            for left in range(16):
                if np.array_equal(crop, resized[top : top + 16, left : left + 16]):
                    places.add((top, left))
    assert len(places) > 70
    assert {top for top, _ in places} == set(range(5))
    assert {left for _, left in places} == set(range(16))


# ---------------------------------------------------------------------------------------------
# The loop


def log_of(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


def test_starts_keep_their_shape_in_short_runs(run):
    flags = "--starts 0.25 0.5 0.75 --steps 8 --global-batch-size 4 --log-every 1 --eval-num 4"
    run("train_decoder.py", flags, tiny=False)
    log = [x for x in log_of("out/decoder") if "l1" in x]
    assert [x["step"] for x in log] == list(range(1, 9))
    for key, first in (("perceptual", 2), ("d_loss", 4), ("disc_weight", 6)):
        assert [x[key] > 0 for x in log] == [i >= first for i in range(8)], key


def test_weights_of_the_losses(run):
    flags = "--starts 0 0 0 --steps 1 --global-batch-size 4 --eval-num 2"
    for name, weights in (("on", ""), ("off", "--perceptual-weight 0 --disc-weight 0")):
        run("train_decoder.py", f"{flags} {weights} --out {name}", tiny=False)
        x = log_of(name)[0]
        assert x["l1"] > 0
        for key in ("perceptual", "disc_weight", "d_loss"):
            assert (x[key] > 0) == (name == "on"), key


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_precisions_train(run, precision):
    flags = f"--precision {precision} --steps 45 --global-batch-size 16 --log-every 15"
    run("train_decoder.py", f"{flags} --eval-num 8 --starts 0 0.2 0.5", tiny=False)
    log = [x for x in log_of("out/decoder") if "l1" in x]
    assert log[-1]["l1"] < 0.7 * log[0]["l1"]
    assert log[-1]["skipped"] == 0


@pytest.mark.parametrize("script", ["train_decoder.py", "train_diffusion.py"])
def test_the_encoder_runs_outside_autocast(run, monkeypatch, script):
    """In training as in the pass that makes the statistics: the latents are the same."""
    forward = R.Encoder.forward
    seen = []

    def noting(self, images):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, images)

    monkeypatch.setattr(R.Encoder, "forward", noting)
    run(script, "--precision bf16")
    assert len(seen) >= 4
    assert not any(seen)


@pytest.mark.slow
def test_upsampling_decoder_trains(run):
    flags = "--image-size 64 --upsample 2 --steps 60 --global-batch-size 16 --eval-every 20"
    run("train_decoder.py", f"{flags} --eval-num 16 --disc-weight 0", tiny=False)
    log = [x["psnr"] for x in log_of("out/decoder") if "psnr" in x]
    assert log[-1] > log[0] + 2


def test_upsampling_decoder_loads(run):
    flags = "--image-size 64 --upsample 2 --steps 1 --global-batch-size 4 --eval-num 2"
    run("train_decoder.py", flags, tiny=False)
    rae = R.load_rae("out/decoder/checkpoint.pt")
    assert rae.image_size == 64
    assert rae.decoder.patch_size == 16
    assert rae.encoder.input_size == 32
    images = torch.rand(2, 3, 64, 64)
    assert rae.decode(rae.encode(images)).shape == (2, 3, 64, 64)


def poison_noise(monkeypatch, bad):
    """Make the training noise of the steps in `bad`, counted from 0, NaN."""
    seeded_noise = R.seeded_noise

    def poisoned(keys, shape, device):
        noise = seeded_noise(keys, shape, device)
        return noise * torch.nan if keys[0][0] == "noise" and keys[0][2] in bad else noise

    monkeypatch.setattr(R, "seeded_noise", poisoned)


SHORT = "--global-batch-size 8 --log-every 1 --save-every 2"
TWO_SCRIPTS = [
    ("train_decoder.py", "out/decoder", f"{SHORT} --eval-every 20 --eval-num 8", "l1"),
    ("train_diffusion.py", "out/diffusion", f"{SHORT} --sample-every 20", "loss"),
]


@pytest.mark.parametrize("script, out, flags, loss", TWO_SCRIPTS, ids=["decoder", "diffusion"])
def test_a_step_that_is_not_finite_is_skipped(run, monkeypatch, script, out, flags, loss):
    """Also in the last step of all: the run is not lost."""
    poison_noise(monkeypatch, {1, 3, 4, 7})
    run(script, f"--steps 8 {flags}", tiny=False)
    log = [x for x in log_of(out) if loss in x]
    assert [x["skipped"] for x in log] == [0, 1, 1, 2, 3, 3, 3, 4]
    assert log[2][loss] > 0
    file = R.load(f"{out}/checkpoint.pt")
    assert file["step"] == 8
    for name in ("model", "ema"):
        assert all(v.isfinite().all() for v in file[name].values())
    assert {int(state["step"]) for state in file["optimizer"]["state"].values()} == {4}


@pytest.mark.parametrize("script, out, flags, loss", TWO_SCRIPTS, ids=["decoder", "diffusion"])
def test_five_steps_that_are_not_finite_end_the_run(run, monkeypatch, script, out, flags, loss):
    poison_noise(monkeypatch, range(3, 99))
    with pytest.raises(SystemExit, match="error: five non-finite gradients in a row.*--lr"):
        run(script, f"--steps 20 {flags}", tiny=False)
    log = log_of(out)
    assert [x["step"] for x in log] == list(range(1, 8)), "the eighth step, the fifth bad, ends it"
    file = R.load(f"{out}/checkpoint.pt")
    assert all(v.isfinite().all() for v in file["ema"].values())


def test_a_diverging_discriminator_does_not_reach_the_weights(run, monkeypatch):
    """A step whose discriminator gradient is not finite leaves the discriminator as it is."""
    relu = F.relu  # of the hinge loss: twice per step
    calls = []

    def poisoned(x):
        calls.append(x)
        return relu(x) * (torch.nan if len(calls) in (3, 4) else 1)

    monkeypatch.setattr(F, "relu", poisoned)
    run("train_decoder.py", f"--steps 4 --starts 0 0 0.9 {TWO_SCRIPTS[0][2]}", tiny=False)
    log = [x for x in log_of("out/decoder") if "l1" in x]
    assert [x["skipped"] for x in log] == [0, 1, 1, 1]
    file = R.load("out/decoder/checkpoint.pt")
    assert all(v.isfinite().all() for v in file["discriminator"].values())


@pytest.mark.slow
def test_published_loss_networks_run(run, vgg_file):
    """LPIPS and DINO-S/8 with random weights, under their published names."""
    import timm

    vit = timm.create_model("vit_small_patch8_224.dino", pretrained=False)
    torch.save(vit.state_dict(), "dino.pt")
    lpips = {}
    for layer, channels in enumerate((64, 128, 256, 512, 512)):
        lpips[f"lin{layer}.model.1.weight"] = torch.rand(1, channels, 1, 1)
    torch.save(lpips, "lpips.pt")
    flags = "--loss-networks published --lpips-weights lpips.pt --dino-weights dino.pt"
    flags += f" --vgg-weights {vgg_file} --global-batch-size 2 --eval-num 4"
    flags += " --steps 2 --starts 0 0 0.5 --log-every 1"
    run("train_decoder.py", flags, tiny=False)
    log = log_of("out/decoder")
    assert [x.get("step") for x in log] == [1, 2, 2]
    assert log[0]["perceptual"] > 0
    assert log[0]["d_loss"] > 0
    assert log[0]["disc_weight"] == 0
    assert log[1]["disc_weight"] > 0
    assert {"lpips", "lpips_noisy", "psnr", "encoder_distance"} <= log[2].keys()
    file = R.load("out/decoder/checkpoint.pt")
    names = [*file["model"], *file["discriminator"]]
    assert not any("vit" in name or "vgg" in name for name in names)


@pytest.mark.slow
def test_noise_augmented_decoding(tmp_path):
    """The paper's direction (T15): a little worse from clean latents, much better from noisy ones.

    Half of the default run, without the GAN, one seed.
    """
    clean = []
    noisy = []
    for tau in (0.0, 0.8):
        command = (
            f"{ROOT}/train_decoder.py --noise-tau {tau} --disc-weight 0 --steps 400 "
            f"--eval-every 400 --eval-num 2000 --eval-sigma 0.4 --out {tmp_path}/{tau}"
        )
        done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        last = log_of(tmp_path / f"{tau}")[-1]
        clean.append(last["psnr"])
        noisy.append(last["psnr_noisy"])
    print(
        f"tau 0.8 against 0: clean {clean[1] - clean[0]:+.2f}, noisy {noisy[1] - noisy[0]:+.2f} dB"
    )
    assert clean[1] - clean[0] > -1.5
    assert noisy[1] - noisy[0] > 1.5
