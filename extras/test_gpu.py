"""What only a GPU shows. `pytest -m gpu` runs these tests; without a CUDA device they are skipped.

Not run on a GPU yet. Their bodies ran on a CPU, with the fixture `device` returning "cpu", except
for the count of host-device syncs, which is CUDA's.
"""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rae
from dit_dh import DiTDH, flow_loss
from tests.conftest import SMALL_MODEL, TRAINING, assert_same_run, relative_distance

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rae.setup_distributed(SimpleNamespace(device="cuda", precision="fp32"))  # no TF32
    return "cuda"


def small_dit():
    """A DiT^DH whose zero-initialized layers are random, so that every gradient is nonzero."""
    model = DiTDH(32, 4, (64, 2, 2), (96, 2, 4), num_classes=10)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def dit_batch():
    """z (B, N, C), labels (B,), alpha, t (B,) and eps (B, N, C)."""
    z = torch.randn(8, 16, 32)
    return z, torch.arange(8), 2.0, torch.rand(8), torch.randn(8, 16, 32)


def on(device, values):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]


def results_on(device, model, function, inputs):
    """function(model, *inputs) and the gradients of its mean square, computed on a device."""
    model = copy.deepcopy(model).to(device)
    output = function(model, *on(device, inputs))
    output.square().mean().backward()
    return [output.detach().cpu()], [p.grad.cpu() for p in model.parameters()]


def predict(model, *inputs):
    return model(*inputs)


CASES = {
    "DiTDH": (small_dit, predict, lambda: (torch.randn(8, 16, 32), torch.rand(8), torch.arange(8))),
    "flow_loss": (small_dit, flow_loss, dit_batch),
    "Decoder": (
        lambda: rae.Decoder(32, 4, 4, *rae.DECODERS["toy"]),
        predict,
        lambda: (torch.randn(8, 16, 32),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_networks_equal_the_cpu(device, name):
    """Outputs and gradients in float32, to 1e-4 of their norm."""
    build, function, draw = CASES[name]
    model = build()
    inputs = draw()
    expected, expected_gradients = results_on("cpu", model, function, inputs)
    output, gradients = results_on(device, model, function, inputs)
    assert relative_distance(expected, output) < 1e-4
    assert relative_distance(expected_gradients, gradients) < 1e-4


def test_a_training_step_equals_the_cpu(device):
    """Weights and EMA after a step of loss, clipping, AdamW and EMA, to 1e-3 of their norm.

    Adam's first step has the same size for every weight, and rounding may flip the sign where the
    gradient is almost zero. A step that was not taken would be a distance of about 0.1.
    """
    model = small_dit()
    batch = dit_batch()
    weights = []
    for place in ("cpu", device):
        trained = copy.deepcopy(model).to(place)
        ema = copy.deepcopy(trained).requires_grad_(False)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, fused=True)
        flow_loss(trained, *on(place, batch)).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        rae.update_ema(ema, trained, 0.5, 100)
        weights.append([p.detach().cpu() for p in [*trained.parameters(), *ema.parameters()]])
    assert relative_distance(*weights) < 1e-3


def test_bf16_is_close_to_float32(device):
    """The loss of a DiT step to 1%, its gradients to 3% of their norm."""
    model = small_dit().to(device)
    batch = on(device, dit_batch())
    losses = []
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            loss = flow_loss(model, *batch).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert 0 < relative_distance(*gradients) < 0.03


@pytest.mark.parametrize("script", TRAINING)
def test_runs_repeat_and_resume_bit_by_bit(run, snapshots, device, script):
    """snapshots keeps the folder as it was after the save of step 2."""
    flags = f"--device {device} --starts 0 0 0" if "decoder" in script else f"--device {device}"
    run(script, f"{flags} --out a")
    run(script, f"{flags} --out b")
    assert_same_run("a", "b")
    assert "resuming a.2 at step 2" in run(script, f"{flags} --out a.2")
    assert_same_run("a", "a.2")


def test_all_stages_run(run, device):
    for script in (*TRAINING, "sample.py"):
        run(script, f"--device {device}")
    assert np.load("out/samples.npz")["arr_0"].shape == (20, 32, 32, 3)


# Each step reads the gradient's norm; stage 1 also reads the discriminator's.
@pytest.mark.parametrize(
    "script, flags, reads",
    [
        ("train_diffusion.py", f"{SMALL_MODEL} --sample-every 99", 1),
        ("train_decoder.py", "--starts 0 0 0 --eval-every 99 --eval-num 4", 2),
    ],
)
def test_host_device_syncs_of_a_step(run, device, script, flags, reads):
    """As CUDA counts them. A worker makes the batches, and nothing else is due."""
    flags += " --workers 1 --global-batch-size 8 --micro-batch-size 4 --log-every 99"
    flags += f" --save-every 99 --device {device}"
    syncs = []
    for steps in (2, 4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(script, f"{flags} --steps {steps} --out {steps}", tiny=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        syncs.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert syncs[1] - syncs[0] == 2 * reads
