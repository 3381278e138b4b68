"""Energy an image: what the board draws under load, less what it draws when idle, over the images of that time.

Where power is read (the profile's `rails` say which; their sum must be the board's draw, none a part of another):

    hwmon      Jetson's INA3221 (in*_input in mV times curr*_input in mA) and INA238 (power*_input in microwatts), by label.
               Kernel Documentation/hwmon/{ina3221,ina238,sysfs-interface}
    RAPL       x86: energy_uj, a counter that wraps at max_energy_range_uj. Kernel Documentation/power/powercap
    tegrastats Jetson, where hwmon cannot be read: "VDD_IN 4938mW/4902mW"
    a meter    any board: a CSV with columns `timestamp` (seconds since 1970, or ISO 8601 with its zone) and `watts`,
               written by the meter's own program on the host while the benchmark runs. Of a remote board the clocks' offset
               is measured over the link, before and after, and what lies within its half-width of an edge does not count

How to read it: `mj_per_image` is above idle, with the 95 % half-width from the scatter of the samples: of BLOCKS means
each of idle and load, since neighboring samples are alike, with Welch's t. Simulated, idle 30 s and load 60 s, it holds the
truth in .956 of white noise and .942 of noise that stays alike for a second. The sensor's own calibration error is on top of
it and is not known here. `steady` says whether the temperature had come to rest (under SLOPE); only watts and images after
that count, and where it never did, the figure is that of a board still warming up. What cannot be read is None, never an estimate.
"""

import csv
import datetime
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeclip.device import machine
from edgeclip.errors import EdgeclipError

HZ = 10.0
IDLE_S = 10.0
"""at least; half the load's time where that is longer"""
SLOPE = 1.0
"""kelvin a minute"""
BLOCKS = 5
"""few, so that each is long beside the time over which noise stays alike"""
KNOWN = 30
"""temperatures, from which on a slope is told"""
TEGRASTATS_MS = 100


class Sample(NamedTuple):
    time: float
    """seconds since 1970"""
    watts: float
    """over all rails, at this moment; of a counter: the mean since the sample before"""
    celsius: float | None


class Source(NamedTuple):
    name: str
    """sensor and rails, for the report"""
    read: Callable[[], float | None]
    """watts, or None when there is nothing new"""
    pause_s: float = 1 / HZ
    """between two readings; 0: a reading waits for the next value itself"""
    close: Callable[[], None] = lambda: None


# --- sensors


def find(rails: tuple[str, ...], root: Path = machine.ROOT) -> Source | None:
    """What reads all of `rails` here, or None: a part of the board's draw is not the board's draw."""
    if not rails:
        return None
    for read in (hwmon, rapl):
        if source := read(rails, root):
            return source
    return tegrastats(rails) if shutil.which("tegrastats") else None


def hwmon(rails: tuple[str, ...], root: Path) -> Source | None:
    channels: dict[str, list[Path]] = {}
    chips = set()
    for label in sorted(root.glob("sys/class/hwmon/hwmon*/*_label")):
        rail, number = _text(label), re.match(r"(?:in|curr|power)(\d+)_label", label.name)
        if rail not in rails or number is None or rail in channels:
            continue
        power = label.with_name(f"power{number[1]}_input")
        pair = [label.with_name(f"in{number[1]}_input"), label.with_name(f"curr{number[1]}_input")]
        files = [power] if power.exists() else pair
        if all(_number(f) is not None for f in files):
            channels[rail] = files
            chips.add(_text(label.with_name("name")) or "hwmon")
    if set(channels) != set(rails):
        return None

    def watts() -> float | None:
        values = [[_number(f) for f in files] for files in channels.values()]
        if any(v is None for row in values for v in row):
            return None
        return sum(math.prod(row) / 1e6 for row in values)  # type: ignore[arg-type]  # mV x mA and microwatts alike

    return Source(f"{', '.join(sorted(chips))}: {' + '.join(rails)}", watts)


def rapl(rails: tuple[str, ...], root: Path) -> Source | None:
    zones: list[tuple[Path, float]] = []
    for rail in rails:
        found = [
            p.parent
            for p in sorted(root.glob("sys/class/powercap/intel-rapl:*/name"))
            if re.fullmatch(rf"{rail}(-\d+)?", _text(p) or "")
        ]
        ranges = [_number(p / "max_energy_range_uj") for p in found]
        if (
            not found or any(_number(p / "energy_uj") is None for p in found) or None in ranges
        ):  # readable by root only
            return None
        zones += [(p, float(r or 0)) for p, r in zip(found, ranges, strict=True)]
    before: dict[Path, tuple[float, float]] = {}

    def watts() -> float | None:
        total: float | None = 0.0
        for zone, wrap in zones:
            now, energy = time.perf_counter(), _number(zone / "energy_uj")
            if energy is None:
                return None
            if zone in before and total is not None:
                t, e = before[zone]
                total += ((energy - e) % wrap if wrap else energy - e) / 1e6 / (now - t)
            else:
                total = None
            before[zone] = (now, energy)
        return total

    return Source(f"RAPL: {' + '.join(rails)}", watts)


def tegrastats(rails: tuple[str, ...]) -> Source:
    """Reads its lines as they come; the process runs from the first reading until the source is closed."""
    lines = _lines(["tegrastats", "--interval", str(TEGRASTATS_MS)])

    def watts() -> float | None:
        line = next(lines, None)
        if line is None:  # it has ended: do not spin
            time.sleep(1 / HZ)
            return None
        found = dict(re.findall(r"(\w+) (\d+)mW/\d+mW", line))
        return sum(int(found[r]) for r in rails) / 1e3 if set(rails) <= found.keys() else None

    return Source(f"tegrastats: {' + '.join(rails)}", watts, 0.0, lines.close)


def _lines(command: list[str]) -> Generator[str, None, None]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield from iter(process.stdout.readline, "")
    finally:
        process.terminate()
        process.wait()


def meter(path: Path) -> list[Sample]:
    """A meter's CSV, up to its last end of line: the meter is still writing. Raises `EdgeclipError` for one that cannot be read
    as `timestamp,watts`."""
    rows = []
    try:
        whole = path.read_bytes().rpartition(b"\n")[0].decode()
        for i, row in enumerate(csv.DictReader(whole.splitlines()), 2):
            stamp = row["timestamp"].strip()
            t = (
                float(stamp)
                if re.fullmatch(r"[\d.]+", stamp)
                else datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00"))
            )
            if isinstance(t, datetime.datetime):
                if t.tzinfo is None:
                    raise EdgeclipError(
                        f"{path}:{i}",
                        "this time has no zone",
                        "write it with one, or as seconds since 1970",
                    )
                t = t.timestamp()
            if math.isfinite(watts := float(row["watts"])):  # nan: the meter had no reading
                rows.append(Sample(t, watts, None))
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise EdgeclipError(
            path,
            f"is no CSV with the columns timestamp and watts ({type(e).__name__}: {e})",
            "let the meter's program write these two",
        ) from None
    return sorted(rows)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    value = _text(path)
    return float(value) if value and re.fullmatch(r"-?\d+", value) else None


# --- sampling


class Sampler:
    """Reads a source in a thread of its own between `with`'s two ends, and closes it."""

    def __init__(self, source: Source, root: Path = machine.ROOT):
        self.source, self.root, self.stop = source, root, threading.Event()
        self.samples: list[Sample] = []

    def __enter__(self) -> "Sampler":
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(2)

    def _run(self) -> None:
        while not self.stop.is_set():
            if (watts := self.source.read()) is not None:
                self.samples.append(Sample(time.time(), watts, machine.temperature_c(self.root)))
            self.stop.wait(self.source.pause_s)
        self.source.close()


def idle_s(seconds: float) -> float:
    return max(IDLE_S, seconds / 2)


def measure(
    query: Callable[[Any], Any],
    inputs: list[Any],
    seconds: float,
    source: Source | None,
    meter_csv: Path | None = None,
    metered: bool = False,
) -> dict[str, Any] | None:
    """Idle, then load for so long; None where there is nothing to read. The CSV is read after the load is over.

    metered: what `by_the_hosts_meter` needs instead.
    """
    if source is None and meter_csv is None and not metered:
        return None
    with Sampler(source or Source("", lambda: 0.0)) as sampler:
        times = [time.time()]
        time.sleep(idle_s(seconds))
        times.append(time.time())
        done, count, now = [(times[1], 0)], 0, times[1]
        while now - times[1] < seconds:
            query(inputs[count % len(inputs)])
            count, now = count + 1, time.time()
            if now - done[-1][0] >= 1 / HZ or now - times[1] >= seconds:
                done.append((now, count))
        times.append(now)
    if metered:
        return {"times": times, "done": done, "temperatures": sampler.samples}
    samples = meter(meter_csv) if meter_csv else sampler.samples
    temperatures = sampler.samples if meter_csv else samples
    return per_image(
        samples,
        temperatures,
        times,
        done,
        f"meter: {meter_csv}" if meter_csv else source.name if source else "",
    )


def by_the_hosts_meter(
    path: Path, marks: dict[str, Any], before: tuple[float, float], after: tuple[float, float]
) -> dict[str, Any]:
    """marks: `measure`'s, by the board's clock. before, after: (the board's clock less the host's, half-width) in seconds.

    The offset is the mean of both, its half-width holds both with theirs.
    """
    offset = (before[0] + after[0]) / 2
    half = max(abs(o - offset) + h for o, h in (before, after))
    idle, load, end = (t - offset for t in marks["times"])
    kept = [s for s in meter(path) if all(abs(s.time - edge) >= half for edge in (idle, load, end))]
    temperatures = [Sample(t - offset, w, c) for t, w, c in marks["temperatures"]]
    done = [(t - offset, n) for t, n in marks["done"]]
    return {
        **per_image(kept, temperatures, [idle, load, end], done, f"meter: {path}"),
        "clock_offset_s": offset,
        "clock_half_width_s": half,
    }


def per_image(
    samples: list[Sample],
    temperatures: list[Sample],
    times: list[float],
    done: list[tuple[float, int]],
    name: str,
) -> dict[str, Any]:
    """times: idle from, load from, load to. done: (time, images until then) over the load."""
    steady = steady_from([s for s in temperatures if times[1] <= s.time <= times[2]])
    start = times[1] if steady is None or math.isinf(steady) else steady
    idle = [s.watts for s in samples if times[0] <= s.time < times[1]]
    load = [s for s in samples if start <= s.time <= times[2]]
    images = done[-1][1] - float(np.interp(start, [t for t, _ in done], [n for _, n in done]))
    result: dict[str, Any] = {
        "source": name, "samples_idle": len(idle), "samples_load": len(load), "rate_hz": None, "idle_w": None, "load_w": None,
        "steady": None if steady is None else not math.isinf(steady), "mj_per_image": None, "mj_per_image_half_width": None, "images": round(images),
        "seconds": times[2] - start, "sensor_error": "not known: the half-width is that of the samples only",
    }  # fmt: skip
    if min(len(idle), len(load)) >= 2 * BLOCKS and images:
        mj = 1e3 * (times[2] - start) / images
        watts = [s.watts for s in load]
        result["rate_hz"] = (len(load) - 1) / (load[-1].time - load[0].time)
        result["idle_w"], result["load_w"] = float(np.mean(idle)), float(np.mean(watts))
        result["mj_per_image"] = mj * (result["load_w"] - result["idle_w"])
        result["mj_per_image_half_width"] = mj * half_width(idle, watts)
    return result


def half_width(a: list[float], b: list[float]) -> float:
    """95 %, of the difference of the means: Welch's t of the means of BLOCKS blocks each."""
    va, vb = (
        float(np.var([np.mean(block) for block in np.array_split(x, BLOCKS)], ddof=1)) / BLOCKS
        for x in (a, b)
    )
    if va + vb == 0:
        return 0.0
    v, z = (BLOCKS - 1) * (va + vb) ** 2 / (va**2 + vb**2), 1.959964
    # Student's quantile by its expansion in 1/v (Abramowitz and Stegun 26.7.5): from v = 4 on within 0.3 %
    t = (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
    return t * math.sqrt(va + vb)


def steady_from(samples: list[Sample]) -> float | None:
    """The first moment from which the temperature's slope is under SLOPE, over the next fifth of the time and over all the
    rest; inf: never; None: unknown. At least the last third must be left, or it would always be steady at the very end.
    """
    known = [(s.time, s.celsius) for s in samples if s.celsius is not None]
    if len(known) < KNOWN:
        return None
    t, c = np.array(known).T
    for i in range(0, 2 * len(t) // 3, max(1, len(t) // 30)):
        slopes = [
            np.polyfit((t[part] - t[i]) / 60, c[part], 1)[0]
            for part in (slice(i, i + len(t) // 5), slice(i, None))
        ]
        if max(map(abs, slopes)) < SLOPE:
            return float(t[i])
    return math.inf
