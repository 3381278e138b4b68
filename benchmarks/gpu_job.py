"""What a step of gpu.py is given, how it says that something is not installed, and what it times
with.
"""

import importlib.metadata
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common import SMOKE

DONE, FAILED, NOT_INSTALLED, NO_TIME = STATUSES = (
    "done",
    "failed",
    "not installed",
    "no time left",
)
FIRST_STEPS = 3
"""of a training, whose set-up does not count in its time a step"""


class Job(NamedTuple):
    """What every step is given; its working folder is that of the whole run, shared by the steps."""

    device: str
    """cuda or cpu: what is tried"""
    form: str
    """one of common.FORMS"""
    roots: dict[str, str]
    """photos by the name of a recipe; missing: generated shapes"""
    teacher: str
    """weights of the ViT-L/14: as a recipe names them"""
    run: str | None
    """a finished run whose bundles are opened; None: one of random weights"""
    open_clip_python: str
    """the interpreter that open_clip's trainer runs in"""

    @property
    def smoke(self) -> bool:
        return self.form == SMOKE


class NotInstalled(Exception):
    """The machine lacks what a step needs: a package, a program, a device."""


def need_module(name: str, install: str) -> None:
    """Raise `NotInstalled` where the module cannot be imported here."""
    if importlib.util.find_spec(name) is None:
        raise NotInstalled(f"{name}: {install}")


def need_distribution(name: str, install: str) -> None:
    """Raise `NotInstalled` where pip has not installed the package."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise NotInstalled(f"{name}: {install}") from None


def need_device(device: str) -> None:
    """Raise `NotInstalled` where CUDA is asked for and torch has no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise NotInstalled("no CUDA device that torch can use")


def wait_for(device: str) -> None:
    """Return when the device has done all that it was given: CUDA runs behind Python's back."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def gpu_memory_mib(device: str) -> float | None:
    """Return the most that torch held on the GPU in this process, MiB; None: on a CPU."""
    import torch

    if device != "cuda":
        return None
    return torch.cuda.max_memory_allocated() / 2**20


def latency_ms(run: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Return median and 90th percentile of a call's milliseconds; it must wait for its own answer.

    After five calls that do not count, for so many seconds and at least ten calls.
    """
    for _ in range(5):
        run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 10 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - before))
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"p50": statistics.median(times), "p90": tenths[-1], "calls": len(times)}


def seconds_a_step(ends: list[float]) -> float | None:
    """Return the median time between the ends of a training's steps; None: there are too few."""
    counted = ends[FIRST_STEPS:]
    pairs = list(itertools.pairwise(counted))
    if not pairs:
        return None
    return statistics.median(later - before for before, later in pairs)


def working_folder() -> Path:
    """Return the folder that all steps share."""
    return Path.cwd()
