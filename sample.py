"""Pictures from a trained model: Euler from noise to a latent, then the decoder (5.1, E, I).

    python sample.py                                               # out/diffusion -> out/samples.png and .npz
    python sample.py --classes 0,3,7 --cfg 2 --out shapes.png
    python sample.py --like cat.png --strength 0.6 --out edits.png # that image noised, denoised as each class
    python sample.py --preset imagenet256 --guide released:DiTDH-S-256 --scale 1.42 --num 50000 --out x.npz
    torchrun --standalone --nproc_per_node=8 -- sample.py --num 50000 --out x.npz

--out x.png is a grid of up to 100 pictures with x.npz of all beside it; x.npz alone holds uint8 (N, H, W, 3)
as ADM's evaluator wants it; anything else is a folder of PNGs. Each carries a record of weights, flags and
seed. Sample i depends on (seed, i) and its label, not on the batch or process it is drawn in.
The "--" keeps torchrun from reading --num as an option of its own.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from dit_dh import load_released, sample, shift_alpha, time_grid
from fid import gathered
from rae import (RANK, WORLD, autocast, cli, fingerprint, keyed_noise, load_rae, open_data, parse, positive,
                 read_file, read_image, read_images, released_file, save_grid, say, start, to_uint8)

PRESETS = {
    "toy": dict(ckpt="out/diffusion/checkpoint.pt", num=500, cfg=1.5, batch_size=250),
    "imagenet256": dict(ckpt="released:DiTDH-XL-256", num=64, cfg=1.0, batch_size=64),
    "imagenet512": dict(ckpt="released:DiTDH-XL-512", num=64, cfg=1.0, batch_size=32),
}

def balanced_labels(classes, num):
    """num labels, each class equally often, in turn (FID-50k: 50 each); if too few, spread evenly."""
    return [classes[i % len(classes) if num >= len(classes) else i * len(classes) // num] for i in range(num)]

@torch.no_grad()
def generate(rae, model, labels, grid, seed, first=0, source=None, **guidance):
    """Images (B, 3, H, W) in [0, 1] of labels (B,), samples number first, first + 1, ... of a seed.

    source: latents (B, N, C) to begin from at grid[0], all with the noise of sample 0."""
    device, number = rae.mean.device, range(first, first + len(labels))
    noise = keyed_noise([(seed, i if source is None else 0) for i in number], rae.mean.shape, device)
    if source is not None:
        noise = (1 - grid[0]) * source + grid[0] * noise                              # (B, N, C)
    z = sample(model, noise, torch.as_tensor(labels, device=device), grid, **guidance)   # (B, N, C)
    return rae.decode(z).clamp(0, 1)                                                  # (B, 3, H, W)

@torch.no_grad()
def neighbours(encoder, images, data, n):
    """(Cosines (B, n), numbers (B, n)) of the images of a data set nearest to images (B, 3, H, W), by the
    encoder's tokens averaged over the image."""
    def features(x):
        return F.normalize(encoder(x).mean(1), dim=1)                                 # (B, C)
    parts = (range(i, min(i + 256, len(data))) for i in range(0, len(data), 256))
    theirs = torch.cat([features(read_images(data, part, images.device)) for part in parts])
    return (features(images) @ theirs.T).topk(n)

class Samples:
    """Samples of a model as fid.py takes images: 8-bit batches, drawn when asked for."""

    def __init__(self, rae, model, labels, grid, seed, precision, begin=None, **guidance):
        self.parts, self.guidance, self.labels, self.precision = (rae, model), guidance, labels, precision
        self.grid, self.seed, self.begin, self.source = grid, seed, begin, "samples"
        self.size = rae.decoder.grid * rae.decoder.patch_size

    def __len__(self):
        return len(self.labels)

    def batches(self, num, size, rank, world):
        """(number of the first sample, batch (b, 3, H, W) uint8): every world-th batch from the rank-th."""
        for first in range(rank * size, num, world * size):
            labels = self.labels[first:min(first + size, num)]
            begin = None if self.begin is None else self.begin[first:first + len(labels)]
            with self.precision:
                images = generate(*self.parts, labels, self.grid, self.seed, first, begin, **self.guidance)
            yield first, to_uint8(images).cpu()

def load_model(name):
    """Model of a checkpoint, a released file or released:NAME; ValueError names what is wrong with it."""
    return load_released(read_file(released_file(name)), where=name)

def check_fit(name, model, rae):
    """ValueError unless the model was made for this latent space."""
    if (model.latent_dim, model.grid) != (rae.encoder.dim, rae.encoder.grid):
        raise ValueError(f"{name}: made for {model.grid ** 2} tokens x {model.latent_dim}, the decoder's are "
                         f"{rae.encoder.grid ** 2} x {rae.encoder.dim}; pass the --decoder of its training")
    if model.about.get("latents", rae.fingerprint()) != rae.fingerprint():
        raise ValueError(f"{name}: trained in other latents (encoder or statistics); pass their --decoder")

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", help="checkpoint of a run, a released file or released:NAME")
    p.add_argument("--decoder", help="decoder file or released:NAME; default: that of the run")
    p.add_argument("--encoder", help="encoder that a bare released decoder belongs to")
    p.add_argument("--encoder-weights", help="local file of the encoder's weights")
    p.add_argument("--stats", help="latent statistics file of a bare released decoder")
    p.add_argument("--num", type=positive, help="samples")
    p.add_argument("--classes", help="labels like 0,3,7, or null for none; default: all, balanced")
    p.add_argument("--steps", type=positive, default=50, help="evaluations (released: 49, --t-last 0.001)")
    p.add_argument("--t-last", type=float, default=0.0, help="time of the last point, before the shift")
    p.add_argument("--alpha", type=float, help="schedule shift; default: the run's, else sqrt(N C / 4096)")
    p.add_argument("--cfg", type=float, help="classifier-free guidance, 1 for none")
    p.add_argument("--guide", help="AutoGuidance: checkpoint of a weaker model; turns cfg off")
    p.add_argument("--scale", type=float, default=1.42, help="AutoGuidance scale (paper: 1.42, 512 px 1.5)")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
                   help="times that are guided")
    p.add_argument("--like", metavar="IMAGE", help="begin from this image instead, once for each class")
    p.add_argument("--interpolate", nargs=2, metavar=("A", "B"), help="begin from 8 latents between images")
    p.add_argument("--strength", type=float, default=0.6, help="time of that beginning, before the shift")
    p.add_argument("--neighbours", metavar="FOLDER", help="show the nearest images of these too, or of toy")
    p.add_argument("--out", default="out/samples.png", help="x.png, x.npz or a folder")
    p.add_argument("--batch-size", type=positive, help="samples at once")
    args = parse(p, PRESETS)
    if args.ckpt == PRESETS["toy"]["ckpt"] and not Path(args.ckpt).is_file():
        raise ValueError(f"{args.ckpt}: no such file; run train_diffusion.py first, or pass --ckpt")
    device = start(args)

    model = load_model(args.ckpt).to(device)
    settings = model.about.get("settings", {})
    files = {k: getattr(args, k) or settings.get(k)
             for k in ("decoder", "encoder", "encoder_weights", "stats")}
    if args.ckpt.startswith("released:") and not files["decoder"]:
        files["decoder"] = "released:dinov2-b" + ("-512" if args.ckpt.endswith("512") else "")
    if not files["decoder"]:
        raise ValueError(f"{args.ckpt}: the file does not name its decoder; pass --decoder")
    rae = load_rae(**files, device=device)
    check_fit(args.ckpt, model, rae)
    guidance = dict(cfg=args.cfg, interval=args.interval)
    if args.guide:
        guide = load_model(args.guide).to(device)
        check_fit(args.guide, guide, rae)
        if guide.num_classes != model.num_classes:
            raise ValueError(f"{args.guide}: has {guide.num_classes} classes, the model {model.num_classes}")
        guidance |= dict(cfg=1.0, guide=guide, scale=args.scale)
    classes = list(range(model.num_classes))
    if args.classes == "null" or args.interpolate and not args.classes or settings.get("unconditional"):
        classes = [model.num_classes]
    elif args.classes:
        try:
            classes = [int(c) for c in args.classes.split(",")]
        except ValueError:
            raise ValueError(f"--classes {args.classes}: wants numbers like 0,3,7 or null") from None
        wrong = [c for c in classes if not 0 <= c < model.num_classes]
        if wrong:
            raise ValueError(f"--classes {wrong[0]}: out of range 0 to {model.num_classes - 1}")
    alpha = args.alpha or model.about.get("alpha") or shift_alpha(*rae.mean.shape)
    ends, begin = args.interpolate or [args.like] * bool(args.like), None
    if ends:                                           # one row of pictures, from latents between the ends
        args.num = 8 if args.interpolate else len(classes)
        z = rae.encode(torch.stack([torch.tensor(read_image(file, rae.encoder.image_size)) / 255
                                    for file in ends]).to(device))                    # (1 or 2, N, C)
        begin = torch.lerp(z[0], z[-1], torch.linspace(0, 1, args.num, device=device)[:, None, None])
    grid = time_grid(args.steps, alpha, args.t_last, args.strength if ends else 1.0)
    labels = balanced_labels(classes, args.num)
    say(f"{args.ckpt}: {args.num} samples, {args.steps} steps, alpha {alpha:.3f}, "
        + (f"AutoGuidance {args.scale}" if args.guide else f"cfg {args.cfg}"))

    record = {k: v for k, v in vars(args).items() if k not in ("out", "batch_size", "device", "preset")}
    record |= {"alpha": alpha, "weights": fingerprint(model.state_dict()), "latents": rae.fingerprint(),
               "guide_weights": fingerprint(guide.state_dict()) if args.guide else None}
    out, record = Path(args.out), json.dumps(record)
    if out.suffix not in (".png", ".npz") and out.exists() and any(out.iterdir()):
        kept = out / "record.json"
        if not kept.is_file() or kept.read_text() != record:
            raise ValueError(f"{out}: not empty, and its images would mix with others; pass another --out")
    samples = Samples(rae, model, labels, grid, args.seed, autocast(device, args), begin, **guidance)
    images, began = {}, time.time()
    bar = tqdm(total=args.num, unit="image", disable=RANK > 0 or not sys.stderr.isatty())
    for first, batch in samples.batches(args.num, args.batch_size, RANK, WORLD):
        images[first] = batch
        bar.update(len(batch) * WORLD)
    images = {first: batch for part in gathered(images) for first, batch in part.items()}
    if RANK > 0:
        return
    images = torch.cat([images[first] for first in sorted(images)])                   # (N, 3, H, W) uint8
    say(f"{args.num / (time.time() - began):.2f} images/s")
    pixels = images.permute(0, 2, 3, 1).numpy()                                       # (N, H, W, 3)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix in (".png", ".npz"):
        np.savez(out.with_suffix(".npz"), arr_0=pixels, record=record)
    else:
        out.mkdir(exist_ok=True)
        (out / "record.json").write_text(record)
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(out / f"{i:06d}.png")
    if out.suffix == ".png":
        columns = args.num if ends else len(classes) if len(classes) <= 10 else 8
        save_grid(images[:100 // columns * columns] / 255, out, columns)
    if args.neighbours:
        size, shown = rae.encoder.image_size, images[:8].to(device) / 255
        data = open_data(args.neighbours, size)
        cosines, nearest = neighbours(rae.encoder, shown, data, min(7, len(data)))
        rows = [torch.cat([F.adaptive_avg_pool2d(image[None], size), read_images(data, row, device)])
                for image, row in zip(shown, nearest.tolist())]
        path = out.with_name(f"{out.stem}_neighbours.png")
        save_grid(torch.cat(rows), path, columns=len(rows[0]))
        say(f"{path}: samples, and the nearest of {len(data)} images (cosine {cosines[:, 0].mean():.3f})")
    say(f"wrote {out}")

if __name__ == "__main__":
    cli(main)
