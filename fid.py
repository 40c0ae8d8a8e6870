"""The score: FID, sFID, Inception score, precision and recall, without TensorFlow (appendix E).

    python fid.py                                                     # out/samples.npz against toy validation
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,pr --weights FILE
    python fid.py imagenet/val --crop 256 --save val256.npz           # statistics, for later
    python fid.py samples/ photographs/ --features encoder:dinov2-b   # a distance, but no FID
    torchrun --standalone --nproc_per_node=8 fid.py samples.npz val256.npz

A side is a folder of images, an .npz of images (arr_0, uint8 NHWC) or one of statistics (mu, sigma; for sFID
mu_s, sigma_s). Papers on ImageNet mean --mode adm: the TensorFlow suite of ADM, its resize included.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URLS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS[0],
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHTS[1])
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
CHUNK = 5000                                           # images per chunk of the Inception score, as in ADM's


# ----------------------------------------------------------------------------------------------- the network

class Conv(nn.Module):
    def __init__(self, channels, out, kernel=(1, 1), stride=1, padding=None):
        super().__init__()
        padding = tuple(k // 2 for k in kernel) if padding is None else padding
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel chains of convolutions, concatenated.

    A chain reads "name:channels:kernel name:channels:kernel", and "|" forks a step. One that begins with
    branch_pool pools first, by average (without the padding) or max. In a "reduce" block every chain ends in
    stride 2, beside a max pool of the input."""

    def __init__(self, channels, pool, *chains):
        super().__init__()
        self.pool, self.chains, self.out = pool, [], channels if pool == "reduce" else 0
        for chain in chains:
            c, steps = channels, [step.split("|") for step in chain.split()]
            for step in steps:
                parts = [part.split(":") for part in step]
                for name, out, kernel in parts:
                    kernel = tuple(int(k) for k in kernel.split("x")) * (1 if "x" in kernel else 2)
                    last = pool == "reduce" and step is steps[-1]
                    self.add_module(name, Conv(c, int(out), kernel, *((2, 0) if last else ())))
                c = sum(int(out) for _, out, _ in parts)
            self.chains.append([[part.split(":")[0] for part in step] for step in steps])
            self.out += c

    def forward(self, x):
        outs = []
        for chain in self.chains:
            y = x
            if chain[0] == ["branch_pool"]:
                y = (F.max_pool2d(x, 3, 1, 1) if self.pool == "max"
                     else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            for step in chain:
                y = torch.cat([getattr(self, name)(y) for name in step], 1)
            outs.append(y)
        return torch.cat(outs + ([F.max_pool2d(x, 3, 2)] if self.pool == "reduce" else []), 1)


def mixed_5(c, pool):
    return Mixed(c, "average", "branch1x1:64:1", "branch5x5_1:48:1 branch5x5_2:64:5",
                 "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3", f"branch_pool:{pool}:1")


def mixed_6(d):
    return Mixed(768, "average", "branch1x1:192:1",
                 f"branch7x7_1:{d}:1 branch7x7_2:{d}:1x7 branch7x7_3:192:7x1",
                 f"branch7x7dbl_1:{d}:1 branch7x7dbl_2:{d}:7x1 branch7x7dbl_3:{d}:1x7 branch7x7dbl_4:{d}:7x1 "
                 "branch7x7dbl_5:192:1x7", "branch_pool:192:1")


def mixed_7(c, pool):
    return Mixed(c, pool, "branch1x1:320:1", "branch3x3_1:384:1 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1",
                 "branch3x3dbl_1:448:1 branch3x3dbl_2:384:3 branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1",
                 "branch_pool:192:1")


class InceptionV3(nn.Module):
    """The 2015 Inception of FID: images (B, 3, 299, 299) in about [-1, 1] -> pool3 features (B, 2048)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, (3, 3), 2, 0), Conv(32, 32, (3, 3), 1, 0)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80), Conv(80, 192, (3, 3), 1, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, "reduce", "branch3x3:384:3",
                              "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (mixed_6(d)
                                                                      for d in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, "reduce", "branch3x3_1:192:1 branch3x3_2:320:3",
                              "branch7x7x3_1:192:1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 "
                              "branch7x7x3_4:192:3")
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "average"), mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def features(self, x):
        """pool3 (B, 2048) and spatial (B, 2023): the first 7 channels of Mixed_6d, in H, W, C order."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))             # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))             # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))        # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))             # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                             # (B, 2023)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean((2, 3)), spatial

    def forward(self, x):
        return self.features(x)[0]

    def logits(self, pool3):
        """Class scores (B, 1008) without the bias, as the Inception score wants them."""
        return pool3 @ self.fc.weight.T


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


def prepare(images, mode):
    """Pixels of 0 to 255, (B, 3, H, W) or a list of unequal (3, H, W) -> (B, 3, 299, 299) for the network."""
    if isinstance(images, list):
        return torch.cat([prepare(image[None], mode) for image in images])
    if mode == "adm":
        return (resize_adm(images.float()) - 128) / 128
    return 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1


def load_inception(path, device, mode="adm"):
    """(network, its features of images as of `prepare`, label) from the published weights file."""
    cached = [Path(torch.hub.get_dir(), "checkpoints", name) for name in WEIGHTS]
    path = Path(path) if path else next((f for f in cached if f.is_file()), None)
    if path is None or not path.is_file():
        raise ValueError(f"FID needs the Inception weights: download {URLS[0]} or {URLS[1]} (sha256 "
                         f"{SHA256}) and pass --weights FILE, or compare with --features encoder:NAME")
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha != SHA256:
        warn(f"{path} is not the published file (sha256 {sha[:8]}, not {SHA256[:8]})")
    net = InceptionV3()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:                             # torch raises several kinds for a broken or other file
        raise ValueError(f"{path}: not the Inception weights ({' '.join(str(e).split())[:120]})") from None
    net = net.to(device).eval().requires_grad_(False)
    return net, lambda images: net.features(prepare(images, mode)), f"{mode}, inception {sha[:8]}"


def load_encoder(name, size, device):
    """The same of an encoder of rae.py: its tokens, averaged over the image of `size` pixels."""
    from rae import build_encoder
    if not size.isdigit():
        raise ValueError(f"--features encoder:{name} wants square images of one size; pass --crop")
    encoder = build_encoder(name, int(size)).to(device)
    label = f"encoder {name} {encoder.fingerprint[:8]}"
    return None, lambda images: (encoder(images.float() / 255).mean(1),), label


# ------------------------------------------------------------------------------------------------- the images

class Images:
    """Images of a folder (recursive, sorted), an .npz or the toy world; crop: side of ADM's crop, or None."""

    def __init__(self, source, crop=None):
        self.source, self.crop, self.files, self.array = str(source), crop, None, None
        path = Path(source)
        if source == "toy":
            from assets.toy_world import ToyShapes
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
        sizes = {self.read(i).shape[1:] for i in range(min(len(self), 64))}
        height, width = sizes.pop()
        self.size = "mixed" if sizes else width if height == width else f"{width}x{height}"

    def __len__(self):
        return len(self.array if self.files is None else self.files)

    def read(self, i):
        if self.files is None:
            return torch.from_numpy(np.ascontiguousarray(self.array[i]))
        try:
            image = Image.open(self.files[i]).convert("RGB")
        except Exception as e:                         # PIL raises half a dozen kinds for broken files
            raise ValueError(f"{self.files[i]}: cannot be read as an image ({e})") from None
        if self.crop:
            from rae import center_crop
            image = center_crop(image, self.crop)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())            # (3, H, W)

    def batches(self, num, size, rank, world):
        """(number of the first image, batch): every world-th batch from number rank on."""
        for first in range(rank * size, num, world * size):
            batch = [self.read(i) for i in range(first, min(first + size, num))]
            yield first, torch.stack(batch) if len({x.shape for x in batch}) == 1 else batch


def read_npz(path, *keys):
    """Those of the named arrays that an .npz has; the others, which may be large, are not read."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in keys if k in file.files}
    except Exception as e:                             # numpy raises half a dozen kinds for other files
        raise ValueError(f"{path}: not an .npz of arrays ({type(e).__name__})") from None
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{path}: {key} holds numbers that are not finite")
    return arrays


# ------------------------------------------------------------------------------------------------ the numbers

class Moments:
    """Mean (D,) and unbiased covariance (D, D) of features (B, D) that come in batches; float64 sums."""

    def __init__(self):
        self.n = self.total = self.outer = 0

    def add(self, features):
        f = features.cpu().double()
        self.n, self.total, self.outer = self.n + len(f), self.total + f.sum(0), self.outer + f.T @ f

    def merge(self):
        """Add what the other processes saw."""
        self.n, self.total, self.outer = map(sum, zip(*gathered((self.n, self.total, self.outer))))
        return self

    def result(self):
        mu = self.total / self.n
        return mu.numpy(), ((self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)).numpy()


def gathered(x):
    """x of every process, by rank."""
    parts = [x]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, x)
    return parts


@torch.no_grad()
def statistics(images, features, num, batch, device, net=None, metrics=("fid",)):
    """What the metrics need of the first num images: mu, sigma, mu_s, sigma_s, is, pool3 (num, 2048) float32.

    Batches go to the processes in turn, and their sums are added up: any number of processes sees the batches
    of one. Only precision and recall keep features; all else is summed as the batches come."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pool, spatial, seen = Moments(), Moments(), 0
    mine = sum(min(batch, num - first) for first in range(rank * batch, num, world * batch))
    rows = torch.empty(mine if "pr" in metrics else 0, 2048)
    chunks = torch.zeros(-(-num // CHUNK), 1009, dtype=torch.float64)     # sums of p, and of its entropy
    for first, x in tqdm(images.batches(num, batch, rank, world), desc=images.source, unit="image",
                         unit_scale=batch * world, disable=rank > 0 or not sys.stderr.isatty()):
        f, *more = features([i.to(device) for i in x] if isinstance(x, list) else x.to(device))
        pool.add(f)
        if "sfid" in metrics:
            spatial.add(more[0])
        if "is" in metrics:
            p = net.logits(f).cpu().double().softmax(1)                               # (B, 1008)
            p = torch.cat([p, torch.special.entr(p).sum(1, keepdim=True)], 1)
            chunks.index_add_(0, torch.arange(first, first + len(p)) // CHUNK, p)
        if "pr" in metrics:
            rows[seen:seen + len(f)] = f.cpu()
            seen += len(f)
    result = dict(zip(("mu", "sigma"), pool.merge().result()))
    if "sfid" in metrics:
        result |= dict(zip(("mu_s", "sigma_s"), spatial.merge().result()))
    if "is" in metrics:
        result["is"] = inception_score(sum(gathered(chunks)), num)
    if "pr" in metrics:
        parts = [part.split(batch) for part in gathered(rows)]         # batch i is rank i % world's
        result["pool3"] = rows if world == 1 else torch.cat([parts[i % world][i // world]
                                                             for i in range(-(-num // batch))])
    return result


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 sqrt(sigma1 sigma2)) of float64 arrays (D,), (D, D)."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(np.complex128)).real.sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def inception_score(chunks, num):
    """exp(H(p(y)) - H(p(y|x))), averaged over chunks of 5,000 images; the sums are those of `statistics`."""
    n = torch.tensor([min(CHUNK, num - CHUNK * i) for i in range(len(chunks))], dtype=torch.float64)
    mean = chunks / n[:, None]
    return (torch.special.entr(mean[:, :-1]).sum(1) - mean[:, -1]).exp().mean().item()


@torch.no_grad()
def precision_recall(samples, references, k=3, rows=250):
    """Share of samples inside some reference's ball, and of references inside some sample's; rows (n, D).

    A ball reaches to its centre's k-th neighbour in its own set (Kynkaanniemi et al. 2019). Distances are
    held for `rows` images at a time."""
    def squared(x, y):                                 # (rows, len(y)); cdist would copy all of y
        norms = [torch.linalg.vector_norm(z, dim=1).square() for z in (x, y)]
        return (norms[0][:, None] + norms[1]).addmm_(x, y.T, alpha=-2)

    def radii(x):                                      # the nearest of k + 1 is the image itself
        return torch.cat([squared(r, x).topk(min(k + 1, len(x)), largest=False).values[:, -1]
                          for r in x.split(rows)])
    of_sample, of_reference = radii(samples), radii(references)
    precise, recalled = 0, torch.zeros(len(references), dtype=torch.bool, device=references.device)
    for x, radius in zip(samples.split(rows), of_sample.split(rows)):
        d = squared(x, references)                                                    # (rows, references)
        precise += (d <= of_reference).any(1).sum().item()
        recalled |= (d <= radius[:, None]).any(0)
    return precise / len(samples), recalled.double().mean().item()


def warn(text):
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {text}", file=sys.stderr)


def score(samples, reference, features="inception", metrics=("fid",), mode="adm", weights=None, num=0,
          batch=64, crop=None, device="cpu"):
    """The metrics of samples against a reference, in a dict that also says what they were made of.

    Either side is a path or an object like Images; without a reference, the samples' statistics. ValueError
    where the two sides were not made alike."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False   # float32, all of it
    began, seen, sides, results = time.time(), 0, [], []
    for source in (samples, reference)[:1 + (reference is not None)]:
        stored = {}
        if str(source).endswith(".npz"):
            stored = read_npz(Path(source), "mu", "sigma", "mu_s", "sigma_s", "label", "size", "n")
        held = {m for m, key in (("fid", "mu"), ("sfid", "mu_s")) if key in stored}
        wanted = [m for m in metrics if m not in held and (m != "is" or not sides)]
        images = (Images(source, crop) if isinstance(source, str) else source) if wanted else None
        size = str(images.size if images else stored.get("size", "?"))
        sides.append((source, stored, wanted, images, size))
    sizes = sorted({size for *_, size in sides} - {"?"})
    if len(sizes) > 1:
        raise ValueError(f"{samples} and {reference} have {' and '.join(sizes)} px; pass --crop or the "
                         "statistics of the same crop")
    if features == "inception":
        net, extract, label = load_inception(weights, device, mode)
    elif features.startswith("encoder:"):
        net, extract, label = load_encoder(features[8:], sizes[0], device)
    else:
        raise ValueError(f"--features {features}: wants inception or encoder:NAME")
    for source, stored, wanted, images, size in sides:
        if "mu" in stored and "label" not in stored:
            warn(f"{source} does not say of which mode and weights its statistics are; taken for {label}")
        elif "mu" in stored and str(stored["label"]) != label:
            raise ValueError(f"{source}: statistics of ({stored['label']}), not of ({label}); make new ones")
        n = min(num or len(images), len(images)) if images else int(stored.get("n", 0))
        fresh = statistics(images, extract, n, batch, device, net, wanted) if wanted else {}
        seen += len(fresh) and n
        results.append(fresh | stored | {"n": n, "size": size, "label": label})
    if reference is None:
        return results[0]
    out = dict(num=results[0]["n"], label=label, images_per_s=seen / (time.time() - began))
    for name, key in (("FID", ""), ("sFID", "_s")):
        if name.lower() in metrics:
            out[name if net else "Frechet distance"] = frechet_distance(
                *(r[k + key] for r in results for k in ("mu", "sigma")))
    if "is" in metrics:
        out["IS"] = results[0]["is"]
    if "pr" in metrics:
        out["precision"], out["recall"] = precision_recall(*(r["pool3"].to(device) for r in results))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("samples", nargs="?", default="out/samples.npz", help="folder or .npz")
    p.add_argument("reference", nargs="?", default="toy", help="folder, .npz of images or statistics, or toy")
    p.add_argument("--metrics", default="fid", help="of fid,sfid,is,pr: any, with commas")
    p.add_argument("--mode", choices=["adm", "pytorch-fid"], default="adm", help="resize before the network")
    p.add_argument("--features", help="inception, or encoder:NAME; default: inception, for toy encoder:toy")
    p.add_argument("--weights", help="file of the 2015 Inception weights")
    p.add_argument("--save", help="write the statistics of SAMPLES to this .npz and stop")
    p.add_argument("--crop", type=int, help="ADM's centre crop of every image to this side first")
    p.add_argument("--num", type=int, default=0, help="first images of each side, 0 for all")
    p.add_argument("--batch", type=int, default=64, help="images at once")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cuda, mps or cpu")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the line")
    args = p.parse_args()
    metrics, toy = args.metrics.split(","), args.reference == "toy" and not args.weights and not args.save
    features = args.features or ("encoder:toy" if toy else "inception")
    if set(metrics) - {"fid", "sfid", "is", "pr"}:
        raise ValueError(f"--metrics {args.metrics}: wants some of fid,sfid,is,pr")
    if features != "inception" and metrics != ["fid"]:
        raise ValueError(f"--metrics {args.metrics}: only fid's distance is there for --features {features}")
    if args.samples == "out/samples.npz" and not Path(args.samples).is_file():
        raise ValueError(f"{args.samples}: no such file; run sample.py first, or name SAMPLES and REFERENCE")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
        args.device += f":{os.environ['LOCAL_RANK']}" if args.device == "cuda" else ""
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: not on this machine") from None
    if any(f.suffix.lower() in (".jpg", ".jpeg") for f in Path(args.samples).rglob("*")):
        warn(f"{args.samples} holds JPEG images; their losses alone raise FID by several points")
    if args.save:
        args.reference, metrics = None, ["fid", "sfid"] if features == "inception" else ["fid"]
    result = score(args.samples, args.reference, features, metrics, args.mode, args.weights, args.num,
                   args.batch, args.crop, args.device)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if args.save:
        np.savez(args.save, **result)
        return print(f"wrote {args.save}  (N={result['n']}, {result['size']} px, {result['label']})")
    num, label, rate = (result.pop(k) for k in ("num", "label", "images_per_s"))
    if num < 2048 and features == "inception":
        warn(f"{num} samples; below 2048 the number is far too high, and papers use 50,000")
    if args.json:
        about = dict(num=num, label=label, images_per_s=rate, reference=args.reference)
        return print(json.dumps(result | about))
    print("  ".join(f"{k} {v:.4f}" for k, v in result.items())
          + f"  (N={num}, {label}, float32, reference {args.reference})  {rate:.0f} images/s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {str(e).splitlines()[-1]}")
