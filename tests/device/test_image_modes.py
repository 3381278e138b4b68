"""For every mode and format that Pillow opens, pixels are open_clip's own transform's, bit for bit;
what is better than open_clip is an option, and does what Pillow's own function does before it.
"""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.preprocess import Preprocess, open_image, orientation, to_pixels
from tests.support import image_files as files

# Pillow's warnings, of palettes with alpha and of metadata that was hit, are no errors here.
pytestmark = pytest.mark.filterwarnings("ignore")
MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
SIZE = 24
WIDE = (61, 37)
WAYS = list(itertools.product(("shortest", "squash"), ("bicubic", "bilinear")))
FILES = {**files.every_mode_and_format(*WIDE), **files.specials(*WIDE)}


def spec_of(resize="shortest", interpolation="bicubic", **options):
    return Preprocess(
        size=SIZE, mean=MEAN, std=STD, resize=resize, interpolation=interpolation, **options
    )


def open_clips(spec):
    """open_clip's evaluation transform, before it normalizes: an image to uint8 [H, W, 3]."""
    from open_clip.transform import image_transform

    *steps, _ = image_transform(
        spec.size,
        is_train=False,
        mean=spec.mean,
        std=spec.std,
        resize_mode=spec.resize,
        interpolation=spec.interpolation,
    ).transforms

    def transform(image):
        for step in steps:
            image = step(image)
        return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    return transform


def theirs(content, spec):
    """open_clip's pixels of a file, opened as its readers do; None: it refuses the file."""
    try:
        return open_clips(spec)(Image.open(io.BytesIO(content)))
    except Exception:
        return None


def ours(content, spec):
    """Our pixels of a file; None: it is refused in one line."""
    try:
        return to_pixels(open_image(content, "a file"), spec)
    except UnreadableImage as e:
        assert str(e).startswith("a file: ") and "\n" not in str(e)
        return None


def assert_equal(content, spec, what):
    expected, found = theirs(content, spec), ours(content, spec)
    assert (expected is None) == (found is None), what
    if expected is not None:
        np.testing.assert_array_equal(found, expected, str(what))


@pytest.mark.parametrize("name", FILES)
def test_a_files_pixels_are_open_clips(name):
    for way in WAYS:
        assert theirs(FILES[name], spec_of(*way)) is not None
        assert_equal(FILES[name], spec_of(*way), (name, way))


def test_the_files_are_of_every_mode_that_a_file_can_have():
    modes = {Image.open(io.BytesIO(content)).mode for content in FILES.values()}
    everything = {"1", "L", "P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F"}
    assert modes >= everything | {"I;16", "I;16B"}


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (SIZE, SIZE), (23, 50)])
def test_enlarged_odd_and_single_pixels_are_open_clips(size):
    made = {**files.every_mode_and_format(*size), **files.specials(*size)}
    for name, content in made.items():
        for way in WAYS:
            assert_equal(content, spec_of(*way), (name, way))


@pytest.mark.parametrize("mode", files.MODES)
def test_an_image_in_memory_is_as_open_clip_takes_it(mode):
    image = files.image_of(mode, *WIDE)
    for way in WAYS:
        spec = spec_of(*way)
        try:
            expected = open_clips(spec)(image)
        except ValueError:
            with pytest.raises(UnreadableImage, match="image: "):
                to_pixels(image, spec)
            continue
        np.testing.assert_array_equal(to_pixels(image, spec), expected)


def test_a_damaged_file_gives_open_clips_pixels_or_is_refused():
    rng = np.random.default_rng(0)
    names = sorted(FILES)
    refused = 0
    for i in range(600):
        content = files.damaged(FILES[names[i % len(names)]], rng)
        spec = spec_of(*WAYS[i % len(WAYS)])
        assert_equal(content, spec, (i, names[i % len(names)]))
        refused += theirs(content, spec) is None
    assert 100 < refused < 500


# --- what is better, where it is asked for


def lay(content, color):
    """A file's image on a color, by Pillow's own compositing."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*color, 255)), image).convert("RGB")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_turns_the_image_before_all_else(format, tag, way):
    for mode in ("RGB", "L") if format == "JPEG" else ("RGB", "RGBA"):
        (content,) = files.turned(files.image_of(mode, *WIDE), tag, (format,)).values()
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        expected = open_clips(spec_of(*way))(upright)
        np.testing.assert_array_equal(ours(content, spec_of(*way, exif=True)), expected)


def test_a_damaged_tag_turns_nothing_and_refuses_nothing():
    image = files.image_of("RGB", *WIDE)
    content = files.encoded(image, "JPEG", exif=b"Exif\0\0no tags at all")
    assert orientation(Image.open(io.BytesIO(content))) == 1
    np.testing.assert_array_equal(ours(content, spec_of(exif=True)), ours(content, spec_of()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (10, 200, 77)])
@pytest.mark.parametrize(
    "name",
    [
        *("RGBA.PNG", "RGBA.WEBP", "LA.PNG", "PA.TIFF", "P-clear-color.PNG", "P-clear-table.PNG"),
        *("P-clear.GIF", "RGB-clear.PNG", "L-clear.PNG", "1-clear.PNG", "animated.PNG"),
        *("16-bit-grey-alpha.PNG", "16-bit-rgba.PNG"),
    ],
)
def test_what_is_transparent_is_laid_on_the_background_before_the_resize(name, color, way):
    expected = open_clips(spec_of(*way))(lay(FILES[name], color))
    found = ours(FILES[name], spec_of(*way, background=color))
    np.testing.assert_array_equal(found, expected)
    assert (found != ours(FILES[name], spec_of(*way))).any()


@pytest.mark.parametrize("name", ["RGB.JPEG", "L.PNG", "P.PNG", "CMYK.TIFF", "I;16.PNG", "1.BMP"])
def test_options_leave_every_other_image_alone(name):
    for way in WAYS:
        found = ours(FILES[name], spec_of(*way, exif=True, background=(255, 0, 0)))
        np.testing.assert_array_equal(found, theirs(FILES[name], spec_of(*way)))


def test_both_options_are_both_done():
    (content,) = files.turned(files.image_of("RGBA", *WIDE), 6, ("PNG",)).values()
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    expected = open_clips(spec_of())(lay(files.encoded(upright, "PNG"), (1, 2, 3)))
    np.testing.assert_array_equal(ours(content, spec_of(exif=True, background=(1, 2, 3))), expected)
