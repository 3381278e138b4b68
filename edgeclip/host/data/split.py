"""Which photos of a folder test and which train: the one place that says so, for `init`, `distill`,
`evaluate` and `export` alike.

    hash        a photo tests where the hash of its name, a number in [0, 1), is below the fraction.
                No photo ever changes its part, but a small class may get no test photo.
    stratified  class by class: its photos in the order of that hash, the first k test. k is the
                fraction of n, rounded, at least 1 and at most n - 1; a class of fewer than 3
                trains only. A new photo moves at most one other: the last of the first k.

Photos with the same bytes are one group, and a group is on one side. One that lies in two classes
trains: no test could tell which of its labels is right. Only files of equal size are read for it.
Copies that were re-encoded are not looked for here: `distill` compares all images, and says which
test photos look like training photos (edgeclip/host/evaluation/overlap.py).
"""

import collections
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import ImageRef, digest

Rule = Literal["hash", "stratified"]
LEAST = 3
"""photos of a class that one is taken of to test"""

PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""names of folders that are parts of a split, and not classes"""


class Split(NamedTuple):
    """A folder's photos in two parts, each in the order of the classes."""

    train: list[ImageRef]
    test: list[ImageRef]


def split(classes: Sequence[list[ImageRef]], fraction: float, rule: Rule) -> Split:
    """Return the photos of each class, labeled by its place, as the rule splits them.

    fraction: of the photos, 0..1, that test.
    """
    everything = [image for photos in classes for image in photos]
    if rule == "hash":
        tests = {image.key for image in everything if draw(image.key) < fraction}
    else:
        tests = _stratified(classes, fraction)
    return Split(
        train=[image for image in everything if image.key not in tests],
        test=[image for image in everything if image.key in tests],
    )


def draw(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone.

    So a photo keeps its place when others come or go.
    """
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32


def _stratified(classes: Sequence[list[ImageRef]], fraction: float) -> set[str]:
    """Return the keys of the photos that test."""
    if fraction >= 1:
        return {image.key for photos in classes for image in photos}
    group_of = groups([image for photos in classes for image in photos])
    labels: dict[str, set[int]] = collections.defaultdict(set)
    for photos in classes:
        for image in photos:
            labels[group_of[image.key]].add(image.label)

    tests: set[str] = set()
    for photos in classes:
        members: dict[str, list[str]] = collections.defaultdict(list)
        for image in photos:
            members[group_of[image.key]].append(image.key)
        whole = [keys for group, keys in members.items() if len(labels[group]) == 1]
        tests.update(_first(whole, len(photos), fraction))
    return tests


def _first(members: list[list[str]], count: int, fraction: float) -> list[str]:
    """Return the keys of a class that test. members: of each group; count: all of its photos."""
    if count < LEAST or fraction <= 0:
        return []
    wanted = min(max(1, int(fraction * count + 0.5)), count - 1)
    tests: list[str] = []
    for keys in sorted(members, key=lambda keys: (min(map(draw, keys)), keys)):
        if len(tests) >= wanted:
            break
        if len(tests) + len(keys) < count:  # one at least trains
            tests += keys
    return tests


def groups(images: list[ImageRef]) -> dict[str, str]:
    """Return the group of each image by its key: images of equal bytes have one.

    Only files of equal size are read; one that cannot be read is a group of its own, and is skipped
    and counted where images are decoded.
    """
    of_size: dict[int, list[ImageRef]] = collections.defaultdict(list)
    for image in images:
        path = Path(image.path)
        if path.exists():  # a link may lead nowhere
            of_size[path.stat().st_size].append(image)
    found = {image.key: image.key for image in images}
    for same in of_size.values():
        if len(same) == 1:
            continue
        for image in same:
            with contextlib.suppress(UnreadableImage):
                found[image.key] = digest(image)
    return found
