"""Facts about the machine that this code runs on: what a report must state, and what a device
profile is held against.

Only the standard library, and only files: the host sends this very file to a board to look at it
before anything is installed there. `root` is where /proc, /sys, /etc and /var hang, for tests on
files in the kernel's documented layouts. What cannot be read is None. Sources: kernel Documentation
(filesystems/proc, admin-guide/pm/cpufreq, hwmon/sysfs-interface, driver-api/thermal/sysfs-api,
arch/arm64/elf_hwcaps); /etc/nv_tegra_release, /var/lib/nvpmodel/status and /etc/nvpmodel.conf of
Jetson Linux; get_throttled of the Raspberry Pi firmware.
"""

# An old board's Python must get as far as being told that it is too old.
from __future__ import annotations

import dataclasses
import os
import platform
import re
import struct
import time
from collections.abc import Iterable
from pathlib import Path

# The flags that decide how fast, and for U8S8 how exact, int8 is.
ISA = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimddp", "i8mm")
ROOT = Path("/")
HWCAP = 16
HWCAP2 = 26
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


def facts(root: Path = ROOT) -> Facts:
    """Return what this machine is."""
    arch = platform.machine()
    cpuinfo = _fields(_read(root / "proc/cpuinfo"), ":")
    release = _fields(_read(root / "etc/os-release"), "=")
    compatible = _read(root / "proc/device-tree/compatible")
    return Facts(
        arch=arch,
        python=platform.python_version(),
        os=release.get("PRETTY_NAME", "").strip('"') or platform.platform(),
        # vendor_id is x86's field: another machine's kernel answers
        emulated=arch == "aarch64" and "vendor_id" in cpuinfo,
        cpu=cpuinfo.get("model name") or platform.processor() or None,
        cores=_cores(),
        isa=_isa(root, arch, cpuinfo),
        memory_mib=_meminfo(root).get("MemTotal"),
        device_tree_model=_read(root / "proc/device-tree/model"),
        device_tree_compatible=compatible and compatible.replace("\0", " "),
        gpu=_gpu(root),
        glibc=_glibc(),
        temperature_c=temperature_c(root),
    )


def state(folder: str, root: Path = ROOT) -> State:
    """Return what changes while this machine runs. folder: where files will go."""
    memory = _meminfo(root)
    place = Path(folder)
    while not place.exists():
        place = place.parent
    disk = os.statvfs(place)
    governors = {_read(core / "scaling_governor") or "" for core in _cpufreq(root)} - {""}
    return State(
        time=time.time(),
        free_disk_mib=disk.f_bavail * disk.f_frsize // 2**20,
        available_mib=memory.get("MemAvailable"),
        swap_mib=memory.get("SwapTotal"),
        load_average=_load_average(root),
        boot_id=_read(root / "proc/sys/kernel/random/boot_id"),
        temperature_c=temperature_c(root),
        critical_c=_critical_c(root),
        throttled=throttled(root),
        governors=sorted(governors) or None,
        clocks_locked=clocks_locked(root),
        power_mode=power_mode(root),
        l4t=_l4t(root),
        **_installed(root),
    )


def _fields(text: str | None, separator: str) -> dict[str, str]:
    """Return the `name<separator>value` lines of a file; of a repeated name the last one."""
    found = {}
    for line in (text or "").splitlines():
        name, there, value = line.partition(separator)
        if there:
            found[name.strip()] = value.strip()
    return found


def _load_average(root: Path) -> float | None:
    load = (_read(root / "proc/loadavg") or "").split()
    return float(load[0]) if load else None


def busy_seconds(root: Path = ROOT) -> float | None:
    """Return for how long processors have worked since the start, all together; None: unknown.

    What the host took away from this guest counts as work: user, nice, system, irq, softirq, steal.
    """
    first = (_read(root / "proc/stat") or "").partition("\n")[0].split()
    if first[:1] != ["cpu"] or len(first) < 9:
        return None
    ticks = [int(first[i]) for i in (1, 2, 3, 6, 7, 8)]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _glibc() -> str | None:
    """Return the version of glibc, or None where another C library runs this Python."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):
        return None
    return version if name == "glibc" and version else None


def _isa(root: Path, arch: str, cpuinfo: dict[str, str]) -> list[str] | None:
    if arch == "aarch64":
        return _arm_isa(root)
    flags = set(cpuinfo.get("flags", "").split())
    return [f for f in ISA if f in flags] if flags else None


def _arm_isa(root: Path) -> list[str] | None:
    """Return what the kernel, or the emulator, tells this very process.

    /proc/cpuinfo may be another machine's.
    """
    try:
        auxv = dict(struct.iter_unpack("QQ", (root / "proc/self/auxv").read_bytes()))
    except (OSError, struct.error):
        return None
    found = []
    for name, word, bit in (("asimddp", HWCAP, 20), ("i8mm", HWCAP2, 13)):
        if auxv.get(word, 0) >> bit & 1:
            found.append(name)
    return found


def _gpu(root: Path) -> str | None:
    """Return the GPU node's `compatible` in the device tree, or the model an NVIDIA driver names.

    A Jetson's is as "nvidia,ga10b".
    """
    for pattern in ("proc/device-tree/gpu@*/compatible", "proc/device-tree/*/gpu@*/compatible"):
        for path in sorted(root.glob(pattern)):
            return (_read(path) or "").replace("\0", " ") or None
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        found = re.search(r"Model:\s*(.+)", _read(path) or "")
        return found[1] if found else None
    return None


def processor(facts: Facts) -> str:
    """Return the processor's name; where ARM's kernel gives none, the board's."""
    return facts.cpu or facts.device_tree_model or f"unnamed {facts.arch}"


def saturates(facts: Facts) -> bool | None:
    """Return whether uint8 x int8 saturates here for want of VNNI or AMX.

    None on another architecture, or where the flags cannot be read.
    """
    if facts.arch not in ("x86_64", "AMD64") or facts.isa is None:
        return None
    return not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(facts.isa)


def temperature_c(root: Path = ROOT) -> float | None:
    """Return the temperature of the hottest thermal zone, or None where there is none to read."""
    zones = root.glob("sys/class/thermal/thermal_zone*/temp")
    return max(_millidegrees(zones), default=None)


def _critical_c(root: Path) -> float | None:
    """Return the lowest critical trip point: where a zone shuts the machine down."""
    points = []
    for kind in root.glob("sys/class/thermal/thermal_zone*/trip_point_*_type"):
        if _read(kind) == "critical":
            points.append(kind.with_name(kind.name.replace("_type", "_temp")))
    return min(_millidegrees(points), default=None)


def _millidegrees(paths: Iterable[Path]) -> list[float]:
    """Return the temperatures in these files, in degrees; those that cannot be read are left
    out."""
    found = []
    for path in paths:
        value = _read(path)
        if value and value.lstrip("-").isdigit():
            found.append(int(value) / 1000)
    return found


# --- throttling


def throttled(root: Path = ROOT) -> dict[str, int] | None:
    """Return counters and states that stay equal while nothing is throttled.

    x86: thermal_throttle counts. Raspberry Pi: the firmware's bits (0 to 3 now, 16 to 19 since
    boot; 0 is well). Jetson: over-current events. Any: cooling devices that hold a clock down (fans
    are no throttling). None where this kernel shows none, and on a Raspberry Pi without the
    firmware's bits, whatever else can be read there.
    """
    found: dict[str, int] = {}
    for path in root.glob("sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"):
        _note(found, f"{path.parent.parent.name}/{path.name}", path)
    # soc/soc:firmware, on a Pi 5 soc@107c000000/soc@107c000000:firmware
    for path in root.glob("sys/devices/platform/soc*/soc*:firmware/get_throttled"):
        _note(found, path.name, path, base=16)
    for path in root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt"):
        _note(found, path.name, path)
    for path in root.glob("sys/class/thermal/cooling_device*/cur_state"):
        kind = _read(path.with_name("type")) or ""
        value = _read(path)
        if value and value.isdigit() and "fan" not in kind.lower():
            found[f"{path.parent.name} {kind}"] = int(value)

    is_pi = "Raspberry Pi" in (_read(root / "proc/device-tree/model") or "")
    if is_pi and "get_throttled" not in found:
        return None
    return found or None


def _note(found: dict[str, int], name: str, path: Path, base: int = 10) -> None:
    value = _read(path)
    if value:
        found[name] = int(value, base)


def slowed(before: dict[str, int] | None, now: dict[str, int] | None) -> list[str] | None:
    """Return what holds a clock down, or did between two readings of `throttled`; None: unknown."""
    if before is None or now is None:
        return None
    return sorted(name for name, value in now.items() if _held(name, before.get(name, 0), value))


def _held(name: str, before: int, now: int) -> bool:
    if name == "get_throttled":
        throttled_now = now & 0xF
        new_since_boot = now >> 16 & ~(before >> 16)
        return bool(throttled_now or new_since_boot)
    if name.endswith(COUNTERS):
        return now > before
    return now > 0


# --- clocks and power


def _cpufreq(root: Path) -> list[Path]:
    return sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq"))


def clocks_locked(root: Path = ROOT) -> bool | None:
    """Return whether all cores (and a Jetson's GPU) run between equal limits, as jetson_clocks
    leaves them.

    None: some of the limits cannot be read.
    """
    limits = []
    for core in _cpufreq(root):
        limits.append((_read(core / "scaling_min_freq"), _read(core / "scaling_max_freq")))
    for gpu in root.glob("sys/class/devfreq/*gpu*"):
        limits.append((_read(gpu / "min_freq"), _read(gpu / "max_freq")))
    if not limits or any(None in pair for pair in limits):
        return None
    return all(low == high for low, high in limits)


def power_mode(root: Path = ROOT) -> str | None:
    """Return the name of a Jetson's nvpmodel mode, or None on another machine."""
    number = re.search(r"pmode:(\d+)", _read(root / "var/lib/nvpmodel/status") or "")
    if number is None:
        return None
    modes = _read(root / "etc/nvpmodel.conf") or ""
    name = re.search(rf"POWER_MODEL\s+ID={int(number[1])}\s+NAME=(\S+)", modes)
    return name[1] if name else f"mode {int(number[1])}"


def _l4t(root: Path) -> str | None:
    release = _read(root / "etc/nv_tegra_release") or ""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    return f"{found[1]}.{found[2]}" if found else None


def _installed(root: Path) -> dict[str, str | None]:
    """Return versions of what JetPack brings, by Debian's own records: jetpack, tensorrt, cuda."""
    status = _read(root / "var/lib/dpkg/status") or ""
    found: dict[str, str | None] = {}
    for name, package in DPKG.items():
        block = re.search(
            rf"^Package: {package}\nStatus: install ok installed\n(?:.+\n)*?Version: (\S+)",
            status,
            re.M,
        )
        found[name] = block[1] if block else None
    return found


def _meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in MiB."""
    text = _read(root / "proc/meminfo") or ""
    lines = re.finditer(r"^(\w+):\s+(\d+) kB", text, re.M)
    return {line[1]: int(line[2]) // 1024 for line in lines}


def _read(path: Path) -> str | None:
    """Return the text of a file without spaces and zeros around it; None: none, or unreadable."""
    try:
        return path.read_text(errors="replace").strip("\0\n ") or None
    except (OSError, ValueError):
        return None
