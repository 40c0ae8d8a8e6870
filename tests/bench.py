"""Speed and memory of training steps and of sampling, as one JSON object.

    python tests/bench.py                    # every size that this machine can do, minutes
    python tests/bench.py --sizes toy --seconds 1
    python tests/bench.py --seconds 0        # only what is computed: FLOPs and the batches that fit

Each case runs in a process of its own, so that its peak memory is its own (CUDA: allocated; CPU: resident,
less what a process has after the imports). FLOPs are counted by torch on matrix products and attention,
forward and backward. "share" is FLOPs a second over the machine's rate of matrix products, measured at the
same precision.
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit_dh import SIZES, DiTDH, flow_loss, sample, shift_alpha, time_grid  # noqa: E402
from rae import Optimizer, update_ema  # noqa: E402

HEAD = SIZES["G"][0], 2, SIZES["G"][2]
# name: (C, grid, backbone, head, batch on a CPU, on a GPU)
CASES = {"toy": (64, 4, (96, 4, 3), (128, 2, 4), 64, 1024),
         "tokens64": (128, 8, (128, 4, 4), (256, 2, 8), 64, 1024)}
CASES |= {size: (768, 16, SIZES[size], HEAD, 2, 64) for size in ("S", "B", "L", "XL")}
TRAINED = ("toy", "tokens64", "S", "XL")
FROZEN = 86.6e6 + 415.4e6                              # parameters of DINOv2-B and of the XL decoder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(name, grid=None):
    channels, own, backbone, head, *_ = CASES[name]
    return DiTDH(channels, grid or own, *zip(backbone, head), 1000)


def inputs(model, batch):
    """z, labels, t, noise."""
    z = torch.randn(batch, model.grid ** 2, model.latent_dim)
    return z, torch.zeros(batch, dtype=torch.long), torch.full((batch,), 0.5), torch.randn_like(z)


def autocast(kind, precision):
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def loss_of(model, z, y, t, noise, precision):
    with autocast(z.device.type, precision):
        return flow_loss(model, z, y, shift_alpha(*z.shape[1:]), t, noise).mean()


def flops(name, grid=None):
    """Of one image: (a training step, an evaluation)."""
    with FakeTensorMode():
        model = build(name, grid)
        with FlopCounterMode(display=False) as train:
            loss_of(model, *inputs(model, 1), "fp32").backward()
        z, y, t, _ = inputs(model, 1)
        with torch.no_grad(), FlopCounterMode(display=False) as evaluation:
            model(z, t, y)
    return train.get_total_flops(), evaluation.get_total_flops()


def kept_per_image(f, model):
    """Bytes that autograd keeps of f(batch) for its backward pass, for each image, parameters apart."""
    own, sizes = {p.untyped_storage()._cdata for p in model.parameters()}, []
    for batch in (1, 3):
        kept = {}                                      # holds the tensors: no address may come twice
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.setdefault(x.untyped_storage()._cdata, x), lambda x: x):
            f(batch)
        sizes.append(sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own))
    return (sizes[1] - sizes[0]) / 2


def fits(name, grid, checkpointed):
    """Images that fit in training at bf16, by GB of memory: computed, not tried.

    Held always: weights, gradients, two moments and the average in float32, bfloat16 copies of the weights
    under autocast, the frozen encoder and decoder. Per image: what autograd keeps for the backward pass and,
    with checkpointed activations, what one block of the head keeps during its own. A tenth is left free."""
    with FakeTensorMode():
        model = build(name, grid)
        model.checkpoint_activations = checkpointed
        each = kept_per_image(lambda n: loss_of(model, *inputs(model, n), "bf16"), model)
        if checkpointed:
            block, shape = model.blocks[-1], (model.grid ** 2, HEAD[0])
            with autocast("cpu", "bf16"):
                rope = model.dec_feat_rope
                each += kept_per_image(lambda n: block(*torch.randn(2, n, *shape), rope), block)
        always = 22 * sum(p.numel() for p in model.parameters()) + 4 * FROZEN
    return {f"{gb} GB": max(0, int((0.9e9 * gb - always) / each)) for gb in (8, 12, 24, 80)}


def rate(device, precision, seconds):
    """The machine's rate of matrix products in GFLOP/s."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return 2 * n ** 3 / 1e9 / fastest(lambda: a @ b, device, seconds)


def fastest(f, device, seconds):
    """Seconds of the fastest of the calls of f that fit in the time, after two that do not count: on a
    machine that others use too, the one that says most."""
    best, began, calls = math.inf, time.time(), 0
    while calls < 3 or time.time() - began < seconds:
        start = time.time()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        best, calls = min(best, time.time() - start) if calls > 1 else best, calls + 1
    return best


def memory(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return held_at_most()


def held_at_most():
    """Bytes of memory. Linux tells it of the program alone; ru_maxrss there begins at its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train(name, precision, compiled, device, seconds):
    """A training step as train_diffusion.py takes it, from latents: loss, gradients, AdamW, average."""
    before = memory(device)
    torch.manual_seed(0)
    model, batch = build(name).to(device), CASES[name][5 if device == "cuda" else 4]
    ema, optimizer = copy.deepcopy(model).requires_grad_(False), Optimizer(model)
    x = [a.to(device) for a in inputs(model, batch)]
    if compiled:
        model.compile()

    def step():
        loss_of(model, *x, precision).backward()
        optimizer.update(2e-4, 1.0)
        update_ema(ema, model, 0.9995, 10 ** 5)
    best = fastest(step, device, seconds)
    return dict(batch=batch, images_per_s=batch / best, memory_gb=(memory(device) - before) / 1e9)


@torch.no_grad()
def draw(name, grid, device, precision):
    """One image in 50 steps, without guidance and with AutoGuidance by an S; where two steps say that it
    would take more than a minute, only that is said."""
    before, channels = memory(device), CASES[name][0]
    model, guide = (build(n, grid).to(device).eval() for n in (name, "S"))
    noise, y = torch.randn(1, grid ** 2, channels, device=device), torch.zeros(1, dtype=torch.long,
                                                                               device=device)

    def latency(steps, **guidance):
        began = time.time()
        with autocast(device, precision):
            sample(model, noise, y, time_grid(steps, 1.0), **guidance).sum().item()
        return time.time() - began
    latency(2, guide=guide, scale=1.42)                # the first calls do not count
    if latency(2) * 25 > 60:
        return dict(note="more than a minute")
    out = dict(seconds=latency(50), memory_gb=(memory(device) - before) / 1e9)
    return out | dict(seconds_autoguidance=latency(50, guide=guide, scale=1.42))


def apart(*call):
    """The result of a function of this file in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--call", json.dumps(call)], capture_output=True,
                          text=True)
    if done.returncode:
        return dict(error=done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--sizes", default=",".join(CASES), help="of " + ",".join(CASES))
    p.add_argument("--seconds", type=float, default=10, help="of measurement a case, 0 to compute only")
    p.add_argument("--call", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.call:
        function, *rest = json.loads(args.call)
        return print(json.dumps(globals()[function](*rest)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    result = dict(machine=name, torch=torch.__version__, train=[], sample=[], fits=[])
    names = args.sizes.split(",")
    if args.seconds:
        result["gflops"] = {p: apart("rate", device, p, args.seconds) for p in DTYPES}
    for size in names:
        step, evaluation = flops(size)
        for precision in DTYPES if args.seconds and size in TRAINED else ():
            for compiled in (False, True):
                got = apart("train", size, precision, compiled, device, args.seconds)
                if "images_per_s" in got:
                    got["share"] = got["images_per_s"] * step / 1e9 / result["gflops"][precision]
                result["train"].append(dict(size=size, precision=precision, compile=compiled,
                                            gflop=step / 1e9) | got)
                print(result["train"][-1], file=sys.stderr)
        for grid in (16, 32) if size in SIZES else ():
            for checkpointed in (False, True):
                result["fits"].append(dict(size=size, tokens=grid ** 2, checkpoint_activations=checkpointed,
                                           images=fits(size, grid, checkpointed)))
            if args.seconds:
                got = apart("draw", size, grid, device, "bf16" if device == "cuda" else "fp32")
                result["sample"].append(dict(size=size, tokens=grid ** 2,
                                             gflop=flops(size, grid)[1] / 1e9) | got)
                print(result["sample"][-1], file=sys.stderr)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
