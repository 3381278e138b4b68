"""Which weights learn at which rate, and how it changes over the steps."""

import math
from typing import Any

import torch
from timm.layers import HybridEmbed
from torch import nn

from edgeclip.host.recipe import Recipe, Train
from edgeclip.host.student import Student

Group = dict[str, Any]
"""a parameter group, as torch.optim takes it"""


def cosine(step: int, steps: int) -> float:
    """Return the learning rate's factor: 5 % linear warm-up, then a half cosine to 0."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def build_optimizer(
    frozen: bool, recipe: Recipe, student: Student, text: nn.Module | None, new: list[nn.Module]
) -> torch.optim.Optimizer:
    """Return the optimizer of the new layers and, unless they are frozen, of the towers.

    text: the student's text tower with its projector; None: it has none. new: the layers that were
    not trained before.
    """
    train = recipe.train
    layers = [p for module in new for p in module.parameters()]
    if text is not None:
        layers += text.projector.parameters()
    if frozen:
        groups: list[Group] = [{"params": layers, "lr": train.warmup_lr}]
    else:
        groups = _tower_groups(recipe, student, text)
        groups.append({"params": layers, "lr": train.lr})
    groups = _split_by_decay(groups, train)

    if train.optimizer == "sgd" and not frozen:
        return torch.optim.SGD(groups, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=train.weight_decay, fused=True)


def _tower_groups(recipe: Recipe, student: Student, text: nn.Module | None) -> list[Group]:
    """Return the towers' weights, those of a stem in a group of their own."""
    towers = [student.tower]
    if text is not None:
        towers.append(text.tower)
    # What is frozen gets no optimizer state.
    weights = [p for tower in towers for p in tower.parameters() if p.requires_grad]
    lr = recipe.train.lr * recipe.train.tower_lr_ratio
    stem = recipe.student.stem
    if stem is None:
        return [{"params": weights, "lr": lr}]

    slower = set()
    for module in student.tower.modules():
        if isinstance(module, HybridEmbed):
            slower |= {id(p) for p in module.backbone.parameters()}
    return [
        {"params": [p for p in weights if id(p) not in slower], "lr": lr},
        {"params": [p for p in weights if id(p) in slower], "lr": lr * stem.lr_ratio},
    ]


def _split_by_decay(groups: list[Group], train: Train) -> list[Group]:
    """Return each group in a part with weight decay and one without; empty parts are left out.

    A scalar (alpha, a log scale) is no weight of many: decay would only pull it to 0.
    """
    least = 1
    if train.weight_decay_of == "matrices":
        least = 2
    split = []
    for group in groups:
        decayed = [p for p in group["params"] if p.ndim >= least]
        others = [p for p in group["params"] if p.ndim < least]
        if decayed:
            split.append(group | {"params": decayed})
        if others:
            split.append(group | {"params": others, "weight_decay": 0.0})
    return split
