"""What a stranger's image can ask for: memory, time, a program, an end of the run. It gets none."""

import ast
import base64
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from edgeclip.device import image_file
from edgeclip.device.image_file import FORMATS, MAX_BYTES, MAX_PIXELS, MAX_SCANS, UnreadableImage
from edgeclip.device.images import ImageRef, load_pixels, read
from edgeclip.device.preprocess import (
    MAX_RESIZED,
    Preprocess,
    open_image,
    open_scaled,
    orientation,
    to_pixels,
)
from tests.support.files import REPO
from tests.support.image_files import damaged, encoded
from tests.support.images import toy_image

# Pillow's warnings are what is tried here; the package's own filter is not pytest's.
pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = Preprocess(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
WIDTH, HEIGHT = 301, 303
"""of the images whose headers are made to lie; no other field has these numbers"""


def png(width, height, rows):
    """A grey PNG of `rows` black rows, whatever its header says."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes((width + 1) * rows), 9)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + content))
        out += struct.pack(">I", len(content)) + kind + content + check
    return out


def tiff(width, height, tile):
    """A grey TIFF of one tile, which is `tile` pixels wide and high."""
    body = zlib.compress(bytes(1000))
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, tile), (323, tile), (324, 8), (325, len(body))]
    head = b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags))
    return head + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags) + bytes(4)


def webp(width, height):
    """An animated WebP whose canvas is that large, and its one frame 16 pixels."""
    frame = encoded(Image.new("RGBA", (16, 16), (1, 2, 3, 4)), "WEBP", lossless=True)[12:]
    frame = frame[frame.index(b"VP8L") :]

    def number(value):
        return struct.pack("<I", value)[:3]

    chunks = [
        (b"VP8X", bytes([0x12, 0, 0, 0]) + number(width - 1) + number(height - 1)),
        (b"ANIM", bytes(6)),
        (b"ANMF", bytes(6) + number(15) + number(15) + number(10) + b"\0" + frame),
    ]
    body = b"WEBP"
    for kind, content in chunks:
        body += kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lying(kind, pattern, width, height):
    """A small image of a format whose header says that it is so large."""
    content = encoded(toy_image(0, WIDTH, HEIGHT), kind)
    own, theirs = (WIDTH, HEIGHT), (width, height)
    if kind in ("JPEG",):
        own, theirs = own[::-1], theirs[::-1]
    assert struct.pack(pattern, *own) in content
    return content.replace(struct.pack(pattern, *own), struct.pack(pattern, *theirs))


def jpeg2000(width, height):
    content = lying("JPEG2000", ">II", width, height)
    return content.replace(struct.pack(">II", HEIGHT, WIDTH), struct.pack(">II", height, width))


BOMBS = {
    "PNG": png(11_600, 11_600, 1),
    "PNG-limit": png(60_000, 60_000, 1),
    "PNG-tall": png(1, 20_000, 20_000),
    "PNG-wide": png(20_000, 1, 1),
    "PNG-side": png(1, 100_000_000, 1),
    "JPEG": lying("JPEG", ">HH", 11_600, 11_600),
    "GIF": lying("GIF", "<HH", 65_535, 65_535),
    "BMP": lying("BMP", "<ii", 11_600, 11_600),
    "PPM": b"P6 11600 11600 255\n" + bytes(1000),
    "TIFF": tiff(11_600, 11_600, 16),
    "TIFF-tile": tiff(10, 10, 40_000),
    "TIFF-tile-side": tiff(10, 10, 2**31),
    "WEBP": webp(16_383, 16_383),
    "WEBP-11000": webp(11_000, 11_000),
    "JPEG2000": jpeg2000(9_000, 9_000),
}
if "AVIF" in FORMATS:
    BOMBS["AVIF"] = lying("AVIF", ">II", 11_600, 11_600)

PEAK = """
import base64, json, sys
from edgeclip.device.preprocess import Preprocess, open_image, to_pixels
from edgeclip.errors import EdgeclipError

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

spec = Preprocess(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
found = {}
bombs = json.load(sys.stdin)
for name, content in bombs.items():
    before = peak()
    try:
        to_pixels(open_image(base64.b64decode(content), name), spec)
        why = "opened"
    except EdgeclipError as e:
        why = str(e)
    found[name] = [why, peak() - before]
print(json.dumps(found))
"""


def test_a_bomb_of_any_format_is_refused_before_it_takes_memory():
    assert {name.split("-")[0] for name in BOMBS} == set(FORMATS)
    given = {name: base64.b64encode(content).decode() for name, content in BOMBS.items()}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], input=json.dumps(given), capture_output=True, text=True
    )
    found = json.loads(done.stdout or done.stderr)
    assert {n: why for n, (why, _) in found.items() if "pixels" not in why} == {}
    assert {n: mib for n, (_, mib) in found.items() if mib > 64} == {}


def theirs(image, size):
    pytest.importorskip("torchvision", reason="the reference is the host's")
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    resized = Resize(size, InterpolationMode.BICUBIC)(image)
    return np.asarray(CenterCrop(size)(resized).convert("RGB"))


@pytest.mark.parametrize("turned", [False, True])
def test_the_longest_images_that_are_read_are_torchvisions(turned):
    spec = Preprocess(size=64, mean=SPEC.mean, std=SPEC.std)
    longest = MAX_RESIZED // 64**2
    image = toy_image(1, 1, longest)
    beyond = toy_image(1, 1, longest + 1)
    if turned:
        image, beyond = (i.transpose(Image.Transpose.ROTATE_90) for i in (image, beyond))
    np.testing.assert_array_equal(to_pixels(image, spec), theirs(image, 64))
    with pytest.raises(UnreadableImage, match=r"image: .* too thin for a crop of 64"):
        to_pixels(beyond, spec)


def test_what_pillow_opens_besides_is_refused_and_starts_no_program(tmp_path, monkeypatch):
    started = tmp_path / "started"
    for name in ("gs", "gswin32c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {started}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    Image.init()
    tried = set()
    for kind in sorted(Image.SAVE):
        if kind in (*FORMATS, "MPO", "DIB", "JPEG2000"):
            continue
        for mode in ("RGB", "L", "F"):
            try:
                content = encoded(toy_image(0).convert(mode), kind)
                Image.open(io.BytesIO(content)).close()
            except (OSError, ValueError, KeyError):
                continue
            tried.add(kind)
            with pytest.raises(UnreadableImage, match=r"x\.jpg: unreadable image"):
                open_image(content, "x.jpg")
    assert {"EPS", "TGA", "ICO", "PCX"} <= tried
    assert not started.exists()


def scans(count):
    """A progressive JPEG whose last scan comes again and again, to have `count` of them."""
    content = encoded(toy_image(0), "JPEG", progressive=True)
    own = content.count(b"\xff\xda")
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (count - own) + content[-2:]


def test_a_jpeg_of_many_scans_is_refused():
    assert scans(MAX_SCANS).count(b"\xff\xda") == MAX_SCANS
    assert open_image(scans(MAX_SCANS)).size == toy_image(0).size
    for way in (open_image, lambda c, n: open_scaled(c, n, SPEC, lambda full: full)):
        with pytest.raises(UnreadableImage, match=r"x: .* more than 100 scans"):
            way(scans(MAX_SCANS + 1), "x")


def test_a_file_that_is_longer_than_an_image_can_be_is_not_read(tmp_path):
    path = tmp_path / "a.jpg"
    with path.open("wb") as file:
        file.truncate(20 * 2**30)
    for image in (
        ImageRef("a", str(path)),
        ImageRef("a", str(path), 0, MAX_BYTES + 1),
        ImageRef("a", str(path), 512, 2**70),
    ):
        with pytest.raises(UnreadableImage, match=f"more than {MAX_BYTES:,} bytes"):
            read(image)
    with pytest.raises(UnreadableImage, match=f"{path}: .*more than"):
        open_image(path)
    for start in (-1, 2**70):
        with pytest.raises(UnreadableImage, match=r"a.jpg \(a\): cannot be read"):
            read(ImageRef("a", str(path), start, 10))
    with pytest.raises(UnreadableImage, match="cannot be read"):
        read(ImageRef("a", "a\0b"))


def test_a_decoders_warning_ends_no_run_and_changes_no_pixel():
    """Pillow warns of alpha in a palette when it makes RGB of it, and of damaged tags."""
    colors = toy_image(0).convert("P")
    warning = encoded(colors, "PNG", transparency=bytes(range(256)))
    exif = encoded(toy_image(0), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    code = """
import sys
from PIL import Image
from edgeclip.device.preprocess import Preprocess, open_image, prepared, to_pixels
spec = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), exif=True)
for name in sys.argv[1:]:
    content = bytes.fromhex(name)
    print(to_pixels(open_image(content, "x"), spec).tobytes().hex())
"""
    arguments = [warning.hex(), exif.hex()]
    answers = []
    for options in (["-W", "error"], ["-W", "ignore"]):
        done = subprocess.run(
            [sys.executable, *options, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_mutations_of_every_format_are_images_or_unreadable(kind):
    rng = np.random.default_rng(random.Random(kind).randrange(2**32))
    whole = encoded(toy_image(2, 40, 48), kind)
    extremes = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
    refused = 0
    for _ in range(60):
        content = bytearray(damaged(whole, rng))
        at = int(rng.integers(0, max(1, min(len(content) - 4, 200))))
        content[at : at + 4] = struct.pack("<>"[rng.integers(2)] + "I", rng.choice(extremes))
        try:
            image = open_image(bytes(content), "x")
            assert 1 <= orientation(image) <= 8
            assert to_pixels(image, SPEC).shape == (224, 224, 3)
        except UnreadableImage as e:
            refused += 1
            assert str(e).startswith("x: ")
            assert "\n" not in str(e)
    assert refused


def test_pixels_of_a_reference_are_refused_by_its_key(tmp_path):
    (tmp_path / "a.png").write_bytes(BOMBS["PNG"])
    with pytest.raises(UnreadableImage, match=f"k: .*{MAX_PIXELS:,} are the most"):
        load_pixels(ImageRef("k", str(tmp_path / "a.png")), SPEC)


PEERS = ("cold_start_peers", "data.py")
"""what others' loaders do is measured as they do it"""


def opens(path):
    """The lines that open an image by Pillow itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
            yield f"{path.relative_to(REPO)}:{node.lineno}"


def test_every_image_comes_through_one_door():
    paths = [*(REPO / "edgeclip").rglob("*.py"), *(REPO / "benchmarks").rglob("*.py")]
    found = []
    for path in paths:
        if path.name not in PEERS and path.parent.name not in PEERS:
            found += opens(path)
    assert [line.split(":")[0] for line in found] == ["edgeclip/device/image_file.py"]
    assert list(opens(REPO / image_file.__file__))
