"""Progress on stderr: a bar for every step that may take over two seconds. stdout is for results.

Of several processes only rank 0 prints (torchrun gives each its RANK).
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from edgeclip.errors import printable

T = TypeVar("T")
BAR = "{desc:<28} {n_fmt}/{total_fmt} {remaining} {bar}{postfix}"
"""count and estimate first: a narrow terminal cuts at the right"""
LOG_S = 30.0
"""without a terminal, seconds between two lines of one step"""


def track(
    items: Iterable[T], what: str, total: int, note: Callable[[], str] | None = None
) -> Iterator[T]:
    """Yield `items` while drawing a bar; at the end write one line with the time taken.

    what: the step's name. total: the number of items. note: what else to show. Without a terminal
    a line is written every `LOG_S` seconds instead of the bar.
    """
    start = time.perf_counter()
    if sys.stderr.isatty() and is_rank_zero():
        yield from _bar(items, what, total, note)
    else:
        yield from _logged(items, what, total, note)

    line = f"{what:<28} {total} in {time.perf_counter() - start:.1f} s"
    last = ""
    if note is not None:
        last = note()
    if last:
        line = f"{line}, {last}"
    say(line)


def _bar(items: Iterable[T], what: str, total: int, note: Callable[[], str] | None) -> Iterator[T]:
    from tqdm import tqdm

    how = {"file": sys.stderr, "leave": False, "bar_format": BAR, "dynamic_ncols": True}
    with tqdm(total=total, desc=printable(what), **how) as bar:
        for item in items:
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)
            bar.update()


def _logged(
    items: Iterable[T], what: str, total: int, note: Callable[[], str] | None
) -> Iterator[T]:
    pace = Pace(total)
    told = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        if time.perf_counter() - told < LOG_S:
            continue
        told = time.perf_counter()
        parts = [f"{what:<28} {done} of {total}", pace.left(done)]
        if note is not None:
            parts.append(note())
        say(", ".join(part for part in parts if part))


class Pace:
    """How long what is left will take, at the speed since this was made."""

    def __init__(self, total: int):
        self.total = total
        self.start = time.perf_counter()

    def left(self, done: int) -> str:
        """Return "12 min left" after so many items; "" where it is unknown, or nothing is left."""
        if done < 1 or done >= self.total:
            return ""
        spent = time.perf_counter() - self.start
        return f"{duration(spent / done * (self.total - done))} left"


def duration(seconds: float) -> str:
    """Return seconds as people say them: "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def say(line: str) -> None:
    """Print a line to stderr, at rank 0; where its terminal has gone, the work goes on."""
    if is_rank_zero():
        with contextlib.suppress(OSError):
            print(printable(line), file=sys.stderr, flush=True)


@functools.cache
def say_once(line: str) -> None:
    """Print a line to stderr, at rank 0, unless this process has printed it already."""
    say(line)


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
