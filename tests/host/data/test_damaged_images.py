"""Damaged images of every format are counted skips, and one among the first stops no export."""

import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import index_folder, load_first
from edgeclip.device.preprocess import Preprocess, open_image, open_scaled
from edgeclip.errors import EdgeclipError
from tests.support.images import encoded, toy_image

SPEC = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
WRITTEN = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"]
WRITTEN += ["AVIF"] * features.check("avif")


def decoded(content):
    """The image's size, or None where it is refused as unreadable; any other error is a failure."""
    sizes = []
    for way in (open_image, lambda c, n: open_scaled(c, n, SPEC, lambda full: full)[0]):
        try:
            sizes.append(way(content, "x.jpg").size)
        except UnreadableImage as e:
            assert str(e).startswith("x.jpg: unreadable image ("), e
            assert "image ()" not in str(e)
            sizes.append(None)
    return sizes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITTEN)
def test_damage_of_any_format_is_an_unreadable_image(kind):
    rng = random.Random(kind)
    whole = encoded(toy_image(1, 48, 40), kind)
    assert decoded(whole) == [(48, 40)] * 2
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        way = rng.choice(["cut", "flip", "flip", "zeros"])
        if way == "cut":
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.randint(1, 8) if way == "flip" else 0):
            content[rng.randrange(min(len(content), 300))] = rng.randrange(256)
        if way == "zeros":
            start = rng.randrange(len(content))
            content[start : start + 64] = bytes(len(content[start : start + 64]))
        refused += None in decoded(bytes(content))
    assert refused
    assert decoded(b"") == [None, None] == decoded(whole[: len(whole) // 10])


@pytest.mark.parametrize("error", [
    struct.error("x"), IndexError("x"), KeyError("x"), MemoryError(), zlib.error("x"), EOFError(),
    RuntimeError("x"), TypeError("x"), AttributeError("x"), RecursionError(), ZeroDivisionError(),
    NotImplementedError(), OverflowError("x"), AssertionError(), SyntaxError("x"), OSError(),
    Image.DecompressionBombError("x"), UnicodeDecodeError("utf-8", b"x", 0, 1, "x"),
], ids=lambda e: type(e).__name__)  # fmt: skip
def test_whatever_a_plugin_raises_is_an_unreadable_image(error):
    """A plugin of Pillow that takes a format's place, and fails at the pixels."""

    class Failing(Image.Image):
        def __init__(self, file, name):
            super().__init__()
            self._mode, self._size = "RGB", (4, 4)
            self.format = "FAILING"

        def load(self):
            raise error

        def draft(self, mode, size):
            return None

    assert decoded(b"") == [None, None]  # every plugin is there from now on
    own = Image.OPEN["PPM"]
    Image.OPEN["PPM"] = Failing, lambda start: start.startswith(b"failing!")
    try:
        assert decoded(b"failing!") == [None, None]
    finally:
        Image.OPEN["PPM"] = own


def test_a_decompression_bomb_is_an_unreadable_image():
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    assert decoded(bomb) == [None, None]


# The first images --------------------------------------------------------------------------------


def photos(folder, count, damaged=()):
    folder.mkdir()
    for i in range(count):
        content = encoded(toy_image(i, 16, 16))
        (folder / f"{i:03d}.png").write_bytes(content[:40] if i in damaged else content)
    return index_folder(folder)


def test_the_first_readable_images_are_taken_and_the_count_is_judged_over_all(tmp_path, capsys):
    images = photos(tmp_path / "a", 200, damaged=(1, 3))
    places, pixels = load_first(images, range(200), 4, SPEC)
    assert places == [0, 2, 4, 5]
    assert [p.shape for p in pixels] == [(8, 8, 3)] * 4
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [
        " 001.png",
        " 003.png",
    ]
    with pytest.raises(EdgeclipError, match="2 of 100 images are unreadable, more than 1%"):
        load_first(images[:100], range(100), 4, SPEC)
    assert load_first([], [], 4, SPEC) == ([], [])
    assert load_first(images[4:7], [2, 0], 9, SPEC)[0] == [2, 0]


def test_one_damaged_image_among_the_first_does_not_stop_an_export(tmp_path):
    from edgeclip.device.target import Calibration
    from edgeclip.host.export import calibration
    from edgeclip.host.export.source import GOLDEN, from_model

    order = np.random.default_rng(0).permutation(120)
    worst = int(order[0])  # the first that calibration asks for, and among the golden ones
    rename = {worst: 0, 0: worst}
    images = photos(tmp_path / "a", 120, damaged=(worst,))
    images = [images[rename.get(i, i)] for i in range(120)]
    pool = photos(tmp_path / "b", 120, damaged=(2,))
    source = from_model("test_vit", "random", [], tmp_path / "b")
    assert [p.key for p in source.golden] == [p.key for p in pool if p.key != "002.png"][:GOLDEN]

    images = photos(tmp_path / "c", 120, damaged=(worst,))
    source = source._replace(calibration=lambda: images)
    drawn = calibration.draw(source, Calibration(images=32, judged_on=8, seed=0))
    assert len(drawn.ranges) == 32 and len(drawn.judged) == 8
    keys = [image.key for image in drawn.used]
    assert len(set(keys)) == 40 and f"{worst:03d}.png" not in keys
    expected = sorted(int(i) for i in order[1:33])
    assert keys[:32] == [f"{i:03d}.png" for i in expected]
