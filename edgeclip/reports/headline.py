"""The page's first words: ship, do not ship or cannot say; which bundle; and what to do next.

Of bundles that hold everything that was asked, the accuracies are equal for all that the margin
says, so the one with the quickest whole image is recommended, and why the others are not is told.
Times of bundles that were timed turn by turn are compared before such of one after another.
"""

from collections.abc import Sequence
from typing import NamedTuple

from edgeclip.device import rules
from edgeclip.device.bench_report import Beside
from edgeclip.device.intervals import Answer
from edgeclip.device.target import Floor
from edgeclip.reports.targets import Target
from edgeclip.reports.worth import row_of

WORDS: dict[Answer, str] = {
    "holds": "SHIP",
    "fails": "DO NOT SHIP",
    "cannot tell": "CANNOT SAY",
}
ORDER: tuple[Answer, ...] = ("holds", "cannot tell", "fails")


class Headline(NamedTuple):
    """What the page says first."""

    target: Target
    """the bundle on its device that it is about"""
    word: str
    sentence: str
    next_step: str
    """what settles or improves it; a command where one does"""
    remark: str
    """on the next step; empty: none"""
    accuracy: str
    """how often the bundle is right by itself; empty: not known"""
    others: list[str]
    """why each other bundle is not the one"""
    when: str
    """date of its newest report; empty: it has none"""


def headline(
    run: str, targets: Sequence[Target], besides: Sequence[Beside] = ()
) -> Headline | None:
    """Return what the page says first; None: no bundle. run: as commands name it."""
    if not targets:
        return None
    ordered = sorted(targets, key=lambda target: _rank(target, besides))
    best = ordered[0]
    return Headline(
        target=best,
        word=WORDS[best.answer],
        sentence=best.verdict.partition(": ")[2],
        next_step=_next_step(run, best),
        remark=_remark(best),
        accuracy=_accuracy(best),
        others=[f"{other.row}: {_why_not(best, other, besides)}" for other in ordered[1:]],
        when=max((entry.when for entry in best.history), default="")[:10],
    )


def _whole_image_ms(target: Target, besides: Sequence[Beside]) -> float | None:
    """Return an image's time to its label; None: not measured, or under load."""
    row = row_of(besides, target.name, target.device)
    if row is not None:
        return row.whole_ms
    bench = target.bench
    if bench is None or bench.whole_image is None or rules.loaded(bench):
        return None
    return bench.whole_image.from_file.latency_ms_p90


def _rank(target: Target, besides: Sequence[Beside]) -> tuple[int, float, int]:
    ms = _whole_image_ms(target, besides)
    return ORDER.index(target.answer), float("inf") if ms is None else ms, target.bytes


def _why_not(best: Target, other: Target, besides: Sequence[Beside]) -> str:
    if other.answer != best.answer:
        return other.verdict
    own, least = (_whole_image_ms(target, besides) for target in (other, best))
    if own is None or least is None:
        return f"{WORDS[other.answer].lower()} too; its time is not known"
    return f"{WORDS[other.answer].lower()} too; {own:.2f} ms from image to label, not {least:.2f}"


def _next_step(run: str, target: Target) -> str:
    """Return the command that settles what is open, or what to do about what fails."""
    bundle = f"--bundle {run}/bundles/{target.name}"
    device = f"--device {target.device or 'host-cpu'}"
    if target.damage is not None:
        return f"edgeclip export --run {run} --target {target.name}"
    if target.parity is None:
        return f"edgeclip validate {bundle} {device}"
    if target.answer == "fails":
        return _about_failure(run, target)
    counted = [r for r in target.parity.rules if r.answer == "cannot tell"]
    needed = max((r.needed for r in counted if r.needed is not None), default=None)
    if needed is not None:
        return (
            f"add unseen images with labels to the test part until about {needed:,} can be judged"
            " (parity.max_images in the recipe), then distill, export and validate again"
        )
    if counted:
        return "give the data a test part: images with labels that training never sees"
    if target.answer == "cannot tell":
        return f"edgeclip bench {bundle} {device}"
    return f"edgeclip classify IMAGE {bundle}"


def _remark(target: Target) -> str:
    counted = target.parity is not None and target.parity.verdict == "holds"
    if target.answer == "cannot tell" and counted:
        return "on a quiet machine; then this page says whether it ships"
    return ""


def _accuracy(target: Target) -> str:
    """Return how often the bundle is right by itself, since all else is against the student."""
    found = target.parity.accuracy if target.parity else None
    if found is None:
        return ""
    text = (
        f"right first on {found.bundle_top1:.1%} of {found.images:,} unseen images over all labels"
    )
    if target.floor == Floor():
        text += "; no minimum was asked of it"
    return text


def _about_failure(run: str, target: Target) -> str:
    parity = target.parity
    assert parity is not None
    if parity.verdict != "fails":
        return "choose a smaller student, or a target that costs less on this device"
    runtime = {"onnxruntime": "onnx"}.get(parity.ran.runtime, parity.ran.runtime)
    precision = "fp16" if runtime == "tensorrt" else "fp32"
    return f"edgeclip export --run {run} --target {runtime}-{precision}"
