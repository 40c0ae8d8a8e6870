"""Check the quality of a default run: print one JSON line, exit with 1 if a number is too low.

    python train_diffusion.py && python extras/quality.py

A small convolutional classifier, trained here on the toy's training images, checks that
reconstructions and samples show their label. The linear probe is a logistic regression on the
latents of 10,000 training images.
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
from fid import psnr  # noqa: E402
from rae import UsageError, load_rae, run_script  # noqa: E402
from sample import balanced_labels, generate, load_model  # noqa: E402
from toy.world import ToyShapes  # noqa: E402

MINIMUM = {
    "classifier": 0.97,
    "linear_probe": 0.95,
    "psnr": 27.0,
    "reconstructions_right": 0.95,
    "samples_right": 0.95,
    "samples_right_cfg": 0.98,
}


def build_classifier():
    """Images (B, 3, 32, 32) in [0, 1] -> logits (B, 10)."""
    layers = []
    channels = 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))


def fit(model, inputs, labels, steps, batch_size=128):
    """Train a classifier on inputs(rows) and labels (n,), in random batches of rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(labels), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(inputs(rows)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default="out/diffusion/checkpoint.pt", help="diffusion checkpoint")
    p.add_argument("--decoder", default="toy", help="its decoder")
    args = p.parse_args()

    # Classifier
    torch.manual_seed(0)
    train = ToyShapes("train")
    val = ToyShapes("val")
    images = torch.from_numpy(train.images)  # uint8
    labels = torch.from_numpy(train.labels)
    val_images = torch.from_numpy(val.images).float() / 255
    val_labels = torch.from_numpy(val.labels)
    classifier = fit(build_classifier(), lambda rows: images[rows].float() / 255, labels, 800)
    scores = {"classifier": accuracy(classifier, val_images, val_labels)}

    # Latents and reconstructions
    rae = load_rae(args.decoder)
    z = torch.cat([rae.encode(x.float() / 255) for x in images[:10000].split(500)]).flatten(1)
    z_val = torch.cat([rae.encode(x) for x in val_images.split(500)])
    reconstructions = torch.cat([rae.decode(x).clamp(0, 1) for x in z_val.split(500)])
    probe = nn.Linear(z.shape[1], 10)
    probe = fit(probe, lambda rows: z[rows], labels[:10000], 1000, batch_size=512)
    scores["linear_probe"] = accuracy(probe, z_val.flatten(1), val_labels)
    scores["psnr"] = psnr(reconstructions, val_images).mean().item()
    scores["reconstructions_right"] = accuracy(classifier, reconstructions, val_labels)

    # Samples
    model, settings, _ = load_model(args.ckpt)
    y = balanced_labels(range(10), 500)
    timesteps = time_grid(50, settings["alpha"])
    for name, cfg_scale in (("samples_right", 1.0), ("samples_right_cfg", 1.5)):
        samples = generate(rae, model, y, timesteps, seed=0, cfg_scale=cfg_scale) / 255
        scores[name] = accuracy(classifier, samples, torch.tensor(y))

    print(json.dumps({name: round(score, 4) for name, score in scores.items()}))
    low = [f"{name} {scores[name]:.4f} < {m}" for name, m in MINIMUM.items() if scores[name] < m]
    if low:
        raise UsageError("too low: " + ", ".join(low))


if __name__ == "__main__":
    run_script(main)
