"""Stage 1: train an RAE's decoder on noisy encoder tokens (arXiv 2510.11690, sections 3 and 4.3).

    python train_decoder.py                                          # toy data -> out/decoder
    python train_decoder.py --data FOLDER --encoder my_encoder.pt --out out/photos_decoder
    torchrun --standalone --nproc_per_node=8 train_decoder.py --preset imagenet256 --out out/in256

The loss is L1 + perceptual + w * lambda * GAN (appendix C), where lambda scales the GAN's gradient
to the norm of the reconstruction gradient. The perceptual loss and the discriminator run on
features of frozen networks. --loss-networks published uses VGG16 (LPIPS) and DINO-S/8, as in the
paper; --loss-networks encoder uses the encoder itself. The paper's w (--disc-weight) is 0.75.

Writes checkpoint.pt, log.jsonl and grid_*.png (rows: images, reconstructions, reconstructions from
noisy tokens) to --out. Rerun the same command to resume.
"""

import argparse
import copy
import math
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import spectral_norm
from torch.utils.data import DataLoader

import rae
from fid import download_weights, frechet_distance, mean_and_covariance, psnr
from rae import UsageError, bounded, non_negative_int, positive_int
from sample import save_grid, to_uint8
from train_diffusion import StepBatches, add_training_flags

# Four minutes on two CPU cores.
TOY = {
    "data": "toy",
    "encoder": "toy",
    "image_size": 32,
    "size": "toy",
    "loss_networks": "encoder",
    "disc_weight": 0.1,
    "global_batch_size": 64,
    "steps": 800,
    "lr": 2e-3,
    "lr_end": 1e-4,
    "warmup": 50,
    "ema": 0.99,
    "eval_every": 200,
    "eval_num": 500,
    "save_every": 400,
}
# Table 12 and the official config: 16 epochs of 2,502 steps.
IMAGENET = {
    "data": "imagenet/train",
    "encoder": "dinov2-b",
    "image_size": 256,
    "resize": 384,  # then a random crop of 256
    "size": "XL",
    "loss_networks": "published",
    "disc_weight": 0.75,
    "global_batch_size": 512,
    "micro_batch_size": 64,  # fits 80 GB
    "steps": 40032,
    "lr": 2e-4,
    "lr_end": 2e-5,
    "warmup": 2502,  # 1 epoch
    "ema": 0.9978,
    "compile": True,
    "workers": 12,
    "eval_every": 2502,  # once per epoch
    "eval_num": 2000,
    "save_every": 1000,
}
PRESETS = {
    "toy": TOY,
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | {"image_size": 512, "resize": 768, "micro_batch_size": 16},
}
# Flags that may change on resume. Images and encoder are compared by hash, so paths may differ. The
# micro-batch size may not change: the GAN's adaptive weight is computed per micro-batch.
MAY_CHANGE = """preset out device workers compile checkpoint_activations data val_data encoder
encoder_weights lpips_weights vgg_weights dino_weights eval_every eval_num eval_sigma log_every
save_every""".split()
LOSSES = ("l1", "perceptual", "g_loss", "gan_weight", "d_loss")  # in the log; gan_weight: w lambda
LPIPS_URL = (
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
)

# ---------------------------------------------------------------------------------------------
# Frozen feature extractors and the perceptual loss


class ViTFeatures(nn.Module):
    """Images in [0, 1] -> tokens of several layers of a frozen ViT, (B, N, C) each.

    The layers are the final block, then the last block of each quarter, so the final one appears
    twice, as in the official code. For DINO-S/8: blocks 11, 2, 5, 8 and 11, 784 tokens each
    (appendix C), before the final norm and without the CLS token.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.width = encoder.latent_dim
        depth = len(encoder.vit.blocks)
        quarters = {max(1, depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}
        self.blocks = sorted(quarters)  # fewer if the ViT has fewer than four blocks
        self.num_layers = len(self.blocks) + 1

    def forward(self, images):
        size = self.encoder.input_size
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear")
        images = (images - self.encoder.pixel_mean) / self.encoder.pixel_std
        features = self.encoder.vit.forward_intermediates(
            images, indices=self.blocks, output_fmt="NLC", intermediates_only=True
        )
        return [features[-1], *features]  # (B, N, C) each


class VGGFeatures(nn.Module):
    """Images in [0, 1] -> relu1_2, 2_2, 3_3, 4_3 and 5_3 of VGG16, (B, positions, C) each."""

    def __init__(self, weights=None):
        super().__init__()
        self.vgg = rae.load_timm("vgg16.tv_in1k", weights)
        self.vgg.pre_logits = nn.Identity()  # drop the unused classifier (0.5 GB)
        # LPIPS' mean and standard deviation of images in [-1, 1]
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, images):
        images = (2 * images - 1 - self.mean) / self.std
        features = self.vgg.forward_intermediates(
            images, range(5), stop_early=True, intermediates_only=True
        )
        return [x.flatten(2).transpose(1, 2) for x in features]  # (B, positions, C) each


class PerceptualLoss(nn.Module):
    """Distances (B,) between paired images in [0, 1], measured on a frozen network's features.

    Features are normalized to unit length; squared differences are weighted by channel, averaged
    over positions and summed over layers. With VGGFeatures and the learned weights this is LPIPS
    (Zhang et al. 2018). Without weights, channels count equally and layers are averaged.
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
                square = (x - y).square()  # (B, positions, C)
                if self.weights is None:
                    weighted = square.sum(2) / len(features_a)  # (B, positions)
                else:
                    weighted = square @ self.weights[layer]  # (B, positions)
                distance = distance + weighted.mean(1)  # (B,)
        return distance


def load_lpips(args, device):
    """LPIPS v0.1 with VGG16. Its learned weights (7 kB) are downloaded once unless given."""
    if args.lpips_weights:
        file = rae.load(args.lpips_weights)
    else:
        file = download_weights(LPIPS_URL, "lpips_vgg-a78928a0.pth", "--lpips-weights")
    weights = []
    for i in range(5):
        weights.append(file[f"lin{i}.model.1.weight"].flatten().to(device))
    return PerceptualLoss(VGGFeatures(args.vgg_weights).to(device), weights)


# ---------------------------------------------------------------------------------------------
# GAN


class InstanceNorm(nn.InstanceNorm1d):
    """Runs in float32 even under autocast, as in the official code."""

    def forward(self, x):
        return super().forward(x.float())


class DiscriminatorHead(nn.Module):
    """Features (B, N, C) of one layer -> logits (B, N), one per token (appendix C).

    Spectrally normalized convolutions run along the tokens. Instance norm, unlike batch norm, keeps
    an image's logits independent of its batch.
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
    """The trained part of the discriminator, one head per layer of its frozen backbone.

    List of features, (B, N, C) each -> logits (B, layers N).
    """

    def __init__(self, width, num_layers):
        super().__init__()
        self.heads = nn.ModuleList([DiscriminatorHead(width) for _ in range(num_layers)])

    def forward(self, features):
        logits = [head(x) for head, x in zip(self.heads, features)]  # (B, N) each
        return torch.cat(logits, dim=1).float()  # (B, layers N)


def diffaug(x, u):
    """DiffAug (Zhao et al. 2020) of images (B, 3, H, W) in [0, 1], with uniform noise u (B, 5).

    Keeps the discriminator from memorizing the training set. Shifts by up to 1/8 (gray padding).
    Then, in [-1, 1]: brightness + U(-.5, .5), saturation x U(0, 2), contrast x U(.5, 1.5).
    """
    x = 2 * x - 1
    # Shift: crop the padded image at random, without syncing with the GPU.
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
    gray = x.mean(1, keepdim=True)  # (B, 1, H, W)
    x = (x - gray) * (2 * saturation) + gray
    mean = x.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    x = (x - mean) * (contrast + 0.5) + mean  # (B, 3, H, W)
    return (x + 1) / 2


def hinge_d_loss(logits_real, logits_fake):
    """Push the logits of real images above 1 and those of reconstructions below -1."""
    loss_real = F.relu(1 - logits_real).mean()
    loss_fake = F.relu(1 + logits_fake).mean()
    return (loss_real + loss_fake) / 2


def adaptive_weight(rec_grad, gan_grad):
    """lambda = |rec_grad| / (|gan_grad| + 1e-6), at most 1e4, as in VQGAN (Esser et al. 2021).

    Scaled by lambda, the GAN gradient has the norm of the reconstruction gradient. Both are with
    respect to the last layer's weight, as in the official code; the paper uses the image.
    """
    return (rec_grad.norm() / (gan_grad.norm() + 1e-6)).clamp(0, 1e4).detach()


# ---------------------------------------------------------------------------------------------
# Tokens: noise and statistics


def draw_sigma(n, tau, dist="uniform", generator=None, device=None):
    """Draw noise levels (n,) for n images (section 4.3).

    "uniform" is tau U(0, 1), as in the official code; "half-normal" is |N(0, tau^2)|, as in the
    paper.
    """
    if dist == "uniform":
        return tau * torch.rand(n, generator=generator, device=device)
    return tau * torch.randn(n, generator=generator, device=device).abs()


def add_noise(tokens, sigma, eps):
    """Add noise: tokens (B, N, C), sigma (B,), eps (B, N, C) -> noisy tokens (B, N, C).

    Sampled latents are imperfect; training on noisy tokens makes the decoder robust to them.
    """
    return tokens + sigma[:, None, None] * eps


@torch.no_grad()
def latent_statistics(encoder, data, batch_size, device, workers=0):
    """Exact mean and variance of the tokens, (C, h, w) each, over a data set and its mirror images.

    One pass over center crops, split over the ranks, summed in float64. (The official statistics
    are a running average, which favors the last images.)
    """
    batches = rae.rank_batches(len(data), batch_size)
    sum_device = "cpu" if device.type == "mps" else device  # MPS has no float64
    shape = (encoder.grid_size**2, encoder.latent_dim)
    total = torch.zeros(shape, dtype=torch.float64, device=sum_device)  # (N, C)
    total_square = torch.zeros_like(total)
    for images in rae.read_batches(data, batches, workers, device):
        for view in (images, images.flip(-1)):
            tokens = encoder(view).to(sum_device).double()  # (B, N, C)
            total += tokens.sum(0)
            total_square += tokens.square().sum(0)
    if dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(total_square)
    n = 2 * len(data)  # with the mirror images
    mean = total.cpu() / n
    var = (total_square.cpu() / n - mean.square()).clamp(min=0)
    grid = (encoder.grid_size, encoder.grid_size)
    return mean.T.unflatten(1, grid).float(), var.T.unflatten(1, grid).float()


# ---------------------------------------------------------------------------------------------
# Training


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    # images and encoder
    p.add_argument("--data", help="toy, or a folder of images")
    p.add_argument("--val-data", help="evaluation folder (default: --data; toy has its own)")
    p.add_argument("--image-size", type=positive_int, help="pixels of decoded images")
    p.add_argument("--resize", type=positive_int, help="short side before a random crop")
    p.add_argument("--encoder", help="toy, dinov2-{s,b,l}, siglip2-b, mae-b, timm:MODEL or a file")
    p.add_argument("--encoder-weights", help="local file of the encoder's timm weights")
    # decoder
    p.add_argument("--size", choices=rae.DECODERS, help="size of the decoder (paper: XL)")
    p.add_argument("--upsample", type=positive_int, default=1, help="decoded size / encoded size")
    p.add_argument("--noise-tau", type=bounded(0), default=0.8, help="noise scale, 0: no noise")
    p.add_argument("--noise-dist", choices=["uniform", "half-normal"], default="uniform")
    p.add_argument("--init", help="initial weights: a checkpoint or released:NAME")
    # losses
    p.add_argument("--loss-networks", choices=["encoder", "published"])
    p.add_argument("--lpips-weights", help="local file of LPIPS' learned weights")
    p.add_argument("--vgg-weights", help="local file of VGG16's timm weights")
    p.add_argument("--dino-weights", help="local file of DINO-S/8's timm weights")
    p.add_argument("--disc-weight", type=bounded(0), help="GAN weight, 0: off (paper: 0.75)")
    p.add_argument(
        "--starts",
        type=bounded(0, 1),
        nargs=3,
        default=[0, 0.375, 0.5],
        metavar=("PERCEPTUAL", "D", "GAN"),
        help="when each starts, as a fraction of the run (paper: epochs 0, 6, 8 of 16)",
    )
    # optimization and output
    add_training_flags(p)
    p.add_argument("--warmup", type=non_negative_int, help="warm-up steps (paper: 1 epoch of 16)")
    p.add_argument("--out", default="out/decoder", help="output folder")
    p.add_argument("--eval-every", type=positive_int, help="steps between evaluations")
    p.add_argument("--eval-num", type=positive_int, help="images to evaluate on")
    p.add_argument("--eval-sigma", type=bounded(0), default=0.8, help="noise for *_noisy metrics")
    args = rae.parse_args(p, PRESETS)  # adds --preset, --seed, --device and --precision
    if args.resize and args.resize < args.image_size:
        raise UsageError("--resize must be at least --image-size")
    return args


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to lr_end."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)  # from 1 to 0
    return args.lr_end + (args.lr - args.lr_end) * cosine


def random_crop(image, size, generator, short_side):
    """Resize a PIL image's short side to short_side, then crop size x size pixels at random."""
    shortest = min(image.size)
    width = int(short_side * image.width / shortest)
    height = int(short_side * image.height / shortest)
    image = image.resize((width, height), Image.BICUBIC)
    left = int(torch.randint(width - size + 1, (), generator=generator))
    top = int(torch.randint(height - size + 1, (), generator=generator))
    return image.crop((left, top, left + size, top + size))


@torch.no_grad()
def evaluate(encoder, decoder, data, args, batch_size, lpips=None):
    """PSNR, LPIPS if given, and the Frechet distance in the encoder's features, on rank 0.

    Returns a dict and a grid (3 n, 3, H, W): n <= 16 images and their two reconstructions.
    The *_noisy numbers come from tokens with noise of level --eval-sigma. The distance flatters
    decoders trained with --loss-networks encoder, which optimize these features.
    """
    # A fixed random subset, shuffled so that the grid shows many classes.
    generator = rae.seeded_generator("eval", args.seed)
    order = torch.randperm(len(data), generator=generator)[: args.eval_num]
    batches = order.split(batch_size)
    device = encoder.pixel_mean.device
    numbers = defaultdict(float)
    features = defaultdict(list)
    grid = None
    for images, batch in zip(rae.read_batches(data, batches, args.workers, device), batches):
        tokens = encoder(images)  # (B, N, C)
        keys = [("eval", args.seed, int(i)) for i in batch]
        eps = rae.seeded_noise(keys, tokens.shape[1:], device)  # (B, N, C)
        features["real"].append(tokens.mean(1))
        pictures = [images]
        for suffix, sigma in (("", 0), ("_noisy", args.eval_sigma)):
            fake = encoder.denormalize(decoder(tokens + sigma * eps))  # (B, 3, H, W)
            fake = to_uint8(fake) / 255  # rounded to 8 bits, as when saved
            pictures.append(fake)
            features[suffix].append(encoder(fake).mean(1))
            numbers[f"psnr{suffix}"] += psnr(fake, images).sum().item() / len(order)
            if lpips is not None:
                numbers[f"lpips{suffix}"] += lpips(fake, images).sum().item() / len(order)
        if grid is None:
            grid = torch.cat([x[:16] for x in pictures])

    real = mean_and_covariance(torch.cat(features["real"]).cpu())
    for suffix in ("", "_noisy"):
        fake = mean_and_covariance(torch.cat(features[suffix]).cpu())
        numbers[f"encoder_distance{suffix}"] = frechet_distance(*real, *fake)
    return numbers, grid


def main():
    args = get_args()
    rank, world_size, device, autocast = rae.setup_distributed(args)
    out = Path(args.out)
    rae.make_folder(out)

    # Data and frozen encoder. Random crops are for training only; statistics and evaluation use
    # read_batches, which center-crops. Training doesn't flip images, as in the official code.
    crop = rae.center_crop
    if args.resize:
        crop = partial(random_crop, short_side=args.resize)
    data = rae.open_data(args.data, args.image_size, crop=crop)
    val_data = rae.open_data(args.val_data or args.data, args.image_size, "val")
    if min(args.eval_num, len(val_data)) < 2:
        raise UsageError("evaluation needs at least two images; check --eval-num and --val-data")
    batches = StepBatches(data, args, flip=False, rank=rank, world_size=world_size)
    rows = batches.rows  # this rank's rows of the global batch
    eval_batch_size = min(args.micro_batch_size or 64, 64)
    encoder_image_size = args.image_size // args.upsample
    encoder = rae.load_encoder(args.encoder, encoder_image_size, args.encoder_weights).to(device)

    # Decoder and EMA. The EMA is copied before compiling and wrapping, so it stays a plain module.
    torch.manual_seed(args.seed)  # for the initial weights; later draws have their own seeds
    patch_size = args.image_size // encoder.grid_size
    decoder = rae.Decoder(
        encoder.latent_dim, encoder.grid_size, patch_size, *rae.DECODERS[args.size]
    )
    decoder.to(device)
    decoder.checkpoint_activations = args.checkpoint_activations
    ema = copy.deepcopy(decoder).requires_grad_(False).eval()
    last_layer = decoder.decoder_pred.weight
    if args.compile:
        for layer in decoder.decoder_layers:
            layer.compile(dynamic=False)

    # Losses: perceptual, and the discriminator on its frozen backbone
    lpips = None
    disc_encoder = encoder
    if args.loss_networks == "published":
        lpips = load_lpips(args, device)
        if args.disc_weight > 0:
            disc_encoder = rae.load_encoder("dino-s8", 224, args.dino_weights).to(device)
    perceptual_loss = lpips or PerceptualLoss(ViTFeatures(encoder))
    disc_backbone = ViTFeatures(disc_encoder)
    discriminator = Discriminator(disc_backbone.width, disc_backbone.num_layers).to(device)

    # DDP averages the gradients of both networks over the ranks. (The official code appears to
    # bypass DDP for the discriminator, so its ranks drift apart.)
    ddp_decoder = decoder
    ddp_discriminator = discriminator
    if world_size > 1:
        ddp_decoder = DistributedDataParallel(decoder)
        ddp_discriminator = DistributedDataParallel(discriminator)
    adamw = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(decoder.parameters(), **adamw)
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), **adamw)

    # Latent statistics for stage 2. They include mirror images because stage 2 flips.
    checkpoint = None
    if (out / "checkpoint.pt").exists():
        checkpoint = rae.load(out / "checkpoint.pt")
        if "mean" not in checkpoint:
            raise UsageError(f"{out} holds a different kind of run; change --out")
        mean = checkpoint["mean"]
        var = checkpoint["var"]
    else:
        mean, var = latent_statistics(encoder, data, eval_batch_size, device, args.workers)
    latent_hash = encoder.latent_hash(mean, var)

    # Resume, or start from other weights
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {"images": data.fingerprint, "latents": latent_hash}
    settings["micro_batch_size"] = batches.micro_batch_size  # may depend on the world size
    first_step = 0
    if checkpoint is not None:
        rae.check_same_run(out, checkpoint.get("settings", {}), settings)
        decoder.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        rae.load_optimizer(optimizer, checkpoint["optimizer"])
        discriminator.load_state_dict(checkpoint["discriminator"])
        rae.load_optimizer(d_optimizer, checkpoint["d_optimizer"])
        first_step = checkpoint["step"]
        rae.print0(f"resuming {out} at step {first_step}")
        del checkpoint
    elif args.init:
        state = rae.load_decoder(rae.load(rae.find_file(args.init)), args.init).state_dict()
        decoder.load_state_dict(state)
        ema.load_state_dict(state)
    # What load_rae needs besides the weights.
    decoder_info = {
        "num_heads": decoder.num_heads,
        "encoder": args.encoder,
        "encoder_weights": args.encoder_weights,
        "encoder_image_size": encoder_image_size,
        "mean": mean,
        "var": var,
        "latent_hash": latent_hash,
    }
    if rank == 0:
        log = rae.open_log(out, first_step)

    loader = DataLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=range(first_step, args.steps),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    start_perceptual, start_d, start_gan = [round(x * args.steps) for x in args.starts]
    loss_sums = torch.zeros(len(LOSSES), device=device)  # since the last log line
    num_summed = 0
    skipped = 0
    skipped_in_a_row = 0
    images_done = 0
    start = time.perf_counter()

    for step, (images, _) in enumerate(loader, first_step):
        images = images.to(device, non_blocking=True).float() / 255  # (b, 3, H, W)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for group in d_optimizer.param_groups:
            # Count from its first step, so it never reaches lr_end, as in the official code.
            group["lr"] = learning_rate(max(0, step - start_d), args)

        # Draw noise levels and augmentations for the whole global batch, then slice out this rank's
        # rows, so that the draws don't depend on the world size.
        generator = rae.seeded_generator("step", args.seed, step, device=device)
        n = args.global_batch_size
        sigma = draw_sigma(n, args.noise_tau, args.noise_dist, generator, device)
        u = torch.rand(n, 3, 5, generator=generator, device=device)
        sigma = sigma[rows.start : rows.stop]  # (b,)
        u_decoder, u_real, u_fake = u[rows.start : rows.stop].unbind(1)  # (b, 5) each

        # Decoder step, one micro-batch at a time, with a frozen discriminator. DDP averages the
        # gradients over the ranks in the last backward pass only (the flag does what no_sync does).
        discriminator.eval().requires_grad_(False)
        losses = torch.zeros(len(LOSSES), device=device)
        clean_tokens = []
        for micro in batches.micro_batches:
            real = images[micro]  # (B, 3, H, W)
            share = len(real) / len(rows)
            keys = [("noise", args.seed, step, row) for row in rows[micro]]
            tokens = encoder(real)  # (B, N, C), in full precision
            eps = rae.seeded_noise(keys, tokens.shape[1:], device)  # (B, N, C)
            clean_tokens.append(tokens)
            ddp_decoder.require_backward_grad_sync = micro is batches.micro_batches[-1]
            with autocast:
                fake = ddp_decoder(add_noise(tokens, sigma[micro], eps))
                fake = encoder.denormalize(fake)  # (B, 3, H, W)

            l1 = (fake - real).abs().mean()
            perceptual = torch.zeros_like(l1)
            if step >= start_perceptual:
                perceptual = perceptual_loss(fake, real).mean()
            rec_loss = l1 + perceptual

            g_loss = torch.zeros_like(l1)
            gan_weight = torch.zeros_like(l1)
            if args.disc_weight > 0 and step >= start_gan:
                with autocast:
                    g_loss = -discriminator(disc_backbone(diffaug(fake, u_decoder[micro]))).mean()
                (rec_grad,) = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)
                (gan_grad,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
                gan_weight = args.disc_weight * adaptive_weight(rec_grad, gan_grad)
            (share * (rec_loss + gan_weight * g_loss)).backward()
            losses[:4] += share * torch.stack([l1, perceptual, g_loss, gan_weight]).detach()

        norm = nn.utils.get_total_norm([p.grad for p in decoder.parameters()])
        finite = bool(norm.isfinite())  # a host-device sync
        if finite:
            optimizer.step()
            rae.update_ema(ema, decoder, args.ema, step)
        optimizer.zero_grad()

        # Discriminator step. Fakes: the updated decoder's images of clean tokens, in 8 bits.
        if args.disc_weight > 0 and step >= start_d:
            discriminator.train().requires_grad_(True)
            for micro, tokens in zip(batches.micro_batches, clean_tokens):
                real = images[micro]  # (B, 3, H, W)
                share = len(real) / len(rows)
                ddp_discriminator.require_backward_grad_sync = micro is batches.micro_batches[-1]
                with autocast:
                    with torch.no_grad():
                        fake = to_uint8(encoder.denormalize(decoder(tokens))) / 255
                        fake_features = disc_backbone(diffaug(fake, u_fake[micro]))
                        real_features = disc_backbone(diffaug(real, u_real[micro]))
                    logits_fake = ddp_discriminator(fake_features)  # (B, layers N)
                    logits_real = ddp_discriminator(real_features)  # (B, layers N)
                loss = share * hinge_d_loss(logits_real, logits_fake)
                loss.backward()
                losses[4] += loss.detach()
            d_norm = nn.utils.get_total_norm([p.grad for p in discriminator.parameters()])
            if d_norm.isfinite():
                d_optimizer.step()
            else:
                finite = False
            d_optimizer.zero_grad()

        # Updates with non-finite gradients were skipped; five in a row end the run.
        if finite:
            loss_sums += losses
            num_summed += 1
            skipped_in_a_row = 0
        else:
            skipped += 1
            skipped_in_a_row += 1
            if skipped_in_a_row == 5:
                raise UsageError("five non-finite gradients in a row; lower --lr and change --out")
        images_done += args.global_batch_size
        done = step + 1  # steps completed
        final = done == args.steps

        # Log
        if done % args.log_every == 0 or final:
            means = loss_sums / max(1, num_summed)
            if world_size > 1:
                dist.all_reduce(means)
                means /= world_size
            if rank == 0:
                numbers = {
                    "step": done,
                    **dict(zip(LOSSES, means.tolist())),
                    "lr": learning_rate(step, args),
                    "skipped": skipped,
                    "images_per_s": images_done / (time.perf_counter() - start),
                }
                rae.write_log(log, numbers)
            loss_sums.zero_()
            num_summed = 0
            images_done = 0
            start = time.perf_counter()
        pause = time.perf_counter()

        # Evaluate the EMA
        if rank == 0 and (done % args.eval_every == 0 or final):
            numbers, grid = evaluate(encoder, ema, val_data, args, eval_batch_size, lpips)
            rae.write_log(log, {"step": done, **numbers})
            save_grid(to_uint8(grid), out / f"grid_{done:07d}.png", columns=len(grid) // 3)

        # Save last, so that any log line or grid due at this step is already written.
        if rank == 0 and (done % args.save_every == 0 or final):
            checkpoint = {
                "model": decoder.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "discriminator": discriminator.state_dict(),
                "d_optimizer": d_optimizer.state_dict(),
                "step": done,
                "settings": settings,
                **decoder_info,
            }
            rae.atomic_save(checkpoint, out / "checkpoint.pt")
        start += time.perf_counter() - pause  # images_per_s counts training time only

    rae.print0(f"finished; the decoder is in {out}/checkpoint.pt")


if __name__ == "__main__":
    rae.run_script(main)
