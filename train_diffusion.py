"""Stage 2: train DiT^DH by flow matching in the latent space of a frozen RAE (sections 4 and 5).

    python train_diffusion.py                                          # toy data -> out/diffusion
    python train_diffusion.py --data FOLDER --decoder out/decoder/checkpoint.pt --out out/photos
    torchrun --standalone --nproc_per_node=8 train_diffusion.py --preset imagenet256 --out out/big

Writes checkpoint.pt, log.jsonl, samples_*.png (a column per class, always from the same noise),
reconstructions.png and ema_*.pt (--keep-every) to --out. Rerun the same command to resume.
"""

import argparse
import copy
import math
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from dit_dh import SIZES, DiTDH, draw_time, flow_loss, shift_alpha, shift_time, time_grid
from fid import psnr
from rae import (
    UsageError,
    atomic_save,
    bounded,
    check_same_run,
    load,
    load_optimizer,
    load_rae,
    make_folder,
    non_negative_int,
    open_data,
    open_log,
    parse_args,
    positive_int,
    print0,
    read_batches,
    run_script,
    seeded_generator,
    seeded_noise,
    setup_distributed,
    update_ema,
    write_log,
)
from sample import balanced_labels, generate, load_model, save_grid, to_uint8

# Two minutes on two CPU cores. Of the alphas we tried (1 to 5.66), none was clearly better than 4;
# the paper's formula gives 1 for latents this small.
TOY = {
    "data": "toy",
    "decoder": "toy",
    "backbone": "64,8,2",
    "wide_head": "128,1,4",  # as wide as the toy encoder's tokens
    "alpha": 4.0,
    "global_batch_size": 64,
    "steps": 1000,
    "lr": 5e-3,
    "lr_end": 1e-4,
    "hold": 250,
    "ema": 0.995,
    "sample_every": 500,
    "save_every": 500,
}
# Appendix D: batches of 1,024 for 800 epochs of 1,251 steps.
IMAGENET = {
    "data": "imagenet/train",
    "decoder": "released:dinov2-b",
    "backbone": "XL",
    "wide_head": "G",
    "global_batch_size": 1024,
    "micro_batch_size": 64,  # fits 80 GB
    "steps": 1000800,
    "lr": 2e-4,
    "lr_end": 2e-5,
    "hold": 50040,  # 40 epochs
    "ema": 0.9995,
    "compile": True,
    "workers": 12,
    "sample_every": 12510,  # 10 epochs
    "save_every": 1000,
}
PRESETS = {
    "toy": TOY,
    "imagenet256": IMAGENET,
    # The same schedule, stopped after 400 epochs, as for the paper's 512 px results.
    "imagenet512": IMAGENET
    | {"decoder": "released:dinov2-b-512", "micro_batch_size": 16, "stop_at": 500400},
}
# Flags that may change on resume. Images and latents are compared by hash, so paths may change.
MAY_CHANGE = """preset out device workers micro_batch_size compile checkpoint_activations
log_every sample_every save_every keep_every stop_at
data decoder encoder encoder_weights stats""".split()


def backbone_size(text):
    """argparse type: a key of SIZES, or width,depth,num_heads."""
    if text in SIZES:
        return SIZES[text]
    width, depth, num_heads = map(positive_int, text.split(","))
    if width % (4 * num_heads) != 0:
        raise argparse.ArgumentTypeError(f"{text}: head dim must be a multiple of 4")
    return width, depth, num_heads


def wide_head_size(text):
    """argparse type: none, a key of SIZES (with two blocks), or width,depth,num_heads."""
    if text == "none":
        return None
    width, depth, num_heads = backbone_size(text)
    return width, 2 if text in SIZES else depth, num_heads


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    # images and latents
    p.add_argument("--data", help="toy, or a folder with one subfolder per class")
    p.add_argument("--no-flip", action="store_true", help="don't mirror images")
    p.add_argument("--decoder", help="toy, a checkpoint of train_decoder.py or released:NAME")
    p.add_argument("--encoder", help="encoder to use with an official decoder")
    p.add_argument("--encoder-weights", help="local file of the encoder's timm weights")
    p.add_argument("--stats", help="latent statistics for an official decoder file")
    # model
    p.add_argument("--backbone", type=backbone_size, help="S, B, L, XL, G or width,depth,num_heads")
    p.add_argument("--wide-head", type=wide_head_size, help="like --backbone (paper: G), or none")
    p.add_argument("--init", help="initial weights: a checkpoint or released:NAME")
    # flow matching
    p.add_argument("--alpha", type=bounded(0), help="schedule shift (0: formula in section 4.2)")
    p.add_argument("--time", choices=["logit-normal", "uniform"], default="logit-normal")
    p.add_argument("--label-drop", type=bounded(0, 1), default=0.1, help="1: unconditional")
    # optimization and output
    add_training_flags(p)
    p.add_argument("--stop-at", type=positive_int, help="stop early, at this step")
    p.add_argument("--hold", type=non_negative_int, help="steps at --lr before the linear decay")
    p.add_argument("--clip", type=bounded(0), default=1.0, help="gradient clipping norm, 0: off")
    p.add_argument("--out", default="out/diffusion", help="output folder")
    p.add_argument("--sample-every", type=positive_int, help="steps between sample grids")
    p.add_argument("--keep-every", type=positive_int, help="steps between kept EMA snapshots")
    return parse_args(p, PRESETS)  # adds --preset, --seed, --device and --precision


def add_training_flags(p):
    """Add the flags that train_decoder.py and train_diffusion.py share."""
    p.add_argument("--steps", type=positive_int, help="length of the learning rate schedule")
    p.add_argument("--global-batch-size", type=positive_int, help="images per step, all ranks")
    p.add_argument("--micro-batch-size", type=positive_int, help="images per forward pass")
    p.add_argument("--lr", type=bounded(0), help="peak learning rate (paper: 2e-4)")
    p.add_argument("--lr-end", type=bounded(0), help="final learning rate (paper: 2e-5)")
    p.add_argument("--ema", type=bounded(0, 1), help="EMA decay")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile blocks")
    p.add_argument("--checkpoint-activations", action="store_true", help="less memory, more time")
    p.add_argument("--workers", type=non_negative_int, default=0, help="data loading processes")
    p.add_argument("--log-every", type=positive_int, default=100, help="steps between log lines")
    p.add_argument("--save-every", type=positive_int, help="steps between checkpoints")


class StepBatches(Dataset):
    """Item `step` is the part of that step's global batch that this rank trains on: images
    (b, 3, H, W) uint8 and labels (b,). `rows` are its rows of the global batch, `micro_batches`
    slices of it.
    """

    def __init__(self, data, args, flip, rank, world_size):
        if args.global_batch_size % world_size != 0:
            raise UsageError(f"--global-batch-size must be a multiple of {world_size} processes")
        local_batch_size = args.global_batch_size // world_size
        self.rows = range(rank * local_batch_size, (rank + 1) * local_batch_size)
        size = args.micro_batch_size or local_batch_size
        self.micro_batch_size = size
        self.micro_batches = [slice(i, i + size) for i in range(0, local_batch_size, size)]
        self.data = data
        self.args = args
        self.flip = flip

    def __getitem__(self, step):
        seed = self.args.seed
        images = []
        labels = []
        for row in self.rows:
            seen = step * self.args.global_batch_size + row  # images before this one
            epoch, position = divmod(seen, len(self.data))
            i = epoch_order(seed, epoch, len(self.data))[position]
            generator = seeded_generator("crop", seed, step, row)
            flip = self.flip and torch.rand((), generator=generator) < 0.5
            images.append(self.data.load(i, generator, flip))
            labels.append(self.data.labels[i])
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)


@lru_cache(maxsize=1)
def epoch_order(seed, epoch, num_images):
    """The order (num_images,) in which an epoch visits the images."""
    return torch.randperm(num_images, generator=seeded_generator("epoch", seed, epoch)).numpy()


def learning_rate(step, args):
    """lr for `hold` steps, then linear to lr_end."""
    decay = max(0.0, (step - args.hold) / max(1, args.steps - args.hold))
    return args.lr + (args.lr_end - args.lr) * decay


def main():
    args = get_args()
    rank, world_size, device, autocast = setup_distributed(args)
    out = Path(args.out)
    make_folder(out)

    # Frozen RAE and data
    rae_files = {
        "decoder": args.decoder,
        "encoder": args.encoder,
        "encoder_weights": args.encoder_weights,
        "stats": args.stats,
    }
    rae = load_rae(**rae_files, device=device)
    latent_shape = rae.latent_mean.shape  # (N, C)
    alpha = args.alpha or shift_alpha(*latent_shape)
    data = open_data(args.data, rae.image_size)
    batches = StepBatches(data, args, flip=not args.no_flip, rank=rank, world_size=world_size)
    rows = batches.rows  # this rank's rows of the global batch

    # Model and EMA. The EMA is copied before compiling and wrapping, so it stays a plain module.
    torch.manual_seed(args.seed)  # for the initial weights; later draws have their own seeds
    model = DiTDH(
        latent_dim=latent_shape[1],
        grid_size=rae.encoder.grid_size,
        backbone=args.backbone,
        wide_head=args.wide_head,
        num_classes=len(data.classes),
    ).to(device)
    model.checkpoint_activations = args.checkpoint_activations
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        for block in model.blocks:  # backbone and head blocks: two compilations, not thirty
            block.compile(dynamic=False)
    ddp_model = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )

    # Resume, or start from other weights
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings |= {"alpha": alpha, "images": data.fingerprint, "latents": rae.latent_hash}
    first_step = 0
    if (out / "checkpoint.pt").exists():
        checkpoint = load(out / "checkpoint.pt")
        check_same_run(out, checkpoint.get("settings", {}), settings)
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        load_optimizer(optimizer, checkpoint["optimizer"])
        first_step = checkpoint["step"]
        print0(f"resuming {out} at step {first_step}")
        del checkpoint
    elif args.init:
        state = load_model(args.init)[0].state_dict()
        table = "y_embedder.embedding_table.weight"
        if len(state[table]) != model.num_classes + 1:
            print0(f"{args.init} has other classes; starting from a new label embedding")
            state[table] = model.state_dict()[table]
        model.load_state_dict(state)
        ema.load_state_dict(state)

    # What sample.py needs besides the weights.
    model_info = {
        "settings": settings,
        "config": model.config,
        "rae": rae_files,
    }
    print0(f"{len(data)} images, alpha {alpha:.3f}")
    if rank == 0:
        log = open_log(out, first_step)
        # Reconstructions limit the quality of samples, so look at them first.
        batch = np.linspace(0, len(data) - 1, 16).astype(int)
        (images,) = read_batches(data, [batch], 0, device)  # (16, 3, H, W) in [0, 1]
        reconstructions = rae.decode(rae.encode(images)).clamp(0, 1)  # (16, 3, H, W)
        grid = to_uint8(torch.cat([images, reconstructions]))  # (32, 3, H, W)
        save_grid(grid, out / "reconstructions.png", columns=16)
        print0(f"reconstructions.png: PSNR {psnr(reconstructions, images).mean():.1f} dB")

    # Sample grids: eight rows, one column per class, up to ten
    classes = balanced_labels(range(model.num_classes), min(model.num_classes, 10))
    if args.label_drop == 1:
        classes = [model.num_classes]  # unconditional model: trained on the null label only
    grid_labels = balanced_labels(classes, 8 * len(classes))

    last_step = min(args.stop_at or args.steps, args.steps)
    loader = DataLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=range(first_step, last_step),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    loss_sum = torch.zeros(5, device=device)  # per fifth of shifted t, reset at each log line
    loss_count = torch.zeros(5, device=device)
    skipped = 0
    skipped_in_a_row = 0
    images_done = 0
    start = time.perf_counter()

    for step, (images, labels) in enumerate(loader, first_step):
        # Draw unshifted t and label dropout for the whole global batch, then slice out this rank's
        # rows, so that the draws don't depend on the world size.
        generator = seeded_generator("step", args.seed, step, device=device)
        t = draw_time(args.global_batch_size, args.time, generator, device)
        drop = torch.rand(args.global_batch_size, generator=generator, device=device)
        t = t[rows.start : rows.stop]  # (b,)
        drop = drop[rows.start : rows.stop] < args.label_drop  # (b,)
        labels = labels.to(device, non_blocking=True)  # (b,)
        images = images.to(device, non_blocking=True)  # (b, 3, H, W) uint8
        y = torch.where(drop, model.num_classes, labels)  # (b,); num_classes is the null label

        # Loss and gradients, one micro-batch at a time. DDP averages the gradients over the ranks
        # in the last backward pass only (the flag does what no_sync does). The encoder runs in
        # float32 because the latent statistics were computed in float32.
        losses = []
        for micro in batches.micro_batches:
            keys = [("noise", args.seed, step, row) for row in rows[micro]]
            eps = seeded_noise(keys, latent_shape, device)  # (B, N, C)
            z = rae.encode(images[micro] / 255)  # (B, N, C)
            ddp_model.require_backward_grad_sync = micro is batches.micro_batches[-1]
            with autocast:
                loss = flow_loss(ddp_model, z, y[micro], alpha, t[micro], eps)  # (B,)
            (loss.sum() / len(rows)).backward()
            losses.append(loss.detach())

        # Update. A step whose gradient is not finite is skipped; five in a row end the run.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        if grad_norm.isfinite():  # the step's only host-device sync
            optimizer.step()
            update_ema(ema, model, args.ema, step)
            fifth = (shift_time(t, alpha) * 5).long().clamp(max=4)  # (b,)
            loss_sum.index_add_(0, fifth, torch.cat(losses))
            loss_count.index_add_(0, fifth, torch.ones_like(t))
            skipped_in_a_row = 0
        else:
            skipped += 1
            skipped_in_a_row += 1
            if skipped_in_a_row == 5:
                raise UsageError("five non-finite gradients in a row; lower --lr and change --out")
        optimizer.zero_grad()
        images_done += args.global_batch_size
        done = step + 1  # steps completed
        final = done == last_step

        # Log
        if done % args.log_every == 0 or final:
            if world_size > 1:
                dist.all_reduce(loss_sum)
                dist.all_reduce(loss_count)
            if rank == 0:
                numbers = {
                    "step": done,
                    "loss": (loss_sum.sum() / loss_count.sum().clamp(min=1)).item(),
                    "grad_norm": grad_norm.item(),
                    "lr": learning_rate(step, args),
                    "skipped": skipped,
                    "images_per_s": images_done / (time.perf_counter() - start),
                    "loss_by_t": (loss_sum / loss_count.clamp(min=1)).tolist(),
                }
                write_log(log, numbers)
            loss_sum.zero_()
            loss_count.zero_()
            images_done = 0
            start = time.perf_counter()
        pause = time.perf_counter()

        # Sample from the EMA
        if rank == 0 and (done % args.sample_every == 0 or final):
            timesteps = time_grid(25, alpha)
            grid = generate(rae, ema, grid_labels, timesteps, args.seed, autocast)
            save_grid(grid, out / f"samples_{done:07d}.png", columns=len(classes))

        # Save last, so that any log line or samples due at this step are already written.
        if rank == 0 and args.keep_every and done % args.keep_every == 0:
            snapshot = {"ema": ema.state_dict(), **model_info}
            atomic_save(snapshot, out / f"ema_{done:07d}.pt")
        if rank == 0 and (done % args.save_every == 0 or final):
            checkpoint = {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                **model_info,
            }
            atomic_save(checkpoint, out / "checkpoint.pt")
        start += time.perf_counter() - pause  # images_per_s counts training time only

    print0(f"done; next: python sample.py --ckpt {out}/checkpoint.pt")


if __name__ == "__main__":
    run_script(main)
