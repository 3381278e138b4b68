"""What the last parity reports of a bundle on a device answered, so that two can be paired.

    RUN/reports/<bundle folder>.<device>.answers.json    `entries`: `Answers`, the oldest first

An accuracy of 0.80 after one of 0.81 may be chance or three hundred images that were lost and two
hundred that were won: only the same images tell. They are known by their bytes, so a run that was
trained again, or another run, can be paired too. A report is compared with the last one of another
bundle, runtime or system; where there is none, with the last one at all.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeclip import disk
from edgeclip.device.intervals import drop_limits, mcnemar
from edgeclip.device.per_class import Answered
from edgeclip.device.records import Earlier, ParityReport, Record, from_json, to_json
from edgeclip.errors import EdgeclipError
from edgeclip.reports.history import Entry

KEPT = 4
"""reports of one bundle and device"""
MOST = 50_000
"""images of a report; of more, those of the lowest hashes, which are the same ones each time"""
NOT_KEPT = "an older edgeclip kept no answers of its images"
NONE_NOW = "this report has no answers of unseen images"


class Answers(Record, kw_only=True):
    """What one report's bundle said of each unseen image."""

    when: str
    """the host's time, ISO 8601"""
    bundle: str
    """sha256 of the bundle's manifest"""
    runtime: str
    """with its version"""
    system: str
    """the device's operating system"""
    class_list: str
    """fingerprint of the labels that answers number"""
    judged: int
    """unseen images of the report"""
    images: list[str]
    """what each is known by, ascending; no two alike"""
    labels: list[int]
    """class indices"""
    answers: list[int]
    """class indices"""


def of(report: ParityReport, unseen: Answered, labels: Sequence[str], when: str) -> Answers | None:
    """Return what is kept of a report's answers; None: its images are not known, or it has none.

    labels: the bundle's. Of images with the same bytes the first one counts.
    """
    known, first = np.unique(np.array(unseen.digests, str), return_index=True)
    if not len(known):
        return None
    first = first[:MOST]
    return Answers(
        when=when,
        bundle=report.bundle,
        runtime=f"{report.ran.runtime} {report.ran.version}",
        system=report.machine.os,
        class_list=disk.fingerprint(list(labels)),
        judged=len(known),
        images=[str(name) for name in known[:MOST]],
        labels=[int(label) for label in unseen.labels[first]],
        answers=[int(answer) for answer in unseen.after[first]],
    )


def remember(path: Path, new: Answers | None) -> None:
    """Add a report's answers to those at `path`; a repetition of fewer images adds nothing."""
    if new is None:
        return
    kept = read(path)
    same = [entry for entry in kept if _conditions(entry) == _conditions(new)]
    if any(entry.judged > new.judged for entry in same):
        return
    others = [entry for entry in kept if entry not in same]
    disk.write_sealed(path, {"entries": to_json([*others, new][-KEPT:])})


def read(path: Path) -> list[Answers]:
    """Return the entries at `path`, the oldest first; [] where there are none.

    Raises `EdgeclipError` for what are none.
    """
    if not path.exists():
        return []
    found = [from_json(entry, Answers, path) for entry in disk.read_entries(path)]
    for entry in found:
        count = len(set(entry.images))
        if not count == len(entry.images) == len(entry.labels) == len(entry.answers):
            what = "has not as many answers as images"
            raise EdgeclipError(path, what, "remove it: the next report makes it again")
    return found


def earlier(
    path: Path, report: ParityReport, own: Answers | None, known: Sequence[Entry]
) -> Earlier | None:
    """Return how a report differs from the one before; None: it is the first.

    own: its answers; known: the history, the oldest first.
    """
    kept = read(path)
    if not kept:
        return _without_answers(known, NOT_KEPT)
    if own is not None:
        others = [entry for entry in kept if _conditions(entry) != _conditions(own)]
        return paired((others or kept)[-1], own)
    others = [entry for entry in kept if entry.bundle != report.bundle]
    return _named((others or kept)[-1], why=NONE_NOW)


def paired(then: Answers, now: Answers) -> Earlier:
    """Return the paired difference on the images that both have judged."""
    if then.class_list != now.class_list:
        return _named(then, now.judged, "its class list is another: it was asked another question")
    before = {name: i for i, name in enumerate(then.images)}
    both = [(before[name], i) for i, name in enumerate(now.images) if name in before]
    same = [(i, j) for i, j in both if then.labels[i] == now.labels[j]]
    if not same:
        return _named(then, now.judged, "no image was judged by both")
    was = np.array([then.answers[i] == then.labels[i] for i, _ in same])
    is_ = np.array([now.answers[j] == now.labels[j] for _, j in same])
    lost, won = int((was & ~is_).sum()), int((~was & is_).sum())
    limits = drop_limits(lost, won, len(same))
    return Earlier(
        when=then.when,
        bundle=then.bundle,
        runtime=then.runtime,
        system=then.system,
        images=len(same),
        judged_then=then.judged,
        judged_now=now.judged,
        relabeled=len(both) - len(same),
        top1_then=float(was.mean()),
        top1_now=float(is_.mean()),
        lost=lost,
        won=won,
        drop_pp=100 * (lost - won) / len(same),
        lower_pp=100 * limits.low,
        upper_pp=100 * limits.high,
        p=mcnemar(lost, won),
    )


class Pair(Record):
    """One bundle of two runs on one device."""

    name: str
    """the later run, the bundle and the device"""
    found: Earlier


def between(runs: Sequence[Path]) -> list[Pair]:
    """Return how the bundles of each run differ from those of the first run, on the same images.

    Bundles of one name on one device are paired, by the answers of their last reports.
    """
    first = _last_answers(runs[0])
    pairs = []
    for run in runs[1:]:
        for name, now in _last_answers(run).items():
            if name in first:
                pairs.append(Pair(f"{run.name}: {name}", paired(first[name], now)))
    return pairs


def _last_answers(run: Path) -> dict[str, Answers]:
    """Return a run's answers by bundle and device. Raises `EdgeclipError` as `read`."""
    ending = ".answers.json"
    found = {}
    for folder in disk.finished_in(run / "bundles"):
        digest = disk.sha256(folder / disk.MANIFEST)
        for path in sorted((run / "reports").glob(f"{folder.name}.*{ending}")):
            of_bundle = [entry for entry in read(path) if entry.bundle == digest]
            if of_bundle:
                device = path.name.removeprefix(f"{folder.name}.").removesuffix(ending)
                found[f"{folder.name} on {device}"] = of_bundle[-1]
    return found


def _conditions(entry: Answers) -> tuple[str, str, str]:
    return entry.bundle, entry.runtime, entry.system


def _named(then: Answers, judged_now: int | None = None, why: str = "") -> Earlier:
    """Return which report it was, and why it cannot be compared."""
    return Earlier(
        when=then.when,
        bundle=then.bundle,
        runtime=then.runtime,
        system=then.system,
        why=why,
        judged_then=then.judged,
        judged_now=judged_now,
    )


def _without_answers(known: Sequence[Entry], why: str) -> Earlier | None:
    """Return the last parity report of the history, whose answers are not at hand."""
    of_parity = [entry for entry in known if entry.kind == "parity"]
    if not of_parity:
        return None
    last = of_parity[-1]
    return Earlier(
        when=last.when, bundle=last.bundle, runtime=last.runtime, system=last.system, why=why
    )
