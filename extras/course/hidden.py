"""Hidden tests: what the functions of the exercises give on inputs that follow from a nonce.

    python extras/course/hidden.py OUT NONCE TITLE...

This writes the outputs of the functions in this file's tree to OUT, an array per file. The grader
runs it on our files, and for each exercise on a copy with the submitted functions, and compares.
Where a function draws random numbers, a student may draw them differently, so moments are compared.
"""

import importlib
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
NONCE = 0  # the grader draws a new one every time, so nobody can know the outputs beforehand


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * NONCE + seed))


def small_model(m, wide_head=(24, 1, 2)):
    """A DiTDH of module m with nonzero weights."""
    model = m.DiTDH(10, 3, (8, 2, 2), wide_head, num_classes=4)
    for i, p in enumerate(model.parameters()):
        p.data = 0.3 * normal(i, *p.shape)
    return model


class Images(torch.utils.data.Dataset):
    """Eleven images for latent_statistics."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return np.random.default_rng([NONCE, index]).integers(256, size=(3, 8, 8), dtype=np.uint8)


class Patches(torch.nn.Module):
    """An encoder of 2 x 2 tokens of two pixels each, scaled differently at every position."""

    grid_size = 2
    latent_dim = 2

    def forward(self, images):
        tokens = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)  # (B, 4, 48)
        return tokens[..., :2] * torch.arange(1, 5)[:, None]


def statistics(m):
    return m.latent_statistics(Patches(), Images(), 4, torch.device("cpu"))


def repeated(draw):
    """Draws of two generators with the same seed, (2, 9)."""
    return torch.stack([draw(torch.Generator().manual_seed(NONCE)) for _ in range(2)])


def times(m):
    return m.draw_time(100000), m.draw_time(100000, "uniform")


def repeated_times(m):
    return tuple(
        repeated(lambda g: m.draw_time(9, dist, g)) for dist in ("logit-normal", "uniform")
    )


def losses(m):
    def model(x_t, t, y):
        return (x_t @ normal(3, 10, 10)).tanh() + t[:, None, None] + y[:, None, None]

    t = torch.rand(6, generator=torch.Generator().manual_seed(NONCE))
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    return (m.flow_loss(model, normal(1, 6, 9, 10), y, 1.7, t, normal(2, 6, 9, 10)),)


def velocities(m):
    x = normal(3, 5, 9, 10)
    t = torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0])
    y = torch.tensor([4, 1, 0, 3, 2])
    return small_model(m)(x, t, y), small_model(m, None)(x, t, y)


def rotations(m):
    return m.RoPE2d(12, 4)(normal(4, 2, 3, 16, 12)), m.RoPE2d(4, 2)(normal(5, 4, 4))


def shifts(m):
    rng = random.Random(NONCE)
    sizes = [(16, 16), *((rng.randint(64, 1024), rng.randint(64, 1024)) for _ in range(3))]
    t = torch.linspace(0, 1, 9)
    shifted = [m.shift_time(t, rng.uniform(low, high)) for low, high in ((0.2, 0.8), (2, 9))]
    grids = [m.time_grid(steps, rng.uniform(1, 9), t_last) for steps, t_last in ((3, 0), (7, 0.2))]
    return torch.tensor([m.shift_alpha(*size) for size in sizes]), *shifted, *grids


def average(m):
    ema = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 5))
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 5))
    for i, p in enumerate([*ema.parameters(), *model.parameters()]):
        p.data = normal(i, *p.shape)
    for step in (0, 3, 500, 10**5):
        m.update_ema(ema, model, 0.97, step)
    return tuple(p.detach() for p in ema.parameters())


def samples(m):
    model = small_model(m)
    weak = small_model(m, None)
    x = normal(6, 3, 9, 10)
    y = torch.tensor([1, 4, 2])
    t = torch.tensor([1.0, 0.9, 0.55, 0.3, 0.0])
    return (
        m.sample(model, x, y, t),
        m.sample(model, x, y, t, cfg_scale=2.5),
        m.sample(model, x, y, t, cfg_scale=0.5, interval=(0.3, 0.6)),
        m.sample(model, x, y, t, guidance_model=weak, guidance_scale=3.0, interval=(0.2, 1.0)),
    )


def distances(m):
    rng = np.random.default_rng(NONCE)
    result = []
    for n, d in ((50, 3), (6, 30), (200, 20)):
        a = m.mean_and_covariance(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)))
        b = m.mean_and_covariance(rng.normal(size=(n, d)) * 0.5 + 1)
        result.append(m.frechet_distance(*a, *b))
    return (torch.tensor(result, dtype=torch.float64),)


def noise_levels(m):
    tau = random.Random(NONCE).uniform(0.3, 0.8)
    return m.draw_sigma(100000, tau), m.draw_sigma(100000, tau, "half-normal")


def repeated_noise_levels(m):
    return tuple(
        repeated(lambda g: m.draw_sigma(9, 0.5, dist, g)) for dist in ("uniform", "half-normal")
    )


def noisy_tokens(m):
    return (m.add_noise(normal(7, 3, 4, 2), normal(9, 3).abs(), normal(8, 3, 4, 2)),)


def weights(m):
    pairs = ((normal(1, 5, 7), normal(2, 5, 7)), (normal(3, 4), 1e-5 * normal(4, 4)))
    return tuple(torch.as_tensor(m.adaptive_weight(a, b)) for a, b in pairs)


def theorem(m):
    rng = random.Random(NONCE)
    steps = rng.randint(50, 70)
    (loss,) = m.theorem_1([rng.choice([48, 64, 80])], steps=steps).values()
    (wide,) = m.theorem_1([16], head=(128, 1, 4), steps=steps).values()
    return (torch.tensor([loss, wide]),)


MADE = {}  # checkpoint or samples: how fake_run made them


def fake_run(script, *words):
    """In place of `run`: results that depend on the nonce and on all flags, without training."""
    words = [str(word) for word in words]
    if script == "fid.py":
        rng = random.Random(str([MADE[words[0]], words[1:]]))
        return f"cpu x 1, fp32\nFrechet distance {rng.random():.4f}  (30 samples)\n"
    flags = dict(zip(words[::2], words[1::2]))
    out = flags.pop("--out")
    values = sorted((flag, MADE.get(word) or float(word)) for flag, word in flags.items())
    made = str([NONCE, script, values])
    MADE[f"{out}/checkpoint.pt"] = MADE[f"{out}.npz"] = made
    if script == "train_decoder.py":
        rng = random.Random(made)
        lines = [{"psnr": rng.random(), "psnr_noisy": rng.random()} for _ in range(3)]
        (ROOT / out).mkdir(parents=True)
        (ROOT / out / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return ""


def distances_of_shifts(m):
    m.run = fake_run
    rng = random.Random(NONCE)
    alphas = rng.sample(range(1, 9), 2)
    result = m.shift_sweep(alphas, steps=rng.randint(4, 99), num=rng.randint(20, 99))
    return (torch.tensor(sorted(result.items())),)


def psnrs_of_noise(m):
    m.run = fake_run
    rng = random.Random(NONCE)
    taus = [0, rng.uniform(0.1, 0.9)]
    flags = {"steps": rng.randint(4, 99), "num": rng.randint(20, 99)}
    result = m.noise_sweep(taus, rng.uniform(0.1, 0.9), **flags)
    return (torch.tensor(sorted((tau, *psnrs) for tau, psnrs in result.items())),)


def moments(x):
    """Mean, deviation and neighbors' correlation of many draws (n,)."""
    return [x.mean(), x.std(), (x[::2] * x[1::2]).mean()]


def moments_and_maximum(x):
    return [*moments(x), x.max()]


def repeats(x):
    """Whether two rows of draws are equal, and how many different draws there are."""
    return [np.array_equal(x[0], x[1]), len(np.unique(x))]


# title: [(file, function of its module, what to compare of an output, tolerance)]
CASES = {
    "Latent statistics": [("train_decoder", statistics, np.array, 1e-4)],
    "Schedule shift": [("dit_dh", shifts, np.array, 1e-4)],
    "Time and flow loss": [
        ("dit_dh", times, moments_and_maximum, 0.03),
        ("dit_dh", repeated_times, repeats, 0),
        ("dit_dh", losses, np.array, 1e-4),
    ],
    "Rotary positions": [("dit_dh", rotations, np.array, 1e-4)],
    "DiT^DH": [("dit_dh", velocities, np.array, 1e-4)],
    "Theorem 1": [("experiments", theorem, np.array, 0.05)],
    "EMA": [("rae", average, np.array, 1e-4)],
    "Sampling and guidance": [("dit_dh", samples, np.array, 1e-4)],
    "Frechet distance": [("fid", distances, np.array, 1e-4)],
    "Sweep of the shift": [("experiments", distances_of_shifts, np.array, 1e-4)],
    "Noise and the adaptive GAN weight": [
        ("train_decoder", noise_levels, moments, 0.02),
        ("train_decoder", repeated_noise_levels, repeats, 0),
        ("train_decoder", noisy_tokens, np.array, 1e-4),
        ("train_decoder", weights, np.array, 1e-4),
    ],
    "Sweep of the noise": [("experiments", psnrs_of_noise, np.array, 1e-4)],
}


def difference(title, folder, ours):
    """Compare the outputs in a folder with our {file: bytes}: None if equal, else what differs.

    The files may hold anything: they are parsed only if they begin like ours, with type and shape.
    """
    for _, case, compared, tolerance in CASES[title]:
        for name in (name for name in ours if name.startswith(f"{case.__name__}-")):
            our = np.load(io.BytesIO(ours[name]))
            if not (folder / name).is_file():
                return f"{case.__name__}: no result"
            with open(folder / name, "rb") as file:
                data = file.read(len(ours[name]) + 1)
            if len(data) != len(ours[name]) or data[: -our.nbytes] != ours[name][: -our.nbytes]:
                return f"{case.__name__}: not of the shape that our code gives"
            their = np.load(io.BytesIO(data))
            if not np.allclose(compared(their), compared(our), rtol=1e-3, atol=tolerance):
                return f"{case.__name__}: not what our code gives"
    return None


def main():
    global NONCE
    out, NONCE, titles = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    sys.path[:0] = [str(ROOT), str(ROOT / "extras/course")]
    for title in titles:
        for module, case, _, _ in CASES[title]:
            torch.manual_seed(NONCE)
            for i, output in enumerate(case(importlib.import_module(module))):
                np.save(out / f"{case.__name__}-{i}.npy", output.detach().double().contiguous())


if __name__ == "__main__":
    main()
