"""A progress bar with an estimate for every step that may take over two seconds, on stderr; stdout is data.

Of several processes only the first one speaks (torchrun gives each its RANK).
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(
    items: Iterable[T], what: str, total: int, note: Callable[[], str] | None = None
) -> Iterator[T]:
    """Passes `items` on while it draws; without a terminal it writes one line at the end. note: what else to show."""
    start = time.perf_counter()
    if sys.stderr.isatty() and is_rank_zero():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn(f"{what:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(what, total=total, note="")
            for item in items:
                yield item
                progress.update(bar, advance=1, note=note() if note else "")
    else:
        yield from items
    say(
        f"{what:<28} {total} in {time.perf_counter() - start:.1f} s{f', {said}' if note and (said := note()) else ''}"
    )


def say(line: str) -> None:
    if is_rank_zero():
        print(line, file=sys.stderr, flush=True)


def is_rank_zero() -> bool:
    """Whether this is the process that speaks."""
    return os.environ.get("RANK", "0") == "0"


class Clock:
    """Where the time went: each lap adds the seconds since the one before it to a name, so the names add up to all of it."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = self.laps.get(name, 0.0) + now - self.last, now
