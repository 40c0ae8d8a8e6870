"""Sample images from a trained diffusion model (section 5.1, appendix E of arXiv 2510.11690).

    python sample.py                                          # out/diffusion -> out/samples
    python sample.py --classes 3 --num 8 --out out/class3
    torchrun --standalone --nproc_per_node=8 -- sample.py --num 50000 --out out/samples50k
    # "--" keeps torchrun from reading --num as an abbreviation of its own flags

With --out NAME, the script writes NAME/000000.png, NAME/000001.png and so on. Then it writes
NAME.npz, which holds all images as uint8 (num, H, W, 3) for fid.py or ADM's evaluator, and
NAME.png, a grid of the first 100. To resume, rerun the same command: it skips finished batches.
If you change settings or model files, choose a new NAME. Image i's noise depends only on (seed, i).
"""

import argparse
import json
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from dit_dh import load_dit, sample, shift_alpha, time_grid
from rae import (
    UsageError,
    bounded,
    check_same_run,
    find_file,
    load,
    load_rae,
    parse_args,
    positive_int,
    print0,
    progress,
    rank_batches,
    run_script,
    seeded_noise,
    setup_distributed,
)

TOY = {"ckpt": "out/diffusion/checkpoint.pt", "num": 500, "cfg_scale": 1.5, "batch_size": 250}
IMAGENET = {
    "num": 64,
    "cfg_scale": 1.0,  # unguided, as for the paper's FID of 1.51 at 256 px
    "batch_size": 64,  # fits on a 24 GB GPU
}
PRESETS = {
    "toy": TOY,
    "imagenet256": IMAGENET | {"ckpt": "released:ImageNet256/DiTDH-XL"},
    "imagenet512": IMAGENET | {"ckpt": "released:ImageNet512/DiTDH-XL_ep400", "batch_size": 32},
}


def class_list(text):
    """argparse type: "null", or class numbers such as 0,3,7."""
    return text if text == "null" else [int(number) for number in text.split(",")]


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    # model and latents
    p.add_argument("--ckpt", help="checkpoint from train_diffusion.py, or released:NAME")
    p.add_argument("--decoder", help="decoder file or released:NAME (default: as in training)")
    p.add_argument("--encoder", help="encoder to use with an official decoder")
    p.add_argument("--encoder-weights", help="local file of the encoder's timm weights")
    p.add_argument("--stats", help="latent statistics for an official decoder file")
    # images
    p.add_argument("--num", type=positive_int, help="number of images")
    p.add_argument("--classes", type=class_list, help="such as 0,3,7, or null (default: all)")
    p.add_argument("--out", default="out/samples", help="writes OUT/, OUT.npz, OUT.png")
    # sampler
    p.add_argument("--steps", type=positive_int, default=50, help="Euler steps (official: 49)")
    p.add_argument("--t-last", type=bounded(0, 0.999), default=0.0, help="last t (official: 0.001)")
    p.add_argument("--alpha", type=bounded(1e-3), help="schedule shift (default: as in training)")
    p.add_argument("--cfg-scale", type=bounded(0), help="scale of classifier-free guidance; 1: off")
    p.add_argument("--guidance-model", help="weaker model, for AutoGuidance instead of --cfg-scale")
    p.add_argument("--guidance-scale", type=bounded(0), help="AutoGuidance scale (paper: 1.42)")
    p.add_argument(
        "--interval",
        type=bounded(0, 1),
        nargs=2,
        default=[0, 1],
        metavar=("LOW", "HIGH"),
        help="guide only while LOW <= t <= HIGH (shifted t; 1 is noise)",
    )
    p.add_argument("--batch-size", type=positive_int, help="batch size per GPU")
    args = parse_args(p, PRESETS)  # adds --preset, --seed, --device and --precision
    if args.out.endswith((".png", ".npz")):
        raise UsageError(f"--out {args.out}: pass the name without {args.out[-4:]}")
    if (args.guidance_model is None) != (args.guidance_scale is None):
        raise UsageError("pass --guidance-model and --guidance-scale together")
    return args


def choose_classes(classes, num_classes, train_settings):
    """Return the class numbers that --classes selects. The null label is num_classes."""
    if classes is None:  # an unconditional model knows only the null label
        classes = "null" if train_settings.get("label_drop") == 1 else range(num_classes)
    if classes == "null":
        return [num_classes]
    if not all(0 <= label < num_classes for label in classes):
        raise UsageError(f"--classes takes numbers from 0 to {num_classes - 1}, or null")
    return classes


def balanced_labels(classes, num):
    """Return num labels: cycle through the classes, or pick evenly spaced ones if num is less."""
    if num >= len(classes):
        return [classes[i % len(classes)] for i in range(num)]
    return [classes[i * len(classes) // num] for i in range(num)]


def load_model(name):
    """Load a checkpoint, an official file or released:NAME. Returns the EMA model, its training
    settings, and the load_rae arguments for its RAE. Official files have neither; both are {}.
    """
    file = load(find_file(name))
    try:
        model = load_dit(file)
    except (KeyError, AttributeError) as error:
        raise UsageError(f"{name}: not a diffusion model ({error})") from error
    return model, file.get("settings", {}), file.get("rae", {})


def check_model(name, model, settings, rae, used_labels):
    """Raise UsageError unless the model was trained on this RAE's latents and these labels."""
    same_shape = rae.latent_mean.shape == (model.grid_size**2, model.latent_dim)
    latents = settings.get("latents")  # None for official files
    if not same_shape or latents not in (None, rae.latent_hash):
        raise UsageError(
            f"{name} was not trained on these latents; pass the --decoder it was trained with"
        )
    label_drop = settings.get("label_drop")  # None for official files, which accept every label
    if label_drop == 0 and model.num_classes in used_labels:
        raise UsageError(f"{name} has no null label; pass --cfg-scale 1 and drop --classes null")
    if label_drop == 1 and used_labels != {model.num_classes}:
        raise UsageError(f"{name} was trained without classes; pass --classes null")


@torch.no_grad()
def generate(rae, model, labels, timesteps, seed, autocast=nullcontext(), first=0, **guidance):
    """Sample and decode one batch of images (B, 3, H, W), uint8.

    labels is a list of B class numbers. `first`, the first image's index, and seed set the noise.
    guidance is passed to dit_dh.sample.
    """
    device = rae.latent_mean.device
    y = torch.tensor(labels, device=device)  # (B,)
    keys = [("sample", seed, first + i) for i in range(len(labels))]
    noise = seeded_noise(keys, rae.latent_mean.shape, device)  # (B, N, C)
    with autocast:
        z = sample(model, noise, y, timesteps, **guidance)  # (B, N, C)
        return to_uint8(rae.decode(z))  # (B, 3, H, W)


def to_uint8(images):
    """[0, 1] -> uint8, rounded. (The official code truncates, which darkens by half a level.)"""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def save_grid(images, path, columns):
    """Save images (B, 3, H, W), uint8, as one PNG, row by row. Small images are enlarged."""
    zoom = max(1, 64 // images.shape[2])
    rows = math.ceil(len(images) / columns)
    blank = rows * columns - len(images)
    images = F.pad(images.cpu(), (1, 1, 1, 1, 0, 0, 0, blank), value=255)  # white around images
    images = images.unflatten(0, (rows, columns))  # (rows, columns, 3, H + 2, W + 2)
    grid = images.permute(0, 3, 1, 4, 2)  # (rows, H + 2, columns, W + 2, 3)
    grid = grid.flatten(2, 3).flatten(0, 1).numpy()  # (rows * (H + 2), columns * (W + 2), 3)
    grid = grid.repeat(zoom, axis=0).repeat(zoom, axis=1)
    Image.fromarray(grid).save(path)


def save_png(image, path):
    """Write a uint8 image (H, W, 3) atomically: an interrupted run leaves no partial PNG."""
    temporary = f"{path}.{os.getpid()}.tmp"
    Image.fromarray(image).save(temporary, "PNG")
    os.replace(temporary, path)


def claim_folder(folder, settings):
    """Create the folder with settings.json in it. If it holds files, require equal settings."""
    target = folder.resolve()  # rename would fail on a link
    temporary = Path(f"{target}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    (temporary / "settings.json").write_text(json.dumps(settings))
    try:
        os.rename(temporary, target)  # atomic; fails for the second of two runs at once
    except OSError:
        shutil.rmtree(temporary)
        path = folder / "settings.json"
        if not path.exists():
            raise UsageError(f"{folder} is not empty; choose another --out")
        check_same_run(folder, json.loads(path.read_text()), settings)


def main():
    args = get_args()
    folder = Path(args.out)
    rank, world_size, device, autocast = setup_distributed(args)

    # Model and RAE. Our checkpoints record their RAE; official files don't.
    model, train_settings, rae_files = load_model(args.ckpt)
    if not rae_files:
        official = "released:dinov2-b-512" if model.grid_size == 32 else "released:dinov2-b"
        rae_files = {"decoder": official}
    for name in ("decoder", "encoder", "encoder_weights", "stats"):
        if getattr(args, name) is not None:
            rae_files[name] = getattr(args, name)
    rae = load_rae(**rae_files, device=device)
    model.to(device)

    classes = choose_classes(args.classes, model.num_classes, train_settings)
    labels = balanced_labels(classes, args.num)

    # Guidance, and the labels it uses
    null = model.num_classes
    used_labels = set(classes)
    guidance = {"interval": sorted(args.interval)}
    if args.cfg_scale != 1 and classes != [null] and not args.guidance_model:
        guidance["cfg_scale"] = args.cfg_scale
        used_labels.add(null)
    check_model(args.ckpt, model, train_settings, rae, used_labels)
    if args.guidance_model:
        guidance_model, guidance_settings, _ = load_model(args.guidance_model)
        if guidance_model.num_classes != null:
            raise UsageError(f"{args.guidance_model} and {args.ckpt} have different classes")
        check_model(args.guidance_model, guidance_model, guidance_settings, rae, used_labels)
        guidance["guidance_model"] = guidance_model.to(device)
        guidance["guidance_scale"] = args.guidance_scale

    # Timesteps, by default shifted as in training
    alpha = args.alpha or train_settings.get("alpha") or shift_alpha(*rae.latent_mean.shape)
    timesteps = time_grid(args.steps, alpha, args.t_last)
    print0(f"{args.num} images, {args.steps} steps, alpha {alpha:.3f}")

    # Never mix images from different settings or model files in one folder.
    if rank == 0:
        models = [args.ckpt, args.guidance_model, rae_files["decoder"], rae_files.get("stats")]
        times = {f"mtime of {name}": os.path.getmtime(find_file(name)) for name in models if name}
        settings = vars(args) | times
        for name in ("out", "preset", "device", "batch_size"):
            del settings[name]
        claim_folder(folder, settings)
    if world_size > 1:
        dist.barrier()

    # Sample the missing batches. Batches don't depend on the number of GPUs.
    todo = []
    for batch in rank_batches(args.num, args.batch_size):
        if not all((folder / f"{i:06d}.png").exists() for i in batch):
            todo.append(batch)
    for batch in progress(todo, "batches"):
        y = labels[batch.start : batch.stop]
        images = generate(
            rae, model, y, timesteps, args.seed, autocast, first=batch.start, **guidance
        )
        images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        for i, image in zip(batch, images):
            save_png(image, folder / f"{i:06d}.png")
    if world_size > 1:
        dist.barrier()

    # Pack the folder into one array, and draw a grid of the first 100 images.
    if rank == 0:
        images = np.empty((args.num, rae.image_size, rae.image_size, 3), np.uint8)
        for i in range(args.num):
            images[i] = Image.open(folder / f"{i:06d}.png")
        np.savez(f"{folder}.npz", arr_0=images)
        grid = torch.from_numpy(images[:100]).permute(0, 3, 1, 2)  # (100 or fewer, 3, H, W)
        save_grid(grid, f"{folder}.png", columns=min(10, args.num))
        print0(f"wrote {folder}.npz and {folder}.png")


if __name__ == "__main__":
    run_script(main)
