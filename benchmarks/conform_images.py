"""Pixels of every image mode beside open_clip's own evaluation transform: files of all modes, whole
and with bytes changed or cut off. What open_clip opens must give its pixels, and what it refuses
must be refused in one line.
"""

import io
import warnings
from collections.abc import Iterator
from typing import Any

import compare
import numpy as np
from PIL import Image

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.preprocess import Preprocess, open_image, to_pixels
from edgeclip.host.evaluation import golden
from edgeclip.host.evaluation.conformance import ImageReference

SIZE = 64
MUTATED = {"whole": 2000, "quick": 200}
TIFF_MODES = ("PA", "YCbCr", "LAB", "RGBX", "I;16B", "I", "F")
"""what the golden images lack, because only TIFF holds it"""


def specs() -> list[Preprocess]:
    """Return each resize with each filter."""
    found = []
    for resize in ("shortest", "squash"):
        for interpolation in ("bicubic", "bilinear"):
            found.append(
                Preprocess(
                    size=SIZE,
                    mean=(0.48, 0.45, 0.40),
                    std=(0.26, 0.25, 0.27),
                    resize=resize,
                    interpolation=interpolation,
                )
            )
    return found


def files() -> dict[str, bytes]:
    """Return the files by name: the golden images of all kinds but the huge one, TIFF's modes,
    AVIF where Pillow has it."""
    found = {i.name: i.content for i in golden.images(SIZE) if i.kind != "huge"}
    found |= {f"tiff-{mode}": _tiff(mode) for mode in TIFF_MODES}
    Image.init()
    if "AVIF" in Image.SAVE:
        image = golden.scene(90, 120, 80)
        image.putalpha(image.getchannel(0))
        found["avif-alpha"] = _encoded(image, "AVIF")
    return found


def _tiff(mode: str) -> bytes:
    rng = np.random.default_rng(len(mode))
    size = (90, 70)
    if mode == "PA":
        image = golden.scene(91, *size).quantize(64).convert("PA")
        image.putalpha(golden.scene(92, *size).getchannel(0))
    else:
        blank = Image.new(mode, size)
        if mode == "F":
            content = rng.uniform(-40, 300, size).astype(np.float32).tobytes()
        elif mode == "I":
            content = rng.integers(-300, 70000, size).astype(np.int32).tobytes()
        else:
            content = rng.integers(0, 256, len(blank.tobytes()), np.uint8).tobytes()
        image = Image.frombytes(mode, size, content)
    return _encoded(image, "TIFF")


def _encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def mutated(of: dict[str, bytes], count: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` files with up to 7 bytes changed, and of every third the end cut off."""
    rng = np.random.default_rng(0)
    names = sorted(of)
    for i in range(count):
        name = names[i % len(names)]
        content = bytearray(of[name])
        for _ in range(rng.integers(1, 8)):
            content[rng.integers(0, len(content))] = rng.integers(0, 256)
        if rng.random() < 0.3:
            del content[rng.integers(1, len(content)) :]
        yield name, bytes(content)


def differs(content: bytes, spec: Preprocess, reference: ImageReference) -> str:
    """Return in what one file's pixels are not open_clip's; empty: in nothing."""
    expected = found = None
    try:
        expected = reference(content)
    except Exception:  # of damaged bytes Pillow makes any error
        expected = None
    try:
        found = to_pixels(open_image(content, "file"), spec)
    except UnreadableImage:
        found = None
    if expected is None or found is None:
        if expected is None and found is None:
            return ""
        return "open_clip opens it" if found is None else "open_clip refuses it"
    if np.array_equal(expected, found):
        return ""
    return f"up to {np.abs(expected.astype(int) - found).max()} levels"


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the required figures: how many files differ from open_clip, whole and mutated."""
    of = files()
    ways = [(spec, ImageReference(spec)) for spec in specs()]
    count = MUTATED["quick" if quick else "whole"]
    broken = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata that was hit
        whole = [
            f"{name}: {what}"
            for name, content in of.items()
            for spec, reference in ways
            if (what := differs(content, spec, reference))
        ]
        for i, (name, content) in enumerate(mutated(of, count)):
            what = differs(content, *ways[i % len(ways)])
            if what:
                broken.append(f"{name}, mutation {i}: {what}")
    for line in [*whole, *broken]:
        print(f"differs: {line}")
    title = f"{len(of)} image files, 4 ways: pixels other than open_clip's"
    return [
        compare.exact(title, len(whole), n=len(of) * len(ways), at_most=0),
        compare.exact("mutated files other than open_clip's", len(broken), n=count, at_most=0),
    ]
