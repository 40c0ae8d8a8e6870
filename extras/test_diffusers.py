"""extras/to_diffusers.py: equal images and latents after both conversions, and user errors."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dit_dh import sincos_2d
from extras.to_official import to_official_names
from tests.conftest import gap, relative_gap

SCRIPT = "extras/to_diffusers.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def autoencoder_rae():
    """diffusers' class; without it the test is skipped."""
    reason = "needs pip install diffusers transformers"
    pytest.importorskip("transformers", minversion="5.18", reason=reason)
    diffusers = pytest.importorskip("diffusers", minversion="0.40", reason=reason)
    diffusers.logging.set_verbosity_error()  # it recommends accelerate at every load
    return diffusers.AutoencoderRAE


@pytest.fixture
def make(monkeypatch, run):
    """make("dinov2-s", "toy", 256) writes a decoder file, decoder.pt, and returns its content.

    Weights and statistics are random; only the decoder's positions are diffusers' for a 16 x 16
    grid. encoder.pt has the published size except for its two blocks. stat.pt and model.pt are
    the statistics and the decoder as official files.
    """
    import timm

    import rae

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, depth=2, **k))

    def call(encoder, size, image_size):
        # Noise on all tensors: some start at 0 or 1, and a mix-up of their names would not show.
        vit = timm.create_model(rae.ENCODERS[encoder][0], num_classes=0)
        noisy = {name: w + 0.05 * torch.randn_like(w) for name, w in vit.state_dict().items()}
        torch.save(noisy, "encoder.pt")
        grid_size = image_size // 16
        decoder = rae.Decoder(vit.embed_dim, grid_size, 16, *rae.DECODERS[size])
        state = decoder.state_dict()
        state["decoder_pos_embed"] = fixed_positions(rae.DECODERS[size][0], grid_size)
        for name, w in state.items():
            if w.ndim == 1 or name == "trainable_cls_token":
                w += 0.1 * torch.randn_like(w)
        shape = (vit.embed_dim, grid_size, grid_size)
        mean = torch.randn(shape)
        var = 3 * torch.rand(shape) ** 8 + 1e-6  # small ones too
        names = {"encoder": encoder, "encoder_weights": "encoder.pt"}
        content = {"ema": state, "mean": mean, "var": var, **names}
        torch.save(content, "decoder.pt")
        torch.save({"mean": mean, "var": var}, "stat.pt")
        torch.save(to_official_names(state), "model.pt")
        return content

    return call


def fixed_positions(width, grid_size):
    """diffusers' positions (1, 1 + N, D), if the grid is 16 x 16."""
    return F.pad(sincos_2d(width, grid_size), (0, 0, 1, 0))[None]


def grid(z):
    """Latents (B, N, C) -> (B, C, h, w), as in diffusers."""
    side = int(z.shape[1] ** 0.5)
    return z.transpose(1, 2).unflatten(2, (side, side))


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder, size", [("dinov2-s", "toy"), ("dinov2-b", "B"), ("dinov2-l", "toy"), ("mae-b", "toy")]
)
@torch.no_grad()
def test_to_diffusers_and_back(autoencoder_rae, run, make, encoder, size):
    """Decoding and encoding equal diffusers' to 1e-5. After both conversions weights are equal."""
    import rae

    content = make(encoder, size, 256)
    printed = run(SCRIPT, "decoder.pt vae", tiny=False)
    assert printed == "wrote vae\n"  # nothing about positions, which are diffusers' own here
    assert sorted(path.name for path in Path("vae").iterdir()) == ["config.json", WEIGHTS]
    run(SCRIPT, "--back vae again.pt", tiny=False)

    again = rae.load("again.pt")
    assert again["encoder"] == encoder
    assert again["ema"].keys() == content["ema"].keys()
    for name, w in content["ema"].items():
        assert torch.equal(again["ema"][name], w), name
    assert torch.equal(again["mean"], content["mean"])
    # sqrt(var + 1e-5) and std are rounded to float32.
    var = content["var"].double()
    error = ((again["var"].double() - var).abs() / (var + 1e-5)).max().item()
    assert error < 5e-7

    ours = rae.load_rae("decoder.pt")
    back = rae.load_rae("again.pt", encoder_weights="encoder.pt")
    vae = autoencoder_rae.from_pretrained("vae")
    images = torch.rand(2, 3, 256, 256)
    if encoder == "mae-b":
        # transformers' LayerNorms have eps 1e-12, timm's 1e-6: latents differ by 3e-5.
        assert relative_gap(vae.encode(images).latent, grid(ours.encode(images))) < 1e-4
        for module in vae.encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-6
    z = torch.randn(2, *ours.latent_mean.shape)  # (2, N, C)
    gaps = {
        "decode": relative_gap(vae.decode(grid(z)).sample, ours.decode(z)),
        "decode, back": relative_gap(back.decode(z), vae.decode(grid(z)).sample),
        "encode": relative_gap(vae.encode(images).latent, grid(ours.encode(images))),
        "encode, back": relative_gap(grid(back.encode(images)), vae.encode(images).latent),
        "both": relative_gap(vae(images).sample, ours.decode(ours.encode(images))),
    }
    print(encoder, size, error, gaps)
    assert max(gaps.values()) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_trained_positions(autoencoder_rae, run, make):
    """diffusers drops them, until set as in the script's docstring. Here from official files."""
    from safetensors.torch import load_file

    import rae

    content = make("dinov2-s", "toy", 64)
    positions = content["ema"]["decoder_pos_embed"]
    positions += 0.1 * torch.randn_like(positions)
    torch.save(to_official_names(content["ema"]), "model.pt")
    flags = "--encoder dinov2-s --encoder-weights encoder.pt --stats stat.pt"
    printed = run(SCRIPT, f"model.pt vae {flags}", tiny=False)
    assert "position" in printed
    run(SCRIPT, "--back vae again.pt", tiny=False)
    assert torch.equal(rae.load("again.pt")["ema"]["decoder_pos_embed"], positions)

    vae = autoencoder_rae.from_pretrained("vae")
    ours = rae.load_rae("model.pt", "dinov2-s", "encoder.pt", "stat.pt")
    z = torch.randn(2, 16, 384)
    assert relative_gap(vae.decode(grid(z)).sample, ours.decode(z)) > 1e-2
    tensors = load_file(f"vae/{WEIGHTS}")
    vae.decoder.decoder_pos_embed = tensors["decoder.decoder_pos_embed"]
    assert relative_gap(vae.decode(grid(z)).sample, ours.decode(z)) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_folders_that_others_wrote(autoencoder_rae, run, make):
    """With a scaling factor, without statistics, and without positions in the file."""
    import rae

    make("dinov2-s", "toy", 256)
    run(SCRIPT, "decoder.pt vae", tiny=False)
    theirs = autoencoder_rae.from_pretrained("vae", scaling_factor=0.5)
    plain = autoencoder_rae.from_config(
        dict(theirs.config, latents_mean=None, latents_std=None, scaling_factor=1.0)
    )
    state = {name: w for name, w in theirs.state_dict().items() if "_latents" not in name}
    plain.load_state_dict(plain.state_dict() | state)
    z = torch.randn(2, 256, 384)
    for name, vae in {"scaled": theirs, "plain": plain.eval()}.items():
        vae.save_pretrained(name)
        run(SCRIPT, f"--back {name} {name}.pt", tiny=False)
        ours = rae.load_rae(f"{name}.pt", encoder_weights="encoder.pt")
        assert relative_gap(vae.decode(grid(z)).sample, ours.decode(z)) < 1e-5


def refused(run, arguments, message):
    """The script ends with this one-line error and writes nothing."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match="^error: [^\n]*$") as exit:
        run(SCRIPT, arguments, tiny=False)
    assert message in str(exit.value)
    assert sorted(Path().rglob("*")) == before


def test_mistakes(run, monkeypatch):
    refused(run, "toy vae", "encoder toy: diffusers supports dinov2-s")
    refused(run, "nowhere.pt vae", "nowhere.pt")
    for encoder in ("siglip2-b", "dino-s8", "dinov2-x", "timm:vit_tiny_patch16_224"):
        torch.save({"encoder": encoder}, "decoder.pt")
        refused(run, "decoder.pt vae", f"encoder {encoder}: diffusers supports dinov2-s")
    torch.save({"encoder": "dinov2-s"}, "decoder.pt")
    refused(run, "decoder.pt decoder.pt", "decoder.pt already exists")
    for module in ("transformers", "diffusers"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "transformers", json)  # any module that is installed
            without.setitem(sys.modules, module, None)
            refused(run, "decoder.pt vae", f"{module}")
            refused(run, "decoder.pt vae", "pip install -U diffusers transformers")


def test_back_without_diffusers(run):
    """From a folder as diffusers writes it, with a tiny decoder."""
    from safetensors.torch import save_file

    import rae

    decoder = rae.Decoder(768, 16, 2, 8, 1, 2, 16)
    decoder.decoder_pos_embed.data = fixed_positions(8, 16)
    std = torch.rand(768, 16, 16) + 0.1
    pixel_mean = torch.full((1, 3, 1, 1), 0.5)
    tensors = {"_latents_mean": 2 * std, "_latents_std": std, "encoder_mean": pixel_mean}
    to_names = {"query": "to_q", "key": "to_k", "value": "to_v", "dense": "to_out.0"}
    for name, w in to_official_names(decoder.state_dict()).items():
        *_, block, part, kind = f"..{name}".split(".")
        if block == "attention" or ".attention.output." in name:
            name = f"decoder_layers.0.attention.{to_names[part]}.{kind}"
        if name != "decoder_pos_embed":
            tensors[f"decoder.{name}"] = w
    config = {
        "encoder_type": "siglip2",
        "encoder_hidden_size": 768,
        "encoder_patch_size": 16,
        "encoder_input_size": 256,
        "decoder_hidden_size": 8,
        "decoder_num_attention_heads": 2,
        "scaling_factor": 1.0,
    }

    def write(config):
        Path("vae").mkdir(exist_ok=True)
        Path("vae/config.json").write_text(json.dumps(config))
        save_file(tensors, f"vae/{WEIGHTS}")

    write(config)
    run(SCRIPT, "--back vae new/decoder.pt", tiny=False)
    content = rae.load("new/decoder.pt")
    assert content["encoder"] == "siglip2-b"
    assert torch.equal(content["mean"], 2 * std)
    assert gap((content["var"] + 1e-5).sqrt(), std + 1e-5) < 1e-6
    tokens = torch.randn(2, 256, 768)
    assert torch.equal(rae.load_decoder(content)(tokens), decoder(tokens))

    tensors = {name: w.bfloat16() for name, w in tensors.items()}
    write(config | {"encoder_type": "mae"})
    refused(run, "--back vae a.pt", "its encoder_mean is not that of mae-b")
    write(config)
    run(SCRIPT, "--back vae bf16.pt", tiny=False)
    rounded = rae.load("bf16.pt")
    assert gap(rounded["mean"], content["mean"]) < 0.01
    assert rounded["mean"].dtype == rounded["var"].dtype == torch.float32
    rae.load_decoder(rounded)

    refused(run, "--back vae new/decoder.pt", "new/decoder.pt already exists")
    refused(run, "--back new a.pt", "new/config.json: no such file")
    write(config | {"encoder_type": "clip"})
    refused(run, "--back vae a.pt", "vae: not an AutoencoderRAE with an encoder of rae.ENCODERS")
    write({"_class_name": "AutoencoderKL"})
    refused(run, "--back vae a.pt", "vae: not an AutoencoderRAE with an encoder of rae.ENCODERS")
