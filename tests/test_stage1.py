"""Stage 1: LPIPS, the discriminator, DiffAug, the adaptive weight, metrics, and the whole loop."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, gap

import rae as R
import train_decoder as T


@pytest.fixture(scope="module")
def toy():
    return R.load_rae("toy")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------
# The loss terms


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16 with random convolutions, in timm's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg.pt"
    layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    state = {}
    channels = 3
    for layer, width in zip(layers, widths):
        weight = torch.randn(width, channels, 3, 3) * math.sqrt(2 / 9 / channels)
        state[f"features.{layer}.weight"] = weight
        state[f"features.{layer}.bias"] = torch.randn(width) * 0.1
        channels = width
    torch.save(state, path)
    return path


@pytest.mark.slow
def test_lpips_is_lpips(vgg_file, capsys):
    lpips = pytest.importorskip("lpips", reason="the peer is not installed: pip install lpips")
    file = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    args = SimpleNamespace(lpips_weights=str(file), vgg_weights=vgg_file)
    ours = T.load_lpips(args, "cpu")
    assert "warning" not in capsys.readouterr().out, "the published file's hash"
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


def test_lpips_weights_that_are_not_to_be_had(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    args = SimpleNamespace(lpips_weights=None, vgg_weights=None)
    with pytest.raises(ValueError, match="a78928a0af1e5f0f.*--lpips-weights FILE"):
        T.load_lpips(args, "cpu")
    args.lpips_weights = str(tmp_path / "w.pt")
    torch.save({"lin0.model.1.weight": torch.rand(1, 64, 1, 1)}, args.lpips_weights)
    with pytest.raises(ValueError, match="w.pt: .*lin1.model.1.weight is missing"):
        T.load_lpips(args, "cpu")


def test_perceptual_distance_of_the_encoder(toy):
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


def test_perceptual_distances_are_float32_under_autocast(toy):
    distance = T.PerceptualLoss(T.ViTFeatures(toy.encoder))
    a, b = torch.rand(2, 4, 3, 32, 32)
    exact = distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(a, b), exact)


def test_features_are_the_blocks_of_the_paper():
    """DINO-S/8 at 224 px: 784 tokens of the last block, then of 2, 5, 8, 11, not normed."""
    import timm

    entry = R.ENCODERS["dino-s8"]
    assert entry["model"] == "vit_small_patch8_224.dino"
    assert entry["timm_options"] == {"act_layer": "gelu_tanh"}
    vit = timm.create_model(
        "vit_small_patch8_224.dino",
        pretrained=False,
        num_classes=0,
        dynamic_img_size=True,
        act_layer="gelu_tanh",
    )
    encoder = R.Encoder(vit, 224, R.IMAGENET_MEAN, R.IMAGENET_STD)
    features = T.ViTFeatures(encoder)
    assert features.blocks == [2, 5, 8, 11]
    seen = {}
    for i in features.blocks:
        vit.blocks[i].register_forward_hook(lambda m, x, y, i=i: seen.update({i: y}))
    images = torch.rand(1, 3, 32, 32)
    out = features(images)
    assert [x.shape for x in out] == [(1, 784, 384)] * 5
    for got, i in zip(out, (11, 2, 5, 8, 11)):
        assert torch.equal(got, seen[i][:, 1:])


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
    (whole,) = discriminator(features)
    assert torch.equal(whole, discriminator(features)[0]), "no power iteration in eval mode"
    (one,) = discriminator([x[1:2] for x in features])
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


def test_vgg_comes_without_its_classifier(vgg_file):
    vgg = T.VGGFeatures(vgg_file)
    assert sum(p.numel() for p in vgg.parameters()) == 14_714_688  # its 13 convolutions


def test_two_batches_in_one_call_are_two_calls():
    """Each with a power iteration of its own, and gradients to both."""
    one = T.Discriminator(24, num_layers=2)
    two = T.Discriminator(24, num_layers=2)
    two.load_state_dict(one.state_dict())
    fake = [torch.randn(3, 16, 24) for _ in range(2)]
    real = [torch.randn(3, 16, 24) for _ in range(2)]
    together = one(fake, real)
    apart = [two(fake)[0], two(real)[0]]
    assert torch.equal(together[0], apart[0])
    assert torch.equal(together[1], apart[1])
    T.hinge_loss(together[1], together[0]).backward()
    assert all(p.grad is not None for p in one.parameters())


def test_diffaug():
    x = 2 * torch.rand(2, 3, 16, 16) - 1
    middle = torch.full((2, 5), 0.5)
    assert gap(T.diffaug(x, middle), x) < 1e-6, "no shift, brightness + 0, the others x 1"
    u = middle.clone()
    u[0, :2] = torch.tensor([0.0, 0.999])
    moved = T.diffaug(x, u)  # the window starts 2 px above and 2 px to the right
    assert gap(moved[0, :, 2:, :-2], x[0, :, :-2, 2:]) < 1e-6
    assert gap(moved[1], x[1]) < 1e-6
    assert moved[0, :, :2].abs().max() < 1e-6
    assert moved[0, :, :, -2:].abs().max() < 1e-6
    cases = (
        (2, x + 0.25),
        (3, 1.5 * x - 0.5 * x.mean(1, keepdim=True)),
        (4, 1.25 * x - 0.25 * x.mean((1, 2, 3), keepdim=True)),
    )
    for column, want in cases:
        u = middle.clone()
        u[:, column] = 0.75
        assert gap(T.diffaug(x, u), want) < 1e-5
    image = x.clone().requires_grad_(True)
    T.diffaug(image, torch.rand(2, 5)).square().sum().backward()
    assert image.grad.abs().sum() > 0


def test_losses_by_hand():
    real = torch.tensor([2.0, 0.5])
    fake = torch.tensor([-3.0, 1.0])
    assert T.hinge_loss(real, fake).item() == pytest.approx((0.25 + 1.0) / 2)
    assert T.generator_loss(fake).item() == pytest.approx(1.0)


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
    """A list to which every optimiser adds its gradients when it first steps."""
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
    """The last layer gets the reconstruction's gradient and the GAN's at --gan times its norm."""
    seen = first_gradients(monkeypatch)
    for gan in (0.0, 0.3):
        flags = f"--gan {gan} --starts 0 0.9 0 --steps 1 --global-batch-size 4 --out {gan}"
        run("train_decoder.py", flags, tiny=False)
    plain = seen[0][-2]  # decoder_pred.weight
    both = seen[1][-2]
    assert (both - plain).norm() / plain.norm() == pytest.approx(0.3, rel=1e-4)
    assert T.adaptive_weight(plain, both - plain) == pytest.approx(1 / 0.3, rel=1e-4)


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
    assert gap(T.ssim(a, b), torch.full((2,), float(np.mean(values)))) < 1e-5
    assert gap(T.ssim(a, a), torch.ones(2)) < 1e-6


# ---------------------------------------------------------------------------------------------
# The loop


def log_of(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


def test_starts_keep_their_shape_in_short_runs(run):
    flags = "--starts 0.25 0.5 0.75 --steps 8 --global-batch-size 4 --log-every 1 --eval-num 4"
    run("train_decoder.py", flags, tiny=False)
    log = [x for x in log_of("out/decoder") if "l1" in x]
    for key, first in (("perceptual", 2), ("d_loss", 4), ("gan_weight", 6)):
        assert [x[key] > 0 for x in log] == [i >= first for i in range(8)], key


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


def test_upsampling_decoder_trains(run):
    flags = "--image-size 64 --upsample 2 --steps 60 --global-batch-size 16 --eval-every 20"
    run("train_decoder.py", f"{flags} --eval-num 16 --gan 0", tiny=False)
    log = [x["psnr"] for x in log_of("out/decoder") if "psnr" in x]
    assert log[-1] > log[0] + 2
    rae = R.load_rae("out/decoder/checkpoint.pt")
    assert rae.image_size == 64
    assert rae.decoder.patch_size == 16
    assert rae.encoder.input_size == 32


def test_noise_is_off_in_the_checkpoints_use(run):
    run("train_decoder.py")
    rae = R.load_rae("out/decoder/checkpoint.pt")
    images = torch.rand(2, 3, 32, 32)
    assert not rae.training
    assert rae.tau == 0
    assert torch.equal(rae.encode(images), rae.encode(images))


def test_a_nonfinite_loss_is_skipped_and_five_end_the_run(run, monkeypatch):
    noised = R.RAE.noised
    calls = []

    def poison(bad):
        def poisoned(self, tokens, generators=None):
            calls.append(1)
            factor = math.nan if len(calls) in bad else 1
            return noised(self, tokens, generators) * factor

        calls.clear()
        monkeypatch.setattr(R.RAE, "noised", poisoned)

    flags = "--global-batch-size 8 --log-every 1 --eval-every 20 --eval-num 8 --save-every 2"
    poison({2, 4, 5})
    run("train_decoder.py", f"--steps 8 --out a {flags}", tiny=False)
    log = [x for x in log_of("a") if "l1" in x]
    assert [x["skipped"] for x in log] == [0, 1, 0, 1, 1, 0, 0, 0]
    assert log[1]["l1"] == 0
    file = R.read_file("a/checkpoint.pt")
    assert all(v.isfinite().all() for v in file["model"].values())

    poison(range(4, 99))
    with pytest.raises(SystemExit, match="not finite for 5 steps in a row.*--lr or --precision"):
        run("train_decoder.py", f"--steps 20 --out b {flags}", tiny=False)
    assert len(calls) == 8
    assert R.read_file("b/checkpoint.pt")["step"] == 2, "none is written while steps are skipped"

    monkeypatch.setattr(R.RAE, "noised", noised)
    flags = "--decoder a/checkpoint.pt --lr 1e9 --steps 20 --global-batch-size 8 --clip 0"
    with pytest.raises(SystemExit, match="not finite for 5 steps"):
        run("train_diffusion.py", f"{flags} --save-every 1", tiny=False)
    file = R.read_file("out/diffusion/checkpoint.pt")
    assert file["step"] < 5
    last = log_of("out/diffusion")
    assert not last, "no line is due in so few steps"


@pytest.mark.slow
def test_published_critics_run(run, vgg_file, tmp_path):
    """LPIPS and DINO-S/8 with random weights, in the published names; --eval-only agrees."""
    import timm

    vit = timm.create_model("vit_small_patch8_224.dino", num_classes=0)
    torch.save(vit.state_dict(), "dino.pt")
    lpips = {}
    for layer, channels in enumerate((64, 128, 256, 512, 512)):
        lpips[f"lin{layer}.model.1.weight"] = torch.rand(1, channels, 1, 1)
    torch.save(lpips, "lpips.pt")
    critics = "--critics published --lpips-weights lpips.pt --dino-weights dino.pt"
    critics += f" --vgg-weights {vgg_file} --global-batch-size 2 --eval-num 4"
    said = run(
        "train_decoder.py",
        f"{critics} --steps 2 --starts 0 0 0.5 --log-every 1 --out d",
        tiny=False,
    )
    assert "lpips.pt is not LPIPS' published file" in said
    log = log_of("d")
    assert log[1]["gan_weight"] > 0
    assert log[1]["perceptual"] > 0
    assert {"lpips", "lpips_noisy"} <= log[2].keys()
    file = R.read_file("d/checkpoint.pt")
    names = [*file["model"], *file["discriminator"]]
    assert not any("vit" in name or "vgg" in name for name in names)
    said = run("train_decoder.py", f"{critics} --eval-only --ckpt d/checkpoint.pt", tiny=False)
    got = json.loads(said.splitlines()[-1])
    del log[2]["step"]
    assert log[2].items() <= got.items()


@pytest.mark.slow
def test_rfid_with_inception_weights(run):
    from fid import InceptionV3

    torch.save(InceptionV3().state_dict(), "inception.pt")
    flags = "--steps 1 --global-batch-size 4 --eval-num 6 --inception inception.pt"
    run("train_decoder.py", flags, tiny=False)
    log = log_of("out/decoder")[-1]
    assert log["rfid"] > 0
    assert "encoder_distance" not in log
    with pytest.raises(SystemExit, match="wants a decoder: pass --ckpt"):
        run("train_decoder.py", "--eval-only", tiny=False)


@pytest.mark.slow
def test_noise_augmented_decoding(tmp_path):
    """The paper's direction (T15): a little worse from clean latents, much better from noisy ones.

    Half of the default run, without the GAN, one seed.
    """
    clean = []
    noisy = []
    for tau in (0.0, 0.8):
        command = (
            f"{ROOT}/train_decoder.py --noise-tau {tau} --gan 0 --steps 400 --eval-every 400 "
            f"--eval-num 2000 --eval-sigma 0.4 --out {tmp_path}/{tau}"
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
