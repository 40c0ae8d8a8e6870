"""The official code's numbers (tests/golden, commit a4d18c4); loading and exporting its files."""

import re

import pytest
import torch
import torch.nn.functional as F

from dit_dh import SIZES, DiTDH, flow_loss, load_dit, sample, shift_time, time_grid
from extras.to_official import to_official_names
from rae import DECODERS, RAE, Decoder, Encoder, UsageError, load_decoder, load_encoder
from tests.conftest import gap, relative_gap, same, tokens
from train_decoder import Discriminator, ViTFeatures, adaptive_weight, diffaug, hinge_d_loss

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
KINDS = ["dinov2", "mae", "siglip"]


def golden_rae(g, **replaced):
    """The RAE of an entry of rae.pt; some of its decoder's tensors may be replaced."""
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(**g["timm_kwargs"])
    # Not strict: siglip's pooling, which nothing runs, is not in the file.
    vit.load_state_dict(g["encoder_state_dict"], strict=False)
    antialias = g["kind"] == "dinov2"
    encoder = Encoder(vit, g["encoder_input_size"], g["image_mean"], g["image_std"], antialias)
    state = g["decoder_state_dict"] | replaced
    decoder = load_decoder({"ema": state, "num_heads": g["decoder_config"]["heads"]})
    return RAE(encoder, decoder, g["stat"]["mean"], g["stat"]["var"]).eval()


def inputs_of(g):
    """x_t, t and y of an entry, as the model takes them."""
    return tokens(g["x"]), g["t"], g["y"]


# ---------------------------------------------------------------------------------------------
# The autoencoder (rae.pt)


@pytest.mark.parametrize("kind", KINDS)
def test_rae(golden, kind):
    g = golden["rae"][kind]
    rae = golden_rae(g)
    with torch.no_grad():
        assert gap(rae.encode(g["image"]), tokens(g["latent"])) <= 2e-5
        assert gap(rae.decode(tokens(g["latent"])), g["reconstruction"]) <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_twice_the_size_are_resized_once(golden, kind):
    """As released: one bicubic step to the encoder's input, not antialiased, before the colours."""
    g = golden["rae"][kind]
    rae = golden_rae(g)
    size = (g["encoder_input_size"], g["encoder_input_size"])
    big = torch.rand(2, 3, 2 * size[0], 2 * size[1])
    small = F.interpolate(big, size, mode="bicubic", align_corners=False, antialias=False)

    # The released encode(), written out a second time.
    mean = torch.tensor(g["image_mean"]).view(1, 3, 1, 1)
    std = torch.tensor(g["image_std"]).view(1, 3, 1, 1)
    vit = rae.encoder.vit
    with torch.no_grad():
        x = vit.forward_features((small - mean) / std)[:, vit.num_prefix_tokens :]  # (B, N, C)
        h = size[0] // vit.patch_embed.patch_size[0]
        latent = x.transpose(1, 2).reshape(2, -1, h, h)  # (B, C, h, w)
        latent = (latent - g["stat"]["mean"]) / (g["stat"]["var"] + 1e-5).sqrt()

        z = rae.encode(big)
        assert gap(z, tokens(latent)) <= 2e-5
        assert gap(z, rae.encode(small)) <= 2e-5
        blurred = F.interpolate(big, size, mode="bicubic", antialias=True)
        assert gap(z, rae.encode(blurred)) > 1e-2


def test_positions_need_the_right_antialias(golden):
    g = golden["rae"]["mae"]
    rae = golden_rae(g | {"kind": "dinov2"})  # antialiased, as timm would do by itself
    assert gap(rae.encode(g["image"]), tokens(g["latent"])) > 1e-4


# ---------------------------------------------------------------------------------------------
# The diffusion model (dit_dh.pt and dit.pt)


def test_velocity(golden):
    g = golden["dit_dh"]
    model = load_dit(g["state_dict"])
    guide = load_dit(g["guide_state_dict"])
    x, t, y = inputs_of(g)
    null = torch.full_like(y, g["num_classes"])
    with torch.no_grad():
        assert gap(model(x, t, y), tokens(g["velocity"])) <= 2e-5
        assert gap(model(x, t, null), tokens(g["velocity_null"])) <= 2e-5
        assert gap(guide(x, t, y), tokens(g["velocity_guide"])) <= 2e-5


@pytest.mark.parametrize("kind", ["cfg", "autoguidance"])
def test_guided_velocity(golden, kind):
    """One Euler step of length 1 takes x to x - v: the guided velocity at the golden times."""
    g = golden["dit_dh"]
    model = load_dit(g["state_dict"])
    if kind == "cfg":
        guidance = {"cfg_scale": g["scale"]}
    else:
        guide = load_dit(g["guide_state_dict"])
        guidance = {"guidance_model": guide, "guidance_scale": g["scale"]}
    for i, now in enumerate(g["t"].tolist()):
        x = tokens(g["x"])[i : i + 1]
        y = g["y"][i : i + 1]
        timesteps = torch.tensor([now, now - 1], dtype=torch.float64)
        v = x - sample(model, x, y, timesteps, interval=g["interval"], **guidance)
        assert gap(v, tokens(g[f"velocity_{kind}"])[i : i + 1]) <= 2e-5


def test_plain_dit(golden):
    g = golden["dit"]
    model = load_dit(g["state_dict"])
    assert not model.has_wide_head
    assert model.backbone_depth == 2
    x, t, y = inputs_of(g)
    null = torch.full_like(y, g["num_classes"])
    with torch.no_grad():
        assert gap(model(x, t, y), tokens(g["velocity"])) <= 2e-5
        assert gap(model(x, t, null), tokens(g["velocity_null"])) <= 2e-5


def test_samples(golden):
    g = golden["dit_dh"]
    model = load_dit(g["state_dict"])
    guide = load_dit(g["guide_state_dict"])
    timesteps = time_grid(g["num_steps"] - 1, g["shift"], t_last=0.001)  # the released grid
    assert gap(timesteps, g["t_grid"]) <= 1e-6
    for name, guidance in (
        ("sample", {}),
        ("sample_cfg", {"cfg_scale": g["scale"]}),
        ("sample_autoguidance", {"guidance_model": guide, "guidance_scale": g["scale"]}),
    ):
        z = sample(model, tokens(g["x"]), g["y"], timesteps, interval=g["interval"], **guidance)
        assert gap(z, tokens(g[name])) <= 1e-4, name


def test_loss(golden):
    g = golden["dit_dh"]
    drawn = g["loss_inputs"]
    t = drawn["t_before_shift"]
    assert gap(shift_time(t, g["shift"]), drawn["t_after_shift"]) <= 1e-6
    model = load_dit(g["state_dict"])
    z = tokens(drawn["data"])
    loss = flow_loss(model, z, drawn["y"], g["shift"], t, tokens(drawn["noise"]))
    assert gap(loss, g["loss_per_sample"]) <= 1e-5


# ---------------------------------------------------------------------------------------------
# One step of stage 1 (stage1.pt), through the functions that the loop of train_decoder.py calls


def our_head_names(state):
    """The released heads' tensors under the names that Discriminator gives them."""
    parts = {"0.0": "first.0", "0.1": "first.1", "1.fn.0": "mix.0", "1.fn.1": "mix.1", "2": "last"}
    ours = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        part, _, kind = rest.rpartition(".")
        ours[f"heads.{head}.{parts[part]}.{kind}"] = tensor
    return ours


@pytest.fixture
def stage1(golden):
    """The golden step, the frozen features, the discriminator before it and the golden RAE.

    On one thread, as the numbers were computed.
    """
    from timm.models.vision_transformer import VisionTransformer

    g = golden["stage1"]
    vit = VisionTransformer(**g["dino_timm_kwargs"], dynamic_img_size=True)
    vit.load_state_dict(g["dino_state_dict"], strict=False)
    features = ViTFeatures(Encoder(vit, 224, IMAGENET_MEAN, IMAGENET_STD))
    assert features.blocks == [0, 1, 2, 3]
    discriminator = Discriminator(features.width, num_layers=5)
    discriminator.load_state_dict(our_head_names(g["heads_state_dict"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield g, features, discriminator, golden_rae(golden["rae"]["mae"])
    torch.set_num_threads(threads)


def below_zero(module, inputs, y):
    """A forward hook that moves outputs within 1e-6 of zero below it.

    One activation of the golden step lies so near to LeakyReLU's kink, at 6e-7, that rounding
    decides on its side, and with it moves some gradients by 1e-3. In the golden run it is below.
    """
    return torch.where(y.abs() < 1e-6, y - 2e-6, y)


def test_a_step_of_stage1(stage1):
    """Both turns of a step, each number to 1e-5 of its largest entry.

    The golden discriminator's gradients were not zeroed between the turns: d_gradients and
    heads_after_step hold the generator's turn too. So here the discriminator gets gradients in
    both. The released loop and ours zero them (train_stage1.py, line 428 at commit a4d18c4).
    """
    g, features, discriminator, rae = stage1
    optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0
    )

    # The decoder's turn.
    discriminator.eval()
    last_layer = rae.decoder.decoder_pred.weight
    reconstruction = rae.encoder.denormalize(rae.decoder(g["tokens"]))
    rec_loss = (reconstruction - g["images"]).abs().mean()
    logits = discriminator(features(reconstruction))
    gan_loss = -logits.mean()
    (g_rec,) = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)
    (g_gan,) = torch.autograd.grad(gan_loss, last_layer, retain_graph=True)
    weight = adaptive_weight(g_rec, g_gan)
    total = rec_loss + 0.75 * weight * gan_loss
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in rae.decoder.parameters()])
    assert relative_gap(reconstruction, g["reconstruction"]) <= 1e-5
    assert relative_gap(logits, g["logits_generator"]) <= 1e-5
    assert relative_gap(rec_loss, g["l1"]) <= 1e-5
    assert relative_gap(gan_loss, g["gan_loss"]) <= 1e-5
    assert relative_gap(weight, g["adaptive_weight"]) <= 1e-5
    assert relative_gap(total, g["total"]) <= 1e-5
    assert relative_gap(last_layer.grad, g["grad_last_layer"]) <= 1e-5
    assert relative_gap(norm, g["grad_decoder_norm"]) <= 1e-5

    # The discriminator's turn: two power iterations, of the fake batch and then of the real one.
    discriminator.heads[4].mix[1].register_forward_hook(below_zero)
    discriminator.train()
    fake_features = features((g["fake"] + 1) / 2)
    real_features = features(g["images"])
    logits_fake = discriminator(fake_features)
    logits_real = discriminator(real_features)
    d_loss = hinge_d_loss(logits_real, logits_fake)
    d_loss.backward()
    assert relative_gap(logits_fake, g["logits_fake"]) <= 1e-5
    assert relative_gap(logits_real, g["logits_real"]) <= 1e-5
    assert relative_gap(d_loss, g["d_loss"]) <= 1e-5

    gradients = our_head_names(g["d_gradients"])
    before_a_norm = ("first.0.bias", "mix.0.bias")  # such a bias changes nothing
    for name, parameter in discriminator.named_parameters():
        if name.endswith(before_a_norm):
            assert parameter.grad.abs().max() <= 1e-7, name  # rounding
        else:
            assert relative_gap(parameter.grad, gradients[name]) <= 1e-5, name
    optimizer.step()
    after = our_head_names(g["heads_after_step"])
    state = discriminator.state_dict()
    assert state.keys() == after.keys()
    for name, tensor in after.items():
        if not name.endswith(before_a_norm):  # AdamW scales that rounding up
            assert relative_gap(state[name], tensor) <= 1e-5, name


def test_diffaug_is_the_released_one(golden):
    g = golden["stage1"]
    images = (g["diffaug_in"] + 1) / 2  # the official function takes [-1, 1]
    assert relative_gap(2 * diffaug(images, g["diffaug_u"]) - 1, g["diffaug_out"]) <= 1e-5


@pytest.mark.parametrize("name", ["dit_dh", "dit"])
@pytest.mark.parametrize("key", ["pos_embed", "t_embedder.W"])
def test_positions_and_frequencies_are_loaded_not_recomputed(golden, name, key):
    g = golden[name]
    changed = g["state_dict"][key].clone()
    changed.view(-1)[3] += 0.5
    with torch.no_grad():
        v = load_dit(g["state_dict"] | {key: changed})(*inputs_of(g))
    assert gap(v, tokens(g["velocity"])) > 1e-4


def test_decoder_positions_are_loaded_not_recomputed(golden):
    g = golden["rae"]["dinov2"]
    pos = g["decoder_state_dict"]["decoder_pos_embed"].clone()
    pos[0, 0, 0] += 1  # the CLS row too
    with torch.no_grad():
        images = golden_rae(g, decoder_pos_embed=pos).decode(tokens(g["latent"]))
    assert gap(images, g["reconstruction"]) > 1e-4


@pytest.mark.parametrize("name", ["dit_dh", "dit"])
def test_export_is_the_released_file(golden, name):
    state = golden[name]["state_dict"]
    assert same(load_dit(state).state_dict(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_export_is_the_released_file(golden, kind):
    state = golden["rae"][kind]["decoder_state_dict"]
    decoder = load_decoder({"ema": state, "num_heads": 2})
    assert same(to_official_names(decoder.state_dict()), state)


def test_a_checkpoint_brings_its_sizes():
    """A head as wide as the backbone, of three blocks: the shapes would be read as two."""
    model = DiTDH(20, 5, (24, 2, 2), (24, 3, 3), num_classes=7)
    again = load_dit({"ema": model.state_dict(), "config": model.config})
    assert again.config == model.config
    assert same(again.state_dict(), model.state_dict())
    assert load_dit(model.state_dict()).config["wide_head"] == (24, 2, 3)


def test_decoder_shapes_are_read_from_the_file():
    decoder = Decoder(20, 6, 32, 40, 3, 5, 56)
    again = load_decoder({"ema": decoder.state_dict(), "num_heads": 5})
    assert (again.grid_size, again.patch_size, len(again.decoder_layers)) == (6, 32, 3)
    z = torch.randn(2, 36, 20)
    assert torch.equal(again(z), decoder(z))


def without(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


def test_wrong_files_name_the_tensor(golden):
    for name in ("dit_dh", "dit"):
        state = golden[name]["state_dict"]
        # Norms tell how many blocks there are, and s_embedder that there is a head.
        for key in state:
            if not key.endswith("norm1.weight") and key != "s_embedder.proj.weight":
                with pytest.raises((KeyError, RuntimeError), match=re.escape(key)):
                    load_dit(without(state, key))
    state = golden["dit_dh"]["state_dict"]
    with pytest.raises(RuntimeError, match=r"mismatch for blocks.1.attn.qkv.weight.*72, 25"):
        load_dit(state | {"blocks.1.attn.qkv.weight": torch.zeros(72, 25)})


def test_wrong_decoder_files_name_the_tensor(golden):
    file = {"num_heads": 2}
    official = golden["rae"]["mae"]["decoder_state_dict"]
    state = load_decoder(file | {"ema": official}).state_dict()
    for key in state:
        if not key.endswith("fc1.bias"):  # these tell how many layers there are
            with pytest.raises((KeyError, RuntimeError, UsageError), match=re.escape(key)):
                load_decoder(file | {"ema": without(state, key)})
    for name, size in (("more.weight", (3,)), ("decoder_layers.1.fc2.weight", (24, 41))):
        with pytest.raises(RuntimeError, match=name.removesuffix("weight")):
            load_decoder(file | {"ema": state | {name: torch.zeros(size)}})


def test_parts_that_do_not_fit(golden):
    rae = golden_rae(golden["rae"]["mae"])  # 3 x 3 tokens of 24 channels
    mean = torch.zeros(24, 3, 3)
    for parts in (
        (rae.decoder, mean, torch.ones(24, 4, 4)),
        (Decoder(20, 3, 16, 24, 1, 2, 40), mean, mean),
        (Decoder(24, 4, 16, 24, 1, 2, 40), mean, mean),
    ):
        with pytest.raises(UsageError, match="differ in shape"):
            RAE(rae.encoder, *parts)


def million_parameters(model_class, *arguments):
    with torch.device("meta"):
        model = model_class(*arguments)
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


@pytest.mark.parametrize(
    "size, dit, dit_dh",
    [("S", 33.6, 196.5), ("B", 131.9, 294.3), ("L", 459.9, 621.7), ("XL", 677.2, 838.7)],
)
def test_parameter_counts(size, dit, dit_dh):
    assert million_parameters(DiTDH, 768, 16, SIZES[size], None, 1000) == dit
    assert million_parameters(DiTDH, 768, 16, SIZES[size], (2048, 2, 16), 1000) == dit_dh


@pytest.mark.parametrize("size, millions", [("B", 86.4), ("L", 304.2), ("XL", 415.4)])
def test_decoder_parameter_counts(size, millions):
    assert million_parameters(Decoder, 768, 16, 16, *DECODERS[size]) == millions


@pytest.mark.parametrize(
    "name, latent_dim",
    [
        ("dinov2-s", 384),
        pytest.param("dinov2-b", 768, marks=pytest.mark.slow),
        ("siglip2-b", 768),
        pytest.param("mae-b", 768, marks=pytest.mark.slow),
        ("timm:vit_tiny_patch16_224", 192),
        pytest.param("dinov2-l", 1024, marks=pytest.mark.slow),
    ],
)
def test_encoders_at_full_size(name, latent_dim, monkeypatch):
    """Random weights: the shapes at 256 and 512 px, frozen, affine-free last norm."""
    import timm

    create_model = timm.create_model

    def without_download(model, pretrained, **options):
        return create_model(model, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    for size, num_tokens in ((256, 256), (512, 1024)):
        encoder = load_encoder(name, size)
        assert not encoder.vit.training
        assert not any(p.requires_grad for p in encoder.parameters())
        assert encoder.vit.norm.weight is None
        assert encoder.input_size == (size * 14 // 16 if "dinov2" in name else size)
        assert encoder.grid_size**2 == num_tokens
        assert encoder.latent_dim == latent_dim
        assert encoder.vit.pos_embed.shape[1] in (num_tokens, num_tokens + 1)
        if size == 256 or latent_dim < 384:  # 1,024 tokens of a larger model take long
            z = encoder(torch.rand(1, 3, size, size))
            assert z.shape == (1, num_tokens, latent_dim)
            assert z.var(-1).sub(1).abs().max() < 0.01
    x = torch.linspace(-3, 3, 50)
    gelu = F.gelu(x, approximate="tanh" if name == "siglip2-b" else "none")
    assert gap(encoder.vit.blocks[0].mlp.act(x), gelu) < 1e-6
