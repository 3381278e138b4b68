"""A device: where a bundle runs, what is known of it, and what it may cost there. `devices/*.yaml`
are read into this."""

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Annotated

from msgspec import Meta

from edgeclip import config
from edgeclip.config import BrokenRule, Config
from edgeclip.device import machine
from edgeclip.device.runtime import INSTALL
from edgeclip.errors import EdgeclipError, did_you_mean

PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider")


Patience = Annotated[float, Meta(gt=0.0, le=1e7)]
"""seconds"""


class Reach(Config):
    """One of `ssh`, `command`, `sshd`; none of them: this machine itself."""

    ssh: str | None = None
    """a host of your own ssh config; its keys, agent, jump hosts and known_hosts are used, nothing
    else"""
    command: tuple[str, ...] = ()
    """what runs a command there with its standard input, as [docker, exec, -i, board]"""
    sshd: bool = False
    """an sshd of edgeclip's own on 127.0.0.1, with keys of its own, for the length of the call"""
    emulate: str | None = None
    """sshd only: an aarch64 Debian root below it, under qemu-user with this -cpu model"""
    python: tuple[str, ...] = ("python3",)
    """what starts the board's Python, as [/opt/python3.11/bin/python3]"""
    folder: str = "~/.cache/edgeclip/board"
    """everything that edgeclip leaves on the board lies below it"""
    answer_s: Patience = 120.0
    """seconds that the board may be silent when it is asked what it is or has"""
    work_s: Patience = 1800.0
    """seconds that it may be silent at work, as while an engine is built; whatever it says, and
    each block that travels, begins them anew"""
    longest_s: Patience = 86400.0
    """seconds of one request at most, whatever the board says; `--minutes` come on top"""

    def __post_init__(self) -> None:
        ways = (self.ssh is not None, bool(self.command), self.sshd)
        if sum(ways) > 1:
            raise BrokenRule("", "ssh, command and sshd exclude each other", "keep one")
        if self.emulate and not self.sshd:
            raise BrokenRule("emulate", "goes with sshd: true only", "add it, or remove emulate")


class Recognize(Config):
    """Each given text must occur in this machine's own description; null: anything will do."""

    device_tree_model: str | None = None
    """in /proc/device-tree/model"""
    device_tree_compatible: str | None = None
    """in /proc/device-tree/compatible: the chip, whoever made the board"""
    cpu: str | None = None
    """in /proc/cpuinfo's model name"""
    gpu: str | None = None
    """in the device tree's GPU node, or the name that NVIDIA's driver gives"""
    arch: str | None = None
    """uname's machine, exactly"""
    memory_mib: int | None = None
    """at least so much memory, as the kernel counts it"""


class Minimum(Config):
    """A benchmark stops when both are reached."""

    min_duration_s: float = 60.0
    min_query_count: int = 1024


Limit = Annotated[float, Meta(gt=0.0)]


class Budget(Config):
    """Limits on cost, each asked by its 95 % interval where there is one; null: none."""

    latency_ms_p90: Limit | None = None
    """of the image encoder alone, one image after another"""
    latency_ms_p99: Limit | None = None
    """the same; it takes 1,000 queries"""
    from_frame_ms_p90: Limit | None = None
    """of a whole answer: from a camera's buffer to the label"""
    from_frame_ms_p99: Limit | None = None
    from_file_ms_p90: Limit | None = None
    """of a whole answer: from an encoded image's bytes to the label"""
    from_file_ms_p99: Limit | None = None
    peak_memory_mib: Limit | None = None
    """resident, of a fresh process that opens the bundle and answers one query"""
    energy_mj_per_image: Limit | None = None
    """millijoules above idle"""
    bundle_mib: Limit | None = None
    """of all files of the bundle"""


class Device(Config, kw_only=True):
    reach: Reach = Reach()
    recognize: Recognize = Recognize()
    runtimes: list[str]
    """those whose bundles it can run"""
    packages: tuple[str, ...] = ()
    """pip requirements of the runtimes that edgeclip brings along over ssh; what is not named must
    be there already"""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """ONNX Runtime's, best first: all of them must take part, and what took part is read back"""
    threads: Annotated[int, Meta(ge=1)] = 1
    cpus: tuple[int, ...] = ()
    """the processors to run on, by the kernel's numbers; none: all"""
    offline_batch: Annotated[int, Meta(ge=1)] = 8
    rails: tuple[str, ...] = ()
    """power rails whose sum is the board's draw: labels of hwmon channels, or RAPL domains"""
    bench: Minimum = Minimum()
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        _check_known("runtimes", self.runtimes, INSTALL)
        _check_known("providers", self.providers, PROVIDERS)


def _check_known(field: str, words: Iterable[str], known: Collection[str]) -> None:
    for word in words:
        if word not in known:
            raise BrokenRule(field, f"unknown '{word}'", did_you_mean(word, known))


def load(name: str) -> tuple[str, Device]:
    """Return (name, device) for a bare name or a path.

    Raises `EdgeclipError` with the field and the rule, or with a did-you-mean for the name.
    """
    path = config.find("device", name)
    return path.stem, config.load(path, Device)


def is_remote(device: Device) -> bool:
    """Return whether the device must be reached first.

    A board that is given by ssh and turns out to be this very machine is not remote.
    """
    reach = device.reach
    if reach.ssh is None or device.recognize == Recognize():
        return bool(reach.ssh or reach.command or reach.sshd)
    return bool(differences(device, machine.facts()))


def differences(device: Device, facts: machine.Facts) -> list[str]:
    """Return the mismatches between a machine and the device profile."""
    found = []
    for field in ("device_tree_model", "device_tree_compatible", "cpu", "gpu", "arch"):
        wanted = getattr(device.recognize, field)
        if wanted is not None and wanted not in (getattr(facts, field) or ""):
            found.append(f"its {field} is '{getattr(facts, field)}', not '{wanted}'")
    least = device.recognize.memory_mib
    if least is not None and (facts.memory_mib or 0) < least:
        found.append(f"it has {facts.memory_mib} MiB of memory, less than {least}")
    return found


@contextlib.contextmanager
def pinned(device: Device) -> Iterator[None]:
    """Run this thread, and what it starts from now on, on `device.cpus` only.

    Raises `EdgeclipError` where this process may not run on all of them.
    """
    if not device.cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, device.cpus)
        if os.sched_getaffinity(0) != set(device.cpus):
            raise EdgeclipError(
                "cpus",
                f"this process may run on {sorted(before)}, not on all of {list(device.cpus)}",
                "correct the device's profile",
            )
        yield
    finally:
        os.sched_setaffinity(0, before)


def require_here(name: str, device: Device) -> machine.Facts:
    """Return this machine's facts.

    Raises `EdgeclipError` when they are not those of the device, or its Python would be started
    otherwise.
    """
    here = machine.facts()
    if len(device.reach.python) > 1 and not is_remote(device):
        way = " ".join(device.reach.python)
        raise EdgeclipError(
            f"{name}: reach.python",
            f"'{way}' is ignored when running on the board itself",
            "set `cpus` instead, and run the rest by hand",
        )
    if wrong := differences(device, here):
        raise EdgeclipError(
            name,
            f"this machine is not that device ({'; '.join(wrong)})",
            "run the command on the device, or use --device host-cpu",
        )
    return here
