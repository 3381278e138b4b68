"""ComKD stage 2: the training loop, top to bottom.

Every image is seen once an epoch (but for an incomplete last batch) in one of its cached views: the
student from pixels, the teacher from the cache. There are up to three phases. Optionally, the new
projector (and EduAttention) are trained on the frozen tower's features, which costs seconds and
keeps the fresh layers' noise away from the tower's weights; then, optionally, all of the image side
learns the teacher's plain answers (Pea-KD's first training); then all weights are trained on the
recipe's losses.

What bounds it: the student's own forward and backward. The teacher costs a row read and, when
adapted, a small MLP. `batch_size` is that of all processes together, so a recipe's outcome does not
depend on how many there are: `step.py` says how.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from edgeclip.host import distributed
from edgeclip.host.distill.batches import Batch, Phase, Source
from edgeclip.host.distill.checkpoint import Progress, restore_optimizer, signals
from edgeclip.host.distill.log import Log
from edgeclip.host.distill.microbatches import of_pixels, with_texts
from edgeclip.host.distill.objective import objective
from edgeclip.host.distill.optimizer import build_optimizer, cosine
from edgeclip.host.distill.pixels import frozen_features, to_input
from edgeclip.host.distill.resume import Keeper, refuse_broken, resume
from edgeclip.host.distill.step import Features, Metrics, MicroBatch, Work
from edgeclip.host.distill.targets import Known, Lesson
from edgeclip.host.distill.tensorboard import Board
from edgeclip.host.distill.text import Texts
from edgeclip.host.distill.training import NOTHING, Learner, Output, Training, set_up
from edgeclip.host.recipe import Recipe
from edgeclip.host.student import EduAttentionHead, Student
from edgeclip.progress import Clock, Pace, track


def train(
    learner: Learner,
    lesson: Lesson,
    recipe: Recipe,
    device: torch.device,
    clock: Clock | None = None,
    output: Output = NOTHING,
    tower_features: Tensor | None = None,
) -> Log:
    """Train the learner on the lesson in place; return the log, a row for each epoch.

    clock: gets the time of waiting, forward, backward and optimizer. tower_features: [n, K, T] of
    the student's frozen tower for the projector's steps, where they are known; else computed here.
    Raises `EdgeclipError` when a loss or a weight is not finite, `Interrupted` when a signal came
    and all is saved.
    """
    training = set_up(learner, lesson, recipe, device, clock or Clock())
    progress = Progress(recipe.seed)
    optimizer_state = resume(training, progress, output.checkpoints)
    if tower_features is None:
        tower_features = _features_for_projector(training, lesson, progress)
    source = Source(lesson.cache, learner.preprocess, recipe.train, tower_features)

    with (
        signals(catch=output.checkpoints is not None) as noted,
        Board(output.board, progress.at.done, training.clock, device) as board,
    ):
        keeper = Keeper(training, progress, output.checkpoints, noted)
        for phase in training.phases[progress.at.phase :]:
            optimizer = _optimizer(training, phase)
            restore_optimizer(optimizer, optimizer_state)
            optimizer_state = {}
            first = progress.at.epoch * phase.steps + progress.at.step
            pace = Pace(phase.epochs * phase.steps - first)
            for epoch in range(progress.at.epoch, phase.epochs):
                _set_modes(phase, learner.student, recipe)
                progress.epoch_began()
                board.note = ""
                batches = source.batches(phase, progress.at.step, progress.order)
                left = phase.steps - progress.at.step
                for batch in track(batches, _title(phase, epoch), left, board.said):
                    training.clock.lap("waiting for images")
                    metrics = _step(training, phase, progress, optimizer, batch)
                    progress.step_done(metrics)
                    rates = _rates(optimizer, learner.head)
                    board.step(progress.at.done, len(batch.rows), metrics, rates)
                    board.whole = pace.left(epoch * phase.steps + progress.at.step - first)
                    keeper.after_step(phase, optimizer)
                    training.clock.lap("rest of stage 2")
                last = epoch + 1 == phase.epochs
                _end_epoch(training, phase, progress, output.keep, last)
                keeper.after_epoch(optimizer, last)
                training.clock.lap("rest of stage 2")
    for name, mean in training.means.items():
        mean.give(training.modules[name])
    learner.student.eval()
    return progress.log


def _optimizer(training: Training, phase: Phase) -> torch.optim.Optimizer:
    student, head, *_ = training.learner
    new: list[nn.Module] = [student.projector]
    if head is not None:
        new.append(head)
    new.append(training.learned)
    text_tower = training.modules.get("text")
    return build_optimizer(phase.frozen, training.recipe, student, text_tower, new)


def _set_modes(phase: Phase, student: Student, recipe: Recipe) -> None:
    """Put the student into training mode, but for what stays frozen."""
    if phase.frozen:
        student.eval()
        student.projector.train()
        return
    student.train()
    visual_prompts = recipe.student.visual_prompts
    if visual_prompts is not None and visual_prompts.freeze_tower:
        student.tower.eval()
    if recipe.train.freeze_batch_norm:
        for module in student.tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _rates(optimizer: torch.optim.Optimizer, head: EduAttentionHead | None) -> dict[str, float]:
    """Return what is drawn beside the losses."""
    rates = {"learning_rate": optimizer.param_groups[-1]["lr"]}
    if head is not None:
        rates["alpha"] = head.alpha.item()
    return rates


def _title(phase: Phase, epoch: int) -> str:
    if phase.frozen:
        return "stage 2: projector"
    return f"stage 2: {phase.name} {epoch + 1} of {phase.epochs}"


# --- a step


def _step(
    training: Training,
    phase: Phase,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> Metrics:
    """Return the losses of the batch, on which every weight has learned."""
    recipe = training.recipe
    counts = distributed.split_sizes(len(batch.rows))
    own = distributed.local_slice(len(batch.rows))
    known = _gathered(training.targets(batch.rows[own], batch.view[own]), counts)
    texts = training.learner.texts
    if phase.pretrain is not None:  # first training is of the image side alone
        texts = None
    drawn = np.arange(0)
    prompt_features = None
    if texts is not None:
        count = min(recipe.train.batch_size, len(texts.prompts))
        drawn = progress.prompt_order.choice(len(texts.prompts), count, replace=False)
        prompt_features = texts.prompt_features[drawn].to(training.device)

    position = progress.at.epoch * phase.steps + progress.at.step
    work = Work(
        micro_batches=_micro_batches(training, phase, batch, texts, drawn),
        features=_known_features(training, phase, batch, counts),
        known=known,
        counts={
            "image": counts,
            "masked": counts,
            "text": counts,
            "prompts": distributed.split_sizes(len(drawn)),
        },
        objective=objective(recipe, phase.pretrain, prompt_features),
        where=_where(phase, progress, position),
    )
    steps = phase.epochs * phase.steps
    metrics = training.step(optimizer, cosine(position, steps), work)
    if phase is training.phases[-1] and position >= steps * (1 - recipe.train.average_last):
        for name, mean in training.means.items():
            mean.add(training.modules[name])
    return metrics


def _where(phase: Phase, progress: Progress, position: int) -> str:
    if phase.frozen:
        return f"projector step {position}"
    return f"{phase.name} {progress.at.epoch + 1}, step {position}"


def _micro_batches(
    training: Training, phase: Phase, batch: Batch, texts: Texts | None, drawn: np.ndarray
) -> list[MicroBatch]:
    """Return what this process's towers see of the batch; empty where its features are known."""
    losses = training.recipe.losses
    train = training.recipe.train
    count = min(train.accumulate, distributed.split_sizes(len(batch.rows))[distributed.rank()])
    micro_batches = []
    if not phase.frozen and batch.pixels is not None:
        hide = losses.masked_feature
        if phase.pretrain is not None:
            hide = None
        preprocess = training.learner.preprocess
        micro_batches = of_pixels(batch.pixels, count, preprocess, hide, training.device)
    elif texts is not None:
        micro_batches = [MicroBatch()] * count
    if texts is not None:
        micro_batches = with_texts(micro_batches, texts, batch, drawn, training.device)
    return micro_batches


@torch.no_grad()
def _known_features(training: Training, phase: Phase, batch: Batch, counts: list[int]) -> Features:
    """Return the frozen tower's features of the whole batch; none where the tower learns."""
    if not phase.frozen:
        return {}
    if batch.tower_features is not None:
        return {"image": batch.tower_features}
    assert batch.pixels is not None
    x = to_input(batch.pixels, training.learner.preprocess, training.device)
    features = distributed.all_gather(training.learner.student.tower(x), counts)
    training.clock.lap("student's frozen features")
    return {"image": features}


def _gathered(known: Known, counts: list[int]) -> Known:
    """Return the teacher's half of the whole batch, from that of each process."""

    def whole(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        return distributed.all_gather(rows, counts)

    others = []
    for other in known.other_teachers:
        features = whole(other.features)
        captions = whole(other.caption_features)
        others.append(other._replace(features=features, caption_features=captions))
    return known._replace(
        teacher_features=whole(known.teacher_features),
        raw_teacher_features=whole(known.raw_teacher_features),
        caption_features=whole(known.caption_features),
        labels=whole(known.labels),
        other_teachers=tuple(others),
    )


def _features_for_projector(
    training: Training, lesson: Lesson, progress: Progress
) -> Tensor | None:
    """Return the frozen tower's features [n, K, T] of every view, where they are worth knowing.

    None where the projector's steps are done, or where they see fewer images than there are views:
    then the tower sees each batch as it comes.
    """
    train = training.recipe.train
    images, views = lesson.cache.views.shape[:2]
    if images * views > train.warmup_steps * train.warmup_batch_size:
        return None
    if progress.at.phase >= len(training.phases) or not training.phases[progress.at.phase].frozen:
        return None
    student, _, preprocess, _ = training.learner
    features = frozen_features(student, lesson.cache, preprocess, training.recipe, training.device)
    training.clock.lap("student's frozen features")
    return features


# --- between steps


def _end_epoch(
    training: Training,
    phase: Phase,
    progress: Progress,
    keep: Callable[[Log], None] | None,
    last: bool,
) -> None:
    """Write the epoch into the log and hand it on; last: of its phase."""
    number = len(progress.log) + 1
    if training.phases[0].frozen:
        number -= 1
    progress.epoch_done(progress.averages.row(number, training.learner.head), last)
    where = f"end of epoch {number}"
    if phase.frozen:
        where = "end of the projector's steps"
    refuse_broken(training.modules, where)
    if keep is not None and not distributed.rank():
        keep(progress.log)
