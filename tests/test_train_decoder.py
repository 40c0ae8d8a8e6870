"""train_decoder.py: statistics, losses, the discriminator, DiffAug, noise, and the loop."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import rae as R
import train_decoder as T
from sample import to_uint8
from tests.conftest import first_gradients, gap, load, log_of, relative_distance, save_images
from toy import world
from train_diffusion import StepBatches


@pytest.mark.parametrize("batch_size, num", [(7, 29), (4, 33), (100, 30)])
def test_statistics_equal_numpy(toy, batch_size, num, monkeypatch):
    """33 images in batches of 4 have a last batch of one. Some are read by a worker."""
    monkeypatch.setattr(world, "TOY", {"train": (num, 0)})
    data = world.ToyShapes()
    mean, var = T.latent_statistics(
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
    vgg = ours.features
    assert sum(p.numel() for p in vgg.parameters()) == 14_714_688, "without the classifier"
    assert want.min() > 0.005
    a.requires_grad_(True)
    (g,) = torch.autograd.grad(ours(a, b).sum(), a)
    (h,) = torch.autograd.grad(theirs(2 * a - 1, 2 * b - 1).sum(), a)
    assert (g - h).norm() < 1e-4 * h.norm()


def test_perceptual_loss_of_the_encoder(toy):
    features = T.ViTFeatures(toy.encoder)
    a, b = torch.rand(2, 2, 3, 32, 32)
    for weights in (None, list(torch.rand(5, 128))):
        want = 0
        for i, x in enumerate(features(torch.cat([a, b]))):
            x = F.normalize(x, dim=2)
            w = 1 / 5 if weights is None else weights[i]
            want = want + ((x[:2] - x[2:]).square() * w).sum(2).mean(1)
        distance = T.PerceptualLoss(features, weights)
        assert gap(distance(a, b), want) < 1e-5
        assert want.min() > 0.01
        assert distance(a, a).abs().max() < 1e-6


def test_perceptual_losses_are_float32_under_autocast(toy):
    distance = T.PerceptualLoss(T.ViTFeatures(toy.encoder))
    a, b = torch.rand(2, 4, 3, 32, 32)
    exact = distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(a, b), exact)


def test_features_are_the_blocks_of_the_paper():
    """DINO-S/8 at 224 px: 784 tokens of the last block, then of 2, 5, 8, 11, without a norm."""
    import timm

    name, antialias, options = R.ENCODERS["dino-s8"]
    assert (name, antialias) == ("vit_small_patch8_224.dino", True)
    assert options == {"act_layer": "gelu_tanh"}
    vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    features = T.ViTFeatures(R.Encoder(vit, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert features.blocks == [2, 5, 8, 11]
    assert (features.num_layers, features.width) == (5, 384)
    seen = {}
    for i in features.blocks:
        vit.blocks[i].register_forward_hook(lambda m, x, y, i=i: seen.update({i: y}))
    out = features(torch.rand(1, 3, 32, 32))
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
    for layer in (*head.first[:2], *head.mix[:2]):
        layer.register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
    exact = head(x)
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        low = head(x).float()
    assert dtypes == [torch.bfloat16, torch.float32] * 2
    assert 0 < gap(low, exact) < 0.1 * exact.abs().max()


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


def test_the_first_step_by_hand(run, monkeypatch):
    """The gradients of both networks with all losses on, and the EMA."""
    gradients = first_gradients(monkeypatch)
    flags = "--steps 1 --global-batch-size 8 --eval-num 20 --starts 0 0 0 --noise-tau 0.5"
    run("train_decoder.py", flags, tiny=False)
    checkpoint = load("out/decoder/checkpoint.pt")

    encoder = R.load_encoder("toy", 32)
    args = SimpleNamespace(seed=0, global_batch_size=8, micro_batch_size=None)
    images = StepBatches(R.open_data("toy", 32), args, False, 0, 1)[0][0].float() / 255
    torch.manual_seed(0)
    decoder = R.Decoder(128, 4, 8, *R.DECODERS["toy"])
    features = T.ViTFeatures(encoder)
    discriminator = T.Discriminator(features.width, features.num_layers).eval()
    generator = R.seeded_generator("step", 0, 0)
    sigma = T.draw_sigma(8, 0.5, "uniform", generator)
    u_decoder, u_real, u_fake = torch.rand(8, 3, 5, generator=generator).unbind(1)
    z = encoder(images)
    eps = R.seeded_noise([("noise", 0, 0, row) for row in range(8)], z.shape[1:], "cpu")

    fake = encoder.denormalize(decoder(T.add_noise(z, sigma, eps)))
    rec_loss = (fake - images).abs().mean() + T.PerceptualLoss(features)(fake, images).mean()
    g_loss = -discriminator(features(T.diffaug(fake, u_decoder))).mean()
    last = decoder.decoder_pred.weight
    grads = [torch.autograd.grad(x, last, retain_graph=True)[0] for x in (rec_loss, g_loss)]
    (rec_loss + 0.1 * T.adaptive_weight(*grads) * g_loss).backward()
    assert relative_distance(gradients[0], [p.grad for p in decoder.parameters()]) < 1e-5
    for name, weight in decoder.state_dict().items():
        want = torch.lerp(weight, checkpoint["model"][name], 0.9)
        assert torch.allclose(checkpoint["ema"][name], want, atol=1e-6), name

    decoder.load_state_dict(checkpoint["model"])  # the discriminator sees the updated decoder
    with torch.no_grad():
        fake = to_uint8(encoder.denormalize(decoder(z))) / 255
    discriminator.zero_grad()
    discriminator.train()
    logits_fake = discriminator(features(T.diffaug(fake, u_fake)))
    logits_real = discriminator(features(T.diffaug(images, u_real)))
    T.hinge_d_loss(logits_real, logits_fake).backward()
    assert relative_distance(gradients[1], [p.grad for p in discriminator.parameters()]) < 1e-5


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


def test_learning_rate_of_the_published_discriminator():
    """Its own steps over the whole run's schedule: it begins with a warm-up and ends at 8.2e-5."""
    args = SimpleNamespace(**T.IMAGENET)
    start_d = round(0.375 * args.steps)
    assert T.learning_rate(0, args) == pytest.approx(2e-4 / 2502)
    assert T.learning_rate(2502, args) == pytest.approx(2e-4)
    assert T.learning_rate(args.steps, args) == pytest.approx(2e-5)
    assert T.learning_rate(args.steps - 1 - start_d, args) == pytest.approx(8.2e-5, rel=0.01)


def test_starts_keep_their_shape_in_short_runs(run):
    flags = "--starts 0.25 0.5 0.75 --steps 8 --global-batch-size 4 --log-every 1 --eval-num 4"
    run("train_decoder.py", flags, tiny=False)
    log = [x for x in log_of("out/decoder") if "l1" in x]
    assert [x["step"] for x in log] == list(range(1, 9))
    for key, first in (("perceptual", 2), ("d_loss", 4), ("gan_weight", 6)):
        assert [x[key] > 0 for x in log] == [i >= first for i in range(8)], key


def test_weight_zero_turns_a_loss_off(run):
    flags = "--starts 1 0 0 --disc-weight 0"
    run("train_decoder.py", f"{flags} --steps 1 --global-batch-size 4 --eval-num 2", tiny=False)
    line = log_of("out/decoder")[0]
    assert line["l1"] > 0
    assert line["perceptual"] == line["gan_weight"] == line["d_loss"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_precisions_train(run, precision):
    flags = f"--precision {precision} --steps 45 --global-batch-size 16 --log-every 15"
    run("train_decoder.py", f"{flags} --eval-num 8 --starts 0 0.2 0.5", tiny=False)
    log = [x for x in log_of("out/decoder") if "l1" in x]
    assert log[-1]["l1"] < 0.7 * log[0]["l1"]
    assert log[-1]["skipped"] == 0


def test_an_upsampling_decoder_loads(run):
    flags = "--image-size 64 --upsample 2 --steps 1 --global-batch-size 4 --eval-num 2"
    run("train_decoder.py", flags, tiny=False)
    rae = R.load_rae("out/decoder/checkpoint.pt")
    assert (rae.image_size, rae.decoder.patch_size, rae.encoder.input_size) == (64, 16, 32)
    images = torch.rand(2, 3, 64, 64)
    assert rae.decode(rae.encode(images)).shape == (2, 3, 64, 64)


def test_a_diverging_discriminator_does_not_reach_the_weights(run, monkeypatch):
    """A step whose discriminator gradient is not finite leaves the discriminator as it is."""
    relu = F.relu  # of the hinge loss: twice per step
    calls = []

    def poisoned(x):
        calls.append(x)
        return relu(x) * (torch.nan if len(calls) in (3, 4) else 1)

    monkeypatch.setattr(F, "relu", poisoned)
    flags = "--global-batch-size 8 --steps 4 --starts 0 0 0.9 --log-every 1 --eval-num 8"
    run("train_decoder.py", flags, tiny=False)
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
    run("train_decoder.py", f"{flags} --steps 2 --starts 0 0 0.5 --log-every 1", tiny=False)
    first, second, scores = log_of("out/decoder")
    assert first["perceptual"] > 0 and first["d_loss"] > 0
    assert first["gan_weight"] == 0 and second["gan_weight"] > 0
    assert {"lpips", "lpips_noisy", "psnr", "encoder_distance"} <= scores.keys()
    file = R.load("out/decoder/checkpoint.pt")
    names = [*file["model"], *file["discriminator"]]
    assert not any("vit" in name or "vgg" in name for name in names)


@pytest.mark.slow
def test_noise_augmented_decoding(run, monkeypatch):
    """The paper's direction (T15): a little worse from clean latents, much better from noisy ones.

    An eighth of the default run, on fewer images and without the GAN, one seed.
    """
    monkeypatch.setattr(world, "TOY", {"train": (2000, 0), "val": (100, 1)})
    clean = []
    noisy = []
    for tau in (0.0, 0.8):
        flags = f"--noise-tau {tau} --disc-weight 0 --steps 160 --eval-every 160 --eval-num 100"
        flags += f" --global-batch-size 32 --eval-sigma 0.8 --out {tau}"
        run("train_decoder.py", flags, tiny=False)
        last = log_of(f"{tau}")[-1]
        clean.append(last["psnr"])
        noisy.append(last["psnr_noisy"])
    print("clean", clean, "noisy", noisy)
    assert clean[1] - clean[0] > -1.5
    assert noisy[1] - noisy[0] > 1
