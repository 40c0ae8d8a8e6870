"""Draw method.png: one toy image on its way through encoder, noise, DiT^DH and decoder.

    pip install matplotlib
    python train_diffusion.py && python extras/paper/method.py       # -> out/method.png

All images and latents are computed by the toy RAE and the default run.
"""

import sys
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from rae import load_rae, seeded_noise  # noqa: E402
from sample import load_model  # noqa: E402
from toy.world import ToyShapes  # noqa: E402

STAR = 4
T = 0.7
BLUE = "#dbe7f5"  # frozen
ORANGE = "#fbe3cf"  # trained


def picture(axes, content, left, bottom, size, title):
    """Show an image (H, W, 3) or a latent (N, C) as an inset."""
    inset = axes.inset_axes((left, bottom, *size), transform=axes.transData)
    if content.ndim == 3:
        inset.imshow(content.clamp(0, 1), interpolation="nearest")
    else:
        inset.imshow(content, aspect="auto", cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest")
    inset.set_xticks([])
    inset.set_yticks([])
    inset.set_title(title, fontsize=8)


def box(axes, left, bottom, size, text, color):
    patch = FancyBboxPatch((left, bottom), *size, boxstyle="round,pad=0.05", fc=color, ec="gray")
    axes.add_patch(patch)
    center = (left + size[0] / 2, bottom + size[1] / 2)
    axes.text(*center, text, ha="center", va="center", fontsize=8)


def arrow(axes, start, end):
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="->", color="gray"))


@torch.no_grad()
def main():
    rae = load_rae("toy")
    model, _, _ = load_model("out/diffusion/checkpoint.pt")
    toy = ToyShapes("val")
    index = toy.labels.tolist().index(STAR)
    image = torch.from_numpy(toy.images[index])[None].float() / 255  # (1, 3, 32, 32)
    z = rae.encode(image)  # (1, N, C)
    eps = seeded_noise([("method", 0)], z.shape[1:], z.device)  # (1, N, C)
    x_t = (1 - T) * z + T * eps  # (1, N, C)
    v = model(x_t, torch.tensor([T]), torch.tensor([STAR]))  # (1, N, C)
    guess = x_t - T * v  # (1, N, C), where the velocity points to
    decoded = rae.decode(guess)  # (1, 3, 32, 32)

    figure, axes = pyplot.subplots(figsize=(11, 3.6))
    axes.set_xlim(0, 22.2)
    axes.set_ylim(0, 7.2)
    axes.axis("off")
    n, c = z.shape[1:]
    shape = f"{n} x {c}"
    picture(axes, image[0].permute(1, 2, 0), 0.1, 3.9, (2, 2), "image, 32 x 32")
    box(axes, 2.7, 4.3, (1.9, 1.2), "encoder\n(frozen ViT)", BLUE)
    picture(axes, z[0], 5.2, 3.9, (2.6, 2), f"z: {shape}")
    picture(axes, eps[0], 5.2, 0.6, (2.6, 2), f"eps: {shape}")
    picture(axes, x_t[0], 8.8, 2.3, (2.6, 2), f"x_t = (1 - t) z + t eps\nat t = {T} (shifted)")
    backbone = "backbone\n8 blocks x 64\ndeep, narrow"
    head = "head\n1 block x 128\nshallow, as wide\nas a token"
    box(axes, 12, 4.2, (2.4, 1.6), backbone, ORANGE)
    box(axes, 12, 0.9, (2.4, 2), head, ORANGE)
    axes.text(13.2, 6.3, "t, label y", ha="center", fontsize=8)
    picture(axes, v[0], 15, 0.9, (2.6, 2), "velocity v, about eps - z")
    picture(axes, guess[0], 15, 3.9, (2.6, 2), "x_t - t v, a guess at z")
    box(axes, 17.95, 4.2, (1.75, 1.4), "decoder\n(ViT, trained\nwith noise)", ORANGE)
    picture(axes, decoded[0].permute(1, 2, 0), 20.1, 3.9, (2, 2), "image")
    for start, end in (
        ((2.1, 4.9), (2.65, 4.9)),
        ((4.65, 4.9), (5.2, 4.9)),
        ((7.8, 4.9), (8.75, 3.9)),
        ((7.8, 1.6), (8.75, 2.7)),
        ((11.4, 3.8), (11.95, 4.6)),
        ((11.4, 2.8), (11.95, 2.2)),
        ((13.2, 6.2), (13.2, 5.9)),
        ((13.2, 4.1), (13.2, 3)),
        ((14.5, 1.9), (15, 1.9)),
        ((16.3, 3.4), (16.3, 3.85)),
        ((17.6, 4.9), (17.9, 4.9)),
        ((19.75, 4.9), (20.1, 4.9)),
    ):
        arrow(axes, start, end)
    figure.savefig("out/method.png", dpi=110, bbox_inches="tight")
    print("wrote out/method.png")


if __name__ == "__main__":
    main()
