"""ComKD stage 2: the training loop, top to bottom.

Every image is seen once an epoch (but for an incomplete last batch) in one of its cached views: the student from pixels,
the teacher from the cache.
Pretrain, optionally, the new projector (and EduAttention) are trained on the frozen tower's features, which costs
seconds and keeps the fresh layers' noise away from the tower's weights; then, optionally, all of the image side learns the
teacher's plain answers (Pea-KD's first training); then all weights are trained on the recipe's losses.

What bounds it: the student's own forward and backward. The teacher costs a row read and, when adapted, a small MLP.
`batch_size` is that of all processes together, so a recipe's outcome does not depend on how many there are: `step.py` says
how. The order of images and views is drawn epoch by epoch from the seed, the same in every process; a resumed run draws
its epoch again and leaves out what was done.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import HybridEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError, Interrupted
from edgeclip.host import distributed
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset
from edgeclip.host.data.order import Shuffled
from edgeclip.host.distill import losses as L
from edgeclip.host.distill.checkpoint import (
    Checkpoint,
    Position,
    load,
    optimizer_tensors,
    restore_optimizer,
    save,
    signals,
)
from edgeclip.host.distill.pixels import frozen_features, pixels_of, to_input
from edgeclip.host.distill.step import ADVICE, NewLayers, Objective, Part, Step, Towers
from edgeclip.host.distill.targets import Targets
from edgeclip.host.distill.tensorboard import Board
from edgeclip.host.distill.text import Texts, text_feature
from edgeclip.host.recipe import Pretrain, Recipe, Weighted
from edgeclip.host.student import EduAttentionHead, Student, checkpoint_gradients
from edgeclip.host.teachers import Teacher
from edgeclip.progress import Clock, say, track


class Phase(NamedTuple):
    name: str
    epochs: int
    steps: int
    """an epoch"""
    frozen: bool = False
    """the new layers alone, on the tower's features"""
    pretrain: Pretrain | None = None
    """first training's objective in the place of the recipe's losses"""


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
    fusion: nn.Module | None = None,
    texts: Texts | None = None,
    tower_features: Tensor | None = None,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
    checkpoints: Path | None = None,
    board: Path | None = None,
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Trains `student`, `head` and the text tower of `texts` in place; returns the log: a row an epoch, each loss before
    its weight, and alpha.

    others: further teachers, with caches of the same views. fusion: makes one teacher of all of them.
    tower_features: [n, K, T] of the student's frozen tower for the projector's steps, where they are known; else computed here.
    keep: called with the log after each epoch, when every weight is finite.
    checkpoints: folder where the state is kept, and from which it is taken where it holds one.
    board: folder for TensorBoard. clock: gets the time of waiting, forward, backward and optimizer.
    Raises `EdgeclipError` when a loss or a weight is not finite, `Interrupted` when a signal came and all is saved.
    """
    spec, seed, clock = recipe.train, recipe.seed, clock or Clock()
    student.to(device, memory_format=torch.channels_last)
    adapted_here = recipe.adapt is not None and recipe.adapt_data is None
    targets = Targets(teacher, cache, data, recipe.losses, device, others, adapted_here, fusion)
    learned = L.learned_parameters(recipe.losses, teacher.embed_dim, seed).to(device)
    if head is not None:
        head.to(device)
    text_tower = texts.tower.to(device) if texts else None
    if spec.gradient_checkpointing:
        checkpoint_gradients(student.tower)
    named = {"student": student, "head": head, "learned": learned, "text": text_tower}
    modules = {name: module for name, module in named.items() if module is not None}
    layers = NewLayers(student.projector, head, learned, recipe.losses.masked_feature is not None)
    if distributed.rank():
        torch.manual_seed(seed + distributed.rank())  # masks and dropout of its own
    run_step = Step(Towers(student.tower, text_tower), layers, spec, device, clock)

    n, steps = len(cache.images), max(1, len(cache.images) // spec.batch_size)
    phases = [
        *([Phase("projector", 1, spec.warmup_steps, frozen=True)] if spec.warmup_steps else []),
        *(
            [Phase("first training, epoch", spec.pretrain.epochs, steps, pretrain=spec.pretrain)]
            if spec.pretrain
            else []
        ),
        Phase("epoch", spec.epochs, steps),
    ]
    order, prompt_order = np.random.default_rng(seed), np.random.default_rng(seed)
    at, log, averages, optimizer_state = (
        Position(),
        list[dict[str, Any]](),
        _Averages({}),
        dict[str, Tensor](),
    )
    if checkpoints and (found := load(checkpoints)):
        say(f"{checkpoints}: going on after step {found.position.done}")
        at, log, averages, optimizer_state = (
            found.position,
            found.state["log"],
            _Averages(found.part("averages")),
            found.part("optimizer"),
        )
        _restore(
            found, modules, {"order": order, "prompt_order": prompt_order}, run_step, clock, device
        )
    few = (
        n * cache.views.shape[1] <= spec.warmup_steps * spec.warmup_batch_size
    )  # else the tower sees each batch as it comes
    if tower_features is None and few and at.phase < len(phases) and phases[at.phase].frozen:
        tower_features = frozen_features(student, cache, preprocess, recipe, device)
        clock.lap("student's frozen features")

    def batches(
        phase: Phase, done: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """An epoch without its first `done` steps: images and views of the whole batch, pixels of this process's share."""
        if phase.frozen:
            size = min(spec.warmup_batch_size, n)
            draws = [
                (
                    order.choice(n, size, replace=False),
                    order.integers(cache.views.shape[1], size=size),
                )
                for _ in range(phase.steps)
            ][done:]
            if tower_features is not None:
                yield from ((*draw, None) for draw in draws)
                return
            pairs = (
                pair
                for draw in draws
                for pair in zip(
                    *(part[distributed.local_slice(size)].tolist() for part in draw), strict=True
                )
            )
            for draw, (_, x) in zip(
                draws,
                pixels_of(
                    cache,
                    pairs,
                    preprocess,
                    distributed.split_sizes(size)[distributed.rank()],
                    spec.threads,
                ),
                strict=True,
            ):
                yield *draw, x
            return
        seed, size = int(order.integers(2**62)), min(spec.batch_size, n)
        shuffled, own = Shuffled(n, seed), distributed.local_slice(size)

        def drawn(
            step: int,
        ) -> tuple[np.ndarray, np.ndarray]:  # by its number, so that no list of the epoch is held
            return shuffled[np.arange(step * size, (step + 1) * size)], np.random.default_rng(
                [seed, step]
            ).integers(cache.views.shape[1], size=size)

        pairs = (
            pair
            for step in range(done, phase.steps)
            for pair in zip(*(part[own].tolist() for part in drawn(step)), strict=True)
        )
        pixels = pixels_of(cache, pairs, preprocess, own.stop - own.start, spec.threads)
        for step, (_, x) in zip(range(done, phase.steps), pixels, strict=True):
            yield *drawn(step), x

    def parts(
        phase: Phase,
        index: np.ndarray,
        view: np.ndarray,
        drawn: np.ndarray,
        pixels: np.ndarray | None,
    ) -> list[Part]:
        """What this process's towers see of the batch, in as many parts as the recipe says."""
        reads, pixels = (
            texts is not None and phase.pretrain is None,
            None if phase.frozen else pixels,
        )
        if pixels is None and not reads:
            return []
        count = min(spec.accumulate, len(index[distributed.local_slice(len(index))]))
        found = [Part()] * count
        if pixels is not None:
            hide = None if phase.pretrain else recipe.losses.masked_feature
            found = [
                part._replace(pixels=to_input(x, preprocess, device), hide=hide)
                for part, x in zip(found, np.array_split(pixels, count), strict=True)
            ]
        if texts is not None and reads:
            own = distributed.local_slice(len(index))
            ids = (
                texts.captions[index[own], view[own] % texts.captions.shape[1]],
                texts.prompts[drawn[distributed.local_slice(len(drawn))]],
            )
            split = zip(found, *(of.tensor_split(count) for of in ids), strict=True)
            found = [
                part._replace(captions=c.to(device), prompts=p.to(device)) for part, c, p in split
            ]
        return found

    @torch.no_grad()
    def frozen(
        index: np.ndarray, view: np.ndarray, pixels: np.ndarray | None, counts: list[int]
    ) -> Tensor:
        """The frozen tower's features of the whole batch: those that are known, or each process's share of them, gathered."""
        if tower_features is not None:
            return tower_features[index, view]
        assert pixels is not None
        features = distributed.all_gather(
            student.tower(to_input(pixels, preprocess, device)), counts
        )
        clock.lap("student's frozen features")
        return features

    def full(
        batch: L.Batch, prompts: Tensor | None, drawn: np.ndarray
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, said = L.total(batch, recipe.losses)
        if texts is None:
            return loss, said
        text = text_feature(batch, prompts, texts.prompt_features[drawn].to(device))
        return loss + recipe.student.text_weight * text, said | {"text_feature": text.detach()}

    def objective(phase: Phase, drawn: np.ndarray) -> Objective:
        if pretrain := phase.pretrain:
            return lambda batch, _: _pretrain_loss(batch, pretrain)
        return partial(full, drawn=drawn)

    def keep_state(
        position: Position, optimizer: torch.optim.Optimizer | None, order_state: Any
    ) -> None:
        _refuse_broken(modules, f"step {position.done}")
        tensors = {
            f"{name}.{k}": v
            for name, module in modules.items()
            for k, v in module.state_dict().items()
        } | _random(device)
        tensors |= {f"averages.{k}": v for k, v in averages.tensors().items()}
        tensors |= {
            f"optimizer.{k}": v
            for k, v in (optimizer_tensors(optimizer) if optimizer else {}).items()
        }
        draws = {"order": order_state, "prompt_order": prompt_order.bit_generator.state}
        state = {
            "log": log,
            "draws": draws,
            "processes": distributed.world_size(),
            "scaler": run_step.scaler.state_dict(),
            "seconds": clock.laps,
        }
        if checkpoints and not distributed.rank():
            save(checkpoints, Checkpoint(position, tensors, state))
        distributed.barrier()

    with (
        signals() if checkpoints else contextlib.nullcontext([]) as noted,
        Board(board, at.done) as shown,
    ):
        for phase in phases[at.phase :]:
            optimizer = _optimizer(
                phase,
                recipe,
                student,
                text_tower,
                [m for m in (student.projector, head, learned) if m is not None],
            )
            restore_optimizer(optimizer, optimizer_state)
            optimizer_state = {}
            for epoch in range(at.epoch, phase.epochs):
                _set_modes(phase, student, recipe)
                order_state, shown.note = order.bit_generator.state, ""
                title = (
                    "stage 2: projector"
                    if phase.frozen
                    else f"stage 2: {phase.name} {epoch + 1} of {phase.epochs}"
                )
                for index, view, pixels in track(
                    batches(phase, at.step), title, phase.steps - at.step, lambda: shown.note
                ):
                    clock.lap("waiting for images")
                    counts, own = (
                        distributed.split_sizes(len(index)),
                        distributed.local_slice(len(index)),
                    )
                    known = _gathered(targets(index[own], view[own]), counts)
                    drawn = np.arange(0)
                    if texts is not None and phase.pretrain is None:
                        drawn = prompt_order.choice(
                            len(texts.prompts),
                            min(spec.batch_size, len(texts.prompts)),
                            replace=False,
                        )
                    position = epoch * phase.steps + at.step
                    said = run_step(
                        optimizer,
                        _cosine(position, phase.epochs * phase.steps),
                        parts(phase, index, view, drawn, pixels),
                        {"image": frozen(index, view, pixels, counts)} if phase.frozen else {},
                        known,
                        dict.fromkeys(("image", "masked", "text"), counts)
                        | {"prompts": distributed.split_sizes(len(drawn))},
                        objective(phase, drawn),
                        f"projector step {position}"
                        if phase.frozen
                        else f"{phase.name} {epoch + 1}, step {position}",
                    )
                    averages.add(said)
                    at = at._replace(step=at.step + 1, done=at.done + 1)
                    rates = {"learning_rate": optimizer.param_groups[-1]["lr"]} | (
                        {"alpha": head.alpha.item()} if head else {}
                    )
                    shown.step(at.done, len(index), said, rates, clock, device)
                    stop = (
                        distributed.all_reduce_max(noted[0] if noted else 0) if checkpoints else 0
                    )
                    if at.step < phase.steps and (
                        stop or (spec.checkpoint_every and at.done % spec.checkpoint_every == 0)
                    ):
                        keep_state(at, optimizer, order_state)
                        if stop:
                            raise Interrupted(stop, _saved(checkpoints, at))
                    clock.lap("rest of stage 2")
                log.append({"epoch": len(log) + (not phases[0].frozen), **averages.row(head)})
                averages = _Averages({})
                _refuse_broken(
                    modules,
                    "end of the projector's steps"
                    if phase.frozen
                    else f"end of epoch {log[-1]['epoch']}",
                )
                if keep is not None and not distributed.rank():
                    keep(log)
                ended = epoch + 1 == phase.epochs
                at = (
                    Position(at.phase + 1, 0, 0, at.done)
                    if ended
                    else at._replace(epoch=epoch + 1, step=0)
                )
                if checkpoints:  # the last one too: what follows may fail
                    keep_state(at, None if ended else optimizer, order.bit_generator.state)
                    if stop:
                        raise Interrupted(stop, _saved(checkpoints, at))
                clock.lap("rest of stage 2")
    student.eval()
    return log


def _gathered(known: dict[str, Any], counts: list[int]) -> dict[str, Any]:
    """The teacher's half of the whole batch, from that of each process."""

    def whole(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else distributed.all_gather(rows, counts)

    others = tuple(
        t._replace(features=whole(t.features), caption_features=whole(t.caption_features))
        for t in known["other_teachers"]
    )
    rows = ("teacher_features", "raw_teacher_features", "caption_features", "labels")
    return known | {name: whole(known[name]) for name in rows} | {"other_teachers": others}


def _pretrain_loss(batch: L.Batch, spec: Pretrain) -> tuple[Tensor, dict[str, Tensor]]:
    """Pea-KD's first training: FD, or cross-entropy with the class that the teacher itself finds best."""
    if spec.labels == "features":
        loss = L.feature(batch._replace(text_features=None), Weighted())
    else:
        best = (batch.teacher_features @ batch.class_features.T).argmax(dim=-1)
        loss = F.cross_entropy(
            batch.logit_scale * batch.image_features @ batch.class_features.T, best
        )
    return loss, {f"pretrain_{spec.labels}": loss.detach()}


def _cosine(step: int, steps: int) -> float:
    """The learning rate's factor: 5 % linear warm-up, then a half cosine to 0."""
    warm = max(1, steps // 20)
    return (
        (step + 1) / warm
        if step < warm
        else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )


def _optimizer(
    phase: Phase, recipe: Recipe, student: Student, text: nn.Module | None, new: list[nn.Module]
) -> torch.optim.Optimizer:
    """Of the new layers and, unless they are frozen, the towers."""
    spec, stem = recipe.train, recipe.student.stem
    layers = [
        p for module in (*new, *([text.projector] if text else [])) for p in module.parameters()
    ]
    groups: list[dict[str, Any]] = [
        {"params": layers, "lr": spec.warmup_lr if phase.frozen else spec.lr}
    ]
    if not phase.frozen:
        towers = [student.tower, *([text.tower] if text else [])]
        weights = [
            p for tower in towers for p in tower.parameters() if p.requires_grad
        ]  # what is frozen gets no optimizer state
        groups.insert(0, {"params": weights, "lr": spec.lr * spec.tower_lr_ratio})
        if stem:
            slower = {
                id(p)
                for m in student.tower.modules()
                if isinstance(m, HybridEmbed)
                for p in m.backbone.parameters()
            }
            of_stem = [p for p in weights if id(p) in slower]
            groups[0] |= {"params": [p for p in weights if id(p) not in slower]}
            groups.insert(
                1, {"params": of_stem, "lr": spec.lr * spec.tower_lr_ratio * stem.lr_ratio}
            )
    least = (
        2 if spec.weight_decay_of == "matrices" else 1
    )  # a scalar (alpha, a log scale) is no weight of many: decay would only pull it to 0
    split = [
        (g, [p for p in g["params"] if (p.ndim >= least) == decays], decays)
        for g in groups
        for decays in (True, False)
    ]
    groups = [
        g | {"params": params} | ({} if decays else {"weight_decay": 0.0})
        for g, params, decays in split
        if params
    ]
    if spec.optimizer == "sgd" and not phase.frozen:
        return torch.optim.SGD(groups, momentum=spec.momentum, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=spec.weight_decay, fused=True)


def _set_modes(phase: Phase, student: Student, recipe: Recipe) -> None:
    if phase.frozen:
        student.eval()
        student.projector.train()
        return
    student.train()
    if (prompts := recipe.student.visual_prompts) and prompts.freeze_tower:
        student.tower.eval()
    if recipe.train.freeze_batch_norm:
        for module in student.tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _refuse_broken(modules: dict[str, nn.Module], where: str) -> None:
    """A finite loss can have a gradient that is not: the weights are looked at before they replace those that were kept."""
    for part, module in modules.items():
        for name, value in module.state_dict().items():
            if (
                part != "learned" and not torch.isfinite(value).all()
            ):  # a running mean that has not begun is nan
                raise EdgeclipError(where, f"weight '{name}' is not finite", ADVICE)


def _random(device: torch.device) -> dict[str, Tensor]:
    """torch's random state of every process."""
    states = {"random.cpu": torch.get_rng_state()} | (
        {"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )
    return {
        name: distributed.all_gather(state[None].to(device)).cpu() for name, state in states.items()
    }


def _restore(
    found: Checkpoint,
    modules: dict[str, nn.Module],
    draws: dict[str, np.random.Generator],
    step: Step,
    clock: Clock,
    device: torch.device,
) -> None:
    for name, module in modules.items():
        module.load_state_dict(found.part(name))
    for name, generator in draws.items():
        generator.bit_generator.state = found.state["draws"][name]
    step.scaler.load_state_dict(found.state["scaler"])
    clock.laps = {
        name: found.state["seconds"].get(name, 0.0) + clock.laps.get(name, 0.0)
        for name in found.state["seconds"] | clock.laps
    }
    if found.state["processes"] != distributed.world_size():
        say(
            f"the checkpoint is of {found.state['processes']} processes and these are {distributed.world_size()}: masks and dropout are drawn otherwise from here on"
        )
        return
    torch.set_rng_state(
        found.tensors["random.cpu"][distributed.rank()].clone()
    )  # a view is read from its storage's start
    if device.type == "cuda" and "random.cuda" in found.tensors:
        torch.cuda.set_rng_state(found.tensors["random.cuda"][distributed.rank()].clone(), device)


def _saved(folder: Path | None, at: Position) -> str:
    return f"Interrupted: step {at.done} is finished and saved in {folder}; the same command goes on from there."


class _Averages:
    """Means over one epoch, kept on the device until they are asked for."""

    def __init__(self, so_far: dict[str, Tensor]) -> None:
        """so_far: each loss's values, as `tensors` gives them."""
        self.rows = [
            dict(zip(so_far, values, strict=True)) for values in zip(*so_far.values(), strict=True)
        ]

    def add(self, said: dict[str, Tensor]) -> None:
        self.rows.append(said)

    def tensors(self) -> dict[str, Tensor]:
        return (
            {k: torch.stack([r[k] for r in self.rows]) for k in self.rows[0]} if self.rows else {}
        )

    def row(self, head: EduAttentionHead | None) -> dict[str, Any]:
        means = {k: float(values.mean()) for k, values in self.tensors().items()}
        return means | ({"alpha": head.alpha.item()} if head else {})
