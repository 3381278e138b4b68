"""What was measured of a bundle on a device before, so that an update of the board shows.

    RUN/reports/<bundle folder>.<device>.history.json    `entries`: `Entry`, the oldest first

Every report enters it, the lesser ones that do not count for the verdict too.
"""

from pathlib import Path

import msgspec

from edgeclip import disk
from edgeclip.device.bench_report import BenchReport
from edgeclip.device.records import ParityReport, Record, from_json, to_json


class Entry(Record, kw_only=True):
    """One report in short; null: not measured."""

    when: str
    """the host's time, ISO 8601"""
    kind: str
    """parity or bench"""
    bundle: str
    """sha256 of the bundle's manifest"""
    verdict: str | None
    runtime: str
    """with its version"""
    system: str
    """the device's operating system"""
    images: int | None = None
    """evaluation images that were compared"""
    top1: float | None = None
    """of the bundle on unseen images, 0..1"""
    drop_pp: float | None = None
    """percentage points"""
    centered_p1: float | None = None
    model_ms_p90: float | None = None
    from_file_ms_p90: float | None = None
    others_busy: float | None = None
    """processors"""


def remember(path: Path, report: ParityReport | BenchReport, when: str) -> None:
    """Add a report to the history at `path`."""
    disk.write_sealed(path, {"entries": to_json([*read(path), _entry(report, when)])})


def read(path: Path) -> list[Entry]:
    """Return the entries at `path`, the oldest first; [] where there are none."""
    if not path.exists():
        return []
    return [from_json(entry, Entry, path) for entry in disk.read_entries(path)]


def _entry(report: ParityReport | BenchReport, when: str) -> Entry:
    entry = Entry(
        when=when,
        kind=report.kind,
        bundle=report.bundle,
        verdict=report.verdict,
        runtime=f"{report.ran.runtime} {report.ran.version}",
        system=report.machine.os,
    )
    if isinstance(report, ParityReport):
        return msgspec.structs.replace(
            entry,
            images=report.images,
            top1=getattr(report.accuracy, "bundle_top1", None),
            drop_pp=getattr(report.accuracy, "drop_pp", None),
            centered_p1=getattr(report.cosine, "centered_p1", None),
        )
    from_file = getattr(report.whole_image, "from_file", None)
    return msgspec.structs.replace(
        entry,
        model_ms_p90=getattr(report.single_stream, "latency_ms_p90", None),
        from_file_ms_p90=getattr(from_file, "latency_ms_p90", None),
        others_busy=report.others_busy,
    )
