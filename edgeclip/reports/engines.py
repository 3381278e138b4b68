"""What each TensorRT engine of a bundle was worth, kept beside the reports.

After a JetPack upgrade the history shows whether accuracy moved. SigLIP's has: 71.6 to 68.4 with
the same graph (TensorRT issue 3908).
"""

from pathlib import Path

from edgeclip import disk
from edgeclip.device.bench_report import BenchReport
from edgeclip.device.records import (
    EngineConditions,
    ParityReport,
    Record,
    from_json,
    to_json,
)


class EngineEntry(Record):
    """One validation of an engine."""

    when: str
    """the host's time, ISO 8601"""
    engine: str
    """the engine's key, named by its conditions"""
    conditions: EngineConditions
    layers: dict[str, int] | None
    """how many layers that compute something take each precision"""
    verdict: str
    top1: float | None
    """accuracy of the bundle, 0..1; null: not measured"""
    centered_p1: float | None
    """null: not measured"""


def remember(path: Path, parity: ParityReport, when: str) -> str | None:
    """Add a parity report's engine to the history at `path`.

    when: the host's time, ISO 8601. Returns a line when the engine differs from the last one;
    None when it does not, or when the report is not of an engine (nothing is written then).
    """
    ran = parity.ran
    if ran.engine is None or ran.conditions is None:
        return None

    history = read(path)
    entry = EngineEntry(
        when=when,
        engine=ran.engine,
        conditions=ran.conditions,
        layers=ran.layers,
        verdict=parity.verdict,
        top1=getattr(parity.accuracy, "bundle_top1", None),
        centered_p1=getattr(parity.cosine, "centered_p1", None),
    )
    disk.write_sealed(path, {"entries": to_json([*history, entry])})

    if not history or history[-1].engine == entry.engine:
        return None
    return f"{parity.target}: {_difference(history[-1], entry)}"


def read(path: Path) -> list[EngineEntry]:
    """Return the entries at `path`, the oldest first; [] where there are none."""
    if not path.exists():
        return []
    return [from_json(entry, EngineEntry, path) for entry in disk.read_entries(path)]


def _difference(last: EngineEntry, new: EngineEntry) -> str:
    changed = []
    before = to_json(last.conditions)
    for name, value in to_json(new.conditions).items():
        if before[name] != value:
            changed.append(f"{name} {before[name]} -> {value}")

    if new.top1 is None or last.top1 is None:
        moved = "accuracy not measured"
    else:
        points = 100 * (new.top1 - last.top1)
        moved = f"top-1 {last.top1:.4f} -> {new.top1:.4f} ({points:+.2f} pp)"
    verdicts = f"{last.verdict} -> {new.verdict}"
    return f"a new engine ({', '.join(changed)}): {moved}, {verdicts}"


def validated(parity: ParityReport | None, bench: BenchReport) -> bool:
    """Return whether the parity report is of the engine and bundle that the benchmark ran."""
    if parity is None:
        return False
    return parity.bundle == bench.bundle and parity.ran.engine == bench.ran.engine
