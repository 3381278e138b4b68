"""Tables of `doctor` and `selftest`."""

from collections.abc import Sequence
from typing import Any

from edgeclip.cli.tables import plain
from edgeclip.cli.tables.plain import table
from edgeclip.device.bench_report import PreflightRow
from edgeclip.device.records import SelftestReport
from edgeclip.disk import Json

WIDEST = 100
"""characters of a step's detail; the report has all of it"""


def doctor(found: Json) -> None:
    """Print this machine's facts, the parts of edgeclip, and what ships."""
    import msgspec

    facts = msgspec.to_builtins(found["machine"])
    table([[name, _fact(value)] for name, value in facts.items()], ["machine", ""])
    plain.line()
    parts = []
    for part in found["parts"]:
        parts.append([part["part"], part["version"] or "missing", part["install"] or ""])
    table(parts, ["part", "version", "install with"])
    plain.line()
    for kind in ("targets", "devices", "recipes"):
        plain.line(f"{kind}: {', '.join(found[kind])}")


def _fact(value: Any) -> Any:
    if value is None:
        return "unknown"
    if isinstance(value, list):
        return ", ".join(value)
    return value


def preflight(device: str, rows: Sequence[PreflightRow]) -> None:
    """Print the checks of a device."""
    cells = [[row.check, row.status, row.found, row.need] for row in rows]
    table(cells, [device, "", "found", "should be"])


def selftest(reports: Sequence[SelftestReport], paths: Sequence[str]) -> None:
    """Print the steps of each self-test, and where its report lies."""
    for report, path in zip(reports, paths, strict=True):
        rows = []
        for step in report.steps:
            detail = " ".join(str(step.detail or "").split())[:WIDEST]
            rows.append([step.step, step.status, f"{step.seconds:.1f}", detail])
        table(rows, [report.target.name, "", "s", ""])
        plain.line(f"report, to attach to an issue: {path}")
