"""Test the paper's claims on the toy world: run the scripts and write a table.

    python extras/paper/claims.py --quick                # one seed, too short to show anything
    python extras/paper/claims.py                        # five seeds, hours
    python extras/paper/claims.py --only compute,steps   # some experiments

Writes claims.md (the table), claims.json (every number, with the command lines behind it) and one
folder per run to out/claims (--quick: out/claims/quick). Rerun the same command to resume.
claims_figure.py draws the figure from docs/claims.json.

A cell reads "distance in the toy encoder's features / distance in a classifier's features
(classifier's accuracy)". Both are Frechet distances between samples and toy validation images. They
are not FID: compare them within a row only. The classifier was trained on toy training images; no
encoder, decoder or diffusion model has seen it. Unless noted, samples are unguided and take 25
steps. With ten classes, chance is an accuracy of 0.1. The toy encoder is a masked autoencoder, so
the first distance may favor latents like its own. A thousand real images score 0.12 / 0.05 and
their reconstructions 0.14 / 0.20; below the latter, lower need not be better. PSNR and losses are
means +- standard deviations over the seeds.

We fixed the criterion before the runs. The default's shape, learning rate and alpha, and so the
cells next to it, were chosen after trials with seed 0, one of the five (docs/results.md); we
tried other learning rates for one plain DiT only. Runs with the same seed see the same images and
noise and are sampled from the same noise, so each seed gives one difference between two cells. For
"A is better than B" we compute a 95% interval of the mean of A - B (Student's t) for each of the
two distances, or one interval for PSNR or a loss; a claim about several cells has intervals for
each comparison. "Yes": all intervals lie below 0. "In part": some do and none lies above. "Mixed":
some lie below and some above. "No": some lie above and none below. "Not shown": all contain 0. That
is weak evidence, since five seeds usually miss effects below 1.2 standard deviations of the
differences. We do not correct for the number of intervals, so a "no" or an "in part" that depends
on one of them is weak too. The intervals cover seeds only: there is one data set, one encoder, one
decoder and one classifier. Sections and tables (T) are those of arXiv 2510.11690. Its numbers are
gFID-50k on ImageNet at 256 px, unguided and after 80 epochs, unless noted.
"""

import argparse
import json
import math
import os
import shutil
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
from quality import accuracy, build_classifier, fit  # noqa: E402

from dit_dh import DiTDH  # noqa: E402
from extras.paper.costs import gmac  # noqa: E402
from fid import frechet_distance, mean_and_covariance  # noqa: E402
from rae import UsageError, atomic_save, load_encoder, load_rae, run_script  # noqa: E402
from sample import balanced_labels  # noqa: E402
from toy.world import ToyShapes  # noqa: E402
from train_diffusion import TOY, backbone_size, wide_head_size  # noqa: E402

# Steps of the default diffusion run, shorter runs, the guidance model, a decoder, an encoder, the
# overfitting runs (the paper: 1,200) and the classifier; samples per score; cells of a sweep.
FULL = {
    "seeds": (0, 1, 2, 3, 4),
    "default": TOY["steps"],
    "short": TOY["steps"] // 2,
    "guide": TOY["steps"] // 10,
    "decoder": 300,
    "encoder": 600,
    "overfit": 1000,
    "classifier": 800,
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
    "classifier": 40,
    "num": 60,
    "cells": 1,
}
BACKBONE = TOY["backbone"]
HEAD = TOY["wide_head"]
ALPHA = TOY["alpha"]
TOKENS, C = load_rae("toy").latent_mean.shape
SPACES = ("encoder", "classifier")  # of the distances

out = "out/claims"
size = FULL
planned = {}  # path of a run: its command lines
results = {}  # path of a run: its numbers and command lines


# ---------------------------------------------------------------------------------------------
# The runs. A run is known by its path, the folder or file that it writes. Experiments can share
# runs. A run starts once the runs whose paths occur in its command lines are made. In flags, {} is
# the seed.


def plan(path, *commands):
    """Plan a run. The same path must always have the same command lines."""
    commands = [" ".join(command.split()) for command in commands]
    assert planned.setdefault(path, commands) == commands, path
    return path


def encoder_run(name, flags):
    path = f"{out}/{name}.pt"
    steps = size["encoder"]
    return plan(path, f"extras/pretrain_encoder.py {flags} --steps {steps} --out {path}")


def decoder_run(name, seed, flags):
    """Without GAN, which would only start late in such a short run. Noisy means sigma 0.4."""
    path = f"{out}/{name}/{seed}"
    steps = size["decoder"]
    return plan(
        path,
        f"train_decoder.py --disc-weight 0 {flags} --steps {steps} --eval-every {steps} "
        f"--eval-sigma 0.4 --eval-num {size['num']} --seed {seed} --out {path}",
    )


def diffusion_run(name, seed, flags="", backbone=BACKBONE, head=HEAD, alpha=ALPHA, **more):
    """The learning rate is held for the same share of the run as by default."""
    path = f"{out}/{name}/{seed}"
    script = more.get("script", "train_diffusion.py")
    steps = more.get("steps", size["default"])
    hold = round(steps * TOY["hold"] / TOY["steps"])
    batch_size = more.get("batch_size", TOY["global_batch_size"])
    return plan(
        path,
        f"{script} --backbone {backbone} --wide-head {head} --alpha {alpha:g} "
        f"--steps {steps} --hold {hold} --global-batch-size {batch_size} --sample-every 100000 "
        f"{flags.format(seed)} --seed {seed} --out {path}",
    )


def score(model, seed, name="plain", flags="--cfg-scale 1", steps=25):
    """Samples of a model and their score."""
    samples = f"{model}/{name}"
    return plan(
        f"{samples}.npz",
        f"sample.py --ckpt {model}/checkpoint.pt {flags.format(seed)} --steps {steps} "
        f"--num {size['num']} --seed {seed} --out {samples}",
    )


def cell(name, flags="", **settings):
    """A diffusion model and its score for each seed."""
    return [score(diffusion_run(name, s, flags, **settings), s) for s in size["seeds"]]


def default(*sampling, **steps):
    """Scores of the default diffusion run for each seed."""
    return [score(diffusion_run("default", s), s, *sampling, **steps) for s in size["seeds"]]


def some(*cells):
    """The cells of a sweep; with --quick, only the first."""
    return cells[: size["cells"]]


def make_runs(jobs, judge):
    """Make the missing runs, `jobs` at a time, each on one core.

    Two small models on one core each are faster than one after the other on two. The next run is
    the first one that depends on no unfinished run.
    """

    def make(path):
        start = time.time()
        for command in planned[path]:
            process = subprocess.run(
                [sys.executable, *command.split()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if process.returncode != 0:
                raise RuntimeError(f"{command}: {process.stderr.strip().splitlines()[-1]}")
        numbers = read_numbers(path, judge)
        return numbers | {"commands": planned[path], "seconds": time.time() - start}

    waiting = missing()
    running = {}  # future: path
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for path in list(waiting):
                unfinished = {*waiting, *running.values()} - {path}
                ready = not any(p in command for command in planned[path] for p in unfinished)
                if ready and len(running) < jobs:
                    waiting.remove(path)
                    results.pop(path, None)
                    running[pool.submit(make, path)] = path
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                path = running.pop(future)
                if future.exception():  # the other runs continue; cells of this one become nan
                    print(f"{path} FAILED: {future.exception()}", flush=True)
                else:
                    results[path] = future.result()
                    save_results()
                    print(f"{path}: {results[path]['seconds']:.0f} s", flush=True)


def missing():
    """Paths of runs without results for the current command lines, and of runs that use those."""
    paths = []
    for path, commands in planned.items():
        changed = results.get(path, {}).get("commands") != commands
        if changed or any(p in command for command in commands for p in paths):
            paths.append(path)
    return paths


def read_numbers(path, judge):
    """A run's numbers: the score of its samples, or the last line of its training log."""
    if path.endswith(".pt"):
        return {}
    if path.endswith(".npz"):
        images = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2).float() / 255
        shutil.rmtree(path.removesuffix(".npz"))  # the same images as a thousand PNGs
        return judge(images, torch.tensor(balanced_labels(range(10), len(images))))
    return json.loads(Path(path, "log.jsonl").read_text().splitlines()[-1])


def save_results(**more):
    temporary = Path(out, "claims.tmp")
    temporary.write_text(json.dumps({"runs": results, **more}, indent=1))
    os.replace(temporary, f"{out}/claims.json")


class Judge:
    """Scores samples in two feature spaces, against toy validation images.

    The classifier is that of extras/quality.py, trained once and kept in the output folder. Its
    features are the 128 channels of the last convolution, averaged over the image.
    """

    def __init__(self):
        torch.manual_seed(0)
        self.classifier = build_classifier()
        path = Path(out, "classifier.pt")
        if not path.is_file():
            toy = ToyShapes("train")
            images = torch.from_numpy(toy.images)
            labels = torch.from_numpy(toy.labels)
            steps = size["classifier"]
            fit(self.classifier, lambda rows: images[rows].float() / 255, labels, steps)
            atomic_save(self.classifier.state_dict(), path)
        self.classifier.load_state_dict(torch.load(path, weights_only=True))
        self.classifier.eval()
        encoder = load_encoder("toy", 32)
        convolutions = self.classifier[:-2]  # without flattening and linear layer
        self.networks = {
            "encoder": lambda images: encoder(images).mean(1),
            "classifier": lambda images: convolutions(images).mean((2, 3)),
        }
        val = ToyShapes("val")
        images = torch.from_numpy(val.images).float() / 255
        self.real = {space: self.statistics(space, images) for space in SPACES}
        self.val_accuracy = accuracy(self.classifier, images, torch.from_numpy(val.labels))

    @torch.no_grad()
    def statistics(self, space, images):
        features = torch.cat([self.networks[space](batch) for batch in images.split(250)])
        return mean_and_covariance(features)

    def __call__(self, images, labels):
        """{space: distance, "accuracy": accuracy} of samples (B, 3, 32, 32) in [0, 1]."""
        numbers = {"accuracy": accuracy(self.classifier, images, labels)}
        for space in SPACES:
            statistics = self.statistics(space, images)
            numbers[space] = frechet_distance(*self.real[space], *statistics)
        return numbers


# ---------------------------------------------------------------------------------------------
# Numbers, comparisons and text


def values(paths, key):
    """A number of each run, in the order of the seeds; NaN for a run that failed."""
    return [results[path][key] if path in results else math.nan for path in paths]


def average(paths, key):
    return mean(values(paths, key))


def average_and_deviation(paths, key):
    numbers = values(paths, key)
    return mean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0


def difference(a, b, key):
    """The mean of a - b over the seeds, and the half width of its 95% interval."""
    differences = [x - y for x, y in zip(values(a, key), values(b, key), strict=True)]
    if len(differences) == 1:
        return differences[0], math.inf
    quantile = student_t.ppf(0.975, len(differences) - 1)
    return mean(differences), float(quantile * stdev(differences) / math.sqrt(len(differences)))


def compare(a, b, keys=SPACES):
    """The sign of a - b for each key, 0 if its interval contains 0; and the text of a cell."""
    signs = []
    texts = []
    for key in keys:
        center, half = difference(a, b, key)
        texts.append(f"{center:+.3g} +- {half:.2g}")
        signs.append(-1 if center + half < 0 else 1 if center - half > 0 else 0)
    return signs, " / ".join(texts)


def verdict(*comparisons):
    """The verdict on the claim that a is lower than b in each of these comparisons."""
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


def cell_text(paths, key=None):
    """The text of a cell: both distances and the accuracy, or the mean of another number."""
    if key is not None:
        number, deviation = average_and_deviation(paths, key)
        return f"{number:.3g} +- {deviation:.1g}" if len(paths) > 1 else f"{number:.3g}"
    distances = " / ".join(f"{average(paths, space):.3g}" for space in SPACES)
    return f"{distances} ({average(paths, 'accuracy'):.2f})"


def cells_text(cells, key=None):
    return ", ".join(f"{name}: {cell_text(paths, key)}" for name, paths in cells.items())


def differences_text(comparisons):
    """The text of {"A - B": comparison}."""
    return "; ".join(f"{name} {text}" for name, (_, text) in comparisons.items())


def mflop(backbone, head):
    """10^6 FLOPs of one image's forward pass; a training step takes three times as many."""

    def model():
        grid_size = math.isqrt(TOKENS)
        return DiTDH(C, grid_size, backbone_size(backbone), wide_head_size(head), 10)

    count, _ = gmac(model, ((1, TOKENS, C), None), ((1,), None), ((1,), torch.long))
    return 2e3 * count


# ---------------------------------------------------------------------------------------------
# The experiments. Each plans its runs and then waits at `yield` until the runs of all experiments
# are made. Then it yields its rows (claim, the paper's numbers, ours, differences, verdict).


def width():
    """Overfit plain DiTs to one image: only t and noise vary (4.1, F). Each seed has its own image.

    The learning rate is constant, as in the paper, and about the toy's default.
    """
    seeds = size["seeds"][:3]
    toy = ToyShapes("val")
    for s in seeds:
        path = Path(out, "images", str(s), "image.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(toy.images[s].transpose(1, 2, 0)).save(path)

    def overfit(name, width, depth=4, head="none", script="train_diffusion.py"):
        flags = (
            f"--data {out}/images/{{0}} --time uniform --label-drop 0 --no-flip --clip 0 --ema 0 "
            "--lr 4e-3 --lr-end 4e-3 --log-every 200"
        )
        settings = dict(backbone=f"{width},{depth},4", head=head, alpha=1, script=script)
        more = dict(steps=size["overfit"], batch_size=32)
        return [diffusion_run(f"width/{name}", s, flags, **settings, **more) for s in seeds]

    half = C // 2
    quarter = C // 4
    all_widths = some(half, quarter, 3 * C // 4, C, 3 * C // 2)
    widths = {w: overfit(f"{w}x4", w) for w in all_widths}
    depths = {d: overfit(f"{half}x{d}", half, d) for d in some(4, 1, 8)}
    wide = overfit("wide_head", half, head=HEAD)
    x = overfit("x_prediction", quarter, script="extras/paper/x_prediction.py")
    yield

    widths = dict(sorted(widths.items()))
    depths = dict(sorted(depths.items()))
    bound = {w: max(1 - w / C, 0) for w in widths}
    off = max(average(widths[w], "loss") - bound[w] for w in widths)
    below = min(average(widths[w], "loss") - bound[w] for w in widths)
    width_texts = [f"d {w}: {cell_text(p, 'loss')} (bound {bound[w]:g})" for w, p in widths.items()]
    named_depths = {f"depth {d}": paths for d, paths in depths.items()}
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
            f"C {C}: " + ", ".join(width_texts),
            f"{below:+.3f} to {off:+.3f} from the bound",
            "yes" if -0.005 < below and off < 0.1 else "no",
        ),
        (
            "Depth takes no narrow DiT below the bound (Fig. 3): yes if all are above 0.98 of it",
            "C 768, d 384: 0.5 at depths 4 to 24",
            f"d {half}, bound 0.5: " + cells_text(named_depths, "loss"),
            differences_text(deeper),
            "yes" if min(average(p, "loss") for p in depths.values()) > 0.49 else "no",
        ),
        (
            "A wide head lets a narrow backbone fit (5)",
            "",
            f"d {half}, with a head of {HEAD}: {cell_text(wide, 'loss')}",
            f"with - without {fits[1]}",
            verdict(fits),
        ),
        (
            "Predicting the latent instead of the velocity needs less width (later work, JiT), on "
            "one image, where the latent is a constant: yes if below a fifth of Theorem 1's bound",
            "",
            f"d {quarter}, bound {1 - quarter / C:g}: {cell_text(x, 'loss')}",
            "",
            "yes" if x_loss < (1 - quarter / C) / 5 else "no",
        ),
    ]
    yield rows


# Plain DiTs with the default's compute or slightly more (the table has FLOPs): depth x width.
PLAIN = {
    "1x256": "256,1,4",
    "2x176": "176,2,4",
    "3x144": "144,3,4",
    "4x128": "128,4,4",
}


def compute():
    """The default against plain DiTs of equal compute, from shallow and wide to deep and narrow."""
    ours = default()
    plain = {}
    for name, backbone in some(*PLAIN.items()):
        plain[name, backbone] = cell(f"compute/{name}", backbone=backbone, head="none")
    # The best of the four in trials with one seed, at the best of three learning rates.
    faster = cell("compute/2x176_faster", "--lr 8e-3", backbone=PLAIN["2x176"], head="none")
    yield

    cells = {f"**DiT^DH** ({mflop(BACKBONE, HEAD):.0f} MFLOP)": ours}
    comparisons = {}
    for (name, backbone), paths in plain.items():
        cells[f"DiT {name} ({mflop(backbone, 'none'):.0f} MFLOP)"] = paths
        comparisons[f"DiT^DH - {name}"] = compare(ours, paths)
    cells["DiT 2x176 at a learning rate of 8e-3"] = faster
    comparisons["DiT^DH - 2x176 at 8e-3"] = compare(ours, faster)
    images = size["default"] * TOY["global_batch_size"]
    training = 3 * mflop(BACKBONE, HEAD) * images / 1e6
    rows = [
        (
            "DiT^DH is better than these plain DiTs of similar compute (5)",
            "another question: DiT^DH-B 3.38 at 40% of the FLOPs of DiT-XL, 4.28 (T6)",
            f"MFLOP per evaluation, {training:.0f} TFLOP of training: " + cells_text(cells),
            differences_text(comparisons),
            verdict(*comparisons.values()),
        )
    ]
    yield rows


def shift():
    ours = default()
    cells = {}
    for alpha in some(1, 4 * ALPHA):
        cells[alpha] = cell(f"shift/{alpha:g}", alpha=alpha)
    yield

    comparisons = {f"{ALPHA:g} - {a:g}": compare(ours, paths) for a, paths in cells.items()}
    every = dict(sorted((cells | {ALPHA: ours}).items()))
    rows = [
        (
            f"The schedule needs a shift (4.2): alpha {ALPHA:g} is better than 1 and than "
            f"{4 * ALPHA:g}",
            "alpha 1 -> 6.93: 23.08 -> 4.81 (T2, T4); its formula gives less than 1 here",
            cells_text({f"alpha {alpha:g}": paths for alpha, paths in every.items()}),
            differences_text(comparisons),
            verdict(*comparisons.values()),
        )
    ]
    yield rows


def own_decoder(tau):
    """Decoders for the toy encoder, and sample.py's flags for them.

    sample.py insists on the statistics of the diffusion model's training. The decoders' own may be
    rounded differently on this machine, so --stats names the toy's.
    """
    runs = [decoder_run(f"decoder/tau{tau}", s, f"--noise-tau {tau}") for s in size["seeds"]]
    flags = f"--cfg-scale 1 --decoder {out}/decoder/tau{tau}/{{}}/checkpoint.pt"
    return runs, f"{flags} --stats toy/decoder.pt"


def decoder():
    """Decode the default diffusion run's samples with decoders trained with and without noise."""
    clean, clean_flags = own_decoder(0)
    noisy, noisy_flags = own_decoder(0.8)
    decoders = {"tau 0": clean, "tau 0.8": noisy}
    samples = {"tau 0": default("tau0", clean_flags), "tau 0.8": default("tau0.8", noisy_flags)}
    yield

    on_clean = compare(noisy, clean, ["psnr"])
    on_noisy = compare(clean, noisy, ["psnr_noisy"])
    sampled = compare(samples["tau 0.8"], samples["tau 0"])
    yield [
        (
            "A decoder trained on noise loses PSNR on clean latents (4.3). This and the next "
            f"two rows: decoders of {size['decoder']} steps; they too have the row's seeds",
            "rFID 0.49 -> 0.57 (T15)",
            "PSNR, dB: " + cells_text(decoders, "psnr"),
            f"tau 0.8 - 0 {on_clean[1]}",
            verdict(on_clean),
        ),
        (
            "... and gains PSNR on noisy ones (sigma 0.4)",
            "",
            "PSNR, dB: " + cells_text(decoders, "psnr_noisy"),
            f"tau 0 - 0.8 {on_noisy[1]}",
            verdict(on_noisy),
        ),
        (
            "... and improves samples",
            "4.81 -> 4.28 (T5)",
            cells_text(samples),
            f"tau 0.8 - 0 {sampled[1]}",
            verdict(sampled),
        ),
    ]


def head():
    """The width of the head, with half the default's steps."""
    widths = {}
    for w in some(C, 3 * C // 4, 2 * C):
        widths[w] = cell(f"head/{w}", head=f"{w},1,4", steps=size["short"])
    narrow = cell("head/none", head="none", steps=size["short"])
    yield

    ours = widths[C]
    comparisons = {"C - none": compare(ours, narrow)}
    if 3 * C // 4 in widths:
        comparisons["C - 3/4 C"] = compare(ours, widths[3 * C // 4])
    cells = {f"no head ({mflop(BACKBONE, 'none'):.0f} MFLOP)": narrow}
    for w, paths in sorted(widths.items()):
        cells[f"head {w} ({mflop(BACKBONE, f'{w},1,4'):.0f} MFLOP)"] = paths
    rows = [
        (
            "A backbone narrower than a token needs a head, and one as wide as a token (5): C is "
            "better than none and than 3/4 C, at half the default's steps and unequal compute",
            "DiT-S 215.76, DiT^DH-S 6.07 (T2, T6); never below C: "
            "1, 2, 2.7, 3.5 C: 2.49, 2.24, 2.16, 2.22 (T17)",
            cells_text(cells),
            differences_text(comparisons),
            verdict(*comparisons.values()),
        )
    ]
    yield rows


def guidance():
    """Guidance of the default run. The guidance model is smaller and has a tenth of the steps.

    The paper's is a DiT^DH-S after 14 epochs.
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
        flags = f"--guidance-model {out}/guide/{{}}/checkpoint.pt --guidance-scale {w}"
        auto[w] = default(f"auto{w}", flags)
    yield

    better = compare(auto[1.25], plain)
    worse = compare(plain, cfg[1.5])
    behind = compare(auto[1.25], within)
    cfg = {1.0: plain} | dict(sorted(cfg.items()))
    auto = {1.0: plain} | dict(sorted(auto.items()))
    rows = [
        (
            "AutoGuidance improves samples (5.1): scale 1.25 is better than none",
            "1.51 -> 1.13 (T8, 800 epochs)",
            cells_text({f"scale {w:g}": paths for w, paths in auto.items()}),
            f"1.25 - none {better[1]}",
            verdict(better),
        ),
        (
            "CFG from the first step on makes samples worse (I): none is better than scale 1.5",
            "",
            cells_text({f"scale {w:g}": paths for w, paths in cfg.items()}),
            f"none - 1.5 {worse[1]}",
            verdict(worse),
        ),
        (
            "AutoGuidance beats CFG within an interval (I): scale 1.25 is better than CFG 1.5 for "
            "t up to 0.9; neither was tuned",
            "",
            cells_text({"AutoGuidance 1.25": auto[1.25], "CFG 1.5, t up to 0.9": within}),
            f"AutoGuidance - CFG {behind[1]}",
            verdict(behind),
        ),
    ]
    yield rows


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
    every = {f"{n} steps": paths for n, paths in sorted(cells.items())}
    rows = [
        (
            "50 Euler steps are enough (E): yes if the intervals of 50 minus 100 end below 5%",
            "50 steps in all results",
            cells_text(every),
            f"50 - 100 {text}",
            enough,
        )
    ]
    yield rows


def own_latent(name, encoder_flags):
    """A new encoder and its decoder, both with seed 0, and train_diffusion.py's flag for them."""
    shape = f"--width {C} --depth 4 --heads 4"  # as the toy encoder
    encoder_path = encoder_run(f"{name}_encoder", f"{shape} {encoder_flags}")
    path = decoder_run(f"{name}_decoder", 0, f"--encoder {encoder_path}")
    return path, f"--decoder {path}/checkpoint.pt"


def masked(patch):
    """The latents of a masked autoencoder with patches of patch x patch pixels."""
    return own_latent(f"latent/{patch}px", f"--patch {patch}")


def latent_cell(name, flag, alpha=ALPHA, batch_size=64):
    settings = dict(alpha=alpha, batch_size=batch_size, steps=size["short"])
    return cell(f"latent/{name}_{batch_size}", flag, **settings)


def encoder():
    """Latents with the same shape from different encoders; only diffusion varies with the seed."""
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
    psnr = cells_text({kind: [path] for kind, (_, path, _) in latents.items()}, "psnr")
    yield [
        (
            "The representation matters, not only its dimension (3, 6): a masked "
            "autoencoder's is better than a random encoder's and a plain autoencoder's",
            "DiT-XL: DINOv2-B 4.28, SD-VAE 7.13 (T2, T5)",
            f"{cells_text(cells)}; PSNR, dB: {psnr}",
            differences_text(others),
            verdict(*others.values()),
        )
    ]


def tokens():
    """Patches of 16, 8 and 4 px, with equal images or equal tokens per step (similar compute).

    alpha grows from the default's with the square root of the number of tokens.
    """
    equal_images = {}
    equal_tokens = {}
    decoders = {}
    for patch in (8, 16, 4)[: 1 + size["cells"]]:
        n = (32 // patch) ** 2
        path, flag = masked(patch)
        decoders[n] = [path]
        alpha = ALPHA * math.sqrt(n / TOKENS)
        equal_images[n] = latent_cell(f"{patch}px", flag, alpha)
        equal_tokens[n] = latent_cell(f"{patch}px", flag, alpha, batch_size=1024 // n)
    yield

    most = max(equal_images)
    rows = []
    for cells, what, paper in (
        (equal_images, "images per step", "512 px, guided: 256 tokens 1.61, 1,024 1.13 (T9)"),
        (equal_tokens, "tokens per step", ""),
    ):
        ordered = dict(sorted(cells.items()))
        others = {
            f"{most} - {n} tokens": compare(cells[most], cells[n]) for n in ordered if n != most
        }
        psnr = cells_text(dict(sorted(decoders.items())), "psnr")
        rows.append(
            (
                f"More tokens are better (6.1), with equal {what}: {most} against fewer",
                paper,
                cells_text({f"{n} tokens": paths for n, paths in ordered.items()})
                + f"; PSNR, dB: {psnr}",
                differences_text(others),
                verdict(*others.values()),
            )
        )
    yield rows


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


def write_table(rows, names, val_accuracy):
    """Write claims.md: what the numbers are, and the rows."""
    hours = sum(results[path]["seconds"] for path in planned if path in results) / 3600
    left_out = ", ".join(name for name in EXPERIMENTS if name not in names) or "none"
    about = (
        f"Experiments left out: {left_out}. {len(size['seeds'])} seeds, {size['num']} samples per "
        f"score, a classifier with an accuracy of {val_accuracy:.3f} on toy validation images, "
        f"{len(planned)} runs, {hours:.2f} hours in total on one core."
    )
    heading = ("claim", "the paper (ImageNet)", "here (toy world)", "differences", "shown here?")
    table = ["| " + " | ".join(row) + " |" for row in [heading, ("---",) * 5, *rows]]
    explanation = __doc__.split("\n\n", 3)[-1].strip()
    text = "\n".join([explanation, "", about, "", *table, ""])
    Path(out, "claims.md").write_text(text)
    print(f"{text}\nwrote {out}/claims.md")


def main():
    global out, size
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="one seed, far fewer steps, some cells")
    p.add_argument("--only", help="any of " + ",".join(EXPERIMENTS))
    p.add_argument("--jobs", type=int, default=min(4, os.cpu_count()), help="runs at once")
    args = p.parse_args()
    if args.quick:
        out = "out/claims/quick"
        size = QUICK
    names = args.only.split(",") if args.only else list(EXPERIMENTS)
    if not EXPERIMENTS.keys() >= set(names):
        raise UsageError(f"--only {args.only}: must be of {','.join(EXPERIMENTS)}")

    os.chdir(ROOT)
    torch.set_num_threads(1)
    Path(out).mkdir(parents=True, exist_ok=True)
    if Path(out, "claims.json").is_file():
        results.update(json.loads(Path(out, "claims.json").read_text())["runs"])
    experiments = [EXPERIMENTS[name]() for name in names]
    for experiment in experiments:
        next(experiment)
    print(f"{len(planned)} runs, {len(planned) - len(missing())} of them done", flush=True)
    judge = Judge()
    make_runs(args.jobs, judge)
    rows = [row for experiment in experiments for row in next(experiment)]
    if args.quick:
        rows = [(*row[:4], "too short") for row in rows]
    save_results(rows=rows, val_accuracy=judge.val_accuracy)
    write_table(rows, names, judge.val_accuracy)


if __name__ == "__main__":
    run_script(main)
