"""ComKD stage 2: the training loop, top to bottom.

Every picture is seen once an epoch (but for an incomplete last batch) in one of its cached views: the student from pixels,
the teacher from the cache.
First, optionally, the new projector (and EduAttention) are trained on the frozen tower's features, which costs
seconds and keeps the fresh layers' noise away from the tower's weights; then, optionally, all of the image side learns the
teacher's plain answers (Pea-KD's first training); then all weights are trained on the recipe's losses.

What bounds it: the student's own forward and backward. The teacher costs a row read and, when adapted, a small MLP.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.cache import TeacherCache, replay
from edgeclip.data import Dataset
from edgeclip.distill import losses as L
from edgeclip.distill import masking
from edgeclip.distill.targets import Targets
from edgeclip.distill.text import Texts, text_feature
from edgeclip.errors import EdgeclipError
from edgeclip.pictures import read, stream
from edgeclip.preprocess import Preprocess, normalise, open_picture
from edgeclip.progress import track
from edgeclip.recipe import First, Recipe, Weighted
from edgeclip.students import EduAttentionHead, Student
from edgeclip.teachers import Teacher

Objective = Callable[[L.Batch], tuple[Tensor, dict[str, Tensor]]]
"""the loss, and what the log says of it"""


def train(
    student: Student,
    head: EduAttentionHead | None,
    teacher: Teacher,
    cache: TeacherCache,
    preprocess: Preprocess,
    data: Dataset,
    recipe: Recipe,
    device: torch.device,
    *,
    others: list[tuple[Teacher, TeacherCache]] | None = None,
    texts: Texts | None = None,
    tower_features: Tensor | None = None,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains `student`, `head` and the text tower of `texts` in place; returns the log: a row an epoch, each loss before
    its weight, and alpha.

    others: further teachers, with caches of the same views.
    tower_features: [n, K, T] of the student's frozen tower for the projector's steps, where they are known already.
    keep: called with the log after each epoch, when every weight is finite.
    Raises `EdgeclipError` when a loss or a weight is not finite.
    """
    spec, seed = recipe.train, recipe.seed
    student.to(device, memory_format=torch.channels_last)
    adapted_here = recipe.adapt is not None and recipe.adapt_data is None
    targets = Targets(teacher, cache, data, recipe.losses, device, others, adapted_here)
    learned = L.learned_parameters(recipe.losses, teacher.embed_dim, seed).to(device)
    if head is not None:
        head.to(device)

    def batch(tower_features: Tensor, masked: Tensor | None, index: np.ndarray, view: np.ndarray, image_only: bool = False) -> L.Batch:
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
        s = None if texts is None or image_only else texts.tower(texts.captions[index].to(device))
        return L.Batch(image_features=v, head_features=f_e, raw_features=raw, masked_features=hidden, text_features=s, learned=learned, **known)

    def full(b: L.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = L.total(b, recipe.losses)
        if texts is None:
            return loss, parts
        text = text_feature(b, texts, prompt_order.choice(len(texts.prompts), min(spec.batch_size, len(texts.prompts)), replace=False))
        return loss + recipe.student.text_weight * text, parts | {"text_feature": text.detach()}

    log: list[dict[str, Any]] = []
    order, prompt_order = np.random.default_rng(seed), np.random.default_rng(seed)
    text_tower = texts.tower.to(device) if texts else None
    text_projector = text_tower.projector if text_tower else None
    new_layers = [p for module in (student.projector, head, learned, text_projector) if module is not None for p in module.parameters()]
    if spec.warmup_steps:
        if tower_features is None:
            tower_features = frozen_features(student, cache, preprocess, recipe, device)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(new_layers, lr=spec.warmup_lr, weight_decay=spec.weight_decay)
        student.projector.train()
        averages = _Averages()
        for step in track(range(spec.warmup_steps), "stage 2: projector", spec.warmup_steps):
            index = order.choice(len(tower_features), min(spec.warmup_batch_size, len(tower_features)), replace=False)
            view = order.integers(tower_features.shape[1], size=len(index))
            loss, parts = full(batch(tower_features[index, view], None, index, view))
            _step(optimizer, loss, parts, _cosine(step, spec.warmup_steps), f"projector step {step}")
            averages.add(loss, parts)
        log.append({"epoch": 0, **averages.row(head)})
        _end_epoch((student, head, text_tower), log, "end of the projector's steps", keep)

    steps_per_epoch = max(1, len(cache.pictures) // spec.batch_size)

    def epochs(count: int, name: str, objective: Objective) -> Iterator[dict[str, Any]]:
        """Trains all weights that are not frozen on `objective`; gives a log row an epoch."""
        towers = [student.tower, *([text_tower.tower] if text_tower else [])]
        tower_weights = [p for tower in towers for p in tower.parameters() if p.requires_grad]  # what is frozen gets no optimiser state
        groups = [{"params": tower_weights, "lr": spec.lr * spec.tower_lr_ratio}, {"params": new_layers, "lr": spec.lr}]
        if spec.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=spec.momentum, weight_decay=spec.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=spec.weight_decay)
        for epoch in range(count):
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
            for step, (index, x) in enumerate(track(batches, f"stage 2: {name} {epoch + 1} of {count}", steps_per_epoch)):
                pixels = _to(x, preprocess, device)
                hide = recipe.losses.masked_feature if objective is full else None
                masked = masking.forward(student.tower, pixels, hide) if hide else None
                loss, parts = objective(batch(student.tower(pixels), masked, index, views[index], image_only=objective is not full))
                position = epoch * steps_per_epoch + step
                _step(optimizer, loss, parts, _cosine(position, count * steps_per_epoch), f"{name} {epoch + 1}, step {position}")
                averages.add(loss, parts)
            yield averages.row(head)

    first, done = spec.first, 0
    phases: list[tuple[str, int, Objective]] = [("epoch", spec.epochs, full)]
    if first is not None:
        phases.insert(0, ("first training, epoch", first.epochs, partial(_first, spec=first)))
    for name, count, objective in phases:
        for row in epochs(count, name, objective):
            done += 1
            log.append({"epoch": done, **row})
            _end_epoch((student, head, text_tower), log, f"end of epoch {done}", keep)
    student.eval()
    return log


def _first(batch: L.Batch, spec: First) -> tuple[Tensor, dict[str, Tensor]]:
    """Pea-KD's first training: FD, or cross-entropy with the class that the teacher itself finds best."""
    if spec.labels == "features":
        loss = L.feature(batch._replace(text_features=None), Weighted())
    else:
        best = (batch.teacher_features @ batch.class_features.T).argmax(dim=-1)
        loss = F.cross_entropy(batch.logit_scale * batch.image_features @ batch.class_features.T, best)
    return loss, {f"first_{spec.labels}": loss.detach()}


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


def _end_epoch(modules: tuple[nn.Module | None, ...], log: list[dict[str, Any]], where: str, keep: Callable[[list[dict[str, Any]]], None] | None) -> None:
    """A finite loss can have a gradient that is not: the weights are looked at before they replace those that were kept."""
    for name, value in (item for module in modules if module is not None for item in module.state_dict().items()):
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
