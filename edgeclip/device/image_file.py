"""The one door to every image file: what is opened, how large it may be, and what a damaged one is.

An image comes from a stranger, and its header may lie. Only `FORMATS` are tried (Pillow also knows
EPS, which starts Ghostscript, whatever the file is called), the limits are asked of the header
before anything is decoded, and whatever a decoder raises is an `UnreadableImage`, which data
loading counts. benchmarks/fuzz.py tries it.
"""

import contextlib
import errno
import importlib.util
import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from edgeclip.device import other_formats
from edgeclip.errors import EdgeclipError

AVIF = ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()
"""Pillow has it from 11.3 on"""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", *AVIF)
"""all that are tried, by Pillow's names; JPEG is MPO too"""
MAX_BYTES = 2**29
"""of a file: as many as the largest image has when it is decoded"""
MAX_PIXELS = 2**27
"""of an image as it is stored; the largest cameras have 1e8. It takes a GiB at most."""
COPIES = {"WEBP": 2, "AVIF": 2, "JPEG2000": 4}
"""formats whose decoders hold so many images at once, so that the most pixels are so many fewer"""
MAX_SIDE = 2**16
"""pixels of width or height: Pillow keeps a list of rows"""
MAX_SCANS = 100
"""of a JPEG; a progressive one has about 10. Each costs the time of the whole image, and a few
bytes."""
SCAN = re.compile(rb"\xff\xda")
"""what begins a scan; within one it cannot occur"""
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""what a machine lacks: open files, memory"""
TILE = (0x0142, 0x0143)
"""TIFF's tags: width and height of a tile"""

# They are about damage that is judged here, and one for each image would fill memory and screen.
for category in (UserWarning, RuntimeWarning):
    warnings.filterwarnings("ignore", category=category, module=r"PIL\.")


class UnreadableImage(EdgeclipError):
    """An image that cannot be decoded: data loading counts these, a command stops at them."""


@contextlib.contextmanager
def refusing(where: object, source: Path | bytes | None = None) -> Iterator[None]:
    """Raise what Pillow raises inside as `UnreadableImage`, and a missing file as `EdgeclipError`.

    where: what the message calls the image. source: what it is read from. What a machine lacks is
    not the image's fault: it is raised as it is.
    """
    try:
        yield
    except EdgeclipError:
        raise
    except FileNotFoundError:
        raise EdgeclipError(where, "there is no such file", "check the path") from None
    except Exception as e:
        if isinstance(e, OSError) and e.errno in LACKING:
            raise
        found = None
        if source is not None and isinstance(e, UnidentifiedImageError):
            found = other_formats.named(source)
        if found is not None:
            what = f"unreadable image (it is {found[0]})"
            raise UnreadableImage(where, what, found[1]) from None
        # Of damaged bytes a plugin makes any error that Python has.
        why = " ".join(str(e).split()) or type(e).__name__
        raise unreadable(where, why) from None


def unreadable(where: object, why: str) -> UnreadableImage:
    """Return the error for an image that is refused."""
    return UnreadableImage(where, f"unreadable image ({why})", "replace or remove it")


@contextlib.contextmanager
def opened(source: Path | bytes, where: object) -> Iterator[Image.Image]:
    """Yield an image of which only the header was read.

    where: what messages call it. Raises `EdgeclipError` for a missing file, and `UnreadableImage`
    for one that is none of `FORMATS` or larger than it may be, and for what is raised inside.
    """
    file: Any = source
    if isinstance(source, bytes):
        _refuse_long(len(source), where)
        file = io.BytesIO(source)
    with refusing(where, source), Image.open(file, formats=FORMATS) as image:
        most = MAX_PIXELS // COPIES.get(str(image.format), 1)
        _refuse_large(image.size, most, where)
        if image.format == "TIFF":  # a small image may have a huge tile
            tags: Any = image.getexif()
            _refuse_large([int(tags.get(tag, 1)) for tag in TILE], most, where)
        if image.format in ("JPEG", "MPO") and isinstance(source, bytes):
            _refuse_scans(source, where)
        yield image


def read(path: Path, where: object, start: int = 0, size: int = -1) -> bytes:
    """Return `size` bytes of a file from `start` on, or what there is of them; -1: to its end.

    Raises `UnreadableImage` for more than an image may have, and what reading a file raises.
    """
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        if size < 0 and stat.S_ISREG(facts.st_mode):
            size = max(0, facts.st_size - start)
        if size < 0:  # a pipe, whose length nobody knows
            size = MAX_BYTES + 1
        else:
            _refuse_long(size, where)
        if start:
            file.seek(start)
        content = file.read(size)
    _refuse_long(len(content), where)
    return content


def _refuse_long(size: int, where: object) -> None:
    if size > MAX_BYTES:
        raise unreadable(where, f"more than {MAX_BYTES:,} bytes")


def _refuse_large(size: Sequence[int], most: int, where: object) -> None:
    stored = f"{size[0]:,} x {size[1]:,} pixels"
    if max(size) > MAX_SIDE:
        raise unreadable(where, f"{stored}, and {MAX_SIDE:,} is the longest side")
    if math.prod(size) > most:
        raise unreadable(where, f"{stored}, and {most:,} are the most")


def _refuse_scans(content: bytes, where: object) -> None:
    for count, _ in enumerate(SCAN.finditer(content), 1):
        if count > MAX_SCANS:
            raise unreadable(where, f"a JPEG of more than {MAX_SCANS} scans")
