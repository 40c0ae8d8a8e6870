"""The toy world, the default data set: coloured shapes of ten classes, 32 x 32, drawn from a seed."""

import hashlib

import numpy as np

TOY = {"train": (30000, 0), "val": (2000, 1)}           # split: (images, seed)


class ToyShapes:
    """The offline data set: coloured shapes of 10 classes, drawn from another seed for each split."""

    def __init__(self, split="train", size=32):
        self.images, self.labels = toy_images(*TOY[split], size)
        self.classes = list(SHAPES)

    def __len__(self):
        return len(self.labels)

    def load(self, index, rng, flip=False):
        return self.images[index][:, :, ::-1 if flip else 1]

    def fingerprint(self):
        return hashlib.sha256(self.images.tobytes()).hexdigest()[:16]


# Signed distances of each shape in units of its radius: x to the right, y down, negative inside. Every shape
# is its own mirror image, so that a horizontal flip is another picture of the same world.

def box(x, y, w, h):
    return np.maximum(np.abs(x) - w, np.abs(y) - h)


def triangle(x, y):
    return np.max([x * np.sin(a) - y * np.cos(a) for a in (np.pi / 3, np.pi, 5 * np.pi / 3)], axis=0) - 0.52


def star(x, y):
    """Five points: fold the plane into one tenth of the star, whose border there is one straight line."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    tip, notch_x, notch_y = 1.05, 0.42 * np.cos(sector / 2), 0.42 * np.sin(sector / 2)
    r, normal = np.hypot(x, y), np.hypot(notch_y, tip - notch_x)
    return ((r * np.cos(angle) - tip) * notch_y + r * np.sin(angle) * (tip - notch_x)) / normal


SHAPES = {
    "disc": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.25,
    "square": lambda x, y: box(x, y, 0.8, 0.8),
    "triangle": lambda x, y: triangle(x, y - 0.15),
    "star": star,
    "cross": lambda x, y: np.minimum(box(x, y, 1, 0.3), box(x, y, 0.3, 1)),
    "heart": lambda x, y: np.minimum(box((x + y - 0.1) * 0.7071, (x - y + 0.1) * 0.7071, 0.52, 0.52),
                                     np.hypot(np.abs(x) - 0.368, y + 0.268) - 0.52),
    "moon": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x, y + 0.5)),
    "bar": lambda x, y: box(x, y, 1, 0.3),
    "hourglass": lambda x, y: np.maximum(np.abs(y) - 0.9, (np.abs(x) - 0.8 * np.abs(y) - 0.1) * 0.78),
}


def hsv_to_rgb(h, s, v):
    """Arrays (n,) in [0, 1] -> (n, 3, 1, 1)."""
    k = (np.array([5, 3, 1]) + 6 * h[:, None]) % 6
    return (v[:, None] * (1 - s[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1)))[:, :, None, None]


def toy_images(n, seed, size=32):
    """n images (n, 3, size, size) uint8 and labels (n,): bright shapes on dark grounds, labels 0..9 in turn.

    Each image draws its radius (9 to 12 px of 32), place (2 px), turn (15 degrees) and two colours from the
    seed."""
    u = np.random.default_rng(seed).random((n, 10)).astype(np.float32)
    labels, images = np.arange(n) % 10, np.empty((n, 3, size, size), np.uint8)
    pixel = (np.arange(size, dtype=np.float32) + 0.5) * 32 / size - 16            # pixel centres, in px of 32
    for label, distance in enumerate(SHAPES.values()):
        rows = u[label::10]
        radius, dx, dy, turn = (rows[:, i, None, None] for i in range(4))
        radius, turn = 9 + 3 * radius, np.deg2rad(15 * (2 * turn - 1))
        x, y = (pixel - 2 * (2 * dx - 1)) / radius, (pixel[:, None] - 2 * (2 * dy - 1)) / radius
        d = distance(x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)) * radius
        cover = np.clip(0.5 - d * size / 32, 0, 1)[:, None]                      # anti-aliased over one pixel
        bright = hsv_to_rgb(rows[:, 4], 0.6 + 0.4 * rows[:, 5], 0.75 + 0.25 * rows[:, 6])
        dark = hsv_to_rgb(rows[:, 7], 0.1 + 0.5 * rows[:, 8], 0.1 + 0.25 * rows[:, 9])
        images[label::10] = np.round(255 * (cover * bright + (1 - cover) * dark))
    return images, labels
