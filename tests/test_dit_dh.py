"""dit_dh.py: the flow's closed forms, guidance, and what the model starts as."""

import copy
import math

import pytest
import torch

from dit_dh import (
    DiTDH,
    RoPE2d,
    draw_time,
    flow_loss,
    sample,
    shift_alpha,
    shift_time,
    sincos_2d,
    time_grid,
)
from rae import Decoder
from tests.conftest import compiler, gap, same


class Towards(torch.nn.Module):
    """The exact velocity of data that is one point per label; notes (batch, time) of its calls."""

    num_classes = 3

    def __init__(self, points):
        super().__init__()
        self.points = points  # (4, N, C): of three classes and the null label
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item()))
        return (x - self.points[y]) / t[:, None, None]

    def batches(self):
        return [batch for batch, _ in self.calls]

    def times(self):
        return [t for _, t in self.calls]


def small_model(wide_head=(32, 2, 4)):
    torch.manual_seed(0)
    return DiTDH(6, 4, (16, 2, 2), wide_head, num_classes=3)


def random_model(wide_head=(32, 2, 4)):
    """The same with random weights everywhere: a new model's output is zero."""
    model = small_model(wide_head)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture
def flow():
    """Points (4, N, C), noise (3, N, C) and labels of a flow with N = 5 and C = 6."""
    g = torch.Generator().manual_seed(0)
    points = torch.randn(4, 5, 6, generator=g)
    noise = torch.randn(3, 5, 6, generator=g)
    return points, noise, torch.tensor([2, 0, 1])


def test_shift():
    assert shift_alpha(256, 768) == pytest.approx(6.928, abs=1e-3)
    assert shift_alpha(1024, 768) == pytest.approx(13.856, abs=1e-3)
    assert shift_alpha(16, 64) == 1.0
    t = torch.linspace(0, 1, 11)
    assert gap(shift_time(t, 1.0), t) == 0

    s = shift_time(t, 6.928)
    assert s[0] == 0
    assert s[-1] == 1
    assert (s[1:] > s[:-1]).all()
    assert (s[1:-1] > t[1:-1]).all()
    assert gap(shift_time(s, 1 / 6.928), t) < 1e-6  # the inverse shift


def test_time_grid():
    grid = time_grid(50, 3.0)
    assert len(grid) == 51
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid[1:] < grid[:-1]).all()

    released = shift_time(1 - torch.linspace(0, 0.999, 50), 6.928)
    assert gap(time_grid(49, 6.928, 0.001), released) < 1e-6
    assert released[-1] == pytest.approx(0.0069, abs=1e-4)


def test_draw_time():
    """Bounds of five standard deviations."""
    g = torch.Generator().manual_seed(0)
    t = draw_time(20000, generator=g)
    logit = torch.logit(t.double())
    assert t.shape == (20000,)
    assert 0 < t.min()
    assert t.max() < 0.999
    assert abs(logit.mean()) < 0.036
    assert abs(logit.std() - 1) < 0.025
    assert torch.equal(t, draw_time(20000, generator=g.manual_seed(0)))

    t = draw_time(20000, "uniform", g)
    assert 0 <= t.min()
    assert 0.99 < t.max() <= 0.999
    assert abs(t.mean() - 0.4995) < 0.011


# ---------------------------------------------------------------------------------------------
# The sampler and the loss


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_is_exact_on_a_straight_flow(flow, steps):
    points, noise, y = flow
    model = Towards(points)
    assert gap(sample(model, noise, y, time_grid(steps, 2.0)), points[y]) < 1e-5
    assert len(model.calls) == steps


def test_guidance_costs_and_formula(flow):
    points, noise, y = flow
    timesteps = time_grid(4, 1.0)  # 1, .75, .5, .25, 0

    # By the null label: one doubled batch a step.
    model = Towards(points)
    got = sample(model, noise, y, timesteps, cfg_scale=1.5)
    assert gap(got, points[3] + 1.5 * (points[y] - points[3])) < 1e-5
    assert model.batches() == [6, 6, 6, 6]

    # By a weaker model: each model once a step.
    model = Towards(points)
    weak = Towards(torch.zeros(4, 5, 6))
    got = sample(model, noise, y, timesteps, guidance_model=weak, guidance_scale=1.5)
    assert gap(got, 1.5 * points[y]) < 1e-5
    assert model.batches() == [3, 3, 3, 3]
    assert weak.batches() == [3, 3, 3, 3]

    # Within an interval only.
    model = Towards(points)
    weak = Towards(points)
    sample(model, noise, y, timesteps, guidance_model=weak, guidance_scale=1.5, interval=(0.5, 0.8))
    assert weak.times() == [0.75, 0.5]
    assert len(model.calls) == 4
    model = Towards(points)
    sample(model, noise, y, timesteps, cfg_scale=2.0, interval=(0.5, 0.8))
    assert model.batches() == [3, 6, 6, 3]

    with pytest.raises(ValueError):
        sample(model, noise, y, timesteps, cfg_scale=2.0, guidance_model=weak, guidance_scale=1.5)


def test_guidance_of_scale_1_costs_nothing(flow):
    points, noise, y = flow
    timesteps = time_grid(4, 1.0)
    model = Towards(points)
    weak = Towards(points)
    sample(model, noise, y, timesteps, cfg_scale=1.0, guidance_model=weak, guidance_scale=1.0)
    assert model.batches() == [3, 3, 3, 3]
    assert weak.calls == []


def test_both_ends_of_the_interval_are_guided(flow):
    points, noise, y = flow
    model = Towards(points)
    sample(model, noise, y, time_grid(4, 1.0), cfg_scale=2.0, interval=(0.5, 0.75))
    assert model.batches() == [3, 6, 6, 3]  # at 1, 0.75, 0.5 and 0.25


def test_loss_is_zero_for_the_true_velocity():
    torch.manual_seed(0)
    z = torch.randn(3, 5, 6)
    noise = torch.randn(3, 5, 6)
    t = torch.rand(3) * 0.8 + 0.1
    model = Towards(torch.cat([z, z[:1]]))
    y = torch.arange(3)
    assert flow_loss(model, z, y, 2.0, t, noise).max() < 1e-8

    loss = flow_loss(model, z, y, 2.0)  # t and noise drawn inside
    assert loss.shape == (3,)
    assert loss.max() < 1e-4


def test_the_loss_by_hand():
    """Of a model that returns its time: the mean of (t' - v)^2 with t' = 3 t / (1 + 2 t)."""

    def model(x_t, t, y):
        return t[:, None, None].expand_as(x_t)  # 0.75 and 0.9

    z = torch.tensor([[[1.0, -1.0]], [[0.0, 2.0]]])
    noise = torch.tensor([[[2.0, 0.0]], [[1.0, 1.0]]])  # v: 1, 1 and 1, -1
    loss = flow_loss(model, z, torch.tensor([0, 1]), 3.0, torch.tensor([0.5, 0.75]), noise)
    assert loss[0].item() == pytest.approx(0.25**2), "a given t is shifted too"
    assert loss[1].item() == pytest.approx((0.1**2 + 1.9**2) / 2)


def test_the_loss_draws_times_and_noise():
    """A logit-normal time for each image, shifted, and normal noise; bounds of five deviations."""
    seen = []

    def model(x_t, t, y):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    loss = flow_loss(model, torch.zeros(4000, 2, 3), torch.zeros(4000, dtype=torch.long), 3.0)
    ((x_t, t),) = seen
    logit = torch.logit(shift_time(t.double(), 1 / 3))
    assert abs(logit.mean()) < 0.08
    assert abs(logit.std() - 1) < 0.06
    noise = x_t / t[:, None, None]
    assert abs(noise.mean()) < 0.04
    assert abs(noise.std() - 1) < 0.03
    assert abs(noise.pow(4).mean() - 3) < 0.4, "normal: 3; uniform numbers have 1.8"
    assert (noise[0] != noise[1]).all()
    assert gap(loss.float(), noise.square().mean(dim=(1, 2))) < 1e-3


# ---------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("wide_head", [(32, 2, 4), None])
def test_a_new_model_predicts_zero(wide_head):
    model = small_model(wide_head)
    assert model.has_wide_head == (wide_head is not None)
    assert len(model.blocks) == (4 if wide_head else 2)
    assert model.backbone_depth == 2
    v = model(torch.randn(2, 16, 6), torch.rand(2), torch.tensor([0, 3]))
    assert v.shape == (2, 16, 6)
    assert v.abs().max() == 0

    # The plain DiT starts all linear layers with bias zero.
    bias = model.blocks[0].attn.qkv.bias
    if wide_head:
        assert bias.abs().max() > 0
    else:
        assert bias.abs().max() == 0


def test_every_parameter_learns():
    model = random_model()
    z = torch.randn(4, 16, 6)
    flow_loss(model, z, torch.tensor([0, 1, 2, 3]), 1.0).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_rope_turns_by_the_distance():
    torch.manual_seed(0)
    rope = RoPE2d(8, 5)
    q = torch.randn(8)
    k = torch.randn(8)
    scores = rope(q.expand(25, 8)) @ rope(k.expand(25, 8)).T  # (25, 25), tokens row by row
    assert torch.allclose(scores[0, 6], scores[12, 18], atol=1e-5)  # a row and a column further
    assert torch.allclose(scores[3, 1], scores[23, 21], atol=1e-5)
    assert not torch.allclose(scores[0, 1], scores[0, 5])
    assert torch.allclose(rope(q.expand(25, 8)).norm(dim=1), q.norm().expand(25), atol=1e-5)


def test_rope_by_hand():
    """A head of 8 on a grid of 2: angles of row and column, each times 1 and 1/100."""
    x = torch.tensor([1.0, 0, 0, 2, 3, 0, 0, 4]).expand(4, 8)  # four tokens
    turned = RoPE2d(8, 2)(x)
    assert gap(turned[0], x[0]) == 0  # row 0, column 0
    cos, sin = math.cos(1), math.sin(1)
    low_cos, low_sin = math.cos(0.01), math.sin(0.01)
    row = torch.tensor([cos, sin, -2 * low_sin, 2 * low_cos])
    column = torch.tensor([3 * cos, 3 * sin, -4 * low_sin, 4 * low_cos])
    assert gap(turned[1], torch.cat([x[1, :4], column])) < 1e-6  # row 0, column 1
    assert gap(turned[2], torch.cat([row, x[2, 4:]])) < 1e-6
    assert gap(turned[3], torch.cat([row, column])) < 1e-6
    assert gap(RoPE2d(8, 2)(x[None, None])[0, 0], turned) == 0


def test_sincos_layout():
    pos = sincos_2d(8, 3).view(3, 3, 8)  # (row, column, channel)
    assert gap(pos[0, :, :4], pos[2, :, :4]) == 0
    assert gap(pos[:, 0, 4:], pos[:, 2, 4:]) == 0
    assert pos[1, 2, 0] == pytest.approx(0.9093, abs=1e-4)  # sin 2
    assert pos[1, 2, 2] == pytest.approx(-0.4161, abs=1e-4)  # cos 2


def test_bf16_keeps_float32_where_it_matters():
    model = random_model()
    inputs = (torch.randn(2, 16, 6), torch.rand(2), torch.tensor([0, 3]))
    dtypes = []

    def note_dtypes(module, args, output):
        dtypes.append((args[0].dtype, output.dtype))

    exact = model(*inputs)
    for block in (model.blocks[0], model.blocks[2]):  # of the backbone and of the head
        block.norm1.register_forward_hook(note_dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs).float()
    assert dtypes == [(torch.float32, torch.float32)] * 2
    assert 0 < gap(low, exact) < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kind", ["DiT^DH", "DiT", "decoder"])
def test_checkpointed_activations_have_equal_gradients(kind):
    model = random_model(None if kind == "DiT" else (32, 2, 4))
    if kind == "decoder":
        model = Decoder(6, 4, 2, 16, 2, 2, 24)
    x = torch.randn(2, 16, 6)
    t = torch.tensor([0.2, 0.7])
    y = torch.tensor([0, 3])
    kept = []
    gradients = []
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if kind == "decoder":
                loss = model(x).square().mean()
            else:
                loss = flow_loss(model, x, y, 1.0, t, x.flip(0)).mean()
        model.zero_grad()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert same(*gradients)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[pytest.mark.slow, compiler])]
)
def test_the_ema_is_isolated(compiled):
    """As train_diffusion.py makes it: a copy, before compiling."""
    model = random_model()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    inputs = (torch.randn(2, 16, 6), torch.rand(2), torch.tensor([0, 3]))
    before = ema(*inputs)
    if compiled:
        model.compile()
    online = model(*inputs)
    assert gap(online, before) < 1e-5
    assert online.requires_grad
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert gap(model(*inputs), before) > 0.01
    assert torch.equal(ema(*inputs), before)
