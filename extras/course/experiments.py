"""The course's experiments: a function that measures, and a figure to hand in.

    pip install matplotlib
    python extras/course/experiments.py theorem_1  # 10 minutes of a laptop -> figures/theorem_1.png
    python extras/course/experiments.py shift_sweep  # 10 minutes
    python extras/course/experiments.py noise_sweep  # 6 minutes

What stands below the three functions draws their results, and is not to be changed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from dit_dh import DiTDH, flow_loss  # noqa: E402
from rae import load_rae  # noqa: E402
from toy.world import ToyShapes  # noqa: E402


def theorem_1(widths, head=None, steps=1000):
    """Theorem 1 on one image: {width: loss} of plain DiTs, the mean loss of the last 200 steps.

    The data is one latent: that of the toy's first validation image, in [0, 1] (load_rae("toy"),
    its encode). For each width make a DiTDH with a backbone (width, 4, 4), the wide_head `head`,
    and 10 classes. Train it with AdamW at a constant rate of 4e-3 and its other defaults. A step
    has 32 copies of the latent, the null label (10), times torch.rand(32), fresh noise, and no
    shift (alpha 1). Seed torch with 0 before each model.
    """
    rae = load_rae("toy")
    image = torch.from_numpy(ToyShapes("val").images[:1]).float() / 255
    with torch.no_grad():
        z = rae.encode(image).expand(32, -1, -1)  # (32, N, C)
    y = torch.full((32,), 10)
    result = {}
    for width in widths:
        torch.manual_seed(0)
        model = DiTDH(z.shape[2], rae.encoder.grid_size, (width, 4, 4), head, 10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        losses = []
        for _ in range(steps):
            loss = flow_loss(model, z, y, 1.0, torch.rand(32)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        last = losses[-200:]
        result[width] = sum(last) / len(last)
    return result


def run(*command):
    """What a script prints; it stops with the script's line if that fails."""
    words = [str(word) for word in command]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip()[-300:])
    return done.stdout


def fresh(out):
    """The folder's name, after what an earlier measurement left there is gone."""
    shutil.rmtree(ROOT / out, ignore_errors=True)
    Path(ROOT, f"{out}.npz").unlink(missing_ok=True)
    return out


def shift_sweep(alphas, steps=500, num=500):
    """{alpha: Frechet distance} of models trained with these schedule shifts.

    With `run` above, for each alpha: train_diffusion.py with so many --steps, --hold steps // 2,
    and an --out of its own, `fresh`; sample.py with --num and --cfg-scale 1, to OUT.npz; fid.py
    --json, of that against the toy: "Frechet distance" is the number. All with their defaults
    otherwise.
    """
    result = {}
    for alpha in alphas:
        out = fresh(f"out/alpha_{alpha:g}")
        flags = ("--alpha", alpha, "--steps", steps, "--hold", steps // 2, "--out", out)
        run("train_diffusion.py", *flags)
        flags = ("--ckpt", f"{out}/checkpoint.pt", "--num", num, "--cfg-scale", 1)
        run("sample.py", *flags, "--out", f"{out}.npz")
        result[alpha] = json.loads(run("fid.py", f"{out}.npz", "toy", "--json"))["Frechet distance"]
    return result


def noise_sweep(taus, sigmas, steps=300, num=500):
    """{tau: {sigma: PSNR in dB}} of decoders trained with these taus, from noisy latents.

    With `run` above, for each tau: train_decoder.py with --noise-tau, --gan 0, so many --steps and
    an --out of its own, `fresh`. Then for each sigma train_decoder.py --eval-only with the same
    --out, that --eval-sigma and num as --eval-num. Its last line is JSON: psnr_noisy is the number.
    All with their defaults otherwise.
    """
    result = {}
    for tau in taus:
        out = fresh(f"out/tau_{tau:g}")
        run("train_decoder.py", "--noise-tau", tau, "--gan", 0, "--steps", steps, "--out", out)
        result[tau] = {}
        for sigma in sigmas:
            flags = ("--ckpt", f"{out}/checkpoint.pt", "--eval-sigma", sigma, "--eval-num", num)
            said = run("train_decoder.py", "--eval-only", *flags, "--out", out)
            result[tau][sigma] = json.loads(said.splitlines()[-1])["psnr_noisy"]
    return result


# ---------------------------------------------------------------------------------------------
# The figures


def figure_of_theorem_1():
    points = theorem_1([16, 32, 64, 96, 128])
    (wide,) = theorem_1([16], head=(128, 1, 4)).values()
    bound = {width: max(1 - width / 128, 0) for width in points}
    lines = {"bound of Theorem 1": bound, "DiT": points, "DiT of 16 with a head of 128": {16: wide}}
    return lines, "width d", "loss on one image, C = 128"


def figure_of_shift_sweep():
    return {"": shift_sweep([1, 2, 4, 8, 16])}, "alpha", "Frechet distance"


def figure_of_noise_sweep():
    results = noise_sweep([0, 0.8], [0, 0.2, 0.4, 0.8])
    return {f"tau {tau:g}": line for tau, line in results.items()}, "sigma", "PSNR, dB"


FIGURES = {
    "theorem_1": figure_of_theorem_1,
    "shift_sweep": figure_of_shift_sweep,
    "noise_sweep": figure_of_noise_sweep,
}


def main():
    from matplotlib import pyplot

    if len(sys.argv) != 2 or sys.argv[1] not in FIGURES:
        sys.exit(f"error: name one of {', '.join(FIGURES)}")
    name = sys.argv[1]
    lines, x_label, y_label = FIGURES[name]()
    for label, line in lines.items():
        pyplot.plot(list(line), list(line.values()), marker="o", label=label)
        print(label, {x: round(y, 4) for x, y in line.items()})
    pyplot.xlabel(x_label)
    pyplot.ylabel(y_label)
    if len(lines) > 1:
        pyplot.legend()
    path = ROOT / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    pyplot.savefig(path, dpi=100)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
