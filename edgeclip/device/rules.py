"""The questions of `validate`'s gate, each with one of three answers.

Closeness and agreement are asked of every image; accuracy of those that took no part in training,
all together and for the set that loses most. A set of which the student knows hardly an image has
nothing to lose and is left out. Where scores differ by so little that no answer can change, nothing
needs to be counted.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from edgeclip.device.intervals import (
    LEVEL,
    Answer,
    Limits,
    drop_limits,
    images_for_drop,
    images_for_share,
    share_limits,
    worst,
)
from edgeclip.device.records import Rule
from edgeclip.device.target import Tolerance

PERCENTILE = 1.0
"""percent of the images that may lie below the target's cosine: its first percentile"""
FLOOR = 0.05
"""of right answers, before: a set with fewer has nothing to lose"""
LOST = "accuracy lost on unseen images"
WORST = "accuracy lost on the worst unseen set"
CHANGED = "images with another first answer"
RIGHT_CHANGED = "rightly answered images with another answer"
OPTIMIZED = "answers that graph optimizations change"
NOTHING_UNSEEN = "of no image that the run kept is known that training never saw it"
AT_FLOOR = "the student is right on hardly any of them"


class Part(NamedTuple):
    """One evaluation set's images, before and after."""

    name: str
    unseen: bool
    before: np.ndarray
    """bool [n], right with the float student"""
    after: np.ndarray
    """bool [n], right with the bundle"""

    @property
    def at_floor(self) -> bool:
        """Whether there is nothing to lose."""
        return len(self.before) > 0 and float(self.before.mean()) < FLOOR

    @property
    def judged(self) -> bool:
        """Whether its accuracy counts."""
        return self.unseen and len(self.before) > 0 and not self.at_floor


def share(rule: str, allowed: float, count: int, images: int) -> Rule:
    """Return whether at most `allowed` (0..1) of the images are such; `count` of them were."""
    limits = share_limits(count, images)
    answer = limits.answer(allowed)
    needed = None
    if answer == "cannot tell":
        needed = images_for_share(count, images, allowed)
    found = count / images if images else None
    return _rule(rule, "%", allowed, found, limits, images, answer, needed)


def drop(rule: str, allowed: float, parts: Sequence[Part], level: float = LEVEL) -> Rule:
    """Return whether at most `allowed` (0..1) of the accuracy is lost over all of these images."""
    lost = sum(int((p.before & ~p.after).sum()) for p in parts)
    won = sum(int((~p.before & p.after).sum()) for p in parts)
    images = sum(len(p.before) for p in parts)
    limits = drop_limits(lost, won, images, level)
    answer = limits.answer(allowed)
    needed = None
    if answer == "cannot tell":
        needed = images_for_drop(lost, won, images, allowed, level)
    found = (lost - won) / images if images else None
    return _rule(rule, "pp", allowed, found, limits, images, answer, needed)


def _rule(
    rule: str,
    unit: Literal["%", "pp"],
    allowed: float,
    found: float | None,
    limits: Limits,
    images: int,
    answer: Answer,
    needed: int | None,
) -> Rule:
    measured = None if found is None else 100 * found
    return Rule(
        rule=rule,
        unit=unit,
        allowed=100 * allowed,
        found=measured,
        low=None if measured is None else 100 * limits.low,
        high=None if measured is None else 100 * limits.high,
        images=images,
        answer=answer,
        needed=needed,
    )


def closeness(tolerance: Tolerance, cosines: np.ndarray) -> Rule:
    """Return whether the first percentile of cosines [n] is as high as the target asks.

    What is not a number lies below.
    """
    below = int((~(cosines >= tolerance.centered_cosine_p1)).sum())
    name = f"images below a centered cosine of {tolerance.centered_cosine_p1:g}"
    return share(name, PERCENTILE / 100, below, len(cosines))


def accuracy(tolerance: Tolerance, parts: Sequence[Part]) -> list[Rule]:
    """Return the rules of what is lost: over all unseen images, and on the worst set of them."""
    judged = [p for p in parts if p.judged]
    rules = [drop(LOST, tolerance.accuracy_drop_pp / 100, judged)]
    if not judged:
        floors = any(p.unseen and p.at_floor for p in parts)
        why = AT_FLOOR if floors else NOTHING_UNSEEN
        rules = [msgspec.structs.replace(rules[0], why=why)]
    if tolerance.worst_set_drop_pp is not None and len(judged) > 1:
        rules.append(_worst_set(tolerance.worst_set_drop_pp / 100, judged))
    return rules


def _worst_set(allowed: float, judged: list[Part]) -> Rule:
    """Return the rule of the set that fails first, each at a level that all of them keep."""
    level = 1 - (1 - LEVEL) / len(judged)
    of_sets = [drop(f"{WORST}: {p.name}", allowed, [p], level) for p in judged]
    answer = worst([rule.answer for rule in of_sets])
    decisive = [rule for rule in of_sets if rule.answer == answer]
    return max(decisive, key=lambda rule: rule.high or 0.0)


def proven(rules: Sequence[Rule], largest_difference: float, least_lead: float) -> list[Rule]:
    """Return the rules as they are, or as held where no answer can change.

    largest_difference: of a score, before and after; least_lead: of a best score over the second
    one, before. An answer changes only where two scores move by more than the lead between them. A
    rule that fails all the same is left to fail.
    """
    if not least_lead > 2 * largest_difference:
        return list(rules)
    why = (
        f"no answer can change: scores differ by at most {largest_difference:.1e},"
        f" and the closest two are {least_lead:.1e} apart"
    )
    held = msgspec.structs.replace
    return [
        r if r.answer == "fails" else held(r, answer="holds", needed=None, why=why) for r in rules
    ]


def line(rule: Rule) -> str:
    """Return one rule in one line."""
    text = f"{rule.rule}: {rule.answer}"
    if rule.found is not None:
        between = f"({rule.low:.2f} to {rule.high:.2f})"
        text += f", {rule.found:.2f} {rule.unit} {between} of {rule.images}"
        text += f", allowed {rule.allowed:g}"
    if rule.why is not None:
        text += f"; {rule.why}"
    if rule.needed is not None:
        text += f"; about {rule.needed:,} images would tell"
    return text
