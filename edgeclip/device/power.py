"""Where power is read. The profile's `rails` say which; their sum must be the board's draw.

    hwmon      Jetson's INA3221 (in*_input in mV times curr*_input in mA) and INA238 (power*_input
               in microwatts), by label. Kernel Documentation/hwmon/{ina3221,ina238,sysfs-interface}
    RAPL       x86: energy_uj, a counter that wraps at max_energy_range_uj. Kernel
               Documentation/power/powercap
    tegrastats Jetson, where hwmon cannot be read: "VDD_IN 4938mW/4902mW"
    a meter    any board: a CSV with columns `timestamp` (seconds since 1970, or ISO 8601 with its
               zone) and `watts`, written by the meter's own program while the benchmark runs

What cannot be read is None, never an estimate.
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
from typing import NamedTuple

from edgeclip import text_file
from edgeclip.device import machine
from edgeclip.device.bench_report import Reading
from edgeclip.errors import EdgeclipError

HZ = 10.0
TEGRASTATS_MS = 100


class Source(NamedTuple):
    name: str
    """sensor and rails, for the report"""
    read: Callable[[], float | None]
    """watts, or None when there is nothing new"""
    pause_s: float = 1 / HZ
    """between two readings; 0: a reading waits for the next value itself"""
    close: Callable[[], None] = lambda: None


def find(rails: tuple[str, ...], root: Path = machine.ROOT) -> Source | None:
    """Return what reads all of `rails` here, or None: a part of the draw is not the draw."""
    if not rails:
        return None
    source = hwmon(rails, root) or rapl(rails, root)
    if source is None and shutil.which("tegrastats"):
        source = tegrastats(rails)
    return source


def hwmon(rails: tuple[str, ...], root: Path) -> Source | None:
    """Return a source over labeled hwmon channels; None where one of the rails has none."""
    channels: dict[str, list[Path]] = {}
    chips = set()
    for label in sorted(root.glob("sys/class/hwmon/hwmon*/*_label")):
        rail = _text(label)
        if rail not in rails or rail in channels:
            continue
        files = _channel(label)
        if files:
            channels[rail] = files
            chips.add(_text(label.with_name("name")) or "hwmon")
    if set(channels) != set(rails):
        return None

    def watts() -> float | None:
        total = 0.0
        for files in channels.values():
            values = [_number(file) for file in files]
            if None in values:
                return None
            total += math.prod(v for v in values if v is not None) / 1e6
        return total

    return Source(f"{', '.join(sorted(chips))}: {' + '.join(rails)}", watts)


def _channel(label: Path) -> list[Path]:
    """Return the files whose product is the channel's power in microwatts; empty: none is
    readable."""
    number = re.match(r"(?:in|curr|power)(\d+)_label", label.name)
    if number is None:
        return []
    power = label.with_name(f"power{number[1]}_input")
    files = [power]
    if not power.exists():
        millivolts = label.with_name(f"in{number[1]}_input")
        milliamperes = label.with_name(f"curr{number[1]}_input")
        files = [millivolts, milliamperes]
    if any(_number(file) is None for file in files):
        return []
    return files


class _Zone:
    """A RAPL energy counter in microjoules."""

    def __init__(self, folder: Path, wrap: float):
        self.file = folder / "energy_uj"
        self.wrap = wrap
        self.before: tuple[float, float] | None = None

    def watts(self) -> float | None:
        """Return the mean power since the last reading; None at the first one."""
        now = time.perf_counter()
        energy = _number(self.file)
        if energy is None:
            return None
        before = self.before
        self.before = (now, energy)
        if before is None:
            return None
        used = energy - before[1]
        if self.wrap:
            used %= self.wrap
        return used / 1e6 / (now - before[0])


def rapl(rails: tuple[str, ...], root: Path) -> Source | None:
    """Return a source over RAPL domains, of all packages; None where one cannot be read.

    Most kernels let only root read them.
    """
    zones: list[_Zone] = []
    for rail in rails:
        of_rail = []
        for name in sorted(root.glob("sys/class/powercap/intel-rapl:*/name")):
            if re.fullmatch(rf"{rail}(-\d+)?", _text(name) or ""):
                of_rail.append(name.parent)
        if not of_rail:
            return None
        for folder in of_rail:
            wrap = _number(folder / "max_energy_range_uj")
            if wrap is None or _number(folder / "energy_uj") is None:
                return None
            zones.append(_Zone(folder, wrap))

    def watts() -> float | None:
        values = [zone.watts() for zone in zones]
        if None in values:
            return None
        return sum(v for v in values if v is not None)

    return Source(f"RAPL: {' + '.join(rails)}", watts)


def tegrastats(rails: tuple[str, ...]) -> Source:
    """Return a source that reads tegrastats' lines as they come.

    The process runs from the first reading until the source is closed.
    """
    lines = _lines(["tegrastats", "--interval", str(TEGRASTATS_MS)])

    def watts() -> float | None:
        line = next(lines, None)
        if line is None:  # it has ended: do not spin
            time.sleep(1 / HZ)
            return None
        milliwatts = dict(re.findall(r"(\w+) (\d+)mW/\d+mW", line))
        if not set(rails) <= milliwatts.keys():
            return None
        return sum(int(milliwatts[rail]) for rail in rails) / 1e3

    return Source(f"tegrastats: {' + '.join(rails)}", watts, 0.0, lines.close)


def _lines(command: list[str]) -> Generator[str, None, None]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield from iter(process.stdout.readline, "")
        finally:
            process.terminate()


def meter(path: Path) -> list[Reading]:
    """Return the readings of a meter's CSV, up to its last end of line: it is still being written.

    Raises `EdgeclipError` for a file that cannot be read as `timestamp,watts`.
    """
    rows = []
    try:
        whole = text_file.decode(path.read_bytes().rpartition(b"\n")[0], path)
        for i, row in enumerate(csv.DictReader(text_file.lines(whole)), 2):
            moment = _moment(row["timestamp"].strip(), f"{path}:{i}")
            watts = float(row["watts"])
            if math.isfinite(watts) and math.isfinite(moment):  # nan: the meter had no reading
                rows.append(Reading(moment, watts, None))
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except OSError as e:
        raise EdgeclipError(path, f"cannot be read ({e.strerror})", "check its rights") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, csv.Error) as e:
        raise EdgeclipError(
            path,
            f"is no CSV with the columns timestamp and watts ({type(e).__name__}: {e})",
            "let the meter's program write these two",
        ) from None
    return sorted(rows, key=lambda reading: reading.time)


def _moment(stamp: str, where: str) -> float:
    """Return seconds since 1970 of a time that is written so, or as ISO 8601 with its zone."""
    if re.fullmatch(r"[\d.]+", stamp):
        return float(stamp)
    moment = datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise EdgeclipError(
            where, "this time has no zone", "write it with one, or as seconds since 1970"
        )
    return moment.timestamp()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    value = _text(path)
    return float(value) if value and re.fullmatch(r"-?\d+", value) else None


class Sampler:
    """Reads a source in a thread of its own between `with`'s two ends, and closes it."""

    def __init__(self, source: Source, root: Path = machine.ROOT):
        self.source = source
        self.root = root
        self.stop = threading.Event()
        self.samples: list[Reading] = []

    def __enter__(self) -> "Sampler":
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(2)

    def _run(self) -> None:
        while not self.stop.is_set():
            watts = self.source.read()
            if watts is not None:
                celsius = machine.temperature_c(self.root)
                self.samples.append(Reading(time.time(), watts, celsius))
            self.stop.wait(self.source.pause_s)
        self.source.close()
