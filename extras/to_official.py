"""Convert checkpoints of this repository to files that the official code loads.

    python extras/to_official.py out/decoder/checkpoint.pt model.pt --stats stat.pt
    python extras/to_official.py out/diffusion/checkpoint.pt stage2_model.pt

The first writes a decoder and, with --stats, the latent statistics beside it. The second writes a
DiT or DiT^DH. Both hold the EMA weights.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rae  # noqa: E402


def to_official_names(state):
    """Rename the state dict of a Decoder for the official code."""
    for ours, official in rae.OFFICIAL_NAMES:
        state = {name.replace(ours, official): tensor for name, tensor in state.items()}
    return state


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("checkpoint", help="checkpoint.pt or ema_*.pt of either training script")
    p.add_argument("out", help="file to write")
    p.add_argument("--stats", help="file for a decoder's latent statistics")
    args = p.parse_args()
    file = rae.load(args.checkpoint)
    if "ema" not in file:
        raise rae.UsageError(f"{args.checkpoint}: not a checkpoint of a training script")
    state = file["ema"]
    if "decoder_embed.weight" in state:
        state = to_official_names(state)
    rae.atomic_save(state, args.out)
    if args.stats:
        rae.atomic_save({"mean": file["mean"], "var": file["var"]}, args.stats)


if __name__ == "__main__":
    rae.run_script(main)
