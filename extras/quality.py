"""How good is the default? One JSON line, and exit code 1 if a number is below its bar.

    python train_diffusion.py && python extras/quality.py

A small convolutional classifier, trained here on toy training images alone, judges reconstructions
and samples. The linear probe is a logistic regression on the normalised latents of 10,000 training
images.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit_dh import time_grid  # noqa: E402
from rae import error_line, load_rae, psnr  # noqa: E402
from sample import balanced_labels, generate, load_model  # noqa: E402
from toy.world import ToyShapes  # noqa: E402

BARS = {
    "classifier": 0.97,
    "linear_probe": 0.95,
    "psnr": 27.0,
    "reconstructions_right": 0.95,
    "samples_right": 0.95,
    "samples_right_cfg": 0.98,
}


def classifier():
    """Images (B, 3, 32, 32) in [0, 1] -> scores (B, 10)."""
    layers = []
    channels = 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))


def fit(model, inputs, labels, steps, batch=128, lr=2e-3):
    """Train a classifier on inputs(rows) and labels (n,); random batches from a fixed seed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(labels), (batch,), generator=g)
        loss = F.cross_entropy(model(inputs(rows)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def right(model, x, y):
    """The share of x that a classifier takes for y."""
    return (model(x).argmax(1) == y).float().mean().item()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default="out/diffusion/checkpoint.pt", help="diffusion run to judge")
    p.add_argument("--decoder", default="toy", help="decoder to judge")
    args = p.parse_args()

    # The judge.
    torch.manual_seed(0)
    train = ToyShapes("train")
    val = ToyShapes("val")
    images = torch.from_numpy(train.images)
    labels = torch.from_numpy(train.labels)
    real = torch.from_numpy(val.images).float() / 255
    real_labels = torch.from_numpy(val.labels)
    judge = fit(classifier(), lambda rows: images[rows].float() / 255, labels, 800)
    result = {"classifier": right(judge, real, real_labels)}

    # Latents and reconstructions.
    rae = load_rae(args.decoder)
    with torch.no_grad():
        z = torch.cat([rae.encode(x.float() / 255) for x in images[:10000].split(500)]).flatten(1)
        z_val = torch.cat([rae.encode(x) for x in real.split(500)])
        again = torch.cat([rae.decode(x).clamp(0, 1) for x in z_val.split(500)])
    probe = nn.Linear(z.shape[1], 10)
    probe = fit(probe, lambda rows: z[rows], labels[:10000], 1000, batch=512)
    result["linear_probe"] = right(probe, z_val.flatten(1), real_labels)
    result["psnr"] = psnr(again, real).mean().item()
    result["reconstructions_right"] = right(judge, again, real_labels)

    # Samples.
    model, trained_with = load_model(args.ckpt)
    y = balanced_labels(range(10), 500)
    times = time_grid(50, trained_with["alpha"])
    for name, scale in (("samples_right", 1.0), ("samples_right_cfg", 1.5)):
        pictures = []
        for first in (0, 250):
            some = y[first : first + 250]
            pictures.append(generate(rae, model, some, times, 0, first=first, cfg_scale=scale))
        result[name] = right(judge, torch.cat(pictures), torch.tensor(y))

    print(json.dumps({k: round(v, 4) for k, v in result.items()}))
    low = [f"{k} {result[k]:.4f} < {bar}" for k, bar in BARS.items() if result[k] < bar]
    if low:
        raise ValueError("below the bar: " + ", ".join(low))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
