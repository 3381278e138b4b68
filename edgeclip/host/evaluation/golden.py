"""The golden images and strings of the conformance pack: every kind that a user's files may be of.

Drawn from numbers, so that nothing has to be shipped, and equal on every machine up to what its
Pillow encodes; the bytes that count are those in a pack. A scene has what a wrong resize shows at:
hard edges, stripes finer than a pixel of the result, other colors in every corner (a swapped
channel, a turned or mirrored image).
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
"""EXIF's tag"""


class GoldenImage(NamedTuple):
    name: str
    kind: str
    suffix: str
    """of its file"""
    content: bytes
    """encoded"""


def images(size: int) -> Iterator[GoldenImage]:
    """Yield the golden images for an encoder's input of `size` pixels a side."""
    for draw in (_color_and_grey, _modes, _files, _sizes):
        yield from draw(size)


def scene(seed: int, width: int, height: int) -> Image.Image:
    """Return an RGB image: a ramp in every channel, stripes, a disk and a box."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    across = x / max(width - 1, 1)
    down = y / max(height - 1, 1)
    corners = rng.integers(0, 256, (4, 3)).astype(np.float32)

    near, far, left, right = corners[:, None, None, :]
    top = near + (far - near) * across[..., None]
    bottom = left + (right - left) * across[..., None]
    pixels = top + (bottom - top) * down[..., None]

    stripes = (x + 2 * y).astype(np.int64) % 3 == 0
    pixels[stripes & (down > 0.6)] = rng.integers(0, 256, 3)
    disk = (across - 0.3) ** 2 + (down - 0.35) ** 2 < 0.04
    pixels[disk] = rng.integers(0, 256, 3)
    box = (abs(across - 0.7) < 0.15) & (abs(down - 0.4) < 0.2)
    pixels[box] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _encoded(image: Image.Image, format: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def _color_and_grey(size: int) -> Iterator[GoldenImage]:
    yield GoldenImage("rgb-wide", "rgb", ".png", _encoded(scene(1, 320, 240), "PNG"))
    yield GoldenImage("rgb-tall", "rgb", ".png", _encoded(scene(2, 240, 320), "PNG"))
    yield GoldenImage("rgb-as-it-is", "rgb", ".png", _encoded(scene(3, size, size), "PNG"))
    plain = _encoded(scene(4, 400, 300), "JPEG", quality=85)
    yield GoldenImage("rgb-jpeg-420", "rgb", ".jpg", plain)
    fine = _encoded(scene(5, 300, 400), "JPEG", quality=95, subsampling=0)
    yield GoldenImage("rgb-jpeg-444", "rgb", ".jpg", fine)
    webp = _encoded(scene(6, 350, 350), "WEBP", quality=90)
    yield GoldenImage("rgb-webp", "rgb", ".webp", webp)

    grey = scene(7, 320, 240).convert("L")
    yield GoldenImage("grey-png", "grey", ".png", _encoded(grey, "PNG"))
    grey = scene(8, 240, 320).convert("L")
    yield GoldenImage("grey-jpeg", "grey", ".jpg", _encoded(grey, "JPEG", quality=90))


def _modes(size: int) -> Iterator[GoldenImage]:
    for i, seed in enumerate((11, 12)):
        inks = np.array(scene(seed, 320, 240).convert("CMYK"))
        inks[..., 3] = inks[..., 3] // 2 + 40
        ink = Image.frombytes("CMYK", (320, 240), inks.tobytes())
        yield GoldenImage(f"cmyk-{i}", "cmyk", ".jpg", _encoded(ink, "JPEG", quality=92))

    yield GoldenImage("alpha-ramp", "alpha", ".png", _encoded(_with_alpha(13, "RGB"), "PNG"))
    yield GoldenImage("alpha-grey", "alpha", ".png", _encoded(_with_alpha(14, "L"), "PNG"))
    webp = _encoded(_with_alpha(15, "RGB"), "WEBP", lossless=True, exact=True)
    yield GoldenImage("alpha-webp", "alpha", ".webp", webp)
    yield GoldenImage("alpha-cut-out", "alpha", ".png", _encoded(_cut_out(16), "PNG"))

    deep = np.asarray(scene(17, 320, 240).convert("L"), np.uint16) * 257
    yield GoldenImage("16-bit-grey", "16-bit", ".png", _encoded(Image.fromarray(deep), "PNG"))
    dark = deep // 200
    yield GoldenImage("16-bit-dark", "16-bit", ".png", _encoded(Image.fromarray(dark), "PNG"))
    color = np.asarray(scene(18, 320, 240), np.uint16) * 256 + 77
    yield GoldenImage("16-bit-rgb", "16-bit", ".png", _png_of_16_bits(color))

    colors = scene(19, 320, 240).quantize(64)
    yield GoldenImage("palette-png", "palette", ".png", _encoded(colors, "PNG"))
    yield GoldenImage("palette-clear", "palette", ".png", _encoded(colors, "PNG", transparency=3))
    yield GoldenImage("palette-gif", "palette", ".gif", _encoded(colors, "GIF"))
    bits = scene(20, 320, 240).convert("1")
    yield GoldenImage("palette-1-bit", "palette", ".png", _encoded(bits, "PNG"))


def _with_alpha(seed: int, mode: str) -> Image.Image:
    """Return a scene that fades from clear at the left to opaque at the right."""
    image = scene(seed, 320, 240).convert(mode)
    ramp = np.broadcast_to(np.linspace(0, 255, 320).round().astype(np.uint8), (240, 320))
    image.putalpha(Image.fromarray(np.ascontiguousarray(ramp)))
    return image


def _cut_out(seed: int) -> Image.Image:
    """Return a scene of which only a disk is not clear, with colors below what is clear."""
    image = scene(seed, 240, 320)
    y, x = np.mgrid[0:320, 0:240]
    inside = (x - 120) ** 2 + (y - 160) ** 2 < 90**2
    image.putalpha(Image.fromarray(inside.astype(np.uint8) * 255))
    return image


def _png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Return a PNG of uint16 [H, W, 3], which Pillow reads and cannot write (PNG, 11.2)."""
    height, width, _ = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        check = struct.pack(">I", zlib.crc32(name + body))
        out += struct.pack(">I", len(body)) + name + body + check
    return out


def _files(size: int) -> Iterator[GoldenImage]:
    for orientation in range(2, 9):
        image = scene(30 + orientation, 200, 150)
        exif = image.getexif()
        exif[ORIENTATION] = orientation
        content = _encoded(image, "JPEG", quality=90, exif=exif)
        yield GoldenImage(f"exif-{orientation}", "exif", ".jpg", content)

    frames = [scene(seed, 160, 120) for seed in (40, 41, 42)]
    more: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 100}
    for format, suffix in (("GIF", ".gif"), ("PNG", ".png"), ("WEBP", ".webp")):
        content = _encoded(frames[0], format, **more)
        yield GoldenImage(f"animated-{format.lower()}", "animated", suffix, content)

    content = _encoded(scene(43, 320, 240), "JPEG", quality=85, progressive=True)
    yield GoldenImage("progressive-rgb", "progressive", ".jpg", content)
    grey = scene(44, 240, 320).convert("L")
    content = _encoded(grey, "JPEG", quality=85, progressive=True)
    yield GoldenImage("progressive-grey", "progressive", ".jpg", content)


def _sizes(size: int) -> Iterator[GoldenImage]:
    odd = [(size + 1, size), (size - 1, size + 3), (2 * size + 1, 2 * size - 1)]
    odd += [(333, 517), (7, 5), (2, 3)]
    for i, (width, height) in enumerate(odd):
        content = _encoded(scene(50 + i, width, height), "PNG")
        yield GoldenImage(f"odd-size-{i}", "odd size", ".png", content)

    dot = Image.new("RGB", (1, 1), (200, 30, 90))
    yield GoldenImage("1-px-rgb", "1 px", ".png", _encoded(dot, "PNG"))
    yield GoldenImage("1-px-grey", "1 px", ".png", _encoded(dot.convert("L"), "PNG"))
    yield GoldenImage("1-px-high", "1 px", ".png", _encoded(scene(60, 5, 1), "PNG"))

    for i, (width, height) in enumerate([(400, 4), (4, 400), (1000, 20)]):
        content = _encoded(scene(70 + i, width, height), "PNG")
        yield GoldenImage(f"extreme-aspect-{i}", "extreme aspect", ".png", content)

    large = scene(80, 1000, 750).resize((4000, 3000), Image.Resampling.BICUBIC)
    yield GoldenImage("huge-12-mp", "huge", ".jpg", _encoded(large, "JPEG", quality=85))


STRINGS: dict[str, Callable[[int], list[str]]] = {
    "plain": lambda length: [
        "a photo of a cat",
        "two people shaking hands, in front",
        "it's what we've got",
        "isn't it? he'd go!",
        'a sign that says "stop"',
        "3 apples (50 % off)",
        "a+b=c",
        "cat",
    ],
    "capitals": lambda length: ["A Photo Of A CAT", "NASA", "iPhone by Apple, USA", "DON'T STOP"],
    "white space": lambda length: ["  both ends  ", "in   the\t middle\nand below", "a\r\ncat"],
    "empty": lambda length: ["", "   ", "\n"],
    "over-long": lambda length: [
        " ".join(["cat"] * (length - 2)),
        " ".join(["cat"] * (length - 1)),
        " ".join(["a red umbrella"] * length),
        "supercalifragilistic" * 20,
    ],
    "emoji": lambda length: [
        "a \U0001f600 face",
        "\u2764\ufe0f",
        "\U0001f468\u200d\U0001f680 flag",
    ],
    "accents": lambda length: [
        "d\u00e9j\u00e0 vu, na\u00efve fa\u00e7ade",
        "re\u0301sume\u0301 na\u0131\u0308ve",
        "\u00dcber stra\u00dfe \u00c5ngstr\u00f6m \u0130stanbul",
        "\u0440\u0443\u0441\u0441\u043a\u0438\u0439",
        "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    ],
    "cjk": lambda length: [
        "\u732b\u306e\u5199\u771f",
        "\u4e00\u53ea\u7ea2\u8272\u7684\u96e8\u4f1e",
        "\ud55c\uad6d\uc5b4 \uace0\uc591\uc774",
        "\uff21 \uff43\uff41\uff54 \uff11",
    ],
    "control characters": lambda length: [
        "a\x00cat",
        "a \x07red\x1b[31m umbrella",
        "zero\u200bwidth \ufeffmark",
        "right \u202eto left",
        "a\u00a0hard space",
        "a cat\x7f\u0085 and below",
    ],
    "html entities": lambda length: [
        "salt &amp; pepper",
        "&lt;b&gt; cat",
        "&amp;amp; twice",
        "it&#39;s na&iuml;ve",
    ],
    "typography": lambda length: [
        "\u201cquoted\u201d \u2018and\u2019 don\u2019t",
        "ellipsis\u2026 dash \u2014 en \u2013",
        "o\ufb03ce \ufb01sh",
        "na\u00c3\u00afve, decoded twice",
        "\u00bd \u00b2 \u2122 \u2460",
    ],
}
"""kind, to its strings for a text encoder of so many tokens"""


class GoldenText(NamedTuple):
    name: str
    kind: str
    text: str


def texts(context_length: int) -> list[GoldenText]:
    """Return the golden strings for a text encoder of so many tokens."""
    found = []
    for kind, make in STRINGS.items():
        for i, text in enumerate(make(context_length)):
            found.append(GoldenText(f"{kind.replace(' ', '-')}-{i}", kind, text))
    return found
