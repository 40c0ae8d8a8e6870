"""Stage 2: train DiT^DH by flow matching on the latents of a frozen RAE (sections 4 and 5).

    python train_diffusion.py                                      # the toy world -> out/diffusion
    python train_diffusion.py --data FOLDER --decoder out/decoder/checkpoint.pt        # own images
    torchrun --standalone --nproc_per_node=8 train_diffusion.py --preset imagenet256

Writes checkpoint.pt (model, average, optimiser), pairs.png (images over reconstructions),
samples_*.png (a column per class, always from the same noise) and log.jsonl. The same command goes
on with a stopped run.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dit_dh import SIZES, DiTDH, draw_time, flow_loss, shift_alpha, shift_time, time_grid
from rae import (
    StepBatches,
    all_reduce_mean,
    available_devices,
    check_same_run,
    end_quietly,
    error_line,
    keyed_generator,
    keyed_noise,
    leave_group,
    load_optimizer,
    load_rae,
    load_strict,
    natural,
    number,
    open_data,
    open_log,
    parse_flags,
    positive_int,
    print0,
    psnr,
    rank_and_world_size,
    read_file,
    read_images,
    save_file,
    save_sheet,
    set_precision,
    update_ema,
    write_log,
)
from sample import balanced_labels, generate, load_model

# The toy: small enough for two CPU cores and two minutes. Its alpha is about the best of 1 to 5.66;
# the formula's base, 4,096 numbers, is of other latents, and would give 1.
TOY = {
    "data": "toy",
    "decoder": "toy",
    "backbone": "64,8,2",
    "wide_head": "128,1,4",
    "alpha": 4.0,
    "global_batch_size": 64,
    "micro_batch": None,
    "steps": 1000,
    "lr": 5e-3,
    "lr_end": 1e-4,
    "hold": 250,
    "ema": 0.995,
    "cfg_scale": 1.5,
    "compile": False,
    "workers": 0,
    "log_every": 100,
    "sample_every": 500,
    "save_every": 500,
}
# ImageNet (appendix D): 800 epochs of 1,251 steps; lr 2e-4 for 40 epochs, then linear to 2e-5.
# The micro-batches are what 80 GB hold.
IMAGENET = {
    "data": "imagenet/train",
    "decoder": "released:dinov2-b",
    "backbone": "XL",
    "wide_head": "G",
    "alpha": None,
    "global_batch_size": 1024,
    "micro_batch": 64,
    "steps": 1000800,
    "lr": 2e-4,
    "lr_end": 2e-5,
    "hold": 50040,
    "ema": 0.9995,
    "cfg_scale": 1.0,
    "compile": True,
    "workers": 12,
    "log_every": 100,
    "sample_every": 12510,
    "save_every": 1000,
}
PRESETS = {
    "toy": TOY,
    "imagenet256": IMAGENET,
    # 400 epochs, after which the paper's model at 512 px was scored.
    "imagenet512": IMAGENET
    | {"decoder": "released:dinov2-b-512", "micro_batch": 16, "steps": 500400},
}
# What may differ when a run is resumed. All other flags define the run.
MAY_CHANGE = {
    "preset",
    "out",
    "device",
    "workers",
    "micro_batch",
    "compile",
    "checkpoint_activations",
    "cfg_scale",
    "log_every",
    "sample_every",
    "save_every",
    "keep_every",
    "stop_at",
}
NUM_BINS = 5  # the log has the loss by bins of t
PREVIEW_BATCH = 64  # images drawn at once: without gradients they take less than training does


def backbone_size(text):
    """The type of --backbone: a name of SIZES, or width,depth,num_heads."""
    if text in SIZES:
        return SIZES[text]
    width, depth, num_heads = text.split(",")
    return positive_int(width), positive_int(depth), positive_int(num_heads)


def wide_head_size(text):
    """The type of --wide-head: as --backbone, but two blocks where it is a name; or "none"."""
    if text == "none":
        return None
    width, depth, num_heads = backbone_size(text)
    if text in SIZES:
        depth = 2
    return width, depth, num_heads


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--preset", choices=PRESETS, default="toy", help="the other flags' defaults")
    # images and their latents
    p.add_argument("--data", help="toy, or a folder of images whose subfolders are the classes")
    p.add_argument("--no-flip", action="store_true", help="show no mirror images")
    p.add_argument("--decoder", help="toy, a checkpoint of train_decoder.py or released:NAME")
    p.add_argument("--encoder", help="the encoder that a bare released decoder belongs to")
    p.add_argument("--encoder-weights", help="local file of the encoder's weights, in timm's names")
    p.add_argument("--stats", help="latent statistics of a bare released decoder")
    # the model
    p.add_argument("--backbone", type=backbone_size, help="S B L XL, or width,depth,num_heads")
    p.add_argument(
        "--wide-head", type=wide_head_size, help="likewise (paper: G), or none: plain DiT"
    )
    p.add_argument("--init", help="start from these weights: a checkpoint or released:NAME")
    # the flow
    p.add_argument(
        "--predict",
        choices=["v", "x"],
        default="v",
        help="what the last layer gives: the velocity, or the clean latent; the loss is v's",
    )
    p.add_argument(
        "--alpha", type=number(1e-3), help="schedule shift; ImageNet presets: sqrt(N C / 4096)"
    )
    p.add_argument("--time", choices=["logit-normal", "uniform"], default="logit-normal")
    p.add_argument(
        "--label-drop", type=number(0, 1), default=0.1, help="share of labels dropped, 1 for all"
    )
    # the optimiser
    p.add_argument("--steps", type=positive_int, help="optimiser steps")
    p.add_argument("--stop-at", type=positive_int, help="end here, on the way to --steps")
    p.add_argument("--global-batch-size", type=positive_int, help="images a step, all processes'")
    p.add_argument(
        "--micro-batch",
        type=positive_int,
        help="images at once, in each process; unset: its whole share",
    )
    p.add_argument("--lr", type=number(0), help="peak learning rate (paper: 2e-4)")
    p.add_argument("--lr-end", type=number(0), help="learning rate at the end (paper: 2e-5)")
    p.add_argument(
        "--hold", type=natural, help="steps before the rate falls (paper: 40 of 800 epochs)"
    )
    p.add_argument("--clip", type=number(0), default=1.0, help="largest gradient norm, 0 for any")
    p.add_argument("--ema", type=number(0, 1), help="decay of the averaged weights (paper: 0.9995)")
    p.add_argument("--seed", type=natural, default=0, help="of everything random")
    # the machine
    devices = available_devices()
    p.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    p.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="auto: bf16 on GPUs that compute in it, else fp32",
    )
    p.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the model's blocks"
    )
    p.add_argument("--checkpoint-activations", action="store_true", help="less memory, more time")
    p.add_argument("--workers", type=natural, help="processes that read images")
    # what is written
    p.add_argument("--out", default="out/diffusion", help="folder of the run")
    p.add_argument("--log-every", type=positive_int, help="steps between lines of the log")
    p.add_argument("--sample-every", type=positive_int, help="steps between sheets of samples")
    p.add_argument("--cfg-scale", type=number(0), help="classifier-free guidance of these samples")
    p.add_argument("--save-every", type=positive_int, help="steps between checkpoints")
    p.add_argument(
        "--keep-every", type=natural, default=0, help="steps between kept EMA weights, 0: none"
    )

    return parse_flags(p, PRESETS)


def learning_rate(step, args):
    """Constant for `hold` steps, then linear from lr to lr_end."""
    fallen = max(0.0, (step - args.hold) / max(1, args.steps - args.hold))
    return args.lr + (args.lr_end - args.lr) * fallen


def draw_time_and_drop(args, step, rows, device):
    """t (b,) before the shift, and whether the label is dropped (b,), of rows of the global batch.

    They come from one generator for all rows. Its key is (seed, step, global_batch_size), which is
    no row's, since rows are numbered from 0; see keyed_rng in rae.py.
    """
    g = keyed_generator(device, args.seed, step, args.global_batch_size)
    u = torch.rand(args.global_batch_size, 2, generator=g, device=device)  # (global batch, 2)
    u = u[rows.start : rows.stop]  # (b, 2)
    return draw_time(u[:, 0], args.time), u[:, 1] < args.label_drop


def start_from(model, name):
    """Copy another model's averaged weights.

    Where it has other classes the label table stays as it is.
    """
    other, _ = load_model(name)
    state = other.state_dict()
    if other.num_classes != model.num_classes:
        print0(
            f"{name}: {other.num_classes} classes there, {model.num_classes} here; "
            "the label table is new"
        )
        table = "y_embedder.embedding_table.weight"
        state[table] = model.state_dict()[table]
    load_strict(model, state, name)


@torch.no_grad()
def draw_pairs(rae, data, path, device):
    """Draw images over their reconstructions, the best that the diffusion model can reach."""
    indices = np.linspace(0, len(data) - 1, 16).astype(int)
    images = read_images(data, indices, device)  # (16, 3, H, W)
    reconstructions = rae.decode(rae.encode(images)).clamp(0, 1)  # (16, 3, H, W)
    quality = psnr(reconstructions, images).mean().item()
    save_sheet(torch.cat([images, reconstructions]), path, columns=len(images))
    print(f"{path}: reconstructions at {quality:.1f} dB", flush=True)
    if quality < 15:
        print("WARNING: the decoder looks untrained, or made for other images", flush=True)


def main():
    args = get_args()

    # The process group. torchrun starts one process per GPU and tells each its number.
    ddp = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if ddp and args.device == "mps":
        raise ValueError("--device mps: a Mac's GPU takes one process; run without torchrun")
    if ddp:
        # Tensors on GPUs go by NCCL, those on CPUs by gloo. The others wait while the first process
        # saves, which can take minutes.
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    rank, world_size = rank_and_world_size()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    precision = set_precision(args.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    # The frozen autoencoder and the images.
    rae = load_rae(args.decoder, args.encoder, args.encoder_weights, args.stats, device)
    latent_shape = rae.latent_mean.shape  # (N, C)
    alpha = args.alpha or shift_alpha(*latent_shape)
    data = open_data(args.data, rae.image_size)
    batches = StepBatches(
        data, args.global_batch_size, args.seed, not args.no_flip, rank, world_size
    )
    local_batch_size = len(batches.rows)
    micro_batch = args.micro_batch or local_batch_size
    starts = range(0, local_batch_size, micro_batch)
    parts = [slice(start, start + micro_batch) for start in starts]

    # The model, and its average, copied before anything is compiled or wrapped.
    torch.manual_seed(args.seed)  # for the initial weights; every later draw has a key of its own
    model = DiTDH(
        latent_dim=latent_shape[1],
        grid_size=rae.encoder.grid_size,
        backbone=args.backbone,
        wide_head=args.wide_head,
        num_classes=len(data.classes),
        predict=args.predict,
    ).to(device)
    model.checkpoint_activations = args.checkpoint_activations
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        # One by one: model.blocks has those of the backbone and of the head, two shapes, so that
        # two blocks are compiled instead of thirty. In place, so that parameters keep their names.
        for block in model.blocks:
            block.compile(dynamic=False)
    ddp_model = model
    if ddp:
        device_ids = [device.index] if args.device == "cuda" else None
        ddp_model = DistributedDataParallel(model, device_ids=device_ids)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    # Sums that every step adds to and every line of the log prints and zeroes: the loss and how
    # many images had it, by bins of t; the gradient's norm; the steps taken; those skipped. The
    # names on the left are views of `sums`.
    sums = torch.zeros(2 * NUM_BINS + 3, device=device)
    loss_sum, loss_count, norm_sum, taken, skipped = sums.split([NUM_BINS, NUM_BINS, 1, 1, 1])

    # Resume, if the folder holds this very run: the same flags, images and latents.
    out = Path(args.out)
    settings = vars(args) | {
        "alpha": alpha,
        "images": data.fingerprint(),
        "latents": rae.fingerprint(),
    }
    first_step = 0
    resumed = (out / "checkpoint.pt").exists()
    if resumed:
        checkpoint = read_file(out / "checkpoint.pt")
        check_same_run(out, checkpoint.get("args", {}), settings, MAY_CHANGE)
        load_strict(model, checkpoint["model"], out / "checkpoint.pt")
        load_strict(ema, checkpoint["ema"], out / "checkpoint.pt")
        load_optimizer(optimizer, checkpoint["optimizer"], out / "checkpoint.pt")
        sums.copy_(checkpoint["sums"])
        first_step = checkpoint["step"]
        del checkpoint
        if args.stop_at and args.stop_at < first_step:
            raise ValueError(f"--stop-at {args.stop_at}: {out} is at step {first_step} already")
        print0(f"{out}: going on at step {first_step} of {args.steps}")
    elif args.init:
        start_from(model, args.init)
        ema.load_state_dict(model.state_dict())
    # All processes must have found the same file. If so, the mean of what they found is what each
    # of them found.
    found = torch.tensor([first_step, resumed], dtype=torch.float64)
    if not torch.equal(all_reduce_mean(found.clone()), found):
        raise ValueError(f"{out}: not the same on all nodes; put --out where all of them see it")
    if rank == 0:
        log = open_log(out, first_step)
        if not resumed:
            draw_pairs(rae, data, out / "pairs.png", device)

    num_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"{device} x {world_size}, {precision}")
    print0(f"{len(data)} images of {len(data.classes)} classes")
    print0(f"{latent_shape[0]} tokens x {latent_shape[1]}, alpha {alpha:.3f}")
    print0(f"backbone {args.backbone}, head {args.wide_head}, {num_parameters:.1f}M parameters")

    # Previews: eight rows, a column per class, from the same noise each time.
    classes = list(range(model.num_classes))[:10]
    if args.label_drop == 1:
        classes = [model.num_classes]  # the null label is all that this model knows
    preview_labels = balanced_labels(classes, 8 * len(classes))
    timesteps = time_grid(25, alpha)

    # --stop-at ends the run early, with the learning rates of the whole.
    last_step = min(args.stop_at or args.steps, args.steps)

    # The images of all steps that are left, read ahead by workers.
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=range(first_step, last_step),
        num_workers=args.workers,
        worker_init_fn=end_quietly,
        pin_memory=args.device == "cuda",
    )
    stream = iter(loader)

    # Ctrl-C and SIGTERM end the run where it is. Nothing is saved then: all processes would have
    # to agree on a step first, and the last checkpoint is minutes old.
    step = first_step  # these two are for `stop` to read
    saved_step = first_step

    def stop(number, frame):
        print0(f"stopped at step {step}; the same command goes on from step {saved_step}")
        # At once, without waiting for workers or for the other processes.
        os._exit(128 + number)  # not 0: `train && sample` must not sample a half-trained model

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    skipped_in_a_row = 0
    logged_step = first_step
    logged_time = time.time()

    # A turn of the loop saves, logs and draws the state after `step` steps, each if it is due, and
    # then takes one more step. The last turn takes none. A resumed run begins in the middle of its
    # first turn, after the save: what was due then is logged and drawn again, since a kill may
    # have come between.
    for step in range(first_step, last_step + 1):
        last = step == last_step

        # Save, but never while steps are being skipped: the weights may be what is wrong, and the
        # checkpoint before the last good one.
        unsaved = step > first_step or not resumed  # at step 0 too: a full disk shows at once
        if unsaved and (step % args.save_every == 0 or last) and skipped_in_a_row == 0:
            # The checkpoint holds the processes' mean: from here on each of them goes on from
            # that, as a resumed run will. (The mean of equal numbers changes nothing, so that they
            # may be averaged again for the log.)
            all_reduce_mean(sums)
            if rank == 0:
                checkpoint = {
                    "model": model.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "sums": sums,
                    "args": settings,
                    "config": model.config,
                    "classes": data.classes,
                }
                save_file(checkpoint, out / "checkpoint.pt")
            saved_step = step
        if rank == 0 and args.keep_every and step > 0 and step % args.keep_every == 0:
            kept = {
                "ema": ema.state_dict(),
                "args": settings,
                "config": model.config,
                "alpha": alpha,
            }
            save_file(kept, out / f"ema_{step:07d}.pt")

        # Log.
        if step > 0 and (step % args.log_every == 0 or last):
            all_reduce_mean(sums)
            if rank == 0:
                num_images = (step - logged_step) * args.global_batch_size
                numbers = {
                    "step": step,
                    "loss": (loss_sum.sum() / loss_count.sum().clamp(min=1)).item(),
                    "grad_norm": (norm_sum / taken.clamp(min=1)).item(),
                    "lr": learning_rate(step - 1, args),
                    "skipped": int(skipped),
                    "images_per_s": num_images / (time.time() - logged_time),
                    "loss_by_t": (loss_sum / loss_count.clamp(min=1)).tolist(),
                }
                write_log(log, numbers)
            sums.zero_()
            logged_step = step
            logged_time = time.time()

        # Draw samples of the averaged weights.
        if rank == 0 and step > 0 and (step % args.sample_every == 0 or last):
            pictures = []
            for start in range(0, len(preview_labels), PREVIEW_BATCH):
                some = preview_labels[start : start + PREVIEW_BATCH]
                drawn = generate(
                    rae, ema, some, timesteps, args.seed, autocast, start, cfg_scale=args.cfg_scale
                )
                pictures.append(drawn)
            sheet = torch.cat(pictures)
            save_sheet(sheet, out / f"samples_{step:07d}.png", columns=len(classes))
        if last:
            break

        # This step's learning rate, images and random numbers.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        images, labels = next(stream)
        images = images.to(device, non_blocking=True)  # (b, 3, H, W) uint8
        labels = labels.to(device, non_blocking=True)  # (b,)
        t, drop = draw_time_and_drop(args, step, batches.rows, device)
        y = torch.where(drop, model.num_classes, labels)  # (b,); num_classes is the null label

        # Loss and gradient, micro_batch images at a time. DistributedDataParallel averages the
        # gradients over the processes in the last of these backward passes. The encoder runs
        # outside autocast, as in the pass that made the latent statistics.
        losses = []
        for part in parts:
            keys = [(args.seed, step, row) for row in batches.rows[part]]
            noise = keyed_noise(keys, latent_shape, device)  # (b, N, C)
            z = rae.encode(images[part] / 255)  # (b, N, C), frozen: without gradient
            sync = ddp_model.no_sync() if ddp and part != parts[-1] else nullcontext()
            with sync:
                with autocast:
                    loss = flow_loss(ddp_model, z, y[part], alpha, t[part], noise)  # (b,)
                (loss.sum() / local_batch_size).backward()
            losses.append(loss.detach())

        # The optimiser's step, unless the gradient is not finite: then the step is skipped.
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        if norm.isfinite():  # the only place in a step where the CPU waits for the GPU
            optimizer.step()
            update_ema(ema, model, args.ema, step)
            bins = (shift_time(t, alpha) * NUM_BINS).long().clamp(max=NUM_BINS - 1)  # (b,)
            loss_sum.index_add_(0, bins, torch.cat(losses))
            loss_count.index_add_(0, bins, torch.ones_like(t))
            norm_sum += norm
            taken += 1
            skipped_in_a_row = 0
        else:
            skipped += 1
            skipped_in_a_row += 1
            if skipped_in_a_row == 5 or step + 1 == last_step:
                raise ValueError(
                    f"the gradient was not finite for {skipped_in_a_row} steps in a row; the last "
                    "checkpoint is kept: start a new run from it with --init and another --out, "
                    "a lower --lr or --precision fp32"
                )
        optimizer.zero_grad()

    print0(f"{out}: step {last_step} of {args.steps}; python sample.py --ckpt {out}/checkpoint.pt")
    leave_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
