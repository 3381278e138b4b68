"""From an image to the image encoder's input: the one implementation, for training, evaluation and
the board.

A second implementation of the resize has cost others up to five points of accuracy, so nothing else
in edgeclip resizes. It is open_clip's evaluation transform, bit for bit
(`tests/test_preprocess.py`): PIL's antialiased resize of the shorter side (or of both: squash),
center crop, then `(pixel / 255 - mean) / std`. TensorRT cannot do the antialiased resize in a
graph, so it is host code on every runtime.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from PIL import Image

from edgeclip.errors import EdgeclipError

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Preprocess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size: int
    """Height and width of the input in pixels."""
    mean: tuple[float, float, float]
    """Of each channel, in units of 0..1."""
    std: tuple[float, float, float]
    resize: Literal["shortest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


class UnreadableImage(EdgeclipError):
    """An image that cannot be decoded. Data loading counts these; commands given the file by name
    stop."""


def open_image(source: Path | bytes, name: object = None) -> Image.Image:
    """Decodes to RGB, whole: a truncated file raises `UnreadableImage`, it is never padded with
    grey."""
    where = name if name is not None else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise EdgeclipError(where, "there is no such file", "check the path") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UnreadableImage(where, f"unreadable image ({e})", "replace or remove it") from None


def open_scaled(
    content: bytes, name: object, least: Callable[[tuple[int, int]], tuple[int, int]]
) -> tuple[Image.Image, tuple[int, int]]:
    """(RGB image, its full size): a JPEG is decoded at 1/2, 1/4 or 1/8 where that is no smaller
    than `least` of its full size.

    libjpeg-turbo then computes only the low frequencies of each block. Never for evaluation:
    `open_image` is exact.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            full = image.size
            image.draft("RGB", least(full))
            image.load()
            return image if image.mode == "RGB" else image.convert(
                "RGB"
            ), full  # convert copies what is RGB already
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UnreadableImage(name, f"unreadable image ({e})", "replace or remove it") from None


def to_pixels(image: Image.Image, spec: Preprocess) -> np.ndarray:
    """uint8 [H, W, 3] of the encoder's size."""
    size, resample = spec.size, FILTERS[spec.interpolation]
    if spec.resize == "squash":
        return np.asarray(image.resize((size, size), resample))
    w, h = image.size
    # torchvision's arithmetic: the longer side is truncated, the crop's corner rounded half to even
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = int(round((w - size) / 2.0)), int(round((h - size) / 2.0))
    return np.asarray(image.resize((w, h), resample).crop((left, top, left + size, top + size)))


def normalize(pixels: np.ndarray, spec: Preprocess) -> np.ndarray:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W]."""
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = (values - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    x = np.empty((len(pixels), 3, *pixels.shape[1:3]), np.float32)
    for c in range(
        3
    ):  # a pixel has 256 values: looking them up is the same arithmetic, in a tenth of the time
        np.take(table[:, c], pixels[..., c], out=x[:, c], mode="clip")
    return x
