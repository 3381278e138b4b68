"""A file that is no image is called what it is, whatever it is named; an image never is."""

import io

import pytest
from PIL import Image, features

from edgeclip.device import other_formats
from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import ImageRef, load_pixels
from edgeclip.device.preprocess import Preprocess, open_image
from tests.support.images import toy_image

SPEC = Preprocess(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
FILES = {
    "a HEIC photo": b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(99),
    "a film": b"\0\0\0\x18ftypmp42" + bytes(99),
    "a web page": b"\n<!DOCTYPE html><html>404</html>",
    "a drawing (SVG)": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "a PDF document": b"%PDF-1.7\n" + bytes(99),
    "a JPEG XL image": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99),
    "a ZIP archive": b"PK\x03\x04" + bytes(99),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "an empty file": b"",
}


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".heic", ""])
@pytest.mark.parametrize("what", FILES)
def test_it_is_named_and_counts_as_an_image_that_cannot_be_read(tmp_path, what, suffix):
    path = tmp_path / f"IMG_2342{suffix}"
    path.write_bytes(FILES[what])
    for door in (
        lambda: open_image(path),
        lambda: open_image(FILES[what], path.name),
        lambda: load_pixels(ImageRef("key", str(path)), SPEC),
    ):
        with pytest.raises(UnreadableImage) as error:
            door()
        assert f"unreadable image (it is {what}" in str(error.value) and "\n" not in str(
            error.value
        )


def test_what_nobody_knows_is_unreadable_as_before(tmp_path):
    with pytest.raises(UnreadableImage, match="cannot identify image file"):
        open_image(b"nothing of the kind", "x.jpg")


FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]
if features.check("avif"):
    FORMATS.append("AVIF")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_suffix_that_lies_is_no_hindrance(tmp_path, kind):
    """Pillow knows an image by its first bytes, and phones name them as they like."""
    out = io.BytesIO()
    toy_image(0).save(out, kind)
    (tmp_path / "x.heic").write_bytes(out.getvalue())
    with Image.open(io.BytesIO(out.getvalue())) as theirs:
        assert open_image(tmp_path / "x.heic").tobytes() == theirs.tobytes()
    if kind != "AVIF":
        assert other_formats.named(out.getvalue()) is None
