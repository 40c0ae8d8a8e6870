"""The score: FID, sFID, Inception score, precision and recall (appendix E of the RAE paper).

    python fid.py                       # out/samples.npz against the toy's validation images
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,pr
    python fid.py imagenet/val --crop 256 --save val256.npz         # statistics, for later
    torchrun --standalone --nproc_per_node=8 fid.py samples.npz val256.npz

(The first needs no download and prints no FID, but a distance in the features of the toy's own
encoder.) It takes the place of the suite of ADM (Dhariwal and Nichol 2021), a TensorFlow program
whose numbers papers on ImageNet report, and gives the same ones.

Two sides are compared, samples and reference. Each is a folder of images or an .npz file, which
holds images (arr_0, uint8, (N, H, W, 3)), statistics (mu, sigma; for sFID also mu_s, sigma_s), or
both, as ADM's reference files do. The weights of the Inception network are to be downloaded by
hand: without them, the error says from where.

From top to bottom: the network (which may be skipped), its input, the images, the scores, the two
sides, and the script. The features of all images are kept in memory, since they are small: 50,000 x
2,048 of them are 0.4 GB in each process. So each score is a plain function of arrays.
"""

import argparse
import hashlib
import json
import os
import struct
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

# The weights of the 2015 Inception, converted from TensorFlow: one file under two addresses.
WEIGHTS = "inception-2015-12-05-6726825d.pth"
URLS = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_{WEIGHTS}",
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-{WEIGHTS}",
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# What each metric needs of a set of images. For fid and sfid, a file of statistics holds it.
METRICS = {
    "fid": ["mu", "sigma"],
    "sfid": ["mu_s", "sigma_s"],
    "is": ["is"],
    "pr": ["pool3"],
}

# Set by torchrun. Without it, this is process 0 of 1.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def warn(text):
    if RANK == 0:
        print(f"warning: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# The network
#
# FID is defined by a TensorFlow graph of 2015 and its weights. The layers and their names are those
# of torchvision's inception_v3 (Mixed_5b, branch3x3dbl_1), which the published weights use, but for
# two differences in the pools:
#     average pools divide by the number of pixels that the window covers, fewer than nine at the
#     border;
#     in the last block, a max pool stands in place of the average pool.
# torchvision's own network and weights would give other numbers than everybody's.


def average_pool(x):
    """The mean of each 3 x 3 neighbourhood, which at the border is smaller: padding is left out."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """The largest of each 3 x 3 neighbourhood."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    """A max pool of 3 x 3 with stride 2 and no padding: (B, C, H, W) to about half of H and W."""
    return F.max_pool2d(x, 3, stride=2)


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU: (B, in_channels, ...) -> (B, out_channels, ...).

    kernel_size and padding are one number, or two: for the rows and for the columns.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class InceptionA(nn.Module):
    """Mixed_5b to 5d, at 35 x 35: C channels -> 224 + pool_channels."""

    def __init__(self, channels, pool_channels):
        super().__init__()
        self.branch1x1 = ConvBNReLU(channels, 64, 1)
        self.branch5x5_1 = ConvBNReLU(channels, 48, 1)
        self.branch5x5_2 = ConvBNReLU(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBNReLU(channels, 64, 1)
        self.branch3x3dbl_2 = ConvBNReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBNReLU(96, 96, 3, padding=1)
        self.branch_pool = ConvBNReLU(channels, pool_channels, 1)

    def forward(self, x):
        one = self.branch1x1(x)  # (B, 64, 35, 35)
        five = self.branch5x5_2(self.branch5x5_1(x))  # (B, 64, 35, 35)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))  # (B, 96, 35, 35)
        double = self.branch3x3dbl_3(double)  # (B, 96, 35, 35)
        pool = self.branch_pool(average_pool(x))  # (B, pool_channels, 35, 35)
        return torch.cat([one, five, double, pool], dim=1)


class InceptionB(nn.Module):
    """Mixed_6a, from 35 x 35 to 17 x 17: 288 channels -> 768."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3 = ConvBNReLU(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBNReLU(channels, 64, 1)
        self.branch3x3dbl_2 = ConvBNReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBNReLU(96, 96, 3, stride=2)

    def forward(self, x):
        three = self.branch3x3(x)  # (B, 384, 17, 17)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))  # (B, 96, 35, 35)
        double = self.branch3x3dbl_3(double)  # (B, 96, 17, 17)
        pool = halve(x)  # (B, 288, 17, 17)
        return torch.cat([three, double, pool], dim=1)


class InceptionC(nn.Module):
    """Mixed_6b to 6e, at 17 x 17: 768 channels -> 768, by way of `width`.

    A 7 x 7 convolution is made of one along the rows, (1, 7), and one along the columns, (7, 1).
    """

    def __init__(self, channels, width):
        super().__init__()
        self.branch1x1 = ConvBNReLU(channels, 192, 1)
        self.branch7x7_1 = ConvBNReLU(channels, width, 1)
        self.branch7x7_2 = ConvBNReLU(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvBNReLU(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvBNReLU(channels, width, 1)
        self.branch7x7dbl_2 = ConvBNReLU(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvBNReLU(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvBNReLU(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvBNReLU(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = ConvBNReLU(channels, 192, 1)

    def forward(self, x):
        one = self.branch1x1(x)  # (B, 192, 17, 17)
        seven = self.branch7x7_2(self.branch7x7_1(x))  # (B, width, 17, 17)
        seven = self.branch7x7_3(seven)  # (B, 192, 17, 17)
        double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))  # (B, width, 17, 17)
        double = self.branch7x7dbl_4(self.branch7x7dbl_3(double))  # (B, width, 17, 17)
        double = self.branch7x7dbl_5(double)  # (B, 192, 17, 17)
        pool = self.branch_pool(average_pool(x))  # (B, 192, 17, 17)
        return torch.cat([one, seven, double, pool], dim=1)


class InceptionD(nn.Module):
    """Mixed_7a, from 17 x 17 to 8 x 8: 768 channels -> 1280."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3_1 = ConvBNReLU(channels, 192, 1)
        self.branch3x3_2 = ConvBNReLU(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBNReLU(channels, 192, 1)
        self.branch7x7x3_2 = ConvBNReLU(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvBNReLU(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvBNReLU(192, 192, 3, stride=2)

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))  # (B, 320, 8, 8)
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))  # (B, 192, 17, 17)
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))  # (B, 192, 8, 8)
        pool = halve(x)  # (B, 768, 8, 8)
        return torch.cat([three, seven, pool], dim=1)


class InceptionE(nn.Module):
    """Mixed_7b and 7c, at 8 x 8: C channels -> 2048. The two differ in their pool."""

    def __init__(self, channels, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvBNReLU(channels, 320, 1)
        self.branch3x3_1 = ConvBNReLU(channels, 384, 1)
        self.branch3x3_2a = ConvBNReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvBNReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvBNReLU(channels, 448, 1)
        self.branch3x3dbl_2 = ConvBNReLU(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvBNReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvBNReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvBNReLU(channels, 192, 1)

    def forward(self, x):
        one = self.branch1x1(x)  # (B, 320, 8, 8)
        three = self.branch3x3_1(x)  # (B, 384, 8, 8)
        three_a = self.branch3x3_2a(three)  # (B, 384, 8, 8)
        three_b = self.branch3x3_2b(three)  # (B, 384, 8, 8)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))  # (B, 384, 8, 8)
        double_a = self.branch3x3dbl_3a(double)  # (B, 384, 8, 8)
        double_b = self.branch3x3dbl_3b(double)  # (B, 384, 8, 8)
        pool = self.branch_pool(self.pool(x))  # (B, 192, 8, 8)
        return torch.cat([one, three_a, three_b, double_a, double_b, pool], dim=1)


class InceptionV3(nn.Module):
    """The Inception of FID: images (B, 3, 299, 299) in about [-1, 1] -> features of two kinds.

    pool3 (B, 2048) is the last layer's mean over the image, for FID. spatial (B, 2023) says where
    things are, for sFID: of Nash et al. (2021), who took the first 7 channels of the layer Mixed_6d
    at 17 x 17, since 7 * 17 * 17 numbers are about as many as pool3's.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBNReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBNReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBNReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBNReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBNReLU(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool_channels=32)
        self.Mixed_5c = InceptionA(256, pool_channels=64)
        self.Mixed_5d = InceptionA(288, pool_channels=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, width=128)
        self.Mixed_6c = InceptionC(768, width=160)
        self.Mixed_6d = InceptionC(768, width=160)
        self.Mixed_6e = InceptionC(768, width=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average_pool)
        self.Mixed_7c = InceptionE(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = self.Conv2d_1a_3x3(x)  # (B, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)  # (B, 32, 147, 147)
        x = self.Conv2d_2b_3x3(x)  # (B, 64, 147, 147)
        x = halve(x)  # (B, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x)  # (B, 80, 73, 73)
        x = self.Conv2d_4a_3x3(x)  # (B, 192, 71, 71)
        x = halve(x)  # (B, 192, 35, 35)
        x = self.Mixed_5b(x)  # (B, 256, 35, 35)
        x = self.Mixed_5c(x)  # (B, 288, 35, 35)
        x = self.Mixed_5d(x)  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)  # (B, 768, 17, 17)
        x = self.Mixed_6b(x)  # (B, 768, 17, 17)
        x = self.Mixed_6c(x)  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)  # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7), TensorFlow's order
        x = self.Mixed_6e(x)  # (B, 768, 17, 17)
        x = self.Mixed_7a(x)  # (B, 1280, 8, 8)
        x = self.Mixed_7b(x)  # (B, 2048, 8, 8)
        x = self.Mixed_7c(x)  # (B, 2048, 8, 8)
        pool3 = x.mean(dim=(2, 3))  # (B, 2048)
        return pool3, spatial

    def logits(self, pool3):
        """Class scores (B, 1008) for the Inception score, without the bias, as in ADM's suite.

        (Of the graph's 1,008 outputs 1,000 are ImageNet's classes.)
        """
        return pool3 @ self.fc.weight.T


# ---------------------------------------------------------------------------------------------
# From images to features


def resize_last(x, size):
    """Interpolate the last dimension linearly, as TensorFlow 1 does: (..., n) -> (..., size).

    Number i of the output is read at i n / size of the input. Newer code reads it at
    (i + 1/2) n / size - 1/2, which does not shift the picture; that alone changes FID.
    """
    n = x.shape[-1]
    scale = torch.tensor(n / size)  # in float32, as TensorFlow has it
    position = torch.arange(size, dtype=torch.float32, device=x.device) * scale
    left = position.long()
    right = (left + 1).clamp(max=n - 1)
    return x[..., left] + (x[..., right] - x[..., left]) * (position - left)


def resize_adm(x, size=299):
    """TensorFlow 1's bilinear resize, without antialiasing: (B, 3, H, W) -> (B, 3, size, size)."""
    x = resize_last(x, size)  # (B, 3, H, size)
    x = resize_last(x.transpose(2, 3), size)  # (B, 3, size, size), transposed
    return x.transpose(2, 3).contiguous()


def prepare(images, mode):
    """Images with pixels of 0 to 255 as the network wants them, (B, 3, 299, 299).

    images is (B, 3, H, W), or a list of (3, H, W) that differ in size. Mode "adm" is that of ADM's
    suite: TensorFlow's resize, then (x - 128) / 128. Mode "pytorch-fid" is that of the package:
    torch's resize, then x / 127.5 - 1. Numbers of the two are not to be compared.
    """
    if isinstance(images, list):  # only after the resize can they be one batch
        return torch.cat([prepare(image[None], mode) for image in images])
    if mode == "adm":
        return (resize_adm(images.float()) - 128) / 128
    x = F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False)
    return 2 * x - 1


@contextmanager
def float32_only(device):
    """Compute without gradients in float32, not under a caller's autocast.

    Convolutions, of which Inception consists, do without the TF32 that cuDNN prefers on GPUs.
    """
    no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    no_autocast = torch.autocast(torch.device(device).type, enabled=False)
    with torch.no_grad(), no_tf32, no_autocast:
        yield


def load_inception(path, device, mode="adm"):
    """(network, extract, label) of the published weights file.

    extract(images) is a function that returns pool3 (B, 2048) and spatial (B, 2023) of images as
    `prepare` takes them. The network itself is needed for its logits. The label, such as "adm,
    inception 6726825d", says what features these are: only those of equal labels may be compared.
    Without a path the file is looked for where the package pytorch-fid puts it.
    """
    path = Path(path or f"{torch.hub.get_dir()}/checkpoints/pt_{WEIGHTS}")
    if not path.is_file():
        raise ValueError(
            f"FID needs the Inception weights: download {' or '.join(URLS)} (sha256 {SHA256}), "
            "pass the file (--weights, in training --inception) or --features encoder:NAME"
        )
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha != SHA256:
        warn(f"{path} is not the published file (sha256 {sha[:8]}, not {SHA256[:8]})")
    network = InceptionV3().to(device).eval().requires_grad_(False)
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises several kinds for a broken or another file
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not the Inception weights ({reason})") from None

    def extract(images):
        with float32_only(device):
            return network(prepare(images, mode))

    return network, extract, f"{mode}, inception {sha[:8]}"


def load_encoder(name, image_size, device):
    """(extract, label), as load_inception returns them, of an encoder that rae.py can build.

    The features are the mean of the tokens (B, C); there are no spatial ones. The toy encoder needs
    no download, but a distance in its features is a number of its own, not FID.
    """
    from rae import build_encoder

    encoder = build_encoder(name, image_size).to(device)

    def extract(images):
        if isinstance(images, list):
            raise ValueError(f"encoder:{name} wants images of one size; pass --crop")
        with float32_only(device):
            tokens = encoder(images.float() / 255)  # (B, N, C)
        return tokens.mean(dim=1), None

    return extract, f"encoder {name} {encoder.fingerprint()[:8]}"


# ---------------------------------------------------------------------------------------------
# The images


class Images:
    """The first `num` images (None for all) of a folder, an .npz, or the toy's validation images.

    A folder is read with its subfolders, in the order of names. crop is the side of ADM's
    centre crop, or None for the images as they are. `size` is "256" where they are square, else
    such as "40x32", or "mixed". It is that of the first 64 images: to read all would take long.
    """

    def __init__(self, source, crop=None, num=None):
        self.source = str(source)
        self.crop = crop
        path = Path(source)
        if self.source == "toy":
            from toy.world import ToyShapes

            items = ToyShapes("val").images.transpose(0, 2, 3, 1)
        elif path.is_dir():
            from rae import list_images

            items = [path / name for name in list_images(self.source, skipped=[])]
        else:
            items = map_images(path)
        self.items = items[:num]
        if len(self) < 2:
            raise ValueError(f"{source}: {len(self)} images; a distance needs two at least")

        sizes = {self.load(i).shape[1:] for i in range(min(len(self), 64))}
        height, width = min(sizes)
        if len(sizes) > 1:
            self.size = "mixed"
        elif height == width:
            self.size = str(width)
        else:
            self.size = f"{width}x{height}"

    def __len__(self):
        return len(self.items)

    def load(self, i):
        """Image number i, (3, H, W) uint8."""
        image = self.items[i]
        if isinstance(image, Path):
            from rae import open_image

            image = open_image(image)
        if self.crop:
            from rae import center_crop

            image = center_crop(Image.fromarray(np.asarray(image)), self.crop)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def batch(self, first, last, device):
        """Images number first to last - 1: (b, 3, H, W), or a list if they differ in size."""
        images = [self.load(i).to(device) for i in range(first, last)]
        shapes = {image.shape for image in images}
        if len(shapes) == 1:
            return torch.stack(images)
        return images

    def has_jpeg(self):
        suffixes = {f.suffix.lower() for f in self.items if isinstance(f, Path)}
        return ".jpg" in suffixes or ".jpeg" in suffixes


def map_images(path):
    """The images arr_0 (N, H, W, 3) uint8 of an .npz, mapped into memory where that is possible.

    An .npz is a zip file of arrays. np.savez stores them as they are, so that an array can be
    mapped: each process then reads only its share of the images. Others, such as those of
    np.savez_compressed, are read whole.
    """
    read_npz(path, [])  # raises if this is no .npz
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo("arr_0.npy")
            with archive.open(entry) as f:
                np.lib.format.read_magic(f)
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(f)
                header_size = f.tell()
    except (KeyError, ValueError):  # no such array, or not one of numbers
        dtype = None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{path}: wants images, an arr_0 of uint8 (N, H, W, 3)")
    if fortran_order or entry.compress_type != zipfile.ZIP_STORED:
        return read_npz(path, ["arr_0"])["arr_0"]
    # Before the array stands the zip's header of this entry: 30 bytes, of which the last four say
    # how long the two fields behind them are.
    with open(path, "rb") as f:
        f.seek(entry.header_offset + 26)
        length, extra_length = struct.unpack("<HH", f.read(4))
    offset = entry.header_offset + 30 + length + extra_length + header_size
    return np.memmap(path, np.uint8, "r", offset, shape)


def read_npz(path, names):
    """A dict of those of the named arrays that an .npz has. Other arrays stay unread."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; run sample.py first, or name both sides")
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in names:
                if name in file.files:
                    arrays[name] = file[name]
    except Exception as error:  # numpy raises half a dozen kinds for other files
        raise ValueError(f"{path}: not an .npz of arrays ({type(error).__name__})") from None
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} is not finite throughout")
    return arrays


# ---------------------------------------------------------------------------------------------
# The scores


def mean_and_covariance(features):
    """Mean (D,) and unbiased covariance (D, D), in float64, of features (n, D) on the CPU."""
    features = np.asarray(features)
    n, width = features.shape
    mean = features.mean(axis=0, dtype=np.float64)  # (D,)
    covariance = np.zeros((width, width))
    for start in range(0, n, 1000):  # some at a time: float64 of them all would be 0.8 GB
        centred = features[start : start + 1000] - mean  # (b, D)
        covariance += centred.T @ centred
    return mean, covariance / (n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of two Gaussians with means (D,) and covariances (D, D).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 sqrt(sigma1 sigma2)), a float, of numpy's float64 arrays:
    FID, if they are of pool3 features (Heusel et al. 2017), and sFID, if of spatial ones (Nash et
    al. 2021). With fewer images than features the covariances are singular.
    """
    # Of the matrix square root only the trace is wanted, which is the sum of the square roots of
    # the eigenvalues. The product of two covariances is not symmetric, but has the eigenvalues of
    # sqrt(sigma1) sigma2 sqrt(sigma1), which is: they are real and not negative. eigvals returns
    # them as complex numbers. One that rounding made a little negative then has an imaginary root,
    # whose real part, 0, is counted.
    #
    # Other ways are worse. scipy's sqrtm computes the whole matrix, which is slow, and gives a
    # complex one where the product is singular, that is, with fewer images than features. eigh of
    # the symmetric form above is off by 1e-4 in that case.
    eigenvalues = scipy.linalg.eigvals(sigma1 @ sigma2)
    trace_of_root = np.sqrt(eigenvalues).real.sum()
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1 + sigma2) - 2 * trace_of_root)


def inception_score(logits):
    """The Inception score (Salimans et al. 2016) from the class scores (n, 1008) of all images.

    exp(H(p(y)) - mean H(p(y | x))): high if each image is clearly of one class, and all classes
    occur. As in ADM's suite it is averaged over chunks of 5,000 images in the order of the file. So
    samples must not be sorted by class: each chunk would hold few classes, and the score be low.
    """
    scores = []
    for chunk in torch.as_tensor(logits).split(5000):
        p = chunk.double().softmax(dim=1)  # p(y | x), (5000, 1008)
        entropy_of_mean = torch.special.entr(p.mean(dim=0)).sum()
        mean_of_entropy = torch.special.entr(p).sum(dim=1).mean()
        scores.append((entropy_of_mean - mean_of_entropy).exp())
    return torch.stack(scores).mean().item()


# Distances are computed for so many images at a time: those of 500 to 50,000 others are 200 MB.
BLOCK = 500


def distances(rows, features):
    """The distances of rows (b, D) to all features (n, D), as (b, n).

    In float64, since cdist computes |a|^2 + |b|^2 - 2 a b, where most digits cancel if features lie
    far from 0 and close together. Blocks of features, so that not all are float64 at once.
    """
    rows = rows.double()
    blocks = [torch.cdist(rows, block.double()) for block in features.split(BLOCK)]
    return torch.cat(blocks, dim=1)


def neighbour_radii(features):
    """The distance (n,) of each of the features (n, D) to the third nearest of the others."""
    k = 3
    count = min(k + 1, len(features))  # the nearest of all is the image itself
    radii = []
    for rows in features.split(BLOCK):
        nearest = distances(rows, features).topk(count, largest=False).values  # (b, 4), sorted
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def precision_recall(samples, references, device="cpu"):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of pool3 features (n, D), (m, D).

    Around each image is a ball that reaches to its third neighbour in its own set. Precision is the
    share of samples inside any reference's ball, recall that of references inside any sample's.
    """
    samples = torch.as_tensor(samples, device=device)
    references = torch.as_tensor(references, device=device)
    sample_radii = neighbour_radii(samples)  # (n,)
    reference_radii = neighbour_radii(references)  # (m,)
    # A sample is judged as soon as it has been compared with all references, a reference only after
    # all samples.
    precise = []
    recalled = torch.zeros(len(references), dtype=torch.bool, device=device)
    for rows, radii in zip(samples.split(BLOCK), sample_radii.split(BLOCK)):
        d = distances(rows, references)  # (b, m)
        precise.append((d <= reference_radii).any(dim=1))  # (b,)
        recalled |= (d <= radii[:, None]).any(dim=0)  # (m,)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


# ---------------------------------------------------------------------------------------------
# The two sides of a comparison


def extract_features(images, extract, batch_size, device, with_spatial=False):
    """The features of all images, in their order: pool3 (n, D), and spatial (n, 2023) or None.

    The processes take batches in turn; in the end process 0 has the features of all. Rounding
    depends on which images share a batch. The batches are the same for any number of processes, and
    so are the features, to the bit.
    """
    # One image tells the number of features, also to a process that gets no batch.
    pool3, spatial = extract(images.batch(0, 1, device))
    all_pool3 = torch.zeros(len(images), pool3.shape[1])
    all_spatial = None
    if with_spatial:
        all_spatial = torch.zeros(len(images), spatial.shape[1])

    starts = range(RANK * batch_size, len(images), WORLD_SIZE * batch_size)
    for first in tqdm(starts, desc=images.source, unit="batch", disable=RANK > 0 or None):
        last = min(first + batch_size, len(images))
        pool3, spatial = extract(images.batch(first, last, device))
        if not pool3.isfinite().all():
            raise ValueError(
                f"{images.source}: features are not finite; are the network's weights?"
            )
        all_pool3[first:last] = pool3.cpu()
        if with_spatial:
            all_spatial[first:last] = spatial.cpu()

    # Each row is filled in one process and zero in the others: the sum is all rows, each once.
    if WORLD_SIZE > 1:
        dist.reduce(all_pool3, dst=0)
        if with_spatial:
            dist.reduce(all_spatial, dst=0)
    return all_pool3, all_spatial


def compute_statistics(images, metrics, network, extract, batch_size, device):
    """What these metrics need of the images, a dict with the names in METRICS.

    network and extract are those of load_inception. Processes other than 0 return an empty dict.
    """
    result = {}
    with_spatial = "sfid" in metrics
    pool3, spatial = extract_features(images, extract, batch_size, device, with_spatial)
    if RANK > 0:
        return result
    if "fid" in metrics:
        result["mu"], result["sigma"] = mean_and_covariance(pool3)
    if "sfid" in metrics:
        result["mu_s"], result["sigma_s"] = mean_and_covariance(spatial)
        del spatial  # 0.4 GB of 50,000 images
    if "is" in metrics:
        logits = network.logits(pool3.to(device))  # (n, 1008)
        result["is"] = inception_score(logits.cpu())
    if "pr" in metrics:
        result["pool3"] = pool3
    return result


class Side:
    """One side of a comparison, samples or reference: what its file knows, and images for the rest.

        statistics  a dict with names of METRICS: first what the file holds, later all that is asked
        label       what features the file's statistics are of; "" if the file does not say
        missing     those of the metrics for which images have to be looked at
        images      an Images for them, or None if nothing is missing
        n           the number of images behind the numbers; 0 if the file does not say
        size        their size, such as "256"; "?" if the file does not say

    With from_images the statistics of a file are left aside.
    """

    def __init__(self, source, metrics, crop, num, from_images=False):
        self.source = source
        self.statistics = {}
        self.label = ""
        self.n = 0
        self.size = "?"
        if source.endswith(".npz") and not from_images:
            arrays = read_npz(Path(source), METRICS["fid"] + METRICS["sfid"])
            self.statistics = {name: array.astype(np.float64) for name, array in arrays.items()}
            about = read_npz(Path(source), ["label", "n", "size"])
            self.label = str(about.get("label", ""))
            self.n = int(about.get("n", 0))
            self.size = str(about.get("size", "?"))

        self.missing = []
        for metric in metrics:
            if not all(name in self.statistics for name in METRICS[metric]):
                self.missing.append(metric)
        self.images = None
        if self.missing:
            self.images = Images(source, crop, num)
            self.n = len(self.images)
            self.size = self.images.size

    def check_label(self, label):
        """ValueError if the file's statistics are of other features than those with this label.

        Files of ADM or of the package pytorch-fid do not say. They are taken for Inception's, in
        the mode of this call.
        """
        if not self.statistics:
            return
        theirs = self.label
        if not self.label and "inception" in label:
            warn(f"{self.source} does not say of what features its numbers are; taken for {label}")
            theirs = label
        if theirs != label:
            theirs = theirs or "Inception, as it does not say"
            raise ValueError(
                f"{self.source}: statistics of ({theirs}), not of ({label}); make new ones"
            )


# ---------------------------------------------------------------------------------------------
# The script


def count(text):
    """The type of a flag that is a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: wants a whole number above 0")
    return int(text)


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.error = lambda message: sys.exit(f"error: {message}")  # one line, without the usage
    # what is compared
    p.add_argument("samples", nargs="?", default="out/samples.npz", help="folder or .npz")
    p.add_argument("reference", nargs="?", default="toy", help="folder, .npz or toy")
    p.add_argument("--num", type=count, help="how many of each side's images, from the first on")
    p.add_argument("--crop", type=count, help="ADM's centre crop of every image to this side first")
    p.add_argument("--save", help="write the statistics of SAMPLES to this .npz and stop")
    # how
    p.add_argument("--metrics", default="fid", help="of fid,sfid,is,pr: any, with commas")
    p.add_argument("--features", help="inception or encoder:NAME; unset: encoder:toy for the toy")
    p.add_argument("--weights", help="file of the 2015 Inception weights")
    p.add_argument("--mode", choices=["adm", "pytorch-fid"], default="adm", help="whose resize")
    # the machine and the output
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    p.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    p.add_argument("--batch-size", type=count, default=64, help="images at once, in each process")
    p.add_argument("--json", action="store_true", help="print a JSON object instead of the line")
    args = p.parse_args()
    for name, value in vars(args).items():
        if value == "":  # of an unset variable; as a path it would be the current folder
            raise ValueError(f"{name}: an empty text")
    return args


def main():
    args = get_args()

    # What is computed, and in which features: Inception's, but for the toy, whose own encoder needs
    # no download. With --save it is all that a file of statistics can hold.
    metrics = args.metrics.split(",")
    features = args.features
    for_the_toy = args.reference == "toy" and metrics == ["fid"] and not args.save
    if features is None and for_the_toy and not args.weights:
        features = "encoder:toy"
    elif features is None:
        features = "inception"
    if args.save:
        metrics = ["fid", "sfid"] if features == "inception" else ["fid"]
    if not METRICS.keys() >= set(metrics):
        raise ValueError(f"--metrics {args.metrics}: wants some of {','.join(METRICS)}")
    if features != "inception" and not features.startswith("encoder:"):
        raise ValueError(f"--features {features}: wants inception or encoder:NAME")
    if features != "inception" and metrics != ["fid"]:
        raise ValueError(
            f"--metrics {args.metrics}: {features} has features for fid's distance alone; the "
            "others want Inception's (--weights FILE)"
        )
    if args.weights and features != "inception":
        raise ValueError(f"--weights {args.weights}: without effect on --features {features}")
    if args.save and not args.save.endswith(".npz"):
        raise ValueError(f"--save {args.save}: wants a name that ends in .npz")
    if args.save and Path(args.save).exists():
        raise ValueError(f"--save {args.save}: exists already; remove it or pass another name")
    if args.save:
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)

    device = args.device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"

    # The two sides. The Inception score needs no reference.
    began = time.time()
    samples = Side(args.samples, metrics, args.crop, args.num, from_images=bool(args.save))
    sides = [samples]
    if not args.save:
        comparing = [metric for metric in metrics if metric != "is"]
        reference = Side(args.reference, comparing, args.crop, args.num)
        if comparing:
            sides.append(reference)
        if samples.images is not None and samples.images.has_jpeg():
            warn(f"{args.samples} holds JPEG images; their losses alone raise FID by points")
    sizes = sorted({side.size for side in sides} - {"?"})
    if len(sizes) > 1:
        raise ValueError(
            f"{args.samples} and {args.reference} have {' and '.join(sizes)} px; "
            "pass --crop or the statistics of the same crop"
        )

    # The network
    if features == "inception":
        network, extract, label = load_inception(args.weights, device, args.mode)
    else:
        if not sizes or not sizes[0].isdigit():
            raise ValueError(f"--features {features} wants square images of one size; pass --crop")
        network = None
        extract, label = load_encoder(features.removeprefix("encoder:"), int(sizes[0]), device)

    # Processes: gloo, since they only exchange features that are on the CPU. timm's imports hold on
    # to a group that is there before them. So the group comes after the network, or it would live
    # to Python's end, where gloo's threads may abort the process.
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo")

    # Features and their statistics. Their label has a hash of the network's weights: that is why
    # even two files of statistics are compared only with the weights at hand.
    for side in sides:
        side.check_label(label)
    num_seen = 0
    for side in sides:
        if side.images is None:
            continue
        num_seen += len(side.images)
        found = compute_statistics(
            side.images, side.missing, network, extract, args.batch_size, device
        )
        side.statistics.update(found)
    rate = num_seen / (time.time() - began)

    # Process 0 has it all now. The group is ended here and not in a `finally`: after an error in
    # one process that would wait for the others, and the error would never be seen.
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return

    if args.save:
        temporary = f"{args.save}.tmp"  # renamed when it is whole
        with open(temporary, "wb") as f:
            np.savez(f, **samples.statistics, n=samples.n, size=samples.size, label=label)
        os.replace(temporary, args.save)
        print(f"wrote {args.save}  (N={samples.n}, {samples.size} px, {label})")
        return

    # The scores
    a = samples.statistics
    b = reference.statistics
    scores = {}
    if "fid" in metrics:
        name = "FID" if features == "inception" else "Frechet distance"
        scores[name] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
    if "sfid" in metrics:
        scores["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
    if "is" in metrics:
        scores["IS"] = a["is"]
    if "pr" in metrics:
        where = "cpu" if device == "mps" else device  # mps has no float64
        precision, recall = precision_recall(a["pool3"], b["pool3"], where)
        scores["precision"] = precision
        scores["recall"] = recall

    # One line, or one JSON object
    if "fid" in metrics and 0 < samples.n < 2048 and features == "inception":
        warn(
            f"{samples.n} samples; with fewer than the 2,048 features FID is far too high, and "
            "papers use 50,000"
        )
    if args.json:
        about = dict(num=samples.n, label=label, images_per_s=rate, reference=args.reference)
        print(json.dumps(scores | about))
        return
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    about = f"N={samples.n}, {label}, float32, reference {args.reference}"
    print(f"{numbers}  ({about})  {rate:.0f} images/s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        process = f" of process {RANK}" if WORLD_SIZE > 1 else ""
        sys.exit(f"error{process}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
