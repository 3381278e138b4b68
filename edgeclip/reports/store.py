"""Where a run's reports lie, and which one of them counts.

    RUN/reports/<bundle folder>.<device>.parity.json    `edgeclip validate`, of the most images
    RUN/reports/<bundle folder>.<device>.parity-<n>-images.json    a quicker look afterwards
    RUN/reports/<bundle folder>.<device>.bench.json     `edgeclip bench`, quiet and of full length
                                                        where there is one
    RUN/reports/<bundle folder>.<device>.bench-short.json         a shorter one afterwards
    RUN/reports/<bundle folder>.<device>.bench-under-load.json    one while other work went on
    RUN/reports/<bundle folder>.<device>.history.json   every report in short (history.py)
    RUN/reports/<bundle folder>.<device>.answers.json   the last ones' answers (answers.py)
    RUN/reports/<device>.beside.json                    the bundles of one student turn by turn
    RUN/reports/<bundle folder>.<device>.engines.json   TensorRT engines seen there (engines.py)

A report counts for the bundle that it was made with, by the hash of the bundle's manifest: after
a new export it has to be made again.
"""

import dataclasses
import datetime
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeclip import disk
from edgeclip.device import rules
from edgeclip.device.bench import SCENARIOS
from edgeclip.device.bench_report import BenchReport, Beside
from edgeclip.device.bundle import Bundle
from edgeclip.device.per_class import Answered
from edgeclip.device.profile import Device
from edgeclip.device.records import (
    ParityReport,
    SelftestReport,
)
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say
from edgeclip.reports import answers, engines, history

Report = TypeVar("Report", ParityReport, BenchReport)
KINDS: dict[type, str] = {ParityReport: "parity", BenchReport: "bench"}
DEFAULT_RUN = Path("runs/latest")
GATE_FAILED = 3
"""exit code: a gate failed"""
CANNOT_TELL = 4
"""exit code: no gate failed, but what was measured cannot tell whether all hold"""


# --- which run, which bundle


def latest_run(run: Path | None) -> Path:
    """Return the run's folder, resolved; None means the latest.

    Raises `EdgeclipError` when there is no such run.
    """
    run = run or DEFAULT_RUN
    if not run.exists():
        do = "name another, or make one with: edgeclip distill RECIPE"
        raise EdgeclipError(run, "there is no such run", do)
    if run.is_symlink():
        say(f"run: {run.resolve()}")
    return run.resolve()


def one_bundle(bundle: Path | None) -> Path:
    """Return the bundle's folder; None means the latest run's best one for this machine's CPU.

    int8 of this processor comes before fp32, ONNX Runtime before OpenVINO. Raises `EdgeclipError`
    when the latest run has none of them.
    """
    if bundle is not None:
        return bundle

    run = latest_run(None)
    int8 = "onnx-int8"
    if platform.machine() == "aarch64":
        int8 = "onnx-int8-arm"
    for name in (int8, "onnx-fp32", "openvino-int8"):
        folder = run / "bundles" / name
        if folder.is_dir():
            say(f"bundle: {folder}")
            return folder
    do = "name one with --bundle, or make one with: edgeclip export --target onnx-int8"
    raise EdgeclipError(run, "has no bundle that classifies on this machine", do)


# --- read and write


def path(run: Path, bundle: Bundle, device: str, kind: str) -> Path:
    """Return where a report lies: by the bundle's folder, since two bundles may share a target."""
    return run / "reports" / f"{bundle.folder.resolve().name}.{device}.{kind}.json"


def read(run: Path | None, bundle: Bundle, device: str, kind: type[Report]) -> Report | None:
    """Return the report that counts for this bundle; None where there is none.

    kind: `ParityReport` or `BenchReport`.
    """
    if run is None:
        return None
    file = path(run, bundle, device, KINDS[kind])
    if not file.exists():
        return None
    report = disk.read_record(file, kind)
    if report.bundle != disk.sha256(bundle.folder / disk.MANIFEST):
        return None
    return report


def refuse_unfit(run: Path | None, bundles: Iterable[Bundle], device: str, verb: str) -> None:
    """Raise `EdgeclipError` unless `verb` can write its reports beside the run: before it measures.

    What they are compared with and added to is read: a damaged file is refused by name. verb:
    "validate" or "bench".
    """
    if run is None:
        return
    disk.refuse_unwritable(run / "reports")
    try:
        _read_past(run, bundles, device, verb)
    except EdgeclipError as e:  # the command itself would stop here again
        do = "put a copy in its place, or remove it: what it tells of earlier reports is lost then"
        raise EdgeclipError(e.where, e.what, do) from None


def _read_past(run: Path, bundles: Iterable[Bundle], device: str, verb: str) -> None:
    for bundle in bundles:
        history.read(path(run, bundle, device, "history"))
        answers.read(path(run, bundle, device, "answers"))
        engines.read(path(run, bundle, device, "engines"))
        read(run, bundle, device, ParityReport)
        if verb == "bench":
            read(run, bundle, device, BenchReport)
    if verb == "bench":
        _read_beside(_beside(run, device))


def write(
    report: Report, device: str, run: Path | None, bundle: Bundle, unseen: Answered | None = None
) -> Report:
    """Write a report of `device` beside its run, and return it with the device's name in it.

    A bundle without a run (run=None) has no place for reports: then nothing is written. A parity
    report also enters the history of engines; it does not replace one of more images. unseen: its
    answers, which are compared with those of the report before, and kept for the next one.
    """
    report = msgspec.structs.replace(report, device=device)
    if run is None:
        return report
    with disk.locked(run / "reports", wait=True):
        return _write(report, device, run, bundle, unseen)


def _write(
    report: Report, device: str, run: Path, bundle: Bundle, unseen: Answered | None
) -> Report:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if isinstance(report, ParityReport):
        known = history.read(path(run, bundle, device, "history"))
        kept = path(run, bundle, device, "answers")
        own = None if unseen is None else answers.of(report, unseen, bundle.labels, now)
        report = msgspec.structs.replace(report, earlier=answers.earlier(kept, report, own, known))
        answers.remember(kept, own)
    history.remember(path(run, bundle, device, "history"), report, now)
    if isinstance(report, ParityReport):
        line = engines.remember(path(run, bundle, device, "engines"), report, now)
        if line:
            say(line)
    earlier = read(run, bundle, device, type(report))
    lesser = None if earlier is None else _lesser(report, earlier)
    if lesser is None:
        disk.write_record(path(run, bundle, device, report.kind), report)
        return report
    aside = path(run, bundle, device, f"{report.kind}-{lesser}")
    disk.write_record(aside, report)
    say(f"{aside}: kept beside the report that is better evidence, which counts")
    return report


def write_beside(found: Beside, device: str, run: Path | None) -> Beside:
    """Write how bundles compare on a device beside their run, and return it with the device in it.

    One of a quiet machine is not replaced by one under load.
    """
    found = msgspec.structs.replace(found, device=device)
    if run is None:
        return found
    with disk.locked(run / "reports", wait=True):
        return _write_beside(found, device, run)


def _write_beside(found: Beside, device: str, run: Path) -> Beside:
    place = _beside(run, device)
    earlier = _read_beside(place)
    same = earlier is not None and [r.bundle for r in earlier.rows] == [
        r.bundle for r in found.rows
    ]
    if earlier is not None and same and rules.loaded(found) and not rules.loaded(earlier):
        place = place.with_name(f"{device}.beside-under-load.json")
    disk.write_record(place, found)
    return found


def _beside(run: Path, device: str) -> Path:
    return run / "reports" / f"{device}.beside.json"


def _read_beside(place: Path) -> Beside | None:
    return disk.read_record(place, Beside) if place.exists() else None


def _lesser(report: Report, earlier: Report) -> str | None:
    """Return a word for how `report` is worse evidence than an earlier one of the same; None: not.

    More images count before fewer, quiet machines before loaded ones, full length before short.
    """
    if isinstance(report, ParityReport) and isinstance(earlier, ParityReport):
        same = earlier.ran == report.ran and earlier.tolerance == report.tolerance
        return f"{report.images}-images" if same and earlier.images > report.images else None
    assert isinstance(report, BenchReport)
    assert isinstance(earlier, BenchReport)
    if earlier.ran != report.ran or earlier.incomplete is not None:
        return None
    if rules.loaded(report) != rules.loaded(earlier):
        return "under-load" if rules.loaded(report) else None
    return "short" if report.short_run and not earlier.short_run else None


# --- what a report says


def joined(report: BenchReport, earlier: BenchReport, device: Device) -> BenchReport:
    """Return `report` with what it did not measure and an earlier one did; `kept` names that.

    Only of the same bundle, machine, runtime and minimum; otherwise `report` is returned as it is.
    """
    if _conditions(report) != _conditions(earlier):
        return report

    kept: dict[str, Any] = {}
    for name in (*SCENARIOS, "stages", "sustained", "energy"):
        before = getattr(earlier, name)
        if getattr(report, name) is None and before is not None:
            kept[name] = before
    whole = msgspec.structs.replace(report, **kept, kept=list(kept))
    energy = whole.energy.mj_per_image if whole.energy else None
    whole = msgspec.structs.replace(whole, energy_mj_per_image=energy)

    over = [rules.line(rule) for rule in report.rules]
    return rules.judged(whole, device, [f for f in report.failures if f not in over])


def _conditions(report: BenchReport) -> tuple[Any, ...]:
    machine = dataclasses.replace(report.machine, temperature_c=None)
    minimum = report.min_duration_s, report.min_query_count
    return machine, report.bundle, report.ran, *minimum, rules.loaded(report)


def exit_code(reports: Iterable[ParityReport | BenchReport | SelftestReport]) -> int:
    """Return the exit code of a gate: 0 all hold, 3 one fails, 4 it cannot be told.

    A failure outranks what cannot be told.
    """
    code = 0
    for report in reports:
        if _failed(report):
            return GATE_FAILED
        if not isinstance(report, SelftestReport) and report.verdict == "cannot tell":
            code = CANNOT_TELL
    return code


def _failed(report: ParityReport | BenchReport | SelftestReport) -> bool:
    if isinstance(report, SelftestReport):
        return any(step.status == "fail" for step in report.steps)
    if isinstance(report, ParityReport) and report.verdict == "fails":
        return True
    return bool(report.failures)
