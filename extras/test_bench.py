"""extras/bench.py: its computed numbers, and one short measurement."""

import json

import pytest
from bench import diffusion_step

from tests.conftest import compiler, launch


@pytest.mark.slow
def test_the_preset_fits_80_gb():
    peak = diffusion_step("XL", 256, 64, num_micro_batches=2)["peak"]
    assert 40e9 < peak < 75e9


@pytest.mark.slow
def test_a_small_gpu_trains_an_s():
    peak = diffusion_step("S", 256, 16, num_micro_batches=4, checkpointed=True)["peak"]
    print(f"DiT^DH-S, micro-batches of 16, checkpointed: {peak / 1e9:.1f} GB")
    assert peak < 10e9


@pytest.mark.slow
@compiler
def test_the_benchmark_measures():
    result = json.loads(launch("extras/bench.py", "--sizes toy --seconds 1"))
    cases = [(x["precision"], x["compile"]) for x in result["train"]]
    assert cases == [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)]
    for x in result["train"]:
        assert x["images_per_s"] > 0
        assert x["memory_gb"] > 0
        assert x["host_reads"] == 1, "of the gradient's norm"
        assert 0 < x["share"] < 1
