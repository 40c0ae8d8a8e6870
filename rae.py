"""The representation autoencoder (arXiv 2510.11690, section 3): frozen encoder, trained decoder.

    rae = load_rae("toy")       # or a checkpoint of train_decoder.py, or "released:dinov2-b"
    z = rae.encode(images)      # (B, 3, H, W) in [0, 1] -> latents (B, N, C), normalized
    images = rae.decode(z)      # (B, N, C) -> (B, 3, H, W)

Notation, the same in every file:
    B batch      N tokens = h w      C latent channels      D transformer width
    H W pixels   h w latent grid     p patch size           t time, from 0 (data) to 1 (noise)
    z latents    eps ~ N(0, I)       x_t = (1 - t) z + t eps        v = eps - z, the velocity
    alpha schedule shift             tau decoder noise level        y label
"""

import argparse
import glob
import hashlib
import json
import math
import os
import re
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from toy.world import ToyShapes

TOY = Path(__file__).resolve().parent / "toy"


class UsageError(Exception):
    """An error the user can fix. Scripts print it as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------
# Encoder

# name: (timm model, antialias, timm options). The official code and timm differ in GELU (exact or
# tanh) and in antialiasing when positions are resized; we follow the official code.
ENCODERS = {
    "dinov2-s": ("vit_small_patch14_reg4_dinov2.lvd142m", True, {}),
    "dinov2-b": ("vit_base_patch14_reg4_dinov2.lvd142m", True, {}),
    "dinov2-l": ("vit_large_patch14_reg4_dinov2.lvd142m", True, {}),
    "siglip2-b": ("vit_base_patch16_siglip_256.v2_webli", False, {"act_layer": "gelu_tanh"}),
    "mae-b": ("vit_base_patch16_224.mae", False, {}),
    # Backbone of train_decoder.py's discriminator
    "dino-s8": ("vit_small_patch8_224.dino", True, {"act_layer": "gelu_tanh"}),
}


class Encoder(nn.Module):
    """A frozen timm ViT: square images (B, 3, H, W) in [0, 1] -> tokens (B, N, C).

    The ViT sees input_size x input_size pixels, normalized by mean and std (3 numbers each).
    """

    def __init__(self, vit, input_size, mean, std, antialias=True):
        super().__init__()
        from timm.layers import resample_abs_pos_embed

        patch_size = vit.patch_embed.patch_size[0]
        if input_size % patch_size != 0:
            raise UsageError(f"encoder input of {input_size} px is not a multiple of {patch_size}")
        self.vit = vit
        self.input_size = input_size
        self.grid_size = input_size // patch_size
        self.latent_dim = vit.embed_dim

        # timm would resize the position embedding by itself, but always with antialiasing.
        pos_embed = resample_abs_pos_embed(
            vit.pos_embed.detach(),
            [self.grid_size, self.grid_size],
            num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens,
            antialias=antialias,
        )
        vit.pos_embed = nn.Parameter(pos_embed)
        vit.patch_embed.set_input_size((input_size, input_size))

        # Drop the final LayerNorm's affine parameters (appendix C): every token then has mean 0 and
        # variance 1 over its channels, whatever the encoder.
        eps = getattr(vit.norm, "eps", 1e-6)  # ViTs that average their tokens have no norm here
        vit.norm = nn.LayerNorm(self.latent_dim, eps=eps, elementwise_affine=False)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, images):
        # Resize with bicubic interpolation and no antialiasing, as in the official code.
        if images.shape[-1] != self.input_size:
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic")
        images = (images - self.pixel_mean) / self.pixel_std  # (B, 3, input_size, input_size)
        tokens = self.vit.forward_features(images)  # (B, prefix + N, C)
        return tokens[:, self.vit.num_prefix_tokens :].float()  # (B, N, C): no CLS, no registers

    def denormalize(self, images):
        """Map the decoder's output from the encoder's normalized pixel space to [0, 1]."""
        return images * self.pixel_std + self.pixel_mean

    def latent_hash(self, mean, var):
        """Hash the blocks and the statistics, to catch an encoder retrained under its old name."""
        return hash_tensors([*self.vit.blocks.state_dict().values(), mean, var])


# ---------------------------------------------------------------------------------------------
# Decoder

# width, depth, num_heads, mlp_dim. The paper's decoder is XL. Its MLP is narrower than 4 x width.
DECODERS = {
    "toy": (128, 3, 4, 512),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "XL": (1152, 28, 16, 4096),
}


class DecoderBlock(nn.Module):
    """Pre-norm transformer block on x (B, 1 + N, D)."""

    def __init__(self, width, num_heads, mlp_dim):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, num_heads, 1 + N, ...)

    def forward(self, x):
        h = self.norm1(x)  # (B, 1 + N, D)
        q = self.split_heads(self.query(h))
        k = self.split_heads(self.key(h))
        v = self.split_heads(self.value(h))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, num_heads, 1 + N, D / num_heads)
        x = x + self.proj(h.transpose(1, 2).flatten(2))  # (B, 1 + N, D)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # (B, 1 + N, D)
        return x


class Decoder(nn.Module):
    """MAE-style ViT: tokens (B, N, C) -> images (B, 3, H, W) with H = W = grid_size * patch_size.

    Predicts pixels in the encoder's normalized space; Encoder.denormalize undoes that. As in MAE, a
    CLS token is prepended, and dropped at the output.
    """

    def __init__(self, latent_dim, grid_size, patch_size, width, depth, num_heads, mlp_dim):
        super().__init__()
        from timm.layers import build_sincos2d_pos_embed

        self.latent_dim = latent_dim
        self.grid_size = grid_size
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.decoder_embed = nn.Linear(latent_dim, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # Learned; initialized to 2-D sin-cos positions, with zeros for the CLS token.
        pos_embed = F.pad(build_sincos2d_pos_embed([grid_size, grid_size], width), (0, 0, 1, 0))
        self.decoder_pos_embed = nn.Parameter(pos_embed[None])  # (1, 1 + N, D)
        layers = [DecoderBlock(width, num_heads, mlp_dim) for _ in range(depth)]
        self.decoder_layers = nn.ModuleList(layers)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, patch_size**2 * 3)
        self.checkpoint_activations = False  # True: recompute blocks in backward to save memory

    def forward(self, tokens):
        # The residual stream stays in float32, even under autocast.
        x = self.decoder_embed(tokens).float()  # (B, N, D)
        cls = self.trainable_cls_token.expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1) + self.decoder_pos_embed  # (B, 1 + N, D)
        for layer in self.decoder_layers:
            if self.checkpoint_activations:
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)  # (B, 1 + N, D)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()  # (B, N, p p 3)

        # Unpatchify: the p p 3 numbers of a token are its pixels by row, column, color.
        h = self.grid_size
        p = self.patch_size
        x = x.view(-1, h, h, p, p, 3).permute(0, 5, 1, 3, 2, 4)  # (B, 3, h, p, w, p)
        return x.flatten(4).flatten(2, 3)  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# The autoencoder


class RAE(nn.Module):
    """Encoder, decoder, and the statistics that normalize the latents between them.

    mean and var, (C, h, w), are computed over the training set, one value per channel and position.
    Diffusion trains on z = (tokens - mean) / sqrt(var + 1e-5), the decoder on (noisy) tokens.
    """

    def __init__(self, encoder, decoder, mean, var):
        super().__init__()
        encoder_shape = (encoder.latent_dim, encoder.grid_size, encoder.grid_size)
        decoder_shape = (decoder.latent_dim, decoder.grid_size, decoder.grid_size)
        if not encoder_shape == decoder_shape == mean.shape == var.shape:
            raise UsageError("encoder, decoder and latent statistics differ in shape")
        self.encoder = encoder
        self.decoder = decoder
        self.image_size = decoder.grid_size * decoder.patch_size  # of decoded images
        # Statistics are stored as (C, h, w), as in the official files; tokens are (N, C).
        self.register_buffer("latent_mean", mean.flatten(1).T.contiguous())
        self.register_buffer("latent_std", (var + 1e-5).sqrt().flatten(1).T.contiguous())

    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> latents z (B, N, C)."""
        return (self.encoder(images) - self.latent_mean) / self.latent_std

    def decode(self, z):
        """Latents z (B, N, C) -> images (B, 3, H, W), roughly in [0, 1]: clamp before use."""
        return self.encoder.denormalize(self.decoder(z * self.latent_std + self.latent_mean))


def hash_tensors(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# Loading and saving

# The official files, all in one repository on the Hugging Face Hub.
HUB = "nyu-visionx/RAE-collections"
HUB_REVISION = "1be4f03273523431f099a934da4cf1940dc6039f"
RELEASED_DECODERS = {  # name: encoder, folder, decoder, statistics
    "dinov2-s": ("dinov2-s", "dinov2/wReg_small", "ViTXL_n08", "imagenet1k"),
    "dinov2-b": ("dinov2-b", "dinov2/wReg_base", "ViTXL_n08", "imagenet1k"),
    "dinov2-b-512": ("dinov2-b", "dinov2/wReg_base", "ViTXL_n08_i512", "imagenet1k_512"),
    "dinov2-l": ("dinov2-l", "dinov2/wReg_large", "ViTXL_n08", "imagenet1k"),
    "siglip2-b": ("siglip2-b", "siglip2/base_p16_i256", "ViTXL_n08", "ImageNet1k"),
    "mae-b": ("mae-b", "mae/base_p16", "ViTXL_n08", "ImageNet1k"),
}
# (our name, official name). The official decoder uses Hugging Face's ViT names. fc2 comes last
# because proj's official name contains fc2's. extras/to_official.py renames the other way.
OFFICIAL_NAMES = [
    ("norm1.", "layernorm_before."),
    ("query.", "attention.attention.query."),
    ("key.", "attention.attention.key."),
    ("value.", "attention.attention.value."),
    ("proj.", "attention.output.dense."),
    ("norm2.", "layernorm_after."),
    ("fc1.", "intermediate.dense."),
    ("fc2.", "output.dense."),
]


def find_file(name):
    """Resolve a model name to a local path. name: a path, "toy" (its decoder), "released:NAME" with
    a key of RELEASED_DECODERS, or "released:FOLDER" for a DiT, such as ImageNet256/DiTDH-XL.
    """
    if name == "toy":
        return TOY / "decoder.pt"
    if not str(name).startswith("released:"):
        return name
    name = name.removeprefix("released:")
    if "/" in name:
        return download(f"DiTs/Dinov2/wReg_base/{name}/stage2_model.pt")
    if name not in RELEASED_DECODERS:
        raise UsageError(f"released:{name}: choose from {', '.join(RELEASED_DECODERS)}")
    _, folder, decoder, _ = RELEASED_DECODERS[name]
    return download(f"decoders/{folder}/{decoder}/model.pt")


def download(file):
    """Download a file of the official repository once; returns its local path."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(HUB, file, revision=HUB_REVISION)
    except OSError as error:
        raise UsageError(f"cannot download {file} from huggingface.co/{HUB}: {error}") from error


def load(path):
    """Load a dict saved with torch.save, without running pickled code."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many types; its messages are pages long
        raise UsageError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error


def atomic_save(content, path):
    """torch.save through a temporary file, so that a crash midway leaves the old file intact."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def make_folder(path):
    """Create a folder. If we can't write to it, fail now rather than at the first save."""
    Path(path).mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path}: no permission to write")


def load_timm(model, weights=None, **options):
    """A timm model without its classifier. weights: a local file to read instead of downloading."""
    import timm

    overlay = {"file": weights} if weights else None
    try:
        # Load with the classifier: in a model built without one, timm ignores missing tensors.
        net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # the hub's client, torch and timm raise many types
        raise UsageError(f"cannot load {model} from {weights or 'timm'}: {error}") from error
    net.reset_classifier(0)
    return net


def load_encoder(name, image_size, weights=None):
    """The frozen Encoder for images of image_size px.

    name: "toy", a file written by extras/pretrain_encoder.py, a key of ENCODERS, or "timm:MODEL".
    weights: a local file of the timm model's weights.
    """
    from timm.models.vision_transformer import VisionTransformer

    path = TOY / "encoder.pt" if name == "toy" else Path(name)
    if path.is_file():
        file = load(path)
        if "vit" not in file:
            raise UsageError(f"{name}: not an encoder written by extras/pretrain_encoder.py")
        vit = VisionTransformer(**file["vit"])
        vit.load_state_dict(file["state_dict"])
        return Encoder(vit, image_size, file["mean"], file["std"])

    if name not in ENCODERS and not name.startswith("timm:"):
        raise UsageError(f"encoder {name}: neither a file nor timm:MODEL nor one of {[*ENCODERS]}")
    model, antialias, options = ENCODERS.get(name, (name.removeprefix("timm:"), True, {}))
    vit = load_timm(model, weights, **options)
    if not isinstance(vit, VisionTransformer):
        raise UsageError(f"encoder {name}: not a plain ViT")
    # Patch-14 encoders get 256 px images resized to 224, which also gives 16 x 16 tokens.
    patch_size = vit.patch_embed.patch_size[0]
    input_size = image_size * 14 // 16 if patch_size == 14 else image_size
    cfg = vit.pretrained_cfg
    return Encoder(vit, input_size, cfg["mean"], cfg["std"], antialias)


def load_decoder(file, name="decoder"):
    """Build the Decoder from a loaded file, in eval mode.

    file: a checkpoint of train_decoder.py (its EMA is used), or a state dict with the official
    names. Sizes are read from tensor shapes, except the number of heads.
    """
    state = file.get("ema") or file
    # The last two pairs strip the prefixes that DDP and torch.compile add.
    for ours, official in [*OFFICIAL_NAMES, ("", "module."), ("", "_orig_mod.")]:
        state = {key.replace(official, ours): tensor for key, tensor in state.items()}
    if "decoder_embed.weight" not in state:
        raise UsageError(f"{name}: not an RAE decoder (no decoder_embed.weight)")
    width, latent_dim = state["decoder_embed.weight"].shape
    known_heads = {size[0]: size[2] for size in DECODERS.values()}
    decoder = Decoder(
        latent_dim=latent_dim,
        grid_size=math.isqrt(state["decoder_pos_embed"].shape[1] - 1),
        patch_size=math.isqrt(state["decoder_pred.bias"].shape[0] // 3),
        width=width,
        depth=sum(key.endswith("fc1.bias") for key in state),
        num_heads=int(file.get("num_heads") or known_heads[width]),
        mlp_dim=state["decoder_layers.0.fc1.bias"].shape[0],
    )
    decoder.load_state_dict(state)
    return decoder.eval()


def load_rae(decoder, encoder=None, encoder_weights=None, stats=None, device="cpu"):
    """Load a decoder ("toy", "released:NAME" or a path) with its encoder and statistics, frozen.

    Our checkpoints store encoder and statistics, and released:NAME implies them. A local official
    file needs `encoder`, a name for load_encoder, and `stats`, the path of its statistics.
    """
    name = str(decoder)
    file = load(find_file(name))
    decoder_vit = load_decoder(file, name)
    if name.startswith("released:"):
        official_encoder, folder, _, data = RELEASED_DECODERS[name.removeprefix("released:")]
        encoder = encoder or official_encoder
        stats = stats or download(f"stats/{folder}/{data}/stat.pt")
    encoder = encoder or file.get("encoder")
    statistics = load(stats) if stats else file
    if encoder is None or "var" not in statistics:
        raise UsageError(f"{name}: no encoder or latent statistics; pass --encoder and --stats")

    # Official decoders have one token per 16 px of the encoded image.
    image_size = file.get("encoder_image_size", 16 * decoder_vit.grid_size)
    encoder_vit = load_encoder(encoder, image_size, encoder_weights or file.get("encoder_weights"))
    var = statistics["var"]
    mean = statistics.get("mean", torch.zeros_like(var))  # some official files lack it
    rae = RAE(encoder_vit, decoder_vit, mean, var)
    rae.latent_hash = encoder_vit.latent_hash(mean, var)
    if stats is None and file.get("latent_hash") not in (None, rae.latent_hash):  # None: converted
        raise UsageError(f"{name} was trained with another encoder; pass that one, or retrain")
    return rae.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# Images

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
IMAGE_SUFFIXES = {s for s, f in Image.registered_extensions().items() if f in IMAGE_FORMATS}


def open_image(path):
    """Read an image file as RGB: EXIF-rotated, transparency over white, 16 bits scaled to 8."""
    try:
        if not os.path.isfile(path):
            raise ValueError("not a regular file")  # opening a named pipe would wait forever
        image = Image.open(path, formats=IMAGE_FORMATS)
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError("32-bit pixels are not supported")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit gray, which older Pillow opens in mode I
            pixels = np.asarray(image)
            if pixels.max() < 4096:
                warnings.warn(f"{path} is 16-bit but has no value above 4,095; it will look dark")
            image = Image.fromarray((pixels / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises many types for broken files
        raise UsageError(f"{str(path)!r} cannot be read as an image: {error}") from error


def center_crop(image, size, generator=None):
    """The central size x size square of a PIL image, as in ADM (Dhariwal and Nichol 2021): halve by
    averaging while the short side is at least 2 * size, resize it to size (bicubic), then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    image = ImageOps.scale(image, size / min(image.size), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def list_images(root):
    """The paths of all images below a folder, sorted. Names that begin with a dot are skipped."""
    images = []
    others = []
    for name in sorted(glob.glob("**", root_dir=root, recursive=True)):
        path = os.path.join(root, name)
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            images.append(path)
        elif os.path.isfile(path):
            others.append(path)
    if not images:
        raise UsageError(f"{root}: no such folder, or no images in it")
    if others:
        print0(f"{root}: skipped {len(others)} files that are not images, such as {others[0]!r}")
    return images


class ImageFolder(Dataset):
    """The images below a folder; each folder that contains images is one class. Item i is a center
    crop (3, size, size), uint8. For training, `load` applies crop(image, size, generator) instead,
    and mirrors the image if flip is true.
    """

    def __init__(self, root, size, crop=center_crop):
        self.size = size
        self.crop = crop
        self.paths = list_images(root)
        names = [os.path.relpath(path, root) for path in self.paths]
        folders = [os.path.dirname(name) for name in names]
        self.classes = sorted(set(folders))
        self.labels = np.searchsorted(self.classes, folders)  # (number of images,)
        self.fingerprint = hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:16]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = center_crop(open_image(self.paths[i]), self.size)
        return np.array(image).transpose(2, 0, 1)

    def load(self, i, generator, flip):
        image = self.crop(open_image(self.paths[i]), self.size, generator)
        pixels = np.array(image).transpose(2, 0, 1)  # (3, size, size)
        return pixels[:, :, ::-1] if flip else pixels


def open_data(data, size, split="train", crop=center_crop):
    """Open the data set given by --data: "toy" or a folder."""
    return ToyShapes(split, size) if data == "toy" else ImageFolder(data, size, crop)


def read_batches(data, batches, workers, device):
    """Yield images (B, 3, H, W) in [0, 1] for each of `batches`, lists of indices."""
    for images in progress(DataLoader(data, batch_sampler=batches, num_workers=workers), "images"):
        yield images.to(device).float() / 255


# ---------------------------------------------------------------------------------------------
# Plumbing: random numbers, processes, the log, flags
#
# Every random draw is a function of its place in the run: (seed, step, row of the global batch) in
# training, (seed, index) in sampling, (seed, epoch) for the data order. So no random state has to
# be saved, a resumed run makes the same draws, and 1 GPU and 8 GPUs train on the same noise.


def seeded_generator(*key, device="cpu"):
    """A generator seeded by purpose and place in the run, such as ("noise", seed, step, row)."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))


def seeded_noise(keys, shape, device):
    """Standard normal noise (len(keys), *shape); every row has its own key."""
    noise = []
    for key in keys:
        generator = seeded_generator(*key, device=device)
        noise.append(torch.randn(shape, generator=generator, device=device))
    return torch.stack(noise)


def setup_distributed(args):
    """Join torchrun's processes, if any, and set up device and precision.

    Returns rank, world_size, device and the autocast context of the trained networks.
    """
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # Import timm first: imported after joining, it keeps the group alive, which crashes gloo.
        import timm  # noqa: F401

        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # time for rank 0's evaluation

    # bf16 computes matrix products in bfloat16 (autocast); weights, norms, residual streams and
    # losses stay in float32. tf32 (on in bf16 mode too) rounds only the inputs of float32 products.
    precision = args.precision
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave NaN in bf16 with torch 2.13
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    print0(f"{device.type} x {world_size}, {precision}")
    return get_rank(), world_size, device, autocast


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def print0(text):
    """Print on rank 0 only. A closed pipe (`| head`) or a full disk does not end the run."""
    if get_rank() == 0:
        try:  # a path's bytes that are not UTF-8 print as question marks
            print(str(text).encode(errors="replace").decode(), flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(batches, description):
    """A progress bar on rank 0, if stderr is a terminal."""
    return tqdm(batches, description, disable=None if get_rank() == 0 and sys.stderr else True)


def rank_batches(n, batch_size):
    """Split range(n) into batches, the same for any world size, and return this rank's share."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    starts = range(get_rank() * batch_size, n, world_size * batch_size)
    batches = []
    for start in starts:
        batches.append(range(start, min(start + batch_size, n)))
    return batches


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d is our addition: it lets a short run forget its initial weights.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def load_optimizer(optimizer, saved):
    """Load AdamW's moments from a checkpoint. Settings such as betas keep their current values."""
    parameters = optimizer.param_groups[0]["params"]
    for i, moments in saved["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            # view_as checks sizes. The fused kernel does not, and would write out of bounds.
            moment = moments[name].view_as(parameters[i])
            moments[name] = torch.empty_like(parameters[i]).copy_(moment)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})


def check_same_run(out, saved, settings):
    """Raise UsageError unless the run in `out` used these settings."""
    for name in sorted(saved.keys() | settings.keys()):
        there, here = saved.get(name), settings.get(name)
        if there != here:
            message = f"{out} holds a run with {name} {there}, not {here}; choose another --out"
            raise UsageError(f"{message} (or train from its weights with --init)")


def open_log(out, step):
    """Open out/log.jsonl to append, after dropping lines beyond the checkpoint's step."""
    path = Path(out, "log.jsonl")
    if step == 0 and path.exists():  # left by a run killed before its first save, or not ours
        os.replace(path, f"{path}.old")
    log = open(path, "a+b")
    log.seek(0)
    end = 0
    for line in log:
        match = re.match(rb'{"step": (\d+)', line)
        if not line.endswith(b"\n") or (match and int(match[1]) > step):
            break  # a later step, or a line cut short by a kill
        end += len(line)
    log.truncate(end)
    return log


def write_log(log, numbers):
    """Append a dict of numbers as a JSON line, and print the scalars. "step" comes first."""
    log.write(json.dumps(numbers).encode() + b"\n")
    log.flush()
    scalars = []
    for name, value in numbers.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        if not isinstance(value, list):
            scalars.append(f"{name} {value}")
    print0("  ".join(scalars))


def bounded(low, high=sys.float_info.max, kind=float):
    """argparse type: a number in [low, high]."""

    def parse(text):
        if not low <= kind(text) <= high:  # also false for NaN
            limit = f" and at most {high:g}" if high < 1e18 else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low:g}{limit}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


positive_int = bounded(1, 2**62, int)
non_negative_int = bounded(0, 2**62, int)


def available_devices():
    devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name, available in devices.items() if available] + ["cpu"]  # fastest first


def parse_args(parser, presets):
    """Add the flags that all scripts share, and parse the command line. --preset selects the other
    flags' defaults (--help shows toy's). Flags that only toy sets are None under other presets.
    """
    devices = available_devices()
    precisions = ["auto", "fp32", "tf32", "bf16"]
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--preset", choices=presets, default="toy", help="other flags' defaults")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="random seed")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--precision", choices=precisions, default="auto", help="bf16 if native")
    parser.set_defaults(**presets["toy"])
    preset = presets[parser.parse_args().preset]  # this first pass also handles --help
    parser.set_defaults(**(dict.fromkeys(presets["toy"]) | preset))
    return parser.parse_args()


def run_script(main):
    """Run main(). Print a UsageError as one line, and on Ctrl-C say how to resume."""
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # a rank that exits early can crash the others
            dist.destroy_process_group()
    except (UsageError, PermissionError, FileExistsError, NotADirectoryError) as error:
        # A DataLoader worker puts its whole traceback in the message.
        message = str(error).split("UsageError: ")[-1]
        sys.exit(f"error: {' '.join(message.split())}")
    except RuntimeError as error:
        # torch.compile (CPU) and Triton (GPU) raise this at the end of a page of traceback.
        if not re.search("InvalidCxxCompiler|Failed to find C compiler", str(error)):
            raise
        sys.exit("error: torch.compile needs a C++ compiler; install one, or pass --no-compile")
    except KeyboardInterrupt:
        print0("stopped; training and sampling resume with the same command")
        sys.exit(130)
