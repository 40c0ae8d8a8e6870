"""dit_dh.py: the flow's closed forms, guidance, and what the model starts as."""

import pytest
import torch
from conftest import gap
from dit_dh import DiTDH, Rope, draw_time, flow_loss, sample, shift_alpha, shift_time, sincos_2d, time_grid


class Towards(torch.nn.Module):
    """The exact velocity field of data that is one point, which depends on the label; counts its calls."""

    num_classes = 3

    def __init__(self, points):
        super().__init__()
        self.points, self.calls = points, []

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item()))
        return (x - self.points[y]) / t[:, None, None]


def test_shift():
    assert shift_alpha(256, 768) == pytest.approx(6.928, abs=1e-3)
    assert shift_alpha(1024, 768) == pytest.approx(13.856, abs=1e-3)
    assert shift_alpha(16, 64) == 1.0
    t = torch.linspace(0, 1, 11)
    assert gap(shift_time(t, 1.0), t) == 0
    s = shift_time(t, 6.928)
    assert s[0] == 0 and s[-1] == 1 and (s[1:] > s[:-1]).all() and (s[1:-1] > t[1:-1]).all()
    assert gap(shift_time(s, 1 / 6.928), t) < 1e-6                    # the inverse shift


def test_time_grid():
    grid = time_grid(50, 3.0)
    assert len(grid) == 51 and grid[0] == 1 and grid[-1] == 0 and (grid[1:] < grid[:-1]).all()
    released = shift_time(1 - torch.linspace(0, 0.999, 50), 6.928)
    assert gap(time_grid(49, 6.928, 0.001), released) < 1e-6
    assert released[-1] == pytest.approx(0.0069, abs=1e-4)


def test_draw_time():
    u = torch.linspace(1e-4, 1 - 1e-4, 20001)
    t = draw_time(u)
    logit = torch.logit(t.double())
    assert t.min() > 0 and t.max() <= 0.999 and abs(logit.mean()) < 0.01 and abs(logit.std() - 1) < 0.01
    assert gap(draw_time(u, "uniform"), 0.999 * u) == 0
    assert torch.isfinite(draw_time(torch.tensor([0.0, 1 - 2 ** -24]))).all()


def test_euler_is_exact_on_a_straight_flow():
    points, noise, y = torch.randn(4, 5, 6), torch.randn(3, 5, 6), torch.tensor([2, 0, 1])
    for steps in (1, 7):
        model = Towards(points)
        assert gap(sample(model, noise, y, time_grid(steps, 2.0)), points[y]) < 1e-5
        assert len(model.calls) == steps


def test_guidance_costs_and_formula():
    points, noise, y = torch.randn(4, 5, 6), torch.randn(3, 5, 6), torch.tensor([2, 0, 1])
    grid = time_grid(4, 1.0)                           # 1, .75, .5, .25, 0
    model = Towards(points)
    got = sample(model, noise, y, grid, cfg=1.5)
    assert gap(got, points[3] + 1.5 * (points[y] - points[3])) < 1e-5
    assert [n for n, _ in model.calls] == [6] * 4                     # one doubled batch a step
    model, weak = Towards(points), Towards(torch.zeros(4, 5, 6))
    got = sample(model, noise, y, grid, guide=weak, scale=1.5)
    assert gap(got, 1.5 * points[y]) < 1e-5
    assert [n for n, _ in model.calls] == [n for n, _ in weak.calls] == [3] * 4       # each model once a step
    model, weak = Towards(points), Towards(points)
    sample(model, noise, y, grid, guide=weak, scale=1.5, interval=(0.5, 0.8))
    assert [t for _, t in weak.calls] == [0.75, 0.5] and len(model.calls) == 4
    model = Towards(points)
    sample(model, noise, y, grid, cfg=2.0, interval=(0.5, 0.8))
    assert [n for n, _ in model.calls] == [3, 6, 6, 3]
    with pytest.raises(ValueError, match="exclude"):
        sample(model, noise, y, grid, cfg=2.0, guide=weak)


def test_loss_is_zero_for_the_true_velocity():
    z, noise, t = torch.randn(3, 5, 6), torch.randn(3, 5, 6), torch.rand(3) * 0.8 + 0.1
    points = torch.cat([z, z[:1]])
    assert flow_loss(Towards(points), z, torch.arange(3), 2.0, t, noise).max() < 1e-8
    loss = flow_loss(Towards(points), z, torch.arange(3), 2.0)                      # t and noise drawn inside
    assert loss.shape == (3,) and loss.max() < 1e-4


@pytest.mark.parametrize("depth", [(2, 2), (2, 0)])
def test_a_new_model_predicts_zero(depth):
    torch.manual_seed(0)
    model = DiTDH(6, 4, (16, 32), depth, (2, 4), 3)
    assert model(torch.randn(2, 16, 6), torch.rand(2), torch.tensor([0, 3])).abs().max() == 0
    default_init = not torch.equal(model.blocks[0].attn.qkv.bias, torch.zeros(48))
    assert default_init == bool(depth[1])              # the plain DiT starts all linears with zero bias
    with pytest.raises(ValueError, match="width 18 with 3 heads"):
        DiTDH(6, 4, (18, 32), depth, (3, 4), 3)


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = DiTDH(6, 4, (16, 32), (2, 2), (2, 4), 3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    flow_loss(model, torch.randn(4, 16, 6), torch.tensor([0, 1, 2, 3]), 1.0).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_rope_turns_by_the_distance():
    rope = Rope(8, 5)
    q, k = torch.randn(8), torch.randn(8)
    scores = rope(q.expand(25, 8)) @ rope(k.expand(25, 8)).T          # (25, 25), tokens row by row
    assert torch.allclose(scores[0, 6], scores[12, 18], atol=1e-5)    # one row and one column further
    assert torch.allclose(scores[3, 1], scores[23, 21], atol=1e-5)
    assert not torch.allclose(scores[0, 1], scores[0, 5])
    assert torch.allclose(rope(q.expand(25, 8)).norm(dim=1), q.norm().expand(25), atol=1e-5)


def test_sincos_layout():
    pos = sincos_2d(8, 3).view(3, 3, 8)                # (row, column, channel)
    assert gap(pos[0, :, :4], pos[2, :, :4]) == 0 and gap(pos[:, 0, 4:], pos[:, 2, 4:]) == 0
    assert pos[1, 2, 0] == pytest.approx(0.9093, abs=1e-4)            # sin 2
    assert pos[1, 2, 2] == pytest.approx(-0.4161, abs=1e-4)           # cos 2


def test_bf16_keeps_float32_where_it_matters():
    torch.manual_seed(0)
    model = DiTDH(6, 4, (16, 32), (2, 2), (2, 4), 3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    args = torch.randn(2, 16, 6), torch.rand(2), torch.tensor([0, 3])
    kinds = []
    model.blocks[0].norm1.register_forward_hook(lambda m, i, o: kinds.append((i[0].dtype, o.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*args).float()
    assert kinds == [(torch.float32, torch.float32)]
    assert 0 < gap(low, model(*args)) < 0.1 * model(*args).abs().max()
