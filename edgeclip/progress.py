"""A progress bar with an estimate for every step that may take over two seconds, on stderr; stdout is data."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Passes `items` on while it draws; without a terminal it writes one line at the end."""
    start = time.perf_counter()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as draw

        yield from draw(items, description=f"{what:<28}", total=total, console=Console(stderr=True), transient=True)
    else:
        yield from items
    say(f"{what:<28} {total} in {time.perf_counter() - start:.1f} s")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
