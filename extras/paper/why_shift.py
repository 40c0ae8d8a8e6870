"""Why the schedule is shifted: the square-root law of section 4.2, without any training.

    pip install matplotlib
    python extras/paper/why_shift.py             # 15 s -> out/why_shift.png, and the numbers

An image shows in all n numbers of its latent, while each number has its own noise. So the more
numbers, the more noise an image survives. From x_t = (1 - t) z + t eps we identify which of 1,500
images z is, and find the noise-to-data ratio t / (1 - t) at which half of them are identified. It
grows like sqrt(n), and a shift by alpha multiplies exactly this ratio by alpha. Left: n random
numbers from the tokens of the toy encoder's last two blocks. Right: the pixels of the same images
at 8, 16, 32 and 64 px.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from rae import load_encoder  # noqa: E402
from toy.world import toy_images  # noqa: E402

NUM_IMAGES = 1500
LOG_RATIOS = np.linspace(-3.2, -0.4, 29)  # log of t / (1 - t) / sqrt(n)


def pixels(side):
    return torch.from_numpy(toy_images(NUM_IMAGES, seed=0, size=side)[0]).float() / 255


@torch.no_grad()
def latents():
    """The tokens of the toy encoder's last two blocks, (B, 2 N C), in random order."""
    encoder = load_encoder("toy", 32)
    x = (pixels(32) - encoder.pixel_mean) / encoder.pixel_std  # (B, 3, 32, 32)
    blocks = encoder.vit.get_intermediate_layers(x, n=2, norm=True)  # (B, N, C) each
    x = torch.cat([block.flatten(1) for block in blocks], dim=1)  # (B, 2 N C)
    return x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))]


def fraction_identified(z, t):
    """The fraction of z (B, n), normalized, that can be identified from their x_t."""
    g = torch.Generator().manual_seed(0)
    x_t = (1 - t) * z + t * torch.randn(z.shape, generator=g)  # (B, n)
    # The most likely z_i is the nearest: p(z_i | x_t) ~ exp(-|x_t - (1 - t) z_i|^2 / (2 t^2)).
    squares = ((1 - t) * z).square().sum(1)  # (B,)
    nearest = (2 * (1 - t) * x_t @ z.T - squares).argmax(1)  # (B,)
    return (nearest == torch.arange(len(z))).float().mean().item()


latent_subsets = [latents()[:, :n] for n in (64, 256, 1024, 4096)]
images = [pixels(side).flatten(1) for side in (8, 16, 32, 64)]
pyplot.rcParams["font.size"] = 12
figure, grid = pyplot.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True, layout="constrained")
for name, sizes, (upper, lower) in zip(("latent", "image"), (latent_subsets, images), grid.T):
    constants = []
    for x, color in zip(sizes, pyplot.cm.viridis(np.linspace(0, 0.9, 4))):
        z = (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()
        n = z.shape[1]
        ratios = np.exp(LOG_RATIOS) * np.sqrt(n)  # noise to data
        times = ratios / (1 + ratios)
        fractions = np.array([fraction_identified(z, t) for t in times.tolist()])
        half = np.interp(-0.5, -fractions, times)  # the t at which half of them are identified
        constants.append(half / (1 - half) / np.sqrt(n))
        print(f"{name}, n = {n}: t = {half:.3f}, t / (1 - t) / sqrt(n) = {constants[-1]:.3f}")
        upper.plot(times, fractions, color=color, label=f"n = {n:,}")
        ratios = ratios / np.sqrt(n / sizes[0].shape[1])  # undo the shift
        lower.plot(ratios / (1 + ratios), fractions, color=color, label=f"n = {n:,}")
    off = max(abs(constants / np.mean(constants) - 1))
    print(f"{name}: the law's constant is {np.mean(constants):.3f}, each within {off:.1%} of it")
    column = {"latent": "latents", "image": "pixels"}[name]
    upper.set(title=f"{column}, as is", xlabel="t")
    base = sizes[0].shape[1]
    lower.set(title=f"{column}, after the shift", xlabel=f"t before the shift by sqrt(n / {base})")
for ax in grid.flat:
    ax.axhline(0.5, color="gray", linestyle="--", linewidth=1)
    ax.legend(loc="lower left")
    ax.tick_params(labelbottom=True)
for ax in grid[:, 0]:
    ax.set_ylabel("fraction identified")
Path("out").mkdir(exist_ok=True)
figure.savefig("out/why_shift.png", dpi=150)
