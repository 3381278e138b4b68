"""From an image to the image encoder's input: the one implementation, everywhere.

A second implementation of the resize has cost others up to five points of accuracy, so nothing else
in edgeclip resizes. It is open_clip's evaluation transform, bit for bit
(tests/device/test_preprocess.py): PIL's antialiased resize of the shorter side (or of both:
squash), center crop, then `(pixel / 255 - mean) / std`. TensorRT cannot do the antialiased resize
in a graph, so it is host code on every runtime.
"""

import hashlib
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from PIL import Image

from edgeclip.config import BrokenRule
from edgeclip.errors import EdgeclipError

RESIZES = ("shortest", "squash")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Preprocess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size: int
    """Height and width of the input in pixels."""
    mean: tuple[float, float, float]
    """Of each channel, in units of 0..1."""
    std: tuple[float, float, float]
    """Of each channel, in units of 0..1."""
    resize: Literal["shortest", "squash"] = "shortest"
    """The shorter side to `size` and a centered crop, or both sides to `size`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """PIL's filter, antialiased."""
    crop: float = 1.0
    """Share of the resized side that the centered crop keeps, as timm's crop_pct: the side is first
    resized to floor(size / crop)."""

    def __post_init__(self) -> None:
        """Raise `BrokenRule` for values that no transform has: built in code, a record is not
        checked by anything else."""
        _refuse_unless(isinstance(self.size, int) and self.size > 0, "size", self.size)
        _refuse_unless(self.resize in RESIZES, "resize", self.resize)
        _refuse_unless(self.interpolation in FILTERS, "interpolation", self.interpolation)
        _refuse_unless(0 < self.crop <= 1, "crop", self.crop)
        for name, values in (("mean", self.mean), ("std", self.std)):
            _refuse_unless(len(values) == 3 and all(map(math.isfinite, values)), name, values)
        _refuse_unless(min(self.std) > 0, "std", self.std)


def _refuse_unless(right: bool, field: str, value: object) -> None:
    if not right:
        raise BrokenRule(field, f"{field} is {value}", "correct it")


class UnreadableImage(EdgeclipError):
    """An image that cannot be decoded: data loading counts these, a command stops at them."""


def open_image(source: Path | bytes, name: object = None) -> Image.Image:
    """Return an image decoded to RGB, whole.

    name: what messages call it. Raises `EdgeclipError` for a missing file, and `UnreadableImage`
    for one that cannot be decoded: a truncated file is never padded with grey.
    """
    where = source if name is None else name
    file: Any = source
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise EdgeclipError(where, "there is no such file", "check the path") from None
    except Exception as e:
        raise _unreadable(where, e) from None


def open_scaled(
    content: bytes, name: object, least: Callable[[tuple[int, int]], tuple[int, int]]
) -> tuple[Image.Image, tuple[int, int]]:
    """Return an RGB image, which may be decoded smaller, and its full size.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where that is no smaller than `least` of its full size:
    libjpeg-turbo then computes only the low frequencies of each block. Never for evaluation:
    `open_image` is exact. Raises `UnreadableImage`.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            full = image.size
            image.draft("RGB", least(full))
            image.load()
            if image.mode == "RGB":  # convert copies what is RGB already
                return image, full
            return image.convert("RGB"), full
    except Exception as e:
        raise _unreadable(name, e) from None


def _unreadable(where: object, e: Exception) -> UnreadableImage:
    # Not OSError alone: a plugin of Pillow raises whatever its parser met (struct.error, KeyError).
    reason = str(e) or type(e).__name__
    return UnreadableImage(where, f"unreadable image ({reason})", "replace or remove it")


def to_pixels(image: Image.Image, spec: Preprocess) -> np.ndarray:
    """Return uint8 [H, W, 3] of the encoder's size."""
    size = spec.size
    resample = FILTERS[spec.interpolation]
    side = math.floor(size / spec.crop)
    if spec.resize == "squash" and side == size:
        return np.asarray(image.resize((size, size), resample))

    # torchvision's arithmetic: the longer side is truncated, the crop's corner rounded half to even
    width, height = image.size
    if spec.resize == "squash":
        resized = (side, side)
    elif width <= height:
        resized = (side, int(side * height / width))
    else:
        resized = (int(side * width / height), side)
    left = round((resized[0] - size) / 2.0)
    top = round((resized[1] - size) / 2.0)
    cropped = image.resize(resized, resample).crop((left, top, left + size, top + size))
    return np.asarray(cropped)


def fingerprint(pixels: np.ndarray) -> int:
    """Return 64 bits that tell one image's pixels, uint8 [H, W, 3], from others."""
    content = np.ascontiguousarray(pixels).data
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def normalize(pixels: np.ndarray, spec: Preprocess) -> np.ndarray:
    """Return float32 [B, 3, H, W] of uint8 [B, H, W, 3]."""
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = (values - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    x = np.empty((len(pixels), 3, *pixels.shape[1:3]), np.float32)
    # A pixel has 256 values: looking them up is the same arithmetic, in a tenth of the time.
    for c in range(3):
        np.take(table[:, c], pixels[..., c], out=x[:, c], mode="clip")
    return x
