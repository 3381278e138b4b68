"""Is the board fit to be measured? One row a question: pass, warn, fail, and what was found.

A fail stops validate and bench before anything is copied; a warning goes into the report beside the figures, which are
then those of this state of the board and no other (an unpinned clock moved one Jetson Nano's p99 from 148 to 9.4 ms).
What cannot be read is a warning too: not known is not well.
"""

from typing import Any, NamedTuple

from edgeclip.device.machine import COUNTERS
from edgeclip.device.profile import Device, differences
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

CLOCK_S = 120
"""this project's choice: nothing that is kept is dated by the board, a clock further off says that it was never set"""
BUSY = 0.5
"""load average before the work: others are using the cores. This project's choice: half a core on average of the last minute"""
BUILD_MIB = 3000
"""memory and swap that building an engine may take beside the system: CUDA, cuDNN's and TensorRT's libraries and the tactics. An
estimate of this project, measured on no board"""
HOT_C = 70
"""this project's choice, where a board names no limit of its own: a Raspberry Pi slows down from 80 on (its documentation, "Frequency
management and thermal control"), so ten are left for the run"""
MARGIN_C = 20
"""this project's choice: below the critical temperature that the kernel's thermal zone gives (a trip point of type critical)"""


class Row(NamedTuple):
    check: str
    status: str
    """pass, warn or fail"""
    found: str
    need: str


def preflight(
    device: Device,
    facts: dict[str, Any],
    state: dict[str, Any],
    need_mib: float,
    engines: bool,
    builds: bool,
    host_time: float,
) -> list[Row]:
    """facts, state: machine.py's, of the board. need_mib: what will be copied. engines: TensorRT's will run there. builds: one is not kept yet."""
    rows = []

    def row(check: str, good: bool | None, found: Any, need: str, otherwise: str = "warn") -> None:
        status = "pass" if good else otherwise if good is not None else "warn"
        rows.append(Row(check, status, "unknown" if found is None else str(found), need))

    wrong = differences(device, facts)
    row(
        "board",
        not wrong,
        "; ".join(wrong) or facts["device_tree_model"] or facts["cpu"],
        "the profile's",
        "fail",
    )
    if device.reach.emulate or facts["emulated"]:
        row(
            "processor",
            False,
            f"emulated ({device.reach.emulate or 'qemu-user'})",
            "a real one: its timings will be refused",
        )
    version = tuple(int(x) for x in facts["python"].split(".")[:2])
    row("python", version >= (3, 10), facts["python"], "3.10 or newer", "fail")
    row(
        "free disk",
        state["free_disk_mib"] >= need_mib,
        f"{state['free_disk_mib']} MiB",
        f"{need_mib:.0f} MiB",
        "fail",
    )
    available = (
        None
        if state["available_mib"] is None
        else state["available_mib"] + (state["swap_mib"] or 0)
    )
    least = BUILD_MIB if builds else 300
    memory = f"{state['available_mib']} MiB free, {state['swap_mib'] or 0} MiB swap"
    row(
        "memory",
        None if available is None else available >= least,
        None if available is None else memory,
        f"{least} MiB with swap",
        "fail",
    )
    if "tensorrt" in device.runtimes:
        for name in ("l4t", "jetpack", "tensorrt", "cuda"):
            row(
                name,
                state[name] is not None,
                state[name],
                "any",
                "fail" if engines and name == "tensorrt" else "warn",
            )
        row(
            "power mode",
            state["power_mode"] is not None,
            state["power_mode"],
            "known (nvpmodel -q)",
        )
    locked = (
        None
        if state["clocks_locked"] is None
        else f"{'locked' if state['clocks_locked'] else 'free'}, governor {', '.join(state['governors'] or ['unknown'])}"
    )
    row(
        "clocks",
        state["clocks_locked"],
        locked,
        "locked (jetson_clocks, or governor performance and equal limits)",
    )
    limit = min(HOT_C, (state["critical_c"] or HOT_C + MARGIN_C) - MARGIN_C)
    temperature = state["temperature_c"]
    row(
        "temperature",
        None if temperature is None else temperature <= limit,
        None if temperature is None else f"{temperature:.1f} C",
        f"at most {limit:.0f} C",
    )
    slowed = (
        None
        if state["throttled"] is None
        else {k: v for k, v in state["throttled"].items() if v and not k.endswith(COUNTERS)}
    )
    row(
        "throttling",
        None if slowed is None else not slowed,
        "none" if slowed == {} else slowed,
        "none",
    )
    load = state["load_average"]
    row("other load", None if load is None else load <= BUSY, load, f"at most {BUSY}")
    skew = state["time"] - host_time
    row(
        "clock",
        abs(skew) <= CLOCK_S,
        f"{skew:+.0f} s",
        f"within {CLOCK_S} s of the host (reports carry the host's time)",
    )
    return rows


def require(name: str, rows: list[Row]) -> None:
    """Says what is a warning; raises `EdgeclipError` for what failed."""
    for r in rows:
        if r.status == "warn":
            say(f"{name}: warning: {r.check}: {r.found}, should be {r.need}")
    if failed := [f"{r.check}: {r.found}, needs {r.need}" for r in rows if r.status == "fail"]:
        raise EdgeclipError(
            name, f"not fit for it ({'; '.join(failed)})", f"see edgeclip doctor --device {name}"
        )
