"""Pictures from a trained model: Euler from noise to a latent, then the decoder (appendix E).

    python sample.py                                   # out/diffusion -> out/samples.png and .npz
    python sample.py --classes 0,3 --num 8 --out cats  # a folder of PNGs
    torchrun --standalone --nproc_per_node=8 -- sample.py --num 50000 --out samples.npz

(torchrun takes --num for a flag of its own unless "--" comes before the script.)

x.npz holds uint8 images (num, H, W, 3), as fid.py and ADM's evaluator take them; x.png is a sheet
of up to 100 with x.npz beside it. Sample number i follows from (seed, i) and its label alone,
whatever the batch or process.
"""

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from dit_dh import load_released, sample, shift_alpha, time_grid
from rae import (
    available_devices,
    error_line,
    hash_tensors,
    keyed_noise,
    load_rae,
    positive_int,
    print0,
    rank_and_world_size,
    read_file,
    released_file,
    save_sheet,
    to_uint8,
)

PRESETS = {
    "toy": {"ckpt": "out/diffusion/checkpoint.pt", "num": 500, "cfg_scale": 1.5, "batch_size": 250},
    "imagenet256": {"ckpt": "released:DiTDH-XL-256", "num": 64, "cfg_scale": 1.0, "batch_size": 64},
    "imagenet512": {"ckpt": "released:DiTDH-XL-512", "num": 64, "cfg_scale": 1.0, "batch_size": 32},
}
# Flags that do not change a sample.
UNRECORDED = ("preset", "out", "batch_size", "device")


def class_list(text):
    """The type of --classes: numbers such as 0,3,7, or null."""
    if text == "null":
        return text
    return [int(number) for number in text.split(",")]


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.error = lambda message: sys.exit(f"error: {message}")  # one line, without the usage
    p.add_argument("--preset", choices=PRESETS, default="toy", help="the other flags' defaults")
    # the model and its latents
    p.add_argument("--ckpt", help="checkpoint of a run, a released file or released:NAME")
    p.add_argument("--decoder", help="decoder file or released:NAME; unset: the one of the run")
    p.add_argument("--encoder", help="the encoder that a bare released decoder belongs to")
    p.add_argument("--encoder-weights", help="local file of the encoder's weights, in timm's names")
    p.add_argument("--stats", help="latent statistics of a bare released decoder")
    # what is drawn
    p.add_argument("--num", type=positive_int, help="how many samples")
    p.add_argument(
        "--classes", type=class_list, help="such as 0,3,7, or null; unset: all, balanced"
    )
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    # how
    p.add_argument("--steps", type=positive_int, default=50, help="evaluations (released: 49)")
    p.add_argument(
        "--t-last", type=float, default=0.0, help="last time, unshifted (released: 0.001)"
    )
    p.add_argument("--alpha", type=float, help="schedule shift; unset: the run's")
    p.add_argument("--cfg-scale", type=float, help="classifier-free guidance, 1 for none")
    p.add_argument(
        "--guide", help="AutoGuidance: a weaker model's checkpoint; turns --cfg-scale off"
    )
    p.add_argument("--guide-scale", type=float, default=1.42, help="AutoGuidance (512 px: 1.5)")
    p.add_argument(
        "--interval", type=float, nargs=2, default=(0, 1), metavar=("LO", "HI"), help="guided times"
    )
    # the machine and the output
    devices = available_devices()
    p.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    p.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on cuda"
    )
    p.add_argument("--batch-size", type=positive_int, help="samples at once, in each process")
    p.add_argument("--out", default="out/samples.png", help="x.png, x.npz or a folder")

    # The first look finds the preset, whose values become the defaults of the second.
    p.set_defaults(**PRESETS["toy"])
    p.set_defaults(**PRESETS[p.parse_args().preset])
    return p.parse_args()


def balanced_labels(classes, num):
    """num labels, each class equally often and in turn (FID-50k: 50 each)."""
    if num >= len(classes):
        return [classes[i % len(classes)] for i in range(num)]
    return [
        classes[i * len(classes) // num] for i in range(num)
    ]  # too few: spread over the classes


def load_model(name):
    """The model of a checkpoint, a released file or "released:NAME", and its run's settings."""
    file = read_file(released_file(name))
    model = load_released(file, where=name)
    return model, file.get("args", {})


def check_fit(name, model, run, rae):
    """ValueError unless the model `name` was trained in this latent space."""
    encoder = rae.encoder
    if (model.latent_dim, model.grid_size) != (encoder.latent_dim, encoder.grid_size):
        raise ValueError(
            f"{name}: made for {model.grid_size**2} tokens x {model.latent_dim}, the decoder's are "
            f"{encoder.grid_size**2} x {encoder.latent_dim}; pass the --decoder of its training"
        )
    if run.get("latents", rae.fingerprint()) != rae.fingerprint():
        raise ValueError(
            f"{name}: trained in other latents (encoder or statistics); pass their --decoder"
        )


@torch.no_grad()
def generate(rae, model, labels, timesteps, seed, autocast=nullcontext(), first=0, **guidance):
    """Images (B, 3, H, W) in [0, 1] of these labels: samples first, first + 1, ... of a seed.

    guidance is what dit_dh.sample takes.
    """
    device = rae.latent_mean.device
    y = torch.tensor(labels, device=device)  # (B,)
    keys = [(seed, first + i) for i in range(len(labels))]
    noise = keyed_noise(keys, rae.latent_mean.shape, device)  # (B, N, C)
    with autocast:
        z = sample(model, noise, y, timesteps, **guidance)  # (B, N, C)
        return rae.decode(z).clamp(0, 1)  # (B, 3, H, W)


def gather_images(images, batch_size):
    """All processes' images (n, H, W, 3) in the order of the samples on the first, None elsewhere.

    Batch number i is that of process i % world_size.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return images
    shares = [None] * world_size if rank == 0 else None
    dist.gather_object(images, shares)
    if rank != 0:
        return None
    batches = []
    for start in range(0, len(shares[0]), batch_size):
        batches += [share[start : start + batch_size] for share in shares]
    return np.concatenate(batches)


def write_images(images, out, record, columns):
    """Write images (num, H, W, 3) uint8 as a folder of PNGs, an .npz, or a sheet and an .npz."""
    if out.suffix not in (".png", ".npz"):
        out.mkdir(parents=True, exist_ok=True)
        (out / "record.json").write_text(record)
        for i, image in enumerate(images):
            Image.fromarray(image).save(out / f"{i:06d}.png")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out.with_suffix(".npz"), arr_0=images, record=record)
    if out.suffix == ".png":
        shown = images[: 100 // columns * columns]
        shown = torch.from_numpy(shown).permute(0, 3, 1, 2) / 255  # (n, 3, H, W)
        save_sheet(shown, out, columns)


def main():
    args = get_args()
    if args.ckpt == PRESETS["toy"]["ckpt"] and not Path(args.ckpt).is_file():
        raise ValueError(f"{args.ckpt}: no such file; run train_diffusion.py first, or pass --ckpt")

    # Processes, device and precision, as in train_diffusion.py.
    ddp = "RANK" in os.environ
    if ddp:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    rank, world_size = rank_and_world_size()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and args.device == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    torch.backends.cuda.matmul.allow_tf32 = bf16
    torch.backends.cudnn.allow_tf32 = bf16
    torch.backends.cuda.enable_cudnn_sdp(False)

    # The model, and the autoencoder in whose latents it was trained: the checkpoint names its
    # files.
    model, run = load_model(args.ckpt)
    model = model.to(device)
    decoder = args.decoder or run.get("decoder")
    if decoder is None and args.ckpt.startswith("released:"):
        decoder = "released:dinov2-b-512" if args.ckpt.endswith("-512") else "released:dinov2-b"
    if decoder is None:
        raise ValueError(f"{args.ckpt}: the file does not name its decoder; pass --decoder")
    rae = load_rae(
        decoder,
        args.encoder or run.get("encoder"),
        args.encoder_weights or run.get("encoder_weights"),
        args.stats or run.get("stats"),
        device,
    )
    check_fit(args.ckpt, model, run, rae)

    # Guidance: by the null label, or by a weaker model.
    guidance = {"cfg_scale": args.cfg_scale, "interval": args.interval}
    guide = None
    if args.guide:
        guide, guide_run = load_model(args.guide)
        guide = guide.to(device)
        check_fit(args.guide, guide, guide_run, rae)
        if guide.num_classes != model.num_classes:
            raise ValueError(
                f"{args.guide}: has {guide.num_classes} classes, the model {model.num_classes}"
            )
        guidance = {"guide": guide, "guide_scale": args.guide_scale, "interval": args.interval}

    # Labels and times.
    null = model.num_classes
    classes = args.classes or list(range(model.num_classes))
    if args.classes == "null" or (args.classes is None and run.get("label_drop") == 1):
        classes = [null]  # a model that was trained without labels knows no other
    elif not all(0 <= c < model.num_classes for c in classes):
        raise ValueError(f"--classes {classes}: out of range 0 to {model.num_classes - 1}")
    labels = balanced_labels(classes, args.num)
    alpha = args.alpha or run.get("alpha") or shift_alpha(*rae.latent_mean.shape)
    timesteps = time_grid(args.steps, alpha, args.t_last)
    guided = f"AutoGuidance {args.guide_scale}" if guide else f"CFG {args.cfg_scale}"
    print0(f"{args.ckpt}: {args.num} samples, {args.steps} steps, alpha {alpha:.3f}, {guided}")

    # A record of what makes the samples what they are. A folder of others is not added to: a score
    # over both would mean nothing.
    record = {name: value for name, value in vars(args).items() if name not in UNRECORDED}
    record["alpha"] = alpha
    record["weights"] = hash_tensors(model.state_dict())
    record["guide_weights"] = hash_tensors(guide.state_dict()) if guide else None
    record["latents"] = rae.fingerprint()
    record = json.dumps(record)
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()):
        kept = out / "record.json"
        if not kept.exists() or kept.read_text() != record:
            raise ValueError(
                f"{out}: not empty, and its images would mix with others; pass another --out"
            )

    # The samples: the processes take batches in turn.
    began = time.time()
    images = []
    starts = range(rank * args.batch_size, args.num, world_size * args.batch_size)
    for first in tqdm(starts, desc="samples", disable=rank > 0 or None):
        some = labels[first : first + args.batch_size]
        drawn = generate(rae, model, some, timesteps, args.seed, autocast, first, **guidance)
        images.append(to_uint8(drawn).permute(0, 2, 3, 1).cpu().numpy())  # (b, H, W, 3)
    if not images:
        images = [np.empty((0, rae.image_size, rae.image_size, 3), np.uint8)]
    images = gather_images(np.concatenate(images), args.batch_size)
    if rank == 0:
        print(f"{args.num / (time.time() - began):.2f} images/s")
        columns = len(classes) if len(classes) <= 10 else 8
        write_images(images, out, record, columns)
        print(f"wrote {out}")
    if ddp:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
