"""Progress on stderr: a bar for every step that may take over two seconds. stdout is for results.

Of several processes only rank 0 prints (torchrun gives each its RANK).
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
BAR = "{desc:<28} {bar} {n_fmt}/{total_fmt} {remaining}{postfix}"


def track(
    items: Iterable[T], what: str, total: int, note: Callable[[], str] | None = None
) -> Iterator[T]:
    """Yield `items` while drawing a bar; at the end write one line with the time taken.

    what: the step's name. total: the number of items. note: what else to show. Without a terminal
    only the line is written.
    """
    start = time.perf_counter()
    if sys.stderr.isatty() and is_rank_zero():
        yield from _bar(items, what, total, note)
    else:
        yield from items

    line = f"{what:<28} {total} in {time.perf_counter() - start:.1f} s"
    last = ""
    if note is not None:
        last = note()
    if last:
        line = f"{line}, {last}"
    say(line)


def _bar(items: Iterable[T], what: str, total: int, note: Callable[[], str] | None) -> Iterator[T]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, file=sys.stderr, leave=False, bar_format=BAR) as bar:
        for item in items:
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)
            bar.update()


def say(line: str) -> None:
    """Print a line to stderr, at rank 0."""
    if is_rank_zero():
        print(line, file=sys.stderr, flush=True)


def is_rank_zero() -> bool:
    """Return whether this is the process that prints."""
    return os.environ.get("RANK", "0") == "0"


class Clock:
    """Where the time went: each lap adds the seconds since the last one to a name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap to `name`; so all laps add up to all of the time."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now
