"""Pictures from a trained model: Euler from noise to a latent, then the decoder (section 5.1, appendix E).

    python sample.py                                               # out/diffusion -> out/samples.png and .npz
    python sample.py --like cat.png --strength 0.6 --out edits.png # that image noised, denoised as each class
    torchrun --standalone --nproc_per_node=8 -- sample.py --num 50000 --out x.npz    # "--", or it takes --num

--out x.png is a grid of up to 100 pictures with x.npz of all beside it; x.npz holds uint8 (N, H, W, 3) as
ADM's evaluator wants it; else a folder of PNGs; each with a record of weights, flags and seed. Sample i
depends on (seed, i) and its label, not on the batch or process it is drawn in.
"""

import json, time
from contextlib import nullcontext
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dit_dh import load_released, sample, shift_alpha, time_grid
from fid import gathered
from rae import (RANK, WORLD, autocast, check, cli, fingerprint, keyed_noise, load_rae, open_data, parser,
                 positive, progress, read_file, read_image, read_images, released_file, save_grid, say, start,
                 to_uint8)

PRESETS = {"toy": dict(ckpt="out/diffusion/checkpoint.pt", num=500, cfg=1.5, batch_size=250),
           "imagenet256": dict(ckpt="released:DiTDH-XL-256", num=64, cfg=1.0, batch_size=64),
           "imagenet512": dict(ckpt="released:DiTDH-XL-512", num=64, cfg=1.0, batch_size=32)}

def balanced_labels(classes, num):
    """num labels, each class equally often, in turn (FID-50k: 50 each); if too few, spread evenly."""
    return [classes[i % len(classes) if num >= len(classes) else i * len(classes) // num] for i in range(num)]

@torch.no_grad()
def generate(rae, model, labels, grid, seed, first=0, begin=None, precision=nullcontext(), **guidance):
    """Images (B, 3, H, W) in [0, 1] of labels (B,), samples number first, first + 1, ... of a seed.
    begin: latents (all, N, C) of all samples to begin from at grid[0], under the noise of sample 0."""
    device, rows = rae.mean.device, range(first, first + len(labels))
    noise = keyed_noise([(seed, i if begin is None else 0) for i in rows], rae.mean.shape, device)
    if begin is not None:
        noise = (1 - grid[0]) * begin[rows.start:rows.stop] + grid[0] * noise         # (B, N, C)
    with precision:
        z = sample(model, noise, torch.as_tensor(labels, device=device), grid, **guidance)  # (B, N, C)
        return rae.decode(z).clamp(0, 1)                                              # (B, 3, H, W)

def neighbours(encoder, images, data, n):
    """Images (B, 3, H, W), each before the n of a data set nearest to it by the encoder's tokens, averaged
    over the image: (B + B n, 3, size, size), and the cosine of the nearest, on average."""
    def features(x):
        return F.normalize(encoder(x).mean(1), dim=1)                                 # (B, C)
    parts = (range(i, min(i + 256, len(data))) for i in range(0, len(data), 256))
    theirs = torch.cat([features(read_images(data, part, images.device)) for part in parts])
    cosines, nearest = (features(images) @ theirs.T).topk(min(n, len(data)))          # (B, n)
    images = F.adaptive_avg_pool2d(images, encoder.image_size)                        # (B, 3, h, w)
    rows = [x for image, row in zip(images, nearest.tolist())
            for x in (image[None], read_images(data, row, images.device))]
    return torch.cat(rows), cosines[:, 0].mean().item()

class Samples:
    """Samples as fid.py takes images: 8-bit batches, drawn by `generate` with this when asked for."""
    source = "samples"
    def __init__(self, rae, model, labels, *arguments, **more):
        self.labels, self.size = labels, rae.decoder.grid * rae.decoder.patch_size
        self.draw = lambda labels, first: generate(rae, model, labels, *arguments, first, **more)
    def __len__(self):
        return len(self.labels)
    def batches(self, num, size, rank, world):
        """(number of the first sample, batch (b, 3, H, W) uint8): every world-th batch from the rank-th."""
        for first in range(rank * size, num, world * size):
            images = self.draw(self.labels[first:min(first + size, num)], first)
            yield first, to_uint8(images).cpu()

def load_model(name):
    """Model of a checkpoint, a released file or released:NAME; ValueError names what is wrong with it."""
    return load_released(read_file(released_file(name)), where=name)

def check_fit(name, model, rae):
    """ValueError unless the model was made for this latent space."""
    check((model.latent_dim, model.grid) == (rae.encoder.dim, rae.encoder.grid),
          f"{name}: made for {model.grid ** 2} tokens x {model.latent_dim}, the decoder's are "
          f"{rae.encoder.grid ** 2} x {rae.encoder.dim}; pass the --decoder of its training")
    check(model.about.get("latents", rae.fingerprint()) == rae.fingerprint(),
          f"{name}: trained in other latents (encoder or statistics); pass their --decoder")

def class_list(text):
    """argparse type: numbers like 0,3,7, or null."""
    return text if text == "null" else [int(c) for c in text.split(",")]

def main():
    p = parser(__doc__, PRESETS, training=False)
    flag = p.add_argument
    flag("--ckpt", help="checkpoint of a run, a released file or released:NAME")
    flag("--decoder", help="decoder file or released:NAME; default: that of the run")
    flag("--encoder", help="encoder that a bare released decoder belongs to")
    flag("--stats", help="latent statistics file of a bare released decoder")
    flag("--num", type=positive, help="samples; with --like one a class, with --interpolate 8")
    flag("--classes", type=class_list, help="labels like 0,3,7, or null for none; default: all, balanced")
    flag("--steps", type=positive, default=50, help="evaluations (released: 49, --t-last 0.001)")
    flag("--t-last", type=float, default=0.0, help="time of the last point, before the shift")
    flag("--alpha", type=float, help="schedule shift; default: the run's, else sqrt(N C / 4096)")
    flag("--cfg", type=float, help="classifier-free guidance, 1 for none")
    flag("--guide", help="AutoGuidance: checkpoint of a weaker model; turns cfg off")
    flag("--scale", type=float, default=1.42, help="AutoGuidance scale (paper: 1.42, 512 px 1.5)")
    flag("--interval", type=float, nargs=2, default=(0, 1), metavar=("LO", "HI"), help="guided times")
    flag("--like", metavar="IMAGE", help="begin from this image instead, once for each class")
    flag("--interpolate", nargs=2, metavar=("A", "B"), help="begin from 8 latents between images")
    flag("--strength", type=float, default=0.6, help="time of that beginning, before the shift")
    flag("--neighbours", metavar="FOLDER", help="show the nearest images of these too, or of toy")
    flag("--out", default="out/samples.png", help="x.png, x.npz or a folder")
    args = p.parse_args()
    check(args.ckpt != PRESETS["toy"]["ckpt"] or Path(args.ckpt).is_file(),
          f"{args.ckpt}: no such file; run train_diffusion.py first, or pass --ckpt")
    device = start(args)
    # The model, the latent space that it was trained in, and a guide.
    model = load_model(args.ckpt).to(device)
    made = model.about.get("settings", {})
    files = {k: vars(args)[k] or made.get(k) for k in ("decoder", "encoder", "encoder_weights", "stats")}
    if args.ckpt.startswith("released:") and not files["decoder"]:
        files["decoder"] = "released:dinov2-b" + "-512" * args.ckpt.endswith("512")
    check(files["decoder"], f"{args.ckpt}: the file does not name its decoder; pass --decoder")
    rae = load_rae(**files, device=device)
    check_fit(args.ckpt, model, rae)
    guidance, guide = dict(cfg=args.cfg, interval=args.interval), None
    if args.guide:
        guide = load_model(args.guide).to(device)
        check_fit(args.guide, guide, rae)
        check(guide.num_classes == model.num_classes,
              f"{args.guide}: has {guide.num_classes} classes, the model {model.num_classes}")
        guidance |= dict(cfg=1.0, guide=guide, scale=args.scale)
    # What is drawn, and a record of it.
    unsaid = not args.classes and (args.interpolate or made.get("label_drop") == 1)
    null = bool(unsaid) or args.classes == "null"
    classes = [model.num_classes] if null else args.classes or list(range(model.num_classes))
    wrong = [c for c in classes if not 0 <= c < model.num_classes + null]
    check(not wrong, f"--classes {wrong}: out of range 0 to {model.num_classes - 1}")
    ends, begin = args.interpolate or [args.like] * bool(args.like), None
    if ends:                                           # one row of pictures, from latents between the ends
        args.num = 8 if args.interpolate else len(classes)
        z = rae.encode(torch.stack([torch.tensor(read_image(file, rae.encoder.image_size)) / 255
                                    for file in ends]).to(device))                    # (1 or 2, N, C)
        begin = torch.lerp(z[0], z[-1], torch.linspace(0, 1, args.num, device=device)[:, None, None])
    alpha = args.alpha or model.about.get("alpha") or shift_alpha(*rae.mean.shape)
    grid = time_grid(args.steps, alpha, args.t_last, args.strength if ends else 1.0)
    say(f"{args.ckpt}: {args.num} samples, {args.steps} steps, alpha {alpha:.3f}, "
        + (f"AutoGuidance {args.scale}" if guide else f"cfg {args.cfg}"))
    record = {k: v for k, v in vars(args).items() if k not in ("out", "batch_size", "device", "preset")}
    record |= {"alpha": alpha, "weights": fingerprint(model.state_dict()), "latents": rae.fingerprint(),
               "guide_weights": fingerprint(guide.state_dict()) if guide else None,
               "begin": fingerprint({"z": begin}) if ends else None}
    out, record = Path(args.out), json.dumps(record)
    folder, kept = out.suffix not in (".png", ".npz"), out / "record.json"
    fresh = not folder or not out.exists() or not any(out.iterdir())
    check(fresh or kept.exists() and kept.read_text() == record,
          f"{out}: not empty, and its images would mix with others; pass another --out")
    # The samples, from all processes, and their files.
    began, samples = time.time(), Samples(rae, model, balanced_labels(classes, args.num), grid, args.seed,
                                          begin=begin, precision=autocast(device, args), **guidance)
    images = dict(progress(samples.batches(args.num, args.batch_size, RANK, WORLD), args.batch_size * WORLD,
                           total=-(-args.num // (args.batch_size * WORLD))))
    images = {first: batch for part in gathered(images) for first, batch in part.items()}
    if RANK > 0:
        return
    images = torch.cat([images[first] for first in sorted(images)])                   # (N, 3, H, W) uint8
    say(f"{args.num / (time.time() - began):.2f} images/s")
    pixels = images.permute(0, 2, 3, 1).numpy()                                       # (N, H, W, 3)
    (out if folder else out.parent).mkdir(parents=True, exist_ok=True)
    if folder:
        kept.write_text(record)
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(out / f"{i:06d}.png")
    else:
        np.savez(out.with_suffix(".npz"), arr_0=pixels, record=record)
    if out.suffix == ".png":
        columns = next((n for n in (args.num if ends else len(classes), 8) if n <= 10))
        save_grid(images[:100 // columns * columns] / 255, out, columns)
    if args.neighbours:
        data = open_data(args.neighbours, rae.encoder.image_size)
        path = out.with_name(f"{out.stem}_neighbours.png")
        sheet, cosine = neighbours(rae.encoder, images[:8].to(device) / 255, data, 7)
        save_grid(sheet, path, columns=len(sheet) // min(8, len(images)))
        say(f"{path}: samples, and the nearest of {len(data)} images (cosine {cosine:.3f})")
    say(f"wrote {out}")

if __name__ == "__main__":
    cli(main)
