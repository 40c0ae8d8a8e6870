"""Look into a trained model: edit an image, walk between two, find a sample's nearest images.

    python extras/explore.py --like cat.png --strength 0.6     # denoised again, once as each class
    python extras/explore.py --interpolate cat.png dog.png     # 8 latents on the line between them
    python extras/explore.py --query cat.png photos            # its nearest images, as each class
    python extras/explore.py --neighbours toy                  # 8 samples: drawn, or copied?

--like, --interpolate and --query noise a latent up to the time --strength, before the schedule's
shift, and denoise it from there: near 0 the image stays, at 1 nothing of it is left. All pictures
get the same noise, so that they differ by their latent and class alone. --query begins with the
images of a folder, or of the toy's training images, that are nearest to an image. --neighbours
draws samples as sample.py does, and beside each its nearest images.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit_dh import sample, shift_alpha, time_grid  # noqa: E402
from rae import (  # noqa: E402
    available_devices,
    center_crop,
    error_line,
    keyed_noise,
    load_rae,
    natural,
    number,
    open_data,
    open_image,
    parse_flags,
    positive_int,
    read_images,
    save_sheet,
)
from sample import balanced_labels, check_fit, class_list, generate, load_model  # noqa: E402

NUM_PICTURES = 8  # of an interpolation, and samples whose neighbours are shown
NUM_NEIGHBOURS = 7
MAX_CLASSES = 100  # on one sheet


def get_args():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # what to do
    task = p.add_mutually_exclusive_group(required=True)
    task.add_argument("--like", metavar="IMAGE", help="edit an image: one picture a class")
    task.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"), help="8 pictures from one image to another"
    )
    task.add_argument(
        "--query",
        nargs=2,
        metavar=("IMAGE", "FOLDER"),
        help="an image and its nearest there, or of the toy's: a row of edits a class",
    )
    task.add_argument(
        "--neighbours", metavar="FOLDER", help="8 samples and their nearest images there; or toy"
    )
    # the model
    p.add_argument("--ckpt", default="out/diffusion/checkpoint.pt", help="checkpoint of a run")
    p.add_argument("--decoder", help="decoder file or released:NAME; unset: the one of the run")
    # how
    p.add_argument(
        "--classes",
        type=class_list,
        help="such as 0,3,7, or null; unset: all, but null with --interpolate",
    )
    p.add_argument("--strength", type=number(0, 1), default=0.6, help="time to noise an image to")
    p.add_argument("--steps", type=positive_int, default=50, help="evaluations")
    p.add_argument("--cfg-scale", type=number(0), default=1.5, help="guidance, 1 for none")
    p.add_argument("--seed", type=natural, default=0, help="of the noise")
    p.add_argument("--out", default="out/explore.png", help="the picture to write")
    return parse_flags(p)


def load_images(paths, size, device):
    """The central squares of image files, as (B, 3, size, size) in [0, 1]."""
    images = [np.asarray(center_crop(open_image(path), size)) for path in paths]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (B, 3, size, size)
    return images.to(device).float() / 255


@torch.no_grad()
def denoise(rae, model, z, labels, timesteps, seed, cfg_scale):
    """Noise latents z (B, N, C) to timesteps[0] and denoise them: images (B, 3, H, W) in [0, 1]."""
    noise = keyed_noise([(seed, 0)], z.shape[1:], z.device)  # (1, N, C), the same for all
    t = timesteps[0].item()
    x_t = (1 - t) * z + t * noise  # (B, N, C)
    y = torch.tensor(labels, device=z.device)
    z = sample(model, x_t, y, timesteps, cfg_scale=cfg_scale)
    return rae.decode(z).clamp(0, 1)


@torch.no_grad()
def find_neighbours(encoder, images, data, batch_size=256):
    """The nearest images of a data set to images (B, 3, H, W), by the mean of the encoder's tokens.

    Returns their numbers (B, n) and cosines (B, n), the nearest first.
    """

    def features(x):
        return F.normalize(encoder(x).mean(1), dim=1)  # (B, C)

    theirs = []
    for start in range(0, len(data), batch_size):
        indices = range(start, min(start + batch_size, len(data)))
        theirs.append(features(read_images(data, indices, images.device)))
    similarity = features(images) @ torch.cat(theirs).T  # (B, number of images)
    cosines, nearest = similarity.topk(min(NUM_NEIGHBOURS, len(data)))
    return nearest, cosines


def main():
    args = get_args()
    out = Path(args.out)
    if out.suffix != ".png" or out.is_dir():
        raise ValueError(f"--out {out}: wants a .png")
    out.parent.mkdir(parents=True, exist_ok=True)

    # The model, and the autoencoder in whose latents it was trained.
    device = torch.device(available_devices()[0])
    model, run = load_model(args.ckpt)
    model = model.to(device)
    decoder = args.decoder or run.get("decoder")
    if decoder is None:
        raise ValueError(f"{args.ckpt}: the file does not name its decoder; pass --decoder")
    rae = load_rae(
        decoder, run.get("encoder"), run.get("encoder_weights"), run.get("stats"), device
    )
    check_fit(args.ckpt, model, run, rae)
    alpha = run.get("alpha") or shift_alpha(*rae.latent_mean.shape)

    # Classes. Between two images no class is right, and a model that was trained without labels
    # knows none.
    classes = args.classes or list(range(model.num_classes))
    unlabelled = args.interpolate or run.get("label_drop") == 1
    if args.classes == "null" or (args.classes is None and unlabelled):
        classes = [model.num_classes]
    elif not all(0 <= c < model.num_classes for c in classes):
        raise ValueError(f"--classes {classes}: out of range 0 to {model.num_classes - 1}")
    if (args.like or args.query) and len(classes) > MAX_CLASSES:
        raise ValueError(f"{len(classes)} classes do not fit a sheet: pass some as --classes")

    if args.neighbours:
        # A row for each sample: the sample, then its neighbours.
        data = open_data(args.neighbours, rae.image_size)
        labels = balanced_labels(classes, NUM_PICTURES)
        timesteps = time_grid(args.steps, alpha)
        samples = generate(rae, model, labels, timesteps, args.seed, cfg_scale=args.cfg_scale)
        nearest, cosines = find_neighbours(rae.encoder, samples, data)
        rows = []
        for image, indices in zip(samples, nearest.tolist()):
            rows += [image[None], read_images(data, indices, device)]
        pictures = torch.cat(rows)
        columns = 1 + nearest.shape[1]
        cosine = cosines[:, 0].mean().item()
        print(f"samples, and the nearest of {len(data)} images (cosine {cosine:.3f})")
    elif args.query:
        # The image and its neighbours, and below them a row for each class: all of them as that.
        path, folder = args.query
        query = load_images([path], rae.image_size, device)  # (1, 3, H, W)
        data = open_data(folder, rae.image_size)
        nearest, cosines = find_neighbours(rae.encoder, query, data)
        images = torch.cat([query, read_images(data, nearest[0].tolist(), device)])  # (8, 3, H, W)
        z = rae.encode(images)  # (8, N, C)
        timesteps = time_grid(args.steps, alpha, t_first=args.strength)
        rows = [images]
        for label in classes:
            labels = [label] * len(z)
            rows.append(denoise(rae, model, z, labels, timesteps, args.seed, args.cfg_scale))
        pictures = torch.cat(rows)
        columns = len(images)
        print(f"{path}, and the nearest of {len(data)} images (cosine {cosines[0, 0]:.3f})")
    else:
        # One picture for each class, or one for each latent on the line between two images.
        images = load_images(args.interpolate or [args.like], rae.image_size, device)
        z = rae.encode(images)  # (1 or 2, N, C)
        if args.interpolate:
            labels = balanced_labels(classes, NUM_PICTURES)
            weight = torch.linspace(0, 1, NUM_PICTURES, device=device)[:, None, None]
            z = torch.lerp(z[0], z[1], weight)  # (8, N, C)
        else:
            labels = classes
            z = z.repeat(len(classes), 1, 1)  # (number of classes, N, C)
        timesteps = time_grid(args.steps, alpha, t_first=args.strength)
        pictures = denoise(rae, model, z, labels, timesteps, args.seed, args.cfg_scale)
        columns = len(labels) if len(labels) <= 10 else 8
    save_sheet(pictures, out, columns)
    print(f"wrote {out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
