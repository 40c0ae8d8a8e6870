"""Stage 1: train the ViT decoder of a frozen encoder's latents, on noised latents (sections 3, 4.3 and C).

    python train_decoder.py                                              # the toy world -> out/decoder
    python train_decoder.py --data FOLDER --encoder my_encoder.pt        # own images
    torchrun --standalone --nproc_per_node=8 train_decoder.py --preset imagenet256 --data imagenet/train
    python train_decoder.py --eval-only --ckpt out/decoder/checkpoint.pt # the numbers of a decoder

L = L1 + perceptual + 0.75 lambda GAN, by two frozen critics (--critics): LPIPS (VGG16) and a discriminator on
DINO-S/8, or offline the frozen encoder itself. Writes checkpoint.pt (EMA decoder, latent statistics, what a
resume needs), grid_*.png (rows: input, reconstruction, reconstruction from noisy latents) and log.jsonl.
"""

import copy, hashlib, json, math
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fid import Moments, frechet_distance, load_inception
from rae import (DECODERS, RAE, RANK, WORLD, Batches, Decoder, Optimizer, Run, autocast, average,
                 build_encoder, check, cli, keyed, keyed_noise, keyed_numpy, latent_statistics, load_rae,
                 load_released_decoder, load_strict, load_timm, open_data, parser, positive, psnr, read_file,
                 read_images, released_file, save_grid, say, start, update_ema)

# ImageNet: 2,502 steps an epoch of 1,281,167 images, 16 epochs (Table 12; as released where they differ).
IMAGENET = dict(data="imagenet/train", encoder="dinov2-b", image_size=256, resize=384, size="XL", gan=0.75,
                critics="published", batch_size=512, steps=40032, lr=2e-4, lr_end=2e-5, warmup=2502,
                ema=0.9978, workers=12, log_every=100, eval_every=2500, eval_num=2000, save_every=2500)
TOY = dict(data="toy", encoder="toy", image_size=32, size="toy", gan=0.1,
           critics="encoder", batch_size=64, steps=800, lr=2e-3, lr_end=1e-4, warmup=50,
           ema=0.99, workers=0, log_every=100, eval_every=200, eval_num=500, save_every=400)
PRESETS = dict(toy=TOY, imagenet256=IMAGENET, imagenet512=IMAGENET | dict(image_size=512, resize=768))
LPIPS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
LPIPS_MD5 = "d507d7349b931f0638a25a48a722f98a"

# ----------------------------------------------------------------------------------------- the frozen critics
class VitTaps(nn.Module):
    """Tokens (B, N, C), not normed, of a frozen ViT's last block and of each quarter, of images in [0, 1]."""
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.width, depth = encoder, encoder.dim, len(encoder.vit.blocks)
        self.blocks = sorted({max(1, depth * k // 4) - 1 for k in (1, 2, 3, 4)})
    def forward(self, images):
        e = self.encoder
        if images.shape[-1] != e.input_size:
            images = F.interpolate(images, (e.input_size, e.input_size), mode="bilinear")
        taps = e.vit.forward_intermediates((images - e.mean) / e.std, indices=self.blocks, output_fmt="NLC",
                                           intermediates_only=True)
        return [taps[-1], *taps]

class VggTaps(nn.Module):
    """relu1_2, 2_2, 3_3, 4_3 and 5_3 of VGG16, as LPIPS sees images in [0, 1]: five of (B, positions, C)."""
    def __init__(self, weights=None):
        super().__init__()
        self.vgg = load_timm("vgg16.tv_in1k", weights, "--vgg-weights", unused=("pre_logits.", "head."))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False).eval()
    def forward(self, images):
        images = (2 * images - 1 - self.mean) / self.std
        taps = self.vgg.forward_intermediates(images, range(5), stop_early=True, intermediates_only=True)
        return [x.flatten(2).transpose(1, 2) for x in taps]

class Perceptual(nn.Module):
    """Distance (B,) of two batches of images in [0, 1], LPIPS for VggTaps with its learned weights: squared
    difference of unit features, weighted by channel (1 / taps unless given), mean over positions, summed."""
    def __init__(self, taps, weights=None):
        super().__init__()
        self.taps, self.weights = taps, weights
    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            a, b = self.taps(a.float()), self.taps(b.float())
            a, b = ([x / (x.norm(dim=2, keepdim=True) + 1e-10) for x in taps] for taps in (a, b))
            weights = self.weights or [torch.full_like(a[0][0, 0], 1 / len(a))] * len(a)
            return sum(((x - y).square() @ w).mean(1) for x, y, w in zip(a, b, weights))  # (B,)

def lpips(args, device):
    """LPIPS of VGG16 (v0.1), its learned weights from a file or fetched once; their hash is checked."""
    path = Path(args.lpips_weights or Path(torch.hub.get_dir(), "checkpoints", "lpips_vgg.pth"))
    if not path.is_file() and not args.lpips_weights:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(LPIPS_URL, str(path), progress=False)
        except OSError as e:
            raise ValueError(f"LPIPS' weights cannot be fetched ({type(e).__name__}); download {LPIPS_URL} "
                             f"(md5 {LPIPS_MD5}) and pass --lpips-weights FILE") from None
    file, names = read_file(path), [f"lin{i}.model.1.weight" for i in range(5)]
    missing = ", ".join(name for name in names if name not in file)
    check(not missing, f"{path}: not LPIPS' VGG weights, {missing} missing")
    if hashlib.md5(path.read_bytes()).hexdigest() != LPIPS_MD5:
        say(f"warning: {path} is not LPIPS' published file (md5 {LPIPS_MD5})")
    return Perceptual(VggTaps(args.vgg_weights).to(device), [file[k].flatten().to(device) for k in names])

class Discriminator(nn.Module):
    """The trained part of D, a head per tap of (B, N, C) -> logits (B, taps N), one per token. Norms are over
    the tokens of one image, and all convolutions are spectrally normalised (appendix C)."""
    def __init__(self, width, taps):
        super().__init__()
        def conv(out, kernel):
            return spectral_norm(nn.Conv1d(width, out, kernel, padding=kernel // 2, padding_mode="circular"))
        def layer(kernel):
            norm = nn.InstanceNorm1d(width, eps=1e-6, affine=True)
            return nn.Sequential(conv(width, kernel), norm, nn.LeakyReLU(0.2))
        self.first = nn.ModuleList(layer(1) for _ in range(taps))
        self.mix = nn.ModuleList(layer(9) for _ in range(taps))
        self.last = nn.ModuleList(conv(1, 1) for _ in range(taps))
    def forward(self, taps):
        logits = []
        for first, mix, last, x in zip(self.first, self.mix, self.last, taps):
            x = first(x.transpose(1, 2))                                              # (B, C, N)
            logits.append(last((mix(x) + x) / math.sqrt(2)).squeeze(1))               # (B, N)
        return torch.cat(logits, 1).float()

def diffaug(x, u):
    """DiffAug (Zhao et al. 2020) of images (B, 3, H, W) in [-1, 1] by uniform u (B, 5): a shift of up to an
    eighth, zero-padded, then brightness + U(-.5, .5), saturation x U(0, 2), contrast x U(.5, 1.5)."""
    size, s = x.shape[-1], round(x.shape[-1] / 8)
    corners = (u[:, :2] * (2 * s + 1)).long().tolist()
    x = torch.stack([image[:, top:top + size, left:left + size]
                     for image, (top, left) in zip(F.pad(x, [s] * 4), corners)])
    brightness, saturation, contrast = u[:, 2:].T[..., None, None, None].to(x)
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean

def hinge(logits):
    """Discriminator's loss of logits whose first half saw real images, the second reconstructions."""
    real, fake = logits.chunk(2)
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2

def adaptive_weight(of_reconstruction, of_gan):
    """lambda = |grad reconstruction| / (|grad GAN| + 1e-6), within [0, 1e4], of the gradients at the last
    layer's weight, over the global batch (as released; the paper's are at the image)."""
    return (of_reconstruction.norm() / (of_gan.norm() + 1e-6)).clamp(0, 1e4)

# -------------------------------------------------------------------------------------------------- the score
def ssim(a, b):
    """SSIM (Wang et al. 2004), (B,): per colour, Gaussian window of 11 px, sigma 1.5, inside the image."""
    x = torch.arange(11, device=a.device) - 5.0
    g = (-x.square() / (2 * 1.5 ** 2)).exp()
    g = (g / g.sum()).repeat(3, 1, 1, 1)                                              # (3, 1, 1, 11)
    def blur(y):
        return F.conv2d(F.conv2d(y, g, groups=3), g.transpose(2, 3), groups=3)
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a ** 2, blur(b * b) - mu_b ** 2, blur(a * b) - mu_a * mu_b
    return ((2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4)
            / ((mu_a ** 2 + mu_b ** 2 + 1e-4) * (var_a + var_b + 9e-4))).mean((1, 2, 3))

def evaluate(rae, data, distance, inception, args):
    """PSNR (dB), SSIM, LPIPS if given, and the Frechet distance (rFID by Inception, else by the encoder) of
    --eval-num images, from clean latents and ("_noisy") with noise of --eval-sigma on them; a grid of 16."""
    device, sums, moments, num = rae.mean.device, {}, {}, min(args.eval_num, len(data))
    rows, n = np.linspace(0, len(data) - 1, num).astype(int), args.micro_batch or args.batch_size // WORLD
    features = inception or (lambda x: (rae.encoder(x / 255).mean(1),))
    for first in range(0, num, n):
        chosen = rows[first:first + n]
        images = read_images(data, chosen, device)                                    # (B, 3, H, W)
        tokens = rae.encoder(images)                                                  # (B, N, C)
        noise = keyed_noise([(args.seed, first + i) for i in range(len(chosen))], tokens.shape[1:], device)
        clean, noisy = (rae.draw(x).clamp(0, 1) for x in (tokens, tokens + args.eval_sigma * noise))
        for name, x in (("real", images), ("", clean), ("_noisy", noisy)):
            moments.setdefault(name, Moments()).add(features((x * 255).round())[0])
            for metric, f in (("psnr", psnr), ("ssim", ssim), ("lpips", distance)) if name != "real" else ():
                if f:
                    sums[metric + name] = sums.get(metric + name, 0) + f(x, images).sum().item()
        if first == 0:
            grid = torch.cat([x[:16] for x in (images, clean, noisy)])
    numbers, frechet = {k: v / num for k, v in sums.items()}, "rfid" if inception else "encoder_distance"
    for name in ("", "_noisy"):
        numbers[frechet + name] = frechet_distance(*moments["real"].result(), *moments[name].result())
    return numbers, grid

# ----------------------------------------------------------------------------------------------- the training
def learning_rate(step, steps, args):
    """Linear warm-up from 0, then a cosine from lr to lr_end at the last of the steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, steps - args.warmup)
    return args.lr_end + (args.lr - args.lr_end) * (0.5 + 0.5 * math.cos(math.pi * done))

def main():
    p = parser(__doc__, PRESETS)
    flag = p.add_argument
    flag("--val-data", help="folder to evaluate on; unset: --data")
    flag("--encoder", help="toy, dinov2-{s,b,l}, siglip2-b, mae-b, timm:MODEL or a file")
    flag("--image-size", type=positive, help="pixels of the decoded image")
    flag("--resize", type=int, help="short side before a random crop (paper: 384); unset: centre")
    flag("--size", choices=DECODERS, help="decoder: width and depth (paper: XL)")
    flag("--upsample", type=positive, default=1, help="decoded pixels per encoder pixel (6.1: 2)")
    flag("--noise-tau", type=float, default=0.8, help="latent noise, 0 for none (paper: 0.8)")
    flag("--noise-dist", choices=["uniform", "half-normal"], default="uniform", help="released; paper's")
    flag("--critics", choices=["encoder", "published"], help="the encoder's features, or LPIPS and DINO-S/8")
    flag("--lpips-weights", help="local file of LPIPS' VGG weights (v0.1)")
    flag("--vgg-weights", help="local file of VGG16's weights, timm's names")
    flag("--dino-weights", help="local file of DINO-S/8's weights, timm's names")
    flag("--perceptual", type=float, default=1.0, help="weight of the perceptual loss (paper: 1)")
    flag("--gan", type=float, help="weight of the GAN loss, 0 for none (paper: 0.75)")
    flag("--starts", type=float, nargs=3, default=[0, 0.375, 0.5], metavar=("LPIPS", "D", "GAN"),
         help="when each begins, as a share of the run (paper: epochs 0, 6 and 8 of 16)")
    flag("--warmup", type=int, help="steps of linear warm-up (paper: 1 of 16 epochs)")
    flag("--betas", type=float, nargs=2, default=[0.9, 0.95], help="of AdamW (paper: 0.5 0.9)")
    flag("--eval-only", action="store_true", help="print the numbers of --ckpt and stop")
    flag("--ckpt", help="with --eval-only: a checkpoint, released:NAME or a released file")
    flag("--stats", help="with --eval-only: latent statistics of a bare released file")
    flag("--eval-num", type=positive, help="images to evaluate on")
    flag("--eval-sigma", type=float, default=0.8, help="latent noise of the _noisy numbers")
    flag("--inception", help="file of the 2015 Inception weights, for rFID")
    flag("--out", default="out/decoder", help="folder of the run")
    flag("--eval-every", type=positive, help="steps between evaluations")
    args = p.parse_args()
    size, up = args.image_size // args.upsample, args.upsample                        # what the encoder sees
    check(args.image_size % up == 0, f"--image-size {args.image_size} is not a multiple of --upsample {up}")
    check(not 0 < (args.resize or 0) < size * up, f"--resize {args.resize} is below --image-size {size * up}")
    device = start(args)
    inception = load_inception(args.inception, device)[1] if args.inception else None
    if args.eval_only:
        check(args.ckpt, "--eval-only wants a decoder: pass --ckpt")
        rae = load_rae(args.ckpt, args.stats and args.encoder, args.encoder_weights, args.stats, device)
        data = open_data(args.val_data or args.data, rae.decoder.grid * rae.decoder.patch_size, "val")
        metric = lpips(args, device) if args.critics == "published" else None
        numbers, grid = evaluate(rae, data, metric, inception, args)
        save_grid(grid, f"{args.out}/eval.png", columns=len(grid) // 3)
        return say(json.dumps(dict(ckpt=args.ckpt, num=min(args.eval_num, len(data)), **numbers)))
    run = Run(args, "decoder")
    if run.first == args.steps:
        return say(f"{args.out}: finished already; its decoder is {args.out}/checkpoint.pt")
    # Images, frozen encoder, statistics of its latents (one exact pass), decoder, its average, critics.
    data = open_data(args.data, args.image_size, short=args.resize)
    val = open_data(args.val_data or args.data, args.image_size, "val")
    encoder = build_encoder(args.encoder, size, args.encoder_weights).to(device)
    mean, var = run.saved.get("mean"), run.saved.get("var")
    if not run.saved:
        say(f"latent statistics of {len(data)} images, both flips")
        centred = data if args.upsample == 1 and not args.resize else open_data(args.data, size)
        mean, var = latent_statistics(encoder, centred, args.micro_batch or args.batch_size // WORLD, device)
    torch.manual_seed(args.seed)
    decoder = Decoder(encoder.dim, encoder.grid, args.image_size // encoder.grid, *DECODERS[args.size])
    if args.init and not run.saved:
        load_strict(decoder, load_released_decoder(released_file(args.init)).state_dict(), args.init)
    rae = RAE(encoder, decoder, mean, var, args.noise_tau, args.noise_dist).to(device)
    ema = copy.deepcopy(decoder).requires_grad_(False).eval()
    averaged = RAE(encoder, ema, mean, var).to(device)
    published = args.critics == "published"
    perceptual = lpips(args, device) if published else Perceptual(VitTaps(encoder))
    dino = published and args.gan and build_encoder("dino-s8", 224, args.dino_weights, "--dino-weights")
    taps = VitTaps(dino or encoder).to(device)
    discriminator = Discriminator(taps.width, len(taps.blocks) + 1).to(device)
    optimizer, optimizer_d = Optimizer(decoder, args.betas), Optimizer(discriminator, args.betas)
    run.restore(ema=ema, model=decoder, optimizer=optimizer, discriminator=discriminator,
                optimizer_d=optimizer_d)
    decoder.checkpoint_activations = args.checkpoint_activations
    for layer in decoder.decoder_layers if args.compile else ():
        layer.compile()                                # in place, names stay; lambda walks the last layer
    say(f"{args.encoder}: {encoder.grid ** 2} tokens x {encoder.dim}; decoder {args.size}, "
        f"{sum(x.numel() for x in decoder.parameters()) / 1e6:.1f}M parameters, {len(data)} images")
    start_p, start_d, start_g = (round(share * args.steps) for share in args.starts)
    batches = Batches(data, args.batch_size, args.seed, False, args.micro_batch)
    names = ("l1", "perceptual", "gan", "d_loss", "gan_weight")
    for step in run.steps(batches, device, len(names)):
        if run.due(args.log_every):
            means, pace = run.means(optimizer, optimizer_d)
            run.log(**dict(zip(names, means.tolist())), **pace)
        if RANK == 0 and (run.due(args.save_every) or step == 0):
            run.save(image_size=size, config=decoder.config, encoder=args.encoder,
                     encoder_hash=encoder.fingerprint, mean=mean, var=var)
        if RANK == 0 and run.due(args.eval_every, look=True):
            numbers, grid = evaluate(averaged, val, perceptual if published else None, inception, args)
            run.log(**numbers)
            save_grid(grid, f"{args.out}/grid_{step:06d}.png", columns=len(grid) // 3)
        if run.last:
            break
        # Each critic is walked back once, to the reconstruction; from there on both losses go together.
        images = run.batch()[0].to(device, non_blocking=True).float() / 255           # (b, 3, H, W)
        u = keyed_numpy(args.seed, step, args.batch_size).random((args.batch_size, 3, 5), dtype=np.float32)
        u = torch.from_numpy(u[batches.rows.start:batches.rows.stop])                 # (b, 3, 5) for DiffAug
        rae.train()
        discriminator.eval()
        gan_on, work = args.gan > 0 and step >= start_g, []
        at_last = torch.zeros(2, *decoder.decoder_pred.weight.shape, device=device)   # both losses' gradients
        losses = torch.zeros(len(names), device=device)
        for part in batches.parts:
            share, keys = len(u[part]) / len(u), [(args.seed, step, row) for row in batches.rows[part]]
            with autocast(device, args):
                tokens = encoder(images[part])                                        # (B, N, C)
                noised = rae.noised(tokens, [keyed(device, *key) for key in keys])
                output = rae.draw(noised)                                             # (B, 3, H, W)
            l1, distance, gan = (output - images[part]).abs().mean(), torch.zeros(()), torch.zeros(())
            if args.perceptual and step >= start_p:
                distance = perceptual(output, images[part]).mean()
            gradients = torch.autograd.grad(l1 + args.perceptual * distance, output)
            if gan_on:
                with autocast(device, args):
                    gan = -discriminator(taps(diffaug(2 * output - 1, u[part, 0]) / 2 + 0.5)).mean()
                gradients += torch.autograd.grad(gan, output)
                at_last += share * torch.stack([torch.autograd.grad(
                    output, decoder.decoder_pred.weight, g, retain_graph=True)[0] for g in gradients])
            losses[:3] += share * torch.stack([x.detach().to(device) for x in (l1, distance, gan)])
            work.append((part, share, tokens, noised, gradients, output if share == 1 else None))
        if gan_on:
            average([at_last])
            losses[4] = args.gan * adaptive_weight(*at_last)
        # The decoder's step. A lone part still has its graph; several are decoded again, one at a time.
        for _, share, _, noised, gradients, output in work:
            if output is None:
                with autocast(device, args):
                    output = rae.draw(noised)
            output.backward(share * (gradients[0] + losses[4] * gradients[1] if gan_on else gradients[0]))
        if optimizer.update(learning_rate(step, args.steps, args))[1]:
            update_ema(ema, decoder, args.ema, step)
        # The discriminator's, on 8-bit reconstructions of clean latents by the decoder as it is now.
        if args.gan and step >= start_d:
            for part, share, tokens, *_ in work:
                discriminator.train(part.start == 0)   # one power iteration a step
                with autocast(device, args):
                    with torch.no_grad():
                        fake = rae.draw(tokens).clamp(0, 1).mul(255).round() / 255
                        both = [diffaug(2 * x - 1, u[part, k]) for k, x in ((1, images[part]), (2, fake))]
                        views = taps(torch.cat(both) / 2 + 0.5)
                    d_loss = share * hinge(discriminator(views))
                d_loss.backward()
                losses[3] += d_loss.detach()
            optimizer_d.update(learning_rate(step - start_d, args.steps - start_d, args))
        run.sums += losses.nan_to_num(posinf=0, neginf=0)

if __name__ == "__main__":
    cli(main)
