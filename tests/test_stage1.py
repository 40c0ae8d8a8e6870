"""Stage 1: LPIPS, discriminator, DiffAug, adaptive weight, metrics, and the loop with all of them on."""

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

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def toy():
    return R.load_rae("toy")


# --------------------------------------------------------------------------------------------- the loss terms

@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16 with random convolutions, in timm's names."""
    torch.manual_seed(0)
    path, state, c = tmp_path_factory.mktemp("vgg") / "vgg.pt", {}, 3
    layers = iter((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))
    for out in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        i = next(layers)
        state[f"features.{i}.weight"] = torch.randn(out, c, 3, 3) * math.sqrt(2 / 9 / c)
        state[f"features.{i}.bias"] = torch.randn(out) * 0.1
        c = out
    torch.save(state, path)
    return path


def test_lpips_is_lpips(vgg_file, capsys):
    lpips = pytest.importorskip("lpips", reason="the peer is not installed: pip install lpips")
    file = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    ours = T.lpips(SimpleNamespace(lpips_weights=str(file), vgg_weights=vgg_file), "cpu")
    assert "warning" not in capsys.readouterr().out, "the published file's hash"
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, model_path=str(file), verbose=False)
    state, ours_state = theirs.net.state_dict(), torch.load(vgg_file, weights_only=True)
    theirs.net.load_state_dict({k: ours_state[f"features.{k.split('.', 1)[1]}"] for k in state})
    a, b = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    b[0] = a[0] + 0.05 * torch.randn(3, 64, 64)
    want = theirs(2 * a - 1, 2 * b - 1).flatten()
    assert gap(ours(a, b), want) < 1e-6 and want.min() > 0.005
    a.requires_grad_(True)
    g, = torch.autograd.grad(ours(a, b).sum(), a)
    h, = torch.autograd.grad(theirs(2 * a - 1, 2 * b - 1).sum(), a)
    assert (g - h).norm() < 1e-4 * h.norm()


def test_lpips_weights_that_are_not_to_be_had(tmp_path, monkeypatch):
    def offline(*args, **kw):
        raise OSError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    args = SimpleNamespace(lpips_weights=None, vgg_weights=None)
    with pytest.raises(ValueError, match="d507d7349b931f0638a25a48a722f98a.*--lpips-weights FILE"):
        T.lpips(args, "cpu")
    args.lpips_weights = str(tmp_path / "w.pt")
    torch.save({"lin0.model.1.weight": torch.rand(1, 64, 1, 1)}, args.lpips_weights)
    with pytest.raises(ValueError, match="w.pt: .*lin1.model.1.weight.* missing"):
        T.lpips(args, "cpu")


def test_perceptual_distance_of_the_encoder(toy):
    distance = T.Perceptual(T.VitTaps(toy.encoder))
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert distance(a, a).abs().max() < 1e-6 and distance(a, b).min() > 0.01
    taps = [F.normalize(t, dim=2) for t in T.VitTaps(toy.encoder)(torch.cat([a, b]))]
    want = sum((t[:2] - t[2:]).square().sum(2).mean(1) for t in taps) / 5
    assert gap(distance(a, b), want) < 1e-5


def test_taps_are_the_blocks_of_the_paper():
    """DINO-S/8 at 224 px: 784 tokens after the last block, then after 2, 5, 8, 11, without norm and CLS."""
    import timm
    vit = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0,
                            dynamic_img_size=True, act_layer="gelu_tanh")
    assert R.ENCODERS["dino-s8"][0] == "vit_small_patch8_224.dino"
    assert R.ENCODERS["dino-s8"][4] == {"act_layer": "gelu_tanh"}
    encoder = R.Encoder(vit, 224, *R.IMAGENET)
    taps, seen = T.VitTaps(encoder), []
    assert taps.blocks == [2, 5, 8, 11]
    for i in (11, 2, 5, 8, 11):
        vit.blocks[i].register_forward_hook(lambda m, x, y: seen.append(y))
    images = torch.rand(1, 3, 32, 32)
    out = taps(images)
    assert [t.shape for t in out] == [(1, 784, 384)] * 5
    for got, want in zip(out, (seen[-1], seen[0], seen[1], seen[2], seen[-1])):
        assert torch.equal(got, want[:, 1:])
    big = F.interpolate(images, (224, 224), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in R.IMAGENET)
    assert gap(vit.patch_embed((big - mean) / std), vit.patch_embed((big - encoder.mean) / encoder.std)) == 0


def test_discriminator_norms():
    torch.manual_seed(0)
    d, taps = T.Discriminator(24, 2), [torch.randn(3, 16, 24) for _ in range(2)]
    for _ in range(50):                                # power iterations, in train mode only
        d(taps)
    convs = [m for m in d.modules() if isinstance(m, torch.nn.Conv1d)]
    assert len(convs) == 6
    for conv in convs:
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
    d.eval()
    whole = d(taps)
    assert torch.equal(whole, d(taps)), "no power iteration in eval mode"
    assert whole.shape == (3, 32) and gap(d([t[1:2] for t in taps])[0],
                                          whole[1]) < 1e-5, "norms are per image"
    with torch.no_grad():                              # one head by hand
        x = taps[0].transpose(1, 2)

        def norm(x, m):
            y = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
            return F.leaky_relu(y * m.weight[:, None] + m.bias[:, None], 0.2)
        x = norm(F.conv1d(x, d.first[0][0].weight, d.first[0][0].bias), d.first[0][1])
        around = torch.cat([x[:, :, -4:], x, x[:, :, :4]], 2)
        y = norm(F.conv1d(around, d.mix[0][0].weight, d.mix[0][0].bias), d.mix[0][1])
        want = F.conv1d((x + y) / 2 ** 0.5, d.last[0].weight, d.last[0].bias)
    assert gap(want[:, 0], whole[:, :16]) < 1e-5


def test_diffaug():
    x = 2 * torch.rand(2, 3, 16, 16) - 1
    middle = torch.full((2, 5), 0.5)
    assert gap(T.diffaug(x, middle), x) < 1e-6, "no shift, brightness + 0, saturation and contrast x 1"
    u = middle.clone()
    u[0, :2] = torch.tensor([0.0, 0.999])
    moved = T.diffaug(x, u)                            # the window starts 2 px above and 2 px to the right
    assert gap(moved[0, :, 2:, :-2], x[0, :, :-2, 2:]) < 1e-6 and gap(moved[1], x[1]) < 1e-6
    assert moved[0, :, :2].abs().max() < 1e-6 and moved[0, :, :, -2:].abs().max() < 1e-6
    for column, want in ((2, x + 0.25), (3, 1.5 * x - 0.5 * x.mean(1, keepdim=True)),
                         (4, 1.25 * x - 0.25 * x.mean((1, 2, 3), keepdim=True))):
        u = middle.clone()
        u[:, column] = 0.75
        assert gap(T.diffaug(x, u), want) < 1e-5
    image = x.clone().requires_grad_(True)
    T.diffaug(image, torch.rand(2, 5)).square().sum().backward()
    assert image.grad.abs().sum() > 0


def test_hinge():
    assert T.hinge(torch.tensor([2.0, 0.5, -3.0, 1.0])).item() == pytest.approx((0.25 + 1.0) / 2)


def test_adaptive_weight_by_hand():
    g1, g2 = torch.tensor([[3.0, 3.0]]), torch.tensor([[2.0, 0.0]])
    assert T.adaptive_weight(g1, g2).item() == pytest.approx(18 ** 0.5 / (2 + 1e-6), rel=1e-6)
    assert T.adaptive_weight(g1, 0 * g2).item() == 1e4


def test_the_gan_joins_in_the_last_layers_proportion(run, monkeypatch):
    """The last layer gets the reconstruction's gradient and, at --gan times its norm, the GAN's."""
    seen, weight, update = [], T.adaptive_weight, R.Optimizer.update

    def spy(self, *args):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return update(self, *args)
    monkeypatch.setattr(R.Optimizer, "update", spy)
    for gan in (0.0, 0.3):
        run("train_decoder.py", f"--gan {gan} --starts 0 0.9 0 --steps 1 --batch-size 4 --out {gan}",
            tiny=False)
    plain, both = (grads[-2] for grads in seen[:2])    # decoder_pred.weight
    assert (both - plain).norm() / plain.norm() == pytest.approx(0.3, rel=1e-4)
    assert weight(plain, both - plain) == pytest.approx(1 / 0.3, rel=1e-4)


def test_ssim_against_its_definition():
    rng = np.random.default_rng(0)
    a = rng.random((14, 13))
    b = np.clip(a + 0.1 * rng.normal(size=a.shape), 0, 1)
    g = np.exp(-(np.arange(11) - 5.0) ** 2 / (2 * 1.5 ** 2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    values = []
    for y in range(4):
        for x in range(3):
            p, q = a[y:y + 11, x:x + 11], b[y:y + 11, x:x + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            luminance = (2 * mp * mq + 1e-4) / (mp ** 2 + mq ** 2 + 1e-4)
            values.append(luminance * (2 * c + 9e-4) / (vp + vq + 9e-4))
    a, b = (torch.tensor(x, dtype=torch.float32).expand(2, 3, -1, -1) for x in (a, b))
    assert gap(T.ssim(a, b), torch.full((2,), float(np.mean(values)))) < 1e-5
    assert gap(T.ssim(a, a), torch.ones(2)) < 1e-6


# -------------------------------------------------------------------------------------------------- the loop

def log_of(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


def test_starts_keep_their_shape_in_short_runs(run):
    run("train_decoder.py", "--starts 0.25 0.5 0.75 --steps 8 --batch-size 4 --log-every 1 --eval-num 4",
        tiny=False)
    log = [x for x in log_of("out/decoder") if "l1" in x]
    for key, first in (("perceptual", 2), ("d_loss", 4), ("gan_weight", 6)):
        assert [x[key] > 0 for x in log] == [i >= first for i in range(8)], key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_precisions_train(run, precision):
    run("train_decoder.py", f"--precision {precision} --steps 45 --batch-size 16 --log-every 15 --eval-num 8 "
        "--starts 0 0.2 0.5", tiny=False)
    log = [x for x in log_of("out/decoder") if "l1" in x]
    assert log[-1]["l1"] < 0.7 * log[0]["l1"] and log[-1]["skipped"] == 0


def test_upsampling_decoder_trains(run):
    run("train_decoder.py", "--image-size 64 --upsample 2 --steps 60 --batch-size 16 --eval-every 20 "
        "--eval-num 16 --gan 0", tiny=False)
    log = [x["psnr"] for x in log_of("out/decoder") if "psnr" in x]
    assert log[-1] > log[0] + 2
    file = R.read_file("out/decoder/checkpoint.pt")
    assert file["config"]["patch_size"] == 16 and file["image_size"] == 32


def test_noise_is_off_in_the_checkpoints_use(run):
    run("train_decoder.py")
    rae = R.load_rae("out/decoder/checkpoint.pt")
    images = torch.rand(2, 3, 32, 32)
    assert not rae.training and torch.equal(rae.encode(images), rae.encode(images)) and rae.tau == 0


def test_a_nonfinite_loss_is_skipped_and_five_end_the_run(run, monkeypatch):
    noised, calls = R.RAE.noised, []

    def poisoned(bad):
        def f(self, tokens, generators=None):
            calls.append(1)
            return noised(self, tokens, generators) * (math.nan if len(calls) in bad else 1)
        return f
    flags = "--batch-size 8 --save-every 2 --log-every 1 --eval-every 20 --eval-num 8"
    monkeypatch.setattr(R.RAE, "noised", poisoned({2, 4, 5}))
    run("train_decoder.py", f"--steps 8 --out a {flags}", tiny=False)
    log = [x for x in log_of("a") if "l1" in x]
    assert [x["skipped"] for x in log] == [0, 1, 1, 2, 3, 3, 3, 3] and log[1]["l1"] == 0
    file = R.read_file("a/checkpoint.pt")
    assert all(v.isfinite().all() for v in file["model"].values())
    calls.clear()
    monkeypatch.setattr(R.RAE, "noised", poisoned(range(4, 99)))
    with pytest.raises(SystemExit, match="not finite for 5 steps in a row.*--lr or --precision"):
        run("train_decoder.py", f"--steps 20 --out b {flags}", tiny=False)
    assert len(calls) == 8
    file = R.read_file("b/checkpoint.pt")
    assert file["step"] in (4, 6) and all(v.isfinite().all() for v in file["model"].values())
    calls.clear()
    with pytest.raises(SystemExit, match="not finite for 5 steps"):
        run("train_diffusion.py", "--decoder b/checkpoint.pt --lr 1e30 --steps 20 --batch-size 8 --clip 0",
            tiny=False)


def test_published_critics_run(run, vgg_file, tmp_path):
    """LPIPS and DINO-S/8 with random weights in the published names; --eval-only gives the run's numbers."""
    import timm
    torch.save(timm.create_model("vit_small_patch8_224.dino", num_classes=0).state_dict(), "dino.pt")
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1)
                for i, c in enumerate((64, 128, 256, 512, 512))}, "lpips.pt")
    critics = f"--critics published --lpips-weights lpips.pt --vgg-weights {vgg_file} --dino-weights dino.pt"
    said = run("train_decoder.py", f"{critics} --steps 2 --batch-size 2 --starts 0 0 0.5 --log-every 1 "
               "--eval-num 4 --out d", tiny=False)
    assert "lpips.pt is not LPIPS' published file" in said
    log = log_of("d")
    assert log[1]["gan_weight"] > 0 and log[1]["perceptual"] > 0 and {"lpips", "lpips_noisy"} <= log[2].keys()
    file = R.read_file("d/checkpoint.pt")
    assert not any("vit" in k or "vgg" in k for part in ("model", "discriminator") for k in file[part])
    said = run("train_decoder.py",
               f"{critics} --eval-only --ckpt d/checkpoint.pt --eval-num 4 --batch-size 2",
               tiny=False)
    got = json.loads(said.splitlines()[-1])
    assert log[2].items() - {("step", 2)} <= got.items()


def test_rfid_with_inception_weights(run):
    from fid import InceptionV3
    torch.manual_seed(0)
    torch.save(InceptionV3().state_dict(), "inception.pt")
    run("train_decoder.py", "--steps 1 --batch-size 4 --eval-num 6 --inception inception.pt", tiny=False)
    log = log_of("out/decoder")[-1]
    assert log["rfid"] > 0 and "encoder_distance" not in log
    with pytest.raises(SystemExit, match="wants a decoder: pass --ckpt"):
        run("train_decoder.py", "--eval-only", tiny=False)


@pytest.mark.slow
def test_noise_augmented_decoding(tmp_path):
    """The paper's direction (T15): a little worse from clean latents, much better from noisy ones.

    Half of the default run, without the GAN, one seed; the README has three of the whole run."""
    result = []
    for tau in (0.0, 0.8):
        command = (f"{ROOT}/train_decoder.py --noise-tau {tau} --gan 0 --steps 400 --eval-every 400 "
                   f"--eval-num 2000 --eval-sigma 0.4 --out {tmp_path}/{tau}")
        done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        last = log_of(tmp_path / f"{tau}")[-1]
        result.append((last["psnr"], last["psnr_noisy"]))
    clean, noisy = (with_noise - without for without, with_noise in zip(*result))
    print(f"tau 0.8 against 0: clean {clean:+.2f} dB, noisy {noisy:+.2f} dB")
    assert clean > -1.5 and noisy > 1.5
