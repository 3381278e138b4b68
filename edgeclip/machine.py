"""Facts about the machine that this code runs on: what a report must state, and what a device profile is held against."""

import os
import platform
from pathlib import Path
from typing import Any

# The flags that decide how fast, and for U8S8 how exact, int8 is.
ISA = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimddp", "i8mm")


def facts() -> dict[str, Any]:
    """JSON-able; what cannot be read is None."""
    cpuinfo = _read("/proc/cpuinfo") or ""
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    memory = _read("/proc/meminfo")
    release = dict(line.split("=", 1) for line in (_read("/etc/os-release") or "").splitlines() if "=" in line)
    return {
        "cpu": fields.get("model name") or platform.processor() or None,
        "arch": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": [f for f in ISA if f in flags] if flags else None,
        "memory_mib": int(memory.split()[1]) // 1024 if memory else None,
        "device_tree_model": _read("/proc/device-tree/model"),
        "os": release.get("PRETTY_NAME", "").strip('"') or platform.platform(),
        "python": platform.python_version(),
        "temperature_c": temperature_c(),
    }


def temperature_c() -> float | None:
    """The hottest thermal zone, or None where there is none to read."""
    values = [_read(str(p)) for p in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    celsius = [int(v) / 1000 for v in values if v and v.lstrip("-").isdigit()]
    return max(celsius) if celsius else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ") or None
    except OSError:
        return None
