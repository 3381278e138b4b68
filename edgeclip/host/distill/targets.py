"""The teacher's half of a batch: what teachers, captions and labels say, which no gradient reaches.

Rows come from the cache (a memory map, so nothing is held but the batch) and pass through the
adapted head where there is one. Further teachers (MobileCLIP, MST-KD) have caches of the same views
of the same images: `cache.refuse_other_views` sees to it.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.device.manifest import ClassOffset
from edgeclip.device.zero_shot import offsets
from edgeclip.host import teachers
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset
from edgeclip.host.distill.batch import OtherTeacher
from edgeclip.host.recipe import Losses
from edgeclip.host.teachers import Teacher

CHUNK = 4096
"""labeled images whose features are averaged at a time"""


class Taught(NamedTuple):
    """A teacher and what it said of every view."""

    teacher: Teacher
    cache: TeacherCache


@dataclass(frozen=True)
class Lesson:
    """What a student learns from."""

    dataset: Dataset
    teachers: list[Taught]
    """the student lives in the space of the first; all have the same views of the same images"""
    fusion: nn.Module | None = None
    """makes one teacher of all of them; None: the losses average the teachers"""
    class_offset: ClassOffset | None = None
    """what the teacher's scores of classes with labels are set back by, where it names a class"""

    @property
    def teacher(self) -> Teacher:
        """The first teacher."""
        return self.teachers[0].teacher

    @property
    def cache(self) -> TeacherCache:
        """The first teacher's cache."""
        return self.teachers[0].cache

    def without_towers(self) -> "Lesson":
        """Return the same lesson without the teachers' towers, which training does not need."""
        kept = [Taught(teachers.without_towers(t.teacher), t.cache) for t in self.teachers]
        return replace(self, teachers=kept)


class Known(NamedTuple):
    """Fields of `batch.Batch` that are known without the student."""

    teacher_features: Float[Tensor, "B D"]
    raw_teacher_features: Float[Tensor, "B D"]
    class_features: Float[Tensor, "N D"]
    caption_features: Float[Tensor, "B D"] | None
    labels: Int[Tensor, " B"]
    prototypes: Float[Tensor, "N D"] | None
    logit_scale: float
    other_teachers: tuple[OtherTeacher, ...]
    offsets: Float[Tensor, " N"] | None


class Targets:
    """Look up what the teachers say of images in given views."""

    def __init__(
        self, lesson: Lesson, spec: Losses, device: torch.device, adapted_here: bool = True
    ) -> None:
        """adapted_here: stage 1 had the labels of this very data, so that captions may use them."""
        self.spec = spec
        self.device = device
        self.adapted_here = adapted_here
        classes = lesson.dataset.train_classes
        self.teachers = [TeacherRows(t.teacher, t.cache, classes, device) for t in lesson.teachers]
        self.fusion = None
        if lesson.fusion is not None:
            self.fusion = lesson.fusion.to(device)
        self.logit_scale = lesson.teacher.logit_scale
        self.class_features = self.teachers[0].class_features
        names = [lesson.dataset.classes[c] for c in classes]
        self.offsets = None
        if lesson.class_offset is not None:
            set_back = offsets(lesson.class_offset, names)
            self.offsets = torch.as_tensor(set_back, dtype=torch.float32, device=device)
        self.labels = labels(lesson.cache, lesson.dataset)
        self.prototypes = None
        if (self.labels >= 0).any():
            self.prototypes = self._prototypes()

    def __call__(self, index: np.ndarray, view: np.ndarray) -> Known:
        """Return what is known of the images `index` [B] in their views `view` [B]."""
        raw = self.features(index, view)
        unit = F.normalize(raw, dim=-1)
        labels = torch.from_numpy(self.labels[index]).to(self.device)
        classes = None
        if self.spec.captions == "classes":
            classes = self._caption_classes(unit, labels)

        def captions(rows: TeacherRows) -> Tensor | None:
            if classes is None:
                return rows.captions(index, view)
            return rows.class_features[classes]

        others = []
        if self.fusion is None:
            for rows in self.teachers[1:]:
                features = F.normalize(rows.features(index, view), dim=-1)
                others.append(
                    OtherTeacher(features, rows.class_features, captions(rows), rows.logit_scale)
                )
        return Known(
            teacher_features=unit,
            raw_teacher_features=raw,
            class_features=self.class_features,
            caption_features=captions(self.teachers[0]),
            labels=labels,
            prototypes=self.prototypes,
            logit_scale=self.logit_scale,
            other_teachers=tuple(others),
            offsets=self.offsets,
        )

    def _caption_classes(self, unit: Tensor, labels: Tensor) -> Int[Tensor, " B"]:
        """Return each image's label where stage 1 had it, else the teacher's own first choice.

        Classes with labels are set back: without that hardly an image of another class has one.
        """
        scores = unit @ self.class_features.T
        if self.offsets is not None:
            scores = scores - self.offsets
        first_choice = scores.argmax(dim=-1)
        if not self.adapted_here:
            return first_choice
        return torch.where(labels >= 0, labels, first_choice)

    @torch.no_grad()
    def features(self, index: np.ndarray, view: np.ndarray) -> Float[Tensor, "B D"]:
        """Return the first teacher's features, or all of them fused; not normalized."""
        if self.fusion is None:
            return self.teachers[0].features(index, view)
        return self.fusion([F.normalize(t.features(index, view), dim=-1) for t in self.teachers])

    def _prototypes(self) -> Float[Tensor, "N D"]:
        """Return each class's mean of unit features in the plain view, as unit rows.

        Zero for a class without labels.
        """
        sums = torch.zeros_like(self.class_features)
        labeled = np.flatnonzero(self.labels >= 0)
        for part in np.array_split(labeled, max(1, len(self.labels) // CHUNK)):
            features = F.normalize(self.features(part, np.zeros_like(part)), dim=-1)
            sums.index_add_(0, torch.from_numpy(self.labels[part]).to(self.device), features)
        return F.normalize(sums, dim=-1)


def labels(cache: TeacherCache, data: Dataset) -> np.ndarray:
    """Return [n] the place of each cached image's label in data.train_classes; -1: no label."""
    position = {c: i for i, c in enumerate(data.train_classes)}
    label_of = {p.key: position.get(p.label, -1) for p in data.labeled}
    if not label_of:  # then nothing is kept of each image: there may be a billion
        return np.broadcast_to(np.int64(-1), len(cache.images))
    return np.array([label_of.get(p.key, -1) for p in cache.images])


class TeacherRows:
    """One teacher's cache as features."""

    def __init__(
        self, teacher: Teacher, cache: TeacherCache, classes: list[int], device: torch.device
    ) -> None:
        """classes: rows of the cache's class features that training may name."""
        self.cache = cache
        self.device = device
        self.logit_scale = teacher.logit_scale
        self.head = teacher.features
        if isinstance(teacher.features, nn.Module):
            self.head = teacher.features.to(device)
        self.class_features = torch.from_numpy(cache.class_features[classes]).to(device)

    @torch.no_grad()
    def features(self, index: np.ndarray, view: np.ndarray) -> Float[Tensor, "B D"]:
        """Return the features of the images `index` [B] in views `view` [B]; not normalized."""
        rows = self.cache.rows[index, view].astype(np.float32)
        return self.head(torch.from_numpy(rows).to(self.device))

    def captions(self, index: np.ndarray, view: np.ndarray) -> Float[Tensor, "B D"] | None:
        """Return the unit features of the images' captions; None where the cache has none.

        Where an image has several captions, view v goes with caption v modulo their number.
        """
        captions = self.cache.caption_features
        if captions is None:
            return None
        rows = captions[index, view % captions.shape[1]].astype(np.float32)  # float16 on disk
        return F.normalize(torch.from_numpy(rows), dim=-1).to(self.device)
