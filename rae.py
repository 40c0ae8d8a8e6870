"""The representation autoencoder (arXiv 2510.11690, section 3): frozen encoder, trained decoder.

    rae = load_rae("toy")           # or a checkpoint of train_decoder.py, or "released:dinov2-b"
    z = rae.encode(images)          # (B, 3, H, W) in [0, 1] -> (B, N, C), mean 0 and variance 1
    images = rae.decode(z)          # (B, N, C) -> (B, 3, H, W)

From top to bottom: images, the encoder, the decoder, the autoencoder with its latent statistics.
That is the method. Below "Files" come loading and saving, and plain functions that several scripts
share: read on where a script calls them.

Letters, the same in every file:
    B batch      N tokens = h w      C latent channels      D width of a transformer
    H W pixels   h w latent grid     p patch                t time, from 0 (data) to 1 (noise)
    z latent     eps ~ N(0, I)       x_t = (1 - t) z + t eps        v = eps - z, the velocity
    alpha the schedule's shift       tau the decoder's latent noise     y label
"""

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import zipfile
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

TOY = Path(__file__).resolve().parent / "toy"

# ---------------------------------------------------------------------------------------------
# Images

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
MAX_PIXELS = 2**26  # reading larger images could take more than a GB


def shorten(image):
    """The middle of a PIL image over 16 times as long as wide: resized it could take gigabytes."""
    width, height = (min(side, 16 * min(image.size)) for side in image.size)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def center_crop(image, size):
    """The central square of a PIL image as size x size pixels, in ADM's way.

    It is halved by averaging while its short side is at least twice `size`; then one bicubic step
    brings the short side to `size`, and the square is cut out (Dhariwal and Nichol 2021).
    """
    image = shorten(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, size, short_side, rng):
    """A random square of size x size pixels from a PIL image whose short side becomes `short_side`.

    The image is resized in one bicubic step, as in the released training of the decoder.
    """
    image = shorten(image)
    width = int(short_side * image.width / min(image.size))
    height = int(short_side * image.height / min(image.size))
    image = image.resize((width, height), Image.BICUBIC)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def open_image(path):
    """An image file as a PIL image in RGB, upright, and on white where it is transparent."""
    try:
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; reduce it first")
        if image.mode in ("I", "F"):
            raise ValueError("its pixels have 32 bits and no known range; save it with 8 or 16")
        with suppress(Exception):  # malformed tags are left alone
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=image.getchannel("A"))
            return white
        return image.convert("RGB")
    except Exception as error:  # PIL raises half a dozen kinds for a broken file
        name = repr(str(path))[1:-1]  # with a line break in it escaped
        raise ValueError(f"{name}: not readable as an image ({error})") from None


def list_images(folder, skipped, above=()):
    """The images below a folder as paths relative to it, folder by folder in the order of names.

    To the list `skipped` the names of files that are no images by their names are added.

    Links to folders are followed; ValueError if one leads back to a folder that it lies in: `above`
    are the real paths of those that this one was reached through. Names that begin with a dot are
    skipped, and so is __MACOSX, which zip files from a Mac hold.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder}: a link to a folder that it lies in; remove it")
    images = []
    subfolders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                subfolders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                images.append(entry.name)
            else:
                skipped.append(entry.name)
    images.sort()
    for name in sorted(subfolders):
        below = list_images(f"{folder}/{name}", skipped, (*above, real))
        images += [f"{name}/{image}" for image in below]
    return images


class ImageFolder:
    """The images below a folder; every folder that holds some is a class.

    An item is the centre crop of an image, (3, size, size) uint8. `load` can crop at random
    instead, from images resized to `short_side`. An image that cannot be read stops the run:
    skipping it would silently change which images a step sees.
    """

    def __init__(self, root, size, short_side=None):
        if not os.path.isdir(root):
            raise ValueError(f"{root}: no such folder")
        self.root = str(root)
        self.size = size
        self.short_side = short_side
        skipped = []
        self.names = list_images(self.root, skipped)
        if not self.names:
            raise ValueError(f"{root}: no images in this folder")
        if skipped:
            print0(f"{root}: skipped {len(skipped)} non-images, as {min(skipped)!r}", sys.stderr)

        # The images of a class follow each other.
        self.classes = []
        labels = []
        for name in self.names:
            folder = os.path.dirname(name) or "."
            if not self.classes or folder != self.classes[-1]:
                self.classes.append(folder)
            labels.append(len(self.classes) - 1)
        self.labels = np.array(labels)  # (number of images,)
        classes = set(self.classes)
        for folder in self.classes:
            for outer in Path(folder).parents:
                if str(outer) in classes:
                    raise ValueError(
                        f"{root}: images in the folder {outer} beside the class folder {folder}; "
                        "put each image into a class folder, or all into one folder"
                    )

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.load(index)

    def load(self, index, rng=None, flip=False):
        """Image number `index` as (3, size, size) uint8.

        With rng, a numpy generator, it is a random crop if the folder was opened with short_side.
        """
        image = open_image(f"{self.root}/{self.names[index]}")
        if rng is None or self.short_side is None:
            image = center_crop(image, self.size)
        else:
            image = random_crop(image, self.size, self.short_side, rng)
        if flip:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        return np.array(image).transpose(2, 0, 1)

    def fingerprint(self):
        """A hash of the images' names and so of their number, order and classes."""
        return hashlib.sha256(os.fsencode("\n".join(self.names))).hexdigest()[:16]


def open_data(data, size, split="train", short_side=None):
    """The data set that --data names: "toy" or a folder. See ImageFolder for what it offers."""
    if data == "toy":
        from toy.world import ToyShapes

        return ToyShapes(split, size)
    return ImageFolder(data, size, short_side)


def read_images(data, indices, device):
    """The centre crops of these images, as (B, 3, H, W) in [0, 1]."""
    images = np.stack([data[index] for index in indices])
    return torch.from_numpy(images).to(device).float() / 255


def read_batches(data, batches, workers, device):
    """As read_images for each of `batches`, lists of indices; workers read ahead."""
    device = torch.device(device)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda"
    )
    for images in loader:
        yield images.to(device, non_blocking=True).float() / 255  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# The encoder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# input_ratio is the side of the encoder's input over the side of the image. DINOv2 has patches of
# 14 px and sees 256 px as 224, so that every encoder of an RAE makes 16 x 16 tokens of them.
# antialias and act_layer are as in each model's original code, where timm's default differs.
ENCODERS = {
    "dinov2-s": dict(model="vit_small_patch14_reg4_dinov2.lvd142m", input_ratio=14 / 16),
    "dinov2-b": dict(model="vit_base_patch14_reg4_dinov2.lvd142m", input_ratio=14 / 16),
    "dinov2-l": dict(model="vit_large_patch14_reg4_dinov2.lvd142m", input_ratio=14 / 16),
    "siglip2-b": dict(
        model="vit_base_patch16_siglip_256.v2_webli",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        antialias=False,
        timm_options=dict(act_layer="gelu_tanh"),
    ),
    "mae-b": dict(model="vit_base_patch16_224.mae", antialias=False),
    # Not for an RAE: the discriminator of train_decoder.py works on its features.
    "dino-s8": dict(model="vit_small_patch8_224.dino", timm_options=dict(act_layer="gelu_tanh")),
}
# Weights of timm's models that nothing here runs: a file may lack them.
UNUSED_PREFIXES = ("head.", "fc_norm.", "attn_pool.", "pre_logits.")


def hash_tensors(tensors):
    """A short hash of a dict of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Encoder(nn.Module):
    """A frozen ViT of timm: square images (B, 3, H, W) in [0, 1] -> raw tokens (B, N, C).

    The ViT sees input_size x input_size pixels, with these colours' mean and std (3 numbers each).
    antialias says whether its position embedding is resized to that with antialiasing.
    """

    def __init__(self, vit, input_size, mean, std, antialias=True):
        super().__init__()
        from timm.layers import resample_abs_pos_embed

        patch_size = vit.patch_embed.patch_size[0]
        if input_size % patch_size != 0:
            raise ValueError(
                f"encoder input {input_size} is not a multiple of its patch {patch_size}"
            )
        self.vit = vit
        self.input_size = input_size
        self.grid_size = input_size // patch_size
        self.latent_dim = vit.embed_dim

        # Resized by hand, since timm's own way always antialiases.
        if vit.pos_embed is not None:
            num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
            pos_embed = resample_abs_pos_embed(
                vit.pos_embed.detach(),
                [self.grid_size, self.grid_size],
                num_prefix_tokens=num_prefix,
                antialias=antialias,
            )
            vit.pos_embed = nn.Parameter(pos_embed)
        vit.patch_embed.set_input_size((input_size, input_size))

        # The last norm loses its weights (appendix C): each token then has mean 0 and variance 1
        # over its channels. (Where timm has no last norm, there is no eps to keep.)
        eps = getattr(vit.norm, "eps", 1e-6)
        vit.norm = nn.LayerNorm(self.latent_dim, eps=eps, elementwise_affine=False)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        """Stay in eval mode: a frozen encoder drops nothing out."""
        return super().train(False)

    def fingerprint(self):
        """A hash of the weights in use."""
        state = self.vit.state_dict()
        used = {name: w for name, w in state.items() if not name.startswith(UNUSED_PREFIXES)}
        return hash_tensors(used)

    def forward(self, images):
        # One bicubic step of any size, without antialiasing, as released.
        if images.shape[-1] != self.input_size:
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic")
        images = (images - self.pixel_mean) / self.pixel_std
        tokens = self.vit.forward_features(images)  # (B, prefix + N, C)
        return tokens[:, self.vit.num_prefix_tokens :].float()  # (B, N, C): no CLS, no registers


def load_timm(model, weights, flag, **options):
    """A timm model with its published weights, or those of a local file in timm's names.

    `flag` is the command-line flag for such a file, to be named where a download fails.
    """
    import timm

    if weights is None:
        print0(f"{model}: timm's published weights, fetched unless cached", sys.stderr)
    try:
        net = timm.create_model(model, pretrained=weights is None, num_classes=0, **options)
    except Exception as error:  # the hub's client alone raises a dozen kinds
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{model}: not in timm, not a plain ViT, or the weights of {model} cannot be had "
            f"({reason}): download them and pass {flag} FILE"
        ) from None
    if weights is not None:
        # Unused parts stay as they are; everything else must be in the file.
        state = {
            name: w for name, w in net.state_dict().items() if name.startswith(UNUSED_PREFIXES)
        }
        for name, w in read_file(weights).items():
            if not name.startswith(UNUSED_PREFIXES):
                state[name] = w
        load_strict(net, state, weights)
    return net


def build_encoder(name, image_size, weights=None, flag="--encoder-weights"):
    """An Encoder for images of image_size x image_size pixels.

    name is one of ENCODERS, "timm:MODEL", "toy", or a file written by extras/pretrain_encoder.py.
    weights is a local file in timm's names, read instead of a download (the last two hold their
    own); flag is its command-line flag.
    """
    from timm.models.vision_transformer import VisionTransformer

    if name not in ENCODERS and not name.startswith("timm:"):
        path = TOY / "encoder.pt" if name == "toy" else Path(name)
        known = f"toy, timm:MODEL, {', '.join(ENCODERS)}"
        if not path.is_file():
            raise ValueError(f"encoder {name}: no such file, nor one of {known}")
        file = read_file(path)
        if "vit" not in file:
            raise ValueError(f"encoder {name}: not an encoder file, nor one of {known}")
        if weights is not None:
            raise ValueError(f"{flag} {weights}: without effect, the encoder {name} has its own")
        vit = VisionTransformer(**file["vit"])
        load_strict(vit, file["state_dict"], name)
        return Encoder(vit, image_size, file["mean"], file["std"])

    entry = ENCODERS.get(name, {})
    model = entry.get("model", name.removeprefix("timm:"))
    if ":" in model or "/" in model:
        # timm would take such a name for any repository or folder, and a checkpoint may hold it.
        raise ValueError(f"encoder {name}: not a name of timm's own list")
    options = entry.get("timm_options", {})
    vit = load_timm(model, weights, flag, dynamic_img_size=True, **options)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"encoder {name}: {model} is not a plain ViT")

    if name in ENCODERS:
        input_ratio = entry.get("input_ratio", 1)
        mean = entry.get("mean", IMAGENET_MEAN)
        std = entry.get("std", IMAGENET_STD)
    else:
        # Where the patch does not divide the image: one token per 16 px, as for DINOv2.
        patch_size = vit.patch_embed.patch_size[0]
        input_ratio = 1 if image_size % patch_size == 0 else patch_size / 16
        mean = vit.pretrained_cfg["mean"]
        std = vit.pretrained_cfg["std"]
    input_size = round(image_size * input_ratio)
    return Encoder(vit, input_size, mean, std, entry.get("antialias", True))


# ---------------------------------------------------------------------------------------------
# The decoder

# width, depth, num_heads, mlp_dim. The published decoder is XL, with an MLP narrower than 4 x
# width.
DECODERS = {
    "toy": (128, 3, 4, 512),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "XL": (1152, 28, 16, 4096),
}


def sincos_2d(dim, grid_size):
    """2-D sin-cos positions (N, dim). Half of the channels encode the column, half the row.

    The same function stands in dit_dh.py: neither file imports the other.
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # (dim / 4,)
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency  # (grid, dim / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim / 2)
    column = axis.repeat(grid_size, 1)  # (N, dim / 2)
    row = axis.repeat_interleave(grid_size, dim=0)  # (N, dim / 2)
    return torch.cat([column, row], dim=1).float()


class DecoderBlock(nn.Module):
    """A pre-norm transformer block on x (B, 1 + N, D).

    The nested dicts give its parameters the names of Hugging Face's ViT, as in released files.
    """

    def __init__(self, width, num_heads, mlp_dim):
        super().__init__()
        self.num_heads = num_heads
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        qkv = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        output = {"dense": nn.Linear(width, width)}
        self.attention = nn.ModuleDict(
            {"attention": nn.ModuleDict(qkv), "output": nn.ModuleDict(output)}
        )
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_dim)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp_dim, width)})

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, num_heads, 1 + N, d)

    def forward(self, x):
        h = self.layernorm_before(x)  # (B, 1 + N, D)
        projections = self.attention["attention"]
        q = self.split_heads(projections["query"](h))
        k = self.split_heads(projections["key"](h))
        v = self.split_heads(projections["value"](h))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, num_heads, 1 + N, d)
        h = h.transpose(1, 2).flatten(2)  # (B, 1 + N, D)
        x = x + self.attention["output"]["dense"](h)

        h = self.intermediate["dense"](self.layernorm_after(x))  # (B, 1 + N, mlp_dim)
        x = x + self.output["dense"](F.gelu(h))
        return x


class Decoder(nn.Module):
    """A MAE-style ViT: raw tokens (B, N, C) -> images (B, 3, H, W).

    Its colours are the encoder's normalised ones; RAE undoes that. Each token draws a patch of
    patch_size pixels, so H = W = grid_size * patch_size. As in MAE a CLS token goes along, of
    which nothing is drawn. Parameters have the released names.
    """

    def __init__(self, latent_dim, grid_size, patch_size, width, depth, num_heads, mlp_dim):
        super().__init__()
        if width % 4 != 0 or width % num_heads != 0:
            raise ValueError(f"decoder width {width}: not a multiple of 4 and of {num_heads} heads")
        self.latent_dim = latent_dim
        self.grid_size = grid_size
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.decoder_embed = nn.Linear(latent_dim, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        pos_embed = F.pad(sincos_2d(width, grid_size), (0, 0, 1, 0))  # the CLS token's row is 0
        self.decoder_pos_embed = nn.Parameter(pos_embed[None])  # (1, 1 + N, D), trained as released
        blocks = [DecoderBlock(width, num_heads, mlp_dim) for _ in range(depth)]
        self.decoder_layers = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, patch_size**2 * 3)
        self.checkpoint_activations = False  # True: save memory, run blocks again in backward

    def forward(self, tokens):
        x = self.decoder_embed(tokens)  # (B, N, D)
        x = x.float()  # under autocast too: a bfloat16 residual stream would lose small branches
        cls = self.trainable_cls_token.expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1) + self.decoder_pos_embed  # (B, 1 + N, D)
        for layer in self.decoder_layers:
            if self.checkpoint_activations:
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()  # (B, N, p p 3)

        # Every token's pixels, in the order row, column, colour, go to their place in the image.
        h = self.grid_size
        p = self.patch_size
        x = x.view(-1, h, h, p, p, 3).permute(0, 5, 1, 3, 2, 4)  # (B, 3, h, p, w, p)
        return x.flatten(4).flatten(2, 3)  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# The autoencoder


class RAE(nn.Module):
    """Encoder and decoder, and between them the latent statistics.

    mean and var, (C, h, w) each as in released files, are those of each channel at each place over
    the training set: z = (tokens - mean) / sqrt(var + 1e-5) is what diffusion models. Released
    files may lack the mean, which then is 0. The decoder works on the raw tokens.

    In train() mode `noised` adds noise of deviation sigma to them (section 4.3). noise_dist
    "uniform" is sigma = tau U(0, 1), as released; "half-normal" is sigma = |N(0, tau^2)|, the
    paper's.
    """

    def __init__(self, encoder, decoder, mean=None, var=None, tau=0.0, noise_dist="uniform"):
        super().__init__()
        shape = (encoder.latent_dim, encoder.grid_size, encoder.grid_size)
        if (decoder.latent_dim, decoder.grid_size) != shape[:2]:
            raise ValueError(
                f"decoder and encoder do not fit: channels {decoder.latent_dim} and "
                f"{encoder.latent_dim}, grid {decoder.grid_size} and {encoder.grid_size}"
            )
        if mean is None:
            mean = torch.zeros(shape)
        if var is not None and (var <= 0).any():
            raise ValueError("statistics var are not above 0; are all the images the same?")
        std = torch.ones(shape) if var is None else (var + 1e-5).sqrt()
        for name, statistic in (("mean", mean), ("std", std)):
            if statistic.shape != shape:
                raise ValueError(
                    f"statistics {name} have shape {tuple(statistic.shape)}, not {shape}"
                )
            rows = statistic.flatten(1).T.contiguous().float()  # (N, C), as tokens are
            self.register_buffer(f"latent_{name}", rows)
        self.encoder = encoder
        self.decoder = decoder
        self.image_size = decoder.grid_size * decoder.patch_size  # of a decoded image
        self.tau = tau
        self.noise_dist = noise_dist

    def fingerprint(self):
        """A hash of the latent space: the encoder's weights and the statistics."""
        statistics = hash_tensors({"mean": self.latent_mean, "std": self.latent_std})
        return hashlib.sha256((self.encoder.fingerprint() + statistics).encode()).hexdigest()[:16]

    def noised(self, tokens, generators=None):
        """Raw tokens (B, N, C), with noise in train() mode and unchanged in eval() mode.

        The decoder will be handed diffusion's latents, which are never quite right: training on
        noisy tokens prepares it. Every image draws its own sigma and noise, from its own of B
        torch generators if they are given.
        """
        if not self.training or self.tau == 0:
            return tokens
        draw = torch.rand if self.noise_dist == "uniform" else torch.randn
        noise = []
        for g in generators or [None] * len(tokens):
            sigma = self.tau * draw(1, generator=g, device=tokens.device).abs()
            eps = torch.randn(tokens.shape[1:], generator=g, device=tokens.device)
            noise.append(sigma * eps)
        return tokens + torch.stack(noise)  # (B, N, C)

    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> normalised latents z (B, N, C)."""
        return (self.encoder(images) - self.latent_mean) / self.latent_std

    def decode_tokens(self, tokens):
        """Raw tokens (B, N, C) -> images (B, 3, H, W), in about [0, 1], not clamped."""
        return self.decoder(tokens) * self.encoder.pixel_std + self.encoder.pixel_mean

    def decode(self, z):
        """Normalised latents z (B, N, C) -> images (B, 3, H, W), in about [0, 1], not clamped."""
        return self.decode_tokens(z * self.latent_std + self.latent_mean)


@torch.no_grad()
def latent_statistics(encoder, data, batch_size, device, workers=0):
    """The exact mean and variance, (C, h, w) each, of a data set's raw tokens, in both flips.

    One pass over the centre crops, summed in float64 and returned as float32. The variance divides
    by the number of views, not by one less. The processes share the work (deal_batches,
    read_batches, all_reduce_mean). (The released statistics are a running average, which leans
    towards the last images.)
    """
    rank, world_size = rank_and_world_size()
    batches = deal_batches(len(data), batch_size)
    images_ahead = read_batches(data, batches, workers, device)
    exact = "cpu" if torch.device(device).type == "mps" else device  # mps has no float64
    shape = (encoder.grid_size**2, encoder.latent_dim)
    total = torch.zeros(shape, dtype=torch.float64, device=exact)  # (N, C)
    total_square = torch.zeros_like(total)
    hidden = rank > 0 or None  # None: shown if there is a terminal
    for images in tqdm(images_ahead, "latent statistics", len(batches), disable=hidden):
        for view in (images, images.flip(-1)):
            tokens = encoder(view).to(exact).double()  # (B, N, C)
            total += tokens.sum(0)
            total_square += tokens.square().sum(0)

    # The mean over the processes, times their number, is the sum over all of them.
    num_views = 2 * len(data)
    mean = all_reduce_mean(total).cpu() * world_size / num_views
    square = all_reduce_mean(total_square).cpu() * world_size / num_views
    var = (square - mean.square()).clamp(min=0)
    grid = (encoder.grid_size, encoder.grid_size)
    return mean.T.unflatten(1, grid).float(), var.T.unflatten(1, grid).float()


# ---------------------------------------------------------------------------------------------
# Files. A decoder's file is a plain state dict in the released names, or a checkpoint of
# train_decoder.py, which nests one under "ema" and names the encoder, but does not hold it.


def read_file(path):
    """The tensors and plain values of a .pt or .safetensors file.

    A pickle that would run code is refused. The tensors are mapped, not read: only what is used
    comes into memory, and processes of one machine share it.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        mmap = zipfile.is_zipfile(path)  # torch's files before 1.6 are none, and cannot be mapped
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as error:  # torch and safetensors raise a dozen kinds for a broken file
        raise ValueError(
            f"{path}: cannot be read, truncated, or refused for holding more than tensors "
            f"({type(error).__name__})"
        ) from None


@contextmanager
def whole_file(path):
    """Open a file to write to it whole or not at all: under another name, synced, then renamed.

    So a kill or a full disk at any moment leaves what was there before.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
        temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: cannot be saved ({reason}); what was there before is kept: make room, and "
            "the same command goes on"
        ) from None
    os.replace(temporary, path)


def check_finite(content, where):
    """ValueError names the first tensor of nested dicts that holds NaN or infinities."""
    for name, value in content.items():
        if isinstance(value, dict):
            check_finite(value, f"{where}: {name}")
        elif torch.is_tensor(value) and not value.isfinite().all():
            raise ValueError(f"{where}: {name} is not finite; it is neither saved nor used")


def save_file(content, path):
    """Write a .pt file, whole or not at all, and never with numbers that are not finite."""
    check_finite(content, path)
    with whole_file(path) as f:
        torch.save(content, f)


def load_strict(module, state, where):
    """Copy a state dict into a module; ValueError names all missing and misshapen tensors."""
    check_finite(state, where)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def load_optimizer(optimizer, state, where):
    """Load AdamW's state; ValueError if it is another model's.

    torch compares no shapes, and the fused step would write beyond a smaller tensor's end.
    """
    try:
        check_finite(state["state"], "optimizer")
        optimizer.load_state_dict(state)
        for parameter, moments in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape:
                    raise ValueError(f"{name} is misshapen")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: not this run's optimizer state ({error})") from None


def load_released_decoder(x, num_heads=None, where="state dict"):
    """A Decoder in eval mode from the file or dict x.

    x is a state dict in the released names, or a checkpoint that nests one under "ema". Sizes are
    read from its tensors' shapes. The number of attention heads does not show in them: it is
    num_heads, or the checkpoint's, or that of a known width. `where` names x in errors: ValueError
    says which tensor is wrong.
    """
    if not isinstance(x, dict):
        where = str(x)
        x = read_file(x)
    state = x.get("ema", x)
    if "final_layer.linear.bias" in state:
        raise ValueError(f"{where}: a diffusion model, not an RAE decoder")

    try:
        width, latent_dim = state["decoder_embed.weight"].shape
        num_positions = state["decoder_pos_embed"].shape[1]  # 1 + N
        num_pixels = state["decoder_pred.bias"].shape[0]  # p p 3
        mlp_dim = state["decoder_layers.0.intermediate.dense.bias"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"{where}: not an RAE decoder, tensor {error.args[0]} is missing"
        ) from None
    depth = len({name.split(".")[1] for name in state if name.startswith("decoder_layers.")})

    known = {size[0]: size[2] for size in DECODERS.values()}
    num_heads = num_heads or x.get("num_heads") or known.get(width)
    if num_heads is None:
        raise ValueError(f"{where}: a decoder of width {width} is of no known size; pass num_heads")
    grid_size = math.isqrt(num_positions - 1)
    patch_size = math.isqrt(num_pixels // 3)
    decoder = Decoder(latent_dim, grid_size, patch_size, width, depth, num_heads, mlp_dim)
    load_strict(decoder, state, where)
    return decoder.eval()


def released_file(name, statistics=False):
    """The local file that a name stands for: "toy", "released:NAME" or a path.

    Released files are fetched once. With `statistics` it is the file of latent statistics that
    belongs to a released decoder.
    """
    if name == "toy":
        return TOY / "decoder.pt"
    if not str(name).startswith("released:"):
        return name
    # {name: [model] or [model, statistics]}, paths in the authors' repository
    files = json.loads((TOY / "released.json").read_text())
    short = name.removeprefix("released:")
    if short not in files:
        raise ValueError(f"{name}: not released; names are {', '.join(files)}")
    from huggingface_hub import hf_hub_download

    repository = "nyu-visionx/RAE-collections"
    revision = "1be4f03273523431f099a934da4cf1940dc6039f"
    file = files[short][1 if statistics else 0]
    print0(f"{name}: {file} of huggingface.co/{repository}, fetched unless cached", sys.stderr)
    try:
        return hf_hub_download(repository, file, revision=revision)
    except Exception as error:
        raise ValueError(
            f"{name}: cannot be fetched ({type(error).__name__}); download {file} of "
            f"huggingface.co/{repository} elsewhere and pass its path"
        ) from None


def load_rae(decoder, encoder=None, encoder_weights=None, stats=None, device="cpu"):
    """The RAE of a decoder's file: a path, "toy" or "released:NAME".

    A checkpoint of ours names its encoder and holds its statistics. A bare state dict needs the
    name of its encoder and `stats`, a file of its statistics.
    """
    name = str(decoder)
    file = read_file(released_file(name))
    decoder = load_released_decoder(file, where=name)
    if name.startswith("released:"):
        # The name begins with the encoder's: dinov2-b-512 is for larger images, dinov2-b-n05 of
        # another tau.
        encoder = encoder or "-".join(name.removeprefix("released:").split("-")[:2])
        stats = stats or released_file(name, statistics=True)
    encoder = encoder or file.get("encoder")
    if encoder is None:
        raise ValueError(f"{name}: the file does not name its encoder; pass --encoder and --stats")

    # Released decoders have one token per 16 px of the encoded image.
    image_size = file.get("encoder_image_size", 16 * decoder.grid_size)
    weights = encoder_weights or file.get("encoder_weights")
    frozen = build_encoder(encoder, image_size, weights)
    ours = frozen.fingerprint()
    theirs = file.get("encoder_hash", ours)
    if theirs != ours:
        raise ValueError(
            f"{name}: made for encoder weights {theirs}, not {ours}: restore them, or retrain"
        )
    statistics = read_file(stats) if stats else file
    if "var" not in statistics:
        raise ValueError(
            f"{stats or name}: no latent statistics (var, mean) in it; pass --stats FILE"
        )
    check_finite({k: statistics[k] for k in {"mean", "var"} & statistics.keys()}, stats or name)
    rae = RAE(frozen, decoder, statistics.get("mean"), statistics["var"])
    return rae.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# What several scripts share: processes, random numbers, the average, pictures


def rank_and_world_size():
    """This process's number and how many there are: (0, 1) unless torchrun started several."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave_group():
    """End the group of processes, if there is one, as soon as all of them are here.

    For the good end alone: after an error in one process it would wait for the others, and the
    error would never be seen. A process that ended at once could be aborted, since gloo's threads
    may still hold a tensor when Python ends; while it waits here, they let go.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def print0(text, file=None):
    """Print on the first process alone."""
    if rank_and_world_size()[0] == 0:
        print(text, file=file, flush=True)


def all_reduce_mean(tensor):
    """The mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def deal_batches(num, batch_size):
    """This process's batches of range(num), as ranges: the processes take them in turn.

    All together the batches are the same for any number of processes, and so are, to the bit,
    results that depend on which images share a batch.
    """
    rank, world_size = rank_and_world_size()
    starts = range(rank * batch_size, num, world_size * batch_size)
    return [range(start, min(start + batch_size, num)) for start in starts]


def set_precision(name, device):
    """Say how to compute; returns what "auto" stands for on this device, or the name itself.

    fp32    float32 throughout
    tf32    float32, but on GPUs matrix products round their factors to 10 bits of mantissa:
            the released sampler's choice
    bf16    tf32, and besides the caller runs the model under autocast: its matrix products are
            in bfloat16, while weights, norms, residual streams and losses stay float32
    auto    bf16 on GPUs that compute in it, else fp32
    """
    if name == "auto":
        # Older GPUs emulate bfloat16, slower than they compute float32.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    torch.backends.cuda.enable_cudnn_sdp(False)  # this attention gave NaN in bf16 with torch 2.13
    return name


def cast_matrices(network):
    """Store a frozen network's matrices in bfloat16, for use under autocast alone.

    Autocast would cast them at every call: it keeps the copies only of weights that are trained.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)


# Every random draw is a function of its place in the run:
#     in training, of (seed, step, row of the global batch): crop, flip, noise and its sigma
#     what is drawn for a whole batch at once, of (seed, step): t, dropped labels, augmentations
#     in sampling, of (seed, number of the sample): noise
#     the order of the images, of (seed, epoch)
# So nothing random is stored and a resumed run is exact; one process and eight draw the same; and a
# sample does not depend on the batch that it is drawn in. It costs a generator per image.


def keyed_rng(*key):
    """A numpy generator for a place in the run, given by integers such as (seed, step, row)."""
    # Their number goes first, since numpy takes (a, b) and (a, b, 0) for the same seed.
    return np.random.default_rng((len(key), *key))


def keyed_generator(device, *key):
    """A torch generator for a place in the run; see keyed_rng."""
    return torch.Generator(device).manual_seed(int(keyed_rng(*key).integers(2**63)))


def keyed_noise(keys, shape, device):
    """Standard normal noise (len(keys), *shape): each row is drawn from a place of its own."""
    noise = []
    for key in keys:
        g = keyed_generator(device, *key)
        noise.append(torch.randn(shape, generator=g, device=device))
    return torch.stack(noise)


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def epoch_order(seed, epoch, num_images):
    """The order (num_images,) in which an epoch visits the images."""
    return keyed_rng(seed, epoch).permutation(num_images)


class StepBatches(torch.utils.data.Dataset):
    """The run's batches: item `step` is this process's share of that step's global batch.

    An item is images (B, 3, H, W) uint8 and labels (B,), for a DataLoader with batch_size=None and
    the steps as its sampler. `rows` are the share's places in the global batch. An epoch may end
    within a batch: the next one's order follows without a gap.
    """

    def __init__(self, data, global_batch_size, seed, flip, rank=0, world_size=1):
        if global_batch_size % world_size != 0:
            raise ValueError(
                f"--global-batch-size {global_batch_size}: not a multiple of {world_size} processes"
            )
        local_batch_size = global_batch_size // world_size
        self.rows = range(rank * local_batch_size, (rank + 1) * local_batch_size)
        self.data = data
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.flip = flip

    def __getitem__(self, step):
        images = []
        labels = []
        for row in self.rows:
            epoch, place = divmod(step * self.global_batch_size + row, len(self.data))
            index = epoch_order(self.seed, epoch, len(self.data))[place]
            rng = keyed_rng(self.seed, step, row)
            flip = self.flip and rng.random() < 0.5
            images.append(self.data.load(index, rng, flip))
            labels.append(self.data.labels[index])
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))


def end_quietly(worker):
    """A loop's reader begins with this: Ctrl-C reaches it too, and ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- d ema + (1 - d) model for all parameters, d = min(decay, (1 + step) / (10 + step)).

    With the smaller d at its start the average of a short run soon forgets the initial weights.
    """
    d = min(decay, (1 + step) / (10 + step))
    # Every average.lerp_(parameter, 1 - d), on GPUs in a few kernels for all of them.
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def open_log(out, step):
    """Open out/log.jsonl for a run that starts or goes on at `step`, locked until the process ends.

    Lines of that step and of later ones are cut off: the run will write them again. ValueError if
    another run is writing to the folder (which goes unnoticed on Windows), or if it holds something
    that is no run.
    """
    out = Path(out)
    path = out / "log.jsonl"
    if out.exists() and any(out.iterdir()) and not path.exists():
        raise ValueError(f"{out}: not empty, and not a run of ours; pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    log = open(path, "a+", newline="\n")
    try:
        # lockf and not flock: a DataLoader's workers would inherit the latter, and hold it for
        # seconds after the process itself was killed.
        if fcntl is not None:
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"{out}: another run is writing here; wait, or pass another --out"
        ) from None

    log.seek(0)
    end = 0
    for line in log:
        if not line.endswith("}\n") or json.loads(line)["step"] >= step:
            break  # a later step, or a line that a kill has cut
        end += len(line)  # JSON is ASCII: characters are bytes
    log.truncate(end)
    return log


def write_log(log, numbers):
    """Write a dict of numbers as one line of JSON, and print those that are not lists."""
    log.write(json.dumps(numbers) + "\n")
    log.flush()
    shown = []
    for name, value in numbers.items():
        if isinstance(value, int):
            shown.append(f"{name} {value}")
        elif isinstance(value, float):
            shown.append(f"{name} {value:.4g}")
    print("  ".join(shown), flush=True)


def check_same_run(out, saved, settings, may_change):
    """ValueError unless our settings equal a checkpoint's, but for the names in may_change."""
    differences = []
    for name in sorted((saved.keys() | settings.keys()) - may_change):
        if saved.get(name) != settings.get(name):
            differences.append(f"{name} {saved.get(name)} there, {settings.get(name)} here")
    if differences:
        raise ValueError(
            f"{out}: holds a run with other settings ({'; '.join(differences)}); pass another --out"
        )


def to_uint8(images):
    """Images in [0, 1] as uint8, rounded. The released code truncates: half a level too dark."""
    if not images.isfinite().all():
        raise ValueError("pictures are not finite: the decoder, the model or --cfg-scale is wrong")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def save_sheet(images, path, columns):
    """Draw images (B, 3, H, W) in [0, 1] on one PNG, row by row; small ones are enlarged."""
    zoom = max(1, 64 // images.shape[2])
    rows = math.ceil(len(images) / columns)
    blank = rows * columns - len(images)
    images = to_uint8(images).cpu()
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, blank), value=255)  # white frames and blanks
    sheet = images.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    sheet = sheet.flatten(2, 3).flatten(0, 1).numpy()  # (rows H, columns W, 3)
    sheet = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    with whole_file(path) as f:
        Image.fromarray(sheet).save(f, "PNG")


def psnr(a, b):
    """Peak signal-to-noise ratio of images (B, 3, H, W) in [0, 1]: dB of each pair (B,)."""
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def number(low, high=10**9, kind=float):
    """The type of a flag that is a number from low to high, kind int for a whole one."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # true of NaN
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r}: wants a {what} from {low} to {high}")
        return value

    return read


positive_int = number(1, kind=int)
natural = number(0, 2**63 - 1, int)


def parse_flags(parser, presets=None):
    """The command line's flags. With `presets`, --preset names a dict of the others' defaults.

    An empty text is refused, such as that of an unset variable: a path "" is the current folder.
    """

    def refuse(message):  # as a mistake found later: in one line, without the usage
        raise ValueError(message)

    parser.error = refuse
    if presets:
        # Parsed twice: once for --preset, then with its values. (argparse reads defaults that are
        # text by the flag's type. --help shows the toy's.)
        parser.set_defaults(**presets["toy"])
        parser.set_defaults(**presets[parser.parse_args().preset])
    args = parser.parse_args()
    for name, value in vars(args).items():
        if value == "":
            raise ValueError(f"--{name.replace('_', '-')}: an empty text")
    return args


def available_devices():
    """What --device may be here, the best first."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    return devices


def error_line(error):
    """What a script prints of a user's mistake: one line, with the process if there are several.

    A DataLoader's worker sends its whole traceback as the text of the error, what matters last.
    """
    text = " ".join(str(error).split("\nValueError: ")[-1].split()) or type(error).__name__
    process = f" of process {os.environ['RANK']}" if "RANK" in os.environ else ""  # of torchrun
    return f"error{process}: {text}"
