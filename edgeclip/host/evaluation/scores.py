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

from edgeclip.device.images import ImageRef, read, refuse_unreadable, stream
from edgeclip.device.metrics import harmonic_mean, hits
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.device.zero_shot import EduAttention, class_scores
from edgeclip.host import recipe as R
from edgeclip.host.data import Dataset, EvaluationSet
from edgeclip.host.evaluation.parity_set import ParityImage, write_parity_set
from edgeclip.host.student import EduAttentionHead, Student
from edgeclip.host.teachers import Teacher
from edgeclip.progress import say, track
from edgeclip.reports.results import MODELS, Accuracy, ModelScores, SetScore

TEACHER_BATCH = {"cpu": 8, "cuda": 64}
"""images that a teacher's tower sees at once"""


class ImageFeatures(NamedTuple):
    """What an image encoder makes of the readable ones among some images."""

    kept: np.ndarray
    """[n] their places"""
    features: np.ndarray
    """[n, D] float32"""


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

    what: for the progress line. Raises `EdgeclipError` where more than 1 % cannot be read.
    """
    skipped: list[str] = []

    def make(i: int) -> np.ndarray:
        name = f"{images[i].path} ({images[i].key})"
        return to_pixels(open_image(read(images[i]), name), preprocess)

    module.to(device)
    indices: list[np.ndarray] = []
    out: list[np.ndarray] = []
    batches = stream(range(len(images)), make, batch_size, skipped)
    for index, pixels in track(batches, what, math.ceil(len(images) / batch_size)):
        x = torch.from_numpy(normalize(pixels, preprocess))
        x = x.to(device, memory_format=torch.channels_last)
        out.append(module(x).float().cpu().numpy())
        indices.append(index)
    refuse_unreadable(skipped, len(images), what)
    for line in skipped:
        say(f"skipped: {line}")
    return ImageFeatures(np.concatenate(indices), np.concatenate(out))


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
        return ImageFeatures(found[0].kept, F.normalize(fused, dim=-1).numpy())


class _UnitFeatures(nn.Module):
    """From a teacher's rows to its unit features."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.features = teacher.features  # a head is a module, and then goes where this one goes

    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(self.features(rows), dim=-1)


class Note(NamedTuple):
    """What to know of a set's figure."""

    transductive: bool
    """whether the student saw training images of this set"""
    text: str
    """which of its images and labels the run was trained on"""


def note(recipe: R.Recipe, spec: R.Data, s: EvaluationSet) -> Note:
    """Return what to know of the figure of `s`, a set of the data `spec`."""
    if isinstance(spec, R.OpenMoji) and isinstance(recipe.data, R.OpenMoji):
        return Note(s.note.startswith("transductive"), s.note)
    if s.shift:
        return Note(False, "shift; not transductive")
    labels = _teachers_labels(recipe, spec, s)
    if spec.name != recipe.data.name:
        return Note(False, f"not transductive: the student saw no image of this set; {labels}")
    own = "without labels"
    if _uses_labels(recipe):
        own = "with the labels that there are"
    return Note(True, f"transductive: the student saw training images of this set {own}; {labels}")


def _teachers_labels(recipe: R.Recipe, spec: R.Data, s: EvaluationSet) -> str:
    """Return which labels of the set stage 1 had."""
    stage_1 = recipe.adapt_data or recipe.data
    if recipe.adapt is None or stage_1.name != spec.name:
        return "the teacher was adapted on no label of it"
    labels = "the teacher was adapted on labels of its training images"
    if s.name == "novel" and getattr(stage_1, "protocol", "") == "base_to_novel":
        labels = "the teacher was adapted on no label of it"
    if getattr(recipe.adapt, "self_training", None):
        labels += ", and on its training images without labels"
    return labels


def _uses_labels(recipe: R.Recipe) -> bool:
    """Whether the student learned from labels of the training data."""
    if recipe.losses.cross_entropy or recipe.losses.prototype:
        return True
    if recipe.fuse and recipe.fuse.labels:
        return True
    adapted_here = recipe.adapt is not None and recipe.adapt_data is None
    return recipe.losses.captions == "classes" and adapted_here


class Answers(NamedTuple):
    """What one model says of the images of a set."""

    kept: np.ndarray
    """[n] places of the readable ones"""
    features: np.ndarray
    """[n, D], unit"""
    class_features: np.ndarray
    """[N, D], unit, over all classes of the data set"""


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

    def accuracy(
        answers: Answers, head: EduAttention | None, attended: np.ndarray | None = None
    ) -> Accuracy:
        labels = np.array([s.classes.index(s.images[i].label) for i in answers.kept])
        scores = class_scores(answers.features, answers.class_features[s.classes], head, attended)
        return Accuracy(
            top1=float(hits(scores, labels, 1).mean()), top5=float(hits(scores, labels, 5).mean())
        )

    plain = accuracy(student, None)
    row = SetScore(
        name=s.name,
        note=s.note,
        images=len(student.kept),
        classes=len(s.classes),
        chance_top1=1 / len(s.classes),
        student=plain,
        student_without_edu_attention=plain,
    )
    if teacher is not None:
        row = replace(row, teacher=accuracy(teacher, None))
    if head is None:
        return row
    if keep_head:
        row = replace(row, student=accuracy(student, head))
    else:
        row = replace(row, student_with_edu_attention=accuracy(student, head))
    if len(s.classes) < len(student.class_features):
        everywhere = accuracy(student, head, student.class_features)
        row = replace(row, student_attending_all_classes=everywhere)
    return row


def mean_over(sets: list[SetScore], mean: Callable[[list[float]], float]) -> ModelScores:
    """Return one number of the top-1 accuracies of each model that all `sets` have."""
    found: dict[str, float] = {}
    for model in MODELS:
        accuracies = [getattr(s, model) for s in sets]
        if sets and None not in accuracies:
            found[model] = mean([a.top1 for a in accuracies])
    return ModelScores(**found)


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
    harmonic_mean: ModelScores | None
    """of base and novel classes; None: the sets are others"""


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
    head = None
    keep_head = False
    if subject.head is not None:
        head = subject.head.numpy()
        keep_head = subject.head.spec.keep
    sets: list[SetScore] = []
    parity: list[ParityImage] = []
    for s in data.evaluation:
        kept, features = image_features(
            subject.student, s.images, subject.preprocess, f"student: {s.name}", subject.device
        )
        for i, row in zip(kept, features, strict=True):
            parity.append(ParityImage(s, s.images[i], row))
        if not s.headline:
            continue
        theirs = None
        if teacher is not None:
            theirs = Answers(*teacher(s.images, s.name), subject.class_features)
        own = Answers(kept, features, subject.shipped)
        scored = score(s, own, theirs, head, keep_head)
        if subject.own_class_features is not None:
            by_teacher = own._replace(class_features=subject.class_features)
            by_own = own._replace(class_features=subject.own_class_features)
            scored = replace(
                scored,
                student_teacher_text=score(s, by_teacher, None, head, keep_head).student,
                student_own_text=score(s, by_own, None, head, keep_head).student,
            )
        sets.append(scored)
    write_parity_set(folder, parity, data, max_images)
    by_name = {s.name: s for s in sets}
    mean = None
    if {"base", "novel"} <= by_name.keys():
        mean = mean_over([by_name["base"], by_name["novel"]], lambda top1: harmonic_mean(*top1))
    return Scores(sets, mean)
