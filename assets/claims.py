"""The paper's claims on the toy world: runs of the scripts by flags alone, one table, figures.

    python assets/claims.py --quick                    # 2 min: one seed, too short to show anything
    python assets/claims.py                            # 75 min on 2 slow cores, three seeds
    python assets/claims.py --only width,steps         # some experiments; shared runs are made once

Writes to out/claims (--quick: out/claims/quick) claims.md, the table; claims.json, every number with the
command lines that gave it; figures; a folder for each run. The same command goes on where it was stopped.

Scores: the Frechet distance of samples to toy validation images in the shipped encoder's features (fid.py; no
FID, to be compared with each other only), and "right", the share of samples that a classifier trained on toy
images (tests/quality.py) takes for their label. Samples are unguided, in 25 steps, unless said. Numbers are
mean +- standard deviation over the seeds, and "yes" means apart by more than both deviations together.
Sections and tables (T) are those of arXiv 2510.11690, whose numbers are gFID-50k of ImageNet at 256 px,
unguided and after 80 epochs, unless said.
"""

import argparse
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from assets.toy_world import ToyShapes  # noqa: E402
from quality import classifier, fit, right  # noqa: E402
from sample import balanced_labels  # noqa: E402

# Steps of the default diffusion run, of those that are compared, of the guide, a decoder, an encoder, the
# overfitting runs (the paper has 1,200) and the judge; samples for a score; at most so many cells of a sweep
# and, without --only, experiments.
FULL = dict(seeds=(0, 1, 2), default=1300, short=300, guide=130, decoder=300, encoder=300, overfit=1000,
            judge=800, num=400, cells=99, experiments=99)
QUICK = dict(seeds=(0,), default=40, short=25, guide=15, decoder=15, encoder=15, overfit=100, judge=200,
             num=60, cells=1, experiments=6)
BACKBONE, HEAD = "96,4,3", "128,2,4"                   # train_diffusion.py's own for the toy
C, TOKENS = 64, 16                                     # of the toy's latents
DISTANCE = "Frechet distance"                          # fid.py's name for it
# For the expected times, from this repository's slow cores: seconds of a process before its first step, of a
# block in a training step however small, FLOP/s of a core.
START, BLOCK, SPEED = 1.0, 0.005, 18e9

out, size = "out/claims", FULL
asked = {}                                             # place of a run: ([command lines], expected seconds)
done = {}                                              # place of a run: its numbers, command lines, seconds
cost = {}                                              # place of a diffusion run: FLOPs of an evaluation


# --------------------------------------------------------------------------------------------------- the runs
# A run is named by its place, the folder or file that it fills. It is made once, whoever asks, and after the
# runs whose places its command lines name. In flags, {} is the seed.

def ask(place, seconds, *commands):
    """Plan a run of these command lines, which one core is expected to take so many seconds for."""
    commands = [" ".join(c.split()) for c in commands]
    assert asked.setdefault(place, (commands, seconds))[0] == commands, place
    return place


def encoder_run(name, seed, flags, steps):
    place = f"{out}/{name}_{seed}.pt"
    return ask(place, START + 0.15 * steps,
               f"assets/pretrain_encoder.py {flags} --steps {steps} --seed {seed} --out {place}")


def decoder_run(name, seed, flags):
    """No GAN: it begins late, and so short a run would hardly see it. Noisy numbers are for sigma 0.4."""
    place, steps = f"{out}/{name}/{seed}", size["decoder"]
    return ask(place, START + 20 + 0.2 * steps, f"train_decoder.py --gan 0 {flags} --steps {steps} "
               f"--eval-every {steps} --eval-sigma 0.4 --seed {seed} --out {place}")


def flops(backbone, head, tokens=TOKENS):
    """Of one image's forward pass; a training step has three times as many.

    A block has 12 D^2 multiply-adds a token in its matrices and 2 N D in attention, one of the head 6 D^2
    more, since its norms are conditioned by token. The embedders and the last layer follow."""
    w, depth, _ = map(int, backbone.split(","))
    total = depth * (12 * w ** 2 + 2 * tokens * w) + C * w
    if head != "none":
        narrow, (w, depth, _) = w, map(int, head.split(","))
        total += depth * (18 * w ** 2 + 2 * tokens * w) + C * w + narrow * w + 2 * w ** 2
    return 2 * tokens * (total + w * C)


def diffusion_run(name, seed, flags="", backbone=BACKBONE, head=HEAD, steps=0, tokens=TOKENS, batch=64):
    """The rate is held for the same share of the run as by default, 300 of 1,300 steps."""
    place, steps = f"{out}/{name}/{seed}", steps or size["short"]
    blocks = sum(int(x.split(",")[1]) for x in (backbone, head) if x != "none")
    cost[place] = flops(backbone, head, tokens)
    return ask(place, START + steps * (BLOCK * blocks + 3 * cost[place] * batch / SPEED),
               f"train_diffusion.py --backbone {backbone} --head {head} --steps {steps} "
               f"--hold {steps * 3 // 13} --batch-size {batch} --cfg 1 {flags.format(seed)} --seed {seed} "
               f"--out {place}")


def score(model, seed, name="plain", flags="--cfg 1", steps=25):
    """Samples of a model and their score; both kinds of guidance take two evaluations a step."""
    place, evaluations = f"{model}/{name}.npz", 1 if "--cfg 1 " in f"{flags} " else 2
    return ask(place, 2 * START + size["num"] * steps * evaluations * cost[model] / SPEED,
               f"sample.py --ckpt {model}/checkpoint.pt {flags.format(seed)} --steps {steps} "
               f"--num {size['num']} --seed {seed} --out {place}",
               f"fid.py {place} toy --features encoder:toy --json")


def cell(name, flags="", **settings):
    """A diffusion model and its score for each seed."""
    return [score(diffusion_run(name, s, flags, **settings), s) for s in size["seeds"]]


def default(*sampling, **steps):
    """Scores of the default diffusion run for each seed."""
    return [score(diffusion_run("default", s, steps=size["default"]), s, *sampling, **steps)
            for s in size["seeds"]]


def some(*cells):
    """The first cells of a sweep: --quick has only those."""
    return cells[:size["cells"]]


def missing():
    """Runs without numbers for their command lines, and those that name such runs."""
    places = []
    for p, (commands, _) in asked.items():             # asked for after the runs that they name
        if done.get(p, {}).get("commands") != commands or any(q in c for q in places for c in commands):
            places.append(p)
    return places


def make(workers, judge):
    """Make the missing runs, one on each core: small models use two cores worse than two of them do."""
    pending, running = missing(), {}
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            while pending or running:
                unmade = {*pending, *running.values()}
                ready = [p for p in pending if not any(q in c for q in unmade - {p} for c in asked[p][0])]
                for place in ready[:workers - len(running)]:
                    pending.remove(place)
                    if done.pop(place, None) and Path(place).is_dir():
                        shutil.rmtree(place)           # of other command lines
                    running[pool.submit(call, asked[place][0])] = place
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    place = running.pop(future)
                    try:
                        text, seconds = future.result()
                        done[place] = numbers(place, text, judge) | dict(commands=asked[place][0],
                                                                         seconds=seconds)
                    except (SystemExit, ValueError) as e:          # others go on; its cell will say "failed"
                        print(f"{place} FAILED: {e}", flush=True)
                        continue
                    save()
                    print(f"{place}: {seconds:.0f} s, {len(pending)} to go", flush=True)
        finally:                                       # if stopped: the scripts save before they end
            for child in active_children():
                child.terminate()


def call(commands):
    """(What these command lines print, their seconds), in a process that has made its imports already."""
    began, text = time.time(), io.StringIO()
    for script, *sys.argv[1:] in map(str.split, commands):
        with redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
    return text.getvalue(), time.time() - began


def numbers(place, text, judge):
    """A run's printed JSON or last log line."""
    if place.endswith(".pt"):
        return {}
    if place.endswith(".npz"):
        images = torch.from_numpy(np.load(place)["arr_0"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor(balanced_labels(range(10), len(images)))
        return json.loads(text.splitlines()[-1]) | {"right": right(judge, images, labels)}
    lines = [json.loads(line) for line in Path(place, "log.jsonl").read_text().splitlines()]
    last = lines[-1]
    if not re.search(rf"--steps {last['step']}\b", asked[place][0][0]):
        raise ValueError(f"stopped at step {last['step']}")
    Path(place, "previous.pt").unlink(missing_ok=True)              # 20 MB a run
    return last | dict(curve=[[line["step"], line[key]] for line in lines for key in ("loss", "l1")
                              if key in line])


def save(**more):
    Path(out, "claims.tmp").write_text(json.dumps(dict(runs=done, **more), indent=1))
    os.replace(f"{out}/claims.tmp", f"{out}/claims.json")


def train_judge():
    """The classifier of tests/quality.py, kept for later, and its accuracy on toy validation images."""
    torch.manual_seed(0)
    model, file, val = classifier(), Path(out, "judge.pt"), ToyShapes("val")
    if not file.is_file():
        toy = ToyShapes("train")
        images, labels = torch.from_numpy(toy.images), torch.from_numpy(toy.labels)
        fit(model, lambda rows: images[rows].float() / 255, labels, size["judge"])
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    model.eval()
    return model, right(model, torch.from_numpy(val.images).float() / 255, torch.from_numpy(val.labels))


# ------------------------------------------------------------------------------------------ numbers, a figure

def over_seeds(places, key=DISTANCE):
    """(Mean, standard deviation) of the runs that did not fail."""
    values = [done[p][key] for p in places if p in done]
    return mean(values) if values else math.nan, stdev(values) if len(values) > 1 else 0.0


def means(cells, key=DISTANCE):
    return {name: over_seeds(places, key) for name, places in cells.items()}


def show(number):
    return "failed" if math.isnan(number[0]) else "**{:.3g} +- {:.1g}**".format(*number)


def tell(cells, key=DISTANCE):
    """Text of the cells of a sweep: the distance and the share right, or another number."""
    share = means(cells, "right") if key == DISTANCE else {}
    return ", ".join(f"{name} {show(m)}" + (f" ({share[name][0]:.2f} right)" if share else "")
                     for name, m in sorted(means(cells, key).items()))


def below(a, b, opposite="the opposite"):
    """Verdict on "a is lower than b", (mean, deviation) each."""
    gap, noise = b[0] - a[0], a[1] + b[1]
    if math.isnan(gap):
        return "failed"
    return "yes" if gap > noise else opposite if gap < -noise else "no, within the spread"


def lowest(numbers):
    return min(numbers, key=lambda m: (math.isnan(m[0]), m[0]))


def plot(name, title, x_label, y_label, lines):
    """Line plot as PNG; lines: {name: {x: (mean, deviation)}}. y starts at 0, x is logarithmic where it spans
    a factor of 8. The line "bound" is thin and has no points."""
    left, right, top, bottom, ink = 110, 920, 110, 550, "#222222"
    image, font = Image.new("RGB", (960, 640), "white"), ImageFont.load_default(20)
    draw, xs = ImageDraw.Draw(image), sorted({x for line in lines.values() for x in line})
    high = 1.05 * max([m + s for line in lines.values() for m, s in line.values() if m == m], default=1.0)
    scale = math.log if xs[-1] >= 8 * xs[0] else float
    first, span = scale(xs[0]), (scale(xs[-1]) - scale(xs[0])) or 1.0

    def at(x, y):
        return left + (right - left) * (scale(x) - first) / span, bottom - (bottom - top) * y / high
    power = 10 ** math.floor(math.log10(high / 6))
    tick = power * next(k for k in (1, 2, 5, 10) if k * power >= high / 6)
    for i in range(int(high / tick) + 1):
        y = at(xs[0], i * tick)[1]
        draw.line([(left - 20, y), (right, y)], "#dddddd")
        draw.text((left - 30, y), f"{i * tick:.4g}", ink, font, "rm")
    free = 0
    for x in xs:
        here = at(x, 0)[0]
        draw.line([(here, bottom), (here, bottom + 8)], ink, 2)
        if here > free:                                # numbers that would overlap stay away
            draw.text((here, bottom + 12), f"{x:g}", ink, font, "ma")
            free = here + 50
    draw.line([(left - 20, top), (left - 20, bottom), (right, bottom)], ink, 2)
    draw.text((20, 15), title, ink, ImageFont.load_default(24))
    draw.text((20, 60), y_label, ink, font)
    draw.text((right, 600), x_label, ink, font, "ra")
    colours = iter(("#0072b2", "#d55e00", "#009e73"))  # apart for the colour-blind too
    for i, (label, line) in enumerate(lines.items()):
        colour = "#777777" if label == "bound" else next(colours)
        points = [(x, m, s) for x, (m, s) in sorted(line.items()) if m == m]
        draw.line([at(x, m) for x, m, _ in points], colour, 2 if label == "bound" else 4)
        for x, m, s in points if label != "bound" else ():
            draw.line([at(x, m - s), at(x, m + s)], colour, 2)
            draw.circle(at(x, m), 6, colour)
        draw.text((right, 30 + 26 * i), label, colour, font, "ra")
    image.save(f"{out}/{name}.png")


# -------------------------------------------------------------------------------------------- the experiments
# Each asks for its runs, waits at `yield` until the runs of all experiments are made, then draws its figure
# and yields its rows: (claim, the paper's numbers, ours, verdict).

def width():
    """One image's latent, a plain DiT; only t and noise vary (4.1, F). Each seed has its own image. The
    rate is constant, as in the paper: its default there (2e-4), the toy's here (4e-3)."""
    toy = ToyShapes("val")
    for s in size["seeds"]:
        file = Path(out, "images", str(s), "image.png")
        if not file.is_file():                         # a new file would not be the one in the cache
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(toy.images[s].transpose(1, 2, 0)).save(file)

    def overfit(backbone, head="none"):
        name = f"{backbone}_{head}".replace(",", "x")
        flags = (f"--data {out}/images/{{0}} --cache-latents {out}/latents/{name}_{{0}} --alpha 1 "
                 "--time uniform --label-drop 0 --no-flip --lr 4e-3 --lr-end 4e-3 --ema 0 --clip 0 "
                 "--log-every 200")
        return [diffusion_run(f"width/{name}", s, flags, backbone, head, size["overfit"], batch=32)
                for s in size["seeds"]]
    widths = {w: overfit(f"{w},4,4") for w in some(32, 64, 16, 96)}
    depths = {d: overfit(f"32,{d},4") for d in some(4, 8, 1)}
    wide = overfit("32,4,4", HEAD)
    yield
    by_width, by_depth, with_head = means(widths, "loss"), means(depths, "loss"), over_seeds(wide, "loss")
    bound = {w: (max(1 - w / C, 0), 0) for w in by_width}
    off = max(abs(by_width[w][0] - bound[w][0]) for w in bound)
    plot("width", "One image: a DiT narrower than a token, 64 channels, cannot fit it", "width, depth 4",
         "loss", dict(measured=by_width, bound=bound))
    plot("depth", "One image: depth does not make up for width", "depth, width 32", "loss",
         dict(measured=by_depth, bound={d: bound[32] for d in by_depth}))
    yield [("One image of C channels: a DiT of width d has a loss of max(1 - d / C, 0) (Theorem 1)",
            "C 768: d 384 0.52, d 768 0.024 (T3)", f"C {C}: " + ", ".join(
                f"d {w} {show(m)} (bound {bound[w][0]:g})" for w, m in sorted(by_width.items())),
            f"{'yes' if off < 0.1 else 'no'}, {off:.2g} off at most"),
           ("Depth does not help a narrow DiT (Fig. 3)", "C 768, d 384: 0.5 at depths 4 to 24",
            "d 32, bound 0.5: " + ", ".join(f"depth {d} {show(m)}" for d, m in sorted(by_depth.items())),
            "yes" if min(m for m, _ in by_depth.values()) > 0.49 else "no"),
           ("A wide head lets a narrow backbone fit (5)", "", f"d 32: alone {show(by_width[32])}, with a "
            f"head of 128 {show(with_head)}", below(with_head, by_width[32]))]


def shift():
    cells = {1.0: cell("short")} | {a: cell(f"shift/{a}", f"--alpha {a}") for a in some(4.0, 2.0, 0.5)}
    yield
    distance = means(cells)
    plot("shift", "Schedule shift: the toy's own alpha is 1", "alpha", DISTANCE, dict(distance=distance))
    yield [("Noise should follow the dimension, alpha = sqrt(N C / 4096), here 1 (4.2)",
            "alpha 1 -> 6.93: 23.08 -> 4.81 (T2, T4)", "alpha " + tell(cells),
            below(distance[1.0], lowest([m for a, m in distance.items() if a > 1]),
                  "in part: shifting helps, but by more than the formula's 1"))]


def own_decoder(tau):
    """Decoders of the shipped encoder, and the flags that sample.py needs for them: --stats are the shipped
    statistics, since a diffusion model is bound to their very bits and these may be rounded otherwise."""
    runs = [decoder_run(f"decoder/tau{tau}", s, f"--noise-tau {tau}") for s in size["seeds"]]
    return runs, f"--cfg 1 --decoder {out}/decoder/tau{tau}/{{}}/checkpoint.pt --stats assets/toy_decoder.pt"


def decoder():
    """Both decoders draw the latents of the default diffusion run."""
    (clean, clean_flags), (noisy, noisy_flags) = own_decoder(0), own_decoder(0.8)
    decoders = {"tau 0": clean, "tau 0.8": noisy}
    samples = {"tau 0": default("tau0", clean_flags), "tau 0.8": default("tau0.8", noisy_flags)}
    yield
    (a, b), (a_noisy, b_noisy), (a_drawn, b_drawn) = (
        means(*x).values() for x in ((decoders, "psnr"), (decoders, "psnr_noisy"), (samples,)))
    yield [("A decoder trained on noise loses a little on clean latents (4.3)", "rFID 0.49 -> 0.57 (T15)",
            "PSNR, dB: " + tell(decoders, "psnr"), below(b, a)),
           ("... and gains on noisy ones", "", "PSNR, dB: " + tell(decoders, "psnr_noisy"),
            below(a_noisy, b_noisy)),
           ("... and so on samples", "4.81 -> 4.28 (T5)", tell(samples), below(b_drawn, a_drawn))]


def head():
    """Plain DiTs of equal compute, one by width and one by depth; then the head of a narrow backbone, which
    costs more; then shapes of the head. Sizes are depth x width."""
    def sized(name, backbone=BACKBONE, head=HEAD):
        return f"{name} ({flops(backbone, head) / 1e6:.1f} MFLOP)"
    ours = cell("short")
    equal = {sized(f"DiT {name}", b, "none"): cell(f"head/dit_{name}", backbone=b, head="none")
             for name, b in some(("5x128", "128,5,4"), ("10x96", "96,10,3"))}
    narrow = {sized("alone", "32,4,2", "none"): cell("head/dit_4x32", backbone="32,4,2", head="none"),
              sized("with head", "32,4,2"): cell("head/backbone_4x32", backbone="32,4,2")}
    deep = cell("head/6x72", head="72,6,3")
    widths = {128: ours} | {w: cell(f"head/2x{w}", head=f"{w},2,4") for w in some(64, 192)}
    yield
    distance, by_width, (alone, headed) = over_seeds(ours), means(widths), means(narrow).values()
    plot("head", "Width of a head of 2 blocks; a token has 64 channels", "width", DISTANCE,
         dict(distance=by_width))
    yield [("DiT^DH beats a DiT of equal compute (5)", "DiT-XL 4.28, DiT^DH-XL 2.16 (T6)",
            tell(equal | {sized("DiT^DH"): ours}), below(
                distance, lowest(means(equal).values()),
                "the opposite: these backbones are wider than a token even alone")),
           ("A backbone narrower than a token fails alone, not with a head (5)",
            "DiT-S 215.76, DiT^DH-S 6.07 (T2, T6)", "4x32 " + tell(narrow), below(headed, alone)),
           ("A head is better wide than deep (5)", "6x1152 2.36, 2x2048 2.16 (T16)",
            tell({"6x72": deep, "2x128": ours}), below(distance, over_seeds(deep))),
           ("The head's best width is about 2.7 C (5)", "1, 2, 2.7, 3.5 C: 2.49, 2.24, 2.16, 2.22 (T17)",
            "width " + tell(widths), below(by_width[128], by_width[64]) + " (2 C against C)")]


def guidance():
    """On the default run. The guide has a smaller backbone, the same head and a tenth of the steps, as the
    paper's DiT^DH-S of 14 epochs."""
    for s in size["seeds"]:
        diffusion_run("guide", s, backbone="48,2,3", steps=size["guide"])
    none = {1.0: default()}
    cfg = none | {w: default(f"cfg{w}", f"--cfg {w}") for w in some(1.5, 2.0)}
    within = none | {w: default(f"within{w}", f"--cfg {w} --interval 0 0.6") for w in (1.5,)}
    auto = none | {w: default(f"auto{w}", f"--guide {out}/guide/{{}}/checkpoint.pt --scale {w}")
                   for w in some(1.42, 2.0)}
    yield
    lines = {"CFG": means(cfg), "CFG, t up to 0.6": means(within), "AutoGuidance": means(auto)}
    plot("guidance", "Guidance of the default run", "scale", DISTANCE, lines)
    plain, (by_cfg, by_within, by_auto) = over_seeds(none[1.0]), (
        lowest([m for w, m in line.items() if w > 1]) for line in lines.values())
    shares = {w: m for w, (m, _) in means(auto, "right").items()}
    yield [("AutoGuidance improves samples (5.1)", "1.51 -> 1.13 (T8, 800 epochs)", "scale " + tell(auto),
            below(by_auto, plain) + "; more are right" * (shares[1.42] > shares[1.0])),
           ("CFG over all t worsens the distance (I)", "", "scale " + tell(cfg), below(plain, by_cfg)),
           ("CFG within an interval stays behind AutoGuidance (I)", "", "t up to 0.6, scale " + tell(within),
            below(by_auto, by_within))]


def encoder():
    """Each encoder has its own decoder, both trained alike, and its own diffusion model."""
    decoders, flags = own_decoder(0.8)
    pretrained = [score(diffusion_run("short", s), s, "own_decoder", flags) for s in size["seeds"]]
    frozen = [encoder_run("encoder/random", s, "--lr 0", 1) for s in size["seeds"]]
    others = [decoder_run("encoder/decoder", s, f"--encoder {frozen[s]}") for s in size["seeds"]]
    random = cell("encoder/diffusion", f"--decoder {out}/encoder/decoder/{{}}/checkpoint.pt")
    yield
    samples = {"pretrained": pretrained, "random": random}
    yield [("The representation matters, not its dimension alone (3)", "DINOv2-B 2.16, pixels 30.56 (T11)",
            f"{tell(samples)}; PSNR {tell({'pretrained': decoders, 'random': others}, 'psnr')}",
            below(*means(samples).values()))]


def curves():
    """What a healthy run looks like: the default runs of both stages."""
    runs = [diffusion_run("default", s, steps=size["default"]) for s in size["seeds"]]
    stage1 = ask(f"{out}/decoder/default/0", 0.3 * size["decoder"], "train_decoder.py --eval-every 800 "
                 f"--steps {min(800, 3 * size['decoder'])} --out {out}/decoder/default/0")
    yield
    by_step = {}
    for step, loss in (pair for p in runs if p in done for pair in done[p]["curve"]):
        by_step.setdefault(step, []).append(loss)
    loss = {step: (mean(x), stdev(x) if len(x) > 1 else 0.0) for step, x in by_step.items()}
    plot("loss", "Is my loss normal? The default run of train_diffusion.py", "step", "loss", dict(loss=loss))
    l1 = {step: (x, 0.0) for step, x in done[stage1]["curve"]} if stage1 in done else {}
    yield [(f"A healthy default run of {script}", "", f"{unit} at step "
            + ", ".join(f"{s} {show(m)}" for s, m in line.items() if s % 200 == 0 or s in (100, 1300)),
            "no claim")
           for script, unit, line in (("train_diffusion.py", "loss", loss), ("train_decoder.py", "L1", l1))]


def steps():
    cells = {25: default()} | {n: default(f"steps{n}", steps=n) for n in some(50, 5, 10, 100)}
    yield
    distance, most = means(cells), max(cells)
    plot("steps", "Euler steps of the default run", "steps", DISTANCE, dict(distance=distance))
    verdict = below(distance[most], distance[50]) if most > 50 else "not tried"
    verdict = {"yes": f"no: {most} are better", "no, within the spread": "yes",
               "the opposite": "yes"}.get(verdict, verdict)
    yield [("50 Euler steps are enough (E)", "all results have 50", "steps " + tell(cells), verdict)]


def tokens():
    """Patches of 16, 8 and 4 px at 1,024 tokens a diffusion step: with more tokens, fewer images. Encoder and
    decoder are made once for each, with seed 0; the seeds are the diffusion's."""
    cells, decoders = {}, {}
    for patch in (16, 8, 4)[:1 + size["cells"]]:
        n, name = (32 // patch) ** 2, f"tokens/{patch}px"
        flags = f"--patch {patch} --batch-size {2048 // n}"
        frozen = encoder_run(f"{name}_encoder", 0, flags, size["encoder"])
        place = decoder_run(f"{name}_decoder", 0, f"--encoder {frozen} --batch-size {1024 // n}")
        decoders[n] = [place]
        cells[n] = cell(name, f"--decoder {place}/checkpoint.pt", tokens=n, batch=1024 // n)
    yield
    *fewer, most = means(cells).values()
    yield [("More tokens are better (6.1; the paper's take more compute, these do not)",
            "512 px, guided: 256 tokens 1.61, 1,024 1.13 (T9)",
            f"tokens {tell(cells)}; PSNR {tell(decoders, 'psnr')}", below(most, lowest(fewer)))]


EXPERIMENTS = {f.__name__: f for f in (width, shift, decoder, head, guidance, steps, encoder, tokens,
                                       curves)}


def main():
    global out, size
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="one seed, far fewer steps, some cells")
    p.add_argument("--only", help="of " + ",".join(EXPERIMENTS) + ": any, with commas")
    p.add_argument("--jobs", type=int, default=min(4, os.cpu_count()), help="runs at once")
    args = p.parse_args()
    if args.quick:
        out, size = "out/claims/quick", QUICK
    names = args.only.split(",") if args.only else list(EXPERIMENTS)[:size["experiments"]]
    if set(names) - EXPERIMENTS.keys():
        sys.exit(f"error: --only {args.only}: wants some of {','.join(EXPERIMENTS)}")
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
    Path(out).mkdir(parents=True, exist_ok=True)
    if Path(out, "claims.json").is_file():
        done.update(json.loads(Path(out, "claims.json").read_text())["runs"])
    experiments = [EXPERIMENTS[name]() for name in names]
    for experiment in experiments:
        next(experiment)
    minutes = sum(asked[p][1] for p in missing()) / 60 / min(args.jobs, os.cpu_count())
    print(f"{len(asked)} runs, {len(asked) - len(missing())} of them made already; the others take about "
          f"{minutes:.0f} min, {args.jobs} at once on cores like the README's", flush=True)
    try:
        judge, accuracy = train_judge()
        torch.set_num_threads(1)                       # the cores are for the runs
        make(args.jobs, judge)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    rows = [row for experiment in experiments for row in next(experiment)]
    if args.quick:
        rows = [(*row[:3], "too short") for row in rows]
    hours = sum(done[p]["seconds"] for p in asked if p in done) / 3600
    about = (f"{len(size['seeds'])} seeds, {size['num']} samples a score, a judge that is right on "
             f"{accuracy:.3f} of toy validation images, {hours:.2f} hours of runs.")
    table = [("claim", "the paper (ImageNet)", "here (toy world)", "shown here?"), ("---",) * 4, *rows]
    figures = [f"![{f.stem}]({f.name})" for f in sorted(Path(out).glob("*.png"))]
    text = "\n".join([__doc__.split("\n\n")[-1].strip(), "", about, "",
                      *("| " + " | ".join(row) + " |" for row in table), "", *figures, ""])
    Path(out, "claims.md").write_text(text)
    save(rows=rows, judge=accuracy)
    print(f"{text}\nwrote {out}/claims.md")


if __name__ == "__main__":
    main()
