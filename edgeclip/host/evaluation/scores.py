"""Zero-shot accuracy of teacher and student on the same images.

Every figure says what it is: how many images, how many classes are active, chance, whether the set
is transductive. The student is scored as it ships (P(u_s), EduAttention in the head where it is
kept), with and without EduAttention, and with EduAttention over all classes where fewer are active
(it attended over all of them in training: docs/design/methods.md#27-open-points-a1-to-a13, A11).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.device.finite import fault
from edgeclip.device.images import ImageRef, read, refuse_unreadable, stream
from edgeclip.device.manifest import ClassOffset
from edgeclip.device.metrics import harmonic_mean, hits
from edgeclip.device.preprocess import (
    Preprocess,
    fingerprint,
    normalize,
    open_image,
    to_pixels,
)
from edgeclip.device.zero_shot import EduAttention, class_scores, offsets
from edgeclip.errors import EdgeclipError
from edgeclip.host.adapt.class_offset import Choices, choices, trade
from edgeclip.host.data import Dataset, EvaluationSet
from edgeclip.host.evaluation.notes import overlap_result
from edgeclip.host.evaluation.parity_set import ParityImage, parity_images, write_parity_set
from edgeclip.host.student import EduAttentionHead, Student
from edgeclip.host.teachers import Teacher
from edgeclip.progress import say, track
from edgeclip.reports.results import (
    MODELS,
    Accuracy,
    ModelScores,
    SetScore,
    Trade,
)

TEACHER_BATCH = {"cpu": 8, "cuda": 64}
"""images that a teacher's tower sees at once"""


class ImageFeatures(NamedTuple):
    """What an image encoder makes of the readable ones among some images."""

    kept: np.ndarray
    """[n] their places"""
    features: np.ndarray
    """[n, D] float32"""
    fingerprints: np.ndarray
    """uint64 [n], of their pixels"""


TeacherFeatures = Callable[[list[ImageRef], str], ImageFeatures]
"""of images, and of their name for the progress line"""


@torch.inference_mode()
def image_features(
    module: nn.Module,
    images: list[ImageRef],
    preprocess: Preprocess,
    what: str,
    device: torch.device,
    batch_size: int = 32,
) -> ImageFeatures:
    """Return the module's outputs for the images that can be read, through the one preprocess.

    what: for the progress line. Raises `EdgeclipError` where more than 1 % cannot be read, and
    for features that are not finite.
    """
    skipped: list[str] = []
    fingerprints = np.zeros(len(images), np.uint64)

    def make(i: int) -> np.ndarray:
        name = f"{images[i].path} ({images[i].key})"
        pixels = to_pixels(open_image(read(images[i]), name), preprocess)
        fingerprints[i] = fingerprint(pixels)
        return pixels

    module.to(device)
    indices: list[np.ndarray] = []
    out: list[np.ndarray] = []
    batches = stream(range(len(images)), make, batch_size, skipped)
    for index, pixels in track(batches, what, math.ceil(len(images) / batch_size)):
        x = torch.from_numpy(normalize(pixels, preprocess))
        x = x.to(device, memory_format=torch.channels_last)
        rows = module(x).float().cpu().numpy()
        wrong = fault(rows, rows=True)
        if wrong is not None:
            raise EdgeclipError(
                what,
                f"of images {images[index[0]].key} to {images[index[-1]].key}, {wrong}",
                "check the weights: the model does not compute numbers",
            )
        out.append(rows)
        indices.append(index)
    refuse_unreadable(skipped, len(images), what)
    for line in skipped:
        say(f"skipped: {line}")
    kept = np.concatenate(indices)
    return ImageFeatures(kept, np.concatenate(out), fingerprints[kept])


def teacher_features(
    teachers: list[tuple[Teacher, nn.Module]],
    fusion: nn.Module | None,
    images: list[ImageRef],
    what: str,
    device: torch.device,
) -> ImageFeatures:
    """Return the unit features of a teacher, or of several that `fusion` makes one.

    teachers: each, adapted where it is, beside its own folded tower.
    """
    batch_size = TEACHER_BATCH.get(device.type, TEACHER_BATCH["cuda"])
    found = []
    for i, (teacher, tower) in enumerate(teachers, start=1):
        line = f"teacher: {what}"
        if fusion is not None:
            line = f"teacher {i}: {what}"
        module = nn.Sequential(tower, _UnitFeatures(teacher))
        found.append(image_features(module, images, teacher.preprocess, line, device, batch_size))
    if fusion is None:
        return found[0]
    with torch.inference_mode():
        # An image that is readable is so for all of them.
        fused = fusion.cpu()([torch.from_numpy(each.features) for each in found])
        return found[0]._replace(features=F.normalize(fused, dim=-1).numpy())


class _UnitFeatures(nn.Module):
    """From a teacher's rows to its unit features."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.features = teacher.features  # a head is a module, and then goes where this one goes

    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(self.features(rows), dim=-1)


class Answers(NamedTuple):
    """What one model says of the images of a set."""

    kept: np.ndarray
    """[n] places of the readable ones"""
    features: np.ndarray
    """[n, D], unit"""
    class_features: np.ndarray
    """[N, D], unit, over all classes of the data set"""
    offsets: np.ndarray | float = 0.0
    """[N], taken from the scores of classes that had labels"""


def score(
    s: EvaluationSet,
    student: Answers,
    teacher: Answers | None,
    head: EduAttention | None,
    keep_head: bool,
) -> SetScore:
    """Return one set's row; a reading that would only repeat `student`, which ships, is None.

    teacher: None, it is not at hand. keep_head: EduAttention ships.
    """

    plain = accuracy(s, student, None)
    count = len(student.class_features)
    row = SetScore(
        name=s.name,
        note=s.note,
        images=len(student.kept),
        labels=count,
        classes=len(s.classes),
        chance_top1=1 / count,
        own_list_chance_top1=1 / len(s.classes),
        student=plain,
        student_without_edu_attention=plain,
        overlap=overlap_result(s),
    )
    if teacher is not None:
        row = replace(row, teacher=accuracy(s, teacher, None))
        if np.any(teacher.offsets):
            plain_teacher = accuracy(s, teacher._replace(offsets=0.0), None)
            row = replace(row, teacher_without_offset=plain_teacher)
    shipped = None
    if head is not None and keep_head:
        shipped = head
        row = replace(row, student=accuracy(s, student, head))
    elif head is not None:
        row = replace(row, student_with_edu_attention=accuracy(s, student, head))
    if np.any(student.offsets):
        without = accuracy(s, student._replace(offsets=0.0), shipped)
        row = replace(row, student_without_offset=without)
    if head is not None and len(s.classes) < count:
        everywhere = accuracy(s, student, head, student.class_features)
        row = replace(row, student_attending_all_classes=everywhere)
    return replace(row, student_on_unseen=_on_unseen(s, student, shipped))


def _on_unseen(s: EvaluationSet, student: Answers, head: EduAttention | None) -> Accuracy | None:
    """Return the accuracy without the images that are among the training images."""
    if s.overlap is None or not s.overlap.places:
        return None
    unseen = ~np.isin(student.kept, s.overlap.places)
    if not unseen.any():
        return None
    rest = student._replace(kept=student.kept[unseen], features=student.features[unseen])
    return accuracy(s, rest, head)


def accuracy(
    s: EvaluationSet,
    answers: Answers,
    head: EduAttention | None,
    attended: np.ndarray | None = None,
) -> Accuracy:
    """Return how often the answers are right over all labels, and within the set's own list."""
    every = answers.class_features
    labels = np.array([s.images[i].label for i in answers.kept])
    scores = class_scores(answers.features, every, head, offsets=answers.offsets)
    own_labels = np.array([s.classes.index(label) for label in labels])
    own_scores = class_scores(answers.features, every[s.classes], head, attended)
    return Accuracy(
        top1=float(hits(scores, labels, 1).mean()),
        top5=float(hits(scores, labels, 5).mean()),
        own_list_top1=float(hits(own_scores, own_labels, 1).mean()),
        own_list_top5=float(hits(own_scores, own_labels, 5).mean()),
    )


class Means(NamedTuple):
    """One figure for each model over several sets."""

    over_all_labels: ModelScores
    within_own_lists: ModelScores


def mean_over(sets: list[SetScore], mean: Callable[[list[float]], float]) -> Means:
    """Return one number of the top-1 accuracies of each model that all `sets` have."""

    def of(field: str) -> ModelScores:
        found: dict[str, float] = {}
        for model in MODELS:
            scored = [getattr(s, model) for s in sets]
            if sets and None not in scored:
                found[model] = mean([getattr(accuracies, field) for accuracies in scored])
        return ModelScores(**found)

    return Means(of("top1"), of("own_list_top1"))


class Subject(NamedTuple):
    """A student to be scored."""

    student: Student
    head: EduAttentionHead | None
    """EduAttention; None: trained without it"""
    preprocess: Preprocess
    class_features: np.ndarray
    """[N, D] over all classes of the data, the teacher's"""
    own_class_features: np.ndarray | None
    """the same of the student's own text tower; None: it has none"""
    ships_with: Literal["teacher", "student"]
    """whose class features its bundle has"""
    class_offset: ClassOffset | None
    """what its bundle takes from the scores of classes with labels"""
    teachers_class_offset: ClassOffset | None
    """the same, fitted on what the teacher says"""
    device: torch.device

    @property
    def shipped(self) -> np.ndarray:
        """[N, D] the class features that its bundle has."""
        if self.ships_with == "student" and self.own_class_features is not None:
            return self.own_class_features
        return self.class_features


class Scores(NamedTuple):
    """What a student is worth on its evaluation sets."""

    sets: list[SetScore]
    harmonic_mean: ModelScores | None = None
    """of the data's two halves over all labels; None: it has none; so below"""
    own_list_harmonic_mean: ModelScores | None = None
    """the same, each half within its own class list"""
    trade: Trade | None = None
    """what other offsets would give"""


def evaluate(
    subject: Subject,
    teacher: TeacherFeatures | None,
    data: Dataset,
    folder: Path,
    max_images: int,
) -> Scores:
    """Return the accuracies on each evaluation set of the data, and write the evaluation folder.

    teacher: None, its tower is not at hand. max_images: kept for `validate`. A student with a text
    tower of its own is scored with either text's class features.
    """
    sets: list[SetScore] = []
    parity: list[ParityImage] = []
    halves: dict[str, Choices] = {}
    for s in data.evaluation:
        seen = image_features(
            subject.student, s.images, subject.preprocess, f"student: {s.name}", subject.device
        )
        kept, features, _ = seen
        own = Answers(kept, features, subject.shipped, offsets(subject.class_offset, data.classes))
        theirs = None
        if s.headline and teacher is not None:
            set_back = offsets(subject.teachers_class_offset, data.classes)
            kept_by_teacher, of_teacher, _ = teacher(s.images, s.name)
            theirs = Answers(kept_by_teacher, of_teacher, subject.class_features, set_back)
        taught = None
        if theirs is not None:
            every = theirs.class_features
            said = class_scores(theirs.features, every, offsets=theirs.offsets).argmax(axis=1)
            taught = (theirs.kept, theirs.features, said)
        parity += parity_images(s, seen, taught)
        if not s.headline:
            continue
        sets.append(_set_score(subject, s, own, theirs))
        if data.halves is not None and s.name in data.halves:
            halves[s.name] = _choices(subject, s, own, data.labeled_classes)
    write_parity_set(folder, parity, data, subject.preprocess, max_images)
    if data.halves is None:
        return Scores(sets)
    by_name = {s.name: s for s in sets}
    means = mean_over([by_name[name] for name in data.halves], lambda top1: harmonic_mean(*top1))
    labeled, unlabeled = data.halves
    return Scores(sets, *means, trade(halves[labeled], halves[unlabeled]))


def _set_score(
    subject: Subject, s: EvaluationSet, own: Answers, theirs: Answers | None
) -> SetScore:
    """Return one set's row, with both texts' readings where the student has a text of its own."""
    head, keep_head = _head(subject)
    scored = score(s, own, theirs, head, keep_head)
    if subject.own_class_features is None:
        return scored
    by_teacher = own._replace(class_features=subject.class_features)
    by_own = own._replace(class_features=subject.own_class_features)
    return replace(
        scored,
        student_teacher_text=score(s, by_teacher, None, head, keep_head).student,
        student_own_text=score(s, by_own, None, head, keep_head).student,
    )


def _head(subject: Subject) -> tuple[EduAttention | None, bool]:
    """Return EduAttention, and whether it ships."""
    if subject.head is None:
        return None, False
    return subject.head.numpy(), subject.head.spec.keep


def _choices(subject: Subject, s: EvaluationSet, own: Answers, labeled: list[int]) -> Choices:
    """Return what an offset chooses between on the images of one set, as the student ships."""
    head, keep_head = _head(subject)
    shipped = None
    if keep_head:
        shipped = head
    scores = class_scores(own.features, own.class_features, shipped)
    truth = np.array([s.images[i].label for i in own.kept])
    return choices(scores, labeled, truth)
