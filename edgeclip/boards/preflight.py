"""Check whether a device is fit to be measured: one row per check.

A failed check stops validate and bench before anything is copied. A warning is kept in the report
beside the figures, which then hold for this state of the board alone: an unpinned clock moved one
Jetson Nano's p99 from 148 to 9.4 ms. What cannot be read is a warning too.
"""

from typing import Literal, NamedTuple

from edgeclip.device.bench_report import PreflightRow
from edgeclip.device.machine import COUNTERS, Facts, State
from edgeclip.device.profile import Device, differences
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

CLOCK_S = 120
"""Seconds between the board's clock and the host's (this project's choice). Reports use the host's
time; a larger skew means that the board's clock was never set."""
BUSY = 0.5
"""Load average of the last minute, above which others use the cores (this project's choice)."""
BUILD_MIB = 3000
"""Memory and swap that building an engine may take: CUDA's, cuDNN's and TensorRT's libraries and
the tactics. An estimate of this project, measured on no board."""
RUN_MIB = 300
"""Memory and swap that running a bundle may take (this project's choice)."""
HOT_C = 70
"""Degrees C, where a board names no limit of its own (this project's choice). A Raspberry Pi slows
down from 80 on (its documentation, "Frequency management and thermal control"), so ten are left."""
MARGIN_C = 20
"""Degrees C below the critical trip point of the kernel's thermal zone (this project's choice)."""
OLDEST = (3, 10)
"""the oldest Python that runs the device layer"""


class Needs(NamedTuple):
    """What the work asks of the device."""

    mib: float
    """of free disk, for what will be copied"""
    engines: bool
    """TensorRT engines will run"""
    builds: bool
    """at least one engine has to be built first"""


def preflight(
    device: Device,
    facts: Facts,
    state: State,
    needs: Needs,
    host_time: float,
) -> list[PreflightRow]:
    """Return the checks of a device.

    facts, state: machine.facts() and machine.state() of the device. host_time: seconds since the
    epoch, when the state was read.
    """
    rows = [_board(device, facts), *_processor(device, facts), _python(facts)]
    rows += [_disk(state, needs), _memory(state, needs)]
    if "tensorrt" in device.runtimes:
        rows += _jetpack(state, needs)
    rows += [_clocks(state), _temperature(state), _throttling(state), _load(state)]
    rows.append(_clock(state, host_time))
    return rows


def require(name: str, rows: list[PreflightRow]) -> None:
    """Print the warnings; raise `EdgeclipError` when a check failed."""
    failed = []
    for row in rows:
        if row.status == "warn":
            say(f"{name}: warning: {row.check}: {row.found}, should be {row.need}")
        if row.status == "fail":
            failed.append(f"{row.check}: {row.found}, needs {row.need}")
    if failed:
        what = f"not fit to be measured ({'; '.join(failed)})"
        raise EdgeclipError(name, what, f"see: edgeclip doctor --device {name}")


# --- the checks


def _row(
    check: str,
    good: bool | None,
    found: object,
    need: str,
    otherwise: Literal["warn", "fail"] = "warn",
) -> PreflightRow:
    """Return a row.

    good: None means that it cannot be read, a warning. otherwise: the status where it is not good.
    """
    if good is None:
        return PreflightRow(check, "warn", "unknown", need)
    if good:
        return PreflightRow(check, "pass", str(found), need)
    if found is None:
        found = "unknown"
    return PreflightRow(check, otherwise, str(found), need)


def _board(device: Device, facts: Facts) -> PreflightRow:
    wrong = differences(device, facts)
    if wrong:
        return PreflightRow("board", "fail", "; ".join(wrong), "the profile's")
    found = facts.device_tree_model or facts.cpu
    return _row("board", True, found or "unknown", "the profile's")


def _processor(device: Device, facts: Facts) -> list[PreflightRow]:
    """Return a row for an emulated processor; none for a real one."""
    if not (device.reach.emulate or facts.emulated):
        return []
    found = f"emulated ({device.reach.emulate or 'qemu-user'})"
    return [PreflightRow("processor", "warn", found, "a real one: its timings will be refused")]


def _python(facts: Facts) -> PreflightRow:
    version = tuple(int(part) for part in facts.python.split(".")[:2])
    return _row("python", version >= OLDEST, facts.python, "3.10 or newer", "fail")


def _disk(state: State, needs: Needs) -> PreflightRow:
    free = state.free_disk_mib
    return _row("free disk", free >= needs.mib, f"{free} MiB", f"{needs.mib:.0f} MiB", "fail")


def _memory(state: State, needs: Needs) -> PreflightRow:
    least = RUN_MIB
    if needs.builds:
        least = BUILD_MIB
    need = f"{least} MiB with swap"
    free = state.available_mib
    swap = state.swap_mib or 0
    if free is None:
        return _row("memory", None, None, need)
    return _row("memory", free + swap >= least, f"{free} MiB free, {swap} MiB swap", need, "fail")


def _jetpack(state: State, needs: Needs) -> list[PreflightRow]:
    """Versions of what JetPack brings, and the power mode. Engines cannot run without TensorRT."""
    rows = []
    for name in ("l4t", "jetpack", "tensorrt", "cuda"):
        otherwise: Literal["warn", "fail"] = "warn"
        if needs.engines and name == "tensorrt":
            otherwise = "fail"
        rows.append(
            _row(name, getattr(state, name) is not None, getattr(state, name), "any", otherwise)
        )
    mode = state.power_mode
    rows.append(_row("power mode", mode is not None, mode, "known (nvpmodel -q)"))
    return rows


def _clocks(state: State) -> PreflightRow:
    locked = state.clocks_locked
    word = "free"
    if locked:
        word = "locked"
    governors = ", ".join(state.governors or ["unknown"])
    need = "locked (jetson_clocks, or governor performance and equal limits)"
    return _row("clocks", locked, f"{word}, governor {governors}", need)


def _temperature(state: State) -> PreflightRow:
    critical = state.critical_c or HOT_C + MARGIN_C
    limit = min(HOT_C, critical - MARGIN_C)
    need = f"at most {limit:.0f} C"
    temperature = state.temperature_c
    if temperature is None:
        return _row("temperature", None, None, need)
    return _row("temperature", temperature <= limit, f"{temperature:.1f} C", need)


def _throttling(state: State) -> PreflightRow:
    """Return what holds a clock down now; counters since the start say nothing about now."""
    if state.throttled is None:
        return _row("throttling", None, None, "none")
    slowed = {}
    for name, value in state.throttled.items():
        if value and not name.endswith(COUNTERS):
            slowed[name] = value
    return _row("throttling", not slowed, slowed or "none", "none")


def _load(state: State) -> PreflightRow:
    load = state.load_average
    if load is None:
        return _row("other load", None, None, f"at most {BUSY}")
    return _row("other load", load <= BUSY, load, f"at most {BUSY}")


def _clock(state: State, host_time: float) -> PreflightRow:
    skew = state.time - host_time
    need = f"within {CLOCK_S} s of the host (reports carry the host's time)"
    return _row("clock", abs(skew) <= CLOCK_S, f"{skew:+.0f} s", need)
