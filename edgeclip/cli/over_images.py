"""The work of `classify` and `embed` over many images: one that cannot be read ends nothing."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from edgeclip import disk
from edgeclip.device.bundle import Bundle, RankedLabel
from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import ImageRef
from edgeclip.device.turned import say_turned
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say
from edgeclip.reports.store import one_bundle

T = TypeVar("T")


class Answers(NamedTuple):
    images: list[str]
    """all that were asked, in that order"""
    answers: dict[str, list[RankedLabel]]


class Features(NamedTuple):
    images: list[str]
    """of each row"""
    features: np.ndarray
    """[n, D], unit rows"""
    skipped: dict[str, str]
    """image, to why it could not be read"""


def classify_all(
    images: Sequence[Path],
    bundle: Path | None,
    labels: list[str] | None,
    top: int,
    offset: bool,
) -> Answers:
    """Return the best labels of each image that can be read.

    Raises `EdgeclipError` where none can, and as `Bundle.classify`.
    """
    with _loaded(images, bundle) as loaded:
        answers, _ = _over(images, lambda image: loaded.classify(image, labels, top, offset))
    return Answers([disk.shown(image) for image in images], answers)


def embed_all(images: Sequence[Path], bundle: Path | None) -> Features:
    """Return the image features of each image that can be read.

    Raises `EdgeclipError` where none can.
    """
    with _loaded(images, bundle) as loaded:
        rows, skipped = _over(images, lambda image: loaded.encode_image([image])[0])
    named = [disk.shown(image) for image in images]
    kept = [image for image in named if image in rows]
    return Features(kept, np.stack([rows[image] for image in kept]), skipped)


@contextlib.contextmanager
def _loaded(images: Sequence[Path], bundle: Path | None) -> Iterator[Bundle]:
    """Yield the bundle, which nobody replaces meanwhile."""
    for image in images:
        if not image.exists():
            raise EdgeclipError(disk.shown(image), "there is no such file", "check the path")
        if image.is_dir():
            raise EdgeclipError(disk.shown(image), "is a folder", "give the images in it")
    folder = one_bundle(bundle)
    with disk.reading(folder):
        loaded = Bundle.load(folder)
        refs = [ImageRef(disk.shown(path), str(path)) for path in images]
        say_turned([refs], loaded.preprocess.exif)
        yield loaded


def _over(
    images: Sequence[Path], answer: Callable[[Path], T]
) -> tuple[dict[str, T], dict[str, str]]:
    """Return ({image: its answer}, {image: why there is none}).

    Raises `UnreadableImage` of the first where none can be read.
    """
    answers: dict[str, T] = {}
    skipped: dict[str, str] = {}
    first: UnreadableImage | None = None
    for image in images:
        name = disk.shown(image)
        try:
            answers[name] = answer(image)
        except UnreadableImage as e:
            first = first or e
            skipped[name] = str(e)
            if len(images) > 1:
                say(f"skipped: {e}")
    if first is not None and not answers:
        raise first
    if skipped:
        say(f"{len(skipped)} of {len(images)} images skipped")
    return answers, skipped
