"""Stage 2: train DiT^DH by flow matching on the latents of a frozen RAE (sections 4 and 5).

    python train_diffusion.py                                            # the toy world -> out/diffusion
    python train_diffusion.py --data FOLDER --decoder out/decoder/checkpoint.pt          # own images
    torchrun --standalone --nproc_per_node=8 train_diffusion.py --preset imagenet256 --data imagenet/train

Writes checkpoint.pt (model, EMA, optimiser), pairs.png (images over reconstructions), samples_*.png (a column
per class, fixed noise, EMA weights), log.jsonl (loss, also in bins of t). The same command continues a
stopped run.
"""

import argparse
import copy
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import fid
from dit_dh import SIZES, DiTDH, draw_time, flow_loss, load_released, shift_alpha, shift_time, time_grid
from rae import (Batches, Guard, Log, Stop, autocast, cli, keyed_noise, keyed_numpy, load_rae, load_strict, loader,
                 open_data, parse, positive, progress, psnr, read_images, released_file, resume,
                 save_checkpoint, save_grid, say, set_rate, settings_of, spread, start, training_flags,
                 update_ema)
from sample import Samples, balanced_labels, generate

# ImageNet: batch 1024, 1,252 steps an epoch; 800 epochs, lr 2e-4 held for 40 and linear to 2e-5 (appendix D).
IMAGENET = dict(data="imagenet/train", decoder="released:dinov2-b", backbone="XL", head="G", batch_size=1024,
                steps=1001600, lr=2e-4, lr_end=2e-5, hold=50080, ema=0.9995, cfg=1.0,
                workers=12, log_every=100, sample_every=12520, save_every=5000)
PRESETS = {
    "toy": dict(data="toy", decoder="toy", backbone="96,4,3", head="128,2,4",
                batch_size=64, steps=1300, lr=4e-3, lr_end=1e-4, hold=300, ema=0.995, cfg=1.5,
                workers=0, log_every=100, sample_every=500, save_every=500),
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(decoder="released:dinov2-b-512"),
}
BINS = 5                                               # of t, as the model sees it, in the log


def transformer_size(text, depth=None):
    """"XL" or "width,depth,heads" as numbers; depth replaces a named size's own."""
    if text in SIZES:
        width, own, heads = SIZES[text]
        return width, depth or own, heads
    try:
        width, depth, heads = (int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: not width,depth,heads or {' '.join(SIZES)}") from None
    if min(width, depth, heads) < 1:
        raise argparse.ArgumentTypeError(f"{text}: all three must be above 0")
    return width, depth, heads


def learning_rate(step, args):
    """lr for `hold` steps, then linear to lr_end at the last."""
    return args.lr + (args.lr_end - args.lr) * max(0.0, (step - args.hold) / max(1, args.steps - args.hold))


def draws(args, device, step, rows, shape):
    """What chance decides for the rows of a step, from (seed, step, row): t before the shift, label
    kept or dropped, noise. Row batch_size is no row: its key serves the numbers drawn for all rows."""
    u = keyed_numpy(args.seed, step, args.batch_size).random((args.batch_size, 2), dtype=np.float32)
    u = torch.from_numpy(u[rows.start:rows.stop])                                     # (b, 2)
    noise = keyed_noise([(args.seed, step, row) for row in rows], shape, device)      # (b, N, C)
    t, keep = draw_time(u[:, 0], args.time), u[:, 1] >= args.label_drop
    return t.to(device), keep.to(device), noise


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    training_flags(p)
    p.add_argument("--decoder", help="toy, a checkpoint of train_decoder.py or released:NAME")
    p.add_argument("--encoder", help="encoder that a bare released decoder belongs to")
    p.add_argument("--stats", help="latent statistics file of a bare released decoder")
    p.add_argument("--backbone", type=transformer_size, help="S B L XL or width,depth,heads (paper: XL)")
    p.add_argument("--head", type=lambda s: s if s == "none" else transformer_size(s, 2),
                   help="wide head, likewise; none for the plain DiT (paper: G, 2048,2,16)")
    p.add_argument("--unconditional", action="store_true", help="labels are always null")
    p.add_argument("--alpha", type=float, default=None, help="schedule shift (sqrt(N C / 4096), at least 1)")
    p.add_argument("--time", choices=["logit-normal", "uniform"], default="logit-normal",
                   help="t before the shift")
    p.add_argument("--label-drop", type=float, default=0.1, help="share of labels dropped, for guidance")
    p.add_argument("--hold", type=int, help="steps before the rate falls (paper: 40 of 800 epochs)")
    p.add_argument("--clip", type=float, default=1.0, help="gradient norm, 0 for no clipping")
    p.add_argument("--cfg", type=float, help="guidance of the preview samples")
    p.add_argument("--out", default="out/diffusion", help="folder of the run")
    p.add_argument("--sample-every", type=positive, help="steps between sample grids")
    p.add_argument("--fid-every", type=int, default=0, help="steps between scores of new samples, 0 for none")
    p.add_argument("--fid-num", type=positive, default=500, help="samples for a score (paper: 50000)")
    p.add_argument("--fid-reference", default="toy", help="what fid.py takes as REFERENCE")
    p.add_argument("--inception", help="file of the 2015 Inception weights; unset with toy: encoder features")
    args = parse(p, PRESETS)
    settings = settings_of(args)
    device, rank, world = start(args)
    run = resume(args.out, "diffusion", settings)
    if run and run["step"] == args.steps:
        return say(f"{args.out}: finished already; python sample.py --ckpt {args.out}/checkpoint.pt")

    # Images, the frozen RAE, the model and its average.
    rae = load_rae(args.decoder, args.encoder, args.encoder_weights, args.stats, device)
    if run and run["latents"] != rae.fingerprint():
        raise ValueError(f"{args.decoder}: its latents are not those of {args.out}; pass another --out")
    data = open_data(args.data, rae.encoder.image_size)
    shape = rae.mean.shape                                                            # (N, C)
    alpha = args.alpha or shift_alpha(*shape)
    torch.manual_seed(args.seed)
    head = (args.backbone[0], 0, args.backbone[2]) if args.head == "none" else args.head
    width, depth, heads = zip(args.backbone, head)
    model = DiTDH(shape[1], rae.encoder.grid, width, depth, heads, len(data.classes))
    if args.init and not run:
        start_from(model, args.init)
    model = model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    parts = dict(ema=ema, model=model, optimizer=optimizer)
    first = run["step"] if run else 0
    for name, part in parts.items() if run else ():
        part.load_state_dict(run[name])
    del run                                            # its tensors are copied by now
    parallel = DistributedDataParallel(model) if world > 1 else model
    say(f"{len(data)} images, {len(data.classes)} classes; {shape[0]} tokens x {shape[1]}, "
        f"alpha {alpha:.3f}; DiT {width} x {depth}, {sum(x.numel() for x in model.parameters()) / 1e6:.1f}M")

    batches = Batches(data, args.batch_size, args.seed, True, rank, world)
    stream, log = loader(batches, first, args), Log(args.out, first) if rank == 0 else None
    stop, guard = Stop(), Guard()
    classes = [model.num_classes] if args.unconditional else list(range(model.num_classes))
    features = "encoder:toy" if args.fid_reference == "toy" and not args.inception else "inception"
    if rank == 0 and first == 0:
        show_pairs(rae, data, args.out, device)
    totals = torch.zeros(3, BINS, device=device)  # sum of losses, count, by bin of t; gradient norms in row 2
    since, began = first, time.time()
    for step in progress(range(first, args.steps + 1), args.batch_size):
        last = step == args.steps or stop.agreed(world)
        if step > since and (step % args.log_every == 0 or last):
            if world > 1:
                dist.all_reduce(totals)
            loss, norm = totals[0].sum() / totals[1].sum(), totals[2, 0] / (step - since) / world
            rate = (step - since) * args.batch_size / (time.time() - began)
            if rank == 0:
                log(step=step, loss=loss.item(), grad_norm=norm.item(), lr=optimizer.param_groups[0]["lr"],
                    images_per_s=rate, skipped=guard.skipped,
                    loss_by_t=[s / n if n else None for s, n in totals[:2].T.tolist()],
                    minutes_left=(args.steps - step) * args.batch_size / rate / 60)
            totals.zero_()
            since, began = step, time.time()
        if rank == 0 and step > first and (step % args.sample_every == 0 or last):
            shown = classes[:10]
            labels = balanced_labels(shown, 8 * len(shown))
            with autocast(device, args):
                pictures = generate(rae, ema, labels, time_grid(25, alpha), args.seed, cfg=args.cfg)
            save_grid(pictures, f"{args.out}/samples_{step:07d}.png", columns=len(shown))
        if args.fid_every and step > first and (step % args.fid_every == 0 or last):
            labels = balanced_labels(classes, args.fid_num)
            samples = Samples(rae, ema, labels, time_grid(50, alpha), args.seed, autocast(device, args),
                              cfg=args.cfg)
            scores = fid.score(samples, args.fid_reference, features, weights=args.inception, device=device)
            if rank == 0:
                log(step=step, **{k: v for k, v in scores.items() if k not in ("num", "label")})
        if rank == 0 and (step > first or not first) and (step % args.save_every == 0 or last):
            save_checkpoint(args.out, dict(
                kind="diffusion", step=step, settings=settings, alpha=alpha, config=model.config,
                classes=data.classes, latents=rae.fingerprint())
                | {name: part.state_dict() for name, part in parts.items()})
        if last:
            break
        set_rate(optimizer, learning_rate(step, args))
        images, y = (x.to(device, non_blocking=True) for x in next(stream))         # (B, 3, H, W) uint8, (B,)
        t, keep, noise = draws(args, device, step, batches.rows, shape)
        y = torch.where(keep & (not args.unconditional), y, model.num_classes)
        with autocast(device, args):
            z = rae.encode(images.float() / 255)                                      # (B, N, C)
            loss = flow_loss(parallel, z, y, alpha, t, noise)                         # (B,)
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or float("inf"))
        if not guard(norm):
            continue
        optimizer.step()
        update_ema(ema, model, args.ema, step)
        bins = (shift_time(t, alpha) * BINS).long().clamp(max=BINS - 1)
        totals[0].index_add_(0, bins, loss.detach())
        totals[1].index_add_(0, bins, torch.ones_like(loss))
        totals[2, 0] += norm


def show_pairs(rae, data, out, device):
    """Images over their reconstructions, and the PSNR: what the diffusion model can reach at best."""
    images = read_images(data, spread(data, 16), device)
    with torch.no_grad():
        again = F.adaptive_avg_pool2d(rae.decode(rae.encode(images)).clamp(0, 1), images.shape[-1])
    quality = psnr(again, images).mean().item()
    save_grid(torch.cat([images, again]), f"{out}/pairs.png", columns=len(images))
    say(f"{out}/pairs.png: reconstructions at {quality:.1f} dB"
        + ("; WARNING: the decoder looks untrained, or made for other images" if quality < 15 else ""))


def start_from(model, name):
    """Copy another model's weights; another class count keeps our fresh label table."""
    other = load_released(released_file(name)).state_dict()
    key = "y_embedder.embedding_table.weight"
    if other[key].shape != model.state_dict()[key].shape:
        say(f"--init {name}: {len(other[key]) - 1} classes there, {model.num_classes} here; "
            "the label table is new")
        other[key] = model.state_dict()[key]
    load_strict(model, other, name)


if __name__ == "__main__":
    cli(main)
