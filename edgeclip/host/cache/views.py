"""Views: an image's augmentations as explicit numbers, replayed alike for a teacher and a student
of any input size.

A view is [left, top, width, height in source pixels, flip 0 or 1], and for reinforced data
RandAugment's operations after the resize, two numbers each: its place in `OPERATIONS` and its
magnitude (TranslateX and TranslateY: of the side). Width 0 is the image's center square, for
whoever does not know its size. Boxes are drawn in whole pixels, as torchvision and open_clip draw
them: then torch's resize, which takes a third of PIL's time, cuts out the same box.

A view is cut out in the mode that the file has, and is RGB only then, as in open_clip's training
transform (RandomResizedCrop, then MaybeConvertMode). RandAugment's operations come after that: they
are made for RGB, and a palette's index has no brightness.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from edgeclip.device.image_file import refusing
from edgeclip.device.preprocess import FILTERS, Preprocess, open_scaled
from edgeclip.host.recipe import Views

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""torchvision's RandAugment, in its order"""


def draw_views(width: int, height: int, spec: Views, rng: random.Random) -> np.ndarray:
    """[K, 5] view parameters for an image of width x height pixels: the center square, then random
    resized crops."""
    side = min(width, height)
    views = [[round((width - side) / 2), round((height - side) / 2), side, side, 0]]
    for _ in range(spec.count - 1):
        for _attempt in range(10):
            area = width * height * rng.uniform(*spec.scale)
            ratio = math.exp(rng.uniform(math.log(spec.ratio[0]), math.log(spec.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w = h = side
        views.append(
            [rng.randint(0, width - w), rng.randint(0, height - h), w, h, rng.random() < spec.flip]
        )
    return np.array(views, np.float32)


def apply_view(image: Image.Image, view: np.ndarray, spec: Preprocess) -> np.ndarray:
    """uint8 [H, W, 3]: one view of a `prepared` image at an encoder's size.

    Raises `UnreadableImage` for an image of a mode that cannot be resized.
    """
    with refusing(getattr(image, "filename", "") or "image"):
        resized = _cut_out(image, view, spec).convert("RGB")
    flip, *operations = view.tolist()[4:]
    for number, magnitude in zip(operations[::2], operations[1::2], strict=True):
        resized = _operate(resized, OPERATIONS[int(number)], magnitude)
    pixels = np.asarray(resized)
    return pixels[:, ::-1] if flip else pixels


def _cut_out(image: Image.Image, view: np.ndarray, spec: Preprocess) -> Image.Image:
    """Return the view's box at the encoder's size, in the image's own mode."""
    left, top, width, height = view.tolist()[:4]
    if not width:
        width = height = min(image.size)
        left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    if len(view) > 5:  # as torchvision's resized_crop: the filter sees nothing beyond the crop
        image = image.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))
        box = (0, 0, image.width, image.height)
    return image.resize((spec.size, spec.size), FILTERS[spec.interpolation], box=box)


def decode_view(content: bytes, view: np.ndarray, spec: Preprocess, name: object) -> np.ndarray:
    """uint8 [H, W, 3]: one view of an image in a file's bytes, for training: a JPEG is decoded at
    the smallest of its eighths that still has a pixel of its own for every pixel of the view.
    `apply_view` of the whole image is within resampling of it, and of an image that is not scaled
    within one level, but for the rim, where PIL's filter looks beyond the box.

    Raises `UnreadableImage`.
    """
    width, height = float(view[2]), float(view[3])

    def least(size: tuple[int, int]) -> tuple[int, int]:
        w, h = (width, height) if width else (min(size), min(size))
        return math.ceil(size[0] * spec.size / w), math.ceil(size[1] * spec.size / h)

    image, full = open_scaled(content, name, spec, least)
    if image.size != full:
        view = view.copy()
        view[[0, 2]] *= image.width / full[0]
        view[[1, 3]] *= image.height / full[1]
    by_channel = image.mode in ("RGB", "L")  # then it is the same to convert before the resize
    if not by_channel or len(view) > 5 or not view[2] or (view[:4] % 1).any():
        return apply_view(image, view, spec)
    if image.mode == "L":
        image = image.convert("RGB")
    left, top, width, height, flip = view.astype(int).tolist()
    box = torch.from_numpy(np.array(image)[top : top + height, left : left + width]).permute(
        2, 0, 1
    )[None]
    resized = F.interpolate(
        box, (spec.size, spec.size), mode=spec.interpolation, antialias=True
    )  # uint8: Pillow-SIMD's arithmetic
    return (resized.flip(3) if flip else resized)[0].permute(1, 2, 0).numpy()


def _operate(image: Image.Image, operation: str, magnitude: float) -> Image.Image:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.autoaugment import _apply_op

    if operation.startswith("Translate"):
        magnitude = round(
            magnitude * image.width, 3
        )  # torchvision cuts it to whole pixels: 45 must not become 44.9999
    return _apply_op(
        image, operation, magnitude, interpolation=InterpolationMode.NEAREST, fill=None
    )
