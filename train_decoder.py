"""Stage 1: train the ViT decoder of a frozen encoder, on noised latents (sections 3, 4.3 and C).

    python train_decoder.py                                          # the toy world -> out/decoder
    python train_decoder.py --data FOLDER --encoder my_encoder.pt    # own images
    torchrun --standalone --nproc_per_node=8 train_decoder.py --preset imagenet256
    python train_decoder.py --eval-only --ckpt out/decoder/checkpoint.pt    # a decoder's numbers

The loss is L1 + perceptual + 0.75 lambda GAN. The last two compare images in the features of
frozen networks (--critics): VGG16's for LPIPS and DINO-S/8's for the discriminator, or, without a
download, the frozen encoder's for both. Writes checkpoint.pt (the decoder, its average, the latent
statistics), grid_*.png (rows: images, reconstructions, reconstructions from noisy latents) and
log.jsonl. The same command goes on with a stopped run.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import spectral_norm

from fid import frechet_distance, load_inception, mean_and_covariance
from rae import (
    DECODERS,
    RAE,
    Decoder,
    StepBatches,
    all_reduce_mean,
    available_devices,
    build_encoder,
    cast_matrices,
    check_same_run,
    deal_batches,
    end_quietly,
    error_line,
    keyed_generator,
    keyed_noise,
    latent_statistics,
    leave_group,
    load_optimizer,
    load_rae,
    load_released_decoder,
    load_strict,
    load_timm,
    natural,
    number,
    open_data,
    open_log,
    parse_flags,
    positive_int,
    print0,
    psnr,
    rank_and_world_size,
    read_batches,
    read_file,
    released_file,
    save_file,
    save_sheet,
    set_precision,
    update_ema,
    write_log,
)

# The toy: small enough for two CPU cores and four minutes.
TOY = {
    "data": "toy",
    "encoder": "toy",
    "image_size": 32,
    "size": "toy",
    "critics": "encoder",
    "gan": 0.1,
    "global_batch_size": 64,
    "micro_batch": None,
    "steps": 800,
    "lr": 2e-3,
    "lr_end": 1e-4,
    "warmup": 50,
    "ema": 0.99,
    "compile": False,
    "workers": 0,
    "log_every": 100,
    "eval_every": 200,
    "eval_num": 500,
    "save_every": 400,
}
# ImageNet (Table 12, as released): 16 epochs of 2,502 steps. The micro-batches are what 80 GB hold.
IMAGENET = {
    "data": "imagenet/train",
    "encoder": "dinov2-b",
    "image_size": 256,
    "resize": 384,
    "size": "XL",
    "critics": "published",
    "gan": 0.75,
    "global_batch_size": 512,
    "micro_batch": 64,
    "steps": 40032,
    "lr": 2e-4,
    "lr_end": 2e-5,
    "warmup": 2502,
    "ema": 0.9978,
    "compile": True,
    "workers": 12,
    "log_every": 100,
    "eval_every": 2500,
    "eval_num": 2000,
    "save_every": 1000,
}
PRESETS = {
    "toy": TOY,
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | {"image_size": 512, "resize": 768, "micro_batch": 16},
}
# What may differ when a run is resumed. All other flags define the run; so does --micro-batch here,
# since the GAN's weight is that of a micro-batch. (It is averaged over the processes, so that their
# number, which is not compared, matters a little too.)
MAY_CHANGE = {
    "preset",
    "out",
    "device",
    "workers",
    "compile",
    "checkpoint_activations",
    "val_data",
    "inception",
    "eval_every",
    "eval_num",
    "eval_sigma",
    "log_every",
    "save_every",
    "keep_every",
}
LPIPS_URL = (
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
)
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"

# ---------------------------------------------------------------------------------------------
# Frozen networks to look through, and the perceptual loss


class ViTFeatures(nn.Module):
    """Images in [0, 1] -> five (B, N, C): tokens within a frozen ViT, as features.

    They are those after the last block, and those after each quarter of the blocks. For DINO-S/8
    these are blocks 11, 2, 5, 8, 11, of 784 tokens each (appendix C): the last one twice, as
    released. There is no final norm, and no CLS token.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.width = encoder.latent_dim
        depth = len(encoder.vit.blocks)
        quarters = [max(1, depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
        self.blocks = sorted(set(quarters))  # a ViT of fewer than four blocks gives fewer
        self.num_layers = len(self.blocks) + 1

    def forward(self, images):
        size = (self.encoder.input_size, self.encoder.input_size)
        if images.shape[-1] != size[0]:
            images = F.interpolate(images, size, mode="bilinear")
        images = (images - self.encoder.pixel_mean) / self.encoder.pixel_std
        features = self.encoder.vit.forward_intermediates(
            images, indices=self.blocks, output_fmt="NLC", intermediates_only=True
        )
        return [features[-1], *features]


class VGGFeatures(nn.Module):
    """Images in [0, 1] -> five (B, positions, C): VGG16's relu1_2, 2_2, 3_3, 4_3 and 5_3."""

    def __init__(self, weights=None):
        super().__init__()
        self.vgg = load_timm("vgg16.tv_in1k", weights, "--vgg-weights")
        self.vgg.pre_logits = nn.Identity()  # half a gigabyte of classifier that nothing uses
        # LPIPS' own constants, for images in [-1, 1]
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, images):
        images = (2 * images - 1 - self.mean) / self.std
        features = self.vgg.forward_intermediates(
            images, range(5), stop_early=True, intermediates_only=True
        )
        return [x.flatten(2).transpose(1, 2) for x in features]


class PerceptualLoss(nn.Module):
    """The distance (B,) of two batches of images in [0, 1] in a frozen network's features.

    Features become unit vectors. Their squared difference, weighted by channel, is averaged over
    the positions and summed over the layers. With VGGFeatures and the learned weights this is
    LPIPS (Zhang et al. 2018); without weights all channels count alike, and layers are averaged.
    """

    def __init__(self, features, weights=None):
        super().__init__()
        self.features = features
        self.weights = weights

    def forward(self, a, b):
        distance = 0
        with torch.autocast(a.device.type, enabled=False):
            features_a = self.features(a.float())
            features_b = self.features(b.float())
            for layer, (x, y) in enumerate(zip(features_a, features_b)):
                x = x / (x.norm(dim=2, keepdim=True) + 1e-10)  # (B, positions, C)
                y = y / (y.norm(dim=2, keepdim=True) + 1e-10)
                square = (x - y).square()
                if self.weights is None:
                    weighted = square.sum(2) / len(features_a)  # (B, positions)
                else:
                    weighted = square @ self.weights[layer]  # (B, positions)
                distance = distance + weighted.mean(1)
        return distance


def load_lpips(args, device):
    """LPIPS (VGG16, v0.1) with its learned weights from --lpips-weights, or fetched once."""
    path = Path(torch.hub.get_dir(), "checkpoints", "lpips_vgg.pth")
    if args.lpips_weights:
        path = Path(args.lpips_weights)
    elif not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            print0(f"LPIPS' weights, 7 kB: fetched once from {LPIPS_URL}")
            torch.hub.download_url_to_file(LPIPS_URL, str(path), LPIPS_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # the latter: not the file of this hash
            raise ValueError(
                f"LPIPS' weights cannot be fetched ({type(error).__name__}); download {LPIPS_URL} "
                f"(sha256 {LPIPS_SHA256}) and pass --lpips-weights FILE"
            ) from None
    file = read_file(path)
    weights = []
    for layer in range(5):
        name = f"lin{layer}.model.1.weight"
        if name not in file:
            raise ValueError(f"{path}: not LPIPS' VGG weights, {name} is missing")
        weights.append(file[name].flatten().to(device))
    if hashlib.sha256(path.read_bytes()).hexdigest() != LPIPS_SHA256:
        print0(f"warning: {path} is not LPIPS' published file (sha256 {LPIPS_SHA256})")
    return PerceptualLoss(VGGFeatures(args.vgg_weights).to(device), weights)


# ---------------------------------------------------------------------------------------------
# The GAN


class InstanceNorm(nn.InstanceNorm1d):
    """In float32 under autocast too, as released."""

    def forward(self, x):
        return super().forward(x.float())


class DiscriminatorHead(nn.Module):
    """Frozen features (B, N, C) of one layer -> logits (B, N), one per token (appendix C).

    All convolutions run along the sequence of tokens and are spectrally normalised. The norms are
    over the tokens of one image, so that an image's logits do not depend on its batch.
    """

    def __init__(self, width):
        super().__init__()
        self.first = self.layer(width, kernel_size=1)
        self.mix = self.layer(width, kernel_size=9)
        self.last = spectral_norm(nn.Conv1d(width, 1, 1))

    def layer(self, width, kernel_size):
        conv = nn.Conv1d(
            width, width, kernel_size, padding=kernel_size // 2, padding_mode="circular"
        )
        norm = InstanceNorm(width, eps=1e-6, affine=True)
        return nn.Sequential(spectral_norm(conv), norm, nn.LeakyReLU(0.2))

    def forward(self, x):
        x = self.first(x.transpose(1, 2))  # (B, C, N)
        x = (self.mix(x) + x) / math.sqrt(2)  # (B, C, N)
        return self.last(x).squeeze(1)  # (B, N)


class Discriminator(nn.Module):
    """The trained part of the discriminator: one head for each layer of the frozen features.

    forward takes any number of batches, each a list of (B, N, C) as ViTFeatures gives it, and
    returns their logits (B, layers N) in a list. In train() mode every batch begins with one power
    iteration of the spectral norms. Fake and real images go through one call: at the beginning of
    each, DistributedDataParallel overwrites the spectral norms' buffers, and a second one would
    spoil the first one's backward pass.
    """

    def __init__(self, width, num_layers):
        super().__init__()
        self.heads = nn.ModuleList([DiscriminatorHead(width) for _ in range(num_layers)])

    def forward(self, *batches):
        logits = []
        for features in batches:
            layers = [head(x) for head, x in zip(self.heads, features)]  # (B, N) each
            logits.append(torch.cat(layers, dim=1).float())  # (B, layers N)
        return logits


def diffaug(x, u):
    """DiffAug (Zhao et al. 2020) of images (B, 3, H, W) in [-1, 1], by uniform numbers u (B, 5).

    A shift of up to an eighth, zero-padded, then brightness + U(-.5, .5), saturation x U(0, 2) and
    contrast x U(.5, 1.5). It keeps the discriminator from learning the training images by heart.
    """
    # Each image is cut out of its padded self, by indices on its own device: a CPU that read them
    # would have to wait for the GPU.
    size = x.shape[-1]
    reach = round(size / 8)
    corners = (u[:, :2] * (2 * reach + 1)).long()  # (B, 2): first row, first column
    offsets = torch.arange(size, device=x.device)
    rows = (corners[:, :1] + offsets)[:, None, :, None]  # (B, 1, H, 1)
    columns = (corners[:, 1:] + offsets)[:, None, None, :]  # (B, 1, 1, W)
    x = F.pad(x, [reach] * 4)  # (B, 3, H + 2 reach, W + 2 reach)
    x = x.gather(2, rows.expand(-1, 3, -1, x.shape[3]))  # (B, 3, H, W + 2 reach)
    x = x.gather(3, columns.expand(-1, 3, size, -1))  # (B, 3, H, W)

    brightness, saturation, contrast = u[:, 2:].T[..., None, None, None]  # (B, 1, 1, 1) each
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def augment(images, u):
    """What the discriminator sees of images in [0, 1]: DiffAug is made for [-1, 1]."""
    return (diffaug(2 * images - 1, u) + 1) / 2


def generator_loss(logits):
    """The decoder's GAN loss: its reconstructions should get high logits."""
    return -logits.mean()


def hinge_loss(logits_real, logits_fake):
    """The discriminator's loss: real images above 1, reconstructions below -1."""
    return (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()) / 2


def adaptive_weight(g_rec, g_gan):
    """lambda = |g_rec| / (|g_gan| + 1e-6), within [0, 1e4], as in VQGAN (Esser et al. 2021).

    The two are the gradients of the reconstruction loss and of the GAN's at the last layer's
    weight, as released (the paper's are at the image). lambda, a tensor without a gradient of its
    own, makes them equally long.
    """
    return (g_rec.norm() / (g_gan.norm() + 1e-6)).clamp(0, 1e4).detach()


# ---------------------------------------------------------------------------------------------
# Evaluation


def ssim(a, b):
    """SSIM (Wang et al. 2004) of images (B, 3, H, W) in [0, 1], as (B,).

    Per colour, with a Gaussian window of 11 px and sigma 1.5 that stays inside the image.
    """
    x = torch.arange(11, device=a.device) - 5.0
    window = (-x.square() / (2 * 1.5**2)).exp()  # (11,)
    window = (window / window.sum()).repeat(3, 1, 1, 1)  # (3, 1, 1, 11)

    def blur(y):
        y = F.conv2d(y, window, groups=3)
        return F.conv2d(y, window.transpose(2, 3), groups=3)

    mu_a = blur(a)
    mu_b = blur(b)
    var_a = blur(a * a) - mu_a**2
    var_b = blur(b * b) - mu_b**2
    cov = blur(a * b) - mu_a * mu_b
    luminance = (2 * mu_a * mu_b + 1e-4) / (mu_a**2 + mu_b**2 + 1e-4)
    structure = (2 * cov + 9e-4) / (var_a + var_b + 9e-4)
    return (luminance * structure).mean((1, 2, 3))


@torch.no_grad()
def evaluate(rae, data, args, batch_size, lpips=None, inception=None):
    """The numbers of an autoencoder on --eval-num images, and a sheet of 16 (3 * 16, 3, H, W).

    PSNR (dB), SSIM, LPIPS if that is given, and the Frechet distance: rFID with Inception's
    features, else in the encoder's own. Each is of reconstructions from clean latents and, with
    names in _noisy, from latents with noise of --eval-sigma. All processes share the work; the
    first returns the result, the others two times None.
    """
    device = rae.latent_mean.device
    num = min(args.eval_num, len(data))
    indices = np.linspace(0, len(data) - 1, num).astype(int)  # spread over the classes
    metrics = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        metrics["lpips"] = lpips

    def extract(images):
        pixels = (images * 255).round()  # files have 8 bits
        if inception is not None:
            return inception(pixels)[0]  # (B, 2048)
        return rae.encoder(pixels / 255).mean(1)  # (B, C)

    # Every process fills its rows of these; the others' are zero.
    width = rae.encoder.latent_dim if inception is None else 2048
    scores = torch.zeros(num, 2, len(metrics))  # of clean and noisy reconstructions
    features = torch.zeros(num, 3, width)  # of images, clean and noisy reconstructions
    sheet = None
    batches = deal_batches(num, batch_size)
    images_ahead = read_batches(data, [indices[rows] for rows in batches], args.workers, device)
    for rows, images in zip(batches, images_ahead):
        tokens = rae.encoder(images)  # (B, N, C)
        noise = keyed_noise([(args.seed, row) for row in rows], tokens.shape[1:], device)
        clean = rae.decode_tokens(tokens).clamp(0, 1)  # (B, 3, H, W)
        noisy = rae.decode_tokens(tokens + args.eval_sigma * noise).clamp(0, 1)
        for column, metric in enumerate(metrics.values()):
            scores[rows, 0, column] = metric(clean, images).cpu()
            scores[rows, 1, column] = metric(noisy, images).cpu()
        for column, pictures in enumerate((images, clean, noisy)):
            features[rows, column] = extract(pictures).cpu()
        if sheet is None:
            sheet = torch.cat([images[:16], clean[:16], noisy[:16]])
    if dist.is_initialized():
        dist.all_reduce(scores)
        dist.all_reduce(features)
        if dist.get_rank() > 0:
            return None, None

    numbers = {}
    clean_scores, noisy_scores = scores.mean(0).tolist()
    for column, name in enumerate(metrics):
        numbers[name] = clean_scores[column]
        numbers[f"{name}_noisy"] = noisy_scores[column]
    real, clean, noisy = [mean_and_covariance(features[:, i]) for i in range(3)]
    distance = "encoder_distance" if inception is None else "rfid"
    numbers[distance] = frechet_distance(*real, *clean)
    numbers[f"{distance}_noisy"] = frechet_distance(*real, *noisy)
    return numbers, sheet


def evaluate_checkpoint(args, device):
    """--eval-only: print the numbers of --ckpt as JSON, and draw its sheet."""
    if args.ckpt is None:
        raise ValueError("--eval-only wants a decoder: pass --ckpt")
    Path(args.out).mkdir(parents=True, exist_ok=True)  # an error now, not after the work
    # --stats comes with a bare released file, which does not name its encoder as ours do.
    encoder = args.encoder if args.stats else None
    rae = load_rae(args.ckpt, encoder, args.encoder_weights, args.stats, device)
    data = open_data(args.val_data or args.data, rae.image_size, "val")
    lpips = load_lpips(args, device) if args.critics == "published" else None
    inception = load_inception(args.inception, device)[1] if args.inception else None
    batch_size = min(args.micro_batch or args.global_batch_size, 64)
    numbers, sheet = evaluate(rae, data, args, batch_size, lpips, inception)
    if numbers is not None:  # in the first process
        save_sheet(sheet, Path(args.out, "eval.png"), columns=len(sheet) // 3)
        print(json.dumps({"ckpt": args.ckpt, "num": min(args.eval_num, len(data)), **numbers}))


# ---------------------------------------------------------------------------------------------
# Training


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--preset", choices=PRESETS, default="toy", help="the other flags' defaults")
    # images and the encoder
    p.add_argument("--data", help="toy, or a folder of images")
    p.add_argument("--val-data", help="folder to evaluate on; unset: --data")
    p.add_argument("--image-size", type=positive_int, help="pixels of the decoded image")
    p.add_argument(
        "--resize", type=positive_int, help="short side before a random crop; unset: centre crop"
    )
    p.add_argument("--encoder", help="toy, dinov2-{s,b,l}, siglip2-b, mae-b, timm:MODEL or a file")
    p.add_argument("--encoder-weights", help="local file of the encoder's weights, in timm's names")
    # the decoder
    p.add_argument("--size", choices=DECODERS, help="width and depth of the decoder (paper: XL)")
    p.add_argument(
        "--upsample", type=positive_int, default=1, help="decoded px per encoded px (6.1)"
    )
    p.add_argument("--noise-tau", type=number(0), default=0.8, help="latent noise, 0 for none")
    p.add_argument(
        "--noise-dist",
        choices=["uniform", "half-normal"],
        default="uniform",
        help="paper: half-normal",
    )
    p.add_argument("--init", help="start from these weights: a checkpoint or released:NAME")
    # the losses
    p.add_argument("--critics", choices=["encoder", "published"], help="published: VGG16, DINO-S/8")
    p.add_argument("--lpips-weights", help="local file of LPIPS' VGG weights (v0.1)")
    p.add_argument("--vgg-weights", help="local file of VGG16's weights, in timm's names")
    p.add_argument("--dino-weights", help="local file of DINO-S/8's weights, in timm's names")
    p.add_argument(
        "--perceptual", type=number(0), default=1.0, help="weight of the perceptual loss"
    )
    p.add_argument("--gan", type=number(0), help="weight of the GAN loss, 0 for none (paper: 0.75)")
    p.add_argument(
        "--starts",
        type=number(0, 1),
        nargs=3,
        default=[0, 0.375, 0.5],
        metavar=("LPIPS", "D", "GAN"),
        help="when each begins, as a share of the run (paper: epochs 0, 6 and 8 of 16)",
    )
    # the optimisers
    p.add_argument("--steps", type=positive_int, help="optimiser steps")
    p.add_argument("--global-batch-size", type=positive_int, help="images a step, all processes'")
    p.add_argument(
        "--micro-batch",
        type=positive_int,
        help="images at once, in each process; unset: its whole share",
    )
    p.add_argument("--lr", type=number(0), help="peak learning rate (paper: 2e-4)")
    p.add_argument("--lr-end", type=number(0), help="learning rate at the end (paper: 2e-5)")
    p.add_argument("--warmup", type=natural, help="steps of linear warm-up (paper: 1 of 16 epochs)")
    p.add_argument(
        "--betas", type=number(0, 0.9999), nargs=2, default=[0.9, 0.95], help="(paper: 0.5 0.9)"
    )
    p.add_argument(
        "--ema", type=number(0, 1), help="decay of the averaged weights (released: 0.9978)"
    )
    p.add_argument("--seed", type=natural, default=0, help="of everything random")
    # the machine
    devices = available_devices()
    p.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    p.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="auto: bf16 on GPUs that compute in it, else fp32",
    )
    p.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the decoder's blocks"
    )
    p.add_argument("--checkpoint-activations", action="store_true", help="less memory, more time")
    p.add_argument("--workers", type=natural, help="processes that read images")
    # evaluation, and what is written
    p.add_argument("--eval-only", action="store_true", help="print the numbers of --ckpt and stop")
    p.add_argument(
        "--ckpt", help="with --eval-only: a checkpoint, released:NAME or a released file"
    )
    p.add_argument("--stats", help="with --eval-only: latent statistics of a bare released file")
    p.add_argument("--eval-num", type=positive_int, help="images to evaluate on")
    p.add_argument("--eval-sigma", type=number(0), default=0.8, help="noise of the _noisy numbers")
    p.add_argument("--inception", help="file of the 2015 Inception weights, for rFID")
    p.add_argument("--out", default="out/decoder", help="folder of the run")
    p.add_argument("--log-every", type=positive_int, help="steps between lines of the log")
    p.add_argument("--eval-every", type=positive_int, help="steps between evaluations")
    p.add_argument("--save-every", type=positive_int, help="steps between checkpoints")
    p.add_argument(
        "--keep-every", type=natural, default=0, help="steps between kept EMA weights, 0: none"
    )

    args = parse_flags(p, PRESETS)
    if args.image_size % args.upsample != 0:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of --upsample {args.upsample}"
        )
    if args.resize and args.resize < args.image_size:
        raise ValueError(f"--resize {args.resize} is below --image-size {args.image_size}")
    if (args.ckpt or args.stats) and not args.eval_only:
        raise ValueError("--ckpt and --stats are for --eval-only; to train from weights: --init")
    if (args.vgg_weights or args.dino_weights) and args.critics == "encoder":
        raise ValueError("--vgg-weights and --dino-weights are of --critics published")
    return args


def learning_rate(step, args):
    """Linear warm-up from 0, then a cosine from lr to lr_end at the last of the steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr_end + (args.lr - args.lr_end) * (0.5 + 0.5 * math.cos(math.pi * done))


def main():
    args = get_args()

    # The process group. torchrun starts one process per GPU and tells each its number.
    ddp = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if ddp and args.device == "mps":
        raise ValueError("--device mps: a Mac's GPU takes one process; run without torchrun")
    if ddp:
        # Tensors on GPUs go by NCCL, those on CPUs by gloo. The others wait while the first process
        # saves, which can take minutes.
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    rank, world_size = rank_and_world_size()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    precision = set_precision(args.precision, device)
    bf16 = precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if args.eval_only:
        evaluate_checkpoint(args, device)
        leave_group()
        return

    # The images and the frozen encoder. Only training sees random crops (--resize); statistics and
    # evaluations are of centre crops. Without --val-data a folder is evaluated on itself.
    data = open_data(args.data, args.image_size, short_side=args.resize)
    val_data = data
    if args.val_data or args.data == "toy":
        val_data = open_data(args.val_data or "toy", args.image_size, "val")
    flip = False  # stage 1 is published without flips
    batches = StepBatches(data, args.global_batch_size, args.seed, flip, rank, world_size)
    local_batch_size = len(batches.rows)
    micro_batch = args.micro_batch or local_batch_size
    eval_batch = min(micro_batch, 64)  # for statistics and evaluations
    starts = range(0, local_batch_size, micro_batch)
    parts = [slice(start, start + micro_batch) for start in starts]
    encoder_image_size = args.image_size // args.upsample
    encoder = build_encoder(args.encoder, encoder_image_size, args.encoder_weights).to(device)

    # The decoder, and its average, copied before anything is compiled or wrapped.
    torch.manual_seed(args.seed)  # for the initial weights; every later draw has a key of its own
    patch_size = args.image_size // encoder.grid_size
    decoder = Decoder(encoder.latent_dim, encoder.grid_size, patch_size, *DECODERS[args.size])
    decoder.to(device)
    if args.init:
        init = load_released_decoder(read_file(released_file(args.init)), where=args.init)
        load_strict(decoder, init.state_dict(), args.init)
    decoder.checkpoint_activations = args.checkpoint_activations
    ema = copy.deepcopy(decoder).requires_grad_(False).eval()
    last_layer = decoder.decoder_pred.weight

    # The frozen networks behind the losses, and the discriminator.
    lpips = None
    critic = encoder
    if args.critics == "published":
        lpips = load_lpips(args, device)
        if args.gan > 0:
            critic = build_encoder("dino-s8", 224, args.dino_weights, "--dino-weights").to(device)
    perceptual_loss = lpips or PerceptualLoss(ViTFeatures(encoder))
    if bf16:
        critic = copy.deepcopy(critic)  # the encoder itself stays in float32
        cast_matrices(critic)
    if args.gan > 0 and critic.grid_size == 1:
        raise ValueError("--encoder: a single token, too little for a discriminator; pass --gan 0")
    features = ViTFeatures(critic)
    discriminator = Discriminator(features.width, features.num_layers).to(device)
    inception = load_inception(args.inception, device)[1] if args.inception else None

    # Resume, if the folder holds this very run: the same flags, images and encoder.
    out = Path(args.out)
    settings = vars(args) | {"images": data.fingerprint(), "encoder_hash": encoder.fingerprint()}
    checkpoint = None
    first_step = 0
    if (out / "checkpoint.pt").exists():
        checkpoint = read_file(out / "checkpoint.pt")
        check_same_run(out, checkpoint.get("args", {}), settings, MAY_CHANGE)
        first_step = checkpoint["step"]
        print0(f"{out}: going on at step {first_step} of {args.steps}")
    # The latent statistics: in the checkpoint, or in a file of their own, if they are of these very
    # latents. On ImageNet the pass that makes them takes minutes, and may be all that was done.
    latents = {
        name: settings[name] for name in ("images", "image_size", "upsample", "encoder_hash")
    }
    stats = checkpoint
    if checkpoint is None and (out / "stats.pt").exists():
        stats = read_file(out / "stats.pt")
        if stats.get("latents") != latents:
            stats = None

    # All processes must have found the same files. If so, the mean of what they found is what each
    # of them found.
    found = torch.tensor([first_step, stats is not None], dtype=torch.float64)
    if not torch.equal(all_reduce_mean(found.clone()), found):
        raise ValueError(f"{out}: not the same on all nodes; put --out where all of them see it")
    if rank == 0:
        log = open_log(out, first_step)
    new_stats = stats is None
    if new_stats:
        mean, var = latent_statistics(encoder, data, eval_batch, device, args.workers)
        stats = {"mean": mean, "var": var, "latents": latents}
    mean = stats["mean"]
    var = stats["var"]
    rae = RAE(encoder, decoder, mean, var, args.noise_tau, args.noise_dist).to(device)
    rae.train()  # for `noised`; the encoder stays in eval mode by itself
    ema_rae = RAE(encoder, ema, mean, var).to(device)
    if new_stats and rank == 0:
        save_file(stats, out / "stats.pt")

    if args.compile:
        for layer in decoder.decoder_layers:
            layer.compile(dynamic=False)  # in place, so that parameters keep their names
    ddp_discriminator = discriminator
    if ddp:
        device_ids = [device.index] if args.device == "cuda" else None
        # rae now decodes through the wrapper; `decoder` stays the module itself.
        rae.decoder = DistributedDataParallel(decoder, device_ids=device_ids)
        ddp_discriminator = DistributedDataParallel(discriminator, device_ids=device_ids)
    adamw = {"lr": args.lr, "betas": tuple(args.betas), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(decoder.parameters(), **adamw)
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), **adamw)

    # Sums that every step adds to and every line of the log prints and zeroes: the losses, the
    # steps taken, and those skipped, which had a gradient that was not finite in either turn. The
    # names on the left are views of `sums`.
    loss_names = ("l1", "perceptual", "gan", "d_loss", "gan_weight")
    sums = torch.zeros(len(loss_names) + 2, device=device)
    loss_sums, taken, skipped = sums.split([len(loss_names), 1, 1])

    if checkpoint is not None:
        path = out / "checkpoint.pt"
        load_strict(decoder, checkpoint["model"], path)
        load_strict(ema, checkpoint["ema"], path)
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        load_strict(discriminator, checkpoint["discriminator"], path)
        load_optimizer(d_optimizer, checkpoint["d_optimizer"], path)
        sums.copy_(checkpoint["sums"])
    resumed = checkpoint is not None
    del checkpoint, stats

    # What load_rae in rae.py needs to know of a decoder.
    about = {
        "num_heads": decoder.num_heads,
        "encoder": args.encoder,
        "encoder_weights": args.encoder_weights,
        "encoder_hash": settings["encoder_hash"],
        "encoder_image_size": encoder_image_size,
        "mean": mean,
        "var": var,
    }
    num_parameters = sum(p.numel() for p in decoder.parameters()) / 1e6
    print0(f"{device} x {world_size}, {precision}; {len(data)} images")
    print0(f"{args.encoder}: {encoder.grid_size**2} tokens x {encoder.latent_dim}")
    print0(f"decoder {args.size}, {num_parameters:.1f}M parameters")

    # The images of all steps that are left, read ahead by workers.
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=range(first_step, args.steps),
        num_workers=args.workers,
        worker_init_fn=end_quietly,
        pin_memory=args.device == "cuda",
    )
    stream = iter(loader)

    # Ctrl-C and SIGTERM end the run where it is. Nothing is saved then: all processes would have
    # to agree on a step first, and the last checkpoint is minutes old.
    step = first_step  # these two are for `stop` to read
    saved_step = first_step

    def stop(number, frame):
        print0(f"stopped at step {step}; the same command goes on from step {saved_step}")
        # At once, without waiting for workers or for the other processes.
        os._exit(128 + number)  # not 0: what comes after `&&` must not take the run for finished

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    start_perceptual, start_d, start_gan = [round(share * args.steps) for share in args.starts]
    skipped_in_a_row = 0
    logged_step = first_step
    logged_time = time.time()

    # A turn of the loop saves, logs and evaluates the state after `step` steps, each if it is due,
    # and then takes one more step. The last turn takes none. A resumed run begins in the middle of
    # its first turn, after the save: what was due then is logged and evaluated again, since a kill
    # may have come between.
    for step in range(first_step, args.steps + 1):
        last = step == args.steps

        # Save, but never while steps are being skipped: the weights may be what is wrong, and the
        # checkpoint before the last good one.
        unsaved = step > first_step or not resumed  # at step 0 too: a full disk shows at once
        if unsaved and (step % args.save_every == 0 or last) and skipped_in_a_row == 0:
            # The checkpoint holds the processes' mean: from here on each of them goes on from
            # that, as a resumed run will. (The mean of equal numbers changes nothing, so that they
            # may be averaged again for the log.)
            all_reduce_mean(sums)
            if rank == 0:
                checkpoint = {
                    "model": decoder.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "discriminator": discriminator.state_dict(),
                    "d_optimizer": d_optimizer.state_dict(),
                    "step": step,
                    "sums": sums,
                    "args": settings,
                }
                save_file(checkpoint | about, out / "checkpoint.pt")
            saved_step = step
        if rank == 0 and args.keep_every and step > 0 and step % args.keep_every == 0:
            save_file({"ema": ema.state_dict(), **about}, out / f"ema_{step:07d}.pt")

        # Log.
        if step > 0 and (step % args.log_every == 0 or last):
            all_reduce_mean(sums)
            if rank == 0:
                num_images = (step - logged_step) * args.global_batch_size
                means = (loss_sums / taken.clamp(min=1)).tolist()
                numbers = {
                    "step": step,
                    **dict(zip(loss_names, means)),
                    "lr": learning_rate(step - 1, args),
                    "skipped": int(skipped),
                    "images_per_s": num_images / (time.time() - logged_time),
                }
                write_log(log, numbers)
            sums.zero_()
            logged_step = step
            logged_time = time.time()

        # Evaluate the averaged weights.
        if step > 0 and (step % args.eval_every == 0 or last):
            numbers, sheet = evaluate(ema_rae, val_data, args, eval_batch, lpips, inception)
            if rank == 0:
                write_log(log, {"step": step, **numbers})
                save_sheet(sheet, out / f"grid_{step:06d}.png", columns=len(sheet) // 3)
        if last:
            break

        # This step's learning rates and images.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for group in d_optimizer.param_groups:
            # Its schedule begins, warm-up included, with its own first step, and so does not reach
            # its end: as released.
            group["lr"] = learning_rate(max(0, step - start_d), args)
        images, _ = next(stream)
        images = images.to(device, non_blocking=True).float() / 255  # (b, 3, H, W)

        # Uniform numbers for DiffAug, (b, 5) each: for the reconstructions in the decoder's turn,
        # and for real images and reconstructions in the discriminator's. Rows are numbered below
        # global_batch_size, so that this number is free as the key.
        g = keyed_generator(device, args.seed, step, args.global_batch_size)
        u = torch.rand(args.global_batch_size, 3, 5, generator=g, device=device)
        u_decoder, u_real, u_fake = u[batches.rows.start : batches.rows.stop].unbind(1)

        # The decoder's turn, micro_batch images at a time. The discriminator only judges: it stays
        # in eval mode, without power iterations, and gets no gradients.
        discriminator.eval()
        discriminator.requires_grad_(False)
        losses = {name: torch.zeros((), device=device) for name in loss_names}
        clean_tokens = []
        for part in parts:
            real = images[part]  # (B, 3, H, W)
            share = len(real) / local_batch_size
            rows = batches.rows[part]
            generators = [keyed_generator(device, args.seed, step, row) for row in rows]
            sync = rae.decoder.no_sync() if ddp and part != parts[-1] else nullcontext()
            with sync:
                tokens = encoder(real)  # (B, N, C), outside autocast as for the statistics
                clean_tokens.append(tokens)
                with autocast:
                    reconstruction = rae.decode_tokens(rae.noised(tokens, generators))

                # The reconstruction loss.
                l1 = (reconstruction - real).abs().mean()
                perceptual = torch.zeros((), device=device)
                if args.perceptual > 0 and step >= start_perceptual:
                    perceptual = perceptual_loss(reconstruction, real).mean()
                rec_loss = l1 + args.perceptual * perceptual

                # The GAN loss, and its weight: lambda of the micro-batch, averaged over the
                # processes. The two gradients go back through the frozen networks to the last
                # layer alone; backward() then goes all the way.
                gan = torch.zeros((), device=device)
                gan_weight = torch.zeros((), device=device)
                if args.gan > 0 and step >= start_gan:
                    with autocast:
                        (logits,) = discriminator(
                            features(augment(reconstruction, u_decoder[part]))
                        )
                    gan = generator_loss(logits)
                    (g_rec,) = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)
                    (g_gan,) = torch.autograd.grad(gan, last_layer, retain_graph=True)
                    gan_weight = args.gan * all_reduce_mean(adaptive_weight(g_rec, g_gan))
                (share * (rec_loss + gan_weight * gan)).backward()
            losses["l1"] += share * l1.detach()
            losses["perceptual"] += share * perceptual.detach()
            losses["gan"] += share * gan.detach()
            losses["gan_weight"] += share * gan_weight

        # The optimiser's step, unless the gradient is not finite.
        finite = bool(nn.utils.get_total_norm([p.grad for p in decoder.parameters()]).isfinite())
        if finite:
            optimizer.step()
            update_ema(ema, decoder, args.ema, step)
        optimizer.zero_grad()

        # The discriminator's turn, on what a user would see: reconstructions from clean latents by
        # the decoder as it is now, rounded to 8 bits.
        if args.gan > 0 and step >= start_d:
            discriminator.train()
            discriminator.requires_grad_(True)
            for part, tokens in zip(parts, clean_tokens):
                real = images[part]
                share = len(real) / local_batch_size
                sync = ddp_discriminator.no_sync() if ddp and part != parts[-1] else nullcontext()
                with sync:
                    with autocast:
                        with torch.no_grad():
                            fake = rae.decode_tokens(tokens).clamp(0, 1).mul(255).round() / 255
                            fake_features = features(augment(fake, u_fake[part]))
                            real_features = features(augment(real, u_real[part]))
                        logits_fake, logits_real = ddp_discriminator(fake_features, real_features)
                    d_loss = hinge_loss(logits_real, logits_fake)
                    (share * d_loss).backward()
                losses["d_loss"] += share * d_loss.detach()
            d_norm = nn.utils.get_total_norm([p.grad for p in discriminator.parameters()])
            if d_norm.isfinite():
                d_optimizer.step()
            else:
                finite = False
            d_optimizer.zero_grad()

        # Count.
        if finite:
            loss_sums += torch.stack(list(losses.values()))
            taken += 1
            skipped_in_a_row = 0
        else:
            skipped += 1
            skipped_in_a_row += 1
            if skipped_in_a_row == 5 or step + 1 == args.steps:
                raise ValueError(
                    f"the gradient was not finite for {skipped_in_a_row} steps in a row; the last "
                    "checkpoint is kept: start a new run from it with --init and another --out, "
                    "a lower --lr or --precision fp32"
                )

    print0(f"{out}: finished; its decoder is {out}/checkpoint.pt")
    leave_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
