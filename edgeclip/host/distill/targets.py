"""What the teachers, the captions and the labels say of a batch: the half of `losses.Batch` that no gradient reaches.

Rows come from the cache (a memory map, so nothing is held but the batch) and pass through the adapted head where there
is one. Further teachers (MobileCLIP, MST-KD) have caches of the same views of the same images: `cache.refuse_other_views`.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset
from edgeclip.host.distill.losses import OtherTeacher
from edgeclip.host.recipe import Losses
from edgeclip.host.teachers import Teacher


class Targets:
    def __init__(
        self,
        teacher: Teacher,
        cache: TeacherCache,
        data: Dataset,
        spec: Losses,
        device: torch.device,
        others: list[tuple[Teacher, TeacherCache]] | None = None,
        adapted_here: bool = True,
        fusion: nn.Module | None = None,
    ):
        """adapted_here: stage 1 had this very set's labels, so that captions may use them. fusion: makes one teacher of all."""
        self.spec, self.device, self.logit_scale, self.adapted_here = (
            spec,
            device,
            teacher.logit_scale,
            adapted_here,
        )
        self.teachers = [
            TeacherRows(t, c, data.train_classes, device)
            for t, c in [(teacher, cache), *(others or [])]
        ]
        self.fusion = fusion.to(device) if fusion else None
        self.class_features = self.teachers[0].class_features
        self.labels = labels(cache, data)
        self.prototypes = self._prototypes() if (self.labels >= 0).any() else None

    def __call__(self, index: np.ndarray, view: np.ndarray) -> dict[str, Any]:
        """Fields of `losses.Batch` for the images `index` [B] in their views `view` [B]."""
        first, *others = self.teachers if self.fusion is None else self.teachers[:1]
        raw = self._features(index, view)
        unit = F.normalize(raw, dim=-1)
        labels = torch.from_numpy(self.labels[index]).to(self.device)
        classes = None
        if (
            self.spec.captions == "classes"
        ):  # an image's label where stage 1 had it, else the teacher's own first choice
            first_choice = (unit @ self.class_features.T).argmax(dim=-1)
            classes = (
                torch.where(labels >= 0, labels, first_choice)
                if self.adapted_here
                else first_choice
            )

        def captions(rows: TeacherRows) -> Tensor | None:
            return rows.captions(index, view) if classes is None else rows.class_features[classes]

        return {
            "teacher_features": unit,
            "raw_teacher_features": raw,
            "class_features": self.class_features,
            "caption_features": captions(first),
            "labels": labels,
            "prototypes": self.prototypes,
            "logit_scale": self.logit_scale,
            "other_teachers": tuple(
                OtherTeacher(
                    F.normalize(t.features(index, view), dim=-1),
                    t.class_features,
                    captions(t),
                    t.logit_scale,
                )
                for t in others
            ),
        }

    @torch.no_grad()
    def _features(self, index: np.ndarray, view: np.ndarray) -> Float[Tensor, "B D"]:
        """The first teacher's, or all of them fused; not normalized."""
        if self.fusion is None:
            return self.teachers[0].features(index, view)
        return self.fusion([F.normalize(t.features(index, view), dim=-1) for t in self.teachers])

    def _prototypes(self) -> Float[Tensor, "N D"]:
        """The unit mean of each class's unit features in the plain view; zero where nothing is labeled."""
        sums = torch.zeros_like(self.class_features)
        for part in np.array_split(
            np.flatnonzero(self.labels >= 0), max(1, len(self.labels) // 4096)
        ):
            features = F.normalize(self._features(part, np.zeros_like(part)), dim=-1)
            sums.index_add_(0, torch.from_numpy(self.labels[part]).to(self.device), features)
        return F.normalize(sums, dim=-1)


def labels(cache: TeacherCache, data: Dataset) -> np.ndarray:
    """[n]: of each cached image its place in data.train_classes; -1 where it has no label."""
    position = {c: i for i, c in enumerate(data.train_classes)}
    label_of = {p.key: position.get(p.label, -1) for p in data.labeled}
    if not label_of:  # then nothing is kept of each image: there may be a billion
        return np.broadcast_to(np.int64(-1), len(cache.images))
    return np.array([label_of.get(p.key, -1) for p in cache.images])


class TeacherRows:
    """One teacher's cache as features."""

    def __init__(
        self, teacher: Teacher, cache: TeacherCache, classes: list[int], device: torch.device
    ):
        self.cache, self.device, self.logit_scale = cache, device, teacher.logit_scale
        self.head = (
            teacher.features.to(device)
            if isinstance(teacher.features, nn.Module)
            else teacher.features
        )
        self.class_features = torch.from_numpy(cache.class_features[classes]).to(device)

    @torch.no_grad()
    def features(self, index: np.ndarray, view: np.ndarray) -> Float[Tensor, "B D"]:
        """Not normalized."""
        return self.head(
            torch.from_numpy(self.cache.rows[index, view].astype(np.float32)).to(self.device)
        )

    def captions(self, index: np.ndarray, view: np.ndarray) -> Float[Tensor, "B D"] | None:
        """Of an image with several captions, view v goes with caption v modulo their number."""
        captions = self.cache.caption_features
        if captions is None:
            return None
        rows = captions[index, view % captions.shape[1]]
        return F.normalize(torch.from_numpy(rows.astype(np.float32)), dim=-1).to(
            self.device
        )  # float16 on disk
