# %% [markdown]
# # Representation Autoencoders, live
#
# What the three ideas of RAE ([paper](https://arxiv.org/abs/2510.11690)) do, on this repository's
# toy data, in about five minutes on two CPU cores. Run it from top to bottom, then change
# something. In a hosted notebook, clone the repository and `%cd` into it first.
#
# Most parts end with the [course](../docs/course.md) exercises in which you write that code.

# %%
import os

if not os.path.exists("rae.py"):
    os.chdir("..")  # this notebook is in extras/
# %pip install -q -r requirements.txt matplotlib ipywidgets

# %%
import copy
import sys

import ipywidgets
import torch
from IPython.display import clear_output, display
from matplotlib import pyplot

sys.path.insert(0, os.getcwd())
from dit_dh import DiTDH, draw_time, flow_loss, sample, shift_time, time_grid
from fid import psnr
from rae import load_rae, update_ema
from sample import to_uint8
from toy.world import ToyShapes, toy_images

torch.manual_seed(0)
pyplot.rcParams["figure.dpi"] = 72


def show(images, columns=8, width=8.0, titles=()):
    """Draw images (B, 3, H, W) in [0, 1], row by row."""
    rows = -(-len(images) // columns)
    size = (width, width * rows / columns + 0.3 * bool(titles))
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image in zip(axes.flat, to_uint8(images)):
        ax.imshow(image.permute(1, 2, 0), interpolation="nearest")
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    display(figure)
    pyplot.close(figure)


# %% [markdown]
# ## 1. An image, its latent, and back
#
# A frozen encoder turns an image of 32 x 32 pixels into 16 tokens of 128 channels. Normalized to
# mean 0 and variance 1 per channel and position, these are the latent z. A decoder reconstructs the
# image from it. Top row: images. Middle: their tokens, with three principal components as colors: a
# token tells what is there rather than how each pixel looks. Bottom: reconstructions.

# %%
rae = load_rae("toy")
val = ToyShapes("val")
images = torch.from_numpy(val.images[:8]).float() / 255  # (8, 3, 32, 32)
z = rae.encode(images)  # (8, 16, 128)
reconstructions = rae.decode(z).clamp(0, 1)  # (8, 3, 32, 32)

many = rae.encode(torch.from_numpy(val.images[:500]).float() / 255).flatten(0, 1)  # (8000, 128)
_, _, directions = torch.pca_lowrank(many, q=3)  # (128, 3)
colors = 0.5 + 0.08 * z @ directions  # (8, 16, 3)
colors = colors.transpose(1, 2).unflatten(2, (4, 4)).clamp(0, 1)  # (8, 3, 4, 4)
tokens = torch.nn.functional.interpolate(colors, size=(32, 32))  # (8, 3, 32, 32)
show(torch.cat([images, tokens, reconstructions]))
print(f"latents {tuple(z.shape)}, mean {many.mean():.2f}, variance {many.var():.2f}")
print(f"reconstructions: PSNR {psnr(reconstructions, images).mean():.1f} dB")

# %% [markdown]
# @exercise 1

# %% [markdown]
# ## 2. A decoder that is robust to noise
#
# Sampled latents are imperfect, so the decoder was trained on noisy tokens, tokens + sigma eps,
# with sigma up to tau = 0.8. Here sigma grows from left to right.

# %%
sigmas = [0.0, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4, 3.2]
eps = torch.randn(z.shape[1:])
noisy = torch.stack([z[1] + sigma * eps for sigma in sigmas])  # (8, 16, 128)
show(rae.decode(noisy).clamp(0, 1), titles=[f"sigma {sigma:g}" for sigma in sigmas])

# %% [markdown]
# @exercise 11

# %% [markdown]
# ## 3. Why the schedule is shifted
#
# Flow matching goes from data (t = 0) to noise (t = 1): x_t = (1 - t) z + t eps. Here is one image
# at 8, 16, 32 and 64 pixels, always with noise at t = 0.6. The more pixels, the more of the image
# survives: every pixel has its own noise, and the eye averages it away. A latent of 16 x 128
# numbers is like a large picture, so training has to spend its time at more noise.

# %%
t = 0.6
panels = []
for size in (8, 16, 32, 64):
    x = 2 * torch.from_numpy(toy_images(2, seed=5, size=size)[0][1:]).float() / 255 - 1
    x_t = (1 - t) * x + t * torch.randn(x.shape)  # (1, 3, size, size)
    panels.append(torch.nn.functional.interpolate(0.5 + 0.25 * x_t, size=(64, 64)))
show(torch.cat(panels), columns=4, titles=["8 px", "16 px", "32 px", "64 px"])

# %% [markdown]
# The shift by alpha maps t to alpha t / (1 + (alpha - 1) t). Left: the shifted t. Right: the
# distribution of training times. For 256 tokens of 768 channels alpha is 6.93; for this toy, 4 was
# about the best we tried.

# %%
figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3))
times = torch.linspace(0, 1, 101)
drawn = draw_time(20_000)
for alpha in (1, 2, 4, 6.93):
    left.plot(times, shift_time(times, alpha), label=f"alpha {alpha:g}")
    right.hist(shift_time(drawn, alpha).numpy(), bins=60, histtype="step", density=True)
left.set(xlabel="t", ylabel="shifted t")
left.legend()
right.set(xlabel="shifted t", ylabel="density")
figure.tight_layout()
display(figure)
pyplot.close(figure)

# %% [markdown]
# @exercise 2
#
# @exercise 10

# %% [markdown]
# ## 4. Why the head must be wide (Theorem 1)
#
# The noise in a token has C independent channels. A transformer of width d < C can represent at
# most d of them: its loss stays above 1 - d / C even if it only has to memorize a single image.
# Here C is 32, the first channels of one latent, and plain DiTs of several widths memorize it. The
# last model is as narrow as the first, but has a wide head.

# %%
one = z[:1, :, :32].expand(64, -1, -1)  # (64, 16, 32)
null = torch.full((64,), 10)


def loss_on_one_image(width, head=None, steps=500):
    """The mean of the last 100 losses."""
    torch.manual_seed(0)
    model = DiTDH(32, 4, backbone=(width, 3, 2), wide_head=head, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for _ in range(steps):
        loss = flow_loss(model, one, null, alpha=1.0, t=torch.rand(64)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-100:]) / 100


points = {}
for width, head in ((8, None), (16, None), (24, None), (32, None), (48, None), (8, (64, 1, 2))):
    points[width, head] = loss_on_one_image(width, head)
    figure, ax = pyplot.subplots(figsize=(6, 3))
    ax.plot([0, 32, 48], [1, 0, 0], "k--", label="bound of Theorem 1")
    plain = {width: loss for (width, head), loss in points.items() if head is None}
    ax.plot(list(plain), list(plain.values()), "o-", label="DiT")
    if head is not None:
        ax.plot(width, points[width, head], "r*", markersize=12, label="width 8, head of 64")
    ax.set(xlabel="width d", ylabel="loss on one image, C = 32", ylim=(0, 1))
    ax.legend()
    clear_output(wait=True)
    display(figure)
    pyplot.close(figure)

# %% [markdown]
# @exercise 6

# %% [markdown]
# ## 5. Train a DiT^DH
#
# This is all of stage 2: a latent, a time, noise, the squared error of the velocity, a step. The
# model has eight cheap blocks of width 64 and one of width 128, as wide as a token. The same with
# files, a log and exact resume is [train_diffusion.py](../train_diffusion.py). Every 250 steps we
# draw samples, one column per class, always from the same noise.

# %%
alpha = 4.0
train = ToyShapes("train")
labels = torch.from_numpy(train.labels).long()
model = DiTDH(128, 4, backbone=(64, 8, 2), wide_head=(128, 1, 4), num_classes=10)
ema = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
preview_noise = torch.randn(30, 16, 128)
preview_labels = torch.arange(10).repeat(3)
steps = 1000
losses = []


def draw(cfg_scale):
    """Sample three images of each class from the EMA."""
    latents = sample(ema, preview_noise, preview_labels, time_grid(25, alpha), cfg_scale)
    show(rae.decode(latents).clamp(0, 1), columns=10, titles=train.classes)


for step in range(steps):
    for group in optimizer.param_groups:
        group["lr"] = 5e-3 * min(1, (steps - step) / (0.75 * steps))  # decays after a quarter
    rows = torch.randint(len(labels), (64,))
    z = rae.encode(torch.from_numpy(train.images[rows.numpy()]).float() / 255)  # (64, 16, 128)
    # Guidance needs an unconditional model too: replace 10% of the labels by the null label, 10.
    y = torch.where(torch.rand(64) < 0.1, 10, labels[rows])
    loss = flow_loss(model, z, y, alpha).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update_ema(ema, model, 0.995, step)
    losses.append(loss.item())
    if (step + 1) % 250 == 0:
        print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}")
        draw(cfg_scale=1.0)

# %% [markdown]
# @exercise 3
#
# @exercise 5
#
# @exercise 7

# %% [markdown]
# ## 6. Guidance
#
# Classifier-free guidance extrapolates from the unconditional prediction to the conditional one:
# v = v_null + s (v - v_null). Move the slider. A scale of 1 means no guidance; large scales make
# samples clearer, and more alike.

# %%
ipywidgets.interact(
    draw,
    cfg_scale=ipywidgets.FloatSlider(
        value=1.5, min=0, max=6, step=0.5, continuous_update=False, description="cfg scale"
    ),
)

# %%
for cfg_scale in (0.0, 1.0, 3.0):
    print(f"cfg_scale {cfg_scale:g}")
    draw(cfg_scale)

# %% [markdown]
# @exercise 8
#
# What to change next: `alpha = 1` in part 5, with the same number of steps. No head, or a backbone
# as wide as the head. Fewer steps in `time_grid`.
