"""Is int8 worth it here: how many times as fast each bundle is, turn by turn on the same device."""

from collections.abc import Sequence
from pathlib import Path

from edgeclip import disk
from edgeclip.device import rules
from edgeclip.device.bench_report import Beside, BesideRow, Ratio
from edgeclip.reports.tables import Table, number


def read(run: Path) -> list[Beside]:
    """Return how the bundles of a run compare on each device, as far as they are still the same."""
    found = []
    for path in sorted((run / "reports").glob("*.beside.json")):
        beside = disk.read_record(path, Beside)
        if all(_still_there(run, row) for row in beside.rows):
            found.append(beside)
    return found


def _still_there(run: Path, row: BesideRow) -> bool:
    manifest = run / "bundles" / row.name / disk.MANIFEST
    return manifest.exists() and disk.sha256(manifest) == row.bundle


def row_of(besides: Sequence[Beside], name: str, device: str | None) -> BesideRow | None:
    """Return a bundle's row on a device; None: not timed beside others, or under load."""
    for beside in besides:
        if beside.device != device or rules.loaded(beside):
            continue
        for row in beside.rows:
            if row.name == name:
                return row
    return None


def lines(beside: Beside) -> list[str]:
    """Return a line for each bundle but the first."""
    first = beside.rows[0].name
    found = []
    for row in beside.rows[1:]:
        word = "as fast as"
        if row.whole.high < 1:
            word = "as fast as (slower than)"
        found.append(
            f"{row.name}: a whole image {_times(row.whole)} times {word} {first}, the model alone "
            f"{_times(row.model)} times"
        )
    if rules.loaded(beside):
        found.append(f"side by side under load: others had {beside.others_busy:.1f} processors")
    return found


def _times(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def table(beside: Beside) -> Table:
    """Return a row per bundle; ratios are against the first."""
    headers = (
        "bundle",
        "image to label ms",
        "times as fast",
        "model ms",
        "model, times as fast",
        "precision",
    )
    rows = []
    for row in beside.rows:
        whole = [number(row.whole_ms), _times(row.whole)]
        model = [number(row.model_ms), _times(row.model)]
        rows.append([row.name, *whole, *model, row.precision])
    return Table(headers, rows)


def answer(beside: Beside) -> str:
    """Return a sentence: whether any int8 bundle is faster here for a whole image."""
    if rules.loaded(beside):
        return "Not known: other work had the machine while they were timed; repeat edgeclip bench"
    quantized = [r for r in beside.rows if r.precision == "int8"]
    if not quantized:
        return "No int8 bundle was timed"
    best = max(quantized, key=lambda row: row.whole.median)
    first = beside.rows[0].name
    if best.whole.low > 1:
        return f"Yes: {best.name} takes a whole image {_times(best.whole)} times as fast as {first}"
    if best.whole.high < 1:
        return (
            f"No: {best.name}, the best of them, is {_times(best.whole)} times as fast as {first}"
        )
    return f"Not by these rounds: {best.name} is {_times(best.whole)} times as fast as {first}"
