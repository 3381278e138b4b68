"""Views: a picture's augmentations as explicit numbers, replayed alike for a teacher and a student of any input size.

A view is [left, top, width, height in source pixels, flip 0 or 1], of width 0: the picture's centre square, for whoever
does not know its size. A JPEG may have been decoded at a fraction of its size: `replay` is told the full one.
"""

import math
import random

import numpy as np
from PIL import Image

from edgeclip.preprocess import FILTERS, Preprocess
from edgeclip.recipe import Views


def draw_views(width: int, height: int, spec: Views, rng: random.Random) -> np.ndarray:
    """[K, 5] view parameters for a picture of width x height pixels: the centre square, then random resized crops."""
    side = min(width, height)
    views = [[(width - side) / 2, (height - side) / 2, side, side, 0]]
    for _ in range(spec.count - 1):
        for _attempt in range(10):
            area = width * height * rng.uniform(*spec.scale)
            ratio = math.exp(rng.uniform(math.log(spec.ratio[0]), math.log(spec.ratio[1])))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                break
        else:
            w = h = side
        views.append([rng.uniform(0, width - w), rng.uniform(0, height - h), w, h, rng.random() < spec.flip])
    return np.array(views, np.float32)


def replay(image: Image.Image, view: np.ndarray, spec: Preprocess) -> np.ndarray:
    """uint8 [H, W, 3]: one view of a picture at an encoder's size."""
    left, top, width, height, flip = (float(v) for v in view)
    if not width:
        width = height = min(image.size)
        left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    pixels = np.asarray(image.resize((spec.size, spec.size), FILTERS[spec.interpolation], box=box))
    return pixels[:, ::-1] if flip else pixels
