"""Pretrain a small ViT encoder by masked autoencoding, for the toy world or own images.

    python extras/pretrain_encoder.py                                    # toy -> out/encoder.pt
    python extras/pretrain_encoder.py --data FOLDER --out my_encoder.pt  # own images
    python train_decoder.py --data FOLDER --encoder my_encoder.pt        # then a decoder for it

Half of the patches are hidden, and a small decoder must draw all of them from the rest. Unlike in
MAE (He et al. 2022) the loss counts the visible patches too: with so few of them the last layer
would otherwise drop its own pixels. Classes are not needed.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rae import (  # noqa: E402
    StepBatches,
    available_devices,
    error_line,
    keyed_generator,
    natural,
    number,
    open_data,
    parse_flags,
    positive_int,
    save_file,
)


class MaskedAutoencoder(nn.Module):
    """The encoder `vit`, and one block that draws all patches from those that the encoder saw."""

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

    def forward(self, images, order, num_seen):
        """The loss, a number, on images (B, 3, H, W) in [-1, 1].

        order (B, N) holds the patches' numbers; the encoder sees the first num_seen of them.
        """
        # The encoder, on the patches that it may see.
        seen = order[:, :num_seen, None]  # (B, seen, 1)
        x = self.vit.patch_embed(images) + self.vit.pos_embed  # (B, N, D)
        x = x.gather(1, seen.expand(-1, -1, x.shape[2]))  # (B, seen, D)
        x = self.vit.norm(self.vit.blocks(x))  # (B, seen, D)

        # The decoder, on these tokens in their places and the mask token everywhere else.
        masked = self.mask_token.expand(len(x), self.num_tokens, -1)  # (B, N, D)
        full = masked.scatter(1, seen.expand_as(x), self.embed(x))  # (B, N, D)
        full = self.block(full + self.pos_embed)  # (B, N, D)
        drawn = self.pred(self.norm(full))  # (B, N, 3 p p)

        target = F.unfold(images, self.patch_size, stride=self.patch_size)  # (B, 3 p p, N)
        return (drawn - target.transpose(1, 2)).square().mean()


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", default="toy", help="toy, or a folder of images")
    p.add_argument("--out", default="out/encoder.pt", help="the file to write")
    # the encoder
    p.add_argument("--image-size", type=positive_int, default=32, help="pixels")
    p.add_argument("--patch", type=positive_int, default=8, help="pixels of a token's side")
    p.add_argument("--width", type=positive_int, default=128, help="channels C of a token")
    p.add_argument("--depth", type=positive_int, default=4, help="blocks")
    p.add_argument("--heads", type=positive_int, default=4, help="attention heads")
    # its training
    p.add_argument("--mask", type=number(0, 1), default=0.5, help="share of hidden patches")
    p.add_argument("--steps", type=positive_int, default=1500, help="optimiser steps")
    p.add_argument("--batch-size", type=positive_int, default=128, help="images a step")
    p.add_argument("--lr", type=number(0), default=2e-3, help="peak learning rate")
    p.add_argument("--seed", type=natural, default=0, help="of everything random")
    devices = available_devices()
    p.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    return parse_flags(p)


def learning_rate(step, args):
    """50 steps of linear warm-up, and a cosine to zero over the whole run."""
    warmup = min(1, (step + 1) / 50)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
    return args.lr * min(warmup, cosine)


def main():
    args = get_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("pretrain_encoder.py is for one process; run it without torchrun")
    if args.image_size % args.patch != 0 or args.width % args.heads != 0:
        raise ValueError("--image-size must be a multiple of --patch, and --width of --heads")
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or pass another --out")
    out.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after the work

    # The model. The config goes into the file, and rae.build_encoder makes the same ViT of it.
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
    torch.manual_seed(args.seed)  # for the initial weights; every later draw has a key of its own
    model = MaskedAutoencoder(VisionTransformer(**config), args.heads).to(args.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    data = open_data(args.data, args.image_size)
    batches = StepBatches(data, args.batch_size, args.seed, flip=True)
    num_seen = max(1, round(model.num_tokens * (1 - args.mask)))
    num_parameters = sum(p.numel() for p in model.vit.parameters()) / 1e6
    print(f"{args.device}: {len(data)} images, {num_parameters:.2f}M parameters", flush=True)

    began = time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        images, _ = batches[step]
        images = images.to(args.device).float() / 127.5 - 1  # (B, 3, H, W)

        # A random order of the patches for each image.
        g = keyed_generator(args.device, args.seed, step)
        u = torch.rand(len(images), model.num_tokens, generator=g, device=args.device)
        order = u.argsort(1)  # (B, N)

        loss = model(images, order, num_seen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        done = step + 1
        if done % max(1, args.steps // 10) == 0:
            rate = done * args.batch_size / (time.time() - began)
            print(f"step {done}  loss {loss.item():.4f}  {rate:.0f} images/s", flush=True)

    # Colours of [0, 1] become the [-1, 1] of this training by a mean and deviation of 0.5.
    state = {name: weight.cpu() for name, weight in model.vit.state_dict().items()}
    half = (0.5, 0.5, 0.5)
    save_file({"vit": config, "mean": half, "std": half, "state_dict": state}, out)
    print(f"wrote {out} after {time.time() - began:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
