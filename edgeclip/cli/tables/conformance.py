"""Tables of `conformance`: what differs from the reference, by kind."""

from edgeclip.cli.tables import plain
from edgeclip.cli.tables.plain import number, table
from edgeclip.reports.conformance_report import ConformanceReport, KindScore

COUNTS = ("must be equal", "count", "equal", "refused")
CHANGED = "answers changed pp"


def conformance(report: ConformanceReport) -> None:
    """Print a row for each kind, then each image and string that differs."""
    rows = []
    for images in report.images:
        share = images.pixels_changed
        percent = None if share is None else 100 * share
        cells = [number(images.largest_difference, 1), number(percent, 1)]
        rows.append([*_counts(images), *cells, number(images.answers_changed_pp, 1)])
    headers = ["images", *COUNTS, "largest difference, levels", "pixels changed %", CHANGED]
    table(rows, headers)
    plain.line()

    if report.texts:
        rows = [[*_counts(texts), number(texts.answers_changed_pp, 1)] for texts in report.texts]
        table(rows, ["strings", *COUNTS, CHANGED])
    for line in _notes(report):
        plain.line(line)
    plain.line()

    for difference in report.differences:
        line = f"differs: {difference.kind}: {difference.name}: {difference.what}"
        if difference.asked_for is not None:
            line += f" (asked for: {difference.asked_for})"
        plain.line(line)
    for failure in report.failures:
        plain.line(f"FAILS: {failure}")


def _counts(kind: KindScore) -> list[str | int]:
    must = "yes" if kind.required else "no"
    return [kind.kind, must, kind.count, kind.equal, kind.refused]


def _notes(report: ConformanceReport) -> list[str]:
    lines = []
    if report.no_texts is not None:
        lines.append(f"strings are not compared: {report.no_texts}")
    if report.no_answers is not None:
        lines.append(f"answers are not compared: {report.no_answers}")
    for name, why in report.left_out.items():
        lines.append(f"{name} is left out: the reference refuses it ({why})")
    return lines
