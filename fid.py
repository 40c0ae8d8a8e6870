"""The score: the Frechet distance of two sets of images, in Inception features (FID) or an encoder's.

    python fid.py                                                     # out/samples.npz against toy validation
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --weights pt_inception-2015-12-05-6726825d.pth
    python fid.py samples/ photographs/ --features encoder:dinov2-b

Each side is a folder of images, an .npz of images (arr_0, uint8 NHWC) or of statistics (mu, sigma). Only the
distance in the 2015 Inception's features is an FID; in an encoder's it bears the encoder's name.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URLS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS[0],
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHTS[1])
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


# ------------------------------------------------------------------------------------------------ the network

class Conv(nn.Module):
    def __init__(self, channels, out, kernel=1, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if padding is None else padding
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel chains of convolutions, concatenated.

    A chain is a list of (name, channels out, kernel). A name that ends in "s" has stride 2 and no padding; a
    list in place of a step is a fork, whose ends are concatenated."""

    def __init__(self, channels, chains, pool):
        super().__init__()
        self.chains, self.pool, self.out = [], pool, 0
        for chain in chains:
            c, names = channels, []
            for step in chain:
                fork = step if isinstance(step, list) else [step]
                for name, out, kernel in fork:
                    strided = name.endswith("s")
                    self.add_module(name.rstrip("s"), Conv(c, out, kernel, *((2, 0) if strided else ())))
                names.append([name.rstrip("s") for name, _, _ in fork])
                c = sum(out for _, out, _ in fork)
            self.chains.append(names)
            self.out += c
        if pool == "reduce":
            self.out += channels

    def forward(self, x):
        outs = []
        for chain in self.chains:
            y = x
            if chain[0] == ["branch_pool"]:     # average without the padding, except for the last block's max
                y = (F.max_pool2d(x, 3, 1, 1) if self.pool == "max"
                     else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            for fork in chain:
                y = torch.cat([getattr(self, name)(y) for name in fork], 1)
            outs.append(y)
        return torch.cat(outs + ([F.max_pool2d(x, 3, 2)] if self.pool == "reduce" else []), 1)


def block_a(c, pool):
    return Mixed(c, [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                     [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
                     [("branch_pool", pool, 1)]], "average")


def block_b(c):
    return Mixed(c, [[("branch3x3s", 384, 3)], [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3),
                                               ("branch3x3dbl_3s", 96, 3)]], "reduce")


def block_c(c, d):
    return Mixed(c, [[("branch1x1", 192, 1)],
                     [("branch7x7_1", d, 1), ("branch7x7_2", d, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                     [("branch7x7dbl_1", d, 1), ("branch7x7dbl_2", d, (7, 1)), ("branch7x7dbl_3", d, (1, 7)),
                      ("branch7x7dbl_4", d, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
                     [("branch_pool", 192, 1)]], "average")


def block_d(c):
    return Mixed(c, [[("branch3x3_1", 192, 1), ("branch3x3_2s", 320, 3)],
                     [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                      ("branch7x7x3_3", 192, (7, 1)),
                      ("branch7x7x3_4s", 192, 3)]], "reduce")


def block_e(c, pool):
    return Mixed(c, [[("branch1x1", 320, 1)],
                     [("branch3x3_1", 384, 1),
                      [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
                     [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                      [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
                     [("branch_pool", 192, 1)]], pool)


class InceptionV3(nn.Module):
    """The 2015 Inception of FID: images (B, 3, 299, 299) in about [-1, 1] -> pool3 features (B, 2048)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2, 0), Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3, 1, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a, self.Mixed_6b = block_b(288), block_c(768, 128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)                # not run here; the published file has it

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))             # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))             # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))        # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))   # (B, 768, 17, 17)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))            # (B, 2048)


def resize_adm(x, size=299):
    """TensorFlow 1's bilinear resize of float images (B, 3, H, W): corners not centred, no antialias."""
    def axis(n):
        scale = torch.tensor(n / size, dtype=torch.float32)
        src = torch.arange(size, dtype=torch.float32, device=x.device) * scale
        lo = src.long()
        return lo, (lo + 1).clamp(max=n - 1), src - lo
    left, right, wx = axis(x.shape[3])
    top, bottom, wy = axis(x.shape[2])
    x = x[..., left] + (x[..., right] - x[..., left]) * wx                            # (B, 3, H, 299)
    return x[..., top, :] + (x[..., bottom, :] - x[..., top, :]) * wy[:, None]        # (B, 3, 299, 299)


def load_inception(path, device):
    """(features of uint8 images (B, 3, H, W), name), from the published weights file."""
    cached = [Path(torch.hub.get_dir(), "checkpoints", name) for name in WEIGHTS]
    path = Path(path) if path else next((f for f in cached if f.is_file()), None)
    if path is None or not path.is_file():
        raise ValueError(f"FID needs the Inception weights: download {URLS[0]} or {URLS[1]} (sha256 "
                         f"{SHA256}) and pass --weights FILE, or compare with --features encoder:NAME")
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha != SHA256:
        print(f"warning: {path} is not the published file (sha256 {sha[:8]}, not {SHA256[:8]})")
    net = InceptionV3()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:                             # torch raises several kinds for a broken or other file
        raise ValueError(f"{path}: not the Inception weights ({' '.join(str(e).split())[:120]})") from None
    net = net.to(device).eval().requires_grad_(False)
    return lambda images: net((resize_adm(images.float()) - 128) / 128), f"adm, inception {sha[:8]}"


def load_encoder(name, size, device):
    """(features, name) of an encoder of rae.py: its tokens, averaged over the image."""
    from rae import build_encoder
    encoder = build_encoder(name, size).to(device)
    return lambda images: encoder(images.float() / 255).mean(1), f"encoder {name} {encoder.fingerprint[:8]}"


# --------------------------------------------------------------------------------------------- the statistics

class Images:
    """Images of a folder (recursive, sorted), an .npz or the toy world, as batches (B, 3, H, W) uint8."""

    def __init__(self, source):
        self.source, self.files, self.array = source, None, None
        path = Path(source)
        if source == "toy":
            from rae import ToyShapes
            self.array = ToyShapes("val").images
        elif path.is_dir():
            self.files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        else:
            self.array = read_npz(path, "arr_0").get("arr_0")
            if self.array is None or self.array.dtype != np.uint8 or self.array.shape[3:] != (3,):
                raise ValueError(f"{source}: wants arr_0 of uint8 (N, H, W, 3)")
            self.array = self.array.transpose(0, 3, 1, 2)
        if len(self) < 2:
            raise ValueError(f"{source}: {len(self)} images; a distance needs two at least")
        self.size = self.read(0).shape[-1]

    def __len__(self):
        return len(self.array if self.files is None else self.files)

    def read(self, i):
        if self.files is None:
            return torch.from_numpy(np.ascontiguousarray(self.array[i]))
        try:
            pixels = np.array(Image.open(self.files[i]).convert("RGB"))
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        except Exception as e:                         # PIL raises half a dozen kinds for broken files
            raise ValueError(f"{self.files[i]}: cannot be read as an image ({e})") from None

    def batches(self, num, size):
        for first in range(0, num, size):
            batch = [self.read(i) for i in range(first, min(first + size, num))]
            if len({x.shape for x in batch}) > 1:
                raise ValueError(f"{self.source}: images of several sizes; crop them alike first")
            yield torch.stack(batch)


def read_npz(path, *keys):
    """Those of the named arrays that an .npz has; the others, which may be large, are not read."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in keys if k in file.files}
    except Exception as e:                             # numpy raises half a dozen kinds for other files
        raise ValueError(f"{path}: not an .npz of arrays ({type(e).__name__})") from None


class Moments:
    """Mean (D,) and unbiased covariance (D, D) of features (B, D) that come in batches; float64 sums."""

    def __init__(self):
        self.n = self.total = self.outer = 0

    def add(self, features):
        f = features.cpu().double()
        self.n, self.total, self.outer = self.n + len(f), self.total + f.sum(0), self.outer + f.T @ f

    def result(self):
        mu = self.total / self.n
        return mu.numpy(), ((self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)).numpy()


@torch.no_grad()
def statistics(images, features, num, batch_size, device):
    """Mean and covariance of the features of the first num images."""
    moments = Moments()
    for batch in tqdm(images.batches(num, batch_size), total=-(-num // batch_size), desc=str(images.source),
                      disable=not sys.stderr.isatty()):
        moments.add(features(batch.to(device)))                                       # (B, features)
    return moments.result()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 sqrt(sigma1 sigma2)) of float64 arrays (D,), (D, D)."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(np.complex128)).real.sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("samples", nargs="?", default="out/samples.npz", help="folder or .npz")
    p.add_argument("reference", nargs="?", default="toy", help="folder, .npz of images or statistics, or toy")
    p.add_argument("--features", help="inception, or encoder:NAME; default: inception, for toy encoder:toy")
    p.add_argument("--weights", help="file of the 2015 Inception weights")
    p.add_argument("--num", type=int, default=0, help="first images of each side, 0 for all")
    p.add_argument("--batch-size", type=int, default=64, help="images at once")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cuda, mps or cpu")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the line")
    args = p.parse_args()
    if args.samples == "out/samples.npz" and not Path(args.samples).is_file():
        raise ValueError(f"{args.samples}: no such file; run sample.py first, or name SAMPLES and REFERENCE")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: not on this machine") from None
    samples = Images(args.samples)
    kind = args.features or ("encoder:toy" if args.reference == "toy" and not args.weights else "inception")
    if kind.startswith("encoder:"):
        features, label = load_encoder(kind.removeprefix("encoder:"), samples.size, args.device)
    elif kind == "inception":
        features, label = load_inception(args.weights, args.device)
    else:
        raise ValueError(f"--features {kind}: wants inception or encoder:NAME")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def side(images):
        num = min(args.num or len(images), len(images))
        return num, *statistics(images, features, num, args.batch_size, args.device)

    stored = read_npz(Path(args.reference), "mu", "sigma") if args.reference.endswith(".npz") else {}
    reference = None if len(stored) == 2 and kind == "inception" else Images(args.reference)
    if reference and reference.size != samples.size:
        raise ValueError(f"{args.samples} has {samples.size} px, {args.reference} {reference.size}; "
                         "crop alike first")
    n, *first = side(samples)
    second = side(reference)[1:] if reference else (stored["mu"], stored["sigma"])
    value, name = frechet_distance(*first, *second), "FID" if kind == "inception" else "Frechet distance"
    if n < 2048 and kind == "inception":
        print(f"warning: {n} samples; below 2048 the number is far too high, and papers use 50,000")
    print(json.dumps(dict(name=name, value=value, num=n, features=label, reference=args.reference))
          if args.json else
          f"{name} {value:.4f}  (N={n}, {label}, float32, reference {args.reference})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {str(e).splitlines()[-1]}")
