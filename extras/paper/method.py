"""Draw method.png: train the decoder, train the diffusion model, sample.

    pip install matplotlib
    python train_diffusion.py && python extras/paper/method.py       # -> out/method.png

The toy RAE and the default run compute all images and latents. A latent is shown as three principal
components of its tokens, in red, green and blue, and every latent gets the same contrast.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dit_dh import sample, time_grid  # noqa: E402
from rae import load_rae, seeded_noise  # noqa: E402
from sample import load_model  # noqa: E402
from toy.world import ToyShapes  # noqa: E402

FROZEN, TRAINED, GRAY = "#bcd6f2", "#f9c58d", "dimgray"
ARROW = dict(arrowstyle="->", color=GRAY, lw=1.5, shrinkA=0, shrinkB=0)


def arrow(*points):
    axes.plot(*zip(*points), color=GRAY, lw=1.5, zorder=1)  # under the boxes drawn after it
    axes.annotate("", points[-1], points[-2], arrowprops=ARROW, zorder=1)


def box(x, y, width, height, color, text=""):
    """A box at left x and center y."""
    axes.bar(x, height, width, y - height / 2, fc=color, ec=GRAY, align="edge")
    write(x + width / 2, y, text)


def picture(x, y, content, title, title_y=6):
    """An image (1, 3, H, W) or a latent (1, N, C), at left x and center y."""
    if content.ndim == 4:
        content = content[0].permute(1, 2, 0)  # (H, W, 3)
    else:
        content = (content[0] @ directions).unflatten(0, (4, 4))  # (4, 4, 3)
        content = 0.5 + 0.25 * content / content.square().mean().sqrt()
    axes.imshow(content.clamp(0, 1), extent=(x, x + 9, y - 4.5, y + 4.5), aspect="auto")
    write(x + 4.5, y + title_y, title)


def dit_dh(x, y, color):
    """Eight narrow blocks and a wide one, which also sees their input."""
    box(x, y, 25, 14, "white")
    arrow((x - 5, y), (x + 20.8, y))
    arrow((x + 2, y), (x + 2, y - 5), (x + 20.8, y - 5))
    for i in range(8):
        box(x + 4 + 1.3 * i, y, 0.9, 6, color)
    box(x + 21, y, 2, 12, color)
    arrow((x + 9, y + 9), (x + 9, y + 7))
    write(x + 9, y + 10, "t, label y")
    write(x + 22, y + 8.6, r"DiT$^{\mathrm{DH}}$")


torch.set_grad_enabled(False)
rae = load_rae("toy")
model, settings, _ = load_model("out/diffusion/checkpoint.pt")
images = torch.from_numpy(ToyShapes("val").images[:500]).float() / 255  # (500, 3, 32, 32)
latents = rae.encode(images)  # (500, N, C)
directions = torch.linalg.svd(latents.flatten(0, 1), full_matrices=False).Vh[:3].T  # (C, 3)
image, z, heart = images[6:7], latents[6:7], torch.tensor([6])  # a heart
eps = seeded_noise([("method", 0)], z.shape[1:], z.device)  # (1, N, C)
noisy = z + 0.5 * eps / rae.latent_std  # tokens + 0.5 eps, normalized
x_t = 0.2 * z + 0.8 * eps  # t = 0.8
start = seeded_noise([("sample", 0, 26)], z.shape[1:], z.device)  # image 26 of sample.py
new = sample(model, start, heart, time_grid(50, settings["alpha"]), cfg_scale=1.5)

pyplot.rcParams["font.size"] = 13
pyplot.figure(figsize=(10, 8))
axes = pyplot.axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 80), frame_on=False)
axes.hlines((25.7, 59.3), 2, 98, color="lightgray", lw=1)
write = partial(axes.text, ha="center", va="center")
for x, text, color in ((69, "frozen", FROZEN), (86, "trained", TRAINED)):
    box(x, 78, 3, 2, color)
    axes.text(x + 4, 77.3, text)
for y, title in ((68.5, "tokens"), (46.5, "latent z")):
    picture(2, y, image, "image")
    arrow((11, y), (27, y))
    box(14, y, 10, 7, FROZEN, "encoder")
    picture(27, y, z, title)
for y, latent, color in ((68.5, noisy, TRAINED), (12, new, FROZEN)):
    picture(51, y, latent, "noisy tokens" if latent is noisy else "latent, t = 0")
    arrow((60, y), (88, y))
    box(67, y, 10, 7, color, "decoder")
    picture(88, y, rae.decode(latent), "reconstruction" if latent is noisy else "new image")

axes.text(2, 77.3, "1. Train the decoder", weight="bold")
arrow((36, 68.5), (51, 68.5))
write(43, 70, "+ noise")
arrow((48, 61.5), (6.5, 61.5), (6.5, 64))
arrow((48, 61.5), (92.5, 61.5), (92.5, 64))
write(48, 61.5, "loss: L1 + perceptual + GAN", backgroundcolor="white")

axes.text(2, 56.3, "2. Train the diffusion model", weight="bold")
picture(27, 34.5, eps, "noise eps", title_y=-6.2)
arrow((36, 46.5), (43, 42.5))
arrow((36, 34.5), (43, 38.5))
picture(43, 40.5, x_t, "x_t =\n(1 - t) z + t eps", title_y=7)
dit_dh(57, 40.5, TRAINED)
write(65, 30.5, "backbone:\ndeep, narrow")
write(80, 30.5, "head:\nshallow, wide")
arrow((82, 43), (88, 46))
picture(88, 46.5, model(x_t, torch.tensor([0.8]), heart), "velocity v")
picture(88, 34.5, eps - z, "eps - z", title_y=-6.2)
write(92.5, 40.5, "loss ↕")

axes.text(2, 22.3, "3. Sample", weight="bold")
picture(2, 12, start, "noise, t = 1")
arrow((11, 12), (51, 12))
dit_dh(20, 12, FROZEN)
arrow((48, 12), (48, 2), (15, 2), (15, 12))
write(31.5, 2, "50 small steps: x ← x - v dt", backgroundcolor="white")
pyplot.savefig("out/method.png", dpi=180)
