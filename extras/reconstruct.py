"""Reconstruct images with an RAE; print PSNR, SSIM and LPIPS, and save the images for rFID.

    python extras/reconstruct.py                   # toy decoder on the toy's validation images
    python fid.py out/reconstructions.npz          # distance in the toy encoder's features, not FID

    torchrun --standalone --nproc_per_node=8 -- extras/reconstruct.py --preset imagenet256 --lpips
    python fid.py out/reconstructions.npz imagenet/val --crop 256                       # rFID

For --out NAME this writes NAME/000000.png and so on, in the order of the center-cropped images, and
packs them into NAME.npz. PSNR, SSIM and LPIPS are means over the images, of 8-bit reconstructions.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fid import psnr  # noqa: E402
from rae import (  # noqa: E402
    bounded,
    load_rae,
    make_folder,
    non_negative_int,
    open_data,
    parse_args,
    positive_int,
    rank_batches,
    read_batches,
    run_script,
    seeded_noise,
    setup_distributed,
)
from sample import to_uint8  # noqa: E402
from train_decoder import load_lpips  # noqa: E402

TOY = {"data": "toy", "decoder": "toy", "batch_size": 250, "workers": 0}
IMAGENET = {"data": "imagenet/val", "batch_size": 64, "workers": 12}
PRESETS = {
    "toy": TOY,
    "imagenet256": IMAGENET | {"decoder": "released:dinov2-b"},
    "imagenet512": IMAGENET | {"decoder": "released:dinov2-b-512", "batch_size": 16},
}


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--data", help="toy (validation images), or a folder")
    p.add_argument("--decoder", help="toy, a checkpoint, an official file or released:NAME")
    p.add_argument("--encoder", help="for an official decoder file: its encoder")
    p.add_argument("--encoder-weights", help="local file of the encoder's timm weights")
    p.add_argument("--stats", help="for an official decoder file: its latent statistics")
    p.add_argument("--sigma", type=bounded(0), default=0.0, help="noise level of the tokens")
    p.add_argument("--lpips", action="store_true", help="compute LPIPS too")
    p.add_argument("--lpips-weights", help="local file of LPIPS' VGG weights")
    p.add_argument("--vgg-weights", help="local file of VGG16's timm weights")
    p.add_argument("--out", default="out/reconstructions", help="NAME of the folder and the .npz")
    p.add_argument("--batch-size", type=positive_int, help="images per forward and rank")
    p.add_argument("--workers", type=non_negative_int, help="data loading processes")
    return parse_args(p, PRESETS)


def ssim(a, b):
    """SSIM (Wang et al. 2004) of images (B, 3, H, W) in [0, 1], as (B,).

    Per color, with a Gaussian window of 11 px and sigma 1.5 that stays inside the image.
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


def main():
    args = get_args()
    rank, world_size, device, autocast = setup_distributed(args)
    rae = load_rae(args.decoder, args.encoder, args.encoder_weights, args.stats, device)
    data = open_data(args.data, rae.image_size, "val")
    metrics = {"PSNR": psnr, "SSIM": ssim}
    if args.lpips:
        metrics["LPIPS"] = load_lpips(args, device)
    folder = Path(args.out)
    make_folder(folder)

    # Every rank fills its rows; the others stay zero. Batches are the same for any number of ranks.
    scores = torch.zeros(len(data), len(metrics), device=device)
    batches = rank_batches(len(data), args.batch_size)
    for images, batch in zip(read_batches(data, batches, args.workers, device), batches):
        tokens = rae.encoder(images)  # (B, N, C), outside autocast as in training
        keys = [("reconstruct", args.seed, i) for i in batch]
        eps = seeded_noise(keys, tokens.shape[1:], device)  # (B, N, C)
        with autocast:
            decoded = rae.encoder.denormalize(rae.decoder(tokens + args.sigma * eps))
        pixels = to_uint8(decoded)  # (B, 3, H, W)
        columns = [metric(pixels / 255, images) for metric in metrics.values()]  # (B,) each
        scores[batch.start : batch.stop] = torch.stack(columns, dim=1)
        for i, image in zip(batch, pixels.permute(0, 2, 3, 1).cpu().numpy()):
            Image.fromarray(image).save(folder / f"{i:06d}.png")
    if world_size > 1:
        dist.all_reduce(scores)
    means = scores.cpu().double().mean(0).tolist()  # waits for all ranks, and so for their PNGs

    if rank == 0:
        images = np.empty((len(data), rae.image_size, rae.image_size, 3), np.uint8)
        for i in range(len(data)):
            images[i] = Image.open(folder / f"{i:06d}.png")
        with open(f"{folder}.npz.tmp", "wb") as f:
            np.savez(f, arr_0=images)
        os.replace(f"{folder}.npz.tmp", f"{folder}.npz")
        numbers = "  ".join(f"{name} {mean:.4f}" for name, mean in zip(metrics, means))
        print(f"{numbers}  ({len(data)} images, {args.decoder}, sigma {args.sigma:g})")
        print(f"wrote {folder}.npz")


if __name__ == "__main__":
    run_script(main)
