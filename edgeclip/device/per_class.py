"""What stands behind a verdict: classes one by one, and the images whose answer changed.

Over unseen images alone. A class of fewer than `FEW` images says nothing by itself and is counted
instead of listed; what is listed has limits that hold for all classes at once (Bonferroni).
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgeclip.device import rules
from edgeclip.device.intervals import LEVEL, drop_limits, worst
from edgeclip.device.records import ChangedImage, ClassAccuracy, Rule
from edgeclip.device.target import Floor

FEW = 30
"""images of a class below which nothing is said of it"""
LISTED = 10
"""classes"""
SHOWN = 24
"""changed images of each kind"""
WRONG = "wrong answers on unseen images"
WRONG_IN_CLASS = "wrong answers in the worst class"
NAME = 60
"""characters of a label in a line"""


class Answered(NamedTuple):
    """The unseen images, before and after; every array [n]."""

    images: np.ndarray
    """their places in the run's evaluation images"""
    labels: np.ndarray
    """class indices"""
    before: np.ndarray
    """the float student's first answers, class indices"""
    after: np.ndarray
    """the bundle's"""
    before_scores: np.ndarray
    """the best score of each"""
    after_scores: np.ndarray
    digests: Sequence[str] = ()
    """[n] what each image is known by; empty: nobody looked"""
    slices: Sequence[Sequence[str]] = ()
    """[n] the slices that each is in; empty: none is in any"""


def shown(name: str) -> str:
    """Return a label for one line: without line breaks and control characters, and not too long."""
    clean = "".join(c if c.isprintable() else " " for c in name)
    return clean if len(clean) <= NAME else f"{clean[: NAME - 3]}..."


def floors(floor: Floor, answered: Answered, names: Sequence[str]) -> list[Rule]:
    """Return the rules of what the bundle must reach by itself; names: the labels."""
    right = answered.after == answered.labels
    found = []
    if floor.top1 is not None:
        wrong = int((~right).sum())
        found.append(rules.share(WRONG, 1 - floor.top1, wrong, len(right)))
    if floor.worst_class_top1 is not None:
        found.append(_worst_class(1 - floor.worst_class_top1, answered, names))
    return found


def _worst_class(allowed: float, answered: Answered, names: Sequence[str]) -> Rule:
    """Return the rule of the class that fails first, each at a level that all of them keep."""
    classes = np.unique(answered.labels)
    if not len(classes):
        return rules.share(WRONG_IN_CLASS, allowed, 0, 0)
    level = 1 - (1 - LEVEL) / len(classes)
    asked = []
    for c in classes:
        own = answered.labels == c
        wrong = int((answered.after[own] != c).sum())
        name = f"{WRONG_IN_CLASS}: {shown(names[c])}"
        asked.append(rules.share(name, allowed, wrong, int(own.sum()), level))
    answer = worst([rule.answer for rule in asked])
    decisive = [rule for rule in asked if rule.answer == answer]
    return max(decisive, key=lambda rule: rule.high or 0.0)


def per_class(answered: Answered, names: Sequence[str]) -> tuple[list[ClassAccuracy], int]:
    """Return the classes that are worst off, and how many have too few images to say.

    Those that lose most and those that are right least, at most `LISTED` of each, the least right
    first.
    """
    classes, counts = np.unique(answered.labels, return_counts=True)
    enough = [int(c) for c, n in zip(classes, counts, strict=True) if n >= FEW]
    rows = [_class(answered, c, names, len(enough)) for c in enough]
    by_top1 = sorted(rows, key=lambda row: row.bundle_top1)
    by_drop = sorted(rows, key=lambda row: -row.drop_pp)
    listed = by_top1[:LISTED] + [r for r in by_drop[:LISTED] if r not in by_top1[:LISTED]]
    return listed, len(classes) - len(enough)


def _class(answered: Answered, c: int, names: Sequence[str], classes: int) -> ClassAccuracy:
    own = answered.labels == c
    before, after = answered.before[own] == c, answered.after[own] == c
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    limits = drop_limits(lost, won, int(own.sum()), 1 - (1 - LEVEL) / classes)
    wrong = Counter(names[a] for a in answered.after[own][~after])
    confused_with, times = wrong.most_common(1)[0] if wrong else (None, 0)
    return ClassAccuracy(
        name=names[c],
        drop_pp=100 * (lost - won) / int(own.sum()),
        upper_pp=100 * limits.high,
        lower_pp=100 * limits.low,
        lost=lost,
        won=won,
        images=int(own.sum()),
        reference_top1=float(before.mean()),
        bundle_top1=float(after.mean()),
        confused_with=confused_with,
        confused=times,
    )


def changed(answered: Answered, names: Sequence[str]) -> list[ChangedImage]:
    """Return images that were right before and are wrong after, then those the other way round.

    At most `SHOWN` of each, the surest answers first.
    """
    before = answered.before == answered.labels
    after = answered.after == answered.labels
    surest = np.argsort(-answered.after_scores, kind="stable")
    found = []
    for which in (before & ~after, ~before & after):
        for i in surest[which[surest]][:SHOWN]:
            image = ChangedImage(
                image=int(answered.images[i]),
                label=names[answered.labels[i]],
                before=names[answered.before[i]],
                after=names[answered.after[i]],
                before_score=float(answered.before_scores[i]),
                after_score=float(answered.after_scores[i]),
            )
            found.append(image)
    return found
