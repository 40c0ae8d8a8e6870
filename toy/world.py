"""The toy world, the default data set: coloured shapes of ten classes, drawn from a seed."""

import hashlib

import numpy as np

TOY = {"train": (30000, 0), "val": (2000, 1)}  # split: (number of images, seed)


class ToyShapes:
    """The offline data set. It offers what rae.ImageFolder does."""

    def __init__(self, split="train", size=32):
        self.images, self.labels = toy_images(*TOY[split], size)
        self.classes = list(SHAPES)
        self.fingerprint = hashlib.sha256(self.images.tobytes()).hexdigest()[:16]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Image i as (3, size, size) uint8."""
        return self.images[i]

    def load(self, i, generator, flip):
        """Image i for training, mirrored if flip. (Nothing is cropped.)"""
        return self.images[i][:, :, ::-1] if flip else self.images[i]


# ---------------------------------------------------------------------------------------------
# Signed distances of each shape in units of its radius: x to the right, y down, negative inside.
# Every shape is its own mirror image, so that a horizontal flip is another picture of this world.


def disc(x, y):
    return np.hypot(x, y) - 0.9


def ring(x, y):
    return np.abs(np.hypot(x, y) - 0.7) - 0.25


def box(x, y, w, h):
    return np.maximum(np.abs(x) - w, np.abs(y) - h)


def square(x, y):
    return box(x, y, 0.8, 0.8)


def triangle(x, y):
    """The farthest outside of three edges, whose normals point in these directions."""
    y = y - 0.15
    edges = []
    for angle in (np.pi / 3, np.pi, 5 * np.pi / 3):
        edges.append(x * np.sin(angle) - y * np.cos(angle))
    return np.max(edges, axis=0) - 0.52


def star(x, y):
    """Five points: fold the plane into a tenth of the star, whose border is one straight line."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    tip = 1.05
    notch_x = 0.42 * np.cos(sector / 2)
    notch_y = 0.42 * np.sin(sector / 2)
    r = np.hypot(x, y)
    normal = np.hypot(notch_y, tip - notch_x)
    return ((r * np.cos(angle) - tip) * notch_y + r * np.sin(angle) * (tip - notch_x)) / normal


def cross(x, y):
    return np.minimum(box(x, y, 1, 0.3), box(x, y, 0.3, 1))


def heart(x, y):
    """A square on its corner, and a disc on each of its upper sides."""
    body = box((x + y - 0.1) * 0.7071, (x - y + 0.1) * 0.7071, 0.52, 0.52)
    lobes = np.hypot(np.abs(x) - 0.368, y + 0.268) - 0.52
    return np.minimum(body, lobes)


def moon(x, y):
    """A disc without another disc above its centre."""
    return np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x, y + 0.5))


def bar(x, y):
    return box(x, y, 1, 0.3)


def hourglass(x, y):
    return np.maximum(np.abs(y) - 0.9, (np.abs(x) - 0.8 * np.abs(y) - 0.1) * 0.78)


SHAPES = {
    "disc": disc,
    "ring": ring,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "heart": heart,
    "moon": moon,
    "bar": bar,
    "hourglass": hourglass,
}


def hsv_to_rgb(h, s, v):
    """Hue, saturation and value (n,) in [0, 1] -> colours (n, 3, 1, 1)."""
    k = (np.array([5, 3, 1]) + 6 * h[:, None]) % 6
    rgb = v[:, None] * (1 - s[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))
    return rgb[:, :, None, None]


def toy_images(n, seed, size=32):
    """n images (n, 3, size, size) uint8 and labels (n,): bright shapes on dark grounds.

    Labels go from 0 to 9 in turn. Each image draws its radius (9 to 12 px of 32), place (2 px),
    turn (15 degrees) and two colours from the seed.
    """
    u = np.random.default_rng(seed).random((n, 10)).astype(np.float32)
    labels = np.arange(n) % 10
    images = np.empty((n, 3, size, size), np.uint8)
    pixel = (np.arange(size, dtype=np.float32) + 0.5) * 32 / size - 16  # centres, in pixels of 32
    for label, distance in enumerate(SHAPES.values()):
        rows = u[label::10]
        radius = 9 + 3 * rows[:, 0, None, None]
        dx = 2 * (2 * rows[:, 1, None, None] - 1)
        dy = 2 * (2 * rows[:, 2, None, None] - 1)
        turn = np.deg2rad(15 * (2 * rows[:, 3, None, None] - 1))

        # The pixels in the shape's own axes, and how much of each the shape covers: its edge is one
        # pixel wide.
        x = (pixel - dx) / radius
        y = (pixel[:, None] - dy) / radius
        turned_x = x * np.cos(turn) + y * np.sin(turn)
        turned_y = y * np.cos(turn) - x * np.sin(turn)
        d = distance(turned_x, turned_y) * radius
        cover = np.clip(0.5 - d * size / 32, 0, 1)[:, None]

        bright = hsv_to_rgb(rows[:, 4], 0.6 + 0.4 * rows[:, 5], 0.75 + 0.25 * rows[:, 6])
        dark = hsv_to_rgb(rows[:, 7], 0.1 + 0.5 * rows[:, 8], 0.1 + 0.25 * rows[:, 9])
        images[label::10] = np.round(255 * (cover * bright + (1 - cover) * dark))
    return images, labels
