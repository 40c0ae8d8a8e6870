"""Convert a decoder to a folder for diffusers' AutoencoderRAE, and back.

    pip install -U diffusers transformers             # 0.40 and 5.18 or later
    python extras/to_diffusers.py out/decoder256/checkpoint.pt vae
    python extras/to_diffusers.py --back vae decoder.pt              # needs neither package

The folder holds encoder, latent statistics and decoder. Older versions of transformers name the
encoder's tensors differently: from_pretrained then warns and leaves them random. Our decoders, like
the official ones, have trained positions. diffusers does not load these and uses fixed sin-cos
positions instead. So set them by hand:

    vae = AutoencoderRAE.from_pretrained("vae")  # images in [0, 1], latents (B, C, h, w)
    tensors = safetensors.torch.load_file("vae/diffusion_pytorch_model.safetensors")
    vae.decoder.decoder_pos_embed = tensors["decoder.decoder_pos_embed"]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rae  # noqa: E402
from dit_dh import sincos_2d  # noqa: E402
from extras.to_official import to_official_names  # noqa: E402

# Parts of tensor names: the official decoder's and diffusers', then timm's and transformers'.
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
# MAE's LayerNorms have eps 1e-12 in transformers, 1e-6 in timm. SigLIP2 can be read but not
# written: diffusers 0.42 cannot build it with a transformers that has these names.
ENCODER_NAMES = {"dinov2": DINOV2_NAMES, "mae": MAE_NAMES}
SIZES = {384: "s", 768: "b", 1024: "l"}  # by the encoder's width


def rename(name, names):
    """Replace the parts of a tensor's name that are keys of the dict `names`."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def load_vit(encoder, weights=None):
    """The timm ViT of an encoder, before rae.Encoder resizes its position embedding."""
    model, _, options = rae.ENCODERS[encoder]
    return rae.load_timm(model, weights, **options)


def encoder_state(vit, encoder_type):
    """The state dict of a timm ViT with transformers' names."""
    names = ENCODER_NAMES[encoder_type]
    state = {}
    for name, w in vit.state_dict().items():
        if name.startswith(("norm.", "fc_norm.")):
            continue  # an RAE's final LayerNorm has no affine parameters
        if name == "pos_embed" and vit.no_embed_class:
            w = F.pad(w, (0, 0, 1, 0))  # timm has added the CLS token's position to the token
        if "attn.qkv" in name:
            for letter, part in zip("qkv", w.chunk(3)):  # (3 D, D) or (3 D,)
                state[rename(name.replace("attn.qkv", f"attention.{letter}_proj"), names)] = part
        else:
            state[rename(name, names)] = w
    if encoder_type == "dinov2":
        state["embeddings.mask_token"] = torch.zeros(1, vit.embed_dim)  # only for its training
    return state


def to_diffusers(name, out, encoder=None, encoder_weights=None, stats=None):
    """Write the RAE that rae.load_rae loads from the other arguments to the folder `out`."""
    file = rae.load(rae.find_file(name))
    released = rae.RELEASED_DECODERS.get(name.removeprefix("released:"), [None])[0]
    encoder = encoder or file.get("encoder") or released
    encoder_type = str(encoder).split("-")[0]
    if encoder not in rae.ENCODERS or encoder_type not in ENCODER_NAMES:
        raise rae.UsageError(
            f"encoder {encoder}: diffusers supports dinov2-s, -b, -l and mae-b; for a file of bare "
            "weights, pass --encoder"
        )
    try:
        import transformers
        from diffusers import AutoencoderRAE
    except (ImportError, RuntimeError) as error:  # diffusers' lazy imports raise RuntimeError
        raise rae.UsageError(f"{error}: pip install -U diffusers transformers") from error
    model = rae.load_rae(name, encoder, encoder_weights, stats)
    vit = load_vit(encoder, encoder_weights or file.get("encoder_weights"))
    decoder = model.decoder

    # We divide latents by s = sqrt(var + 1e-5), diffusers by std + 1e-5, so std is s - 1e-5.
    grid = (decoder.grid_size, decoder.grid_size)
    std = (model.latent_std.double() - 1e-5).float()  # (N, C)
    vae = AutoencoderRAE(
        encoder_type=encoder_type,
        encoder_hidden_size=vit.embed_dim,
        encoder_patch_size=vit.patch_embed.patch_size[0],
        encoder_num_hidden_layers=len(vit.blocks),
        encoder_input_size=model.encoder.input_size,
        encoder_norm_mean=model.encoder.pixel_mean.flatten().tolist(),
        encoder_norm_std=model.encoder.pixel_std.flatten().tolist(),
        decoder_hidden_size=decoder.decoder_embed.out_features,
        decoder_num_hidden_layers=len(decoder.decoder_layers),
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=decoder.decoder_layers[0].fc1.out_features,
        patch_size=decoder.patch_size,
        latents_mean=model.latent_mean.T.unflatten(1, grid).contiguous(),  # (C, h, w)
        latents_std=std.T.unflatten(1, grid).contiguous(),
    )

    # In diffusers the positions are a buffer that is not saved. Make it one that is.
    fixed = vae.decoder.decoder_pos_embed
    difference = (decoder.decoder_pos_embed - fixed).abs().max().item()
    vae.decoder.register_buffer("decoder_pos_embed", fixed)

    # Names without a dot are pixel and latent statistics, which vae already has.
    state = {key: w for key, w in vae.state_dict().items() if "." not in key}
    for key, w in encoder_state(vit, encoder_type).items():
        state[f"encoder.{key}"] = w
    for key, w in to_official_names(decoder.state_dict()).items():
        state[f"decoder.{rename(key, DECODER_NAMES)}"] = w
    if state.keys() != vae.state_dict().keys():
        raise rae.UsageError(
            f"transformers {transformers.__version__} has other names for the encoder's tensors: "
            "pip install -U diffusers transformers"
        )
    vae.load_state_dict(state)
    vae.save_pretrained(out)
    print(f"wrote {out}")
    if difference > 1e-5:
        print("diffusers does not load its positions: set them as the top of this script says")


def from_diffusers(folder, out):
    """Write the decoder in a diffusers folder as a file that rae.load_rae takes.

    The file names the encoder: we take the folder's for the published one.
    """
    import timm
    from safetensors.torch import load_file

    config_file = folder / "config.json"
    if not config_file.is_file():
        raise rae.UsageError(f"{config_file}: no such file")
    config = json.loads(config_file.read_text())
    latent_dim = config.get("encoder_hidden_size")
    encoder = f"{config.get('encoder_type')}-{SIZES.get(latent_dim)}"
    if encoder not in rae.ENCODERS:
        raise rae.UsageError(f"{folder}: not an AutoencoderRAE with an encoder of rae.ENCODERS")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    tensors = {name: w.float() for name, w in tensors.items()}  # the folder may be in bfloat16
    pixel_mean = torch.tensor(timm.get_pretrained_cfg(rae.ENCODERS[encoder][0]).mean)
    if not torch.allclose(tensors["encoder_mean"].flatten(), pixel_mean, atol=5e-3):
        raise rae.UsageError(f"{folder}: its encoder_mean is not that of {encoder}")

    # The inverse of the above. A folder that others wrote may scale its latents, have scalar
    # statistics, and lack the positions: then we use diffusers' own (known for 16 x 16).
    grid_size = config["encoder_input_size"] // config["encoder_patch_size"]
    shape = (latent_dim, grid_size, grid_size)
    s = (tensors["_latents_std"].double() + 1e-5) / config["scaling_factor"]
    state = {}
    official_names = {theirs: official for official, theirs in DECODER_NAMES.items()}
    for key, w in tensors.items():
        if key.startswith("decoder."):
            state[rename(key.removeprefix("decoder."), official_names)] = w
    if "decoder_pos_embed" not in state and grid_size == 16:
        positions = sincos_2d(config["decoder_hidden_size"], grid_size)
        state["decoder_pos_embed"] = F.pad(positions, (0, 0, 1, 0))[None]
    num_heads = config["decoder_num_attention_heads"]
    decoder = rae.load_decoder({"ema": state, "num_heads": num_heads}, folder)
    content = {
        "ema": decoder.state_dict(),
        "num_heads": num_heads,
        "mean": tensors["_latents_mean"].expand(shape),
        "var": (s.square() - 1e-5).float().expand(shape),
        "encoder": encoder,
    }
    rae.atomic_save(content, out)
    print(f"wrote {out}")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("source", metavar="DECODER", help="file or released:NAME; with --back a folder")
    p.add_argument("out", metavar="OUT", help="folder to write; with --back a file")
    p.add_argument("--back", action="store_true", help="from a diffusers folder to a file")
    p.add_argument("--encoder", help="for an official decoder file: its encoder")
    p.add_argument("--encoder-weights", help="local file of the encoder's timm weights")
    p.add_argument("--stats", help="for an official decoder file: its latent statistics")
    args = p.parse_args()
    out = Path(args.out)
    if out.exists():
        raise rae.UsageError(f"{out} already exists; delete it or pass another name")
    rae.make_folder(out.parent)
    if args.back:
        from_diffusers(Path(args.source), out)
    else:
        to_diffusers(args.source, out, args.encoder, args.encoder_weights, args.stats)


if __name__ == "__main__":
    rae.run_script(main)
