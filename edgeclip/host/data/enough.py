"""What a number of images is enough for, told before any work: training, int8, a verdict."""

import collections
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from edgeclip.device.images import ImageRef
from edgeclip.device.intervals import drop_limits, images_for_drop
from edgeclip.device.target import Target
from edgeclip.host.data.dataset import Dataset

CHANGED = 0.03
"""share of answers taken to change from the student to its bundle; int8 changed .010 to .016 of
them on the sets of docs/verdict.md"""
MARGIN_PP = 1.0
"""percentage points: what the int8 targets here allow to be lost"""
MEASURED = 33
"""training images a class, on average, of the smallest set that a recipe here was measured on
(grocery; clothing has 307)"""
NAMED = 5
"""classes that one line names"""


class Counts(NamedTuple):
    """Images of each class, in the order of the class list."""

    names: list[str]
    train: list[int]
    test: list[int]


def counts(data: Dataset) -> Counts:
    """Return how many images of each class train and test; those without a label are no class's."""
    scored: list[ImageRef] = []
    for s in data.evaluation:
        if s.headline and not s.shift:
            scored += s.images
    return Counts(data.classes, _by_class(data, data.train), _by_class(data, scored))


def _by_class(data: Dataset, images: Sequence[ImageRef]) -> list[int]:
    found = collections.Counter(image.label for image in images)
    return [found[c] for c in range(len(data.classes))]


def named(classes: list[tuple[str, int]]) -> str:
    """Return some classes by name, each with its number of images, and how many are left out."""
    told = ", ".join(f"'{name}' ({count})" for name, count in classes[:NAMED])
    if len(classes) > NAMED:
        told += f" and {len(classes) - NAMED} more"
    return told


def without_test(of: Counts) -> str:
    """Return the classes without a test image, with the number of all their images; or ''."""
    each = zip(of.names, of.train, of.test, strict=True)
    return named([(name, train) for name, train, test in each if not test])


def without_train(of: Counts) -> str:
    """Return the classes without a training image, with the number of all their images; or ''."""
    each = zip(of.names, of.train, of.test, strict=True)
    return named([(name, test) for name, train, test in each if not train])


def for_training(of: Counts) -> str:
    """Return what the training images are enough for."""
    least, most = min(of.train), max(of.train)
    middle = statistics.median(of.train)
    what = f"training: {sum(of.train):,} images, {least} to {most} a class (median {middle:g})"
    if sum(of.train) < MEASURED * len(of.train):
        what += f"; fewer than any recipe here was measured with ({MEASURED} a class)"
    return what


def for_int8(training_images: int, targets: dict[str, Target]) -> str:
    """Return which of the targets have enough training images to calibrate and judge on."""
    enough: list[str] = []
    short: list[str] = []
    for name, target in sorted(targets.items()):
        spec = target.calibration
        if spec is None:
            continue
        wanted = spec.images + spec.judged_on
        if wanted <= training_images:
            enough.append(name)
        else:
            short.append(f"{name} ({wanted})")
    what = f"int8 and fp8: {training_images:,} training images are enough for "
    what += ", ".join(enough) or "no target"
    if short:
        what += f"; too few for {', '.join(short)}: lower calibration.images and judged_on there"
    return what


def loss_told(images: int) -> float:
    """Return the least loss of top-1 accuracy that so many test images tell from none, in
    percentage points."""
    each_way = min(max(1, round(CHANGED * images / 2)), images // 2)
    return 100 * drop_limits(each_way, each_way, images).high


def images_needed() -> int:
    """Return how many test images tell whether `MARGIN_PP` is lost."""
    of = 1000
    each_way = round(CHANGED * of / 2)
    needed = images_for_drop(each_way, each_way, of, MARGIN_PP / 100)
    assert needed is not None
    return needed


def for_verdict(images: int) -> str:
    """Return what so many test images can tell."""
    if not images:
        return "verdict: no test image, so nothing can be told of a bundle's accuracy"
    what = (
        f"verdict: {images:,} test images tell a loss of {loss_told(images):.1f} points from none"
    )
    if images < images_needed():
        what += f"; for {MARGIN_PP} about {images_needed():,} are needed"
    return f"{what} (if {CHANGED:.0%} of the answers change)"
