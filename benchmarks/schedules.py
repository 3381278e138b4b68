"""Schedules of stage 2 that are chosen among, in the order of what they cost."""

from typing import Any, NamedTuple

from family import Bench
from msgspec.structs import replace


class Schedule(NamedTuple):
    """What differs from the set's recipe."""

    train: dict[str, Any] = {}
    epochs: int = 1
    """times the recipe's"""
    views: int = 2
    """cached of an image"""
    captions: bool = False
    """whether a contrastive term on balanced class captions is beside the rest"""


LAST_THIRD = {"average_last": 1 / 3}
CAPTIONS = "class captions"
SCHEDULES = {
    "as the recipe": Schedule(),
    "mean of the last third": Schedule(LAST_THIRD),
    "steps of norm 1": Schedule({"max_grad_norm": 1.0}),
    "4 views": Schedule(views=4),
    "twice the epochs": Schedule(epochs=2),
    "twice the epochs, mean of the last third": Schedule(LAST_THIRD, epochs=2),
    "twice the epochs, 4 views": Schedule(epochs=2, views=4),
    CAPTIONS: Schedule(captions=True),
}


def of_views(count: int) -> tuple[str, ...]:
    """The schedules that share a cache."""
    return tuple(name for name, schedule in SCHEDULES.items() if schedule.views == count)


def scheduled(bench: Bench, name: str) -> Bench:
    """The bench whose recipe has the schedule."""
    schedule, train = SCHEDULES[name], bench.recipe.train
    changes = {"epochs": train.epochs * schedule.epochs} | schedule.train
    return bench._replace(recipe=replace(bench.recipe, train=replace(train, **changes)))
