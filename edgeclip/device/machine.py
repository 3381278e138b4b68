"""Facts about the machine that this code runs on: what a report must state, and what a device profile is held against.

Only the standard library, and only files: the host sends this very file to a board to look at it before anything is
installed there. `root` is where /proc, /sys, /etc and /var hang, for tests on files in the kernel's documented layouts.
What cannot be read is None. Sources: kernel Documentation (filesystems/proc, admin-guide/pm/cpufreq, hwmon/sysfs-interface,
driver-api/thermal/sysfs-api, arch/arm64/elf_hwcaps); /etc/nv_tegra_release, /var/lib/nvpmodel/status and /etc/nvpmodel.conf
of Jetson Linux; get_throttled of the Raspberry Pi firmware.
"""

from __future__ import (
    annotations,
)  # an old board's Python must get as far as being told that it is too old

import dataclasses
import os
import platform
import re
import struct
import sys
import time
from pathlib import Path
from typing import Any

# The flags that decide how fast, and for U8S8 how exact, int8 is.
ISA = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimddp", "i8mm")
ROOT = Path("/")
HWCAP, HWCAP2 = 16, 26
COUNTERS = ("_throttle_count", "_event_cnt")  # since the machine was started
DPKG = {"jetpack": r"nvidia-jetpack", "tensorrt": r"libnvinfer\d+", "cuda": r"cuda-cudart-\d+-\d+"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a machine is; what cannot be read is None."""

    arch: str
    """uname's machine"""
    python: str
    """version"""
    os: str
    """name and version"""
    emulated: bool = False
    """does another machine's kernel answer?"""
    cpu: str | None = None
    """the processor's model name; ARM's kernel gives none"""
    cores: int | None = None
    """that this process may run on"""
    isa: list[str] | None = None
    """of `ISA`, the instruction sets that this process has; None: unknown"""
    memory_mib: int | None = None
    """as the kernel counts it"""
    device_tree_model: str | None = None
    """the board's name"""
    device_tree_compatible: str | None = None
    """the chip's names, most exact first"""
    gpu: str | None = None
    glibc: str | None = None
    """version; None: another C library"""
    temperature_c: float | None = None
    """of the hottest zone"""


@dataclasses.dataclass(frozen=True)
class State:
    """What changes while a machine runs, or is installed on it; what cannot be read is None."""

    time: float
    """seconds since 1970, by the machine's own clock"""
    free_disk_mib: int
    """where files will go"""
    available_mib: int | None = None
    """memory"""
    swap_mib: int | None = None
    load_average: float | None = None
    """of the last minute"""
    boot_id: str | None = None
    temperature_c: float | None = None
    """of the hottest zone"""
    critical_c: float | None = None
    """where a zone shuts the machine down"""
    throttled: dict[str, int] | None = None
    """as `throttled` reads it"""
    governors: list[str] | None = None
    """of the processor's clocks"""
    clocks_locked: bool | None = None
    """do all clocks run between equal limits?"""
    power_mode: str | None = None
    """of a Jetson"""
    l4t: str | None = None
    """version of Jetson Linux"""
    jetpack: str | None = None
    """version; so below"""
    tensorrt: str | None = None
    cuda: str | None = None


def facts(root: Path = ROOT) -> dict[str, Any]:
    """JSON-able; what cannot be read is None."""
    cpuinfo = _read(root / "proc/cpuinfo") or ""
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    memory = _meminfo(root)
    release = dict(
        line.split("=", 1)
        for line in (_read(root / "etc/os-release") or "").splitlines()
        if "=" in line
    )
    arch = platform.machine()
    return {
        "cpu": fields.get("model name") or platform.processor() or None,
        "arch": arch,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "isa": _isa(root, arch, fields),
        "memory_mib": memory.get("MemTotal"),
        "device_tree_model": _read(root / "proc/device-tree/model"),
        "device_tree_compatible": (_read(root / "proc/device-tree/compatible") or "").replace(
            "\0", " "
        )
        or None,
        "gpu": _gpu(root),
        "os": release.get("PRETTY_NAME", "").strip('"') or platform.platform(),
        "python": platform.python_version(),
        "glibc": platform.libc_ver(sys.executable)[1] or None,
        "emulated": arch == "aarch64"
        and "vendor_id" in fields,  # x86's field: another machine's kernel answers
        "temperature_c": temperature_c(root),
    }


def state(folder: str, root: Path = ROOT) -> dict[str, Any]:
    """What changes while a machine runs, or is installed on it: the preflight's material. folder: where files will go."""
    memory = _meminfo(root)
    there = next(p for p in [Path(folder), *Path(folder).parents] if p.exists())
    disk = os.statvfs(there)
    load = (_read(root / "proc/loadavg") or "").split()
    return {
        "free_disk_mib": disk.f_bavail * disk.f_frsize // 2**20,
        "available_mib": memory.get("MemAvailable"),
        "swap_mib": memory.get("SwapTotal"),
        "load_average": float(load[0]) if load else None,
        "boot_id": _read(root / "proc/sys/kernel/random/boot_id"),
        "time": time.time(),
        "temperature_c": temperature_c(root),
        "critical_c": _critical_c(root),
        "throttled": throttled(root),
        "governors": sorted({g for p in _cpufreq(root) if (g := _read(p / "scaling_governor"))})
        or None,
        "clocks_locked": clocks_locked(root),
        **power_mode(root),
        **_installed(root),
    }


def processor(machine: dict[str, Any]) -> str:
    """Return the processor's name of these facts; ARM's kernel names no model, so the board's."""
    model: str | None = machine["cpu"] or machine.get("device_tree_model")
    return model or f"unnamed {machine.get('arch', 'processor')}"


def _isa(root: Path, arch: str, cpuinfo: dict[str, str]) -> list[str] | None:
    if (
        arch == "aarch64"
    ):  # what the kernel, or the emulator, tells this very process: cpuinfo may be another machine's
        try:
            auxv = dict(struct.iter_unpack("QQ", (root / "proc/self/auxv").read_bytes()))
        except (OSError, struct.error):
            return None
        return [
            name
            for name, word, bit in (("asimddp", HWCAP, 20), ("i8mm", HWCAP2, 13))
            if auxv.get(word, 0) >> bit & 1
        ]
    flags = set(cpuinfo.get("flags", "").split())
    return [f for f in ISA if f in flags] if flags else None


def _gpu(root: Path) -> str | None:
    """The GPU node's `compatible` in the device tree (Jetson: nvidia,ga10b), or the model an NVIDIA driver names."""
    for pattern in ("proc/device-tree/gpu@*/compatible", "proc/device-tree/*/gpu@*/compatible"):
        for p in sorted(root.glob(pattern)):
            return (_read(p) or "").replace("\0", " ") or None
    for p in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        found = re.search(r"Model:\s*(.+)", _read(p) or "")
        return found[1] if found else None
    return None


def saturates(facts: dict[str, Any]) -> bool | None:
    """Does uint8 x int8 saturate here for want of VNNI (or AMX)? None on another architecture, or where flags cannot be read."""
    if facts["arch"] not in ("x86_64", "AMD64") or facts["isa"] is None:
        return None
    return not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(facts["isa"])


def temperature_c(root: Path = ROOT) -> float | None:
    """The hottest thermal zone, or None where there is none to read."""
    return max(_millidegrees(root, "temp"), default=None)


def _critical_c(root: Path) -> float | None:
    """The lowest critical trip point: where a zone shuts the machine down."""
    found = []
    for p in root.glob("sys/class/thermal/thermal_zone*/trip_point_*_type"):
        value = _read(p.with_name(p.name.replace("_type", "_temp")))
        if _read(p) == "critical" and value and value.lstrip("-").isdigit():
            found.append(int(value) / 1000)
    return min(found, default=None)


def _millidegrees(root: Path, name: str) -> list[float]:
    values = [_read(p) for p in root.glob(f"sys/class/thermal/thermal_zone*/{name}")]
    return [int(v) / 1000 for v in values if v and v.lstrip("-").isdigit()]


def throttled(root: Path = ROOT) -> dict[str, int] | None:
    """Counters and states that stay equal while nothing is throttled; None where this kernel shows none.

    x86: thermal_throttle counts. Raspberry Pi: the firmware's bits (0 to 3 now, 16 to 19 since boot; 0 is well), without which
    it is None there, whatever else can be read. Jetson: over-current events. Any: cooling devices that are holding a clock
    down (fans are no throttling).
    """
    found: dict[str, int] = {}
    for pattern in (
        "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count",
        "sys/devices/platform/soc*/soc*:firmware/get_throttled",  # soc/soc:firmware, on a Pi 5 soc@107c000000/soc@107c000000:firmware
        "sys/class/hwmon/hwmon*/oc*_event_cnt",
    ):
        for p in root.glob(pattern):
            value = _read(p)
            if value:
                name = (
                    p.parent.parent.name + "/" + p.name if "thermal_throttle" in pattern else p.name
                )
                found[name] = int(value, 16) if "get_throttled" in name else int(value)
    for p in root.glob("sys/class/thermal/cooling_device*/cur_state"):
        kind, value = _read(p.with_name("type")) or "", _read(p)
        if value and value.isdigit() and "fan" not in kind.lower():
            found[f"{p.parent.name} {kind}"] = int(value)
    if "get_throttled" not in found and "Raspberry Pi" in (
        _read(root / "proc/device-tree/model") or ""
    ):
        return None
    return found or None


def slowed(before: dict[str, int] | None, now: dict[str, int] | None) -> list[str] | None:
    """What of two readings of `throttled` says that a clock is held down, or was between them; None: unknown."""
    if before is None or now is None:
        return None

    def held(name: str, value: int) -> bool:
        old = before.get(name, 0)
        if name == "get_throttled":  # a bit of now, or one since boot that is new
            return bool(value & 0xF or value >> 16 & ~(old >> 16))
        return value > (old if name.endswith(COUNTERS) else 0)

    return sorted(name for name, value in now.items() if held(name, value))


def _cpufreq(root: Path) -> list[Path]:
    return sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq"))


def clocks_locked(root: Path = ROOT) -> bool | None:
    """Do all cores (and a Jetson's GPU) run between equal limits, as jetson_clocks leaves them? None: some cannot be read."""
    limits = [
        (_read(p / "scaling_min_freq"), _read(p / "scaling_max_freq")) for p in _cpufreq(root)
    ]
    limits += [
        (_read(p / "min_freq"), _read(p / "max_freq")) for p in root.glob("sys/class/devfreq/*gpu*")
    ]
    known = [low is not None and high is not None for low, high in limits]
    return all(low == high for low, high in limits) if limits and all(known) else None


def power_mode(root: Path = ROOT) -> dict[str, Any]:
    """{"power_mode": NAME of a Jetson's nvpmodel or None}"""
    number = re.search(r"pmode:(\d+)", _read(root / "var/lib/nvpmodel/status") or "")
    if number is None:
        return {"power_mode": None}
    name = re.search(
        rf"POWER_MODEL\s+ID={int(number[1])}\s+NAME=(\S+)", _read(root / "etc/nvpmodel.conf") or ""
    )
    return {"power_mode": name[1] if name else f"mode {int(number[1])}"}


def _installed(root: Path) -> dict[str, str | None]:
    """Versions of what JetPack brings, by Debian's own records: {"l4t", "jetpack", "tensorrt", "cuda"}."""
    l4t = re.search(
        r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release") or ""
    )
    status = _read(root / "var/lib/dpkg/status") or ""
    found: dict[str, str | None] = {"l4t": f"{l4t[1]}.{l4t[2]}" if l4t else None}
    for name, package in DPKG.items():
        block = re.search(
            rf"^Package: {package}\nStatus: install ok installed\n(?:.+\n)*?Version: (\S+)",
            status,
            re.M,
        )
        found[name] = block[1] if block else None
    return found


def _meminfo(root: Path) -> dict[str, int]:
    """MiB"""
    return {
        m[1]: int(m[2]) // 1024
        for m in re.finditer(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo") or "", re.M)
    }


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ") or None
    except (OSError, ValueError):
        return None
