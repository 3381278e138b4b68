"""What is trained and how: the record that the loop and its helpers share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from edgeclip.device.preprocess import Preprocess
from edgeclip.host import distributed
from edgeclip.host.distill import losses as L
from edgeclip.host.distill.average import Average
from edgeclip.host.distill.batches import Phase, phases
from edgeclip.host.distill.log import Log
from edgeclip.host.distill.step import NewLayers, Step, Towers
from edgeclip.host.distill.targets import Lesson, Targets
from edgeclip.host.distill.text import Texts
from edgeclip.host.recipe import Recipe
from edgeclip.host.student import EduAttentionHead, Student, checkpoint_gradients
from edgeclip.progress import Clock


class Learner(NamedTuple):
    """What is trained, in place."""

    student: Student
    head: EduAttentionHead | None
    """EduAttention; None: trained without it"""
    preprocess: Preprocess
    """of the student's image tower"""
    texts: Texts | None = None
    """the student's own text tower and what it reads; None: it has none"""


class Output(NamedTuple):
    """What is written on the way; None: nothing."""

    keep: Callable[[Log], None] | None = None
    """called with the log after each epoch, when every weight is finite"""
    checkpoints: Path | None = None
    """folder where the state is kept, and from which it is taken where it holds one"""
    board: Path | None = None
    """folder for TensorBoard"""


NOTHING = Output()


@dataclass(frozen=True)
class Training:
    """Everything that the loop needs and does not change, but for the weights."""

    learner: Learner
    recipe: Recipe
    device: torch.device
    clock: Clock
    phases: list[Phase]
    learned: nn.ParameterDict
    """what losses learn beside the student"""
    modules: dict[str, nn.Module]
    """everything that has weights, by its name in a checkpoint"""
    targets: Targets
    step: Step
    means: dict[str, Average]
    """of those of `modules` that are averaged, by the name that they have there; empty: none is"""


def set_up(
    learner: Learner, lesson: Lesson, recipe: Recipe, device: torch.device, clock: Clock
) -> Training:
    """Move everything to the device and make what a step needs."""
    student, head, _, texts = learner
    student.to(device, memory_format=torch.channels_last)
    adapted_here = recipe.adapt is not None and recipe.adapt_data is None
    targets = Targets(lesson, recipe.losses, device, adapted_here)
    learned = L.learned_parameters(recipe.losses, lesson.teacher.embed_dim, recipe.seed).to(device)
    modules: dict[str, nn.Module] = {"student": student}
    if head is not None:
        modules["head"] = head.to(device)
    modules["learned"] = learned
    means = {}
    text_tower = None
    if texts is not None:
        text_tower = modules["text"] = texts.tower.to(device)
    if recipe.train.average_last:
        means = {name: Average(module) for name, module in modules.items() if name != "learned"}
        modules |= {f"mean_{name}": mean for name, mean in means.items()}
    if recipe.train.gradient_checkpointing:
        checkpoint_gradients(student.tower)
    layers = NewLayers(student.projector, head, learned, recipe.losses.masked_feature is not None)
    if distributed.rank():
        torch.manual_seed(recipe.seed + distributed.rank())  # masks and dropout of its own
    towers = Towers(student.tower, text_tower)
    return Training(
        learner=learner,
        recipe=recipe,
        device=device,
        clock=clock,
        phases=phases(recipe.train, len(lesson.cache.images)),
        learned=learned,
        modules=modules,
        targets=targets,
        step=Step(towers, layers, recipe.train, device, clock),
        means=means,
    )
