"""Measure the toy's numbers in docs/results.md, by the commands that the page shows.

    python extras/paper/toy_numbers.py    # 20 minutes on two CPU cores -> out/toy/toy.json

docs/toy.json is a copy of that. Rerun the same command to resume.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("out/toy")


def run(script, *words):
    """Run a script of this repository and return what it printed."""
    print(f"python {script} {' '.join(words)}", flush=True)
    command = [sys.executable, ROOT / script, *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def number_after(word, printed):
    return float(re.search(rf"{word} ([\d.]+)", printed)[1])


def read_log(folder, name):
    """One number of a log, by step."""
    lines = [json.loads(line) for line in open(OUT / folder / "log.jsonl")]
    return {line["step"]: line[name] for line in lines if name in line}


def main():
    run("train_diffusion.py", "--out", f"{OUT}/diffusion")
    quality = run("extras/quality.py", "--ckpt", f"{OUT}/diffusion/checkpoint.pt")
    numbers = {"quality": json.loads(quality), "gan": {}}
    numbers["loss"] = read_log("diffusion", "loss")

    for name, flags in (("with GAN", ()), ("--disc-weight 0", ("--disc-weight", "0"))):
        folder = name.replace(" ", "_").strip("-")
        run("train_decoder.py", *flags, "--out", f"{OUT}/{folder}")
        scores = {"psnr": [], "ssim": [], "distance": []}  # from clean and from noisy tokens
        for sigma in ("0", "0.8"):
            images = f"{OUT}/{folder}_{sigma}"
            words = ("--decoder", f"{OUT}/{folder}/checkpoint.pt", "--sigma", sigma)
            printed = run("extras/reconstruct.py", *words, "--out", images)
            scores["psnr"].append(number_after("PSNR", printed))
            scores["ssim"].append(number_after("SSIM", printed))
            scores["distance"].append(number_after("distance", run("fid.py", f"{images}.npz")))
        numbers["gan"][name] = scores
    numbers["l1"] = read_log("with_GAN", "l1")

    Path(OUT, "toy.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"wrote {OUT}/toy.json")


if __name__ == "__main__":
    main()
