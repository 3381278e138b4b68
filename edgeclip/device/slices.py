"""Slices: unseen images that share something, before and after.

What they share is named by the data (edgeclip/host/data/slices.py), or is their size: an image
whose short side is below the encoder's input was enlarged. They cut across the evaluation sets and
are not gated. Limits hold for all slices at once (Bonferroni); of a slice of fewer than `FEW`
images nothing is said. What all images share is no slice.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgeclip.device.evaluation import Evaluation
from edgeclip.device.intervals import LEVEL, drop_limits
from edgeclip.device.per_class import FEW, LISTED, Answered
from edgeclip.device.records import SliceAccuracy


class Slices(NamedTuple):
    rows: Sequence[SliceAccuracy] = ()
    judged: int = 0
    """slices with limits, which hold for all of them at once"""
    left_out: int = 0
    """slices without a row"""


def slices_of(evaluation: Evaluation, images: np.ndarray, size: int) -> list[list[str]]:
    """Return the slices of some evaluation images [m]. size: of the encoder's input, px."""
    found = []
    for i in images:
        named = list(evaluation.slices[i]) if evaluation.slices is not None else []
        if evaluation.looks is not None:
            below = evaluation.looks[i].short_side < size
            named.append(f"short side {'below' if below else 'at least'} {size} px")
        found.append(named)
    return found


def per_slice(answered: Answered) -> Slices:
    """Return the slices that are worst off, then such of too few images, the largest first.

    Those that lose most and those that are right least, at most `LISTED` of each, the least right
    first; at most `LISTED` of too few.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, names in enumerate(answered.slices):
        for name in dict.fromkeys(names):
            members[name].append(i)
    parts = {name: own for name, own in members.items() if len(own) < len(answered.labels)}
    enough = {name: own for name, own in parts.items() if len(own) >= FEW}

    rows = [_slice(answered, name, own, len(enough)) for name, own in enough.items()]
    by_top1 = sorted(rows, key=lambda row: row.bundle_top1 or 0.0)[:LISTED]
    by_drop = sorted(rows, key=lambda row: -(row.drop_pp or 0.0))[:LISTED]
    listed = by_top1 + [row for row in by_drop if row not in by_top1]

    few = [(len(own), name) for name, own in parts.items() if name not in enough]
    few.sort(key=lambda one: (-one[0], one[1]))
    listed += [SliceAccuracy(name=name, images=n) for n, name in few[:LISTED]]
    return Slices(listed, len(enough), len(parts) - len(listed))


def _slice(answered: Answered, name: str, own: list[int], slices: int) -> SliceAccuracy:
    labels = answered.labels[own]
    before, after = answered.before[own] == labels, answered.after[own] == labels
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    limits = drop_limits(lost, won, len(own), 1 - (1 - LEVEL) / slices)
    return SliceAccuracy(
        name=name,
        images=len(own),
        reference_top1=float(np.mean(before)),
        bundle_top1=float(np.mean(after)),
        lost=lost,
        won=won,
        drop_pp=100 * (lost - won) / len(own),
        lower_pp=100 * limits.low,
        upper_pp=100 * limits.high,
    )
