"""The paper's claims on the toy world: plain runs of the scripts, a table, a figure.

    pip install matplotlib                             # for the figure; nothing else here needs it
    python extras/paper/claims.py --quick                    # one seed, too short to show anything
    python extras/paper/claims.py                            # five seeds
    python extras/paper/claims.py --only compute,steps  # some experiments

Writes to out/claims (--quick: out/claims/quick) claims.md, the table; claims.json, every number
with the command lines that gave it; claims.png; a folder for each run. The same command goes on
where it was stopped.

A cell reads "distance in the toy encoder's features / distance in those of a classifier (share of
samples that the classifier takes for their label)". The distances are Frechet distances of samples
to toy validation images: no FID, to be compared within a row only. The classifier was trained on
toy training images, and no encoder, decoder or diffusion model has seen it. Samples are unguided,
in 25 steps, unless said. There are ten classes: by chance 0.1 are right. The toy encoder is a
masked autoencoder, so the first distance may favour latents like its own. A thousand real images
have 0.12 / 0.05, and their reconstructions 0.14 / 0.20; below the latter, a lower distance need not
be better. PSNR and losses are means +- standard deviations over the seeds.

The criterion was fixed before the runs; the default's shape, rate and alpha, and so the cells
beside it, were chosen after trials with seed 0, which is one of the five (docs/toy.md); the rate
was varied for one plain DiT alone. Each seed gives a difference between two cells, since runs of
one seed see the same images and noise and are sampled from the same noise. For "A is better than B"
there are two 95% intervals of the mean of A - B (Student's t), one for each distance (of PSNR or a
loss: one); a claim about several cells has them for each comparison. "Yes": all of them lie below
0. "In part": some do, and none lies above. "Mixed": some lie below and some above. "No": some lie
above and none below. "Not shown": none is off 0, which says little, since with five seeds an effect
below 1.2 standard deviations of the differences mostly goes unseen. Intervals are not widened for
their number, so a "no" or an "in part" that hangs on one of them is weak. They cover seeds alone:
there is one data set, one encoder, one decoder and one classifier. Sections and tables (T) are
those of arXiv 2510.11690, whose numbers are gFID-50k of ImageNet at 256 px, unguided and after 80
epochs, unless said.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image
from scipy.stats import t as student_t

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
from quality import classifier, fit, right  # noqa: E402

from dit_dh import DiTDH  # noqa: E402
from extras.paper.costs import gmac  # noqa: E402
from fid import frechet_distance, load_encoder, mean_and_covariance  # noqa: E402
from rae import load_rae, save_file  # noqa: E402
from sample import balanced_labels  # noqa: E402
from toy.world import ToyShapes  # noqa: E402
from train_diffusion import TOY, backbone_size, wide_head_size  # noqa: E402

# Steps of the default diffusion run, of shorter ones, of the guide, a decoder, an encoder, the
# overfitting runs (the paper has 1,200) and the judge; samples for a score; the most cells of a
# sweep.
FULL = {
    "seeds": (0, 1, 2, 3, 4),
    "default": TOY["steps"],
    "short": TOY["steps"] // 2,
    "guide": TOY["steps"] // 10,
    "decoder": 300,
    "encoder": 600,
    "overfit": 1000,
    "judge": 800,
    "num": 1000,
    "cells": 99,
}
QUICK = {
    "seeds": (0,),
    "default": 30,
    "short": 20,
    "guide": 10,
    "decoder": 10,
    "encoder": 10,
    "overfit": 30,
    "judge": 40,
    "num": 60,
    "cells": 1,
}
BACKBONE = TOY["backbone"]
HEAD = TOY["wide_head"]
ALPHA = TOY["alpha"]
TOKENS, C = load_rae("toy").latent_mean.shape
SPACES = ("encoder", "judge")  # of the distances

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


def encoder_run(name, flags):
    place = f"{out}/{name}.pt"
    steps = size["encoder"]
    return ask(place, f"extras/pretrain_encoder.py {flags} --steps {steps} --out {place}")


def decoder_run(name, seed, flags):
    """No GAN: it begins late, and so short a run would hardly see it. Noisy means sigma 0.4."""
    place = f"{out}/{name}/{seed}"
    steps = size["decoder"]
    return ask(
        place,
        f"train_decoder.py --gan 0 {flags} --steps {steps} --eval-every {steps} --eval-sigma 0.4 "
        f"--eval-num {size['num']} --seed {seed} --out {place}",
    )


def diffusion_run(name, seed, flags="", backbone=BACKBONE, head=HEAD, alpha=ALPHA, **more):
    """The rate is held for the same share of the run as by default."""
    place = f"{out}/{name}/{seed}"
    steps = more.get("steps", size["default"])
    hold = round(steps * TOY["hold"] / TOY["steps"])
    batch = more.get("batch", TOY["global_batch_size"])
    return ask(
        place,
        f"train_diffusion.py --backbone {backbone} --wide-head {head} --alpha {alpha:g} "
        f"--steps {steps} --hold {hold} --global-batch-size {batch} --sample-every 100000 "
        f"{flags.format(seed)} --seed {seed} --out {place}",
    )


def score(model, seed, name="plain", flags="--cfg-scale 1", steps=25):
    """Samples of a model and their score."""
    place = f"{model}/{name}.npz"
    return ask(
        place,
        f"sample.py --ckpt {model}/checkpoint.pt {flags.format(seed)} --steps {steps} "
        f"--num {size['num']} --seed {seed} --out {place}",
    )


def cell(name, flags="", **settings):
    """A diffusion model and its score for each seed."""
    return [score(diffusion_run(name, s, flags, **settings), s) for s in size["seeds"]]


def default(*sampling, **steps):
    """Scores of the default diffusion run for each seed."""
    return [score(diffusion_run("default", s), s, *sampling, **steps) for s in size["seeds"]]


def some(*cells):
    """The first cells of a sweep: --quick has only those."""
    return cells[: size["cells"]]


def make_runs(jobs, judge):
    """Make what is asked and not done, `jobs` runs at a time, each on one core.

    Small models use two cores worse than two of them do. The next run is the first one whose
    command lines name no run that is still to be made.
    """

    def make(place):
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
        numbers = numbers_of(place, judge)
        return numbers | {"commands": asked[place], "seconds": time.time() - began}

    waiting = missing()
    running = {}  # future: place
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for place in list(waiting):
                others = {*waiting, *running.values()} - {place}
                ready = not any(other in command for command in asked[place] for other in others)
                if ready and len(running) < jobs:
                    waiting.remove(place)
                    done.pop(place, None)
                    running[pool.submit(make, place)] = place
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                place = running.pop(future)
                if future.exception():  # the others go on; its cell will say "failed"
                    print(f"{place} FAILED: {future.exception()}", flush=True)
                else:
                    done[place] = future.result()
                    save_numbers()
                    print(f"{place}: {done[place]['seconds']:.0f} s", flush=True)


def missing():
    """The places not done with the command lines now asked for, or that name such places."""
    places = []
    for place, commands in asked.items():
        changed = done.get(place, {}).get("commands") != commands
        if changed or any(other in command for command in commands for other in places):
            places.append(place)
    return places


def numbers_of(place, judge):
    """A run's numbers: its samples' scores, or the last line of a training's log."""
    if place.endswith(".pt"):
        return {}
    if place.endswith(".npz"):
        images = torch.from_numpy(np.load(place)["arr_0"]).permute(0, 3, 1, 2).float() / 255
        return judge(images, torch.tensor(balanced_labels(range(10), len(images))))
    return json.loads(Path(place, "log.jsonl").read_text().splitlines()[-1])


def save_numbers(**more):
    temporary = Path(out, "claims.tmp")
    temporary.write_text(json.dumps({"runs": done, **more}, indent=1))
    os.replace(temporary, f"{out}/claims.json")


class Judge:
    """What scores samples: two feature networks with the statistics of validation images.

    The classifier is that of extras/quality.py, kept in the folder; its features are the last
    convolution's 128 channels, averaged over the picture.
    """

    def __init__(self):
        torch.manual_seed(0)
        self.classifier = classifier()
        path = Path(out, "judge.pt")
        if not path.is_file():
            toy = ToyShapes("train")
            images = torch.from_numpy(toy.images)
            labels = torch.from_numpy(toy.labels)
            fit(self.classifier, lambda rows: images[rows].float() / 255, labels, size["judge"])
            save_file(self.classifier.state_dict(), path)
        self.classifier.load_state_dict(torch.load(path, weights_only=True))
        self.classifier.eval()
        extract, _ = load_encoder("toy", 32, "cpu")
        body = self.classifier[:-2]  # without its flattening and last layer
        self.networks = {
            "encoder": lambda images: extract(images * 255)[0],
            "judge": lambda images: body(images).mean((2, 3)),
        }
        val = ToyShapes("val")
        images = torch.from_numpy(val.images).float() / 255
        self.real = {space: self.statistics(space, images) for space in SPACES}
        self.accuracy = right(self.classifier, images, torch.from_numpy(val.labels))

    @torch.no_grad()
    def statistics(self, space, images):
        features = torch.cat([self.networks[space](batch) for batch in images.split(250)])
        return mean_and_covariance(features)

    def __call__(self, images, labels):
        """{space: distance, "right": share} of samples (B, 3, 32, 32) in [0, 1]."""
        numbers = {}
        for space in SPACES:
            drawn = self.statistics(space, images)
            numbers[space] = float(frechet_distance(*self.real[space], *drawn))
        return numbers | {"right": right(self.classifier, images, labels)}


# ---------------------------------------------------------------------------------------------
# Numbers, comparisons and text


def values(places, key):
    """A number of each run, in the order of the seeds; NaN for a run that failed."""
    return [done[place][key] if place in done else math.nan for place in places]


def average(places, key):
    return mean(values(places, key))


def average_and_deviation(places, key):
    numbers = values(places, key)
    return mean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0


def difference(a, b, key):
    """The mean over the seeds of a - b, and the half width of its 95% interval."""
    gaps = [x - y for x, y in zip(values(a, key), values(b, key), strict=True)]
    if len(gaps) == 1:
        return gaps[0], math.inf
    quantile = student_t.ppf(0.975, len(gaps) - 1)
    return mean(gaps), float(quantile * stdev(gaps) / math.sqrt(len(gaps)))


def compare(a, b, keys=SPACES):
    """For each key -1 if a is lower than b, 1 if higher, 0 if its interval holds 0; and a text."""
    signs = []
    texts = []
    for key in keys:
        gap, half = difference(a, b, key)
        texts.append(f"{gap:+.3g} +- {half:.2g}")
        signs.append(-1 if gap + half < 0 else 1 if gap - half > 0 else 0)
    return signs, " / ".join(texts)


def verdict(*comparisons):
    """Of a claim that says: lower, in each of these comparisons."""
    signs = {sign for signs, _ in comparisons for sign in signs}
    if signs == {-1}:
        return "yes"
    if signs >= {-1, 1}:
        return "mixed"
    if -1 in signs:
        return "in part"
    if 1 in signs:
        return "no"
    return "not shown"


def show(places, key=None):
    """The text of a cell: both distances and the share right, or another number's mean."""
    if key is not None:
        number, deviation = average_and_deviation(places, key)
        return f"{number:.3g} +- {deviation:.1g}" if len(places) > 1 else f"{number:.3g}"
    by_space = " / ".join(f"{average(places, space):.3g}" for space in SPACES)
    return f"{by_space} ({average(places, 'right'):.2f})"


def tell(cells, key=None):
    return ", ".join(f"{name}: {show(places, key)}" for name, places in cells.items())


def tell_differences(comparisons):
    """The text of {"A - B": comparison}."""
    return "; ".join(f"{what} {text}" for what, (_, text) in comparisons.items())


def mflop(backbone, head):
    """10^6 FLOPs of one image's forward pass; a training step has three times as many."""

    def model():
        grid_size = math.isqrt(TOKENS)
        return DiTDH(C, grid_size, backbone_size(backbone), wide_head_size(head), 10)

    count, _ = gmac(model, ((1, TOKENS, C), None), ((1,), None), ((1,), torch.long))
    return 2e3 * count


# ---------------------------------------------------------------------------------------------
# The experiments. Each asks for its runs and waits at `yield` until the runs of all experiments are
# made. Then it yields its rows (claim, the paper's numbers, ours, differences, verdict), and the
# lines of its panel, if it has one.


def panel(title, x_label, y_label, lines):
    """One plot: lines are {label: {x: places}}, numbers for "bound"; y_label is a number's key."""
    return {"title": title, "x": x_label, "y": y_label, "lines": lines}


def width():
    """One image's latent, a plain DiT; only t and noise vary (4.1, F). Each seed has its own image.

    The rate is constant, as in the paper: its default there (2e-4), the toy's here.
    """
    seeds = size["seeds"][:3]
    toy = ToyShapes("val")
    for s in seeds:
        path = Path(out, "images", str(s), "image.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(toy.images[s].transpose(1, 2, 0)).save(path)

    def overfit(width, depth=4, head="none", predict="v"):
        name = f"{width}x{depth}_{head}_{predict}".replace(",", "x")
        flags = (
            f"--data {out}/images/{{0}} --time uniform --label-drop 0 --no-flip --clip 0 --ema 0 "
            f"--lr 4e-3 --lr-end 4e-3 --log-every 200 --predict {predict}"
        )
        settings = dict(backbone=f"{width},{depth},4", head=head, alpha=1)
        more = dict(steps=size["overfit"], batch=32)
        return [diffusion_run(f"width/{name}", s, flags, **settings, **more) for s in seeds]

    half = C // 2
    quarter = C // 4
    widths = {w: overfit(w) for w in some(half, quarter, 3 * C // 4, C, 3 * C // 2)}
    depths = {d: overfit(half, d) for d in some(4, 1, 8)}
    wide = overfit(half, head=HEAD)
    x = overfit(quarter, predict="x")
    yield

    widths = dict(sorted(widths.items()))
    depths = dict(sorted(depths.items()))
    bound = {w: max(1 - w / C, 0) for w in widths}
    off = max(average(widths[w], "loss") - bound[w] for w in widths)
    below = min(average(widths[w], "loss") - bound[w] for w in widths)
    of_widths = [f"d {w}: {show(p, 'loss')} (bound {bound[w]:g})" for w, p in widths.items()]
    of_depths = {f"depth {d}": places for d, places in depths.items()}
    deeper = {
        f"{max(depths)} - {d}": compare(depths[max(depths)], depths[d], ["loss"])
        for d in sorted(depths)[:-1]
    }
    fits = compare(wide, widths[half], ["loss"]) if half in widths else ([0], "")
    x_loss = average(x, "loss")
    rows = [
        (
            "One image of C channels: a DiT of width d has a loss of at least max(1 - d/C, 0), "
            "nearly reached (Theorem 1): yes if at most 0.1 above and not below. This and the next "
            "three rows have 3 seeds",
            "C 768: d 384 0.52, d 768 0.024 (T3)",
            f"C {C}: " + ", ".join(of_widths),
            f"{below:+.3f} to {off:+.3f} from the bound",
            "yes" if -0.005 < below and off < 0.1 else "no",
        ),
        (
            "Depth takes no narrow DiT below the bound (Fig. 3): yes if all lie above 0.98 of it",
            "C 768, d 384: 0.5 at depths 4 to 24",
            f"d {half}, bound 0.5: " + tell(of_depths, "loss"),
            tell_differences(deeper),
            "yes" if min(average(p, "loss") for p in depths.values()) > 0.49 else "no",
        ),
        (
            "A wide head lets a narrow backbone fit (5)",
            "",
            f"d {half}, with a head of {HEAD}: {show(wide, 'loss')}",
            f"with - without {fits[1]}",
            verdict(fits),
        ),
        (
            "Predicting the latent instead of the velocity needs less width (later work, JiT), on "
            "one image, where the latent is a constant: yes if below a fifth of Theorem 1's bound",
            "",
            f"d {quarter}, bound {1 - quarter / C:g}: {show(x, 'loss')}",
            "",
            "yes" if x_loss < (1 - quarter / C) / 5 else "no",
        ),
    ]
    lines = {"bound": bound, "measured": widths, "x-prediction": {quarter: x}}
    yield rows, panel("One image: the loss of a DiT of width d", "width d", "loss", lines)


# Plain DiTs of the default's compute or a little more, as the table says: depth x width.
PLAIN = {
    "1x256": "256,1,4",
    "2x176": "176,2,4",
    "3x144": "144,3,4",
    "4x128": "128,4,4",
}


def compute():
    """The default against plain DiTs of equal compute: shallow and wide to deep and narrow."""
    ours = default()
    plain = {}
    for name, backbone in some(*PLAIN.items()):
        plain[name, backbone] = cell(f"compute/{name}", backbone=backbone, head="none")
    # The best of the four in trials of one seed, at the best of three rates for it.
    faster = cell("compute/2x176_faster", "--lr 8e-3", backbone=PLAIN["2x176"], head="none")
    yield

    cells = {f"**DiT^DH** ({mflop(BACKBONE, HEAD):.0f} MFLOP)": ours}
    comparisons = {}
    points = {}
    for (name, backbone), places in plain.items():
        cells[f"DiT {name} ({mflop(backbone, 'none'):.0f} MFLOP)"] = places
        comparisons[f"DiT^DH - {name}"] = compare(ours, places)
        points[int(name.split("x")[1])] = places
    cells["DiT 2x176 at a rate of 8e-3"] = faster
    comparisons["DiT^DH - 2x176 at 8e-3"] = compare(ours, faster)
    images = size["default"] * TOY["global_batch_size"]
    training = 3 * mflop(BACKBONE, HEAD) * images / 1e6
    rows = [
        (
            "DiT^DH is better than these plain DiTs of similar compute (5)",
            "another question: DiT^DH-B 3.38 at 40% of the FLOPs of DiT-XL, 4.28 (T6)",
            f"MFLOP an evaluation, {training:.0f} TFLOP of training: " + tell(cells),
            tell_differences(comparisons),
            verdict(*comparisons.values()),
        )
    ]
    lines = {"plain DiT": points, "DiT^DH": {int(HEAD.split(",")[0]): ours}}
    yield rows, panel("Equal compute", "width (DiT^DH: of its head)", "judge", lines)


def shift():
    ours = default()
    cells = {}
    for alpha in some(1, 4 * ALPHA):
        cells[alpha] = cell(f"shift/{alpha:g}", alpha=alpha)
    yield

    comparisons = {f"{ALPHA:g} - {a:g}": compare(ours, places) for a, places in cells.items()}
    every = dict(sorted((cells | {ALPHA: ours}).items()))
    rows = [
        (
            f"The schedule is to be shifted (4.2): alpha {ALPHA:g} is better than 1 and than "
            f"{4 * ALPHA:g}",
            "alpha 1 -> 6.93: 23.08 -> 4.81 (T2, T4); its formula gives less than 1 here",
            tell({f"alpha {alpha:g}": places for alpha, places in every.items()}),
            tell_differences(comparisons),
            verdict(*comparisons.values()),
        )
    ]
    yield rows, panel("Schedule shift", "alpha", "judge", {"DiT^DH": every})


def own_decoder(tau):
    """Decoders of the shipped encoder, and sample.py's flags for them.

    --stats are the shipped statistics, since a diffusion model is bound to their very bits, and
    these may be rounded otherwise.
    """
    runs = [decoder_run(f"decoder/tau{tau}", s, f"--noise-tau {tau}") for s in size["seeds"]]
    flags = f"--cfg-scale 1 --decoder {out}/decoder/tau{tau}/{{}}/checkpoint.pt"
    return runs, f"{flags} --stats toy/decoder.pt"


def decoder():
    """Both decoders draw the latents of the default diffusion run."""
    clean, clean_flags = own_decoder(0)
    noisy, noisy_flags = own_decoder(0.8)
    decoders = {"tau 0": clean, "tau 0.8": noisy}
    samples = {"tau 0": default("tau0", clean_flags), "tau 0.8": default("tau0.8", noisy_flags)}
    yield

    on_clean = compare(noisy, clean, ["psnr"])
    on_noisy = compare(clean, noisy, ["psnr_noisy"])
    drawn = compare(samples["tau 0.8"], samples["tau 0"])
    yield (
        [
            (
                "A decoder trained on noise loses PSNR on clean latents (4.3). This and the next "
                f"two rows: decoders of {size['decoder']} steps, which the seeds vary too",
                "rFID 0.49 -> 0.57 (T15)",
                "PSNR, dB: " + tell(decoders, "psnr"),
                f"tau 0.8 - 0 {on_clean[1]}",
                verdict(on_clean),
            ),
            (
                "... and gains on noisy ones (sigma 0.4)",
                "",
                "PSNR, dB: " + tell(decoders, "psnr_noisy"),
                f"tau 0 - 0.8 {on_noisy[1]}",
                verdict(on_noisy),
            ),
            (
                "... and so on samples",
                "4.81 -> 4.28 (T5)",
                tell(samples),
                f"tau 0.8 - 0 {drawn[1]}",
                verdict(drawn),
            ),
        ],
        None,
    )


def head():
    """The width of the head, at half the default's steps."""
    widths = {}
    for w in some(C, 3 * C // 4, 2 * C):
        widths[w] = cell(f"head/{w}", head=f"{w},1,4", steps=size["short"])
    narrow = cell("head/none", head="none", steps=size["short"])
    yield

    ours = widths[C]
    comparisons = {"C - none": compare(ours, narrow)}
    if 3 * C // 4 in widths:
        comparisons["C - 3/4 C"] = compare(ours, widths[3 * C // 4])
    cells = {f"alone ({mflop(BACKBONE, 'none'):.0f} MFLOP)": narrow}
    for w, places in sorted(widths.items()):
        cells[f"head {w} ({mflop(BACKBONE, f'{w},1,4'):.0f} MFLOP)"] = places
    rows = [
        (
            "A backbone narrower than a token needs a head, and one as wide as a token (5): C is "
            "better than none and than 3/4 C, at half the default's steps and unequal compute",
            "DiT-S 215.76, DiT^DH-S 6.07 (T2, T6); never below C: "
            "1, 2, 2.7, 3.5 C: 2.49, 2.24, 2.16, 2.22 (T17)",
            tell(cells),
            tell_differences(comparisons),
            verdict(*comparisons.values()),
        )
    ]
    yield rows, panel("Width of the head", "width", "judge", {"DiT^DH": widths})


def guidance():
    """On the default run. The guide has a smaller backbone and a tenth of the steps.

    So has the paper's, a DiT^DH-S of 14 epochs.
    """
    for s in size["seeds"]:
        diffusion_run("guide", s, backbone="32,2,2", steps=size["guide"])
    plain = default()
    cfg = {}
    auto = {}
    within = default("within1.5", "--cfg-scale 1.5 --interval 0 0.9")
    for w in some(1.5, 1.25, 2.0):
        cfg[w] = default(f"cfg{w}", f"--cfg-scale {w}")
    for w in some(1.25, 1.1, 1.5):
        flags = f"--guide {out}/guide/{{}}/checkpoint.pt --guide-scale {w}"
        auto[w] = default(f"auto{w}", flags)
    yield

    better = compare(auto[1.25], plain)
    worse = compare(plain, cfg[1.5])  # that none is better
    behind = compare(auto[1.25], within)
    cfg = {1.0: plain} | dict(sorted(cfg.items()))
    auto = {1.0: plain} | dict(sorted(auto.items()))
    rows = [
        (
            "AutoGuidance improves samples (5.1): scale 1.25 is better than none",
            "1.51 -> 1.13 (T8, 800 epochs)",
            tell({f"scale {w:g}": places for w, places in auto.items()}),
            f"1.25 - none {better[1]}",
            verdict(better),
        ),
        (
            "CFG from the first step on worsens the distance (I): none is better than scale 1.5",
            "",
            tell({f"scale {w:g}": places for w, places in cfg.items()}),
            f"none - 1.5 {worse[1]}",
            verdict(worse),
        ),
        (
            "CFG within an interval stays behind AutoGuidance (I): AutoGuidance 1.25 is better "
            "than CFG 1.5 for t up to 0.9, two settings that were not tuned",
            "",
            tell({"AutoGuidance 1.25": auto[1.25], "CFG 1.5, t up to 0.9": within}),
            f"AutoGuidance - CFG {behind[1]}",
            verdict(behind),
        ),
    ]
    lines = {"CFG": cfg, "AutoGuidance": auto}
    yield rows, panel("Guidance", "scale", "judge", lines)


def steps():
    cells = {}
    for n in some(50, 100, 5, 10):
        cells[n] = default(f"steps{n}", steps=n)
    cells[25] = default()
    yield

    text, enough = "", "not tried"
    if 100 in cells:
        _, text = compare(cells[50], cells[100])
        gaps = [sum(difference(cells[50], cells[100], space)) for space in SPACES]
        close = [gap < 0.05 * average(cells[100], s) for gap, s in zip(gaps, SPACES)]
        enough = "yes" if all(close) else "not shown"
    every = {f"{n} steps": places for n, places in sorted(cells.items())}
    rows = [
        (
            "50 Euler steps are enough (E): yes if the intervals of 50 minus 100 end below 5%",
            "all results have 50",
            tell(every),
            f"50 - 100 {text}",
            enough,
        )
    ]
    yield rows, panel("Euler steps", "steps", "judge", {"DiT^DH": cells})


def own_latent(name, encoder_flags):
    """An encoder of its own and a decoder for it, both of seed 0, and the flag that names it."""
    shape = f"--width {C} --depth 4 --heads 4"  # of the shipped encoder
    frozen = encoder_run(f"{name}_encoder", f"{shape} {encoder_flags}")
    place = decoder_run(f"{name}_decoder", 0, f"--encoder {frozen}")
    return place, f"--decoder {place}/checkpoint.pt"


def masked(patch):
    """The latent of a masked autoencoder with patches of so many pixels."""
    return own_latent(f"latent/{patch}px", f"--patch {patch}")


def latent_cell(name, flag, alpha=ALPHA, batch=64):
    return cell(f"latent/{name}_{batch}", flag, alpha=alpha, batch=batch, steps=size["short"])


def encoder():
    """Latents of one shape: encoders made alike, each with a decoder; the seeds are diffusion's."""
    latents = {"masked": ("8px", *masked(8))}
    for kind, name, flags in some(
        ("random", "random", "--lr 0"), ("plain autoencoder", "plain", "--mask 0")
    ):
        latents[kind] = (name, *own_latent(f"latent/{name}", flags))
    cells = {kind: latent_cell(name, flag) for kind, (name, _, flag) in latents.items()}
    yield

    others = {
        f"masked - {kind}": compare(cells["masked"], cells[kind])
        for kind in latents
        if kind != "masked"
    }
    psnr = tell({kind: [place] for kind, (_, place, _) in latents.items()}, "psnr")
    yield (
        [
            (
                "The representation matters, not its dimension alone (3, 6): a masked "
                "autoencoder's against a random encoder's and a plain autoencoder's",
                "DINOv2-B 2.16, SD-VAE 7.13, pixels 30.56 (T2, T10, T11)",
                f"{tell(cells)}; PSNR, dB: {psnr}",
                tell_differences(others),
                verdict(*others.values()),
            )
        ],
        None,
    )


def tokens():
    """Patches of 16, 8 and 4 px, at equal images and at equal tokens, so about equal compute.

    alpha follows the square-root law from the default's.
    """
    equal_images = {}
    equal_tokens = {}
    decoders = {}
    for patch in (8, 16, 4)[: 1 + size["cells"]]:
        n = (32 // patch) ** 2
        place, flag = masked(patch)
        decoders[n] = [place]
        alpha = ALPHA * math.sqrt(n / TOKENS)
        equal_images[n] = latent_cell(f"{patch}px", flag, alpha)
        equal_tokens[n] = latent_cell(f"{patch}px", flag, alpha, batch=1024 // n)
    yield

    most = max(equal_images)
    rows = []
    for cells, what, paper in (
        (equal_images, "images a step", "512 px, guided: 256 tokens 1.61, 1,024 1.13 (T9)"),
        (equal_tokens, "tokens a step", ""),
    ):
        ordered = dict(sorted(cells.items()))
        others = {
            f"{most} - {n} tokens": compare(cells[most], cells[n]) for n in ordered if n != most
        }
        psnr = tell(dict(sorted(decoders.items())), "psnr")
        rows.append(
            (
                f"More tokens are better (6.1), at equal {what}: {most} against fewer",
                paper,
                tell({f"{n} tokens": places for n, places in ordered.items()})
                + f"; PSNR, dB: {psnr}",
                tell_differences(others),
                verdict(*others.values()),
            )
        )
    yield rows, None


EXPERIMENTS = {
    "compute": compute,
    "shift": shift,
    "encoder": encoder,
    "tokens": tokens,
    "head": head,
    "guidance": guidance,
    "steps": steps,
    "decoder": decoder,
    "width": width,
}


def draw(panels):
    """claims.png: the panels, three in a row; means over the seeds with standard deviations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil(len(panels) / 3)
    figure, grid = pyplot.subplots(
        rows, 3, figsize=(12, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axes, one in zip(grid.flat, panels):
        key = one["y"]
        for label, line in one["lines"].items():
            xs = sorted(line)
            if label == "bound":
                axes.plot(xs, [line[x] for x in xs], color="grey", linewidth=1, label=label)
                continue
            points = [average_and_deviation(line[x], key) for x in xs]
            heights, spreads = zip(*points)
            axes.errorbar(xs, heights, spreads, marker="o", capsize=3, label=label)
        if max(xs) >= 8 * min(xs) > 0:
            axes.set_xscale("log", base=2)
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.set_ylim(bottom=0)
        unit = "distance, classifier's features" if key == "judge" else key
        axes.set(title=one["title"], xlabel=one["x"], ylabel=unit)
        if len(one["lines"]) > 1:
            axes.legend()
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.savefig(f"{out}/claims.png", dpi=100)


def write_table(rows, names, accuracy):
    """claims.md: what the numbers are, the rows, and the figure."""
    seconds = sum(done[place]["seconds"] for place in asked if place in done)
    left_out = ", ".join(name for name in EXPERIMENTS if name not in names) or "none"
    about = (
        f"Experiments left out: {left_out}. {len(size['seeds'])} seeds, {size['num']} samples a "
        "score, a classifier that is right on "
        f"{accuracy:.3f} of toy validation images, {len(asked)} runs of {seconds / 3600:.2f} hours "
        "together, each on one core."
    )
    heading = ("claim", "the paper (ImageNet)", "here (toy world)", "differences", "shown here?")
    table = ["| " + " | ".join(row) + " |" for row in [heading, ("---",) * 5, *rows]]
    scores = __doc__.split("\n\n", 3)[-1].strip()
    text = "\n".join([scores, "", about, "", *table, "", "![The claims](claims.png)", ""])
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
    names = list(EXPERIMENTS)
    if args.only:
        names = args.only.split(",")
    unknown = set(names) - EXPERIMENTS.keys()
    if unknown:
        sys.exit(f"error: --only {args.only}: wants some of {','.join(EXPERIMENTS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("error: the figure needs matplotlib: pip install matplotlib")

    os.chdir(ROOT)
    torch.set_num_threads(1)
    Path(out).mkdir(parents=True, exist_ok=True)
    if Path(out, "claims.json").is_file():
        done.update(json.loads(Path(out, "claims.json").read_text())["runs"])
    experiments = [EXPERIMENTS[name]() for name in names]
    for experiment in experiments:
        next(experiment)
    print(f"{len(asked)} runs, {len(asked) - len(missing())} of them made already", flush=True)
    judge = Judge()
    make_runs(args.jobs, judge)
    rows = []
    panels = []
    for experiment in experiments:
        more, one = next(experiment)
        rows += more
        if one is not None:
            panels.append(one)
    if args.quick:
        rows = [(*row[:4], "too short") for row in rows]
    save_numbers(rows=rows, judge=judge.accuracy)
    if panels:
        draw(panels)
    write_table(rows, names, judge.accuracy)


if __name__ == "__main__":
    main()
