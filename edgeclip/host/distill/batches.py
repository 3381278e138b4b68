"""Which images a step sees, in which views: the whole batch's numbers and this process's pixels.

The order is drawn epoch by epoch from the seed, the same in every process. A resumed run draws its
epoch again and leaves out what was done.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from edgeclip.device.preprocess import Preprocess
from edgeclip.host import distributed
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data.order import Shuffled
from edgeclip.host.distill.pixels import pixels_of
from edgeclip.host.recipe import Pretrain, Train


class Phase(NamedTuple):
    """A part of stage 2, with an optimizer and a schedule of its own."""

    name: str
    epochs: int
    steps: int
    """an epoch"""
    frozen: bool = False
    """the new layers alone, on the tower's features"""
    pretrain: Pretrain | None = None
    """first training's objective in the place of the recipe's losses"""


def phases(train: Train, images: int) -> list[Phase]:
    """Return the phases of stage 2: the projector's, the first training's, and the recipe's losses.

    images: how many there are to train on.
    """
    steps = max(1, images // train.batch_size)
    found = []
    if train.warmup_steps:
        found.append(Phase("projector", 1, train.warmup_steps, frozen=True))
    if train.pretrain:
        epochs = train.pretrain.epochs
        found.append(Phase("first training, epoch", epochs, steps, pretrain=train.pretrain))
    return [*found, Phase("epoch", train.epochs, steps)]


class Draw(NamedTuple):
    """The images of a whole batch, by their numbers."""

    rows: np.ndarray
    """[B] rows of the cache"""
    view: np.ndarray
    """[B] which view of each"""


class Batch(NamedTuple):
    """What a step is about."""

    rows: np.ndarray
    """[B] rows of the cache, of all processes"""
    view: np.ndarray
    """[B] which view of each"""
    pixels: np.ndarray | None
    """uint8 [b, H, W, 3] of this process's share; None: the tower's features are known"""
    tower_features: Tensor | None = None
    """[B, T] of the student's frozen tower; None: not known"""


@dataclass(frozen=True)
class Source:
    """Where batches come from."""

    cache: TeacherCache
    preprocess: Preprocess
    train: Train
    tower_features: Tensor | None
    """[n, K, T] of the student's frozen tower, for the projector's steps; None: not known"""

    def batches(self, phase: Phase, done: int, order: np.random.Generator) -> Iterator[Batch]:
        """Yield the batches of an epoch without its first `done` steps; draws from `order`."""
        if phase.frozen:
            yield from self._frozen(phase, done, order)
        else:
            yield from self._epoch(phase, done, order)

    def _frozen(self, phase: Phase, done: int, order: np.random.Generator) -> Iterator[Batch]:
        images, views = self.cache.views.shape[:2]
        size = min(self.train.warmup_batch_size, images)
        draws = []
        for _ in range(phase.steps):
            index = order.choice(images, size, replace=False)
            draws.append(Draw(index, order.integers(views, size=size)))
        draws = draws[done:]
        if self.tower_features is not None:
            for draw in draws:
                features = self.tower_features[draw.rows, draw.view]
                yield Batch(*draw, pixels=None, tower_features=features)
            return
        for draw, x in zip(draws, self._pixels(iter(draws), size), strict=True):
            yield Batch(*draw, x)

    def _epoch(self, phase: Phase, done: int, order: np.random.Generator) -> Iterator[Batch]:
        images, views = self.cache.views.shape[:2]
        seed = int(order.integers(2**62))
        size = min(self.train.batch_size, images)
        shuffled = Shuffled(images, seed)

        def draws() -> Iterator[Draw]:
            for step in range(done, phase.steps):
                # By its number, so that no list of the epoch is held.
                index = shuffled[np.arange(step * size, (step + 1) * size)]
                yield Draw(index, np.random.default_rng([seed, step]).integers(views, size=size))

        for draw, x in zip(draws(), self._pixels(draws(), size), strict=True):
            yield Batch(*draw, x)

    def _pixels(self, draws: Iterator[Draw], size: int) -> Iterator[np.ndarray]:
        """Yield the pixels of this process's share of each draw; they are made ahead of time."""
        own = distributed.local_slice(size)

        def pairs() -> Iterator[tuple[int, int]]:
            for draw in draws:
                yield from zip(draw.rows[own].tolist(), draw.view[own].tolist(), strict=True)

        share = own.stop - own.start
        for _, x in pixels_of(self.cache, pairs(), self.preprocess, share, self.train.threads):
            yield x
