"""A table, and a number in it."""

import shutil
from collections.abc import Sequence
from typing import Any

import click

from edgeclip.errors import printable

NOT_MEASURED = "not measured"
VERDICT = "verdict"
"""the header of what a row comes to"""
WIDE = 1000
"""columns where there is no terminal: files and pipes take whole tables"""


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    """Print rows under their headers; None is printed as "not measured".

    Where the terminal is too narrow for them, each row is printed as a list: its name and its
    verdict, if it has one, and then a line for each other cell.
    """
    from tabulate import tabulate

    cells = []
    for row in rows:
        cells.append([_cell(value) for value in row])
    text = tabulate(cells, headers, disable_numparse=True)
    if max(len(line) for line in text.splitlines()) <= columns():
        click.echo(text)
        return
    for row in cells:
        click.echo(_listed(row, headers))


def columns() -> int:
    """Return how wide the terminal is; without one, as wide as need be."""
    return shutil.get_terminal_size((WIDE, 24)).columns


def _listed(row: Sequence[Any], headers: Sequence[str]) -> str:
    """Return one row as lines."""
    named = dict(zip(headers, row, strict=True))
    name = str(named.pop(headers[0]))
    verdict = named.pop(VERDICT, None)
    lines = [name if verdict is None else f"{name}: {verdict}"]
    wide = max(len(header) for header in named)
    lines += [f"  {header:<{wide}}  {value}" for header, value in named.items()]
    return "\n".join(lines)


def _cell(value: Any) -> Any:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):
        return printable(value)
    return value


def line(text: str = "") -> None:
    """Print one line: what comes from a bundle, a board or a recipe is in it."""
    click.echo(printable(text))


def number(value: float | None, digits: int) -> str | None:
    """Return the number with so many digits behind the point; None stays None."""
    if value is None:
        return None
    return f"{value:.{digits}f}"


def mebibytes(count: int) -> str:
    """Return bytes as MiB."""
    return f"{count / 2**20:.1f}"
