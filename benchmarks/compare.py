"""Peers measured side by side, a median with its interval, and a verdict.

Peers take turns, round by round, so that a slow minute of the machine hits all of them; a ratio is
formed within a round and only then are the rounds summed up. A required ratio is judged by the
median over at least 30 rounds and its 95 % interval (order statistics, so no distribution is
assumed):

    met           the whole interval lies on the right side of the limit
    missed        the whole interval lies beyond it; with --check the script then exits 3 (common.py)
    not resolved  the interval holds the limit, or there are fewer than 30 rounds

Only the standard library is used: Linux starts a child's peak memory at that of the process that
made it (`ru_maxrss` survives exec), so whoever measures small processes must stay smaller than they
are.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MIN_PAIRS = 30


# --- peers


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A worker's main loop: a JSON request a line on stdin, a JSON answer a line on stdout, until
    stdin closes.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")


@contextlib.contextmanager
def workers(commands: dict[str, list[str]]) -> Iterator[dict[str, Callable[..., dict[str, Any]]]]:
    """Starts each command as a process of its own; yields name to a function that asks it and
    waits for the answer.
    """
    running: dict[str, subprocess.Popen[str]] = {}

    def asker(name: str) -> Callable[..., dict[str, Any]]:
        def ask(**request: Any) -> dict[str, Any]:
            process = running[name]
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                sys.exit(
                    f"{name}: its process ended with code {process.wait()}; its message is above"
                )
            answer: dict[str, Any] = json.loads(line)
            return answer

        return ask

    try:
        for name, command in commands.items():
            running[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        yield {name: asker(name) for name in commands}
    finally:
        for process in running.values():
            assert process.stdin
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()


def interleave(
    measures: dict[str, Callable[[], Any]], rounds: int, every: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    """One dict of results a round. The order rotates and turns round, so that no peer always
    follows the same one.

    every: a slow peer's name to n: it takes part in every n-th round only.
    """
    names = list(measures)
    results = []
    start = time.perf_counter()
    for r in range(rounds):
        k = (r // 2) % len(names)
        order = (names[k:] + names[:k])[:: -1 if r % 2 else 1]
        results.append(
            {name: measures[name]() for name in order if r % (every or {}).get(name, 1) == 0}
        )
        elapsed = time.perf_counter() - start
        if sys.stderr.isatty():
            print(
                f"\rround {r + 1} of {rounds}, {elapsed:.0f} s, about {elapsed / (r + 1) * (rounds - r - 1):.0f} s left ",
                end="",
                file=sys.stderr,
            )
    clear = "\r" if sys.stderr.isatty() else ""
    print(
        f"{clear}{rounds} interleaved rounds in {time.perf_counter() - start:.0f} s",
        file=sys.stderr,
    )
    return results


def column(rounds: list[dict[str, Any]], name: str, field: str | None = None) -> list[float]:
    """A peer's values over the rounds that it took part in; field: of a result that is a dict."""
    return [r[name] if field is None else r[name][field] for r in rounds if name in r]


def ratios(
    rounds: list[dict[str, Any]], numerator: str, denominator: str, field: str | None = None
) -> list[float]:
    """numerator / denominator within each round that has both."""
    both = [r for r in rounds if numerator in r and denominator in r]
    return [
        a / b
        for a, b in zip(
            column(both, numerator, field), column(both, denominator, field), strict=True
        )
    ]


# --- figures


class Interval(NamedTuple):
    median: float
    low: float | None
    """of the median's 95 % interval; None: too few values (five or fewer) to have one"""
    high: float | None
    n: int

    def __str__(self) -> str:
        return (
            f"{self.median:.3g}"
            if self.low is None
            else f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"
        )


def interval(values: list[float]) -> Interval:
    """The median and the narrowest symmetric pair of order statistics that covers it with at least
    95 %.
    """
    x, n = sorted(values), len(values)
    k, tail = -1, 1 / 2**n
    # P(fewer than k + 1 of n values lie below the median) is a binomial tail with p = 1/2.
    while 2 * tail <= 0.05:
        k += 1
        tail += math.comb(n, k + 1) / 2**n
    low, high = (x[k], x[n - 1 - k]) if k >= 0 else (None, None)
    return Interval(statistics.median(x), low, high, n)


def judge(
    what: str, values: list[float], *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """A required figure, from repeated or paired measurements."""
    return within(what, interval(values), at_least=at_least, at_most=at_most)


def within(
    what: str, found: Interval, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """A required figure whose interval is known: of a median, or of a slope."""
    verdict = "not resolved"
    if found.n >= MIN_PAIRS and found.low is not None and found.high is not None:
        right, wrong = (
            (found.low, found.high) if at_least is not None else (-found.high, -found.low)
        )
        limit = at_least if at_least is not None else -(at_most or 0.0)
        verdict = "met" if right >= limit else "missed" if wrong < limit else "not resolved"
    return {
        "what": what,
        "found": found.median,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "at_least": at_least,
        "at_most": at_most,
        "verdict": verdict,
    }


def exact(
    what: str,
    value: float,
    *,
    n: int = 1,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """A required figure that is counted, or averaged over n runs as the requirement says: it has
    no interval.
    """
    met = value >= at_least if at_least is not None else value <= (at_most or 0.0)
    verdict = "met" if met else "missed"
    return {
        "what": what,
        "found": value,
        "low": None,
        "high": None,
        "n": n,
        "at_least": at_least,
        "at_most": at_most,
        "verdict": verdict,
    }
