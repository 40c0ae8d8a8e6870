"""extras/budget.py: its computed numbers."""

import pytest
from budget import diffusion_step
from gpu_check import COMPUTED_GB


@pytest.mark.slow
def test_the_preset_fits_80_gb():
    peak = diffusion_step("XL", 256, 64, num_micro_batches=2)["peak"]
    assert 40e9 < peak < 75e9
    alone = COMPUTED_GB["train_diffusion.py imagenet256"]
    assert peak / 1e9 == pytest.approx(alone + 3.4, abs=1), "with DDP's buffers"


@pytest.mark.slow
def test_a_small_gpu_trains_an_s():
    peak = diffusion_step("S", 256, 16, num_micro_batches=4, checkpointed=True)["peak"]
    print(f"DiT^DH-S, micro-batches of 16, checkpointed: {peak / 1e9:.1f} GB")
    assert peak < 10e9
