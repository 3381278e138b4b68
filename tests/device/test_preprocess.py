"""The one preprocess is open_clip's, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.errors import EdgeclipError
from tests.support.images import encoded, toy_image, truncated_jpeg

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [
    (64, 64),
    (37, 91),
    (91, 37),
    (224, 225),
    (300, 199),
    (33, 32),
    (1, 50),
    (517, 333),
    (20, 20),
]


def noise(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def theirs(image, size, resize, interpolation):
    """uint8 [H, W, 3] of open_clip's evaluation transform, before it normalizes."""
    from open_clip.transform import image_transform

    steps = image_transform(
        size, is_train=False, mean=MEAN, std=STD, resize_mode=resize, interpolation=interpolation
    ).transforms
    x = image
    for step in steps[:-1]:
        x = step(x)
    return (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_pixels_are_open_clips_bit_for_bit(resize, interpolation):
    spec = Preprocess(size=48, mean=MEAN, std=STD, resize=resize, interpolation=interpolation)
    for seed, (width, height) in enumerate(SIZES):
        if min(width, height) == 1 and resize == "shortest":
            continue  # a strip of 1 x 50 would grow to 48 x 2400
        image = noise(width, height, seed)
        ours = to_pixels(image, spec)
        assert ours.shape == (48, 48, 3) and ours.dtype == np.uint8
        assert (ours == theirs(image, 48, resize, interpolation)).all(), (width, height)


def test_odd_crops_are_open_clips_for_every_small_excess():
    spec = Preprocess(size=20, mean=MEAN, std=STD)
    for width in range(20, 31):
        image = noise(width, 20, width)
        assert (to_pixels(image, spec) == theirs(image, 20, "shortest", "bicubic")).all(), width


def test_normalizing_is_torchvisions():
    from torchvision.transforms import functional

    spec = Preprocess(size=16, mean=MEAN, std=STD)
    images = [noise(16, 16, s) for s in range(3)]
    ours = normalize(np.stack([np.asarray(i) for i in images]), spec)
    expected = torch.stack(
        [functional.normalize(functional.to_tensor(i), MEAN, STD) for i in images]
    ).numpy()
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, expected)


def test_an_encoded_image_comes_back_whole_in_its_own_mode(tmp_path):
    image = toy_image(0, 30, 20)
    image.save(tmp_path / "p.png")
    assert (
        open_image(tmp_path / "p.png").tobytes()
        == open_image(encoded(image)).tobytes()
        == image.tobytes()
    )
    for mode in ("L", "P", "RGBA", "1"):
        assert open_image(encoded(image.convert(mode))).mode == mode


def test_a_truncated_jpeg_is_unreadable_and_never_padded(tmp_path):
    path = truncated_jpeg(tmp_path / "half.jpg")
    with pytest.raises(UnreadableImage, match=r"half\.jpg: unreadable image"):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_unreadable(content):
    with pytest.raises(UnreadableImage, match="member 7"):
        open_image(content, "member 7")


def test_a_missing_file_is_another_error_than_an_unreadable_one(tmp_path):
    with pytest.raises(EdgeclipError, match="no such file") as e:
        open_image(tmp_path / "nothing.jpg")
    assert not isinstance(e.value, UnreadableImage)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(EdgeclipError):
        open_image(tmp_path)
