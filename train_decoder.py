"""Stage 1: train the ViT decoder of a frozen encoder's latents, on noised latents (sections 3 and 4.3).

    python train_decoder.py                                              # the toy world -> out/decoder
    python train_decoder.py --data FOLDER --encoder my_encoder.pt        # own images
    torchrun --standalone --nproc_per_node=8 train_decoder.py --preset imagenet256 --data imagenet/train

Writes checkpoint.pt (EMA decoder, latent statistics, optimiser), grid_*.png (input over reconstruction),
log.jsonl. The same command continues a run that was stopped.
"""

import argparse
import copy
import math
import time

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from rae import (DECODERS, RAE, Batches, Decoder, Log, Stop, autocast, build_encoder, cli,
                 export_released_decoder, keyed, latent_statistics, load_released_decoder, load_strict,
                 loader, open_data, parse, positive, progress, psnr, released_file, resume, save_checkpoint,
                 save_grid, say, settings_of, spread, start, update_ema)

# ImageNet: 2,502 steps an epoch of 1,281,167 images, 16 epochs (Table 12; as released where they differ).
IMAGENET = dict(data="imagenet/train", encoder="dinov2-b", image_size=256, resize=384, size="XL", tau=0.8,
                perceptual=1.0, batch_size=512, steps=40032, lr=2e-4, lr_end=2e-5, warmup=2502, ema=0.9978,
                workers=12, eval_every=2500, save_every=2500)
PRESETS = {
    "toy": dict(data="toy", encoder="toy", image_size=32, size="toy", tau=0.8,
                perceptual=0.1, batch_size=64, steps=800, lr=2e-3, lr_end=1e-4, warmup=50, ema=0.99,
                workers=0, eval_every=200, save_every=400),
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(image_size=512, resize=768),
}


def learning_rate(step, args):
    """Linear warm-up from 0, then a cosine from lr to lr_end at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr_end + (args.lr - args.lr_end) * (0.5 + 0.5 * math.cos(math.pi * done))


def look(encoder, images, upsample):
    """Tokens (B, N, C) of images that are `upsample` times as large as the encoder's (section 6.1)."""
    return encoder(F.avg_pool2d(images, upsample)).float()


def reconstruction_loss(encoder, output, images, tokens, args):
    """L1 and the weighted squared distance in the frozen encoder's own tokens, as two scalars."""
    l1 = (output - images).abs().mean()
    if not args.perceptual:
        return l1, torch.zeros_like(l1)
    return l1, args.perceptual * (look(encoder, output, args.upsample) - tokens).square().mean()


@torch.no_grad()
def evaluate(rae, images, args):
    """PSNR (dB) from clean latents and from latents noised at sigma = tau / 2, and the clean pictures."""
    rae.eval()
    tokens = look(rae.encoder, images, args.upsample)
    noise = torch.randn(tokens.shape, generator=keyed("cpu", args.seed)).to(tokens)
    clean, noisy = (rae.draw(x).clamp(0, 1) for x in (tokens, tokens + rae.tau / 2 * noise))
    return psnr(clean, images).mean().item(), psnr(noisy, images).mean().item(), clean


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", help="toy, or a folder of images (its folders are the classes)")
    p.add_argument("--val-data", help="folder to evaluate on; without it training images serve")
    p.add_argument("--encoder", help="toy, dinov2-{s,b,l}, siglip2-b, mae-b, timm:MODEL or a file")
    p.add_argument("--encoder-weights", help="local file of the encoder's weights, timm's names")
    p.add_argument("--image-size", type=positive, help="pixels of the decoded image")
    p.add_argument("--resize", type=int, help="short side before a random crop (paper: 384); unset: centre")
    p.add_argument("--size", choices=DECODERS, help="decoder: width and depth (paper: XL)")
    p.add_argument("--upsample", type=positive, default=1, help="decoded pixels per encoder pixel (6.1: 2)")
    p.add_argument("--init", help="start from this decoder: a checkpoint or released:NAME")
    p.add_argument("--tau", type=float, help="noise on the latents, 0 for none (paper: 0.8)")
    p.add_argument("--noise-dist", choices=["uniform", "half-normal"], default="uniform",
                   help="sigma = tau U(0, 1), as released, or |N(0, tau^2)|, the paper's")
    p.add_argument("--perceptual", type=float, help="weight of the encoder-feature loss")
    p.add_argument("--steps", type=positive, help="optimiser steps")
    p.add_argument("--batch-size", type=positive, help="images a step, over all processes (paper: 512)")
    p.add_argument("--lr", type=float, help="peak learning rate (paper: 2e-4)")
    p.add_argument("--lr-end", type=float, help="learning rate at the end (paper: 2e-5)")
    p.add_argument("--warmup", type=int, help="steps of linear warm-up (paper: 1 of 16 epochs)")
    p.add_argument("--ema", type=float, help="decay of the averaged decoder (paper: 0.9978)")
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--out", default="out/decoder", help="folder of the run")
    p.add_argument("--eval-every", type=positive, help="steps between evaluations")
    p.add_argument("--save-every", type=positive, help="steps between checkpoints")
    p.add_argument("--workers", type=int, help="processes that read images")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on cuda")
    args = parse(p, PRESETS)
    settings = settings_of(args)
    if args.resize and args.resize < args.image_size:
        raise ValueError(f"--resize {args.resize} is below --image-size {args.image_size}")
    if args.image_size % args.upsample:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of --upsample {args.upsample}")
    device, rank, world = start(args)
    run = resume(args.out, "decoder", settings)
    if run and run["step"] == args.steps:
        return say(f"{args.out}: finished already; its decoder is {args.out}/checkpoint.pt")

    # Images, frozen encoder, statistics of its latents (one exact pass), decoder and its average.
    data = open_data(args.data, args.image_size, short=args.resize)
    size = args.image_size // args.upsample            # what the encoder sees
    centred = data if args.upsample == 1 and not args.resize else open_data(args.data, size)
    val = open_data(args.val_data or args.data, args.image_size, "val")
    encoder = build_encoder(args.encoder, size, args.encoder_weights).to(device)
    if run:
        mean, var = run["mean"], run["var"]
    else:
        say(f"latent statistics of {len(data)} images, both flips")
        mean, var = latent_statistics(encoder, centred, args.batch_size // world, device, rank, world)
    torch.manual_seed(args.seed)
    width, depth, heads, mlp_dim = DECODERS[args.size]
    patch = args.image_size // encoder.grid
    decoder = Decoder(encoder.dim, encoder.grid, patch, width, depth, heads, mlp_dim)
    if args.init and not run:
        load_strict(decoder, load_released_decoder(released_file(args.init)).state_dict(), args.init)
    if run:
        load_strict(decoder, run["model"], args.out)
    rae = RAE(encoder, decoder, mean, var, args.tau, args.noise_dist).to(device)
    ema = copy.deepcopy(decoder).requires_grad_(False).eval()
    if run:
        load_strict(export_released_decoder(ema), run["ema"], args.out)
    averaged = RAE(encoder, ema, mean, var, args.tau).to(device)
    parallel = DistributedDataParallel(decoder) if world > 1 else decoder
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if run:
        optimizer.load_state_dict(run["optimizer"])
    say(f"{args.encoder}: {encoder.grid ** 2} tokens x {encoder.dim}; decoder {args.size}, "
        f"{sum(x.numel() for x in decoder.parameters()) / 1e6:.1f}M parameters, {len(data)} images")

    first = run["step"] if run else 0
    del run                                            # its tensors are copied by now
    batches = Batches(data, args.batch_size, args.seed, False, rank, world)
    stream = loader(batches, first, args)
    shown = spread(val, 256, device)
    log, stop = Log(args.out, first) if rank == 0 else None, Stop()
    since, began = first, time.time()
    for step in progress(range(first, args.steps + 1), args.batch_size):
        last = step == args.steps or stop.agreed(world)
        if rank == 0 and step > since and (step % args.eval_every == 0 or last):
            rate = (step - since) * args.batch_size / (time.time() - began)
            clean, noisy, pictures = evaluate(averaged, shown, args)
            log(step=step, l1=l1.item(), perceptual=perceptual.item(), lr=lr, images_per_s=rate,
                psnr=clean, psnr_noisy=noisy)
            some = torch.cat([x[::max(1, len(x) // 16)][:16] for x in (shown, pictures)])
            save_grid(some, f"{args.out}/grid_{step:06d}.png", columns=len(some) // 2)
            since, began = step, time.time()
        if rank == 0 and (step > first or not first) and (step % args.save_every == 0 or last):
            save_checkpoint(args.out, dict(
                kind="decoder", step=step, settings=settings, config=decoder.config, encoder=args.encoder,
                encoder_hash=encoder.fingerprint, image_size=size, mean=mean, var=var,
                ema=export_released_decoder(ema), model=decoder.state_dict(),
                optimizer=optimizer.state_dict()))
        if last:
            break
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = next(stream)[0].to(device, non_blocking=True).float() / 255          # (B, 3, H, W)
        rae.train()
        with autocast(device, args):
            tokens = look(encoder, images, args.upsample)                             # (B, N, C)
            noised = rae.noised(tokens, [keyed(device, args.seed, step, row) for row in batches.rows])
            output = parallel(noised) * encoder.std + encoder.mean                    # (B, 3, H, W)
            l1, perceptual = reconstruction_loss(encoder, output, images, tokens, args)
        optimizer.zero_grad(set_to_none=True)
        (l1 + perceptual).backward()
        optimizer.step()
        update_ema(ema, decoder, args.ema, step)


if __name__ == "__main__":
    cli(main)
