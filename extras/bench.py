"""Speed and memory of training steps and of sampling, as one JSON object.

    python extras/bench.py                    # every size that this machine can do, minutes
    python extras/bench.py --sizes toy --seconds 1
    python extras/bench.py --seconds 0        # only what is computed, two minutes

What is computed needs no GPU: the steps of both stages run on fake tensors, which have shapes and
storages but no numbers. Counted are the bytes held at the peak, the FLOPs of matrix products and
attention, and the bytes that all other operations read and write. From these follow the batches
that fit and the hours of the paper's runs.

What is measured: each case runs in a process of its own, so that its peak memory is its own (CUDA:
allocated; CPU: resident, less what a process has after the imports). "share" is FLOPs a second over
the machine's rate of matrix products, measured at the same precision. "host_reads" counts how often
in a step the CPU would wait for a GPU.
"""

import argparse
import copy
import json
import math
import resource
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit_dh import SIZES, DiTDH, flow_loss, sample, shift_alpha, time_grid  # noqa: E402
from rae import DECODERS, Decoder, Encoder, set_precision, update_ema  # noqa: E402

HEAD = (SIZES["G"][0], 2, SIZES["G"][2])
# name: latent_dim, grid_size, backbone, wide_head, batch on a CPU, batch on a GPU
CASES = {
    "toy": (128, 4, (64, 8, 2), (128, 1, 4), 64, 1024),
    "tokens64": (128, 8, (128, 4, 4), (256, 2, 8), 64, 1024),
}
for size in ("S", "B", "L", "XL"):
    CASES[size] = (768, 16, SIZES[size], HEAD, 2, 64)
TRAINED = ("toy", "tokens64", "S", "XL")
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


aten = torch.ops.aten
COUNTS = flop_registry | {  # fake tensors are the CPU's, whose attention is not in torch's table
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Costs(TorchDispatchMode):
    """Counts the bytes that tensors made in this context hold, now and at most; the FLOPs of matrix
    products and attention; and the bytes that all other operations but mere views read and write.
    """

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.now = 0
        self.peak = 0
        self.flops = 0
        self.traffic = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        for tensor in written:
            self.hold(tensor.untyped_storage())
        name = func._schema.name
        if func._overloadpacket in COUNTS:
            count = COUNTS[func._overloadpacket]
            self.flops += count(*args, **(kwargs or {}), out_val=results)
        elif name.startswith("aten::") and not func.is_view and name != "aten::detach":
            self.traffic += sum(x.numel() * x.element_size() for x in read + written)
        return results

    def hold(self, storage):
        key = storage._cdata
        if key in self.storages:
            return
        size = storage.nbytes()

        def freed(_):
            del self.storages[key]
            self.now -= size

        self.storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def flops(name, grid_size=None):
    """FLOPs of one image: (a training step, an evaluation)."""
    with FakeTensorMode():
        model = build(name, grid_size)
        with Costs() as train:
            loss_of(model, *inputs(model, 1), "fp32").backward()
        z, y, t, _ = inputs(model, 1)
        with torch.no_grad(), Costs() as evaluation:
            model(z, t, y)
    return train.flops, evaluation.flops


class HostReads(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU, or a GPU for the CPU: numbers that are read
    from tensors, tensors made of Python's numbers, shapes that depend on numbers.
    """

    NAMES = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count += name.startswith(self.NAMES)
        return func(*args, **(kwargs or {}))


def frozen(model, image_size):
    """A ViT of timm for images of this size, without its weights."""
    import timm
    from timm.models import vision_transformer

    # timm reads these from a tensor, and fake tensors have no numbers.
    vision_transformer.calculate_drop_path_rates = lambda rate, depth: [0.0] * depth
    vit = timm.create_model(model, num_classes=0, img_size=image_size)
    return Encoder(vit, image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def dinov2(image_size):
    return frozen("vit_base_patch14_reg4_dinov2", image_size * 14 // 16)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=2e-4, weight_decay=0.0, fused=True)


def diffusion_step(name, image_size, micro_batch, num_parts=2, checkpointed=False):
    """Two steps of train_diffusion.py on fake tensors, num_parts micro-batches each.

    Bytes at the peak, and bytes of traffic and FLOPs of a step.
    """
    with FakeTensorMode(), Costs() as costs:
        encoder = dinov2(image_size)
        decoder = Decoder(768, image_size // 16, 16, *DECODERS["XL"])  # held for the pictures
        model = build(name, image_size // 16)
        model.checkpoint_activations = checkpointed
        ema = build(name, image_size // 16).requires_grad_(False)
        buckets = [torch.empty_like(p) for p in model.parameters()]  # DistributedDataParallel's
        optimizer = adamw(model)
        for _ in range(2):
            before = costs.traffic
            images = torch.zeros(num_parts * micro_batch, 3, image_size, image_size)
            for part in images.split(micro_batch):
                z = encoder(part)
                loss_of(model, z, *inputs(model, micro_batch)[1:], "bf16").backward()
            optimizer.step()
            update_ema(ema, model, 0.9995, 10**5)
            optimizer.zero_grad()
    del decoder, buckets
    traffic = costs.traffic - before
    return {"peak": costs.peak, "traffic": traffic, "flops": costs.flops / 2}


def decoder_step(image_size, micro_batch, num_parts=1, checkpointed=False):
    """As diffusion_step for train_decoder.py: ViT-XL on DINOv2-B, published critics, with GAN."""
    import timm

    import train_decoder as T

    with FakeTensorMode(), Costs() as costs:
        encoder = dinov2(image_size)
        T.load_timm = lambda model, weights, flag: timm.create_model("vgg16", num_classes=0)
        weights = [torch.rand(width) for width in (64, 128, 256, 512, 512)]
        lpips = T.PerceptualLoss(T.VGGFeatures(), weights)
        features = T.ViTFeatures(frozen("vit_small_patch8_224", 224))
        discriminator = T.Discriminator(features.width, features.num_layers)
        decoder = Decoder(768, encoder.grid_size, 16, *DECODERS["XL"])
        decoder.checkpoint_activations = checkpointed
        ema = Decoder(768, encoder.grid_size, 16, *DECODERS["XL"]).requires_grad_(False)
        buckets = [torch.empty_like(p) for p in decoder.parameters()]
        optimizer = adamw(decoder)
        d_optimizer = adamw(discriminator)
        last_layer = decoder.decoder_pred.weight

        for _ in range(2):
            before = costs.traffic
            images = torch.zeros(num_parts * micro_batch, 3, image_size, image_size)
            u = torch.rand(micro_batch, 5)
            clean_tokens = []
            discriminator.eval()
            discriminator.requires_grad_(False)
            for real in images.split(micro_batch):
                tokens = encoder(real)
                clean_tokens.append(tokens)
                with autocast("cpu", "bf16"):
                    reconstruction = decoder(tokens + torch.randn_like(tokens))
                rec_loss = (reconstruction - real).abs().mean()
                rec_loss = rec_loss + lpips(reconstruction, real).mean()
                with autocast("cpu", "bf16"):
                    (logits,) = discriminator(features(T.augment(reconstruction, u)))
                gan = T.generator_loss(logits)
                (g_rec,) = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)
                (g_gan,) = torch.autograd.grad(gan, last_layer, retain_graph=True)
                (rec_loss + T.adaptive_weight(g_rec, g_gan) * gan).backward()
            optimizer.step()
            update_ema(ema, decoder, 0.9978, 10**5)
            optimizer.zero_grad()
            del reconstruction, rec_loss, gan, logits, g_rec, g_gan

            discriminator.train()
            discriminator.requires_grad_(True)
            for real, tokens in zip(images.split(micro_batch), clean_tokens):
                with autocast("cpu", "bf16"):
                    with torch.no_grad():
                        fake_features = features(T.augment(decoder(tokens), u))
                        real_features = features(T.augment(real, u))
                    logits_fake, logits_real = discriminator(fake_features, real_features)
                T.hinge_loss(logits_real, logits_fake).backward()
            d_optimizer.step()
            d_optimizer.zero_grad()
            del fake_features, real_features, logits_fake, logits_real
    del buckets
    traffic = costs.traffic - before
    return {"peak": costs.peak, "traffic": traffic, "flops": costs.flops / 2}


def hours(step, num_steps):
    """(least, most) hours of so many steps on H100s of which matrix products get 350 TFLOP/s, half
    of what is promised, and other operations 2.7 TB/s of memory, four fifths of that.

    Least: matrix products alone. Most: and all the traffic of eager mode, one operation after the
    other. Compiled runs lie between, since they fuse operations.
    """
    products = step["flops"] / 350e12
    traffic = step["traffic"] / 2.7e12
    return num_steps * products / 3600, num_steps * (products + traffic) / 3600


def fits(step, *size, **options):
    """Images at once that fit in training at bf16, by GB of a GPU, a tenth of which is left free.

    step is one of the two functions above. Memory grows with the images in a straight line.
    """
    few, many = 16, 64
    low = step(*size, few, **options)["peak"]
    high = step(*size, many, **options)["peak"]
    each = (high - low) / (many - few)
    always = high - many * each
    images = {}
    for gigabytes in (24, 48, 80):
        images[f"{gigabytes} GB"] = max(0, int((0.9e9 * gigabytes - always) / each))
    return images


def presets():
    """What a step of each ImageNet preset takes on each of eight GPUs, and all steps in hours."""
    import train_decoder
    import train_diffusion

    rows = []
    for script, step in ((train_decoder, decoder_step), (train_diffusion, diffusion_step)):
        for image_size in (256, 512):
            preset = script.PRESETS[f"imagenet{image_size}"]
            micro_batch = preset["micro_batch"]
            num_parts = preset["global_batch_size"] // 8 // micro_batch
            size = ("XL",) if script is train_diffusion else ()
            found = step(*size, image_size, micro_batch, num_parts)
            least, most = hours(found, preset["steps"])
            row = {
                "script": script.__name__,
                "px": image_size,
                "images": f"{num_parts} x {micro_batch}",
                "gb": found["peak"] / 1e9,
                "tflop": found["flops"] / 1e12,
                "traffic_gb": found["traffic"] / 1e9,
                "hours": [least, most],
            }
            rows.append(row)
    return rows


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
    set_precision(precision, torch.device(device))
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
        for block in model.blocks:
            block.compile(dynamic=False)

    def step():
        loss_of(model, *x, precision).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
            update_ema(ema, model, 0.9995, 10**5)
        optimizer.zero_grad()

    best = fastest(step, device, seconds)
    held = (memory(device) - before) / 1e9
    with HostReads() as reads:
        step()
    return {
        "batch": batch,
        "images_per_s": batch / best,
        "memory_gb": held,
        "host_reads": reads.count,
    }


@torch.no_grad()
def draw(name, grid_size, device, precision):
    """One image in 50 steps, without guidance and with AutoGuidance by an S.

    Where two steps say that it would take more than a minute, only that is said.
    """
    set_precision(precision, torch.device(device))
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
        for image_size in (256, 512) if name in ("S", "XL") else ():
            for checkpointed in (False, True):
                images = fits(diffusion_step, name, image_size, checkpointed=checkpointed)
                row = {"size": name, "px": image_size, "checkpointed": checkpointed}
                result["fits"].append(row | images)
        for grid_size in (16, 32) if name in SIZES and args.seconds else ():
            _, evaluation_flops = flops(name, grid_size)
            precision = "bf16" if device == "cuda" else "fp32"
            row = {"size": name, "tokens": grid_size**2, "gflop": evaluation_flops / 1e9}
            row |= apart("draw", name, grid_size, device, precision)
            result["sample"].append(row)
            print(row, file=sys.stderr)
    if "XL" in args.sizes:
        result["presets"] = presets()
        for image_size in (256, 512):
            row = {"size": "decoder", "px": image_size, "checkpointed": False}
            result["fits"].append(row | fits(decoder_step, image_size))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
