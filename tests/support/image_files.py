"""Image files of every mode and format that Pillow writes, and of 16 bits, which it only reads."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

from edgeclip.device.image_file import FORMATS

MODES = (
    *("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"),
    *("HSV", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"),
)
"""every mode of Pillow's image core"""
ORIENTATION = 0x0112


def image_of(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels of a mode: every band, alpha and palette index takes all its values."""
    rng = np.random.default_rng(seed)
    shape = (height, width)
    if mode == "1":
        return Image.fromarray(rng.integers(0, 256, shape, np.uint8)).convert("1")
    if mode in ("P", "PA"):
        image = Image.frombytes("P", (width, height), rng.integers(0, 256, shape, np.uint8))
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        if mode == "PA":
            image = image.convert("PA")
            image.putalpha(Image.fromarray(rng.integers(0, 256, shape, np.uint8)))
        return image
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (width, height), rng.integers(0, 65536, shape, np.uint16))
    if mode == "I":
        return Image.fromarray(rng.integers(-300, 70000, shape, np.int32))
    if mode == "F":
        return Image.fromarray(rng.uniform(-40, 300, shape).astype(np.float32))
    if mode == "La":
        return image_of("LA", width, height, seed).convert("La")
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (*shape, bands), np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encoded(image: Image.Image, format: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, format, **settings)  # a writer leaves its settings in the image
    return buffer.getvalue()


def every_mode_and_format(width: int, height: int) -> dict[str, bytes]:
    """MODE.FORMAT to a file, for each pair of a format that is read that Pillow writes and opens
    again."""
    found = {}
    for mode in MODES:
        image = image_of(mode, width, height)
        for format in FORMATS:
            try:
                content = encoded(image, format)
                Image.open(io.BytesIO(content)).close()
            except Exception:
                continue  # a pair that this Pillow does not have
            found[f"{mode}.{format}"] = content
    return found


def specials(width: int, height: int) -> dict[str, bytes]:
    """What a mode and a format do not say: clear colors, profiles, tags, frames, 16 bits."""
    rgb, colors = image_of("RGB", width, height, 1), image_of("P", width, height, 1)
    few = rgb.point(lambda level: 190 if level > 127 else 60)  # so that a clear color is met often
    rgba = image_of("RGBA", width, height, 2)
    clear = bytes(np.random.default_rng(3).integers(0, 256, 256, np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    found = {
        "P-clear-color.PNG": encoded(colors, "PNG", transparency=7),
        "P-clear-table.PNG": encoded(colors, "PNG", transparency=clear),
        "P-clear.GIF": encoded(colors, "GIF", transparency=7),
        "RGB-clear.PNG": encoded(few, "PNG", transparency=(190, 60, 190)),
        "L-clear.PNG": encoded(few.getchannel(0), "PNG", transparency=190),
        "1-clear.PNG": encoded(image_of("1", width, height), "PNG", transparency=1),
        "16-bit-clear.PNG": png_of_16_bits(_deep(width, height, 1), clear=True),
        "16-bit-grey-alpha.PNG": png_of_16_bits(_deep(width, height, 2)),
        "16-bit-rgb.PNG": png_of_16_bits(_deep(width, height, 3)),
        "16-bit-rgba.PNG": png_of_16_bits(_deep(width, height, 4)),
        "CMYK-profile.JPEG": encoded(image_of("CMYK", width, height), "JPEG", icc_profile=profile),
        "RGB-profile.PNG": encoded(rgb, "PNG", icc_profile=profile),
        "P-lossless.WEBP": encoded(rgba, "WEBP", lossless=True, exact=True),
        "RGB-lzw.TIFF": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "1-fax.TIFF": encoded(image_of("1", width, height), "TIFF", compression="group4"),
        "RGBA-progressive.JPEG": encoded(rgb, "JPEG", progressive=True),
    }
    for format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        first = {"MPO": rgb, "GIF": colors}.get(format, rgba)
        second = image_of(first.mode, width, height, 9)
        try:
            content = encoded(first, format, save_all=True, append_images=[second])
        except (OSError, KeyError):
            continue  # no AVIF here
        found[f"animated.{format}"] = content
    for tag in range(1, 9):
        found |= {f"turned-{tag}.{name}": c for name, c in turned(rgb, tag).items()}
    return found


def turned(image: Image.Image, tag: int, formats=("JPEG", "PNG", "WEBP", "TIFF")) -> dict:
    """Format to a file of the image with an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    return {format: encoded(image, format, exif=exif) for format in formats}


def _deep(width: int, height: int, channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 65536, (height, width, channels), np.uint16)


def png_of_16_bits(pixels: np.ndarray, clear: bool = False) -> bytes:
    """A PNG of uint16 [H, W, C]; clear: its first grey value is a color that is not seen."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    if clear:
        chunks.insert(1, (b"tRNS", pixels[0, 0].astype(">u2").tobytes()))
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        check = struct.pack(">I", zlib.crc32(name + body))
        out += struct.pack(">I", len(body)) + name + body + check
    return out


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with some bytes changed, or its end cut off, or both."""
    broken = bytearray(content)
    for _ in range(rng.integers(0, 8)):
        broken[rng.integers(0, len(broken))] = rng.integers(0, 256)
    if rng.random() < 0.3:
        del broken[rng.integers(1, len(broken)) :]
    return bytes(broken)
