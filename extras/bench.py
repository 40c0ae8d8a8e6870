"""Speed and memory of training steps and of sampling, as one JSON object.

    python extras/bench.py                          # all sizes, minutes
    python extras/bench.py --sizes toy --seconds 1
    python extras/bench.py --seconds 0              # only what is computed, two minutes

The computed numbers need no GPU. The steps of both stages run on fake tensors, which have shapes
and storages but no values. We count the peak number of bytes held, the FLOPs of matrix products and
attention, and the bytes that all other operations read and write. From these follow the batch sizes
that fit and the hours of the paper's runs.

Each measured case runs in its own process, which gives its own peak memory (CUDA: allocated; CPU:
resident, minus what the process holds after the imports). "share" is the FLOP/s over those of large
matrix products on this machine, at the same precision. "host_reads" counts the host-device syncs of
a step.
"""

import argparse
import contextlib
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
from rae import DECODERS, RAE, Decoder, Encoder, setup_distributed, update_ema  # noqa: E402

HEAD = (SIZES["G"][0], 2, SIZES["G"][2])
# name: latent_dim, grid_size, backbone, wide_head, batch size on a CPU, batch size on a GPU
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


def random_batch(model, batch_size):
    """z (B, N, C), labels (B,), t (B,) and eps (B, N, C)."""
    z = torch.randn(batch_size, model.grid_size**2, model.latent_dim)
    y = torch.zeros(batch_size, dtype=torch.long)
    return z, y, torch.full((batch_size,), 0.5), torch.randn_like(z)


def mean_loss(model, z, y, t, eps, autocast=contextlib.nullcontext()):
    with autocast:
        return flow_loss(model, z, y, shift_alpha(*z.shape[1:]), t, eps).mean()


# ---------------------------------------------------------------------------------------------
# Computed on fake tensors

aten = torch.ops.aten
COUNTS = flop_registry | {  # torch's table lacks attention on CPUs, where fake tensors live
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Costs(TorchDispatchMode):
    """Counts what happens in this context.

    now and peak: bytes held by tensors made here. flops: of matrix products and attention. traffic:
    bytes read and written by all other operations except views.
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
    """FLOPs per image of a training step and of one evaluation of the model."""
    with FakeTensorMode():
        model = build(name, grid_size)
        with Costs() as train:
            mean_loss(model, *random_batch(model, 1)).backward()
        z, y, t, _ = random_batch(model, 1)
        with torch.no_grad(), Costs() as evaluation:
            model(z, t, y)
    return train.flops, evaluation.flops


class HostReads(TorchDispatchMode):
    """Counts operations that would be host-device syncs on a GPU.

    These read values from tensors, make tensors from Python numbers, or have shapes that depend on
    values.
    """

    NAMES = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count += name.startswith(self.NAMES)
        return func(*args, **(kwargs or {}))


def random_encoder(model, image_size):
    """The frozen Encoder with a timm ViT for images of this size, with random weights."""
    import timm
    from timm.models import vision_transformer

    # timm reads these from a tensor, and fake tensors have no values.
    vision_transformer.calculate_drop_path_rates = lambda rate, depth: [0.0] * depth
    vit = timm.create_model(model, num_classes=0, img_size=image_size)
    return Encoder(vit, image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def dinov2(image_size):
    return random_encoder("vit_base_patch14_reg4_dinov2", image_size * 14 // 16)


def adamw(module):
    return torch.optim.AdamW(
        module.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


def diffusion_step(name, image_size, micro_batch_size, num_micro_batches=2, checkpointed=False):
    """Two steps of train_diffusion.py on fake tensors.

    Returns the bytes held at the peak, and the traffic and FLOPs of one step.
    """
    bf16 = torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode(), Costs() as costs:
        grid_size = image_size // 16
        decoder = Decoder(768, grid_size, 16, *DECODERS["XL"])  # held for the sample grids
        statistics = torch.ones(768, grid_size, grid_size)
        rae = RAE(dinov2(image_size), decoder, statistics, statistics)
        model = build(name, grid_size)
        model.checkpoint_activations = checkpointed
        ema = build(name, grid_size).requires_grad_(False)
        buckets = [torch.empty_like(p) for p in model.parameters()]  # DistributedDataParallel's
        optimizer = adamw(model)
        shape = (num_micro_batches * micro_batch_size, 3, image_size, image_size)
        for _ in range(2):
            before = costs.traffic
            images = torch.zeros(shape, dtype=torch.uint8)
            for micro in images.split(micro_batch_size):
                _, y, t, eps = random_batch(model, micro_batch_size)
                z = rae.encode(micro / 255)
                mean_loss(model, z, y, t, eps, bf16).backward()
            optimizer.step()
            update_ema(ema, model, 0.9995, 10**5)
            optimizer.zero_grad()
    del rae, decoder, buckets
    traffic = costs.traffic - before
    return {"peak": costs.peak, "traffic": traffic, "flops": costs.flops / 2}


def decoder_step(image_size, micro_batch_size, num_micro_batches=1, checkpointed=False):
    """The same for train_decoder.py: ViT-XL on DINOv2-B, published loss networks, all losses on."""
    import timm

    import train_decoder as T

    # Nothing is downloaded: VGG16 too has random weights.
    T.rae.load_timm = lambda model, weights: timm.create_model("vgg16", num_classes=0)
    bf16 = torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode(), Costs() as costs:
        encoder = dinov2(image_size)
        weights = [torch.rand(width) for width in (64, 128, 256, 512, 512)]
        lpips = T.PerceptualLoss(T.VGGFeatures(), weights)
        disc_backbone = T.ViTFeatures(random_encoder("vit_small_patch8_224", 224))
        discriminator = T.Discriminator(disc_backbone.width, disc_backbone.num_layers)
        decoder = Decoder(768, encoder.grid_size, 16, *DECODERS["XL"])
        decoder.checkpoint_activations = checkpointed
        ema = Decoder(768, encoder.grid_size, 16, *DECODERS["XL"]).requires_grad_(False)
        buckets = [torch.empty_like(p) for p in decoder.parameters()]
        optimizer = adamw(decoder)
        d_optimizer = adamw(discriminator)
        last_layer = decoder.decoder_pred.weight
        u = torch.rand(micro_batch_size, 5)
        sigma = torch.rand(micro_batch_size)

        for _ in range(2):
            before = costs.traffic
            images = torch.zeros(num_micro_batches * micro_batch_size, 3, image_size, image_size)
            clean_tokens = []
            discriminator.eval().requires_grad_(False)
            for real in images.split(micro_batch_size):
                tokens = encoder(real)
                clean_tokens.append(tokens)
                eps = torch.randn_like(tokens)
                with bf16:
                    fake = encoder.denormalize(decoder(T.add_noise(tokens, sigma, eps)))
                rec_loss = (fake - real).abs().mean() + lpips(fake, real).mean()
                with bf16:
                    g_loss = -discriminator(disc_backbone(T.diffaug(fake, u))).mean()
                (rec_grad,) = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)
                (gan_grad,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
                (rec_loss + T.adaptive_weight(rec_grad, gan_grad) * g_loss).backward()
            optimizer.step()
            update_ema(ema, decoder, 0.9978, 10**5)
            optimizer.zero_grad()

            discriminator.train().requires_grad_(True)
            for real, tokens in zip(images.split(micro_batch_size), clean_tokens):
                with bf16:
                    with torch.no_grad():
                        fake = T.to_uint8(encoder.denormalize(decoder(tokens))) / 255
                        fake_features = disc_backbone(T.diffaug(fake, u))
                        real_features = disc_backbone(T.diffaug(real, u))
                    logits_fake = discriminator(fake_features)
                    logits_real = discriminator(real_features)
                T.hinge_d_loss(logits_real, logits_fake).backward()
            d_optimizer.step()
            d_optimizer.zero_grad()
    del buckets
    traffic = costs.traffic - before
    return {"peak": costs.peak, "traffic": traffic, "flops": costs.flops / 2}


def hours(step, num_steps):
    """The fewest and the most hours that num_steps steps take on H100s.

    We assume 350 TFLOP/s in matrix products, about a third of the specification, and 2.7 TB/s of
    memory bandwidth, four fifths of it. The fewest hours have matrix products alone. The most add
    all the traffic of eager mode, one operation after the other. Compiled runs, which fuse
    operations, are in between.
    """
    products = step["flops"] / 350e12
    traffic = step["traffic"] / 2.7e12
    return num_steps * products / 3600, num_steps * (products + traffic) / 3600


def fits(step, *size, **options):
    """The largest micro-batch that fits in bf16 training, by GPU memory; a tenth of it stays free.

    step is one of the two functions above. Memory is linear in the micro-batch size.
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
    """For each ImageNet preset, what a step costs each of eight GPUs and the hours of the run."""
    import train_decoder
    import train_diffusion

    rows = []
    for script, step in ((train_decoder, decoder_step), (train_diffusion, diffusion_step)):
        for image_size in (256, 512):
            preset = script.PRESETS[f"imagenet{image_size}"]
            micro_batch_size = preset["micro_batch_size"]
            num_micro_batches = preset["global_batch_size"] // 8 // micro_batch_size
            size = ("XL",) if script is train_diffusion else ()
            costs = step(*size, image_size, micro_batch_size, num_micro_batches)
            row = {
                "script": script.__name__,
                "px": image_size,
                "images": f"{num_micro_batches} x {micro_batch_size}",
                "gb": costs["peak"] / 1e9,
                "tflop": costs["flops"] / 1e12,
                "traffic_gb": costs["traffic"] / 1e9,
                "hours": hours(costs, preset["steps"]),
            }
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Measured on this machine


def fastest(run, device, seconds):
    """Seconds of the fastest call of `run` within the given time, after two calls of warm-up.

    The fastest is the one that other programs on the machine disturbed least.
    """
    best = math.inf
    first_start = time.time()
    calls = 0
    while calls < 3 or time.time() - first_start < seconds:
        start = time.time()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if calls > 1:
            best = min(best, time.time() - start)
        calls += 1
    return best


def rate(device, precision, seconds):
    """GFLOP/s of a large matrix product."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    b = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    return 2 * n**3 / 1e9 / fastest(lambda: a @ b, device, seconds)


def held_at_most():
    """Peak resident bytes of this process. (On Linux ru_maxrss starts at the parent's peak.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return held_at_most()


def setup(device, precision):
    """Set the precision as the training scripts do; returns the autocast context."""
    return setup_distributed(argparse.Namespace(device=device, precision=precision))[3]


def train(name, precision, compiled, device, seconds):
    """A training step of train_diffusion.py, from latents instead of images."""
    autocast = setup(device, precision)
    before = memory(device)
    torch.manual_seed(0)
    model = build(name).to(device)
    batch_size = CASES[name][5 if device == "cuda" else 4]
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = adamw(model)
    batch = [tensor.to(device) for tensor in random_batch(model, batch_size)]
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)

    def step():
        mean_loss(model, *batch, autocast).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
            update_ema(ema, model, 0.9995, 10**5)
        optimizer.zero_grad()

    best = fastest(step, device, seconds)
    memory_gb = (memory(device) - before) / 1e9
    with HostReads() as reads:
        step()
    return {
        "batch": batch_size,
        "images_per_s": batch_size / best,
        "memory_gb": memory_gb,
        "host_reads": reads.count,
    }


@torch.no_grad()
def draw(name, grid_size, device, precision):
    """One image in 50 steps, without guidance and with AutoGuidance by an S.

    Skipped if it would take more than a minute, judging by two steps.
    """
    autocast = setup(device, precision)
    before = memory(device)
    model = build(name, grid_size).to(device).eval()
    guidance = {"guidance_model": build("S", grid_size).to(device).eval(), "guidance_scale": 1.42}
    noise = torch.randn(1, grid_size**2, model.latent_dim, device=device)
    y = torch.zeros(1, dtype=torch.long, device=device)

    def latency(steps, **guidance):
        start = time.time()
        with autocast:
            sample(model, noise, y, time_grid(steps, 1.0), **guidance).sum().item()
        return time.time() - start

    latency(2, **guidance)  # warm-up
    if latency(2) * 25 > 60:
        return {"note": "more than a minute"}
    result = {"seconds": latency(50), "memory_gb": (memory(device) - before) / 1e9}
    result["seconds_autoguidance"] = latency(50, **guidance)
    return result


def run_in_process(*call):
    """The result of a function of this file, called in a new process."""
    command = [sys.executable, __file__, "--call", json.dumps(call)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--sizes", default=",".join(CASES), help="any of " + ",".join(CASES))
    p.add_argument("--seconds", type=float, default=10, help="per case, 0: compute only")
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
        result["gflops"] = {p: run_in_process("rate", device, p, args.seconds) for p in DTYPES}

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
                    row |= run_in_process("train", name, precision, compiled, device, args.seconds)
                    if "images_per_s" in row:
                        gflops = row["images_per_s"] * step_flops / 1e9
                        row["share"] = gflops / result["gflops"][precision]
                    result["train"].append(row)
                    print(row, file=sys.stderr)

        # Micro-batches that fit, and sampling.
        for image_size in (256, 512) if name in ("S", "XL") else ():
            for checkpointed in (False, True):
                images = fits(diffusion_step, name, image_size, checkpointed=checkpointed)
                row = {"size": name, "px": image_size, "checkpointed": checkpointed}
                result["fits"].append(row | images)
        for grid_size in (16, 32) if name in SIZES and args.seconds else ():
            _, evaluation_flops = flops(name, grid_size)
            precision = "bf16" if device == "cuda" else "fp32"
            row = {"size": name, "tokens": grid_size**2, "gflop": evaluation_flops / 1e9}
            row |= run_in_process("draw", name, grid_size, device, precision)
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
