"""Pictures from a trained model (appendix E of the RAE paper, arXiv 2510.11690).

    python sample.py                                   # out/diffusion -> out/samples.png and .npz
    python sample.py --classes 0,3 --num 8 --out cats  # a folder of PNGs
    torchrun --standalone --nproc_per_node=8 -- sample.py --num 50000 --out samples.npz

(torchrun would take --num for the beginning of a flag of its own, were it not for the "--".)

The model's velocity is followed from noise at t = 1 to a latent at t = 0 in Euler steps, and the
frozen autoencoder decodes the latent. --out says what is written:

    NAME.npz    all images as uint8 (num, H, W, 3), as fid.py and ADM's evaluator read them
    NAME.png    a sheet of the first 100, with NAME.npz beside it
    NAME        a folder of PNGs

Everything is written as soon as it is drawn, and the same command goes on where it was stopped. The
noise that image number i begins with follows from (seed, i) alone, so that the image is the same
whatever the process, and, but for rounding, the batch that it is drawn in.
"""

import argparse
import json
import os
import shutil
import sys
import time
import zipfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

# In dit_dh.py: the model, its file, times and Euler steps. In rae.py: the autoencoder, and what
# several scripts share.
from dit_dh import load_released, sample, shift_alpha, time_grid
from rae import (
    IMAGE_SUFFIXES,
    available_devices,
    cast_matrices,
    check_finite,
    deal_batches,
    error_line,
    hash_tensors,
    keyed_noise,
    leave_group,
    load_rae,
    natural,
    number,
    parse_flags,
    positive_int,
    print0,
    rank_and_world_size,
    read_file,
    released_file,
    save_sheet,
    set_precision,
    to_uint8,
    whole_file,
)

# The batches fit a GPU of 24 GB. The toy's samples are guided by default, since guidance makes them
# better to look at; on ImageNet the paper's first number is unguided.
PRESETS = {
    "toy": {
        "ckpt": "out/diffusion/checkpoint.pt",
        "num": 500,
        "cfg_scale": 1.5,
        "batch_size": 250,
    },
    "imagenet256": {
        "ckpt": "released:DiTDH-XL-256",
        "num": 64,
        "cfg_scale": 1.0,
        "batch_size": 64,
    },
    "imagenet512": {
        "ckpt": "released:DiTDH-XL-512",
        "num": 64,
        "cfg_scale": 1.0,
        "batch_size": 32,
    },
}


def class_list(text):
    """What --classes is read as: a list of numbers from 0,3,7, or "null", the label of no class."""
    if text == "null":
        return text
    return [int(n) for n in text.split(",")]


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--preset", choices=PRESETS, default="toy", help="the other flags' defaults")
    # the model and its latents
    p.add_argument("--ckpt", help="checkpoint of a run, a released file or released:NAME")
    p.add_argument(
        "--decoder", help="decoder's file or released:NAME; unset: that of the model's training"
    )
    # A decoder's file of ours names its encoder and holds the latent statistics. A released one,
    # given by its path, is weights alone and needs all three of these.
    p.add_argument("--encoder", help="of a decoder's file that does not name it")
    p.add_argument("--encoder-weights", help="local file of the encoder's weights, in timm's names")
    p.add_argument("--stats", help="latent statistics of a decoder's file that has none")
    # what is drawn
    p.add_argument("--num", type=positive_int, help="how many images")
    p.add_argument(
        "--classes", type=class_list, help="such as 0,3,7, or null; unset: all, balanced"
    )
    p.add_argument("--seed", type=natural, default=0, help="seed of the noise")
    # how
    p.add_argument(
        "--steps", type=positive_int, default=50, help="Euler steps (released samples: 49)"
    )
    p.add_argument(
        "--t-last",
        type=number(0, 0.999),
        default=0.0,
        help="time to stop at, before the shift (released samples: 0.001)",
    )
    p.add_argument("--alpha", type=number(1e-3), help="schedule shift; unset: that of the training")
    p.add_argument("--cfg-scale", type=number(0), help="classifier-free guidance, 1 for none")
    p.add_argument(
        "--guide",
        help="checkpoint of a weaker model for AutoGuidance (Karras et al. 2024), instead of CFG",
    )
    p.add_argument("--guide-scale", type=number(0), default=1.42, help="of --guide (512 px: 1.5)")
    p.add_argument(
        "--interval",
        type=number(0, 1),
        nargs=2,
        default=(0, 1),
        metavar=("LO", "HI"),
        help="guide only at times LO <= t <= HI, after the shift",
    )
    # the machine and the output
    devices = available_devices()
    p.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    p.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="auto: bf16 on GPUs that compute in it, else fp32; released samples: tf32",
    )
    p.add_argument("--batch-size", type=positive_int, help="images at once, in each process")
    p.add_argument("--out", default="out/samples.png", help="NAME.png, NAME.npz or a folder")

    return parse_flags(p, PRESETS)


# ---------------------------------------------------------------------------------------------
# What is drawn. train_diffusion.py and extras/explore.py use these functions too.


def balanced_labels(classes, num):
    """num labels, each class equally often and in turn, so that a sheet has a column for each."""
    if num >= len(classes):
        return [classes[i % len(classes)] for i in range(num)]
    # Too few for all classes: some from all over their range.
    return [classes[i * len(classes) // num] for i in range(num)]


def load_model(name):
    """The EMA model of a checkpoint, a released file or "released:NAME", in eval mode.

    With it come the flags of its training, as a dict: empty for a released file.
    """
    file = read_file(released_file(name))
    model = load_released(file, where=name)
    check_finite(model.state_dict(), name)
    return model, file.get("args", {})


def check_fit(name, model, trained_with, rae):
    """ValueError unless the model `name` was trained in the latents of this autoencoder."""
    encoder = rae.encoder
    if (model.latent_dim, model.grid_size) != (encoder.latent_dim, encoder.grid_size):
        raise ValueError(
            f"{name}: made for {model.grid_size**2} tokens x {model.latent_dim}, the decoder's are "
            f"{encoder.grid_size**2} x {encoder.latent_dim}; pass the --decoder of its training"
        )
    # A checkpoint of ours has a hash of the encoder's weights and of the latent statistics.
    latents = trained_with.get("latents")
    if latents is not None and latents != rae.fingerprint():
        raise ValueError(
            f"{name}: trained in other latents (encoder or statistics); pass their --decoder"
        )


@torch.no_grad()
def generate(rae, model, labels, timesteps, seed, autocast=nullcontext(), first=0, **guidance):
    """Images (B, 3, H, W) in [0, 1] of these B labels.

    They are the images number `first`, `first` + 1 and so on of the seed. guidance is what
    dit_dh.sample takes. Only matrix products run in autocast's precision: latents and images stay
    float32.
    """
    latent_shape = rae.latent_mean.shape  # (N, C)
    device = rae.latent_mean.device
    y = torch.tensor(labels, device=device)  # (B,)
    keys = [(seed, first + i) for i in range(len(labels))]
    noise = keyed_noise(keys, latent_shape, device)  # (B, N, C)
    with autocast:
        z = sample(model, noise, y, timesteps, **guidance)  # (B, N, C)
        return rae.decode(z).clamp(0, 1)  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# What is written. Batches go to a folder: --out itself as PNGs, or NAME.parts as an array each,
# which at the end become one .npz. All is written by rae.whole_file, under another name until it is
# whole: a file that is there need not be drawn again. The record, JSON, says what the images are.


def claim_folder(folder, record):
    """Make the folder of these images, with their record; ValueError if it holds others.

    fid.py would take images of two settings in one folder for one set.
    """
    path = folder / "record.json"
    there = [file for file in folder.glob("*") if file.suffix != ".tmp"]
    if there and (not path.exists() or path.read_text() != record):
        raise ValueError(
            f"{folder}: not empty, and its images would mix with others; delete it, or pass "
            "another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as f:
        f.write(record.encode())


def batch_files(folder, rows, as_pngs):
    """The files of the batch of images with these numbers, a range: many PNGs, or one array."""
    if as_pngs:
        return [folder / f"{i:06d}.png" for i in rows]
    return [folder / f"{rows.start:08d}.npy"]


def write_batch(files, images):
    """Write images (b, H, W, 3) uint8 to their files: each a PNG, or all one array."""
    if files[0].suffix == ".npy":
        with whole_file(files[0]) as f:
            np.save(f, images)
        return
    for path, image in zip(files, images):
        with whole_file(path) as f:
            Image.fromarray(image).save(f, "PNG")


def holds(path, record):
    """Whether the .npz `path` is there, and holds the images of this record."""
    if not path.exists():
        return False
    try:
        with np.load(path) as file:
            return "record" in file.files and str(file["record"]) == record
    except Exception:  # numpy raises half a dozen kinds for other files
        return False


def pack_npz(parts, num, out, record):
    """Make one .npz of the arrays in the folder `parts`, as np.savez would, but one by one."""
    files = sorted(parts.glob("*.npy"))
    num_there = sum(len(np.load(file, mmap_mode="r")) for file in files)
    if num_there != num:
        raise ValueError(
            f"{parts}: holds {num_there} of {num} images; put --out where all processes see it, "
            "and the same command goes on"
        )
    image_shape = np.load(files[0], mmap_mode="r").shape[1:]
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *image_shape)}
    with whole_file(out) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for file in files:
                array.write(np.load(file).tobytes())
        with archive.open("record.npy", "w") as array:
            np.save(array, np.array(record))


def draw_sheet(parts, num, path, columns):
    """Draw the first num images of the arrays in the folder `parts` on one PNG."""
    images = []
    for file in sorted(parts.glob("*.npy")):
        images.extend(np.load(file))
        if len(images) >= num:
            break
    images = torch.from_numpy(np.stack(images[:num])).permute(0, 3, 1, 2) / 255  # (num, 3, H, W)
    save_sheet(images, path, columns)


def main():
    args = get_args()
    if args.interval[0] > args.interval[1]:
        raise ValueError(f"--interval {args.interval[0]} {args.interval[1]}: from high to low")
    if args.ckpt == PRESETS["toy"]["ckpt"] and not Path(args.ckpt).is_file():
        raise ValueError(f"{args.ckpt}: no such file; run train_diffusion.py first, or pass --ckpt")

    # The process group. torchrun starts one process per GPU and tells each its number. They only
    # wait for each other, for which gloo will do, and for as long as it takes.
    ddp = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if ddp and args.device == "mps":
        raise ValueError("--device mps: a Mac's GPU takes one process; run without torchrun")
    if ddp:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    rank, world_size = rank_and_world_size()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    precision = set_precision(args.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    # The model, and the autoencoder in whose latents it was trained: the model's checkpoint holds
    # the flags of that training, and so the paths of the autoencoder's files.
    model, trained_with = load_model(args.ckpt)
    decoder = args.decoder or trained_with.get("decoder")
    if decoder is None and args.ckpt.startswith("released:"):
        decoder = "released:dinov2-b-512" if args.ckpt.endswith("-512") else "released:dinov2-b"
    if decoder is None:
        raise ValueError(f"{args.ckpt}: the file does not name its decoder; pass --decoder")
    rae = load_rae(
        decoder,
        encoder=args.encoder or trained_with.get("encoder"),
        encoder_weights=args.encoder_weights or trained_with.get("encoder_weights"),
        stats=args.stats or trained_with.get("stats"),
        device=device,
    )
    check_fit(args.ckpt, model, trained_with, rae)

    # Labels. The null label, of no class, has the number num_classes.
    unlabelled = trained_with.get("label_drop") == 1
    if args.classes == "null" or (args.classes is None and unlabelled):
        classes = [model.num_classes]
    elif args.classes is None:
        classes = list(range(model.num_classes))
    elif unlabelled:
        raise ValueError(f"--classes: {args.ckpt} was trained without labels; pass null or nothing")
    elif not all(0 <= c < model.num_classes for c in args.classes):
        raise ValueError(f"--classes {args.classes}: out of range 0 to {model.num_classes - 1}")
    else:
        classes = args.classes
    labels = balanced_labels(classes, args.num)

    # Guidance: away from a weaker model's velocity, or from the null label's. Images of the null
    # label have nothing to be guided from.
    guide = None
    if args.guide:
        guide, guide_trained_with = load_model(args.guide)
        check_fit(args.guide, guide, guide_trained_with, rae)
        if guide.num_classes != model.num_classes:
            raise ValueError(
                f"{args.guide}: has {guide.num_classes} classes, the model {model.num_classes}"
            )
        guidance = {"guide": guide, "guide_scale": args.guide_scale, "interval": args.interval}
        guided = f"AutoGuidance {args.guide_scale}"
    else:
        cfg_scale = 1.0 if classes == [model.num_classes] else args.cfg_scale
        guidance = {"cfg_scale": cfg_scale, "interval": args.interval}
        guided = f"CFG {cfg_scale}"

    # The times, from 1 to 0, moved towards the noise as in training: the larger a latent, the more
    # noise it takes to hide an image in it (section 4.2).
    alpha = args.alpha or trained_with.get("alpha") or shift_alpha(*rae.latent_mean.shape)
    timesteps = time_grid(args.steps, alpha, args.t_last)
    print0(f"{args.ckpt}: {args.num} images, {args.steps} steps, alpha {alpha:.3f}, {guided}")

    # The record: all that the images follow from. Networks are known by their weights.
    record = {
        "weights": hash_tensors(model.state_dict()),
        "guide_weights": hash_tensors(guide.state_dict()) if guide else None,
        "decoder_weights": hash_tensors(rae.decoder.state_dict()),
        "latents": rae.fingerprint(),
        "classes": classes,
        "num": args.num,
        "seed": args.seed,
        "steps": args.steps,
        "t_last": args.t_last,
        "alpha": alpha,
        "guidance": guided,
        "interval": [float(t) for t in args.interval],
        "precision": precision,
        "batch_size": args.batch_size,
    }
    record = json.dumps(record)

    # The folder that batches are written to; unless all was done by the same command before.
    out = Path(args.out)
    npz = out.with_suffix(".npz")
    as_pngs = out.suffix not in (".png", ".npz")
    if as_pngs and out.suffix.lower() in IMAGE_SUFFIXES | {".npy"}:
        raise ValueError(f"--out {out}: wants NAME.png, NAME.npz or a folder")
    folder = out if as_pngs else out.with_suffix(".parts")
    if not as_pngs:
        ours = holds(npz, record)
        if ours and out.exists():
            print0(f"{out}: these images are there already")
            return
        for path in (out, npz):
            if path.exists() and not ours:
                raise ValueError(
                    f"{path}: there already, and not of these images; pass another --out"
                )
    if rank == 0:
        claim_folder(folder, record)
    if ddp:
        dist.barrier()

    # Draw what is not there yet. deal_batches gives each process batches of its own, in turn.
    model.to(device)
    if guide is not None:
        guide.to(device)
    if precision == "bf16":
        for network in (model, guide, rae.decoder):
            if network is not None:
                cast_matrices(network)  # once; autocast would do it at every call
    todo = []
    for rows in deal_batches(args.num, args.batch_size):
        if not all(file.exists() for file in batch_files(folder, rows, as_pngs)):
            todo.append(rows)
    began = time.time()
    num_drawn = 0
    hidden = rank > 0 or None  # None: shown if there is a terminal
    for rows in tqdm(todo, desc="batches", disable=hidden):
        some = labels[rows.start : rows.stop]
        images = generate(rae, model, some, timesteps, args.seed, autocast, rows.start, **guidance)
        images = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # (b, H, W, 3)
        write_batch(batch_files(folder, rows, as_pngs), images)
        num_drawn += len(rows)
    seconds = time.time() - began

    # Once all processes are through, the first one makes a single file of the batches.
    leave_group()
    if rank > 0:
        return
    if num_drawn > 0:
        print(f"{world_size * num_drawn / seconds:.2f} images/s")
    if not as_pngs:
        pack_npz(folder, args.num, npz, record)
        if out.suffix == ".png":
            columns = len(classes) if 1 < len(classes) <= 10 else min(8, args.num)
            shown = min(args.num, 100)
            if shown > columns:
                shown -= shown % columns  # whole rows
            draw_sheet(folder, shown, out, columns)
        shutil.rmtree(folder)
    print(f"wrote {out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
