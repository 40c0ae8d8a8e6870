"""Why the schedule is shifted: the square-root law of section 4.2, shown without any training.

    pip install matplotlib                 # for the figure
    python extras/paper/why_shift.py             # 15 s -> out/why_shift.png, and the numbers

An image shows in all n numbers of its latent, while the noise is independent in each of them: the
more numbers, the more noise an image survives. So which of 1,500 images x_t = (1 - t) z + t eps was
made of can be told up to a ratio of noise to data, t / (1 - t), that grows like sqrt(n). A shift by
alpha multiplies this very ratio by alpha. Left: n numbers picked at random from the tokens of the
toy encoder's last two blocks. Right: the pixels of the same images drawn at 8, 16, 32 and 64 px.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from rae import build_encoder  # noqa: E402
from toy.world import toy_images  # noqa: E402

try:
    from matplotlib import pyplot
except ImportError:
    sys.exit("error: the figure needs matplotlib: pip install matplotlib")

NUM_IMAGES = 1500
LOG_RATIOS = np.linspace(-3.2, -0.4, 29)  # log of t / (1 - t) / sqrt(n)


def pixels(side):
    return torch.from_numpy(toy_images(NUM_IMAGES, seed=0, size=side)[0]).float() / 255


@torch.no_grad()
def latents():
    """The tokens of the toy encoder's last two blocks, (B, 2 N C), in a random order."""
    encoder = build_encoder("toy", 32)
    x = (pixels(32) - encoder.pixel_mean) / encoder.pixel_std  # (B, 3, 32, 32)
    blocks = encoder.vit.get_intermediate_layers(x, n=2, norm=True)  # (B, N, C) each
    x = torch.cat([block.flatten(1) for block in blocks], dim=1)  # (B, 2 N C)
    return x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))]


def share_told(z, t):
    """The share of z (B, n), of mean 0 and variance 1, that are told from each other at time t."""
    g = torch.Generator().manual_seed(0)
    x_t = (1 - t) * z + t * torch.randn(z.shape, generator=g)  # (B, n)
    # The likeliest is the nearest: p(z_i | x_t) falls with |x_t - (1 - t) z_i|^2 / (2 t^2).
    squares = ((1 - t) * z).square().sum(1)  # (B,)
    likeliest = (2 * (1 - t) * x_t @ z.T - squares).argmax(1)  # (B,)
    return (likeliest == torch.arange(len(z))).float().mean().item()


picked = [latents()[:, :n] for n in (64, 256, 1024, 4096)]
drawn = [pixels(side).flatten(1) for side in (8, 16, 32, 64)]
figure, grid = pyplot.subplots(2, 2, figsize=(9, 6), sharey=True, layout="constrained")
for name, sizes, (upper, lower) in zip(("latent", "picture"), (picked, drawn), grid.T):
    constants = []
    for x in sizes:
        z = (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()
        n = z.shape[1]
        ratios = np.exp(LOG_RATIOS) * np.sqrt(n)  # of noise to data
        times = ratios / (1 + ratios)
        told = np.array([share_told(z, t) for t in times.tolist()])
        half = np.interp(-0.5, -told, times)  # the time at which half of the images are told
        constants.append(half / (1 - half) / np.sqrt(n))
        print(f"{name}, n = {n}: t = {half:.3f}, t / (1 - t) / sqrt(n) = {constants[-1]:.3f}")
        upper.plot(times, told, label=f"{n}")
        ratios = ratios / np.sqrt(n / sizes[0].shape[1])  # the shift undone
        lower.plot(ratios / (1 + ratios), told)
    off = max(abs(constants / np.mean(constants) - 1))
    print(f"{name}: the law's constant is {np.mean(constants):.3f}, each within {off:.1%} of it")
    upper.set(title=f"n numbers of a {name}", xlabel="t", ylabel=f"told among {NUM_IMAGES}")
    upper.legend()
    lower.set(xlabel=f"t before a shift by sqrt(n / {sizes[0].shape[1]})", ylabel="the same")
Path("out").mkdir(exist_ok=True)
figure.savefig("out/why_shift.png", dpi=100)
