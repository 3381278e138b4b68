"""The load generator: it knows no model, no data and no accuracy (MLPerf LoadGen's scope).

It takes a callable and prepared samples, and gives back latencies. A run ends when its minimum
duration *and* its minimum count are reached; loading and preprocessing happen before the clock
starts. A percentile is quoted only where enough samples carry it: p99 from 1,000 on, otherwise it
is null.

`OtherWork` says how much of the machine others had meanwhile: times under load are those of a
machine that nobody ships.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.device import machine
from edgeclip.device.bench_report import (
    Histogram,
    Latency,
    Sustained,
    Window,
)
from edgeclip.device.intervals import percentile_limits

WARM_UP = 10
P99_QUERIES = 1000
"""a p99 of fewer is not quoted"""
WINDOWS = 10
BINS = 24
"""of a histogram"""


def run_scenario(
    query: Callable[[Any], Any], samples: list[Any], min_duration_s: float, min_query_count: int
) -> list[float]:
    """Return latencies in seconds of one query after another, after WARM_UP untimed ones.

    `samples` are cycled through until both minima are reached.
    """
    for i in range(WARM_UP):
        query(samples[i % len(samples)])
    latencies: list[float] = []
    clock = time.perf_counter
    start = clock()
    while len(latencies) < min_query_count or clock() - start < min_duration_s:
        sample = samples[len(latencies) % len(samples)]
        before = clock()
        query(sample)
        latencies.append(clock() - before)
    return latencies


def summary(latencies: list[float]) -> Latency:
    """Return percentiles in milliseconds of latencies in seconds; p99 from 1,000 samples on.

    The limits of p90 and p99 take the queries for independent of each other.
    """
    ms = np.array(latencies) * 1e3
    p50, p90, p95 = (float(v) for v in np.percentile(ms, [50, 90, 95]))
    low, high = percentile_limits(ms, 90.0)
    p99 = p99_low = p99_high = None
    if len(ms) >= P99_QUERIES:
        p99 = float(np.percentile(ms, 99))
        p99_low, p99_high = percentile_limits(ms, 99.0)
    return Latency(
        queries=len(ms),
        seconds=round(float(ms.sum()) / 1e3, 2),
        latency_ms_min=float(ms.min()),
        latency_ms_mean=float(ms.mean()),
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
        latency_ms_p90_low=low,
        latency_ms_p90_high=high,
        latency_ms_p99_low=p99_low,
        latency_ms_p99_high=p99_high,
        histogram=_histogram(ms),
    )


def _histogram(ms: np.ndarray) -> Histogram:
    low, high = float(ms.min()), float(np.percentile(ms, 99))
    within = ms[ms <= high]
    counts, _ = np.histogram(within, bins=BINS, range=(low, max(high, low + 1e-6)))
    return Histogram(low_ms=low, high_ms=high, counts=counts.tolist(), beyond=len(ms) - len(within))


def sustained(query: Callable[[Any], Any], samples: list[Any], seconds: float) -> Sustained:
    """Send one query after another for so long, and return what became of each tenth."""
    readings = [machine.throttled()]
    windows = []
    for _ in range(WINDOWS):
        latency = summary(run_scenario(query, samples, seconds / WINDOWS, 1))
        readings.append(machine.throttled())
        windows.append(
            Window(
                queries=latency.queries,
                latency_ms_p50=latency.latency_ms_p50,
                latency_ms_p90=latency.latency_ms_p90,
                temperature_c=machine.temperature_c(),
                throttled=machine.slowed(*readings[-2:]),
            )
        )
    return Sustained(
        minutes=seconds / 60,
        windows=windows,
        p90_drift=windows[-1].latency_ms_p90 / windows[0].latency_ms_p90,
        throttled=_ever_throttled(windows),
        throttled_before=(readings[0] or {}).get("get_throttled", 0) > 0xFFFF,
    )


def _ever_throttled(windows: list[Window]) -> list[str] | None:
    names = set()
    for window in windows:
        if window.throttled is None:
            return None
        names.update(window.throttled)
    return sorted(names)


# --- other work


class OtherWork:
    """Counts from when it is made; other programs and other guests of the same host count alike."""

    def __init__(self, root: Path = machine.ROOT):
        self.root = root
        self.start = self._read()

    def processors(self) -> float | None:
        """Return how many processors others had on average since; None: cannot be read."""
        now = self._read()
        if self.start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        if wall <= 0:
            return 0.0
        return max(0.0, (busy - own) / wall)

    def _read(self) -> tuple[float, float, float] | None:
        """Return seconds: of the clock, of all processors' work, and of this process's own."""
        busy = machine.busy_seconds(self.root)
        if busy is None:
            return None
        used = os.times()
        own = used.user + used.system + used.children_user + used.children_system
        return time.perf_counter(), busy, own
