"""The questions of `validate`'s gate, and of a device's budget, each with one of three answers.

Closeness and agreement are asked of every image; accuracy of those that took no part in training,
all together and for the set that loses most. A set of which the student knows hardly an image has
nothing to lose and is left out. Where scores differ by so little that no answer can change, nothing
needs to be counted. A budget is asked by its figure's interval; times that were taken while other
work had the machine tell nothing.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from edgeclip.device.bench_report import BenchReport, Beside, Latency
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
from edgeclip.device.profile import Device
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
        return len(self.before) > 0 and not float(self.before.mean()) >= FLOOR

    @property
    def judged(self) -> bool:
        """Whether its accuracy counts."""
        return self.unseen and len(self.before) > 0 and not self.at_floor


def share(rule: str, allowed: float, count: int, images: int, level: float = LEVEL) -> Rule:
    """Return whether at most `allowed` (0..1) of the images are such; `count` of them were."""
    limits = share_limits(count, images, level)
    answer = limits.answer(allowed)
    needed = None
    if answer == "cannot tell":
        needed = images_for_share(count, images, allowed, level)
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

    What is not finite lies below, and nothing is as high as a limit that is not.
    """
    least = tolerance.centered_cosine_p1
    enough = np.isfinite(cosines) & np.isfinite(least) & (cosines >= least)
    below = int((~enough).sum())
    name = f"images below a centered cosine of {least:g}"
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


def proven(
    rules: Sequence[Rule], lead: np.ndarray, difference: np.ndarray, asked: np.ndarray
) -> list[Rule]:
    """Return the rules as they are, or as held where no answer of the asked images can change.

    lead: [m] of a best score over the second one, before; difference: [m] of an image's scores at
    most, before and after; asked: bool [m], the images that the rules are about. An answer changes
    only where two scores move by more than the lead between them. A rule that fails all the same is
    left to fail.
    """
    safe = lead[asked] > 2 * difference[asked]
    if not len(safe) or not safe.all():
        return list(rules)
    why = (
        f"no answer can change: scores differ by at most {difference[asked].max():.1e},"
        f" and the closest two are {lead[asked].min():.1e} apart"
    )
    held = msgspec.structs.replace
    return [
        r if r.answer == "fails" else held(r, answer="holds", needed=None, why=why) for r in rules
    ]


# --- a device's budget


QUIET = 0.25
"""processors that other work may have while something is timed (this project's choice)"""
TIMED = "ms"
"""unit of the rules that a loaded machine cannot answer"""


def judged(report: BenchReport, device: Device, failures: Sequence[str] = ()) -> BenchReport:
    """Return the report with the answer to each budget of the device, and what they come to.

    failures: of another kind.
    """
    asked = budgets(report, device)
    over = [line(rule) for rule in asked if rule.answer == "fails"]
    answer: Answer = "fails"
    if not failures:
        answer = worst([rule.answer for rule in asked])
    return msgspec.structs.replace(report, rules=asked, failures=[*failures, *over], verdict=answer)


def budgets(report: BenchReport, device: Device) -> list[Rule]:
    """Return a rule for each limit of the device's budget."""
    limits = msgspec.structs.asdict(device.budget)
    found = []
    for name, (what, unit) in BUDGETS.items():
        if limits[name] is not None:
            found.append(_budget(report, name, what, unit, limits[name]))
    return found


BUDGETS: dict[str, tuple[str, Literal["ms", "MiB", "mJ"]]] = {
    "latency_ms_p90": ("p90 of the model alone", "ms"),
    "latency_ms_p99": ("p99 of the model alone", "ms"),
    "from_frame_ms_p90": ("p90 from a camera's buffer to the label", "ms"),
    "from_frame_ms_p99": ("p99 from a camera's buffer to the label", "ms"),
    "from_file_ms_p90": ("p90 from an image's bytes to the label", "ms"),
    "from_file_ms_p99": ("p99 from an image's bytes to the label", "ms"),
    "peak_memory_mib": ("peak memory", "MiB"),
    "energy_mj_per_image": ("energy an image", "mJ"),
    "bundle_mib": ("size of the bundle", "MiB"),
}
"""a budget's field, and what it is asked of"""


class Cost(NamedTuple):
    """One measured cost with its limits; None: not measured, or too few for a limit."""

    found: float | None = None
    low: float | None = None
    high: float | None = None
    queries: int = 0
    """that it was measured on"""


def loaded(report: BenchReport | Beside) -> bool:
    """Return whether other work had too much of the machine while it was timed."""
    return report.others_busy is not None and not report.others_busy <= QUIET


def _budget(
    report: BenchReport, name: str, what: str, unit: Literal["ms", "MiB", "mJ"], allowed: float
) -> Rule:
    cost = _cost(report, name)
    answer: Answer = "cannot tell"
    why = None
    if cost.found is None:
        why = "not measured"
    elif cost.low is None or cost.high is None:
        why = f"too few queries for its limits: {cost.queries:,}"
    else:
        answer = Limits(cost.low, cost.high).answer(allowed)
    if unit == TIMED and loaded(report) and cost.found is not None:
        answer = "cannot tell"
        why = under_load(report)
    measured = [value for value in (cost.found, cost.low, cost.high) if value is not None]
    if not np.isfinite([*measured, allowed]).all():
        answer = "fails"
        why = "is not finite"
    return Rule(
        rule=what,
        unit=unit,
        allowed=allowed,
        found=cost.found,
        low=cost.low,
        high=cost.high,
        images=cost.queries,
        answer=answer,
        why=why,
    )


def under_load(report: BenchReport) -> str:
    """Return why a report's times say nothing."""
    return (
        f"other work had {report.others_busy:.1f} processors meanwhile:"
        " repeat edgeclip bench when the machine is quiet"
    )


def _cost(report: BenchReport, name: str) -> Cost:
    """Return what a budget's field is about."""
    if name == "peak_memory_mib" and report.peak_memory_mib is not None:
        return _exact(float(report.peak_memory_mib))
    if name == "bundle_mib" and report.bundle_bytes is not None:
        return _exact(report.bundle_bytes / 2**20)
    if name == "energy_mj_per_image" and report.energy_mj_per_image is not None:
        return _energy(report)
    scenario, _, percentile = name.rpartition("_ms_")
    if not scenario:
        return Cost()
    latency: Latency | None = report.single_stream
    if scenario != "latency":
        latency = getattr(report.whole_image, scenario, None)
    if latency is None:
        return Cost()
    found, low, high = (getattr(latency, f"latency_ms_{percentile}{x}") for x in LIMITS)
    return Cost(found, low, high, latency.queries)


LIMITS = ("", "_low", "_high")
"""endings of a percentile's fields"""


def _exact(value: float) -> Cost:
    return Cost(value, value, value, 1)


def _energy(report: BenchReport) -> Cost:
    value = report.energy_mj_per_image
    assert value is not None
    half = getattr(report.energy, "mj_per_image_half_width", None) or 0.0
    return Cost(value, value - half, value + half, 1)


def line(rule: Rule) -> str:
    """Return one rule in one line."""
    text = f"{rule.rule}: {rule.answer}"
    if rule.found is not None:
        between = ""
        if rule.low is not None and rule.high is not None and rule.low < rule.high:
            between = f" ({rule.low:.2f} to {rule.high:.2f}) of {rule.images:,}"
        text += f", {rule.found:.2f} {rule.unit}{between}, allowed {rule.allowed:g}"
    if rule.why is not None:
        text += f"; {rule.why}"
    if rule.needed is not None:
        text += f"; about {rule.needed:,} images would tell"
    return text
