"""What training takes: memory, FLOPs and hours, computed without a GPU, as one JSON object.

    python extras/budget.py                     # five minutes on two CPU cores

The steps of both stages run on fake tensors, which have shapes and storages but no values. We count
the peak number of bytes held, the FLOPs of matrix products and attention, and the bytes that all
other operations read and write. From these follow the batch sizes that fit and the hours of the
paper's runs. extras/gpu_check.py measures on a GPU.
"""

import contextlib
import json
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit_dh import SIZES, DiTDH, flow_loss, shift_alpha  # noqa: E402
from rae import DECODERS, RAE, Decoder, Encoder, update_ema  # noqa: E402

HEAD = (SIZES["G"][0], 2, SIZES["G"][2])
# name: latent_dim, grid_size, backbone, wide_head
MODELS = {
    "tiny": (32, 4, (16, 1, 2), (32, 1, 2)),
    "S": (768, 16, SIZES["S"], HEAD),
    "XL": (768, 16, SIZES["XL"], HEAD),
}


def build(name, grid_size=None):
    latent_dim, own_grid_size, backbone, wide_head = MODELS[name]
    return DiTDH(latent_dim, grid_size or own_grid_size, backbone, wide_head, num_classes=1000)


def random_batch(model, batch_size):
    """z (B, N, C), labels (B,), t (B,) and eps (B, N, C)."""
    z = torch.randn(batch_size, model.grid_size**2, model.latent_dim)
    y = torch.zeros(batch_size, dtype=torch.long)
    return z, y, torch.full((batch_size,), 0.5), torch.randn_like(z)


def mean_loss(model, z, y, t, eps, autocast=contextlib.nullcontext()):
    with autocast:
        return flow_loss(model, z, y, shift_alpha(*z.shape[1:]), t, eps).mean()


def adamw(module):
    return torch.optim.AdamW(
        module.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


# ---------------------------------------------------------------------------------------------
# Counting

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


def flops(name):
    """FLOPs per image of a training step."""
    with FakeTensorMode():
        model = build(name)
        with Costs() as costs:
            mean_loss(model, *random_batch(model, 1)).backward()
    return costs.flops


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


# ---------------------------------------------------------------------------------------------
# Steps on fake tensors


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

    bf16 = torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode(), Costs() as costs:
        encoder = dinov2(image_size)
        weights = [torch.rand(width) for width in (64, 128, 256, 512, 512)]
        vgg = timm.create_model("vgg16", num_classes=0)
        with patch.object(T.rae, "load_timm", return_value=vgg):  # nothing is downloaded
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


def main():
    result = {"presets": presets(), "fits": []}
    for image_size in (256, 512):
        for name in ("S", "XL"):
            for checkpointed in (False, True):
                row = {"size": name, "px": image_size, "checkpointed": checkpointed}
                row |= fits(diffusion_step, name, image_size, checkpointed=checkpointed)
                result["fits"].append(row)
        row = {"size": "decoder", "px": image_size, "checkpointed": False}
        result["fits"].append(row | fits(decoder_step, image_size))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
