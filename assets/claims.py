"""The paper's claims on the toy world: runs of the scripts by flags alone, one table, figures.

    pip install matplotlib                             # for the figures; nothing else here needs it
    python assets/claims.py --quick                    # one seed, too short to show anything
    python assets/claims.py                            # three seeds
    python assets/claims.py --only width,steps         # some experiments; shared runs are made once

Writes to out/claims (--quick: out/claims/quick) claims.md, the table; claims.json, every number
with the command lines that gave it; figures; a folder for each run. The same command goes on where
it was stopped.

Scores: the Frechet distance of samples to toy validation images in the shipped encoder's features
(fid.py; no FID, to be compared with each other only), and "right", the share of samples that a
classifier trained on toy images (tests/quality.py) takes for their label. Samples are unguided, in
25 steps, unless said. Numbers are mean +- standard deviation over the seeds, and "yes" means apart
by more than both deviations together. Sections and tables (T) are those of arXiv 2510.11690, whose
numbers are gFID-50k of ImageNet at 256 px, unguided and after 80 epochs, unless said.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from quality import classifier, fit, right  # noqa: E402

from assets.toy_world import ToyShapes  # noqa: E402
from rae import save_file  # noqa: E402
from sample import balanced_labels  # noqa: E402

# Steps of the default diffusion run, of those that are compared, of the guide, a decoder, an
# encoder, the overfitting runs (the paper has 1,200) and the judge; samples for a score; the most
# cells of a sweep and, without --only, experiments.
FULL = {
    "seeds": (0, 1, 2),
    "default": 1300,
    "short": 300,
    "guide": 130,
    "decoder": 300,
    "encoder": 300,
    "overfit": 1000,
    "judge": 800,
    "num": 400,
    "cells": 99,
    "experiments": 99,
}
QUICK = {
    "seeds": (0,),
    "default": 40,
    "short": 25,
    "guide": 15,
    "decoder": 15,
    "encoder": 15,
    "overfit": 100,
    "judge": 200,
    "num": 60,
    "cells": 1,
    "experiments": 6,
}
BACKBONE = "96,4,3"  # train_diffusion.py's own for the toy
HEAD = "128,2,4"
C = 64  # channels and number of the toy's tokens
TOKENS = 16
DISTANCE = "Frechet distance"  # fid.py's name for it

out = "out/claims"
size = FULL
asked = {}  # place of a run: its command lines
done = {}  # place of a run: its numbers and command lines


# ---------------------------------------------------------------------------------------------
# The runs. Each is named by its place, the folder or file that it fills. It is made once, whoever
# asks, and after the runs whose places its command lines name. In flags, {} is the seed.


def ask(place, *commands):
    """Plan a run of these command lines; the same place always means the same lines."""
    commands = [" ".join(command.split()) for command in commands]
    assert asked.setdefault(place, commands) == commands, place
    return place


def encoder_run(name, seed, flags, steps):
    place = f"{out}/{name}_{seed}.pt"
    return ask(
        place, f"assets/pretrain_encoder.py {flags} --steps {steps} --seed {seed} --out {place}"
    )


def decoder_run(name, seed, flags):
    """No GAN: it begins late, and so short a run would hardly see it. Noisy means sigma 0.4."""
    place = f"{out}/{name}/{seed}"
    steps = size["decoder"]
    return ask(
        place,
        f"train_decoder.py --gan 0 {flags} --steps {steps} --eval-every {steps} --eval-sigma 0.4 "
        f"--seed {seed} --out {place}",
    )


def diffusion_run(name, seed, flags="", backbone=BACKBONE, head=HEAD, steps=0, batch=64):
    """The rate is held for the same share of the run as by default, 300 of 1,300 steps."""
    place = f"{out}/{name}/{seed}"
    steps = steps or size["short"]
    return ask(
        place,
        f"train_diffusion.py --backbone {backbone} --wide-head {head} --steps {steps} "
        f"--hold {steps * 3 // 13} --global-batch-size {batch} --cfg-scale 1 "
        f"{flags.format(seed)} --seed {seed} --out {place}",
    )


def score(model, seed, name="plain", flags="--cfg-scale 1", steps=25):
    """Samples of a model and their score."""
    place = f"{model}/{name}.npz"
    return ask(
        place,
        f"sample.py --ckpt {model}/checkpoint.pt {flags.format(seed)} --steps {steps} "
        f"--num {size['num']} --seed {seed} --out {place}",
        f"fid.py {place} toy --features encoder:toy --json",
    )


def cell(name, flags="", **settings):
    """A diffusion model and its score for each seed."""
    return [score(diffusion_run(name, s, flags, **settings), s) for s in size["seeds"]]


def default(*sampling, **steps):
    """Scores of the default diffusion run for each seed."""
    places = []
    for s in size["seeds"]:
        model = diffusion_run("default", s, steps=size["default"])
        places.append(score(model, s, *sampling, **steps))
    return places


def some(*cells):
    """The first cells of a sweep: --quick has only those."""
    return cells[: size["cells"]]


def flops(backbone, head, tokens=TOKENS):
    """FLOPs of one image's forward pass; a training step has three times as many.

    A block has 12 D^2 multiply-adds a token in its matrices and 2 N D in attention, one of the head
    6 D^2 more, since its norms are conditioned by token. The embedders and the last layer follow.
    """
    w, depth, _ = map(int, backbone.split(","))
    total = depth * (12 * w**2 + 2 * tokens * w) + C * w
    if head != "none":
        narrow = w
        w, depth, _ = map(int, head.split(","))
        total += depth * (18 * w**2 + 2 * tokens * w) + C * w + narrow * w + 2 * w**2
    return 2 * tokens * (total + w * C)


def make_runs(jobs, judge):
    """Make what is asked and not done, `jobs` runs at a time, each on one core.

    Small models use two cores worse than two of them do. Runs start in the order in which they were
    asked for, and so after those that they name: to wait for these cannot lock up.
    """
    futures = {}

    def make(place):
        for other, future in list(futures.items()):
            if other != place and any(other in command for command in asked[place]):
                future.result()
        began = time.time()
        for command in asked[place]:
            said = subprocess.run(
                [sys.executable, *command.split()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if said.returncode != 0:
                raise RuntimeError(f"{command}: {said.stderr.strip().splitlines()[-1]}")
        done[place] = numbers_of(place, said.stdout, judge)
        done[place]["commands"] = asked[place]
        done[place]["seconds"] = time.time() - began
        save_numbers()
        print(f"{place}: {done[place]['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for place in missing():
            done.pop(place, None)
            futures[place] = pool.submit(make, place)
        for place, future in futures.items():
            if future.exception():  # the others go on; its cell will say "failed"
                print(f"{place} FAILED: {future.exception()}", flush=True)


def missing():
    """The places not done with the command lines now asked for, or that name such places."""
    places = []
    for place, commands in asked.items():
        changed = done.get(place, {}).get("commands") != commands
        if changed or any(other in command for command in commands for other in places):
            places.append(place)
    return places


def numbers_of(place, text, judge):
    """A run's numbers: fid.py's and the share right, or the last line of a training's log."""
    if place.endswith(".pt"):
        return {}
    if place.endswith(".npz"):
        images = torch.from_numpy(np.load(place)["arr_0"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor(balanced_labels(range(10), len(images)))
        numbers = json.loads(text.splitlines()[-1])
        numbers["right"] = right(judge, images, labels)
        return numbers
    lines = [json.loads(line) for line in Path(place, "log.jsonl").read_text().splitlines()]
    curve = []
    for line in lines:
        for key in ("loss", "l1"):
            if key in line:
                curve.append([line["step"], line[key]])
    return lines[-1] | {"curve": curve}


def save_numbers(**more):
    temporary = Path(out, "claims.tmp")
    temporary.write_text(json.dumps({"runs": done, **more}, indent=1))
    os.replace(temporary, f"{out}/claims.json")


def train_judge():
    """The classifier of tests/quality.py, kept for later, and its accuracy on validation images."""
    torch.manual_seed(0)
    model = classifier()
    path = Path(out, "judge.pt")
    if not path.is_file():
        toy = ToyShapes("train")
        images = torch.from_numpy(toy.images)
        labels = torch.from_numpy(toy.labels)
        fit(model, lambda rows: images[rows].float() / 255, labels, size["judge"])
        save_file(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()
    val = ToyShapes("val")
    images = torch.from_numpy(val.images).float() / 255
    return model, right(model, images, torch.from_numpy(val.labels))


# ---------------------------------------------------------------------------------------------
# Numbers and figures


def over_seeds(places, key=DISTANCE):
    """(Mean, standard deviation) of the runs that did not fail."""
    values = [done[place][key] for place in places if place in done]
    if not values:
        return math.nan, 0.0
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def means(cells, key=DISTANCE):
    return {name: over_seeds(places, key) for name, places in cells.items()}


def show(number):
    if math.isnan(number[0]):
        return "failed"
    return "**{:.3g} +- {:.1g}**".format(*number)


def tell(cells, key=DISTANCE):
    """Text of the cells of a sweep: the distance and the share right, or another number."""
    texts = []
    for name, places in sorted(cells.items()):
        text = f"{name} {show(over_seeds(places, key))}"
        if key == DISTANCE:
            text += f" ({over_seeds(places, 'right')[0]:.2f} right)"
        texts.append(text)
    return ", ".join(texts)


def below(a, b, opposite="the opposite"):
    """Verdict on "a is lower than b", (mean, deviation) each."""
    gap = b[0] - a[0]
    noise = a[1] + b[1]
    if math.isnan(gap):
        return "failed"
    if gap > noise:
        return "yes"
    if gap < -noise:
        return opposite
    return "no, within the spread"


def lowest(numbers):
    return min(numbers, key=lambda number: (math.isnan(number[0]), number[0]))


def plot(name, title, x_label, y_label, lines):
    """Draw a figure of lines {label: {x: (mean, deviation)}}; "bound" is thin and has no points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, line in lines.items():
        xs = sorted(line)
        heights = [line[x][0] for x in xs]
        if label == "bound":
            axes.plot(xs, heights, color="grey", linewidth=1, label=label)
        else:
            axes.errorbar(xs, heights, [line[x][1] for x in xs], marker="o", capsize=3, label=label)
    every_x = sorted({x for line in lines.values() for x in line})
    if every_x[-1] >= 8 * every_x[0] > 0:
        axes.set_xscale("log", base=2)
        axes.set_xticks(every_x, [f"{x:g}" for x in every_x])
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(f"{out}/{name}.png", dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------
# The experiments. Each asks for its runs and waits at `yield` until the runs of all experiments are
# made. Then it draws its figure and yields its rows: (claim, the paper's numbers, ours, verdict).


def width():
    """One image's latent, a plain DiT; only t and noise vary (4.1, F). Each seed has its own image.

    The rate is constant, as in the paper: its default there (2e-4), the toy's here (4e-3).
    """
    toy = ToyShapes("val")
    for s in size["seeds"]:
        path = Path(out, "images", str(s), "image.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(toy.images[s].transpose(1, 2, 0)).save(path)

    def overfit(backbone, head="none"):
        name = f"{backbone}_{head}".replace(",", "x")
        flags = (
            f"--data {out}/images/{{0}} --alpha 1 --time uniform --label-drop 0 --no-flip "
            "--lr 4e-3 --lr-end 4e-3 --ema 0 --clip 0 --log-every 200"
        )
        steps = size["overfit"]
        places = []
        for s in size["seeds"]:
            places.append(diffusion_run(f"width/{name}", s, flags, backbone, head, steps, batch=32))
        return places

    widths = {w: overfit(f"{w},4,4") for w in some(32, 64, 16, 96)}
    depths = {d: overfit(f"32,{d},4") for d in some(4, 8, 1)}
    wide = overfit("32,4,4", HEAD)
    yield

    by_width = means(widths, "loss")
    by_depth = means(depths, "loss")
    with_head = over_seeds(wide, "loss")
    bound = {w: (max(1 - w / C, 0), 0) for w in by_width}
    off = max(abs(by_width[w][0] - bound[w][0]) for w in bound)
    plot(
        "width",
        "One image: a DiT narrower than a token, 64 channels, cannot fit it",
        "width, depth 4",
        "loss",
        {"measured": by_width, "bound": bound},
    )
    plot(
        "depth",
        "One image: depth does not make up for width",
        "depth, width 32",
        "loss",
        {"measured": by_depth, "bound": {d: bound[32] for d in by_depth}},
    )
    of_widths = [f"d {w} {show(m)} (bound {bound[w][0]:g})" for w, m in sorted(by_width.items())]
    of_depths = [f"depth {d} {show(m)}" for d, m in sorted(by_depth.items())]
    yield [
        (
            "One image of C channels: a DiT of width d has a loss of max(1 - d / C, 0) (Theorem 1)",
            "C 768: d 384 0.52, d 768 0.024 (T3)",
            f"C {C}: " + ", ".join(of_widths),
            f"{'yes' if off < 0.1 else 'no'}, {off:.2g} off at most",
        ),
        (
            "Depth does not help a narrow DiT (Fig. 3)",
            "C 768, d 384: 0.5 at depths 4 to 24",
            "d 32, bound 0.5: " + ", ".join(of_depths),
            "yes" if min(m for m, _ in by_depth.values()) > 0.49 else "no",
        ),
        (
            "A wide head lets a narrow backbone fit (5)",
            "",
            f"d 32: alone {show(by_width[32])}, with a head of 128 {show(with_head)}",
            below(with_head, by_width[32]),
        ),
    ]


def shift():
    cells = {1.0: cell("short")}
    for alpha in some(4.0, 2.0, 0.5):
        cells[alpha] = cell(f"shift/{alpha}", f"--alpha {alpha}")
    yield

    distance = means(cells)
    plot(
        "shift", "Schedule shift: the toy's own alpha is 1", "alpha", DISTANCE, {"DiT^DH": distance}
    )
    shifted = lowest([m for alpha, m in distance.items() if alpha > 1])
    yield [
        (
            "Noise should follow the dimension, alpha = sqrt(N C / 4096), here 1 (4.2)",
            "alpha 1 -> 6.93: 23.08 -> 4.81 (T2, T4)",
            "alpha " + tell(cells),
            below(
                distance[1.0],
                shifted,
                "in part: shifting helps, but by more than the formula's 1",
            ),
        )
    ]


def own_decoder(tau):
    """Decoders of the shipped encoder, and sample.py's flags for them.

    --stats are the shipped statistics, since a diffusion model is bound to their very bits, and
    these may be rounded otherwise.
    """
    runs = [decoder_run(f"decoder/tau{tau}", s, f"--noise-tau {tau}") for s in size["seeds"]]
    flags = f"--cfg-scale 1 --decoder {out}/decoder/tau{tau}/{{}}/checkpoint.pt"
    return runs, f"{flags} --stats assets/toy_decoder.pt"


def decoder():
    """Both decoders draw the latents of the default diffusion run."""
    clean, clean_flags = own_decoder(0)
    noisy, noisy_flags = own_decoder(0.8)
    decoders = {"tau 0": clean, "tau 0.8": noisy}
    samples = {"tau 0": default("tau0", clean_flags), "tau 0.8": default("tau0.8", noisy_flags)}
    yield

    psnr = means(decoders, "psnr")
    psnr_noisy = means(decoders, "psnr_noisy")
    drawn = means(samples)
    yield [
        (
            "A decoder trained on noise loses a little on clean latents (4.3)",
            "rFID 0.49 -> 0.57 (T15)",
            "PSNR, dB: " + tell(decoders, "psnr"),
            below(psnr["tau 0.8"], psnr["tau 0"]),
        ),
        (
            "... and gains on noisy ones",
            "",
            "PSNR, dB: " + tell(decoders, "psnr_noisy"),
            below(psnr_noisy["tau 0"], psnr_noisy["tau 0.8"]),
        ),
        (
            "... and so on samples",
            "4.81 -> 4.28 (T5)",
            tell(samples),
            below(drawn["tau 0.8"], drawn["tau 0"]),
        ),
    ]


def head():
    """Plain DiTs of equal compute, by width and by depth; a narrow backbone's head; its shapes.

    Sizes are depth x width. The head of the narrow backbone costs more compute than that alone.
    """

    def sized(name, backbone=BACKBONE, head=HEAD):
        return f"{name} ({flops(backbone, head) / 1e6:.1f} MFLOP)"

    ours = cell("short")
    equal = {}
    for name, backbone in some(("5x128", "128,5,4"), ("10x96", "96,10,3")):
        places = cell(f"head/dit_{name}", backbone=backbone, head="none")
        equal[sized(f"DiT {name}", backbone, "none")] = places
    alone = cell("head/dit_4x32", backbone="32,4,2", head="none")
    headed = cell("head/backbone_4x32", backbone="32,4,2")
    deep = cell("head/6x72", head="72,6,3")
    widths = {128: ours}
    for w in some(64, 192):
        widths[w] = cell(f"head/2x{w}", head=f"{w},2,4")
    yield

    distance = over_seeds(ours)
    by_width = means(widths)
    narrow = {sized("alone", "32,4,2", "none"): alone, sized("with head", "32,4,2"): headed}
    plot(
        "head",
        "Width of a head of 2 blocks; a token has 64 channels",
        "width",
        DISTANCE,
        {"DiT^DH": by_width},
    )
    yield [
        (
            "DiT^DH beats a DiT of equal compute (5)",
            "DiT-XL 4.28, DiT^DH-XL 2.16 (T6)",
            tell(equal | {sized("DiT^DH"): ours}),
            below(
                distance,
                lowest(means(equal).values()),
                "the opposite: these backbones are wider than a token even alone",
            ),
        ),
        (
            "A backbone narrower than a token fails alone, not with a head (5)",
            "DiT-S 215.76, DiT^DH-S 6.07 (T2, T6)",
            "4x32 " + tell(narrow),
            below(over_seeds(headed), over_seeds(alone)),
        ),
        (
            "A head is better wide than deep (5)",
            "6x1152 2.36, 2x2048 2.16 (T16)",
            tell({"6x72": deep, "2x128": ours}),
            below(distance, over_seeds(deep)),
        ),
        (
            "The head's best width is about 2.7 C (5)",
            "1, 2, 2.7, 3.5 C: 2.49, 2.24, 2.16, 2.22 (T17)",
            "width " + tell(widths),
            below(by_width[128], by_width[64]) + " (2 C against C)",
        ),
    ]


def guidance():
    """On the default run. The guide has a smaller backbone and a tenth of the steps.

    So has the paper's, a DiT^DH-S of 14 epochs.
    """
    for s in size["seeds"]:
        diffusion_run("guide", s, backbone="48,2,3", steps=size["guide"])
    cfg = {1.0: default()}
    within = {1.0: default()}
    auto = {1.0: default()}
    for w in some(1.5, 2.0):
        cfg[w] = default(f"cfg{w}", f"--cfg-scale {w}")
    within[1.5] = default("within1.5", "--cfg-scale 1.5 --interval 0 0.6")
    for w in some(1.42, 2.0):
        flags = f"--guide {out}/guide/{{}}/checkpoint.pt --guide-scale {w}"
        auto[w] = default(f"auto{w}", flags)
    yield

    lines = {"CFG": means(cfg), "CFG, t up to 0.6": means(within), "AutoGuidance": means(auto)}
    plot("guidance", "Guidance of the default run", "scale", DISTANCE, lines)
    plain = over_seeds(cfg[1.0])
    best = {}
    for name, line in lines.items():
        best[name] = lowest([m for w, m in line.items() if w > 1])
    shares = means(auto, "right")
    verdict = below(best["AutoGuidance"], plain)
    if shares[1.42][0] > shares[1.0][0]:
        verdict += "; more are right"
    yield [
        (
            "AutoGuidance improves samples (5.1)",
            "1.51 -> 1.13 (T8, 800 epochs)",
            "scale " + tell(auto),
            verdict,
        ),
        (
            "CFG over all t worsens the distance (I)",
            "",
            "scale " + tell(cfg),
            below(plain, best["CFG"]),
        ),
        (
            "CFG within an interval stays behind AutoGuidance (I)",
            "",
            "t up to 0.6, scale " + tell(within),
            below(best["AutoGuidance"], best["CFG, t up to 0.6"]),
        ),
    ]


def encoder():
    """Each encoder has its own decoder, both trained alike, and its own diffusion model."""
    decoders, flags = own_decoder(0.8)
    pretrained = []
    others = []
    for s in size["seeds"]:
        pretrained.append(score(diffusion_run("short", s), s, "own_decoder", flags))
        frozen = encoder_run("encoder/random", s, "--lr 0", 1)
        others.append(decoder_run("encoder/decoder", s, f"--encoder {frozen}"))
    decoder_flags = f"--decoder {out}/encoder/decoder/{{}}/checkpoint.pt"
    random = cell("encoder/diffusion", decoder_flags)
    yield

    samples = {"pretrained": pretrained, "random": random}
    psnr = tell({"pretrained": decoders, "random": others}, "psnr")
    yield [
        (
            "The representation matters, not its dimension alone (3)",
            "DINOv2-B 2.16, pixels 30.56 (T11)",
            f"{tell(samples)}; PSNR {psnr}",
            below(over_seeds(pretrained), over_seeds(random)),
        )
    ]


def curves():
    """What a healthy run looks like: the default runs of both stages."""
    runs = [diffusion_run("default", s, steps=size["default"]) for s in size["seeds"]]
    steps = min(800, 3 * size["decoder"])
    stage1 = ask(
        f"{out}/decoder/default/0",
        f"train_decoder.py --eval-every 800 --steps {steps} --out {out}/decoder/default/0",
    )
    yield

    by_step = {}
    for place in runs:
        for step, loss in done.get(place, {}).get("curve", []):
            by_step.setdefault(step, []).append(loss)
    loss = {}
    for step, values in by_step.items():
        loss[step] = (mean(values), stdev(values) if len(values) > 1 else 0.0)
    l1 = {step: (value, 0.0) for step, value in done.get(stage1, {}).get("curve", [])}
    plot(
        "loss",
        "Is my loss normal? The default run of train_diffusion.py",
        "step",
        "loss",
        {"loss": loss},
    )
    rows = []
    for script, unit, line in (
        ("train_diffusion.py", "loss", loss),
        ("train_decoder.py", "L1", l1),
    ):
        texts = []
        for step, number in line.items():
            if step % 200 == 0 or step in (100, 1300):
                texts.append(f"{step} {show(number)}")
        claim = f"A healthy default run of {script}"
        rows.append((claim, "", f"{unit} at step " + ", ".join(texts), "no claim"))
    yield rows


def steps():
    cells = {25: default()}
    for n in some(50, 5, 10, 100):
        cells[n] = default(f"steps{n}", steps=n)
    yield

    distance = means(cells)
    most = max(cells)
    plot("steps", "Euler steps of the default run", "steps", DISTANCE, {"DiT^DH": distance})
    verdict = "not tried"
    if most > 50:
        verdict = below(distance[most], distance[50])
        if verdict == "yes":
            verdict = f"no: {most} are better"
        elif verdict != "failed":
            verdict = "yes"
    yield [
        ("50 Euler steps are enough (E)", "all results have 50", "steps " + tell(cells), verdict)
    ]


def tokens():
    """Patches of 16, 8 and 4 px at 1,024 tokens a diffusion step: with more tokens, fewer images.

    Encoder and decoder are made once for each, with seed 0; the seeds are the diffusion's.
    """
    cells = {}
    decoders = {}
    for patch in (16, 8, 4)[: 1 + size["cells"]]:
        n = (32 // patch) ** 2
        name = f"tokens/{patch}px"
        flags = f"--patch {patch} --batch-size {2048 // n}"
        frozen = encoder_run(f"{name}_encoder", 0, flags, size["encoder"])
        flags = f"--encoder {frozen} --global-batch-size {1024 // n}"
        place = decoder_run(f"{name}_decoder", 0, flags)
        decoders[n] = [place]
        cells[n] = cell(name, f"--decoder {place}/checkpoint.pt", batch=1024 // n)
    yield

    by_tokens = means(cells)
    fewer = [m for n, m in by_tokens.items() if n != max(by_tokens)]
    yield [
        (
            "More tokens are better (6.1; the paper's take more compute, these do not)",
            "512 px, guided: 256 tokens 1.61, 1,024 1.13 (T9)",
            f"tokens {tell(cells)}; PSNR {tell(decoders, 'psnr')}",
            below(by_tokens[max(by_tokens)], lowest(fewer)),
        )
    ]


EXPERIMENTS = {
    "width": width,
    "shift": shift,
    "decoder": decoder,
    "head": head,
    "guidance": guidance,
    "steps": steps,
    "encoder": encoder,
    "tokens": tokens,
    "curves": curves,
}


def write_table(rows, accuracy):
    """claims.md: what the numbers are, the rows, and links to the figures that were drawn."""
    seconds = sum(done[place]["seconds"] for place in asked if place in done)
    about = (
        f"{len(size['seeds'])} seeds, {size['num']} samples a score, a judge that is right on "
        f"{accuracy:.3f} of toy validation images, {seconds / 3600:.2f} hours of runs."
    )
    heading = ("claim", "the paper (ImageNet)", "here (toy world)", "shown here?")
    table = ["| " + " | ".join(row) + " |" for row in [heading, ("---",) * 4, *rows]]
    figures = [f"![{path.stem}]({path.name})" for path in sorted(Path(out).glob("*.png"))]
    scores = __doc__.split("\n\n")[-1].strip()
    text = "\n".join([scores, "", about, "", *table, "", *figures, ""])
    Path(out, "claims.md").write_text(text)
    print(f"{text}\nwrote {out}/claims.md")


def main():
    global out, size
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="one seed, far fewer steps, some cells")
    p.add_argument("--only", help="of " + ",".join(EXPERIMENTS) + ": any, with commas")
    p.add_argument("--jobs", type=int, default=min(4, os.cpu_count()), help="runs at once")
    args = p.parse_args()
    if args.quick:
        out = "out/claims/quick"
        size = QUICK
    names = list(EXPERIMENTS)[: size["experiments"]]
    if args.only:
        names = args.only.split(",")
    unknown = set(names) - EXPERIMENTS.keys()
    if unknown:
        sys.exit(f"error: --only {args.only}: wants some of {','.join(EXPERIMENTS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("error: the figures need matplotlib: pip install matplotlib")

    os.chdir(ROOT)
    Path(out).mkdir(parents=True, exist_ok=True)
    if Path(out, "claims.json").is_file():
        done.update(json.loads(Path(out, "claims.json").read_text())["runs"])
    experiments = [EXPERIMENTS[name]() for name in names]
    for experiment in experiments:
        next(experiment)
    print(f"{len(asked)} runs, {len(asked) - len(missing())} of them made already", flush=True)
    judge, accuracy = train_judge()
    make_runs(args.jobs, judge)
    rows = []
    for experiment in experiments:
        rows += next(experiment)
    if args.quick:
        rows = [(*row[:3], "too short") for row in rows]
    save_numbers(rows=rows, judge=accuracy)
    write_table(rows, accuracy)


if __name__ == "__main__":
    main()
