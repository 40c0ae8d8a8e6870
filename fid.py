"""Score samples: FID, sFID, Inception score, precision and recall (appendix E of arXiv 2510.11690).

    python fid.py                        # out/samples.npz against the toy's validation images
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,pr
    python fid.py imagenet/val --crop 256 --save val256.npz       # save statistics for later
    torchrun --standalone --nproc_per_node=8 fid.py samples val256.npz

The first command needs no download. It applies FID's formula to the toy encoder's features.

Samples and reference can each be a folder of images, an .npz or "toy". An .npz holds images (uint8
arr_0 of shape (N, H, W, 3)), statistics (mu and sigma; mu_s and sigma_s for sFID) or both. ImageNet
papers report scores from ADM's TensorFlow suite (Dhariwal and Nichol 2021). This script
reimplements that suite but has not been checked against it. Features and FID match pytorch-fid
(--mode pytorch-fid) and torch-fidelity (--mode adm); IS, precision and recall match torch-fidelity.
"""

import argparse
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import rae
from rae import UsageError, positive_int
from toy.world import ToyShapes

METRICS = ("fid", "sfid", "is", "pr")

# ---------------------------------------------------------------------------------------------
# The Inception network
#
# FID is defined by the features of one network: TensorFlow's 2015 Inception, with its original
# weights. timm's inception_v3 has the same layers and names but pools differently. With other
# pooling or weights, scores can't be compared with published ones.

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


def average_pool(x):
    """Mean over each 3 x 3 neighborhood, not counting the padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """Maximum over each 3 x 3 neighborhood."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Inception(nn.Module):
    """Images (B, 3, 299, 299) in about [-1, 1] -> pool3 (B, 2048), spatial (B, 2023).

    pool3, for FID, is the spatial mean of the last block's output. spatial, for sFID (Nash et al.
    2021), is the first 7 channels of Mixed_6d at 17 x 17.
    """

    def __init__(self, state_dict):
        super().__init__()
        import timm

        self.net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
        self.net.load_state_dict(state_dict)
        # TensorFlow's average pools leave out the padding, and the last block's pool is a max.
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            self.replace_pool(f"Mixed_{name}", average_pool)
        self.replace_pool("Mixed_7c", max_pool)
        self.net.Mixed_6d.register_forward_hook(self.keep_spatial)
        self.requires_grad_(False)
        self.eval()

    def replace_pool(self, name, pool):
        """Feed pool(x) to the block's pooling branch.

        timm pools with a function inside the block, so there is no module to replace. One hook
        keeps the block's input x; another feeds pool(x) to the branch instead of timm's result.
        """
        block = self.net.get_submodule(name)
        kept = {}
        block.register_forward_pre_hook(lambda module, args: kept.update(x=args[0]))
        block.branch_pool.register_forward_pre_hook(lambda module, args: (pool(kept["x"]),))

    def keep_spatial(self, module, args, output):
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)

    def forward(self, x):
        x = self.net.forward_features(x)  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3)), self.spatial

    def logits(self, pool3):
        """pool3 (B, 2048) -> class scores (B, 1008), without the bias, as in ADM's suite."""
        return pool3 @ self.net.fc.weight.T


def resize_last(x, size):
    """Linear interpolation of the last dimension as in TensorFlow 1: (..., n) -> (..., size).

    Output i is the input at i n / size, not (i + 1/2) n / size - 1/2 as in PyTorch and TF 2.
    The difference is enough to change FID.
    """
    n = x.shape[-1]
    scale = torch.tensor(n / size)  # float32, as in TensorFlow
    position = torch.arange(size, dtype=torch.float32, device=x.device) * scale
    left = position.long()
    right = (left + 1).clamp(max=n - 1)
    return x[..., left] + (x[..., right] - x[..., left]) * (position - left)


def preprocess(images, mode):
    """Images (B, 3, H, W) with values 0 to 255 -> (B, 3, 299, 299) for Inception.

    Mode "adm" resizes as in TensorFlow and returns (x - 128) / 128. Mode "pytorch-fid" resizes as
    in torch and returns x / 127.5 - 1. Scores from different modes can't be compared.
    """
    if mode == "adm":
        x = resize_last(images.float(), 299)  # (B, 3, H, 299)
        x = resize_last(x.transpose(2, 3), 299).transpose(2, 3).contiguous()  # (B, 3, 299, 299)
        return (x - 128) / 128
    x = F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False)
    return 2 * x - 1


# ---------------------------------------------------------------------------------------------
# Features of images


def download_weights(url, file_name, flag):
    """Download weights, or reuse the cached copy. file_name contains the start of their SHA-256."""
    try:
        return torch.hub.load_state_dict_from_url(
            url, file_name=file_name, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise UsageError(f"cannot download {url} ({error}); pass {flag} FILE") from error


class InceptionFeatures:
    """A list of images (3, H, W) uint8 -> pool3 (B, 2048), spatial (B, 2023)."""

    dims = (2048, 2023)

    def __init__(self, weights, mode, device):
        if weights:
            state_dict = rae.load(weights)
        else:
            state_dict = download_weights(INCEPTION_URL, Path(INCEPTION_URL).name, "--weights")
        self.network = Inception(state_dict).to(device)
        self.mode = mode
        self.label = f"{mode}, inception {rae.hash_tensors(state_dict.values())}"

    def __call__(self, images):
        # One by one, since sizes may differ before the resize.
        x = [preprocess(image[None], self.mode) for image in images]
        return self.network(torch.cat(x))


class EncoderFeatures:
    """A list of images (3, size, size) uint8 -> the mean token (B, C) of one of our encoders."""

    def __init__(self, name, size, device):
        self.size = size
        self.encoder = rae.load_encoder(name, size).to(device)
        self.dims = (self.encoder.latent_dim,)
        # Hash the blocks only: the position embedding depends on the image size.
        digest = rae.hash_tensors(self.encoder.vit.blocks.state_dict().values())
        self.label = f"encoder {name} {digest}"

    def __call__(self, images):
        if any(image.shape != (3, self.size, self.size) for image in images):
            raise UsageError(f"encoder features need {self.size} px images; pass --crop SIZE")
        images = torch.stack(images).float() / 255  # (B, 3, size, size)
        return (self.encoder(images).mean(1),)


def read_npz(path):
    """The arrays of an .npz, as a dict."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises many types on damaged files
        raise UsageError(f"{path}: not a readable .npz ({error})") from error


def open_images(source, arrays):
    """The images of a source: paths, or an array (N, H, W, 3) uint8."""
    if source == "toy":
        images = ToyShapes("val").images.transpose(0, 2, 3, 1)
    elif source.endswith(".npz"):
        images = arrays.get("arr_0", np.zeros(0))
        if images.dtype != np.uint8 or images.shape[3:] != (3,):
            raise UsageError(f"{source} has no images to score (arr_0, uint8, (N, H, W, 3))")
    else:
        images = rae.list_images(source)
    if len(images) < 2:
        raise UsageError(f"{source}: scores need at least two images")
    return images


def read_image(image, crop):
    """A path or an array (H, W, 3) -> (3, H, W) uint8; crop: size of ADM's center crop."""
    if isinstance(image, str):
        image = rae.open_image(image)
    else:
        image = Image.fromarray(image)
    if crop:
        image = rae.center_crop(image, crop)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@torch.no_grad()
def extract_features(images, extractor, crop, batch_size, device):
    """Features of all images in order, on the CPU: a list of (n, D).

    Batches are dealt out to the ranks, and rank 0 collects the results. Batches, and so
    rounding, don't depend on the world size.
    """
    outputs = [torch.zeros(len(images), dim) for dim in extractor.dims]
    for batch in rae.progress(rae.rank_batches(len(images), batch_size), "features"):
        pixels = [read_image(images[i], crop).to(device) for i in batch]
        for output, x in zip(outputs, extractor(pixels)):
            output[batch.start : batch.stop] = x.cpu()

    # Each row was filled by one rank and is zero on the others, so a sum collects them.
    if dist.is_initialized():
        for i, output in enumerate(outputs):
            output = output.to(device)
            dist.reduce(output, dst=0)
            outputs[i] = output.cpu()
    return outputs


def load_statistics(source, metrics, extractor, args, device):
    """Load the statistics saved in an .npz, and compute missing ones from the images.

    Returns a dict: "fid" and "sfid" are (mu, sigma), "is" is the Inception score, "pr" the pool3
    features. "label" names the features, "n" counts the images, and "size" is the first image's.
    With several processes, only rank 0 returns metrics computed from images.
    """
    arrays = read_npz(source) if source.endswith(".npz") else {}
    saved = {}
    if "mu" in arrays and not args.save:
        saved = saved_statistics(source, arrays, extractor)
    missing = [metric for metric in metrics if metric not in saved]
    if not missing:
        return saved
    images = open_images(source, arrays)
    return compute_statistics(images, missing, extractor, args, device) | saved


def saved_statistics(source, arrays, extractor):
    """Return what a statistics file contributes to load_statistics."""
    statistics = {"fid": (arrays["mu"], arrays["sigma"])}
    if "mu_s" in arrays:
        statistics["sfid"] = (arrays["mu_s"], arrays["sigma_s"])
    for name in ("label", "n", "size"):
        if name in arrays:
            statistics[name] = arrays[name].item()
    if "label" not in statistics:  # files of ADM and pytorch-fid, which use Inception
        is_inception = isinstance(extractor, InceptionFeatures)
        statistics["label"] = extractor.label if is_inception else "inception"
        rae.print0(f"warning: {source} does not name its features; assuming {statistics['label']}")
    return statistics


def compute_statistics(images, metrics, extractor, args, device):
    """Compute the dict that load_statistics returns, from images."""
    height, width = read_image(images[0], args.crop).shape[1:]
    outputs = extract_features(images, extractor, args.crop, args.batch_size, device)
    statistics = {"label": extractor.label, "n": len(images), "size": f"{width}x{height}"}
    if rae.get_rank() > 0:
        return statistics
    if "fid" in metrics:
        statistics["fid"] = mean_and_covariance(outputs[0])
    if "sfid" in metrics:
        statistics["sfid"] = mean_and_covariance(outputs[1])
    if "is" in metrics:
        logits = extractor.network.logits(outputs[0].to(device))  # (n, 1008)
        statistics["is"] = inception_score(logits.cpu())
    if "pr" in metrics:
        statistics["pr"] = outputs[0]
    return statistics


# ---------------------------------------------------------------------------------------------
# Scores


def mean_and_covariance(features):
    """Mean (D,) and unbiased covariance (D, D) of features (n, D), in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance between Gaussians with means (D,) and covariances (D, D).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 sqrt(sigma1 sigma2)): FID for pool3 features (Heusel et
    al. 2017), sFID for spatial ones.
    """
    # The trace of a matrix square root is the sum of the square roots of the eigenvalues, which are
    # real and at least 0 for sigma1 sigma2. Rounding can make some slightly negative or complex, so
    # keep the real part. (scipy's sqrtm is inexact with fewer images than features.)
    eigenvalues = scipy.linalg.eigvals(sigma1 @ sigma2)
    trace_of_root = np.sqrt(eigenvalues).real.sum()
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    difference = mu1 - mu2  # (D,)
    return float(difference @ difference + trace)


def inception_score(logits):
    """Inception score (Salimans et al. 2016) from class scores (n, 1008).

    exp(H(p(y)) - mean H(p(y | x))), averaged over chunks of 5,000 images in file order, as in ADM's
    suite. Don't sort samples by class: chunks with few classes score too low.
    """
    scores = []
    for chunk in logits.split(5000):
        p = chunk.double().softmax(dim=1)  # p(y | x), (b, 1008)
        entropy_of_mean = torch.special.entr(p.mean(dim=0)).sum()  # H(p(y))
        mean_of_entropy = torch.special.entr(p).sum(dim=1).mean()  # mean H(p(y | x))
        scores.append((entropy_of_mean - mean_of_entropy).exp())
    return torch.stack(scores).mean().item()


def knn_radii(features, k=3):
    """Distance (n,) from each row of features (n, D) to its k-th nearest neighbor."""
    radii = []
    for rows in features.split(500):
        distances = torch.cdist(rows, features)  # (b, n)
        # k + 1, because each image is its own nearest neighbor.
        nearest = distances.topk(min(k + 1, len(features)), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def precision_recall(samples, references):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (n, D) and (m, D).

    Around each image, draw the ball that reaches its third nearest neighbor in the same set.
    Precision is the share of samples inside any reference's ball, recall the share of references
    inside any sample's ball.
    """
    samples = samples.double()  # in float32, cdist's |a|^2 + |b|^2 - 2 a b is inexact
    references = references.double()
    return share_inside(samples, references), share_inside(references, samples)


def share_inside(points, centers):
    """The share of points (n, D) that lie inside the ball of any center (m, D)."""
    radii = knn_radii(centers)  # (m,)
    inside = []
    for rows in points.split(500):
        inside.append((torch.cdist(rows, centers) <= radii).any(dim=1))  # (b,)
    return torch.cat(inside).double().mean().item()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB (B,) of images (B, 3, H, W) in [0, 1], for stage 1."""
    mse = (a.float() - b.float()).square().mean(dim=(1, 2, 3))  # (B,)
    return -10 * mse.clamp(min=1e-10).log10()  # 100 dB for equal images


def get_args():
    devices = rae.available_devices()
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("samples", nargs="?", default="out/samples.npz", help="folder or .npz")
    p.add_argument("reference", nargs="?", default="toy", help="folder, .npz or toy")
    p.add_argument("--crop", type=positive_int, help="center-crop to this size, as in ADM")
    p.add_argument("--save", help="write the statistics of SAMPLES to this .npz and stop")
    p.add_argument("--metrics", default="fid", help="comma-separated list of fid, sfid, is, pr")
    p.add_argument("--features", help="inception or encoder:NAME (toy distance: encoder:toy)")
    p.add_argument("--weights", help="local copy of the 2015 Inception weights")
    p.add_argument("--mode", choices=["adm", "pytorch-fid"], default="adm", help="preprocessing")
    p.add_argument("--batch-size", type=positive_int, default=64)
    p.add_argument("--device", choices=devices, default=devices[0])
    p.set_defaults(precision="fp32")  # without TF32, so features vary less between GPUs
    return p.parse_args()


def main():
    args = get_args()
    rank, _, device, _ = rae.setup_distributed(args)

    metrics = args.metrics.split(",")
    if not set(metrics) <= set(METRICS):
        raise UsageError(f"--metrics {args.metrics}: choose from {','.join(METRICS)}")
    # Default to Inception, except for the distance to the toy: its encoder needs no download.
    toy_distance = args.reference == "toy" and metrics == ["fid"] and not args.save
    features_name = args.features or ("encoder:toy" if toy_distance else "inception")
    if args.save:
        metrics = ["fid", "sfid"] if features_name == "inception" else ["fid"]
        rae.make_folder(Path(args.save).parent)
    if features_name == "inception":
        extractor = InceptionFeatures(args.weights, args.mode, device)
    elif features_name.startswith("encoder:") and metrics == ["fid"]:
        extractor = EncoderFeatures(features_name.removeprefix("encoder:"), args.crop or 32, device)
    else:
        raise UsageError("--features must be inception, or encoder:NAME with --metrics fid")

    samples = load_statistics(args.samples, metrics, extractor, args, device)
    if args.save:
        if rank == 0:
            samples["mu"], samples["sigma"] = samples.pop("fid")
            if "sfid" in samples:
                samples["mu_s"], samples["sigma_s"] = samples.pop("sfid")
            path = args.save.removesuffix(".npz") + ".npz"
            np.savez(path, **samples)
            print(f"wrote {path}: {samples['n']} images, {samples['size']}, {extractor.label}")
        return
    compared = [metric for metric in metrics if metric != "is"]  # IS needs no reference
    reference = {}
    if compared:
        reference = load_statistics(args.reference, compared, extractor, args, device)
    if rank > 0:
        return
    for name in ("label", "size"):
        ours = samples.get(name)
        theirs = reference.get(name)
        if ours and theirs and ours != theirs:
            raise UsageError(
                f"{args.samples} is {ours}, but {args.reference} is {theirs}; "
                "save new statistics, or pass --crop if only sizes differ"
            )

    scores = {}
    if "fid" in metrics:
        name = "Frechet distance" if samples["label"].startswith("encoder") else "FID"
        scores[name] = frechet_distance(*samples["fid"], *reference["fid"])
    if "sfid" in metrics:
        scores["sFID"] = frechet_distance(*samples["sfid"], *reference["sfid"])
    if "is" in metrics:
        scores["IS"] = samples["is"]
    if "pr" in metrics:
        scores["precision"], scores["recall"] = precision_recall(samples["pr"], reference["pr"])
    n = samples.get("n", "unknown number of")
    if "FID" in scores and samples.get("n", 2048) < 2048:  # fewer samples than features
        rae.print0(
            f"warning: FID from only {n} samples is strongly biased upward; papers use 50,000"
        )
    numbers = "  ".join(f"{name} {score:.4f}" for name, score in scores.items())
    against = f", reference {args.reference}" if compared else ""
    rae.print0(f"{numbers}  ({n} samples{against}, {samples['label']})")


if __name__ == "__main__":
    rae.run_script(main)
