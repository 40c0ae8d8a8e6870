"""Pretrain a small ViT encoder by masked autoencoding, for the toy world or own images.

    python assets/pretrain_encoder.py                                       # out/encoder.pt, the toy world
    python assets/pretrain_encoder.py --data FOLDER --out my_encoder.pt     # own images, classes not needed
    python train_decoder.py --data FOLDER --encoder my_encoder.pt           # and then a decoder for it

Half of the patches are hidden, and a small decoder must draw all of them from the rest. Unlike MAE (He et al.
2022) the loss counts the visible patches too: with so few of them the last layer would otherwise drop its own
pixels.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rae import DEVICES, WORLD, Batches, cli, keyed, open_data, positive, progress, say, start  # noqa: E402


class MaskedAutoencoder(nn.Module):
    def __init__(self, vit, heads, depth=1):
        super().__init__()
        from timm.models.vision_transformer import Block
        n, width, self.patch = vit.patch_embed.num_patches, vit.embed_dim, vit.patch_embed.patch_size[0]
        self.vit, self.embed, self.norm = vit, nn.Linear(width, width), nn.LayerNorm(width)
        self.mask = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, n, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.pred = nn.Linear(width, self.patch ** 2 * 3)

    def forward(self, images, order, keep):
        """images (B, 3, H, W) in [-1, 1], order (B, N) of the patches, the first `keep` seen -> loss."""
        p, seen = self.patch, order[:, :keep, None]                                   # (B, keep, 1)
        x = self.vit.patch_embed(images) + self.vit.pos_embed                         # (B, N, D)
        x = self.vit.norm(self.vit.blocks(x.gather(1, seen.expand(-1, -1, x.shape[2]))))   # (B, keep, D)
        full = self.mask.expand(len(x), order.shape[1], -1).scatter(1, seen.expand_as(x), self.embed(x))
        drawn = self.pred(self.norm(self.blocks(full + self.pos)))                    # (B, N, 3 p p)
        target = nn.functional.unfold(images, p, stride=p).transpose(1, 2)            # (B, N, 3 p p)
        return (drawn - target).square().mean()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda text: sys.exit(f"error: {text}")  # one line for these mistakes too, without the usage
    p.add_argument("--data", default="toy", help="toy, or a folder of images")
    p.add_argument("--out", default="out/encoder.pt", help="the file to write")
    p.add_argument("--image-size", type=positive, default=32, help="pixels")
    p.add_argument("--patch", type=positive, default=8, help="pixels of a token's side")
    p.add_argument("--width", type=positive, default=64, help="channels C of a token")
    p.add_argument("--depth", type=positive, default=4, help="blocks")
    p.add_argument("--heads", type=positive, default=4, help="attention heads")
    p.add_argument("--mask", type=float, default=0.5, help="share of hidden patches")
    p.add_argument("--steps", type=positive, default=1500, help="optimiser steps")
    p.add_argument("--batch-size", type=positive, default=128, help="images a step")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--device", choices=DEVICES, default=DEVICES[0], help="where to compute")
    args = p.parse_args()
    args.precision = "fp32"
    device = start(args)
    if WORLD > 1:
        raise ValueError("pretrain_encoder.py is for one process; run it without torchrun")
    if args.image_size % args.patch or args.width % args.heads:
        raise ValueError("--image-size must be a multiple of --patch, and --width of --heads")
    if Path(args.out).exists():
        raise ValueError(f"{args.out}: exists already; remove it or pass another --out")
    from timm.models.vision_transformer import VisionTransformer
    torch.manual_seed(args.seed)
    config = dict(img_size=args.image_size, patch_size=args.patch, embed_dim=args.width, depth=args.depth,
                  num_heads=args.heads, num_classes=0, class_token=False, global_pool="")
    model = MaskedAutoencoder(VisionTransformer(**config), args.heads).to(device)
    data = open_data(args.data, args.image_size)
    batches = Batches(data, args.batch_size, args.seed, True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    say(f"{len(data)} images, {sum(x.numel() for x in model.vit.parameters()) / 1e6:.2f}M parameters")
    began = time.time()
    for step in progress(range(args.steps), args.batch_size):
        lr = args.lr * min(1, (step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = batches[step][0].to(device).float() / 127.5 - 1
        g = keyed(device, args.seed, step)
        order = torch.rand(len(images), model.pos.shape[1], generator=g, device=device)
        loss = model(images, order.argsort(1), max(1, round(model.pos.shape[1] * (1 - args.mask))))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, args.steps // 10) == 0:
            say(f"step {step + 1}  loss {loss.item():.4f}  "
                f"{(step + 1) * args.batch_size / (time.time() - began):.0f} images/s")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"vit": config, "mean": (0.5,) * 3, "std": (0.5,) * 3,
                "state_dict": {k: v.cpu() for k, v in model.vit.state_dict().items()}}, args.out)
    say(f"wrote {args.out} after {time.time() - began:.0f} s")


if __name__ == "__main__":
    cli(main)
