"""ComKD stage 2: the training loop, top to bottom.

Every picture is seen once an epoch in one of its cached views: the student from pixels, the teacher from the cache.
First, optionally, the new projector (and EduAttention) are trained on the frozen tower's features, which costs
seconds and keeps the fresh layers' noise away from the tower's weights; then all weights are.

What bounds it: the student's own forward and backward. The teacher costs a row read and, when adapted, a small MLP.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.cache import TeacherCache, replay
from edgeclip.data import Dataset
from edgeclip.distill import losses as L
from edgeclip.distill import masking
from edgeclip.errors import EdgeclipError
from edgeclip.pictures import read, stream
from edgeclip.preprocess import Preprocess, normalise, open_picture
from edgeclip.progress import track
from edgeclip.recipe import Losses, Recipe
from edgeclip.students import EduAttentionHead, Student
from edgeclip.teachers import Teacher


def train(
    student: Student,
    head: EduAttentionHead | None,
    teacher: Teacher,
    cache: TeacherCache,
    preprocess: Preprocess,
    data: Dataset,
    recipe: Recipe,
    device: torch.device,
    tower_features: Tensor | None = None,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains `student` and `head` in place; returns the log: a row an epoch, each loss before its weight, and alpha.

    tower_features: [n, K, T] of the student's frozen tower for the projector's steps, where they are known already.
    `keep` is called with the log after each epoch, when every weight is finite.
    Raises `EdgeclipError` when a loss or a weight is not finite.
    """
    spec, seed = recipe.train, recipe.seed
    student.to(device, memory_format=torch.channels_last)
    targets = Targets(teacher, cache, data, recipe.losses, device)
    learned = L.learned_parameters(recipe.losses, teacher.embed_dim, seed).to(device)
    if head is not None:
        head.to(device)

    def batch(tower_features: Tensor, masked: Tensor | None, index: np.ndarray, view: np.ndarray) -> L.Batch:
        raw = student.projector(tower_features)
        v = F.normalize(raw, dim=-1)
        known = targets(index, view)
        f_e = v
        if head is not None:
            f_e = head(
                v, targets.class_features, raw if head.spec.query == "raw" else None, known["teacher_features"] if head.spec.residual == "teacher" else None
            )
        # In the projector's steps there are no pixels to hide, so MFD is FD.
        hidden = None if recipe.losses.masked_feature is None else v if masked is None else F.normalize(student.projector(masked), dim=-1)
        return L.Batch(image_features=v, head_features=f_e, raw_features=raw, masked_features=hidden, learned=learned, **known)

    log: list[dict[str, Any]] = []
    order = np.random.default_rng(seed)
    new_layers = [*student.projector.parameters(), *(head.parameters() if head else []), *learned.parameters()]
    if spec.warmup_steps:
        if tower_features is None:
            tower_features = frozen_features(student, cache, preprocess, recipe, device)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(new_layers, lr=spec.warmup_lr, weight_decay=spec.weight_decay)
        student.projector.train()
        averages = _Averages()
        for step in track(range(spec.warmup_steps), "stage 2: projector", spec.warmup_steps):
            index = order.choice(len(tower_features), min(spec.warmup_batch_size, len(tower_features)), replace=False)
            view = order.integers(tower_features.shape[1], size=len(index))
            loss, parts = L.total(batch(tower_features[index, view], None, index, view), recipe.losses)
            _step(optimizer, loss, parts, _cosine(step, spec.warmup_steps), f"projector step {step}")
            averages.add(loss, parts)
        log.append({"epoch": 0, **averages.row(head)})
        _end_epoch(student, head, log, "end of the projector's steps", keep)

    # what is frozen gets no optimiser state
    tower_weights = [p for p in student.tower.parameters() if p.requires_grad]
    groups = [{"params": tower_weights, "lr": spec.lr * spec.tower_lr_ratio}, {"params": new_layers, "lr": spec.lr}]
    if spec.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=spec.momentum, weight_decay=spec.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=spec.weight_decay)
    steps_per_epoch = max(1, len(cache.pictures) // spec.batch_size)
    for epoch in range(spec.epochs):
        student.train()
        if (prompts := recipe.student.visual_prompts) and prompts.freeze_tower:
            student.tower.eval()
        if spec.freeze_batch_norm:
            for module in student.tower.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        averages = _Averages()
        index_order = order.permutation(len(cache.pictures))[: steps_per_epoch * spec.batch_size]
        views = order.integers(cache.views.shape[1], size=len(cache.pictures))
        batches = _pixels(cache, index_order, views, preprocess, spec.batch_size, spec.threads)
        for step, (index, x) in enumerate(track(batches, f"stage 2: epoch {epoch + 1} of {spec.epochs}", steps_per_epoch)):
            pixels = _to(x, preprocess, device)
            masked = masking.forward(student.tower, pixels, recipe.losses.masked_feature) if recipe.losses.masked_feature else None
            loss, parts = L.total(batch(student.tower(pixels), masked, index, views[index]), recipe.losses)
            position = epoch * steps_per_epoch + step
            _step(optimizer, loss, parts, _cosine(position, spec.epochs * steps_per_epoch), f"step {position}")
            averages.add(loss, parts)
        log.append({"epoch": epoch + 1, **averages.row(head)})
        _end_epoch(student, head, log, f"end of epoch {epoch + 1}", keep)
    student.eval()
    return log


class Targets:
    """What the teacher, the captions and the labels say of a batch: the half of `losses.Batch` that no gradient reaches."""

    def __init__(self, teacher: Teacher, cache: TeacherCache, data: Dataset, spec: Losses, device: torch.device):
        self.teacher, self.cache, self.spec, self.device = teacher, cache, spec, device
        self.features = teacher.features.to(device) if isinstance(teacher.features, nn.Module) else teacher.features
        self.class_features = torch.from_numpy(cache.class_features[data.train_classes]).to(device)
        position = {c: i for i, c in enumerate(data.train_classes)}
        label_of = {p.key: position.get(p.label, -1) for p in data.labelled}
        self.labels = np.array([label_of.get(p.key, -1) for p in cache.pictures])
        self.prototypes = self._prototypes() if (self.labels >= 0).any() else None

    def __call__(self, index: np.ndarray, view: np.ndarray) -> dict[str, Any]:
        raw = self._raw(index, view)
        unit = F.normalize(raw, dim=-1)
        labels = torch.from_numpy(self.labels[index]).to(self.device)
        captions = None
        if self.spec.captions == "classes":
            first = (unit @ self.class_features.T).argmax(dim=-1)
            captions = self.class_features[torch.where(labels >= 0, labels, first)]
        elif self.cache.caption_features is not None:
            captions = F.normalize(torch.from_numpy(self.cache.caption_features[index].astype(np.float32)), dim=-1).to(self.device)  # float16 on disk
        return {
            "teacher_features": unit,
            "raw_teacher_features": raw,
            "class_features": self.class_features,
            "caption_features": captions,
            "labels": labels,
            "prototypes": self.prototypes,
            "logit_scale": self.teacher.logit_scale,
        }

    @torch.no_grad()
    def _raw(self, index: np.ndarray, view: np.ndarray) -> Tensor:
        return self.features(torch.from_numpy(self.cache.rows[index, view].astype(np.float32)).to(self.device))

    def _prototypes(self) -> Tensor:
        """[N, D]: the unit mean of each class's unit features in the plain view; zero where nothing is labelled."""
        sums = torch.zeros_like(self.class_features)
        for part in np.array_split(np.flatnonzero(self.labels >= 0), max(1, len(self.labels) // 4096)):
            sums.index_add_(0, torch.from_numpy(self.labels[part]).to(self.device), F.normalize(self._raw(part, np.zeros_like(part)), dim=-1))
        return F.normalize(sums, dim=-1)


def _cosine(step: int, steps: int) -> float:
    """The learning rate's factor: 5 % linear warm-up, then a half cosine to 0."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


ADVICE = "lower the learning rate or look for broken features (the student of the last good epoch, if there is one, is the run's student.partial)"


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, parts: dict[str, Tensor], factor: float, where: str) -> None:
    if not torch.isfinite(loss):
        broken = next((f"loss '{name}' is {value.item()}" for name, value in parts.items() if not torch.isfinite(value)), None)
        raise EdgeclipError(where, broken or f"weighted sum of the losses is {loss.item()}", ADVICE)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _end_epoch(
    student: Student, head: EduAttentionHead | None, log: list[dict[str, Any]], where: str, keep: Callable[[list[dict[str, Any]]], None] | None
) -> None:
    """A finite loss can have a gradient that is not: the weights are looked at before they replace those that were kept."""
    for name, value in [*student.state_dict().items(), *(head.state_dict().items() if head else [])]:
        if not torch.isfinite(value).all():
            raise EdgeclipError(where, f"weight '{name}' is not finite", ADVICE)
    if keep is not None:
        keep(log)


def _pixels(
    cache: TeacherCache, order: np.ndarray, views: np.ndarray, preprocess: Preprocess, batch_size: int, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    def make(i: int) -> np.ndarray:
        picture = cache.pictures[i]
        return replay(open_picture(read(picture), picture.key), cache.views[i, views[i]], preprocess)

    skipped: list[str] = []
    yield from stream(order.tolist(), make, batch_size, skipped, threads)
    if skipped:  # it was readable when the cache was built
        raise EdgeclipError(cache.folder, f"a picture changed since the cache was built ({skipped[0]})", "restore it, or delete this cache")


def _to(pixels: np.ndarray, preprocess: Preprocess, device: torch.device) -> Tensor:
    return torch.from_numpy(normalise(pixels, preprocess)).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def frozen_features(student: Student, cache: TeacherCache, preprocess: Preprocess, recipe: Recipe, device: torch.device) -> Tensor:
    """[n, K, T]: the frozen student tower's features of every cached view."""
    student.eval()
    n, k = cache.views.shape[:2]
    out = []
    total = k * math.ceil(n / recipe.train.batch_size)
    parts = ((v, part) for v in range(k) for part in _pixels(cache, np.arange(n), np.full(n, v), preprocess, recipe.train.batch_size, recipe.train.threads))
    for _, (_, x) in track(parts, "student features", total):
        out.append(student.tower(_to(x, preprocess, device)))
    return torch.cat(out).reshape(k, n, -1).transpose(0, 1)


class _Averages:
    """Means over one epoch, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []

    def add(self, loss: Tensor, parts: dict[str, Tensor]) -> None:
        self.rows.append({"loss": loss.detach(), **parts})

    def row(self, head: EduAttentionHead | None) -> dict[str, Any]:
        means = {k: float(torch.stack([r[k] for r in self.rows]).mean()) for k in self.rows[0]}
        return means | ({"alpha": head.alpha.item()} if head else {})
