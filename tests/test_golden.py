"""The released code's numbers (tests/golden, commit a4d18c4), and its files: load, export, refuse."""

import pytest
import torch
from conftest import gap, tokens
from dit_dh import DiTDH, SIZES, flow_loss, load_released, sample, shift_time, time_grid
from rae import DECODERS, RAE, Decoder, Encoder, build_encoder, load_released_decoder

KINDS = ["dinov2", "mae", "siglip"]


def golden_rae(g, **replace):
    from timm.models.vision_transformer import VisionTransformer
    vit = VisionTransformer(**g["timm_kwargs"])
    vit.load_state_dict(g["encoder_state_dict"], strict=False)    # siglip's unused pooling is not in the file
    encoder = Encoder(vit, g["encoder_input_size"], g["image_mean"], g["image_std"],
                      antialias=g["kind"] == "dinov2")
    decoder = load_released_decoder(g["decoder_state_dict"] | replace, heads=g["decoder_config"]["heads"])
    return RAE(encoder, decoder, g["stat"]["mean"], g["stat"]["var"]).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_rae(golden, kind):
    g = golden["rae"][kind]
    rae = golden_rae(g)
    with torch.no_grad():
        assert gap(rae.encode(g["image"]), tokens(g["latent"])) <= 2e-5
        assert gap(rae.decode(tokens(g["latent"])), g["reconstruction"]) <= 2e-5


def test_positions_need_the_right_antialias(golden):
    g = golden["rae"]["mae"]
    rae = golden_rae(g | {"kind": "dinov2"})                         # antialiased, as timm would do by itself
    assert gap(rae.encode(g["image"]), tokens(g["latent"])) > 1e-4


def test_velocity(golden):
    g = golden["dit_dh"]
    model, guide = load_released(g["state_dict"]), load_released(g["guide_state_dict"])
    x, t, y = tokens(g["x"]), g["t"], g["y"]
    with torch.no_grad():
        assert gap(model(x, t, y), tokens(g["velocity"])) <= 2e-5
        assert gap(model(x, t, torch.full_like(y, g["num_classes"])), tokens(g["velocity_null"])) <= 2e-5
        assert gap(guide(x, t, y), tokens(g["velocity_guide"])) <= 2e-5


def test_guided_velocity(golden):
    """One Euler step of length 1 takes x to x - v: the guided velocity at the golden times."""
    g = golden["dit_dh"]
    model, guide = load_released(g["state_dict"]), load_released(g["guide_state_dict"])
    for i, now in enumerate(g["t"].tolist()):
        x, y = tokens(g["x"])[i:i + 1], g["y"][i:i + 1]
        grid = torch.tensor([now, now - 1], dtype=torch.float64)
        for name, how in (("velocity_cfg", dict(cfg=g["scale"])),
                          ("velocity_autoguidance", dict(guide=guide, scale=g["scale"]))):
            v = x - sample(model, x, y, grid, interval=g["interval"], **how)
            assert gap(v, tokens(g[name])[i:i + 1]) <= 2e-5


def test_plain_dit(golden):
    g = golden["dit"]
    model = load_released(g["state_dict"])
    x, null = tokens(g["x"]), torch.full_like(g["y"], g["num_classes"])
    assert model.depth == (2, 0)
    with torch.no_grad():
        assert gap(model(x, g["t"], g["y"]), tokens(g["velocity"])) <= 2e-5
        assert gap(model(x, g["t"], null), tokens(g["velocity_null"])) <= 2e-5


def test_samples(golden):
    g = golden["dit_dh"]
    model, guide = load_released(g["state_dict"]), load_released(g["guide_state_dict"])
    grid = time_grid(g["num_steps"] - 1, g["shift"], t_last=0.001)    # the released grid
    assert gap(grid, g["t_grid"]) <= 1e-6
    how = dict(noise=tokens(g["x"]), y=g["y"], grid=grid, interval=g["interval"])
    assert gap(sample(model, **how), tokens(g["sample"])) <= 1e-4
    assert gap(sample(model, cfg=g["scale"], **how), tokens(g["sample_cfg"])) <= 1e-4
    assert gap(sample(model, guide=guide, scale=g["scale"], **how), tokens(g["sample_autoguidance"])) <= 1e-4


def test_loss(golden):
    g, i = golden["dit_dh"], golden["dit_dh"]["loss_inputs"]
    assert gap(shift_time(i["t_before_shift"], g["shift"]), i["t_after_shift"]) <= 1e-6
    loss = flow_loss(load_released(g["state_dict"]), tokens(i["data"]), i["y"], g["shift"],
                     i["t_before_shift"],
                     tokens(i["noise"]))
    assert gap(loss, g["loss_per_sample"]) <= 1e-5


def test_released_positions_and_frequencies_are_loaded_not_recomputed(golden):
    g = golden["rae"]["dinov2"]
    pos = g["decoder_state_dict"]["decoder_pos_embed"].clone()
    pos[0, 0, 0] += 1                                                 # the CLS row too
    with torch.no_grad():
        z = tokens(g["latent"])
        assert gap(golden_rae(g).decode(z), golden_rae(g, decoder_pos_embed=pos).decode(z)) > 1e-4
        for name in ("dit_dh", "dit"):
            g = golden[name]
            for key in ("pos_embed", "t_embedder.W"):
                state = g["state_dict"] | {key: g["state_dict"][key].clone()}
                state[key].view(-1)[3] += 0.5
                args = tokens(g["x"]), g["t"], g["y"]
                assert gap(load_released(state)(*args), tokens(g["velocity"])) > 1e-4


def test_export_is_the_released_file(golden):
    for name in ("dit_dh", "dit"):
        state = golden[name]["state_dict"]
        model = load_released(state)
        again = model.state_dict()
        assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
        args = tokens(golden[name]["x"]), golden[name]["t"], golden[name]["y"]
        assert torch.equal(load_released(again)(*args), model(*args))
    for kind in KINDS:
        state = golden["rae"][kind]["decoder_state_dict"]
        again = load_released_decoder(state, heads=2).state_dict()
        assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


@pytest.mark.parametrize("width, depth, heads", [((24, 48), (3, 1), (2, 3)), ((48, 48), (1, 2), (4, 4)),
                                                 ((40, 32), (2, 3), (5, 2)), ((24, 24), (2, 0), (3, 3))])
def test_export_then_load_other_shapes(width, depth, heads):
    model = DiTDH(20, 5, width, depth, heads, num_classes=7).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    again = load_released(model.state_dict())
    assert again.config == model.config
    args = torch.randn(2, 25, 20), torch.rand(2), torch.tensor([0, 7])
    assert torch.equal(again(*args), model(*args))


def test_decoder_shapes_are_read_from_the_file():
    decoder = Decoder(20, 6, 32, 40, 3, 5, 56)
    again = load_released_decoder(decoder.state_dict(), heads=5)
    z = torch.randn(2, 36, 20)
    assert again.config == decoder.config and torch.equal(again(z), decoder(z))
    with pytest.raises(ValueError, match="heads"):
        load_released_decoder(decoder.state_dict())


def test_wrong_files_name_the_tensor(golden):
    dit, decoder = golden["dit_dh"]["state_dict"], golden["rae"]["mae"]["decoder_state_dict"]
    with pytest.raises(ValueError, match="decoder"):
        load_released(decoder)
    with pytest.raises(ValueError, match="diffusion model"):
        load_released_decoder(dit, heads=2)
    for load, state, extra in ((load_released, dit, {}), (load_released_decoder, decoder, {"heads": 2})):
        for key in state:
            with pytest.raises(ValueError, match=key.replace(".", r"\.")):
                load({k: v for k, v in state.items() if k != key}, **extra)
        with pytest.raises(ValueError, match="nexpected.*more.weight|more.weight is unexpected"):
            load(state | {"more.weight": torch.zeros(3)}, **extra)
    bare = {k: v for k, v in dit.items() if "rope" not in k}           # without tables, heads must be given
    with pytest.raises(ValueError, match="pass heads"):
        load_released(bare)
    assert load_released(bare, heads=(2, 2)).config == load_released(dit).config
    with pytest.raises(ValueError, match=r"mismatch for blocks.1.attn.qkv.weight.*72, 25"):
        load_released(dit | {"blocks.1.attn.qkv.weight": torch.zeros(72, 25)})
    g = golden["rae"]["mae"]
    with pytest.raises(ValueError, match=r"statistics mean have shape \(24, 4, 4\)"):
        RAE(golden_rae(g).encoder, golden_rae(g).decoder, torch.zeros(24, 4, 4), torch.ones(24, 4, 4))
    with pytest.raises(ValueError, match="channels 20 .* 24"):
        RAE(golden_rae(g).encoder, Decoder(20, 3, 16, 24, 1, 2, 40))
    with pytest.raises(ValueError, match="grid 4 .* 3"):
        RAE(golden_rae(g).encoder, Decoder(24, 4, 16, 24, 1, 2, 40))


def parameters(make):
    with torch.device("meta"):
        return round(sum(p.numel() for p in make().parameters()) / 1e6, 1)


@pytest.mark.parametrize("size, dit, dit_dh", [("S", 33.6, 196.5), ("B", 131.9, 294.3), ("L", 459.9, 621.7),
                                               ("XL", 677.2, 838.7)])
def test_parameter_counts(size, dit, dit_dh):
    width, depth, heads = SIZES[size]
    assert parameters(lambda: DiTDH(768, 16, (width, width), (depth, 0), (heads, heads), 1000)) == dit
    assert parameters(lambda: DiTDH(768, 16, (width, 2048), (depth, 2), (heads, 16), 1000)) == dit_dh


@pytest.mark.parametrize("size, millions", [("B", 86.4), ("L", 304.2), ("XL", 415.4)])
def test_decoder_parameter_counts(size, millions):
    width, depth, heads, mlp_dim = DECODERS[size]
    assert parameters(lambda: Decoder(768, 16, 16, width, depth, heads, mlp_dim)) == millions


@pytest.mark.parametrize("head", SIZES)
def test_heads_of_every_size(head):
    with torch.device("meta"):
        model = DiTDH(768, 16, (384, SIZES[head][0]), (1, 2), (6, SIZES[head][2]), 10)
    assert model.blocks[1].norm1.weight.numel() == SIZES[head][0]


@pytest.mark.parametrize("name, dim", [
    ("dinov2-s", 384), ("dinov2-b", 768), ("siglip2-b", 768), ("mae-b", 768),
    ("timm:vit_tiny_patch16_224", 192), pytest.param("dinov2-l", 1024, marks=pytest.mark.slow)])
def test_encoders_at_full_size(name, dim, monkeypatch):
    """Random weights: the shapes at 256 and 512 px, frozen under train(), affine-free last norm."""
    import timm
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **kw: create(*a, pretrained=False, **kw))
    for size, tokens_ in ((256, 256), (512, 1024)):
        encoder = build_encoder(name, size).train()
        assert not encoder.training and not encoder.vit.training
        assert not any(p.requires_grad for p in encoder.parameters()) and encoder.vit.norm.weight is None
        assert encoder.input_size == (size * 14 // 16 if "dinov2" in name else size)
        if size == 256 or dim < 768:               # 1024 tokens of a base model: the positions' shape must do
            z = encoder(torch.rand(1, 3, size, size))
            assert z.shape == (1, tokens_, dim) and z.var(-1).sub(1).abs().max() < 0.01
        assert encoder.grid ** 2 == tokens_ and encoder.dim == dim
        assert encoder.vit.pos_embed.shape[1] in (tokens_, tokens_ + 1)
    x = torch.linspace(-3, 3, 50)
    kind = "tanh" if name == "siglip2-b" else "none"
    assert gap(encoder.vit.blocks[0].mlp.act(x), torch.nn.functional.gelu(x, approximate=kind)) < 1e-6
