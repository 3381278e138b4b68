"""From an image to the image encoder's input: the one implementation, everywhere.

A second implementation of the resize has cost others up to five points of accuracy, so nothing else
in edgeclip resizes. It is open_clip's evaluation transform, bit for bit
(tests/device/test_image_modes.py): PIL's antialiased resize of the shorter side (or of both:
squash) and a center crop, both in the mode that the file has (Pillow resizes a palette and 1 bit
without a filter, and colors by their alpha), RGB only then, and `(pixel / 255 - mean) / std`.
TensorRT cannot do the antialiased resize in a graph, so it is host code on every runtime.

Where open_clip does what few would wish, an option of `Preprocess` does better: `exif`,
`background`. They are off until a recipe asks for them, and teacher and student have them alike.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image

from edgeclip.config import BrokenRule
from edgeclip.device import image_file
from edgeclip.device.image_file import opened, refusing, unreadable

RESIZES = ("shortest", "squash")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ORIENTATION = 0x0112
"""EXIF's tag: how the camera was held"""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""what undoes each orientation (EXIF 2.3, 4.6.4)"""
SIDEWAYS = (5, 6, 7, 8)
"""orientations that exchange width and height"""
MOST_SIDE = 2048
"""px; published models take at most 1,024"""
LEAST_CROP = 0.1
LEAST_STD = 1e-4
MOST_LEVEL = 1e3
"""of a channel's mean and spread, in units of 0..1: beyond it float32 has no pixels left"""
MAX_RESIZED = 2**25
"""pixels between the resize and the crop: for 224, of an image 668 times as long as it is wide"""
Color = tuple[
    Annotated[int, Meta(ge=0, le=255)],
    Annotated[int, Meta(ge=0, le=255)],
    Annotated[int, Meta(ge=0, le=255)],
]
"""red, green, blue, 0..255"""


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
    exif: bool = False
    """Turn an image by its EXIF orientation before all else; false: take it as it is stored, as
    open_clip does."""
    background: Color | None = None
    """The color that a transparent image is laid on before the resize; null: its alpha is dropped
    after the resize, as open_clip does."""

    def __post_init__(self) -> None:
        """Raise `BrokenRule` for values that no transform has: built in code, a record is not
        checked by anything else."""
        _refuse_unless(isinstance(self.size, int) and 0 < self.size <= MOST_SIDE, "size", self.size)
        _refuse_unless(self.resize in RESIZES, "resize", self.resize)
        _refuse_unless(self.interpolation in FILTERS, "interpolation", self.interpolation)
        _refuse_unless(LEAST_CROP <= self.crop <= 1, "crop", self.crop)
        for name, values in (("mean", self.mean), ("std", self.std)):
            _refuse_unless(len(values) == 3 and all(map(_is_level, values)), name, values)
        _refuse_unless(min(self.std) >= LEAST_STD, "std", self.std)

    def options(self) -> list[str]:
        """Return the options that are on: those by which it is not open_clip's transform."""
        on = {"exif": self.exif, "background": self.background is not None}
        return [name for name, is_on in on.items() if is_on]


def _is_level(value: float | int) -> bool:
    return -MOST_LEVEL <= value <= MOST_LEVEL


def _refuse_unless(right: bool, field: str, value: object) -> None:
    if not right:
        raise BrokenRule(field, f"{field} is {value}", "correct it")


def open_image(source: Path | bytes, name: object = None) -> Image.Image:
    """Return an image decoded whole, in its file's own mode; of an animated one the first frame.

    name: what messages call it. Raises `EdgeclipError` for a missing file, and `UnreadableImage`
    for one that cannot be decoded: a truncated file is never padded with grey.
    """
    where = name
    if where is None:
        where = "image" if isinstance(source, bytes) else source
    if isinstance(source, Path):
        with refusing(where):
            source = image_file.read(source, where)
    image: Any
    with opened(source, where) as image:
        image.load()
        image.filename = str(where)  # what `to_pixels` calls it
        return image


def open_scaled(
    content: bytes,
    name: object,
    spec: Preprocess,
    least: Callable[[tuple[int, int]], tuple[int, int]],
) -> tuple[Image.Image, tuple[int, int]]:
    """Return an image, `prepared`, which may be decoded smaller, and its full size.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where that is no smaller than `least` of its full size:
    libjpeg-turbo then computes only the low frequencies of each block. Never for evaluation:
    `open_image` is exact. Raises `UnreadableImage`.
    """
    with opened(content, name) as image:
        sideways = spec.exif and orientation(image) in SIDEWAYS
        full = image.size[::-1] if sideways else image.size
        wanted = least(full)
        image.draft("RGB", wanted[::-1] if sideways else wanted)
        image.load()
        return prepared(image, spec), full


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none, or none that can be read.

    Reads the header alone. Of a TIFF it is 1: Pillow itself turns those when it loads them.
    """
    if image.format == "TIFF":
        return 1
    try:
        found = Image.Image.getexif(image).get(ORIENTATION)  # PngImageFile's decodes the image
    except Exception:  # a damaged tag does not make the image unreadable
        return 1
    return found if found in TURNS else 1


def prepared(image: Image.Image, spec: Preprocess) -> Image.Image:
    """Return an image turned and on a background, as `spec` asks; the same where it asks for
    neither, or the image has no tag and no transparency."""
    if spec.exif and orientation(image) in TURNS:
        image = image.transpose(TURNS[orientation(image)])
    if spec.background is not None and _is_transparent(image):
        flat = Image.new("RGBA", image.size, (*spec.background, 255))
        flat.alpha_composite(image.convert("RGBA"))
        image = flat.convert("RGB")
    return image


def _is_transparent(image: Image.Image) -> bool:
    """Return whether an image has alpha, in its mode, its palette or a color that is none."""
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        return True
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def to_pixels(image: Image.Image, spec: Preprocess) -> np.ndarray:
    """Return uint8 [H, W, 3] of the encoder's size.

    Raises `UnreadableImage` for an image of a mode that this Pillow cannot resize, as open_clip's
    transform does, and for one that is so thin that it would be larger than `MAX_RESIZED` between
    the resize and the crop.
    """
    where = getattr(image, "filename", "") or "image"
    with refusing(where):
        return np.asarray(_resized(prepared(image, spec), spec, where).convert("RGB"))


def _resized(image: Image.Image, spec: Preprocess, where: object) -> Image.Image:
    """Return an image of the encoder's size, in its own mode."""
    size = spec.size
    resample = FILTERS[spec.interpolation]
    side = math.floor(size / spec.crop)
    if spec.resize == "squash" and side == size:
        return image.resize((size, size), resample)

    # torchvision's arithmetic: the longer side is truncated, the crop's corner rounded half to even
    width, height = image.size
    if spec.resize == "squash":
        resized = (side, side)
    elif width <= height:
        resized = (side, int(side * height / width))
    else:
        resized = (int(side * width / height), side)
    if resized[0] * resized[1] > MAX_RESIZED:
        raise unreadable(where, f"{width} x {height} pixels are too thin for a crop of {size}")
    left = round((resized[0] - size) / 2.0)
    top = round((resized[1] - size) / 2.0)
    return image.resize(resized, resample).crop((left, top, left + size, top + size))


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
