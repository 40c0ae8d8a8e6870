"""The score: FID, sFID, Inception score, precision and recall, without TensorFlow (appendix E).

    python fid.py                                                     # out/samples.npz against toy validation
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,pr --weights FILE
    python fid.py imagenet/val --crop 256 --save val256.npz           # statistics, for later
    torchrun --standalone --nproc_per_node=8 fid.py samples.npz val256.npz

A side is a folder of images, an .npz of images (arr_0, uint8 NHWC) or one of statistics (mu, sigma; for sFID
mu_s, sigma_s). Papers on ImageNet mean --mode adm: the TensorFlow suite of ADM, its resize included.
"""

import argparse, hashlib, json, os, sys, time
from collections import OrderedDict
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

FILE = "inception-2015-12-05-6726825d.pth"
URLS = (f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_{FILE}",
        f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-{FILE}")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
# What statistics() gives for each metric; fid's and sfid's are also what a file of statistics holds.
METRICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"), "is": ("is",), "pr": ("pool3",)}
CHUNK, BLOCK = 5000, 1000                 # images per chunk of the Inception score; distances' rows at once
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # of torchrun

def check(fine, message):
    """A user's mistake: ValueError with one line."""
    if not fine:
        raise ValueError(message)

# ----------------------------------------------------------------------------------------------- the network
def conv(channels, out, kernel, stride=None):
    """Convolution, batch norm and ReLU: the same size out as in, or the stride without padding."""
    size, padding = [int(k) for k in kernel.split("x")], 0 if stride else "same"
    c = nn.Conv2d(channels, int(out), size, int(stride or 1), padding, bias=False)
    return nn.Sequential(OrderedDict(conv=c, bn=nn.BatchNorm2d(int(out), eps=1e-3), relu=nn.ReLU()))

class Mixed(nn.Module):
    """Convolutions as chains "SOURCE NAME channels:kernel ..."; where a chain has several, they are numbered.
    A source is x, the pool of x, or a convolution. Whatever is nothing's source is concatenated."""
    def __init__(self, channels, pool, chains):
        super().__init__()
        self.pool, self.sources, width = pool, {}, {"x": channels, "pool": channels}
        for source, chain, *steps in map(str.split, chains.split(", ")):
            for i, step in enumerate(steps, 1):
                name = f"{chain}_{i}" if len(steps) > 1 else chain
                out, *kernel = step.split(":")
                self.add_module(name, conv(width[source], out, *kernel))
                self.sources[name], width[name], source = source, int(out), name
    def forward(self, x):
        y = {"x": x, "pool": self.pool(x)}
        for name, source in self.sources.items():
            y[name] = getattr(self, name)(y[source])
        ends = [name for name in (*self.sources, "pool") if name not in self.sources.values()]
        return torch.cat([y[name] for name in ends], 1)

class InceptionV3(nn.Module):
    """The 2015 Inception of FID: images (B, 3, 299, 299) in about [-1, 1] -> pool3 features (B, 2048)."""
    def __init__(self):
        super().__init__()
        average, largest = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1)
        self.halve = nn.MaxPool2d(3, 2)
        five = ("x branch1x1 64:1x1, x branch5x5 48:1x1 64:5x5, x branch3x3dbl 64:1x1 96:3x3 96:3x3, "
                "pool branch_pool {}:1x1")
        six = ("x branch1x1 192:1x1, x branch7x7 {0}:1x1 {0}:1x7 192:7x1, "
               "x branch7x7dbl {0}:1x1 {0}:7x1 {0}:1x7 {0}:7x1 192:1x7, pool branch_pool 192:1x1")
        seven = ("x branch1x1 320:1x1, x branch3x3_1 384:1x1, branch3x3_1 branch3x3_2a 384:1x3, branch3x3_1 "
                 "branch3x3_2b 384:3x1, x branch3x3dbl 448:1x1 384:3x3, branch3x3dbl_2 branch3x3dbl_3a "
                 "384:1x3, branch3x3dbl_2 branch3x3dbl_3b 384:3x1, pool branch_pool 192:1x1")
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = conv(3, 32, "3x3", 2), conv(32, 32, "3x3", 1)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = conv(32, 64, "3x3"), conv(64, 80, "1x1")
        self.Conv2d_4a_3x3 = conv(80, 192, "3x3", 1)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            Mixed(c, average, five.format(out)) for c, out in ((192, 32), (256, 64), (288, 64)))
        self.Mixed_6a = Mixed(288, self.halve, "x branch3x3 384:3x3:2, x branch3x3dbl 64:1x1 96:3x3 96:3x3:2")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            Mixed(768, average, six.format(c)) for c in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, self.halve, "x branch3x3 192:1x1 320:3x3:2, "
                              "x branch7x7x3 192:1x1 192:1x7 192:7x1 192:3x3:2")
        self.Mixed_7b, self.Mixed_7c = Mixed(1280, average, seven), Mixed(2048, largest, seven)
        self.fc = nn.Linear(2048, 1008)
    def features(self, x):
        """pool3 (B, 2048) and spatial (B, 2023): the first 7 channels of Mixed_6d, in H, W, C order."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))             # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.halve(x)))                     # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.halve(x))))                # (B, 288, 35, 35)
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
    for _ in range(2):                                 # the columns, then, transposed, the rows
        n = x.shape[3]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(n / size)
        left = at.long()
        a, b = x[..., left], x[..., (left + 1).clamp(max=n - 1)]
        x = (a + (b - a) * (at - left)).mT                             # (B, 3, 299, H), then (B, 3, 299, 299)
    return x.contiguous()

def prepare(images, mode):
    """Pixels of 0 to 255, (B, 3, H, W) or a list of unequal (3, H, W) -> (B, 3, 299, 299) for the network."""
    if isinstance(images, list):
        return torch.cat([prepare(image[None], mode) for image in images])
    if mode == "adm":
        return (resize_adm(images.float()) - 128) / 128
    return 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1

def load_inception(path, device, mode="adm"):
    """(network, its features of images as of `prepare`, label) from the published weights file."""
    path = Path(path or f"{torch.hub.get_dir()}/checkpoints/pt_{FILE}")                 # pytorch-fid's place
    check(path.is_file(), f"FID needs the Inception weights: download {' or '.join(URLS)} (sha256 "
          f"{SHA256}), pass the file (--weights, in training --inception) or --features encoder:NAME")
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha != SHA256:
        warn(f"{path} is not the published file (sha256 {sha[:8]}, not {SHA256[:8]})")
    net = InceptionV3().to(device).eval().requires_grad_(False)
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:                             # torch raises several kinds for a broken or other file
        raise ValueError(f"{path}: not the Inception weights ({' '.join(str(e).split())[:120]})") from None
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)                # float32, all of it
    return net, exact(lambda images: net.features(prepare(images, mode))), f"{mode}, inception {sha[:8]}"

def load_encoder(features, size, device):
    """The same of "encoder:NAME" of rae.py: its tokens, averaged over the image of `size` pixels."""
    kind, _, name = features.partition(":")
    check(kind == "encoder", f"--features {features}: wants inception or encoder:NAME")
    check(size.isdigit(), f"--features {features} wants square images of one size; pass --crop")
    from rae import build_encoder
    encoder = build_encoder(name, int(size)).to(device)
    return None, lambda x: (encoder(x.float() / 255).mean(1),), f"encoder {name} {encoder.fingerprint[:8]}"

def warn(text):
    if RANK == 0:
        print(f"warning: {text}", file=sys.stderr)

# ------------------------------------------------------------------------------------------------- the images
class Images:
    """Images of a folder (recursive, sorted), an .npz or the toy; crop: side of ADM's crop, or None."""
    def __init__(self, source, crop=None):
        self.source, self.crop, path = str(source), crop, Path(source)
        if source == "toy":
            from assets.toy_world import ToyShapes
            self.items = ToyShapes("val").images.transpose(0, 2, 3, 1)
        elif path.is_dir():
            self.items = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
            self.jpeg = any(f.suffix.lower() in (".jpg", ".jpeg") for f in self.items)
        else:
            self.items = read_npz(path, "arr_0").get("arr_0", np.empty(0))
            check(self.items.dtype == np.uint8 and self.items.shape[3:] == (3,),
                  f"{source}: wants arr_0 of uint8 (N, H, W, 3)")
        check(len(self) > 1, f"{source}: {len(self)} images; a distance needs two at least")
        sizes = {self.read(i).shape[1:] for i in range(min(len(self), 64))}
        height, width = sizes.pop()
        self.size = "mixed" if sizes else width if height == width else f"{width}x{height}"
    def __len__(self):
        return len(self.items)
    def read(self, i):
        """(3, H, W) uint8."""
        image = self.items[i]
        if isinstance(image, Path):
            try:
                image = Image.open(image).convert("RGB")
            except Exception as e:                     # PIL raises half a dozen kinds for broken files
                raise ValueError(f"{image}: cannot be read as an image ({e})") from None
        if self.crop:
            from rae import center_crop
            image = center_crop(Image.fromarray(np.asarray(image)), self.crop)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
    def batches(self, num, size, rank, world):
        """(number of the first image, (b, 3, H, W) or a list): every world-th batch from number rank on."""
        for first in range(rank * size, num, world * size):
            batch = [self.read(i) for i in range(first, min(first + size, num))]
            yield first, torch.stack(batch) if len({x.shape for x in batch}) == 1 else batch

def read_npz(path, *keys):
    """Those of the named arrays that an .npz has; the others, which may be large, are not read."""
    check(path.is_file(), f"{path}: no such file or folder; run sample.py first, or name both sides")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in keys if k in file.files}
    except Exception as e:                             # numpy raises half a dozen kinds for other files
        raise ValueError(f"{path}: not an .npz of arrays ({type(e).__name__})") from None
    for key, array in arrays.items():
        check(array.dtype.kind != "f" or np.isfinite(array).all(), f"{path}: {key} is not finite throughout")
    return arrays

# ------------------------------------------------------------------------------------------------ the numbers
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of features (B, D) that come in batches; float64 sums."""
    n = total = outer = 0
    def add(self, features):
        f = features.cpu().double()
        self.n += len(f)
        self.total += f.sum(0)
        self.outer += f.T @ f
    def result(self):
        mu = self.total / self.n
        return mu.numpy(), ((self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)).numpy()

def gathered(x):
    """x of every process, by rank, on the first; the others, which have no use for it, see only their own."""
    parts = [x] * WORLD
    if WORLD > 1:
        dist.gather_object(x, parts if RANK == 0 else None)
    return parts

def statistics(images, features, num, batch, device, net=None, metrics=("fid",)):
    """What the metrics need of the first num images: mu, sigma, mu_s, sigma_s, is, pool3 (num, 2048). Batches
    go to the processes in turn, the same for any number of them; all but pool3 is summed as they come."""
    moments = {m: Moments() for m in ("fid", "sfid") if m in metrics}
    chunks = torch.zeros(-(-num // CHUNK), 1009, dtype=torch.float64)     # sums of p, and of its entropy
    rows = torch.empty(-(-num // (batch * WORLD)) if "pr" in metrics else 0, batch, 2048)
    for first, x in tqdm(images.batches(num, batch, RANK, WORLD), desc=images.source, unit="image",
                         unit_scale=batch * WORLD, disable=RANK > 0 or None):
        f = features([i.to(device) for i in x] if isinstance(x, list) else x.to(device))
        for m, y in zip(("fid", "sfid"), f):           # pool3 (b, 2048), spatial (b, 2023)
            if m in metrics:
                moments[m].add(y)
        if "is" in metrics:
            p = net.logits(f[0]).cpu().double().softmax(1)                            # (b, 1008)
            p = torch.cat([p, torch.special.entr(p).sum(1, keepdim=True)], 1)
            chunks.index_add_(0, torch.arange(first, first + len(p)) // CHUNK, p)
        if "pr" in metrics:
            rows[first // (batch * WORLD), :len(f[0])] = f[0].cpu()
    result = {}
    for m, sums in moments.items():                    # of all processes
        sums.n, sums.total, sums.outer = map(sum, zip(*gathered((sums.n, sums.total, sums.outer))))
        result |= dict(zip(METRICS[m], sums.result()))
    if "is" in metrics:
        result["is"] = inception_score(sum(gathered(chunks)), num)
    if "pr" in metrics:                                # batch i is process i % WORLD's
        rows = torch.stack(gathered(rows), 1) if WORLD > 1 else rows
        result["pool3"] = rows.view(-1, 2048)[:num]
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

def precision_recall(samples, references):
    """Share of samples inside some reference's ball, and of references inside some sample's; rows (n, D).
    A ball reaches to its centre's third neighbour in its own set (Kynkaanniemi et al. 2019)."""
    def distances(x, y):                               # in float64, since most digits cancel
        for i in range(0, len(x), BLOCK):
            for j in range(0, len(y), BLOCK):
                d = torch.cdist(x[i:i + BLOCK].double(), y[j:j + BLOCK].double())
                yield slice(i, i + BLOCK), slice(j, j + BLOCK), d
    def radii(x):                                      # the nearest of four is the image itself
        nearest = x.new_full((len(x), 4), float("inf"), dtype=torch.float64)
        for i, _, d in distances(x, x):
            nearest[i] = torch.cat([nearest[i], d], 1).topk(4, largest=False).values
        return nearest[:, min(3, len(x) - 1)]
    of_sample, of_reference = radii(samples), radii(references)
    precise, recalled = (torch.zeros_like(r, dtype=torch.bool) for r in (of_sample, of_reference))
    for i, j, d in distances(samples, references):
        precise[i] |= (d <= of_reference[j]).any(1)
        recalled[j] |= (d <= of_sample[i, None]).any(0)
    return precise.double().mean().item(), recalled.double().mean().item()

def open_side(source, metrics, crop, num):
    """One side of a score, a dict: the numbers that its file holds, and images for the metrics it lacks."""
    side = dict(source=source, images=None, n=0, size="?")
    if str(source).endswith(".npz"):
        side |= read_npz(Path(source), "mu", "sigma", "mu_s", "sigma_s", "label", "size", "n")
    side["lacks"] = [m for m in metrics if set(METRICS[m]) - side.keys()]
    if side["lacks"]:
        side["images"] = images = Images(source, crop) if isinstance(source, str) else source
        side |= dict(n=min(num or len(images), len(images)), size=images.size)
    return side

def score(samples, reference, features=None, metrics=("fid",), mode="adm", weights=None, num=0, batch=64,
          crop=None, device="cpu"):
    """The metrics of samples against a reference, each a path or an object like Images, and what they were
    made of, in a dict; without a reference, and on processes but the first, the samples' statistics."""
    features = features or ("encoder:toy" if reference == "toy" and not weights else "inception")
    check(features == "inception" or list(metrics) == ["fid"],
          f"--metrics {','.join(metrics)}: only fid's distance is there for --features {features}")
    began, a = time.time(), open_side(samples, metrics, crop, num)
    b = open_side(reference, [m for m in metrics if m != "is"] if reference else [], crop, num)
    if reference and getattr(a["images"], "jpeg", False):
        warn(f"{samples} holds JPEG images; their losses alone raise FID by several points")
    sizes = sorted({str(side["size"]) for side in (a, b)} - {"?"})
    check(len(sizes) < 2, f"{samples} and {reference} have {' and '.join(sizes)} px; pass --crop or the "
          "statistics of the same crop")
    net, extract, label = (load_inception(weights, device, mode) if features == "inception" else
                           load_encoder(features, "".join(sizes), device))
    for side in (a, b):
        source, made = side["source"], str(side.get("label", label))
        check(made == label, f"{source}: statistics of ({made}), not of ({label}); make new ones")
        if "mu" in side and "label" not in side:
            warn(f"{source} does not say of which mode and weights its statistics are; taken for {label}")
        if side["lacks"]:
            side |= statistics(side["images"], extract, side["n"], batch, device, net, side["lacks"])
    if reference is None or RANK > 0:
        return {k: a[k] for m in metrics for k in METRICS[m]} | dict(n=a["n"], size=a["size"], label=label)
    out, rate = {}, sum(side["n"] for side in (a, b) if side["lacks"]) / (time.time() - began)
    for m, name in (("fid", "FID" if net else "Frechet distance"), ("sfid", "sFID")):
        if m in metrics:
            out[name] = frechet_distance(*(side[key] for side in (a, b) for key in METRICS[m]))
    if "is" in metrics:
        out["IS"] = a["is"]
    if "pr" in metrics:                                # in float64, which mps does not have
        where = device if torch.device(device).type == "cuda" else "cpu"
        out["precision"], out["recall"] = precision_recall(*(side["pool3"].to(where) for side in (a, b)))
    return out | dict(num=int(a["n"]), label=label, images_per_s=rate)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    p.error = lambda text: sys.exit(f"error: {text}")  # one line for these mistakes too, without the usage
    flag = p.add_argument
    flag("samples", nargs="?", default="out/samples.npz", help="folder or .npz")
    flag("reference", nargs="?", default="toy", help="folder, .npz of images or statistics, or toy")
    flag("--metrics", default="fid", help="of fid,sfid,is,pr: any, with commas")
    flag("--mode", choices=["adm", "pytorch-fid"], default="adm", help="resize before the network")
    flag("--features", help="inception, or encoder:NAME; default: inception, for toy encoder:toy")
    flag("--weights", help="file of the 2015 Inception weights")
    flag("--save", help="write the statistics of SAMPLES to this .npz and stop")
    flag("--crop", type=int, help="ADM's centre crop of every image to this side first")
    flag("--num", type=int, default=0, help="first images of each side, 0 for all")
    flag("--batch", type=int, default=64, help="images at once")
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    flag("--json", action="store_true", help="print one JSON object instead of the line")
    args = p.parse_args()
    if args.save:
        args.reference, args.metrics = None, "fid" if "encoder" in (args.features or "") else "fid,sfid"
    metrics = args.metrics.split(",")
    check(set(metrics) <= METRICS.keys(), f"--metrics {args.metrics}: wants some of {','.join(METRICS)}")
    if WORLD > 1:
        dist.init_process_group("gloo")
        args.device += f":{os.environ['LOCAL_RANK']}" if args.device == "cuda" else ""
    result = score(args.samples, args.reference, args.features, metrics, args.mode, args.weights, args.num,
                   args.batch, args.crop, args.device)
    if RANK > 0:
        return
    if args.save:
        np.savez(args.save, **result)
        return print(f"wrote {args.save}  (N={result['n']}, {result['size']} px, {result['label']})")
    if result["num"] < 2048 and "encoder" not in result["label"]:
        warn(f"{result['num']} samples; below 2048 the number is far too high, and papers use 50,000")
    if args.json:
        return print(json.dumps(result | dict(reference=args.reference)))
    num, label, rate = (result.pop(k) for k in ("num", "label", "images_per_s"))
    print("  ".join(f"{k} {v:.4f}" for k, v in result.items())
          + f"  (N={num}, {label}, float32, reference {args.reference})  {rate:.0f} images/s")

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {str(e).splitlines()[-1]}")
