"""Pretrain a small ViT encoder as a masked autoencoder, on the toy world or your images.

    python extras/pretrain_encoder.py                                    # toy -> out/encoder.pt
    python extras/pretrain_encoder.py --data FOLDER --out my_encoder.pt  # your images
    python train_decoder.py --data FOLDER --encoder my_encoder.pt        # then its decoder

The encoder sees half of the patches, and a one-block decoder predicts all of them. Unlike in MAE
(He et al. 2022), the loss includes the visible patches: small encoders otherwise forget their own
pixels in the last layer, and the RAE decoder needs them. Classes are not used.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rae import (  # noqa: E402
    UsageError,
    atomic_save,
    available_devices,
    bounded,
    make_folder,
    non_negative_int,
    open_data,
    positive_int,
    run_script,
    seeded_generator,
)
from train_diffusion import StepBatches  # noqa: E402


class MaskedAutoencoder(nn.Module):
    """The encoder `vit`, and a decoder of one block."""

    def __init__(self, vit, num_heads):
        super().__init__()
        from timm.models.vision_transformer import Block

        width = vit.embed_dim
        self.patch_size = vit.patch_embed.patch_size[0]
        self.num_tokens = vit.patch_embed.num_patches
        self.vit = vit
        self.embed = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.num_tokens, width) * 0.02)
        self.block = Block(width, num_heads, qkv_bias=True)
        self.pred = nn.Linear(width, self.patch_size**2 * 3)

    def forward(self, images, order, num_visible):
        """The loss, a scalar, on images (B, 3, H, W) in [-1, 1].

        order (B, N) is a permutation of the patches; the first num_visible are visible.
        """
        # Encoder, on the visible patches
        visible = order[:, :num_visible, None]  # (B, visible, 1)
        x = self.vit.patch_embed(images) + self.vit.pos_embed  # (B, N, D)
        x = x.gather(1, visible.expand(-1, -1, x.shape[2]))  # (B, visible, D)
        x = self.vit.norm(self.vit.blocks(x))  # (B, visible, D)

        # Decoder, on visible tokens in their places and mask tokens in all others
        x = self.embed(x)  # (B, visible, D)
        masked = self.mask_token.expand(len(x), self.num_tokens, -1)  # (B, N, D)
        x = masked.scatter(1, visible.expand_as(x), x)  # (B, N, D)
        x = self.block(x + self.pos_embed)  # (B, N, D)
        x = self.pred(self.norm(x))  # (B, N, 3 p p)

        target = F.unfold(images, self.patch_size, stride=self.patch_size)  # (B, 3 p p, N)
        return (x - target.transpose(1, 2)).square().mean()


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", default="toy", help="toy, or a folder of images")
    p.add_argument("--out", default="out/encoder.pt", help="file to write")
    # encoder
    p.add_argument("--image-size", type=positive_int, default=32, help="pixels")
    p.add_argument("--patch", type=positive_int, default=8, help="patch size in pixels")
    p.add_argument("--width", type=positive_int, default=128, help="channels C of a token")
    p.add_argument("--depth", type=positive_int, default=4, help="number of blocks")
    p.add_argument("--heads", type=positive_int, default=4, help="attention heads")
    # training
    p.add_argument("--mask", type=bounded(0, 1), default=0.5, help="share of masked patches")
    p.add_argument("--steps", type=positive_int, default=1500, help="optimizer steps")
    p.add_argument(
        "--batch-size",
        dest="global_batch_size",
        metavar="N",
        type=positive_int,
        default=128,
        help="images per step",
    )
    p.add_argument("--workers", type=non_negative_int, default=0, help="data loading processes")
    p.add_argument("--lr", type=bounded(0), default=2e-3, help="peak learning rate")
    p.add_argument("--seed", type=non_negative_int, default=0, help="random seed")
    devices = available_devices()
    p.add_argument("--device", choices=devices, default=devices[0])
    p.set_defaults(micro_batch_size=None)  # StepBatches reads it
    return p.parse_args()


def learning_rate(step, args):
    """50 steps of linear warm-up, within a cosine to zero over the whole run."""
    warmup = min(1, (step + 1) / 50)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
    return args.lr * min(warmup, cosine)


def main():
    args = get_args()
    if args.image_size % args.patch != 0 or args.width % args.heads != 0:
        raise UsageError("--image-size must be a multiple of --patch, and --width of --heads")
    out = Path(args.out)
    if out.exists():  # a decoder may have been trained for it
        raise UsageError(f"{out} already exists; delete it or change --out")
    make_folder(out.parent)

    # Model. load_encoder rebuilds the ViT from the config in the file.
    from timm.models.vision_transformer import VisionTransformer

    config = {
        "img_size": args.image_size,
        "patch_size": args.patch,
        "embed_dim": args.width,
        "depth": args.depth,
        "num_heads": args.heads,
        "num_classes": 0,
        "class_token": False,
        "global_pool": "",
    }
    torch.manual_seed(args.seed)  # initial weights; every later draw is seeded by its place
    model = MaskedAutoencoder(VisionTransformer(**config), args.heads).to(args.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    data = open_data(args.data, args.image_size)
    batches = StepBatches(data, args, flip=True, rank=0, world_size=1)
    num_visible = max(1, round(model.num_tokens * (1 - args.mask)))
    num_parameters = sum(p.numel() for p in model.vit.parameters()) / 1e6
    print(f"{args.device}: {len(data)} images, {num_parameters:.2f}M parameters", flush=True)

    start = time.perf_counter()
    loader = DataLoader(
        batches, batch_size=None, sampler=range(args.steps), num_workers=args.workers
    )
    for step, (images, _) in enumerate(loader):
        images = images.to(args.device).float() / 127.5 - 1  # (B, 3, H, W)
        generator = seeded_generator("mask", args.seed, step, device=args.device)
        u = torch.rand(len(images), model.num_tokens, generator=generator, device=args.device)
        order = u.argsort(1)  # (B, N), a random permutation per image

        loss = model(images, order, num_visible)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if done % max(1, args.steps // 10) == 0:
            rate = done * args.global_batch_size / (time.perf_counter() - start)
            print(f"step {done}  loss {loss.item():.4f}  images_per_s {rate:.0f}", flush=True)

    # Mean and std 0.5 turn [0, 1] into the [-1, 1] of this training.
    state = {name: weight.cpu() for name, weight in model.vit.state_dict().items()}
    half = (0.5, 0.5, 0.5)
    atomic_save({"vit": config, "mean": half, "std": half, "state_dict": state}, out)
    print(f"wrote {out} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_script(main)
