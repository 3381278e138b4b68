"""A device: where a bundle runs, what is known of it, and what it may cost there. `devices/*.yaml` are read into this."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from edgeclip import config, machine
from edgeclip.config import Config
from edgeclip.errors import EdgeclipError


class Recognise(Config):
    """Each given text must occur in this machine's own description; null: anything will do."""

    device_tree_model: str | None = None
    """in /proc/device-tree/model"""
    cpu: str | None = None
    """in /proc/cpuinfo's model name"""
    arch: str | None = None
    """uname's machine, exactly"""


class Minimum(Config):
    """A benchmark stops when both are reached."""

    min_duration_s: float = 60.0
    min_query_count: int = 1024


class Budget(Config):
    """Limits on cost; null: none."""

    latency_ms_p90: float | None = None
    peak_memory_mib: float | None = None


class Device(Config, kw_only=True):
    reach: Literal["local"] = "local"
    recognise: Recognise = Recognise()
    runtimes: list[str]
    """those whose bundles it can run"""
    threads: Annotated[int, Meta(ge=1)] = 1
    offline_batch: Annotated[int, Meta(ge=1)] = 8
    bench: Minimum = Minimum()
    budget: Budget = Budget()


def load(name: str) -> tuple[str, Device]:
    path = config.find("device", name)
    return path.stem, config.load(path, Device)


def require_here(name: str, device: Device) -> dict[str, Any]:
    """This machine's facts; raises `EdgeclipError` when they are not those of the device."""
    here = machine.facts()
    for field in ("device_tree_model", "cpu", "arch"):
        wanted, found = getattr(device.recognise, field), here[field]
        if wanted is not None and wanted not in (found or ""):
            raise EdgeclipError(
                name, f"this machine is not that device (its {field} is '{found}', not '{wanted}')", "run the command on the device, or use --device host-cpu"
            )
    return here
