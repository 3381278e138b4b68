"""The evaluation folder of a run: what a bundle is compared on, without torch.

    evaluation.json       labels, class names, the sets with their own class lists, the student's
                          preprocess, and the teacher's answers
    image_features.npy    [n, D], the float32 student's features
    teacher_features.npy  [n, D], the teacher's, where it was at hand
    images.tar            the images' own bytes, in order

`edgeclip distill` writes it (edgeclip/host/evaluation/scores.py).
"""

import hashlib
import random
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.finite import features as rows_of_features
from edgeclip.device.image_file import opened
from edgeclip.device.images import index_tar, read
from edgeclip.device.metrics import hits
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.records import Record, from_json
from edgeclip.device.zero_shot import class_scores
from edgeclip.errors import EdgeclipError
from edgeclip.progress import track

Role = Literal["unseen", "seen without names", "trained with names"]
"""what training had of a set's images"""
KNOWN_BY = 16
"""hex digits: of a million images two share them with a chance of 3e-8"""


class EvaluationSet(Record):
    name: str
    note: str
    """what to know of its figures, for people"""
    rows: list[int]
    """its images"""
    classes: list[int]
    """class indices that an image of it may be given, ascending"""
    role: Role | None = None
    """null: a run that is older than this field; `seen` says whether it is unseen"""
    seen: bool | None = None
    """of such a run; null: as old as 0.1, whose sets may be training images"""
    compared: bool = False
    """whether its images were compared with the training images, not its name alone"""

    @property
    def unseen(self) -> bool:
        """Whether its images took no part in training."""
        if self.role is None:
            return self.seen is False
        return self.role == "unseen"

    @property
    def told(self) -> str | None:
        """What training had of its images, for people; None: not known."""
        if self.role == "unseen" and not self.compared:
            return "kept apart by name, not compared"
        return self.role


class Description(Record):
    """The content of evaluation.json."""

    labels: list[int]
    """[n], class index of each image"""
    sets: list[EvaluationSet]
    class_names: list[str] | None = None
    """what labels and classes number; None: a run that is older than this field"""
    preprocess: Preprocess | None = None
    """the student's in training; None: a run that is older than this field, and the two below"""
    pixels: list[int] | None = None
    """[n], what it makes of each image (`preprocess.fingerprint`)"""
    teacher: list[int | None] | None = None
    """[n], the teacher's answers; null: it was not asked"""
    slices: list[list[str]] | None = None
    """[n], those that the data puts each image into; None: a run that is older than this field"""


class Look(NamedTuple):
    """What an image is known by, and how large it is."""

    digest: str
    """the first `KNOWN_BY` hex digits of its bytes' sha256"""
    short_side: int
    """px"""


class Student(NamedTuple):
    """What the student saw in training, and who taught it."""

    preprocess: Preprocess
    pixels: np.ndarray
    """uint64 [n], fingerprints"""
    teacher: np.ndarray
    """int [n], the teacher's answers as class indices; -1: it was not asked"""
    teacher_features: np.ndarray | None
    """[n, D], not a number where it was not asked; None: it never was"""


class Evaluation(NamedTuple):
    folder: Path
    reference: np.ndarray
    """[n, D], the float32 student's features"""
    labels: np.ndarray
    """[n], class index of each image"""
    sets: list[EvaluationSet]
    chosen: list[int]
    """[n], which of the folder's images take part"""
    class_names: list[str] | None = None
    """what labels and classes number; None: a run that is older than this field"""
    student: Student | None = None
    """None: a run that is older than this field"""
    slices: list[list[str]] | None = None
    """[n], those that the data puts each image into; None: a run that is older than this field"""
    looks: list[Look] | None = None
    """[n]; None: nobody looked (`looked_at`)"""


def load_evaluation(folder: Path, images: int | None = None) -> Evaluation:
    """Return a run's evaluation folder, or a fixed random subset of `images` of it.

    Raises `EdgeclipError` for a folder whose files were changed, and for features of the student
    that are not finite.
    """
    disk.verify(folder, disk.read_manifest(folder, "evaluation"))
    path = folder / "evaluation.json"
    description = from_json(disk.read_json(path), Description, path)
    path = folder / "image_features.npy"
    again = "train the student again: it does not compute numbers"
    features = rows_of_features(disk.read_array(path), path, again)
    labels = np.array(description.labels)
    slices = description.slices
    if slices is not None and len(slices) != len(labels):
        what = f"has slices of {len(slices)} images, and labels of {len(labels)}"
        raise EdgeclipError(folder / "evaluation.json", what, "distill the run again")
    chosen = list(range(len(labels)))
    sets = description.sets
    if images is not None and images < len(chosen):
        chosen = sorted(random.Random(0).sample(chosen, images))
        sets = [_subset(s, chosen) for s in sets]
    return Evaluation(
        folder,
        features[chosen],
        labels[chosen],
        sets,
        chosen,
        description.class_names,
        _student(folder, description, chosen),
        None if slices is None else [slices[i] for i in chosen],
    )


def looked_at(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation images with the hash and the size of each.

    Raises `EdgeclipError` for an image that cannot be read.
    """
    every = index_tar(images_tar(evaluation.folder))
    looks = []
    for i in track(evaluation.chosen, "hash the evaluation images", len(evaluation.chosen)):
        content = read(every[i])
        with opened(content, every[i].key) as image:
            known = hashlib.sha256(content).hexdigest()[:KNOWN_BY]
            looks.append(Look(known, min(image.size)))
    return evaluation._replace(looks=looks)


def _student(folder: Path, description: Description, chosen: list[int]) -> Student | None:
    if description.preprocess is None or description.pixels is None:
        return None
    answers = description.teacher or [None] * len(description.labels)
    features = None
    if (folder / "teacher_features.npy").exists():
        features = disk.read_array(folder / "teacher_features.npy")[chosen]
    return Student(
        preprocess=description.preprocess,
        pixels=np.array(description.pixels, np.uint64)[chosen],
        teacher=np.array([-1 if a is None else a for a in answers])[chosen],
        teacher_features=features,
    )


def _subset(whole: EvaluationSet, chosen: list[int]) -> EvaluationSet:
    place = {row: i for i, row in enumerate(chosen)}
    rows = [place[row] for row in whole.rows if row in place]
    return msgspec.structs.replace(whole, rows=rows)


def images_tar(folder: Path) -> Path:
    """Return the archive of a run's evaluation images; edgeclip 0.1 called it pictures.tar."""
    old = folder / "pictures.tar"
    return old if old.exists() else folder / "images.tar"


class Decisions(NamedTuple):
    """First answers over all evaluation sets, one set after the other."""

    answers: np.ndarray
    """[m], class indices"""
    right: np.ndarray
    """bool [m]"""
    lead: np.ndarray
    """[m], by how much the best score leads the second"""
    scores: np.ndarray
    """[m], the best score"""


def decide(bundle: Bundle, evaluation: Evaluation, features: np.ndarray) -> Decisions:
    """Return the first answers of features [n, D] over all labels of the bundle, as it ships."""
    answers = [np.zeros(0, int)]
    right = [np.zeros(0, bool)]
    lead = [np.zeros(0)]
    first = [np.zeros(0)]
    for s in evaluation.sets:
        if not s.rows:
            continue
        scores = bundle.scores(features[s.rows])
        best = np.sort(scores, axis=1)[:, -2:]
        answers.append(scores.argmax(axis=1))
        right.append(hits(scores, evaluation.labels[s.rows]))
        lead.append(best[:, -1] - best[:, 0])
        first.append(best[:, -1])
    columns = (np.concatenate(parts) for parts in (answers, right, lead, first))
    return Decisions(*columns)


def rows(evaluation: Evaluation) -> np.ndarray:
    """Return [m], the image that each of `decide`'s answers is of."""
    of_sets = [np.array(s.rows, int) for s in evaluation.sets]
    return np.concatenate([np.zeros(0, int), *of_sets])


def unseen_places(evaluation: Evaluation) -> np.ndarray:
    """Return [m] the images of unseen sets, each once, in their order."""
    of_sets = [np.array(s.rows, int) for s in evaluation.sets if s.unseen]
    return np.unique(np.concatenate([np.zeros(0, int), *of_sets]))


def differences(
    bundle: Bundle, evaluation: Evaluation, before: np.ndarray, after: np.ndarray
) -> np.ndarray:
    """Return [m] by how much a score of each image differs at most between features [n, D].

    In the order of `decide`'s answers. Not a number where one of them is none.
    """
    largest = [np.zeros(0)]
    for s in evaluation.sets:
        if s.rows:
            difference = bundle.scores(after[s.rows]) - bundle.scores(before[s.rows])
            largest.append(np.abs(difference).max(axis=1))
    return np.concatenate(largest)


def own_list_top1(
    bundle: Bundle, evaluation: Evaluation, s: EvaluationSet, features: np.ndarray
) -> float:
    """Return the top-1 accuracy of a set's images within its own class list.

    The papers' protocol; features: [n, D], of all evaluation images.
    """
    classes = np.array(s.classes, int)
    active = bundle.class_features[classes]
    scores = class_scores(features[s.rows], active, bundle.head)
    labels = np.searchsorted(classes, evaluation.labels[s.rows])
    return float(hits(scores, labels).mean())
