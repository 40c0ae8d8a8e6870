"""Explore a trained diffusion model: edit an image, interpolate, find the nearest training images.

    python extras/explore.py --like cat.png --strength 0.6    # redraw an image as each class
    python extras/explore.py --interpolate cat.png dog.png    # 8 images from one to the other
    python extras/explore.py --query cat.png photos           # edit an image and its neighbors
    python extras/explore.py --neighbors toy                  # are samples copies of the data?

--like, --interpolate and --query noise the latents to time --strength (before the schedule shift)
and denoise them from there (SDEdit, Meng et al. 2022): 0 reconstructs the image, 1 starts from pure
noise. All latents get the same noise, so results differ only in latent and class. Neighbors, from a
folder or the toy's training set, are the images whose mean encoder tokens have the highest cosine
similarity.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit_dh import sample, shift_alpha, shift_time, time_grid  # noqa: E402
from rae import (  # noqa: E402
    UsageError,
    available_devices,
    bounded,
    center_crop,
    load_rae,
    make_folder,
    non_negative_int,
    open_data,
    open_image,
    positive_int,
    rank_batches,
    read_batches,
    run_script,
    seeded_noise,
)
from sample import (  # noqa: E402
    balanced_labels,
    check_model,
    choose_classes,
    class_list,
    generate,
    load_model,
    save_grid,
    to_uint8,
)

NUM_IMAGES = 8  # in an interpolation, or samples to find neighbors for
NUM_NEIGHBORS = 7


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # task
    task = p.add_mutually_exclusive_group(required=True)
    task.add_argument("--like", metavar="IMAGE", help="edit an image, once per class")
    task.add_argument("--interpolate", nargs=2, metavar="IMAGE", help="images between two")
    task.add_argument(
        "--query",
        nargs=2,
        metavar=("IMAGE", "DATA"),
        help="edit an image and its neighbors in a folder (or toy), one row per class",
    )
    task.add_argument("--neighbors", metavar="DATA", help="samples and their neighbors")
    # model
    p.add_argument("--ckpt", default="out/diffusion/checkpoint.pt", help="diffusion checkpoint")
    p.add_argument("--decoder", help="decoder file or released:NAME (default: as in training)")
    # sampler
    p.add_argument(
        "--classes",
        type=class_list,
        help="such as 0,3,7, or null (default: the first ten; null for --interpolate)",
    )
    p.add_argument("--strength", type=bounded(0, 1), default=0.6, help="noise level, 0 to 1")
    p.add_argument("--steps", type=positive_int, default=50, help="Euler steps")
    p.add_argument("--cfg-scale", type=bounded(0), default=1.5, help="CFG scale (1: off)")
    p.add_argument("--seed", type=non_negative_int, default=0, help="random seed")
    p.add_argument("--out", default="out/explore.png", help="picture to write")
    return p.parse_args()


def load_images(paths, size, device):
    """Center-cropped image files as (B, 3, size, size) in [0, 1]."""
    images = [np.asarray(center_crop(open_image(path), size)) for path in paths]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (B, 3, size, size)
    return images.to(device).float() / 255


def denoise(rae, model, z, labels, alpha, args):
    """Noise latents z (B, N, C), denoise them conditioned on labels, and decode: (B, 3, H, W)."""
    timesteps = shift_time(torch.linspace(args.strength, 0, args.steps + 1), alpha)
    t = timesteps[0].item()
    noise = seeded_noise([("explore", args.seed)], z.shape[1:], z.device)  # (1, N, C)
    x_t = (1 - t) * z + t * noise  # (B, N, C)
    y = torch.tensor(labels, device=z.device)  # (B,)
    z = sample(model, x_t, y, timesteps, cfg_scale=args.cfg_scale)  # (B, N, C)
    return rae.decode(z).clamp(0, 1)


def find_neighbors(encoder, images, data, batch_size=256):
    """The images of a data set nearest to images (B, 3, H, W).

    Returns the neighbors (B, n, 3, H, W) and their cosine similarities (B, n), nearest first.
    """

    def features(x):
        return F.normalize(encoder(x).mean(1), dim=1)  # (B, C)

    batches = rank_batches(len(data), batch_size)
    loader = read_batches(data, batches, 0, images.device)
    data_features = torch.cat([features(x) for x in loader])  # (len(data), C)
    similarity = features(images) @ data_features.T  # (B, len(data))
    cosines, indices = similarity.topk(min(NUM_NEIGHBORS, len(data)))  # (B, n)
    neighbors = read_batches(data, indices.tolist(), 0, images.device)  # (n, 3, H, W) each
    return torch.stack(list(neighbors)), cosines


def main():
    args = get_args()
    device = torch.device(available_devices()[0])
    make_folder(Path(args.out).parent)

    # Model, and the RAE that it was trained on
    model, settings, rae_files = load_model(args.ckpt)
    model.to(device)
    if args.decoder:
        rae_files["decoder"] = args.decoder
    if not rae_files:
        raise UsageError(f"{args.ckpt}: names no decoder; pass --decoder")
    rae = load_rae(**rae_files, device=device)
    alpha = settings.get("alpha") or shift_alpha(*rae.latent_mean.shape)

    # Classes. An image between two others has no class of its own.
    null = model.num_classes
    classes = "null" if args.interpolate and args.classes is None else args.classes
    classes = choose_classes(classes, null, settings)
    if args.classes is None:
        classes = classes[:10]
    needed = set(classes)
    if args.cfg_scale != 1:
        needed.add(null)
    check_model(args.ckpt, model, settings, rae, needed)

    if args.like:
        z = rae.encode(load_images([args.like], rae.image_size, device))  # (1, N, C)
        z = z.repeat(len(classes), 1, 1)  # (len(classes), N, C)
        pictures = denoise(rae, model, z, classes, alpha, args)
        columns = min(len(classes), 10)
    elif args.interpolate:
        z = rae.encode(load_images(args.interpolate, rae.image_size, device))  # (2, N, C)
        weight = torch.linspace(0, 1, NUM_IMAGES, device=device)[:, None, None]
        z = torch.lerp(z[0], z[1], weight)  # (8, N, C)
        labels = balanced_labels(classes, NUM_IMAGES)
        pictures = denoise(rae, model, z, labels, alpha, args)
        columns = NUM_IMAGES
    elif args.query:
        # First row: the image and its neighbors. Then all of them as each class.
        path, folder = args.query
        query = load_images([path], rae.image_size, device)  # (1, 3, H, W)
        data = open_data(folder, rae.image_size)
        neighbors, cosines = find_neighbors(rae.encoder, query, data)
        images = torch.cat([query, neighbors[0]])  # (1 + n, 3, H, W)
        z = rae.encode(images)  # (1 + n, N, C)
        rows = [denoise(rae, model, z, [label] * len(z), alpha, args) for label in classes]
        pictures = torch.cat([images, *rows])
        columns = len(images)
        print(f"{path} and the nearest of {len(data)} images (cosine {cosines[0, 0]:.3f})")
    else:
        # One row per sample: the sample, then its neighbors.
        data = open_data(args.neighbors, rae.image_size)
        labels = balanced_labels(classes, NUM_IMAGES)
        timesteps = time_grid(args.steps, alpha)
        samples = generate(rae, model, labels, timesteps, args.seed, cfg_scale=args.cfg_scale) / 255
        neighbors, cosines = find_neighbors(rae.encoder, samples, data)
        pictures = torch.cat([samples[:, None], neighbors], dim=1)  # (8, 1 + n, 3, H, W)
        columns = pictures.shape[1]
        pictures = pictures.flatten(0, 1)
        cosine = cosines[:, 0].mean()
        print(f"samples and the nearest of {len(data)} images (cosine {cosine:.3f})")

    save_grid(to_uint8(pictures), args.out, columns)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
