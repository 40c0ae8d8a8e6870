"""A decoder as a folder for diffusers' AutoencoderRAE, and back.

    pip install -U diffusers transformers        # 0.40 and 5.18 at least
    python extras/to_diffusers.py out/decoder256/checkpoint.pt vae
    python extras/to_diffusers.py --back vae decoder.pt        # needs neither of the two

The folder holds the encoder, the latent statistics and the decoder. An older transformers has other
names for the encoder's tensors: from_pretrained then warns, and leaves them random. Our decoder's
positions are trained, as those released. diffusers does not load them: it draws with sin-cos ones,
which are what training begins with if the grid is 16 x 16. So set them by hand:

    vae = AutoencoderRAE.from_pretrained("vae")  # images in [0, 1], latents (B, C, h, w)
    tensors = safetensors.torch.load_file("vae/diffusion_pytorch_model.safetensors")
    vae.decoder.decoder_pos_embed = tensors["decoder.decoder_pos_embed"]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rae  # noqa: E402

# Parts of the names of tensors, here and there: of the decoder, then of timm's encoders.
DECODER_NAMES = {
    "attention.attention.query": "attention.to_q",
    "attention.attention.key": "attention.to_k",
    "attention.attention.value": "attention.to_v",
    "attention.output.dense": "attention.to_out.0",
}
DINOV2_NAMES = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks": "encoder.layer",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
MAE_NAMES = DINOV2_NAMES | {
    "blocks": "layers",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
# MAE's LayerNorms have an eps of 1e-12 there, of 1e-6 in timm. SigLIP2 is read and not written:
# diffusers 0.42 fails to build it with a transformers of these names.
ENCODER_NAMES = {"dinov2": DINOV2_NAMES, "mae": MAE_NAMES}
SIZES = {384: "s", 768: "b", 1024: "l"}  # by the channels of an encoder


def rename(name, names):
    """The name of a tensor with every part replaced that is a key of the dict `names`."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def encoder_state(vit, encoder_type):
    """The state dict of timm's ViT in transformers' names."""
    names = ENCODER_NAMES[encoder_type]
    state = {}
    for name, w in vit.state_dict().items():
        if name.startswith(("norm.", *rae.UNUSED_PREFIXES)):
            continue  # in an RAE the last norm has no weights
        if name == "pos_embed" and vit.no_embed_class:
            w = F.pad(w, (0, 0, 1, 0))  # timm has added the CLS token's own position to the token
        if "attn.qkv" in name:
            for letter, part in zip("qkv", w.chunk(3)):  # (3 D, D) or (3 D,)
                state[rename(name.replace("attn.qkv", f"attention.{letter}_proj"), names)] = part
        else:
            state[rename(name, names)] = w
    if encoder_type == "dinov2":
        state["embeddings.mask_token"] = torch.zeros(1, vit.embed_dim)  # of its own training alone
    return state


def to_diffusers(decoder, out, encoder=None, encoder_weights=None, stats=None):
    """Write the RAE that rae.load_rae makes of the other arguments to the folder `out`."""
    file = rae.read_file(rae.released_file(decoder))
    released = "-".join(decoder.removeprefix("released:").split("-")[:2])
    encoder = encoder or file.get("encoder") or released
    encoder_type = encoder.split("-")[0]
    if encoder not in rae.ENCODERS or encoder_type not in ENCODER_NAMES:
        raise ValueError(
            f"encoder {encoder}: diffusers has none such, or does not load it; pass a decoder of "
            "dinov2-s, -b, -l or mae-b, and --encoder if its file does not name it"
        )
    try:
        import transformers
        from diffusers import AutoencoderRAE
    except (ImportError, RuntimeError) as error:  # the latter of what diffusers itself imports
        raise ValueError(f"{error}: pip install -U diffusers transformers") from None
    ours = rae.load_rae(decoder, encoder, encoder_weights, stats)

    # `ours` has resized the encoder's positions to its images, and diffusers does so by itself: the
    # published ones are read again.
    encoder_weights = encoder_weights or file.get("encoder_weights")
    vit = rae.load_timm(rae.ENCODERS[encoder]["model"], encoder_weights, "--encoder-weights")

    # We divide latents by s = sqrt(var + 1e-5), diffusers by its std + 1e-5. So std is s - 1e-5.
    h = ours.encoder.grid_size
    mean = ours.latent_mean  # (N, C)
    std = (ours.latent_std.double() - 1e-5).float()
    layers = ours.decoder.decoder_layers
    vae = AutoencoderRAE(
        encoder_type=encoder_type,
        encoder_hidden_size=vit.embed_dim,
        encoder_patch_size=vit.patch_embed.patch_size[0],
        encoder_num_hidden_layers=len(vit.blocks),
        encoder_input_size=ours.encoder.input_size,
        encoder_norm_mean=ours.encoder.pixel_mean.flatten().tolist(),
        encoder_norm_std=ours.encoder.pixel_std.flatten().tolist(),
        decoder_hidden_size=ours.decoder.decoder_embed.out_features,
        decoder_num_hidden_layers=len(layers),
        decoder_num_attention_heads=ours.decoder.num_heads,
        decoder_intermediate_size=layers[0].intermediate["dense"].out_features,
        patch_size=ours.decoder.patch_size,
        latents_mean=mean.T.unflatten(1, (h, h)).contiguous(),  # (C, h, w)
        latents_std=std.T.unflatten(1, (h, h)).contiguous(),
    )

    # diffusers' positions are a buffer that is not saved. As one that is, it takes ours along.
    fixed = vae.decoder.decoder_pos_embed
    gap = (ours.decoder.decoder_pos_embed - fixed).abs().max().item()
    vae.decoder.register_buffer("decoder_pos_embed", fixed)

    # Colours and statistics are in place: those names have no dot.
    state = {name: w for name, w in vae.state_dict().items() if "." not in name}
    for name, w in encoder_state(vit, encoder_type).items():
        state[f"encoder.{name}"] = w
    for name, w in ours.decoder.state_dict().items():
        state[f"decoder.{rename(name, DECODER_NAMES)}"] = w
    unknown = state.keys() ^ vae.state_dict().keys()
    if unknown:
        raise ValueError(
            f"transformers {transformers.__version__}: {min(unknown)} has another name there; "
            "pip install -U diffusers transformers"
        )
    vae.load_state_dict(state)

    # Until it is whole the folder lies in a temporary one, and goes with that if writing fails.
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary) / "vae"
        try:
            vae.save_pretrained(folder)
        except Exception as error:  # safetensors has kinds of its own
            raise ValueError(f"{out}: cannot be saved ({error}); make room for it") from None
        folder.rename(out)
    print(f"wrote {out}")
    if gap > 1e-5:
        print(f"its positions are off diffusers' by {gap:.2g}: set them as this script's top says")


def from_diffusers(folder, out):
    """Write the decoder in a folder of diffusers as a file that rae.load_rae takes.

    It names the encoder and does not hold it: the folder's is taken to be the published one.
    """
    tensors = rae.read_file(folder / "diffusion_pytorch_model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text())
        latent_dim = config["encoder_hidden_size"]
        grid_size = config["encoder_input_size"] // config["encoder_patch_size"]
        encoder = f"{config['encoder_type']}-{SIZES[latent_dim]}"
        colours = rae.ENCODERS[encoder].get("mean", rae.IMAGENET_MEAN)
        if not torch.allclose(tensors["encoder_mean"].flatten(), torch.tensor(colours)):
            raise ValueError(f"its encoder_mean is not that of {encoder}, {colours}")

        # The inverse of the above. A folder that others wrote may scale its latents besides, have
        # one number for all of them, and lack the positions: then they are what diffusers takes.
        shape = (latent_dim, grid_size, grid_size)
        mean = tensors["_latents_mean"].expand(shape)
        s = (tensors["_latents_std"].double() + 1e-5) / config["scaling_factor"]
        var = (s.square() - 1e-5).float().expand(shape)
        state = {}
        here = {there: here for here, there in DECODER_NAMES.items()}
        for name, w in tensors.items():
            if name.startswith("decoder."):
                state[rename(name.removeprefix("decoder."), here)] = w
        if "decoder_pos_embed" not in state and grid_size == 16:
            positions = rae.sincos_2d(config["decoder_hidden_size"], grid_size)
            state["decoder_pos_embed"] = F.pad(positions, (0, 0, 1, 0))[None]
        content = {"ema": state, "mean": mean, "var": var, "encoder": encoder}
        content["num_heads"] = config["decoder_num_attention_heads"]
        rae.load_released_decoder(content)  # says what is missing or misshapen
    except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: not an AutoencoderRAE that we have ({type(error).__name__}: {error}); "
            "pass a folder that this script wrote"
        ) from None
    rae.save_file(content, out)
    print(f"wrote {out}")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("source", metavar="DECODER", help="decoder's file or released:NAME; or a FOLDER")
    p.add_argument("out", metavar="OUT", help="the folder to write, or with --back the file")
    p.add_argument("--back", action="store_true", help="from a FOLDER of diffusers to a file")
    p.add_argument("--encoder", help="of a decoder's file that does not name it")
    p.add_argument("--encoder-weights", help="local file of the encoder's weights, in timm's names")
    p.add_argument("--stats", help="latent statistics of a decoder's file that has none")
    args = rae.parse_flags(p)
    about = (args.encoder, args.encoder_weights, args.stats)
    if args.back and any(about):
        raise ValueError("--encoder, --encoder-weights, --stats: without effect with --back")
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"{out}: there already; remove it, or pass another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.back:
        from_diffusers(Path(args.source), out)
    else:
        to_diffusers(args.source, out, *about)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(rae.error_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
