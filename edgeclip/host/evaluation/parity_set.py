"""What `validate` compares a bundle with: images, and the float student's features of them.

evaluation/images.tar          the images' own bytes, in order (pictures.tar in runs of 0.1)
           image_features.npy  [n, D] float32, the student's unit features of them
           teacher_features.npy  [n, D] float32, the teacher's; not a number where it was not asked;
                               no file where it never was
           evaluation.json     the student's preprocess and what its pixels are known by, labels,
                               the teacher's answers, slices, each set's name, note, classes and
                               rows, sha256 of every image that was held out
"""

import io
import random
import tarfile
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edgeclip import disk
from edgeclip.device.evaluation import Role
from edgeclip.device.images import SUFFIXES, ImageRef, digest, read
from edgeclip.device.preprocess import Preprocess
from edgeclip.disk import Json
from edgeclip.host.data import Dataset, EvaluationSet

SEED = 0
"""of the choice among more images than are kept"""


class TeachersAnswer(NamedTuple):
    """What the teacher says of an image."""

    features: np.ndarray
    """[D], unit"""
    answer: int
    """class index, over all labels, with its class offset"""


class ParityImage(NamedTuple):
    """An image that was scored."""

    of: EvaluationSet
    image: ImageRef
    features: np.ndarray
    """[D], the float student's"""
    pixels: int
    """fingerprint of what the student saw"""
    teacher: TeachersAnswer | None = None
    """None: not asked, or no longer at hand"""
    unseen: bool = True
    """whether its set is, and it was not found among the training images"""


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def parity_images(s: EvaluationSet, seen: Columns, taught: Columns | None) -> list[ParityImage]:
    """Return a set's images as the student and its teacher answer them.

    seen: places [n], the student's features [n, D], fingerprints [n]. taught: places [m], the
    teacher's features [m, D], its answers [m]; None: it is not at hand.
    """
    known: dict[int, TeachersAnswer] = {}
    for i, features, answer in zip(*(taught or ((), (), ())), strict=True):
        known[int(i)] = TeachersAnswer(features, int(answer))
    found: frozenset[int] = frozenset()
    if s.overlap is not None:
        found = frozenset(s.overlap.places)
    images = []
    for i, row, pixels in zip(*seen, strict=True):
        unseen = not s.seen and int(i) not in found
        answer = known.get(int(i))
        images.append(ParityImage(s, s.images[i], row, int(pixels), answer, unseen))
    return images


def write_parity_set(
    folder: Path,
    images: list[ParityImage],
    data: Dataset,
    preprocess: Preprocess,
    max_images: int,
) -> None:
    """Write the evaluation folder; of more than `max_images`, always the same choice is kept.

    preprocess: the student's.
    """
    held_out = set()
    for scored in images:
        if scored.unseen:
            held_out.add(digest(scored.image))
    if len(images) > max_images:
        places = random.Random(SEED).sample(range(len(images)), max_images)
        images = [images[i] for i in sorted(places)]
    record = {
        "labels": [p.image.label for p in images],
        "class_names": data.classes,
        "preprocess": msgspec.to_builtins(preprocess),
        "pixels": [p.pixels for p in images],
        "teacher": [p.teacher.answer if p.teacher else None for p in images],
        "slices": [list(p.image.slices) for p in images],
        "sets": _sets(data, images),
        "held_out": sorted(held_out),
    }
    with disk.new_folder(folder) as temporary:
        _write_tar(temporary / "images.tar", images)
        features = np.stack([p.features for p in images])
        disk.write_array(temporary / "image_features.npy", features)
        if any(p.teacher for p in images):
            disk.write_array(temporary / "teacher_features.npy", _teachers_features(images))
        disk.write_json(temporary / "evaluation.json", record)
        facts = {"license": data.license, "images": len(images)}
        disk.write_manifest(temporary, "evaluation", facts)


def _sets(data: Dataset, images: list[ParityImage]) -> list[Json]:
    """Return the sets over the images that are kept.

    Images that were found among the training images are a set of their own, which is not unseen.
    """
    sets: list[Json] = []
    for s in data.evaluation:
        compared = s.overlap is not None
        common = {"note": s.note, "classes": s.classes, "compared": compared}
        if s.seen:
            rows = [i for i, p in enumerate(images) if p.of is s]
            sets.append({"name": s.name, "rows": rows, "role": s.role, **common})
            continue
        rows = [i for i, p in enumerate(images) if p.of is s and p.unseen]
        sets.append({"name": s.name, "rows": rows, "role": s.role, **common})
        rows = [i for i, p in enumerate(images) if p.of is s and not p.unseen]
        if rows:
            name = f"{s.name}, among the training images"
            sets.append({"name": name, "rows": rows, "role": _role_in_training(data), **common})
    return sets


def _role_in_training(data: Dataset) -> Role:
    """Return what training may have had of an image that it was found to have."""
    if data.labeled:
        return "trained with names"
    return "seen without names"


def _teachers_features(images: list[ParityImage]) -> np.ndarray:
    """[n, D] float32; not a number where it was not asked."""
    width = max(len(p.teacher.features) for p in images if p.teacher)
    rows = np.full((len(images), width), np.nan, np.float32)
    for row, image in zip(rows, images, strict=True):
        if image.teacher is not None:
            row[:] = image.teacher.features
    return rows


def _write_tar(path: Path, images: list[ParityImage]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, scored in enumerate(images):
            content = read(scored.image)
            suffix = Path(scored.image.key).suffix
            if suffix.lower() not in SUFFIXES:  # it would be no image of the tar
                suffix = ".jpg"
            member = tarfile.TarInfo(f"{i:06d}{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
