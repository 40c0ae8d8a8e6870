"""The course's experiments: three functions that measure, and a figure of each to hand in.

    pip install matplotlib
    python extras/course/experiments.py theorem_1  # 10 minutes on a laptop -> figures/theorem_1.png
    python extras/course/experiments.py shift_sweep  # 10 minutes
    python extras/course/experiments.py noise_sweep  # 7 minutes

Leave what is below the three functions, which draws their results, as it is.
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
from rae import UsageError, load_rae, run_script  # noqa: E402
from toy.world import ToyShapes  # noqa: E402


def theorem_1(widths, head=None, steps=1000):
    """Theorem 1 on one image: {width: loss} of plain DiTs, averaged over the last 200 steps.

    The data is a single latent: encode the toy's first validation image, in [0, 1], with
    load_rae("toy"). For each width, seed torch with 0 and build a DiTDH with a backbone
    (width, 4, 4), the wide_head `head` and 10 classes. Train it with AdamW at a constant learning
    rate of 4e-3, its other arguments at their defaults. Each step takes 32 copies of the latent,
    the null label (10), times torch.rand(32), new noise and no shift (alpha 1).
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
    """Run a script and return what it prints; exit with its error if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip()[-300:])
    return done.stdout


def fresh(out):
    """Delete a folder of an earlier measurement, if there is one, and return its name."""
    shutil.rmtree(ROOT / out, ignore_errors=True)
    return out


def shift_sweep(alphas, steps=500, num=500):
    """{alpha: Frechet distance} of models trained with these schedule shifts.

    Use `run` above. For each alpha, run train_diffusion.py with that --alpha, --steps, --hold
    steps // 2 and its own --out, from `fresh`. Then run sample.py on its checkpoint with --num,
    --cfg-scale 1 and --out OUT/samples, and fid.py on OUT/samples.npz against the toy: it prints
    "Frechet distance 1.2345  (...)". Every other flag keeps its default.
    """
    result = {}
    for alpha in alphas:
        out = fresh(f"out/alpha_{alpha:g}")
        flags = ("--alpha", alpha, "--steps", steps, "--hold", steps // 2, "--out", out)
        run("train_diffusion.py", *flags)
        flags = ("--ckpt", f"{out}/checkpoint.pt", "--num", num, "--cfg-scale", 1)
        run("sample.py", *flags, "--out", f"{out}/samples")
        printed = run("fid.py", f"{out}/samples.npz", "toy")
        result[alpha] = float(printed.split("Frechet distance")[1].split()[0])
    return result


def noise_sweep(taus, sigma=0.4, steps=300, num=500):
    """{tau: (PSNR, noisy PSNR)} in dB of decoders trained with these taus.

    Use `run` above. For each tau, run train_decoder.py with that --noise-tau, --disc-weight 0,
    --eval-sigma sigma, --eval-num num, --steps and its own --out, from `fresh`. The last line of
    OUT/log.jsonl, below ROOT, is JSON: psnr is that of reconstructions from clean tokens,
    psnr_noisy from tokens with noise of level sigma. Every other flag keeps its default.
    """
    result = {}
    for tau in taus:
        out = fresh(f"out/tau_{tau:g}")
        flags = ("--noise-tau", tau, "--disc-weight", 0, "--eval-sigma", sigma, "--eval-num", num)
        run("train_decoder.py", *flags, "--steps", steps, "--out", out)
        last = json.loads((ROOT / out / "log.jsonl").read_text().splitlines()[-1])
        result[tau] = (last["psnr"], last["psnr_noisy"])
    return result


# ---------------------------------------------------------------------------------------------
# The figures


def figure_of_theorem_1():
    points = theorem_1([16, 32, 64, 96, 128])
    (wide,) = theorem_1([16], head=(128, 1, 4)).values()
    bound = {width: max(1 - width / 128, 0) for width in points}
    lines = {"bound of Theorem 1": bound, "DiT": points, "DiT 16 with a head of 128": {16: wide}}
    return lines, "width d", "loss on one image, C = 128"


def figure_of_shift_sweep():
    return {"": shift_sweep([1, 2, 4, 8, 16])}, "alpha", "Frechet distance"


def figure_of_noise_sweep():
    results = noise_sweep([0, 0.2, 0.4, 0.8, 1.6])
    clean = {tau: psnr for tau, (psnr, _) in results.items()}
    noisy = {tau: psnr for tau, (_, psnr) in results.items()}
    return {"clean tokens": clean, "noisy tokens, sigma 0.4": noisy}, "tau", "PSNR, dB"


FIGURES = {
    "theorem_1": figure_of_theorem_1,
    "shift_sweep": figure_of_shift_sweep,
    "noise_sweep": figure_of_noise_sweep,
}


def main():
    if len(sys.argv) != 2 or sys.argv[1] not in FIGURES:
        raise UsageError(f"name one of {', '.join(FIGURES)}")
    from matplotlib import pyplot

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
    run_script(main)
