"""Energy an image: what the board draws under load, less what it draws when idle, over its images.

`mj_per_image` comes with its 95 % half-width from the scatter of the samples: of BLOCKS means each
of idle and load, since neighboring samples are alike, with Welch's t. Simulated, idle 30 s and load
60 s, it holds the truth in .956 of white noise and .942 of noise that stays alike for a second. The
sensor's own calibration error is on top of it and is not known here. `steady` says whether the
temperature had come to rest (under SLOPE); only watts and images after that count, and where it
never did, the figure is that of a board still warming up.

power.py says where the watts come from. Of a board whose meter the host reads, the clocks' offset
is measured over the link, before and after, and what lies within its half-width of an edge does not
count.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edgeclip.device.bench_report import (
    Energy,
    EnergyMarks,
    Reading,
)
from edgeclip.device.power import HZ, Sampler, Source, meter

IDLE_S = 10.0
"""at least; half the load's time where that is longer"""
SLOPE = 1.0
"""kelvin a minute"""
BLOCKS = 5
"""few, so that each is long beside the time over which noise stays alike"""
KNOWN = 30
"""temperatures, from which on a slope is told"""
Z_TWO_SIDED = statistics.NormalDist().inv_cdf(0.975)


class Load(NamedTuple):
    """A benchmark that is measured: first idle, then one query after another."""

    query: Callable[[Any], Any]
    inputs: list[Any]
    seconds: float
    """under load"""


def idle_s(seconds: float) -> float:
    """Return how long to stay idle before a load of so many seconds."""
    return max(IDLE_S, seconds / 2)


def measure(load: Load, source: Source) -> Energy:
    """Return the energy of an image by a sensor of this machine."""
    marks = run_load(load, source)
    return per_image(marks.temperatures, marks, source.name)


def measure_by_meter(load: Load, meter_csv: Path) -> Energy:
    """Return the energy of an image by a power meter whose CSV is being written here.

    Raises `EdgeclipError`, after the load is over, for a file that cannot be read.
    """
    marks = run_load(load, Source("", lambda: 0.0))
    return per_image(meter(meter_csv), marks, f"meter: {meter_csv}")


def run_load(load: Load, source: Source) -> EnergyMarks:
    """Stay idle, then run the load; return when what happened, and the source's readings."""
    with Sampler(source) as sampler:
        idle_from = time.time()
        time.sleep(idle_s(load.seconds))
        load_from = time.time()
        done = [(load_from, 0)]
        count = 0
        now = load_from
        while now - load_from < load.seconds:
            load.query(load.inputs[count % len(load.inputs)])
            count += 1
            now = time.time()
            if now - done[-1][0] >= 1 / HZ or now - load_from >= load.seconds:
                done.append((now, count))
    return EnergyMarks((idle_from, load_from, now), done, sampler.samples)


def by_the_hosts_meter(
    path: Path, marks: EnergyMarks, before: tuple[float, float], after: tuple[float, float]
) -> Energy:
    """Return the energy of an image on a board whose meter the host reads.

    marks: by the board's clock. before, after: the board's clock less the host's, and the bound of
    its error, in seconds. The offset is the mean of both, its bound holds both with theirs. Raises
    `EdgeclipError` for a file that cannot be read.
    """
    offset = (before[0] + after[0]) / 2
    half = max(abs(clock - offset) + error for clock, error in (before, after))
    idle_from, load_from, load_to = marks.times
    edges = (idle_from - offset, load_from - offset, load_to - offset)
    kept = []
    for reading in meter(path):
        if all(abs(reading.time - edge) >= half for edge in edges):
            kept.append(reading)
    on_the_host = EnergyMarks(
        edges,
        [(t - offset, count) for t, count in marks.done],
        [Reading(r.time - offset, r.watts, r.celsius) for r in marks.temperatures],
    )
    energy = per_image(kept, on_the_host, f"meter: {path}")
    return msgspec.structs.replace(energy, clock_offset_s=offset, clock_half_width_s=half)


def per_image(samples: list[Reading], marks: EnergyMarks, source: str) -> Energy:
    """Return the energy of an image from watts and from what was done meanwhile, by one clock."""
    idle_from, load_from, load_to = marks.times
    under_load = [r for r in marks.temperatures if load_from <= r.time <= load_to]
    rest = steady_from(under_load)
    start = load_from
    steady = None
    if rest is not None:
        steady = not math.isinf(rest)
    if rest is not None and steady:
        start = rest
    idle = [r.watts for r in samples if idle_from <= r.time < load_from]
    load = [r for r in samples if start <= r.time <= load_to]

    times = [t for t, _ in marks.done]
    counts = [count for _, count in marks.done]
    images = counts[-1] - float(np.interp(start, times, counts))
    energy = Energy(
        source=source,
        samples_idle=len(idle),
        samples_load=len(load),
        steady=steady,
        images=round(images),
        seconds=load_to - start,
    )
    if min(len(idle), len(load)) < 2 * BLOCKS or not images:
        return energy

    watts = [r.watts for r in load]
    idle_w = float(np.mean(idle))
    load_w = float(np.mean(watts))
    mj_per_watt = 1e3 * (load_to - start) / images
    return msgspec.structs.replace(
        energy,
        rate_hz=(len(load) - 1) / (load[-1].time - load[0].time),
        idle_w=idle_w,
        load_w=load_w,
        mj_per_image=mj_per_watt * (load_w - idle_w),
        mj_per_image_half_width=mj_per_watt * half_width(idle, watts),
    )


def half_width(a: list[float], b: list[float]) -> float:
    """Return the 95 % half-width of the difference of the means: Welch's t of BLOCKS means each."""
    va = _variance_of_mean(a)
    vb = _variance_of_mean(b)
    if va + vb == 0:
        return 0.0
    v = (BLOCKS - 1) * (va + vb) ** 2 / (va**2 + vb**2)
    return _student(v) * math.sqrt(va + vb)


def _variance_of_mean(values: list[float]) -> float:
    means = [np.mean(block) for block in np.array_split(values, BLOCKS)]
    return float(np.var(means, ddof=1)) / BLOCKS


def _student(v: float) -> float:
    """Return the two-sided 95 % quantile of Student's t of v degrees of freedom.

    By its expansion in 1/v (Abramowitz and Stegun 26.7.5): from v = 4 on within 0.3 %.
    """
    z = Z_TWO_SIDED
    first = (z**3 + z) / (4 * v)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return z + first + second + third


def steady_from(readings: list[Reading]) -> float | None:
    """Return the first moment from which the temperature is at rest; inf: never; None: unknown.

    At rest: a slope under SLOPE, over the next fifth of the time and over all the rest. At least
    the last third must be left, or it would always be steady at the very end.
    """
    known = [(r.time, r.celsius) for r in readings if r.celsius is not None]
    if len(known) < KNOWN:
        return None
    t, celsius = np.array(known).T
    for i in range(0, 2 * len(t) // 3, max(1, len(t) // 30)):
        soon = _slope(t[i : i + len(t) // 5], celsius[i : i + len(t) // 5])
        rest = _slope(t[i:], celsius[i:])
        if max(abs(soon), abs(rest)) < SLOPE:
            return float(t[i])
    return math.inf


def _slope(t: np.ndarray, celsius: np.ndarray) -> float:
    """Return kelvin a minute."""
    return float(np.polyfit((t - t[0]) / 60, celsius, 1)[0])
