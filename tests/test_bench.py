"""extras/bench.py: its computed numbers, the tables of docs/speed.md, and one short measurement."""

import json
import shutil
import subprocess
import sys

import pytest
from bench import diffusion_step
from conftest import ROOT


def bench(*arguments):
    done = subprocess.run(
        [sys.executable, f"{ROOT}/extras/bench.py", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_presets_fit_and_the_page_has_the_computed_numbers():
    """The presets' micro-batches fit 80 GB, and docs/speed.md has the current numbers."""
    result = bench("--sizes", "S,XL", "--seconds", "0")
    page = (ROOT / "docs/speed.md").read_text()
    wrong = []
    for row in result["presets"]:
        print({k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()})
        assert 40 < row["gb"] < 75
        images = row["images"].removeprefix("1 x ")
        line = f"| {images} | {row['gb']:.0f} | {row['tflop']:.0f} |"
        if line not in page:
            wrong.append(line)
    assert len(result["presets"]) == 4
    for row in result["fits"]:
        flag = ", `--checkpoint-activations`" if row["checkpointed"] else ""
        name = "decoder ViT-XL" if row["size"] == "decoder" else f"DiT^DH-{row['size']}"
        numbers = " | ".join(str(row[f"{gb} GB"]) for gb in (24, 48, 80))
        line = f"| {name}, {row['px']} px{flag} | {numbers} |"
        if line not in page:
            wrong.append(line)
    assert len(result["fits"]) == 10
    assert not wrong, "docs/speed.md should have\n" + "\n".join(wrong)


@pytest.mark.slow
def test_a_small_gpu_trains_an_s():
    peak = diffusion_step("S", 256, 16, num_micro_batches=4, checkpointed=True)["peak"]
    print(f"DiT^DH-S, micro-batches of 16, checkpointed: {peak / 1e9:.1f} GB")
    assert peak < 10e9


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"
)
def test_the_benchmark_measures():
    result = bench("--sizes", "toy", "--seconds", "1")
    cases = [(x["precision"], x["compile"]) for x in result["train"]]
    assert cases == [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)]
    for x in result["train"]:
        assert x["images_per_s"] > 0
        assert x["memory_gb"] > 0
        assert x["host_reads"] == 1, "of the gradient's norm"
        assert 0 < x["share"] < 1
