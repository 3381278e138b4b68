"""Which evaluation images are among the training images: by their bytes, and by how they look.

A set's name does not say what the student saw. So `distill` hashes every training image once, in
RUN/training_images/, and whatever is evaluated is compared with that: in the run itself, and by
`edgeclip evaluate` later, when the training images may be far away.

    content.npy      uint64 [n], eight bytes of BLAKE2b of the image's own bytes
    perceptual.npy   uint64 [n], pHash of its luminance (the package ImageHash): the signs of the
                     low frequencies about their median
    thumbnail.npy    uint8 [n, 8, 8], its mean luminance in each part

Equal bytes are the same image. A copy that was re-encoded or resized has other bytes, nearly the
same pHash and in no part of the thumbnail another luminance. A pHash alone is met by chance: a
frowning face has that of a smiling one. What the limits find and miss: docs/verdict.md. A crop
or a mirrored copy is another image here.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image, ImageOps

from edgeclip import disk
from edgeclip.device.images import ImageRef, read, stream
from edgeclip.device.preprocess import Preprocess, open_scaled
from edgeclip.host.data import Dataset, EvaluationSet, Overlap
from edgeclip.progress import say, track

FOLDER = "training_images"
"""in a run's folder"""
MOST_BITS = 6
"""of 64 that may differ between the pHashes of an image and of its copy"""
MOST_LEVELS = 8
"""of 255 that any part of their thumbnails may differ"""
SIDE = 8
LEAST_SIDE = 128
"""px; a JPEG is decoded no smaller, which is a quarter of the time"""
BATCH = 256
AS_STORED = Preprocess(size=SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""no option: here every image is turned, whatever a recipe asks for"""
HOW = "by bytes, and by a 64-bit perceptual hash with a thumbnail"


class Hashes(NamedTuple):
    """What images are known by; those that cannot be read are left out."""

    content: np.ndarray
    """uint64 [n]"""
    perceptual: np.ndarray
    """uint64 [n]"""
    thumbnail: np.ndarray
    """uint8 [n, 8, 8]"""


def hashes(image: ImageRef) -> np.ndarray:
    """Return an image's row: uint8 [80], content, pHash and thumbnail one after the other.

    A photo that is stored turned (EXIF) is turned first. Raises `UnreadableImage`.
    """
    whole = read(image)
    name = f"{image.path} ({image.key})"
    scaled, _ = open_scaled(whole, name, AS_STORED, lambda _: (LEAST_SIDE, LEAST_SIDE))
    upright = ImageOps.exif_transpose(scaled).convert("RGB")
    content = hashlib.blake2b(whole, digest_size=8).digest()
    perceptual = np.packbits(imagehash.phash(upright).hash)
    luminance = upright.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    thumbnail = np.asarray(luminance, np.uint8).reshape(-1)
    return np.concatenate([np.frombuffer(content, np.uint8), perceptual, thumbnail])


def hash_images(
    images: Sequence[ImageRef], what: str, threads: int = 2
) -> tuple[list[int], Hashes]:
    """Return the places of the readable ones among `images`, and their hashes.

    what: for the progress line.
    """
    skipped: list[str] = []
    places: list[int] = []
    rows = [np.zeros((0, 16 + SIDE * SIDE), np.uint8)]
    batches = stream(range(len(images)), lambda i: hashes(images[i]), BATCH, skipped, threads)
    for index, made in track(batches, what, math.ceil(len(images) / BATCH)):
        places += index.tolist()
        rows.append(made)
    table = np.concatenate(rows)
    return places, Hashes(
        content=np.ascontiguousarray(table[:, :8]).view(np.uint64).reshape(-1),
        perceptual=np.ascontiguousarray(table[:, 8:16]).view(np.uint64).reshape(-1),
        thumbnail=table[:, 16:].reshape(-1, SIDE, SIDE),
    )


def keep(run: Path, images: Iterable[Sequence[ImageRef]], threads: int) -> Hashes:
    """Return the hashes of a run's training images, made where RUN/training_images is not there."""
    folder = run / FOLDER
    known = load(run)
    if known is not None:
        return known
    parts = [hash_images(part, "hashes of training images", threads)[1] for part in images]
    made = Hashes(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    with disk.new_folder(folder) as temporary:
        for name, column in made._asdict().items():
            disk.write_array(temporary / f"{name}.npy", column)
        facts = {"images": len(made.content), "imagehash": imagehash.__version__}
        disk.write_manifest(temporary, "training images", facts)
    return made


def load(run: Path) -> Hashes | None:
    """Return the hashes that `keep` wrote; None: a run of an edgeclip that kept none.

    Raises `EdgeclipError` for a folder whose files were changed.
    """
    folder = run / FOLDER
    if not folder.exists():
        return None
    disk.verify(folder, disk.read_manifest(folder, "training images"))
    return Hashes(*(disk.read_array(folder / f"{name}.npy") for name in Hashes._fields))


# --- the comparison


def compare(images: Sequence[ImageRef], training: Hashes, what: str, threads: int = 2) -> Overlap:
    """Return which of `images` are among the training images. what: for the progress line."""
    places, own = hash_images(images, f"compare with training images: {what}", threads)
    known = np.sort(training.content)
    identical = []
    alike = []
    for i, content, perceptual, thumbnail in zip(places, *own, strict=True):
        at = int(np.searchsorted(known, content))
        if at < len(known) and known[at] == content:
            identical.append(i)
        elif looks_like_any(perceptual, thumbnail, training):
            alike.append(i)
    return Overlap(len(training.content), tuple(identical), tuple(alike))


def looks_like_any(perceptual: np.uint64, thumbnail: np.ndarray, training: Hashes) -> bool:
    """Return whether one image of `training` differs by no more than a copy of it does."""
    bits = np.bitwise_count(training.perceptual ^ perceptual)
    near = np.flatnonzero(bits <= MOST_BITS)
    difference = np.abs(training.thumbnail[near].astype(np.int16) - thumbnail)
    return bool((difference.max(axis=(1, 2), initial=0) <= MOST_LEVELS).any())


def compared(data: Dataset, training: Hashes | None, threads: int = 2) -> Dataset:
    """Return the data with each set that is called unseen compared with the training images.

    training: None, they are not known, and nothing is said. A set that is known to hold training
    images is left as it is.
    """
    if training is None:
        return data
    sets = []
    for s in data.evaluation:
        if not s.seen:
            s = s._replace(overlap=compare(s.images, training, s.name, threads))
        sets.append(s)
    return data._replace(evaluation=sets)


def joined(sets: Sequence[EvaluationSet]) -> Overlap | None:
    """Return the overlap of several sets' images, one set after the other.

    None: one of them was not compared.
    """
    identical: list[int] = []
    alike: list[int] = []
    training = 0
    start = 0
    for s in sets:
        if s.overlap is None:
            return None
        training = s.overlap.training
        identical += [start + i for i in s.overlap.identical]
        alike += [start + i for i in s.overlap.alike]
        start += len(s.images)
    return Overlap(training, tuple(identical), tuple(alike))


def say_overlaps(data: Dataset) -> None:
    """Say of every set whose images are not all unseen which they are."""
    for s in data.evaluation:
        if s.overlap is not None and s.overlap.places:
            say(f"{s.name}: {told(s)}")


def told(s: EvaluationSet) -> str:
    """Return what is known of a set's images: how many the student saw, and how that was found."""
    found = s.overlap
    if s.seen:
        return s.note
    if found is None:
        return (
            "not known whether the student saw its images: they were not compared with its"
            " training images, whose hashes this run did not keep"
        )
    with_what = f"compared with {found.training:,} training images {HOW}"
    if not found.places:
        return f"none of its {len(s.images):,} images is among the training images ({with_what})"
    first = ", ".join(s.images[i].key for i in found.places[:3])
    return (
        f"{len(found.identical):,} of {len(s.images):,} images are byte-identical to training"
        f" images and {len(found.alike):,} look like re-encoded ones (first: {first}): they are not"
        f" counted as unseen ({with_what})"
    )
