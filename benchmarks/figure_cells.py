"""What the pages' tables are made of: cells and Markdown."""

from typing import Any

from compare import Interval


def short(value: float, digits: int = 3) -> str:
    """Return a share as the pages write it: .916, not 0.916."""
    text = f"{value:.{digits}f}"
    if abs(value) < 1:
        return text.replace("0.", ".", 1)
    return text


def median(interval: dict[str, Any]) -> str:
    """Return a median with its 95 % interval, from an Interval as JSON."""
    return str(Interval(**interval))


def markdown(headers: list[str], rows: list[list[Any]]) -> str:
    """Return a table of Markdown; None reads "not measured"."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    for row in rows:
        cells = ["not measured" if cell is None else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
