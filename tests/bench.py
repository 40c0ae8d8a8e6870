"""Speed and memory of training steps and of sampling, as one JSON object.

    python tests/bench.py                    # every size that this machine can do, minutes
    python tests/bench.py --sizes toy --seconds 1
    python tests/bench.py --seconds 0        # only what is computed: FLOPs and the batches that fit

Each case runs in a process of its own, so that its peak memory is its own (CUDA: allocated; CPU:
resident, less what a process has after the imports). FLOPs are counted by torch on matrix products
and attention, forward and backward. "share" is FLOPs a second over the machine's rate of matrix
products, measured at the same precision.
"""

import argparse
import copy
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit_dh import SIZES, DiTDH, flow_loss, sample, shift_alpha, time_grid  # noqa: E402
from rae import update_ema  # noqa: E402

HEAD = (SIZES["G"][0], 2, SIZES["G"][2])
# name: latent_dim, grid_size, backbone, wide_head, batch on a CPU, batch on a GPU
CASES = {
    "toy": (64, 4, (96, 4, 3), (128, 2, 4), 64, 1024),
    "tokens64": (128, 8, (128, 4, 4), (256, 2, 8), 64, 1024),
}
for size in ("S", "B", "L", "XL"):
    CASES[size] = (768, 16, SIZES[size], HEAD, 2, 64)
TRAINED = ("toy", "tokens64", "S", "XL")
FROZEN = 86.6e6 + 415.4e6  # parameters of DINOv2-B and of the XL decoder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(name, grid_size=None):
    latent_dim, own_grid_size, backbone, wide_head, _, _ = CASES[name]
    return DiTDH(latent_dim, grid_size or own_grid_size, backbone, wide_head, num_classes=1000)


def inputs(model, batch):
    """z, labels, t and noise."""
    z = torch.randn(batch, model.grid_size**2, model.latent_dim)
    y = torch.zeros(batch, dtype=torch.long)
    return z, y, torch.full((batch,), 0.5), torch.randn_like(z)


def autocast(device, precision):
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def loss_of(model, z, y, t, noise, precision):
    with autocast(z.device.type, precision):
        return flow_loss(model, z, y, shift_alpha(*z.shape[1:]), t, noise).mean()


# ---------------------------------------------------------------------------------------------
# What is computed


def flops(name, grid_size=None):
    """FLOPs of one image: (a training step, an evaluation)."""
    with FakeTensorMode():
        model = build(name, grid_size)
        with FlopCounterMode(display=False) as train:
            loss_of(model, *inputs(model, 1), "fp32").backward()
        z, y, t, _ = inputs(model, 1)
        with torch.no_grad(), FlopCounterMode(display=False) as evaluation:
            model(z, t, y)
    return train.get_total_flops(), evaluation.get_total_flops()


def kept_per_image(run, model):
    """Bytes that autograd keeps of run(batch) for the backward pass, per image."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes = []
    for batch in (1, 3):
        kept = {}  # holds the tensors themselves, so that no address comes twice

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(batch)
        total = 0
        for address, tensor in kept.items():
            if address not in own:
                total += tensor.untyped_storage().nbytes()
        sizes.append(total)
    return (sizes[1] - sizes[0]) / 2


def fits(name, grid_size, checkpointed):
    """Images that fit in training at bf16, by GB of memory: computed, not tried.

    Held always: weights, gradients, two moments and the average in float32, bfloat16 copies of the
    weights under autocast, the frozen encoder and decoder. Per image: what autograd keeps for the
    backward pass and, with checkpointed activations, what one block of the head keeps during its
    own. A tenth is left free.
    """
    with FakeTensorMode():
        model = build(name, grid_size)
        model.checkpoint_activations = checkpointed
        each = kept_per_image(lambda n: loss_of(model, *inputs(model, n), "bf16"), model)
        if checkpointed:
            block = model.blocks[-1]
            rope = model.dec_feat_rope

            def run_block(n):
                x = torch.randn(n, model.grid_size**2, HEAD[0])
                block(x, torch.randn_like(x), rope)

            with autocast("cpu", "bf16"):
                each += kept_per_image(run_block, block)
        always = 22 * sum(p.numel() for p in model.parameters()) + 4 * FROZEN
    images = {}
    for gigabytes in (8, 12, 24, 80):
        images[f"{gigabytes} GB"] = max(0, int((0.9e9 * gigabytes - always) / each))
    return images


# ---------------------------------------------------------------------------------------------
# What is measured


def fastest(run, device, seconds):
    """Seconds of the fastest call of `run` that fits in the time, after two that do not count.

    On a machine that others use too, the fastest says most.
    """
    best = math.inf
    began = time.time()
    calls = 0
    while calls < 3 or time.time() - began < seconds:
        start = time.time()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if calls > 1:
            best = min(best, time.time() - start)
        calls += 1
    return best


def rate(device, precision, seconds):
    """The machine's rate of matrix products in GFLOP/s."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    b = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    return 2 * n**3 / 1e9 / fastest(lambda: a @ b, device, seconds)


def held_at_most():
    """Peak bytes of this process. Linux tells its own; ru_maxrss begins at its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return held_at_most()


def train(name, precision, compiled, device, seconds):
    """A training step as train_diffusion.py takes it, but from latents."""
    before = memory(device)
    torch.manual_seed(0)
    model = build(name).to(device)
    batch = CASES[name][5 if device == "cuda" else 4]
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    x = [tensor.to(device) for tensor in inputs(model, batch)]
    if compiled:
        model.compile()

    def step():
        loss_of(model, *x, precision).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
            update_ema(ema, model, 0.9995, 10**5)
        optimizer.zero_grad()

    best = fastest(step, device, seconds)
    held = (memory(device) - before) / 1e9
    return {"batch": batch, "images_per_s": batch / best, "memory_gb": held}


@torch.no_grad()
def draw(name, grid_size, device, precision):
    """One image in 50 steps, without guidance and with AutoGuidance by an S.

    Where two steps say that it would take more than a minute, only that is said.
    """
    before = memory(device)
    model = build(name, grid_size).to(device).eval()
    guide = build("S", grid_size).to(device).eval()
    noise = torch.randn(1, grid_size**2, model.latent_dim, device=device)
    y = torch.zeros(1, dtype=torch.long, device=device)

    def latency(steps, **guidance):
        began = time.time()
        with autocast(device, precision):
            sample(model, noise, y, time_grid(steps, 1.0), **guidance).sum().item()
        return time.time() - began

    latency(2, guide=guide, guide_scale=1.42)  # the first calls do not count
    if latency(2) * 25 > 60:
        return {"note": "more than a minute"}
    result = {"seconds": latency(50), "memory_gb": (memory(device) - before) / 1e9}
    result["seconds_autoguidance"] = latency(50, guide=guide, guide_scale=1.42)
    return result


def apart(*call):
    """The result of a function of this file in a process of its own."""
    command = [sys.executable, __file__, "--call", json.dumps(call)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--sizes", default=",".join(CASES), help="of " + ",".join(CASES))
    p.add_argument("--seconds", type=float, default=10, help="a case, 0 to compute only")
    p.add_argument("--call", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.call:
        function, *rest = json.loads(args.call)
        print(json.dumps(globals()[function](*rest)))
        return

    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = f"cpu, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    result = {"machine": machine, "torch": torch.__version__, "train": [], "sample": [], "fits": []}
    if args.seconds:
        result["gflops"] = {p: apart("rate", device, p, args.seconds) for p in DTYPES}

    for name in args.sizes.split(","):
        # Training steps.
        if args.seconds and name in TRAINED:
            step_flops, _ = flops(name)
            for precision in DTYPES:
                for compiled in (False, True):
                    row = {
                        "size": name,
                        "precision": precision,
                        "compile": compiled,
                        "gflop": step_flops / 1e9,
                    }
                    row |= apart("train", name, precision, compiled, device, args.seconds)
                    if "images_per_s" in row:
                        reached = row["images_per_s"] * step_flops / 1e9
                        row["share"] = reached / result["gflops"][precision]
                    result["train"].append(row)
                    print(row, file=sys.stderr)

        # Images that fit, and sampling.
        for grid_size in (16, 32) if name in SIZES else ():
            for checkpointed in (False, True):
                row = {
                    "size": name,
                    "tokens": grid_size**2,
                    "checkpoint_activations": checkpointed,
                    "images": fits(name, grid_size, checkpointed),
                }
                result["fits"].append(row)
            if args.seconds:
                _, evaluation_flops = flops(name, grid_size)
                precision = "bf16" if device == "cuda" else "fp32"
                row = {"size": name, "tokens": grid_size**2, "gflop": evaluation_flops / 1e9}
                row |= apart("draw", name, grid_size, device, precision)
                result["sample"].append(row)
                print(row, file=sys.stderr)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
