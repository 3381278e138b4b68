"""A table, and a number in it."""

from collections.abc import Sequence
from typing import Any

import click

NOT_MEASURED = "not measured"


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    """Print rows under their headers; None is printed as "not measured"."""
    from tabulate import tabulate

    cells = []
    for row in rows:
        cells.append([_cell(value) for value in row])
    click.echo(tabulate(cells, headers, disable_numparse=True))


def _cell(value: Any) -> Any:
    if value is None:
        return NOT_MEASURED
    return value


def number(value: float | None, digits: int) -> str | None:
    """Return the number with so many digits behind the point; None stays None."""
    if value is None:
        return None
    return f"{value:.{digits}f}"


def mebibytes(count: int) -> str:
    """Return bytes as MiB."""
    return f"{count / 2**20:.1f}"
