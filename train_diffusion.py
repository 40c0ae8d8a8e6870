"""Stage 2: train DiT^DH by flow matching on the latents of a frozen RAE (sections 4 and 5).

    python train_diffusion.py                                            # the toy world -> out/diffusion
    python train_diffusion.py --data FOLDER --decoder out/decoder/checkpoint.pt          # own images
    torchrun --standalone --nproc_per_node=8 train_diffusion.py --preset imagenet256 --data imagenet/train

Writes checkpoint.pt (model, EMA, optimiser), pairs.png (images over reconstructions), samples_*.png (a column
per class, fixed noise, EMA weights), log.jsonl (loss, also in bins of t).
"""

import copy, json, math, shutil
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fid
from dit_dh import SIZES, DiTDH, draw_time, flow_loss, shift_alpha, shift_time, time_grid
from rae import (RANK, Batches, Optimizer, Run, autocast, check, cli, encoded, keyed_noise, keyed_numpy,
                 load_rae, load_strict, open_data, parser, positive, psnr, read_images, save_grid, say,
                 start, update_ema)
from sample import Samples, balanced_labels, generate, load_model

# ImageNet: batch 1024, 1,252 steps an epoch; 800 epochs, lr 2e-4 held for 40 and linear to 2e-5 (appendix D).
IMAGENET = dict(data="imagenet/train", decoder="released:dinov2-b", backbone="XL", head="G", batch_size=1024,
                steps=1001600, lr=2e-4, lr_end=2e-5, hold=50080, ema=0.9995, cfg=1.0,
                workers=12, log_every=100, sample_every=12520, save_every=5000)
TOY = dict(data="toy", decoder="toy", backbone="96,4,3", head="128,2,4", batch_size=64, steps=1300,
           lr=4e-3, lr_end=1e-4, hold=300, ema=0.995, cfg=1.5,
           workers=0, log_every=100, sample_every=500, save_every=500)
PRESETS = dict(toy=TOY, imagenet256=IMAGENET, imagenet512=IMAGENET | dict(decoder="released:dinov2-b-512"))
BINS = 5                                               # of t, as the model sees it, in the log

def transformer_size(text, depth=None):
    """argparse type: "XL" or "width,depth,heads" as numbers; depth replaces a named size's own."""
    if text in SIZES:
        width, own, heads = SIZES[text]
        return width, depth or own, heads
    width, depth, heads = map(positive, text.split(","))
    return width, depth, heads

def learning_rate(step, args):
    """lr for `hold` steps, then linear to lr_end at the last."""
    return args.lr + (args.lr_end - args.lr) * max(0.0, (step - args.hold) / max(1, args.steps - args.hold))

def draws(args, device, step, rows, shape):
    """What chance decides for the rows of a step, from (seed, step, row): t (b,) before the shift, label (b,)
    kept or dropped, noise (b, N, C). Row batch_size is none: its key serves what is drawn for all rows."""
    u = keyed_numpy(args.seed, step, args.batch_size).random((args.batch_size, 2), dtype=np.float32)
    u = torch.from_numpy(u[rows.start:rows.stop])                                     # (b, 2)
    noise = keyed_noise([(args.seed, step, row) for row in rows], shape, device)      # (b, N, C)
    return draw_time(u[:, 0], args.time).to(device), (u[:, 1] >= args.label_drop).to(device), noise

def main():
    p = parser(__doc__, PRESETS)
    flag = p.add_argument
    flag("--decoder", help="toy, a checkpoint of train_decoder.py or released:NAME")
    flag("--encoder", help="encoder that a bare released decoder belongs to")
    flag("--stats", help="latent statistics file of a bare released decoder")
    flag("--backbone", type=transformer_size, help="S B L XL or width,depth,heads (paper: XL)")
    flag("--head", type=lambda s: s if s == "none" else transformer_size(s, 2),
         help="wide head, likewise; none for the plain DiT (paper: G, 2048,2,16)")
    flag("--cache-latents", metavar="DIR", help="encode all images once, into this folder")
    flag("--no-flip", action="store_true", help="no mirror images")
    flag("--alpha", type=float, default=None, help="schedule shift (sqrt(N C / 4096), at least 1)")
    flag("--time", choices=["logit-normal", "uniform"], default="logit-normal", help="t before the shift")
    flag("--label-drop", type=float, default=0.1, help="share of labels dropped, for guidance; 1: all")
    flag("--hold", type=int, help="steps before the rate falls (paper: 40 of 800 epochs)")
    flag("--clip", type=float, default=1.0, help="gradient norm, 0 for no clipping")
    flag("--cfg", type=float, help="guidance of the preview samples")
    flag("--out", default="out/diffusion", help="folder of the run")
    flag("--sample-every", type=positive, help="steps between sample grids")
    flag("--fid-every", type=int, default=0, help="steps between scores of new samples, 0 for none")
    flag("--fid-num", type=positive, default=500, help="samples for a score (paper: 50000)")
    flag("--fid-reference", default="toy", help="what fid.py takes as REFERENCE")
    flag("--inception", help="file of the 2015 Inception weights; unset with toy: encoder features")
    args = p.parse_args()
    device, run = start(args), Run(args, "diffusion")
    if run.first == args.steps:
        return say(f"{args.out}: finished already; python sample.py --ckpt {args.out}/checkpoint.pt")
    # Images, the frozen RAE, the model and its average.
    rae = load_rae(args.decoder, args.encoder, args.encoder_weights, args.stats, device)
    check(run.saved.get("latents", rae.fingerprint()) == rae.fingerprint(),
          f"{args.decoder}: its latents are not those of {args.out}; pass another --out")
    images = data = open_data(args.data, rae.encoder.image_size)
    if args.cache_latents:
        data = CachedLatents(args.cache_latents, rae.encoder, images, args.micro_batch or 64, device)
    shape = rae.mean.shape                                                            # (N, C)
    alpha = args.alpha or shift_alpha(*shape)
    torch.manual_seed(args.seed)
    head = (args.backbone[0], 0, args.backbone[2]) if args.head == "none" else args.head
    width, depth, heads = zip(args.backbone, head)
    model = DiTDH(shape[1], rae.encoder.grid, width, depth, heads, len(data.classes))
    if args.init and not run.saved:
        start_from(model, args.init)
    model = model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()           # before any compile, float32
    optimizer = Optimizer(model)
    run.restore(ema=ema, model=model, optimizer=optimizer)
    model.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        model.compile()                                # in place: names in the checkpoint stay as they are
    say(f"{len(data)} images, {len(data.classes)} classes; {shape[0]} tokens x {shape[1]}, "
        f"alpha {alpha:.3f}; DiT {width} x {depth}, {sum(x.numel() for x in model.parameters()) / 1e6:.1f}M")
    batches = Batches(data, args.batch_size, args.seed, not args.no_flip, args.micro_batch)
    classes = list(range(model.num_classes)) if args.label_drop < 1 else [model.num_classes]
    drawn = dict(precision=autocast(device, args), cfg=args.cfg)
    if RANK == 0 and not run.saved:
        show_pairs(rae, images, args.out, device)
    for step in run.steps(batches, device, 2 * BINS + 1):             # sums: loss by bin of t, counts, norm
        if run.due(args.log_every):
            means, pace = run.means(optimizer)
            losses, counts, norm = means.split([BINS, BINS, 1])
            by_t = [s / n if n else None for s, n in zip(losses.tolist(), counts.tolist())]
            run.log(loss=(losses.sum() / counts.sum()).item(), grad_norm=norm.item(), loss_by_t=by_t, **pace)
        if RANK == 0 and (run.due(args.save_every) or step == 0):
            run.save(alpha=alpha, config=model.config, classes=data.classes, latents=rae.fingerprint())
        if RANK == 0 and run.due(args.sample_every, look=True):
            shown = balanced_labels(classes[:10], 8 * len(classes[:10]))
            pictures = generate(rae, ema, shown, time_grid(25, alpha), args.seed, **drawn)
            save_grid(pictures, f"{args.out}/samples_{step:07d}.png", columns=len(classes[:10]))
        if args.fid_every and run.due(args.fid_every, look=True):
            scored = balanced_labels(classes, args.fid_num)
            samples = Samples(rae, ema, scored, time_grid(50, alpha), args.seed, **drawn)
            scores = fid.score(samples, args.fid_reference, weights=args.inception, device=device)
            run.log(**{k: v for k, v in scores.items() if k not in ("num", "label")})
        if run.last:
            break
        seen, labels = (x.to(device, non_blocking=True) for x in run.batch())         # (b, ...), (b,)
        t, keep, noise = draws(args, device, step, batches.rows, shape)
        labels = torch.where(keep, labels, model.num_classes)
        losses = []
        for part in batches.parts:
            with autocast(device, args):
                z = rae.normalise(seen[part].float()) if args.cache_latents else rae.encode(seen[part] / 255)
                loss = flow_loss(model, z, labels[part], alpha, t[part], noise[part])  # (b,)
            (loss.sum() / len(batches.rows)).backward()
            losses.append(loss.detach())
        norm, stepped = optimizer.update(learning_rate(step, args), args.clip)
        if stepped:
            update_ema(ema, model, args.ema, step)
            bins = (shift_time(t, alpha) * BINS).long().clamp(max=BINS - 1)
            run.sums.index_add_(0, bins, torch.cat(losses))
            run.sums.index_add_(0, bins + BINS, torch.ones_like(t))
            run.sums[-1] += norm

class CachedLatents:
    """Raw tokens of a data set, plain and flipped, in a memory-mapped float16 file (n, 2, N, C). about.json
    binds it to the encoder and the images: ValueError where they are others, or the disk has no room."""
    def __init__(self, folder, encoder, images, batch_size, device):
        self.path, note = Path(folder, "latents.npy"), Path(folder, "about.json")
        self.labels, self.classes, self.tokens = images.labels, images.classes, None
        shape = len(images), 2, encoder.grid ** 2, encoder.dim
        about = json.dumps(dict(encoder=encoder.fingerprint, images=images.fingerprint(), shape=shape))
        if note.is_file() and note.read_text() == about:
            return say(f"{folder}: latents of {len(images)} images")
        check(not note.is_file(), f"{folder}: latents of another encoder or of other images; remove it")
        room = 2 * math.prod(shape)
        say(f"{folder}: encoding {len(images)} images in both flips, {room / 1e9:.3g} GB")
        Path(folder).mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            self.path.unlink(missing_ok=True)          # of an attempt that was stopped
            check(shutil.disk_usage(folder).free > room, f"{folder}: no room for {room / 1e9:.3g} GB")
            np.lib.format.open_memmap(self.path, "w+", np.float16, shape)
        dist.barrier()
        file = np.lib.format.open_memmap(self.path, "r+")
        for chosen, flip, tokens in encoded(encoder, images, batch_size, device):
            file[chosen, flip] = tokens.cpu().numpy()
        file.flush()
        dist.barrier()
        if RANK == 0:                                  # last, so that a cache with a note is whole
            note.write_text(about)
    def __len__(self):
        return len(self.labels)
    def load(self, index, rng, flip=False):
        """(N, C) float16."""
        if self.tokens is None:                        # opened where it is used: worker processes get no copy
            self.tokens = np.load(self.path, mmap_mode="r")
        return self.tokens[index, int(flip)]

def show_pairs(rae, data, out, device):
    """Images over their reconstructions, and the PSNR: what the diffusion model can reach at best."""
    images = read_images(data, np.linspace(0, len(data) - 1, 16).astype(int), device)
    again = F.adaptive_avg_pool2d(rae.decode(rae.encode(images)).clamp(0, 1), images.shape[-1])
    quality = psnr(again, images).mean().item()
    save_grid(torch.cat([images, again]), f"{out}/pairs.png", columns=len(images))
    say(f"{out}/pairs.png: reconstructions at {quality:.1f} dB"
        + ("; WARNING: the decoder looks untrained, or made for other images" if quality < 15 else ""))

def start_from(model, name):
    """Copy another model's weights; another class count keeps our fresh label table."""
    other, mine, key = load_model(name).state_dict(), model.state_dict(), "y_embedder.embedding_table.weight"
    if len(other[key]) != len(mine[key]):
        say(f"{name}: {len(other[key]) - 1} classes there, {model.num_classes} here; the label table is new")
        other[key] = mine[key]
    load_strict(model, other, name)

if __name__ == "__main__":
    cli(main)
