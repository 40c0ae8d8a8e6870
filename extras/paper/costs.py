"""Multiply-adds at 256 px behind the paper's cost claims, counted from the models.

    python extras/paper/costs.py                 # 10 s; prints a table

The paper counts a multiply-add as one operation, so its "GFLOPs" are GMAC here. Its counter leaves
out the matrix products inside attention; so does the second column.
"""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dit_dh import SIZES, DiTDH  # noqa: E402
from rae import DECODERS, Decoder  # noqa: E402

HEAD = (SIZES["G"][0], 2, SIZES["G"][2])


def gmac(model, *inputs):
    """GMAC of a forward pass, with and without the matrix products inside attention."""
    # On the meta device, nothing is computed or allocated.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model()(*(torch.empty(shape, dtype=dtype) for shape, dtype in inputs))
    attention = 0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        if "bmm" in str(operation) or "scaled_dot_product" in str(operation):
            attention += flops
    total = counter.get_total_flops()
    return total / 2e9, (total - attention) / 2e9


def diffusion(backbone, wide_head, latent_dim=768):
    def model():
        return DiTDH(latent_dim, 16, SIZES[backbone], wide_head, 1000)

    return gmac(model, ((1, 256, latent_dim), None), ((1,), None), ((1,), torch.long))


def decoder(size):
    return gmac(lambda: Decoder(768, 16, 16, *DECODERS[size]), ((1, 256, 768), None))


def encoder(name, side):
    import timm

    return gmac(lambda: timm.create_model(name, img_size=side), ((1, 3, side, side), None))


def vae(decoding):
    """SD-VAE: 3x3 convolutions of 128 to 512 channels in residual blocks, at 256 down to 32 px."""

    def conv(side, a, b, kernel=3):
        return side**2 * kernel**2 * a * b

    def residual(side, a, b):
        return conv(side, a, b) + conv(side, b, b) + (conv(side, a, b, 1) if a != b else 0)

    # The middle, at 32 px: two residual blocks with attention between them
    attention = 2 * 1024**2 * 512
    total = 2 * residual(32, 512, 512) + 4 * 1024 * 512**2 + attention
    if decoding:
        total += conv(32, 4, 4, 1) + conv(32, 4, 512) + conv(256, 128, 3)
        levels = [(32, 512, 512), (64, 512, 512), (128, 512, 256), (256, 256, 128)]
        for side, a, b in levels:
            total += residual(side, a, b) + 2 * residual(side, b, b)
            if side < 256:
                total += conv(2 * side, b, b)  # after upsampling
    else:
        total += conv(256, 3, 128) + conv(32, 512, 8) + conv(32, 8, 8, 1)
        levels = [(256, 128, 128), (128, 128, 256), (64, 256, 512), (32, 512, 512)]
        for side, a, b in levels:
            total += residual(side, a, b) + residual(side, b, b)
            if side > 32:
                total += conv(side // 2, b, b)  # downsampling
    return total / 1e9, (total - attention) / 1e9


def main():
    dit = diffusion("XL", None)
    heads = {size: diffusion(size, HEAD) for size in ("S", "B", "XL")}
    vae_decoder = vae(decoding=True)
    share = heads["B"][1] / dit[1]
    rows = [
        ("DiT-XL on RAE latents, an evaluation", dit, "114.8; FID 4.28 (T5)"),
        ("DiT^DH-S", heads["S"], "FID 6.07 (T6)"),
        ("DiT^DH-B", heads["B"], f"FID 3.38; 40% of DiT-XL (Fig. 1), {share:.0%} here"),
        ("DiT^DH-XL", heads["XL"], "156.8; FID 2.16 (T6)"),
        ("encoder DINOv2-B, 224 px", encoder("vit_base_patch14_reg4_dinov2", 224), ""),
        ("encoder SD-VAE, 256 px", vae(decoding=False), ""),
        ("decoder SD-VAE", vae_decoder, "310.4 (T1)"),
    ]
    claimed = {"B": "22.2 (T1), 14 times less", "L": "78.1", "XL": "106.7, 3 times less"}
    for size, paper in claimed.items():
        count = decoder(size)
        times = vae_decoder[1] / count[1]
        rows.append((f"decoder ViT-{size}", count, f"{paper}; {times:.1f} times less here"))
    print("| | GMAC | without attention products | the paper |\n| --- | --- | --- | --- |")
    for name, (count, without), paper in rows:
        print(f"| {name} | {count:.1f} | {without:.1f} | {paper} |")
    # Epochs after which DiT-XL on RAE latents is as good as the others at the end, unguided
    print("\n| as good as, unguided | the paper | in epochs |\n| --- | --- | --- |")
    print(f"| SiT-XL after 1,400 epochs | 47 times faster | {1400 / 47:.0f} |")
    print(f"| REPA-XL after 800 epochs | 16 times faster | {800 / 16:.0f} |")


if __name__ == "__main__":
    main()
