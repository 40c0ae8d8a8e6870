"""Representation autoencoder: frozen encoder, trained ViT decoder (arXiv 2510.11690, section 3).

    from rae import load_rae
    rae = load_rae("assets/toy_decoder.pt")            # the decoder's file names its encoder
    z = rae.encode(images)                        # (B, 3, H, W) in [0, 1] -> (B, N, C), mean 0 and variance 1
    images = rae.decode(z)                             # (B, N, C) -> (B, 3, H, W)
Letters, the same in every file:
    B batch      N tokens = h w     C latent channels    D width    H W pixels    h w latent grid    p patch
    t time, 0 data to 1 noise       z latent        x_t = (1 - t) z + t eps    v = eps - z    eps ~ N(0, I)
    alpha schedule shift            tau the decoder's latent noise
"""

import argparse, hashlib, json, math, os, signal, sys, time
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import mode
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent / "assets"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # of torchrun
DEVICES = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}

def check(fine, message):
    """A user's mistake: ValueError with one line, which `cli` prints."""
    if not fine:
        raise ValueError(message)

# ----------------------------------------------------------------------------------------------------- images
def center_crop(image, size, short=None, rng=None):
    """Centre, or with rng any square, of a PIL image whose short side became `short` (default: size) as ADM
    does it: halved by BOX while twice that, then BICUBIC."""
    short = short or size
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = short / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (int(rng.integers(r - size + 1)) if rng else (r - size) // 2 for r in image.size)
    return image.crop((left, top, left + size, top + size))

def to_uint8(images):
    """Float images in [0, 1] to uint8 by rounding; the released code truncates, half a grey level darker."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)

def read_image(path, size, short=None, rng=None):
    """(3, size, size) uint8 of an image file, cropped."""
    try:
        image = Image.open(path).convert("RGB")
    except Exception as e:                             # PIL raises half a dozen kinds for broken files
        raise ValueError(f"{path}: not readable as an image ({e})") from None
    return np.asarray(center_crop(image, size, short, rng)).transpose(2, 0, 1)

class ImageFolder:
    """Images below a folder, whose folders are the classes; a flat one is one. With `short` crops are random.
    An image that cannot be read stops the run: to skip it would silently change which images a step sees."""
    def __init__(self, root, size, short=None):
        self.size, self.short = size, short
        self.files = sorted(f for f in Path(root).rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        check(self.files, f"{root}: no {'images in this' if Path(root).is_dir() else 'such'} folder")
        folders = [f.relative_to(root).parent.as_posix() for f in self.files]
        self.classes, self.labels = sorted(set(folders)), np.unique(folders, return_inverse=True)[1]
    def __len__(self):
        return len(self.files)
    def load(self, index, rng, flip=False):
        """(3, H, W) uint8."""
        image = read_image(self.files[index], self.size, self.short, rng if self.short else None)
        return image[:, :, ::-1 if flip else 1]
    def fingerprint(self):
        """Hash of the files' names, sizes and times of change, and of the crop."""
        about = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files], self.size, self.short
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

def open_data(data, size, split="train", short=None):
    """--data as a data set, with classes, labels, fingerprint() and load(index, rng, flip)."""
    if data == "toy":
        from assets.toy_world import ToyShapes
        return ToyShapes(split, size)
    return ImageFolder(data, size, short)

def read_images(data, indices, device):
    """Centre crops (n, 3, H, W) in [0, 1] of the images of those numbers."""
    return torch.from_numpy(np.stack([data.load(i, None) for i in indices])).to(device).float() / 255

# ------------------------------------------------------------------------------------------------ the encoder
IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
# name: (timm model, encoder input per image pixel, (mean, std), antialiased positions, more for timm)
ENCODERS = {
    **{f"dinov2-{size[0]}": (f"vit_{size}_patch14_reg4_dinov2.lvd142m", 14 / 16, IMAGENET, True, {})
       for size in ("small", "base", "large")},
    "siglip2-b": ("vit_base_patch16_siglip_256.v2_webli", 1, HALF, False, {"act_layer": "gelu_tanh"}),
    "mae-b": ("vit_base_patch16_224.mae", 1, IMAGENET, False, {}),
    "dino-s8": ("vit_small_patch8_224.dino", 1, IMAGENET, True, {"act_layer": "gelu_tanh"})}   # stage 1's D
UNUSED = ("head.", "fc_norm.", "attn_pool.")            # parts of a ViT that an encoder never runs

def fingerprint(tensors):
    """Short hash of a dict of tensors: what a decoder is bound to, and what a diffusion model."""
    digest = hashlib.sha256()
    for key, value in tensors.items():
        digest.update(key.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

class Encoder(nn.Module):
    """A frozen timm VisionTransformer: images (B, 3, H, W) in [0, 1] -> tokens (B, N, C), normed without
    weights (appendix C). It sees input_size px; positions are resized, for MAE and SigLIP2 unantialiased."""
    def __init__(self, vit, input_size, mean, std, antialias=True, image_size=None):
        super().__init__()
        from timm.layers import resample_abs_pos_embed
        patch = vit.patch_embed.patch_size[0]
        check(input_size % patch == 0, f"encoder input {input_size} is not a multiple of its patch {patch}")
        self.vit, self.input_size, self.grid, self.dim = vit, input_size, input_size // patch, vit.embed_dim
        self.image_size = image_size or input_size     # of the images that it is given
        if vit.pos_embed is not None:
            prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
            vit.pos_embed = nn.Parameter(resample_abs_pos_embed(
                vit.pos_embed.detach(), [self.grid] * 2, num_prefix_tokens=prefix, antialias=antialias))
        vit.patch_embed.set_input_size((input_size, input_size))
        vit.norm = nn.LayerNorm(self.dim, eps=getattr(vit.norm, "eps", 1e-6), elementwise_affine=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()
    def train(self, mode=True):
        return super().train(False)                    # frozen: dropout and drop path stay off
    @cached_property
    def fingerprint(self):                             # of the weights in use
        return fingerprint({k: v for k, v in self.vit.state_dict().items() if not k.startswith(UNUSED)})
    def forward(self, images):
        images = F.avg_pool2d(images, images.shape[-1] // self.image_size or 1)   # for upsampling (6.1)
        if images.shape[-1] != self.input_size:
            images = F.interpolate(images, [self.input_size] * 2, mode="bicubic", align_corners=False)
        tokens = self.vit.forward_features((images - self.mean) / self.std)           # (B, prefix + N, C)
        return tokens[:, self.vit.num_prefix_tokens:].float()                         # (B, N, C)

def load_timm(model, weights, flag, unused=(), **extra):
    """A timm model, its weights fetched or from a file in timm's names, where `unused` may be missing."""
    import timm
    try:
        net = timm.create_model(model, pretrained=weights is None, num_classes=0, **extra)
    except Exception as e:                             # the hub client alone raises a dozen kinds
        raise ValueError(f"{model}: not in timm, not a plain ViT, or the weights of {model} cannot be had "
                         f"({' '.join(str(e).split())}): download them and pass {flag} FILE") from None
    if weights is not None:
        state = {k: v for k, v in read_file(weights).items() if not k.startswith(unused)}
        load_strict(net, {k: v for k, v in net.state_dict().items() if k.startswith(unused)} | state, weights)
    return net

def build_encoder(name, image_size, weights=None, flag="--encoder-weights"):
    """Encoder by name: one of ENCODERS, toy, timm:MODEL, or a file written by assets/pretrain_encoder.py.
    weights (its flag is for errors): a local file in timm's names instead of the download."""
    from timm.models.vision_transformer import VisionTransformer
    if name not in ENCODERS and not name.startswith("timm:"):
        path = ASSETS / "toy_encoder.pt" if name == "toy" else Path(name)
        file = read_file(path) if path.is_file() else {}
        what = "not an encoder file" if file else "no such file"
        check("vit" in file, f"encoder {name}: {what}, nor toy, timm:MODEL, {', '.join(ENCODERS)}")
        vit = VisionTransformer(**file["vit"])
        load_strict(vit, file["state_dict"], name)
        return Encoder(vit, image_size, file["mean"], file["std"])
    unlisted = name.removeprefix("timm:"), None, None, True, {}
    model, ratio, norm, antialias, extra = ENCODERS.get(name, unlisted)
    vit = load_timm(model, weights, flag, UNUSED, dynamic_img_size=True, **extra)
    check(isinstance(vit, VisionTransformer), f"encoder {name}: {model} is not a plain ViT")
    patch = vit.patch_embed.patch_size[0]
    ratio = ratio or (1 if image_size % patch == 0 else patch / 16)
    norm = norm or (vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])
    return Encoder(vit, round(image_size * ratio), *norm, antialias, image_size)

# ------------------------------------------------------------------------------------------------ the decoder
# (width, depth, heads, MLP dim); the published decoder is XL, whose MLP is narrower than 4 x width.
DECODERS = dict(toy=(128, 3, 4, 512), B=(768, 12, 12, 3072), L=(1024, 24, 16, 4096), XL=(1152, 28, 16, 4096))

def dense(n, out):
    return nn.ModuleDict({"dense": nn.Linear(n, out)})

class DecoderBlock(nn.Module):
    """Pre-norm attention and GELU MLP on x (B, 1 + N, D), in the names of transformers' ViT."""
    def __init__(self, width, heads, mlp_dim):
        super().__init__()
        self.heads = heads
        qkv = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.attention = nn.ModuleDict({"attention": qkv, "output": dense(width, width)})
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)
        self.intermediate, self.output = dense(width, mlp_dim), dense(mlp_dim, width)
    def forward(self, x):
        h = self.layernorm_before(x)
        q, k, v = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for m in self.attention["attention"].values())                     # (B, heads, 1 + N, d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](h)                                  # (B, 1 + N, D)
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))

class Decoder(nn.Module):
    """MAE-style ViT in released names: raw tokens (B, N, C) -> images (B, 3, H, W) in normalised colours."""
    def __init__(self, latent_dim, grid, patch_size, width, depth, heads, mlp_dim):
        super().__init__()
        check(width % 4 == width % heads == 0, f"decoder width {width}: no multiple of 4 and {heads} heads")
        self.config = dict(latent_dim=latent_dim, grid=grid, patch_size=patch_size, width=width, depth=depth,
                           heads=heads, mlp_dim=mlp_dim)
        self.latent_dim, self.grid, self.patch_size = latent_dim, grid, patch_size
        self.decoder_embed = nn.Linear(latent_dim, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(F.pad(sincos_2d(width, grid), (0, 0, 1, 0))[None])   # cls at 0
        self.decoder_layers = nn.ModuleList([DecoderBlock(width, heads, mlp_dim) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, patch_size ** 2 * 3)
        self.checkpoint_activations = False            # True: blocks run again in the backward pass
    def forward(self, tokens):
        cls = self.trainable_cls_token.expand(len(tokens), -1, -1)
        x = torch.cat([cls, self.decoder_embed(tokens).float()], 1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoint_activations else layer(x)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()                    # (B, N, p p 3)
        x = x.view(-1, self.grid, self.grid, self.patch_size, self.patch_size, 3)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                   # (B, 3, H, W)

def sincos_2d(dim, grid):
    """2-D sin-cos positions (N, dim): first half of the channels for the column, second for the row."""
    freq = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * freq                   # (grid, dim / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                               # (grid, dim / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=1).float()

# ---------------------------------------------------------------------------------------------- both together
class RAE(nn.Module):
    """Encoder and decoder with the tokens' mean and var (C, h, w), or none, between them. In train() mode the
    tokens get noise (4.3) of sigma = tau U(0, 1), as released, or |N(0, tau^2)|, the paper's half-normal."""
    def __init__(self, encoder, decoder, mean=None, var=None, tau=0.0, noise_dist="uniform"):
        super().__init__()
        shape = encoder.dim, encoder.grid, encoder.grid
        check((decoder.latent_dim, decoder.grid) == shape[:2], "decoder and encoder do not fit: channels "
              f"{decoder.latent_dim} and {encoder.dim}, grid {decoder.grid} and {encoder.grid}")
        mean = torch.zeros(shape) if mean is None else mean
        std = torch.ones(shape) if var is None else (var + 1e-5).sqrt()
        for name, stat in (("mean", mean), ("std", std)):
            check(stat.shape == shape, f"statistics {name} have shape {tuple(stat.shape)}, not {shape}")
            self.register_buffer(name, stat.flatten(1).T.contiguous().float())        # (N, C)
        self.encoder, self.decoder, self.tau, self.noise_dist = encoder, decoder, tau, noise_dist
    def fingerprint(self):                             # of the latent space: encoder and statistics
        return fingerprint({self.encoder.fingerprint: torch.zeros(0), "mean": self.mean, "std": self.std})
    def noised(self, tokens, generators=None):
        """Raw tokens (B, N, C), in train() mode with noise, from one generator per image or torch's own."""
        if not (self.training and self.tau):
            return tokens
        draw, kw = torch.rand if self.noise_dist == "uniform" else torch.randn, dict(device=tokens.device)
        noise = [draw(1, generator=g, **kw).abs() * torch.randn(tokens.shape[1:], generator=g, **kw)
                 for g in generators or [None] * len(tokens)]
        return tokens + self.tau * torch.stack(noise)                                 # (B, N, C)
    def normalise(self, tokens):
        """Raw tokens (B, N, C) -> latents z (B, N, C) of mean 0 and variance 1."""
        return (tokens - self.mean) / self.std
    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> normalised latents z (B, N, C)."""
        return self.normalise(self.noised(self.encoder(images)))
    def draw(self, tokens):
        """Raw tokens (B, N, C) -> images (B, 3, H, W), about [0, 1], not clamped."""
        return self.decoder(tokens) * self.encoder.std + self.encoder.mean
    def decode(self, z):
        """Normalised latents (B, N, C) -> images (B, 3, H, W), about [0, 1], not clamped."""
        return self.draw(z * self.std + self.mean)

def encoded(encoder, data, batch_size, device):
    """This process's share of a data set's raw tokens, centre crops: (indices (b,), flip, (b, N, C))."""
    mine = range(RANK, len(data), WORLD)
    for start in progress(range(0, len(mine), batch_size), batch_size):
        chosen = mine[start:start + batch_size]
        images = read_images(data, chosen, device)                                    # (b, 3, H, W)
        for flip in (0, 1):
            yield chosen, flip, encoder(images.flip(-1) if flip else images)

def latent_statistics(encoder, data, batch_size, device):
    """Exact mean and population variance (C, h, w) of the tokens of a data set in both flips, in float64.
    The released running average depends on the order and is wrong on small sets."""
    sums = torch.zeros(2, encoder.grid ** 2, encoder.dim, dtype=torch.float64)
    for *_, tokens in encoded(encoder, data, batch_size, device):
        tokens = tokens.cpu().double()                                                # (b, N, C)
        sums += torch.stack([tokens.sum(0), tokens.square().sum(0)])
    average([sums])
    mean, square = sums * WORLD / (2 * len(data))
    var = (square - mean ** 2).clamp(min=0)
    return [s.T.unflatten(1, (encoder.grid, encoder.grid)).float() for s in (mean, var)]

# ------------------------------------------------------------------------------------------------------ files
# A decoder file is a plain state dict in the released names, or a checkpoint of train_decoder.py, which nests
# one under "ema" beside "mean" and "var" (C, h, w), the encoder's name and its hash, never the encoder.
def load_released_decoder(state_dict_or_path, heads=None):
    """Decoder from a state dict or file in the released names; sizes are the shapes', heads a known width's.
    What else a checkpoint of ours holds is in the result's `about`. ValueError names a wrong tensor."""
    file, where = state_dict_or_path, "state dict"
    if not isinstance(file, dict):
        file, where = read_file(file), str(file)
    state = file.get("ema", file)
    check("final_layer.linear.bias" not in state, f"{where}: a diffusion model, not an RAE decoder")
    def size(axis, *names):
        """What most tensors of these names say, so that one wrong tensor is the one that is named."""
        votes = [v.shape[axis] for k, v in state.items() if k.endswith(names) and v.ndim > axis]
        check(votes, f"{where}: not an RAE decoder, tensor {names[0]} is missing")
        return mode(votes)
    width = size(0, "decoder_norm.weight", "layernorm_before.weight", "layernorm_after.weight")
    known = {w: h for w, _, h, _ in DECODERS.values()}.get(width)
    heads = heads or file.get("config", {}).get("heads", known)
    check(heads, f"{where}: a decoder of width {width} is of no known size; pass heads")
    grid, pixels = math.isqrt(size(1, "decoder_pos_embed") - 1), size(0, "decoder_pred.bias", "pred.weight")
    depth = len({k.split(".")[1] for k in state if k.startswith("decoder_layers.")})
    decoder = Decoder(size(1, "decoder_embed.weight"), grid, math.isqrt(pixels // 3), width, depth, heads,
                      size(0, "intermediate.dense.weight", "intermediate.dense.bias"))
    load_strict(decoder, state, where)
    about = "encoder", "encoder_hash", "image_size", "mean", "var", "settings"
    decoder.about = {k: file[k] for k in about if k in file}
    return decoder.eval()

def load_strict(module, state, where):
    """Copy `state` into a module; ValueError names missing, unexpected and misshapen tensors."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"{where}: {' '.join(str(e).split())}") from None

def read_file(path):
    """Tensors and plain values of a .pt or .safetensors file; code in a pickle is refused, never run."""
    check(Path(path).is_file(), f"{path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:                       # torch and safetensors raise a dozen kinds for a broken file
        raise ValueError(f"{path}: cannot be read, truncated, or refused for holding more than tensors "
                         f"({type(e).__name__})") from None

def released_file(name, kind=0):
    """Local path of released:NAME (fetched once from Hugging Face), of "toy", or of a path."""
    if not str(name).startswith("released:"):
        return ASSETS / "toy_decoder.pt" if name == "toy" else name
    files = json.loads((ASSETS / "released.json").read_text())        # name: [file] or [decoder, statistics]
    check(name[9:] in files, f"{name}: not released; names are {', '.join(files)}")
    from huggingface_hub import hf_hub_download
    repository, file = "nyu-visionx/RAE-collections", files[name[9:]][kind]
    try:
        return hf_hub_download(repository, file)
    except Exception as e:
        raise ValueError(f"{name}: cannot be fetched ({type(e).__name__}); download {file} of huggingface.co/"
                         f"{repository} elsewhere and pass its path") from None

def load_rae(decoder, encoder=None, encoder_weights=None, stats=None, device="cpu"):
    """RAE of a checkpoint of ours, "released:NAME", or a bare file, which needs an encoder and stats."""
    name, decoder = str(decoder), load_released_decoder(released_file(decoder))
    about = decoder.about
    if name.startswith("released:"):
        encoder, stats = encoder or name[9:].removesuffix("-512"), stats or released_file(name, 1)
    encoder = encoder or about.get("encoder")
    check(encoder, f"{name}: the file does not name its encoder; pass --encoder and --stats")
    weights = encoder_weights or about.get("settings", {}).get("encoder_weights")
    frozen = build_encoder(encoder, about.get("image_size", 16 * decoder.grid), weights)
    theirs, ours = about.get("encoder_hash", frozen.fingerprint), frozen.fingerprint
    check(theirs == ours, f"{name}: made for encoder weights {theirs}, not {ours}: restore them, or retrain")
    stat = read_file(stats) if stats else about
    check("var" in stat, f"{stats or name}: no latent statistics (var, mean) in it; pass --stats FILE")
    return RAE(frozen, decoder, stat.get("mean"), stat["var"]).to(device).eval().requires_grad_(False)

# ------------------------------------------------------------------------------ what the training loops share
# Every random draw is a function of (seed, step, position in the global batch), and the data order of (seed,
# epoch): nothing random is stored, a resumed run is exact, and one process and eight do the same run.
def keyed_numpy(*key):
    """Numpy generator keyed by integers, their count first: to numpy (a, b) and (a, b, 0) are one seed."""
    return np.random.default_rng((len(key), *key))

def keyed(device, *key):
    """A torch generator likewise."""
    return torch.Generator(device).manual_seed(int(keyed_numpy(*key).integers(2 ** 63)))

def keyed_noise(keys, shape, device):
    """Standard normal (len(keys), *shape), each row from its own key."""
    return torch.stack([torch.randn(shape, generator=keyed(device, *key), device=device) for key in keys])

epoch_order = lru_cache(2)(lambda seed, epoch, n: keyed_numpy(seed, epoch).permutation(n))

class Batches(torch.utils.data.Dataset):
    """Item s is this process's share of step s: what `data` loads, as (b, ...), and labels (b,). `rows` are
    the share's positions in the global batch, `parts` its slices of up to `micro` images."""
    def __init__(self, data, batch_size, seed, flip, micro=None, rank=RANK, world=WORLD):
        check(batch_size % world == 0, f"--batch-size {batch_size} (global): no share for {world} processes")
        self.data, self.batch_size, self.seed, self.flip = data, batch_size, seed, flip
        share = batch_size // world
        self.rows = range(rank * share, (rank + 1) * share)
        self.parts = [slice(i, min(i + (micro or share), share)) for i in range(0, share, micro or share)]
    def __getitem__(self, step):
        indices, images, n = [], [], len(self.data)
        for row in self.rows:
            epoch, place = divmod(step * self.batch_size + row, n)
            rng = keyed_numpy(self.seed, step, row)
            indices.append(epoch_order(self.seed, epoch, n)[place])
            images.append(self.data.load(indices[-1], rng, self.flip and rng.random() < 0.5))
        return torch.from_numpy(np.stack(images)), torch.from_numpy(self.data.labels[indices])

def own_group(worker):
    """Out of reach of Ctrl-C and torchrun's SIGTERM: workers must live until the main process has saved."""
    os.setpgrp()

def positive(text):
    """argparse type of a whole number above 0."""
    check(int(text) > 0, text)
    return int(text)

def parser(doc, presets, training=True):
    """Argument parser of sample.py or, with `training`, of the loops, with the defaults of --preset."""
    p = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False, add_help=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda text: sys.exit(f"error: {text}")  # one line for these mistakes too, without the usage
    flag = p.add_argument
    flag("--preset", choices=presets, default="toy", help="all other defaults")
    p.set_defaults(**presets[p.parse_known_args()[0].preset])
    flag("-h", "--help", action="help", help="show this")
    flag("--seed", type=int, default=0, help="of everything random")
    flag("--device", choices=DEVICES, default=DEVICES[0], help="where to compute")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on cuda")
    flag("--encoder-weights", help="local file of the encoder's weights, timm's names")
    flag("--batch-size", type=positive, help="images at once; in training a step's, all processes'")
    if training:
        flag("--data", help="toy, or a folder of images (its folders are the classes)")
        flag("--init", help="start from these weights: a checkpoint or released:NAME")
        flag("--resume", choices=["auto", "never"], default="auto", help="auto: go on with a run")
        flag("--steps", type=positive, help="optimiser steps")
        flag("--micro-batch", type=positive, help="images at once in a process; unset: its whole share")
        flag("--lr", type=float, help="peak learning rate (paper: 2e-4)")
        flag("--lr-end", type=float, help="learning rate at the end (paper: 2e-5)")
        flag("--ema", type=float, help="decay of the averaged weights (paper: 0.9978, 0.9995)")
        flag("--compile", action="store_true", help="compile the trained model")
        flag("--checkpoint-activations", action="store_true", help="less memory, a third more time")
        flag("--log-every", type=positive, help="steps between lines of the log")
        flag("--save-every", type=positive, help="steps between checkpoints")
        flag("--workers", type=int, help="processes that read images")
    return p

def start(args):
    """The device of this process, in torchrun's group or, alone, in a group of one, which needs no port."""
    kind = args.device
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
    tf32 = args.precision == "bf16" or args.precision == "auto" and kind == "cuda"    # fp32 means float32
    args.precision = "bf16" if tf32 else "fp32"
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)    # gave NaN in bf16 under torch 2.13
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", **alone)
    say(f"{device} x {WORLD}, {args.precision}" + f", TF32 {'on' if tf32 else 'off'}" * (kind == "cuda"))
    return device

def autocast(device, args):
    """bfloat16 matrix products where --precision says so; weights, norms and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

def say(text):
    """Print on the first process."""
    if RANK == 0:
        print(text, flush=True)

def progress(steps, batch_size, total=None):
    """The steps, on a terminal's first process under a bar with images/s and the time left."""
    return tqdm(steps, total=total, unit="image", unit_scale=batch_size, disable=RANK > 0 or None)

def cli(main):
    """Run a script; a user's mistake ends in one line, and only a fault of ours in a traceback."""
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as e:
        sys.exit(f"error: {(str(e) or 'stopped').strip().splitlines()[-1].removeprefix('ValueError: ')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

def average(tensors):
    """Replace each by its mean over the processes, in one call: all of data parallelism here."""
    if WORLD > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, mean in zip(tensors, (flat / WORLD).split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))

class Optimizer(torch.optim.AdamW):
    """AdamW as both stages have it, without weight decay; it steps only on gradients that are finite, after
    their average over processes: others are skipped and counted, and five in a row end the run."""
    def __init__(self, model, betas=(0.9, 0.95)):
        super().__init__(model.parameters(), betas=betas, weight_decay=0.0, fused=True)
        self.skipped = self.in_a_row = 0
    def update(self, lr, clip=0.0):
        """A step at this rate, after which no gradients are left: (their norm, whether it was taken)."""
        group, = self.param_groups
        gradients = [p.grad for p in group["params"]]
        average(gradients)
        norm = nn.utils.get_total_norm(gradients)
        group["lr"], fine = lr, bool(norm.isfinite())
        if fine:
            if clip:
                nn.utils.clip_grads_with_norm_(group["params"], clip, norm)
            self.step()
        self.zero_grad()
        self.skipped, self.in_a_row = self.skipped + (not fine), 0 if fine else self.in_a_row + 1
        check(self.in_a_row < 5, "the loss was not finite for 5 steps in a row; the last checkpoint is kept: "
              "go on from it with --init and another --out, a lower --lr or --precision fp32")
        return norm, fine

def update_ema(ema, model, decay, step):
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + step) / (10 + step)): short runs can follow."""
    d = min(decay, (1 + step) / (10 + step))
    for e, p in zip(ema.parameters(), model.parameters()):
        e.data.lerp_(p.data, 1 - d)

# Settings that change how a run goes, or what is looked at, and not its weights.
FREE = ("out resume device workers micro_batch compile checkpoint_activations eval_every eval_num eval_sigma "
        "val_data cfg fid_every fid_num fid_reference inception log_every sample_every save_every").split()

class Run:
    """A training run in --out: settings, checkpoints, log, what is due at a step. `saved` is its newest whole
    checkpoint, or {}. ValueError if the folder holds another run, with the differences."""
    def __init__(self, args, kind):
        self.args, self.out, self.saved, self.parts, self.stopped = args, Path(args.out), {}, {}, False
        self.settings = dict(kind=kind) | {k: v for k, v in vars(args).items() if k not in FREE}
        for path in (self.out / "checkpoint.pt", self.out / "previous.pt"):
            try:
                self.saved = self.saved or (read_file(path) if path.exists() else {})
            except ValueError as e:
                say(f"{e}; trying the one before")
        there, here = self.saved.get("settings", {}), self.settings
        other = "; ".join(f"{k} {there.get(k)} there, {v} here" for k, v in here.items() if there.get(k) != v)
        early = {"log.jsonl", "log.tmp", "pairs.png", "eval.png", "checkpoint.tmp"}    # a run killed at once
        used = self.out.exists() and {f.name for f in self.out.iterdir()} - early
        for wrong, what in ((used and not self.saved, "not empty, without a whole checkpoint of ours"),
                            (used and args.resume == "never", "holds a run, and --resume never"),
                            (used and other, f"holds a run with other settings ({other})")):
            check(not wrong, f"{self.out}: {what}; pass another --out")
        self.first, steps = self.saved.get("step", 0), [None] * WORLD
        dist.all_gather_object(steps, self.first)
        check(len(set(steps)) == 1, f"{self.out}: not the same on all nodes (steps {steps}): share it")
        if 0 < self.first < args.steps:
            say(f"{self.out}: continuing at step {self.first}")
    def restore(self, **parts):
        """Give the parts, which have a state_dict, what they had in the checkpoint; `save` will save them."""
        self.parts = parts
        for name, part in parts.items() if self.saved else ():
            part.load_state_dict(self.saved.pop(name))
    def steps(self, batches, device, n):
        """The steps that are left, then one more for what is due at the end. The loop adds to `sums` (n,)."""
        args, self.sums, self.logged = self.args, torch.zeros(n, device=device), self.first
        self.stream = iter(torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=range(self.first, args.steps), num_workers=args.workers,
            prefetch_factor=4 if args.workers else None, pin_memory=device.type == "cuda",
            worker_init_fn=own_group))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        if RANK == 0:                                  # the log drops what a resumed run will repeat
            self.out.mkdir(parents=True, exist_ok=True)
            path, new = self.out / "log.jsonl", self.out / "log.tmp"
            old = path.read_text().splitlines() if self.first and path.exists() else []
            new.write_text("".join(f"{line}\n" for line in old
                                   if line.endswith("}") and json.loads(line)["step"] <= self.first))
            os.replace(new, path)
        self.began, self.waited = time.time(), 0
        for self.step in progress(range(self.first, args.steps + 1), args.batch_size):
            average([stopped := torch.tensor(float(self.stopped), device=device)])    # all leave together
            self.halted = bool(stopped)
            self.last = self.step == args.steps or self.halted
            yield self.step
    def stop(self, number, frame):
        """On SIGTERM or SIGINT the loop saves before it ends; a second signal ends it at once."""
        self.stopped = True
        signal.signal(number, signal.SIG_DFL)
    def due(self, every, look=False):
        """Whether this step is one of every so many, or the last; none to look at when the run is stopped."""
        return self.step > self.first and (self.step % every == 0 or self.last) and not (look and self.halted)
    def batch(self):
        """This step's; the wait is counted."""
        began = time.time()
        batch = next(self.stream)
        self.waited += time.time() - began
        return batch
    def means(self, *optimizers):
        """(Means of the sums since the last call over steps and processes, what the log says of the pace)."""
        average([self.sums])
        steps, seconds = self.step - self.logged, time.time() - self.began
        means, left = self.sums / steps, (self.args.steps - self.step) / steps * seconds / 60
        pace = dict(lr=optimizers[0].param_groups[0]["lr"], skipped=sum(o.skipped for o in optimizers),
                    images_per_s=steps * self.args.batch_size / seconds, waiting=self.waited / seconds,
                    minutes_left=left)
        self.sums, self.logged, self.began, self.waited = torch.zeros_like(means), self.step, time.time(), 0
        return means, pace
    def log(self, **numbers):
        """A line of log.jsonl, a JSON object, also printed."""
        if RANK == 0:
            numbers = dict(step=self.step) | numbers
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(numbers) + "\n")
            tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in numbers.items() if not isinstance(v, list)))
    def save(self, **about):
        """Write checkpoint.pt by a temporary file, sync and rename: kills and full disks leave one."""
        path, new = self.out / "checkpoint.pt", self.out / "checkpoint.tmp"
        states = {name: part.state_dict() for name, part in self.parts.items()}
        try:
            with open(new, "wb") as f:
                torch.save(dict(settings=self.settings, step=self.step) | about | states, f)
                f.flush()
                os.fsync(f.fileno())
        except (OSError, RuntimeError) as e:           # torch's writer turns a full disk into the latter
            new.unlink(missing_ok=True)
            raise ValueError(f"{self.out}: step {self.step} cannot be saved ({str(e).splitlines()[0]}); the "
                             "checkpoint before is kept: make room, and the same command goes on") from None
        if path.exists():
            os.replace(path, self.out / "previous.pt")
        os.replace(new, path)

def save_grid(images, path, columns):
    """Images (B, 3, H, W) in [0, 1] as one PNG, row by row, small ones enlarged to about 64 px."""
    rows, zoom = math.ceil(len(images) / columns), max(1, 64 // images.shape[2])
    sheet = F.pad(to_uint8(images).cpu(), (1, 1, 1, 1, 0, 0, 0, rows * columns - len(images)), value=255)
    sheet = sheet.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1)).save(path)

def psnr(a, b):
    """Peak signal-to-noise ratio of images (B, 3, H, W) in [0, 1]: dB of each pair (B,)."""
    return -10 * (a.float() - b.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()
