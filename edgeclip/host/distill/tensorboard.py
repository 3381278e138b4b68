"""What training says of itself as it runs: beside the progress bar and, if asked, in TensorBoard.

tensorboard --logdir runs/<name>/tensorboard

loss/<name>                    before its weight, of that step
training/alpha, learning_rate  EduAttention's; the last parameter group's (the new layers')
speed/images_per_second        of all processes
speed/waiting                  share of the time in which the towers waited for images: above a
                               few per cent, more threads
memory/mib                     peak so far: of the GPU where there is one, else of the process
"""

import importlib
import resource
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from edgeclip.errors import EdgeclipError
from edgeclip.host import distributed
from edgeclip.progress import Clock

EVERY = 10
"""steps between two points of a curve"""


def check() -> None:
    """Raise `EdgeclipError` where TensorBoard is not installed."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise EdgeclipError(
            "train.tensorboard",
            "tensorboard is not installed",
            "pip install 'edgeclip[tensorboard]', or leave the field out",
        ) from None


class Board:
    """Draw curves, and keep a line of the newest figures."""

    def __init__(self, folder: Path | None, done: int, clock: Clock, device: torch.device) -> None:
        """folder: None draws nothing. done: steps of an earlier call; later points are dropped."""
        self.writer: Any = None
        if folder is not None and not distributed.rank():
            check()
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=done + 1)
        self.clock = clock
        self.device = device
        self.seconds = 0.0
        self.waited = 0.0
        self.images = 0
        self.note = ""
        """for the progress bar"""
        self.whole = ""
        """how long all epochs will take"""

    def __enter__(self) -> "Board":
        return self

    def said(self) -> str:
        """Return what the progress bar shows beside the step."""
        whole = self.whole and f"all epochs {self.whole}"
        return ", ".join(part for part in (whole, self.note) if part)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def step(
        self, done: int, images: int, metrics: dict[str, Tensor], others: dict[str, float]
    ) -> None:
        """Count step number `done` of `images` images.

        metrics: the losses; others: what else to draw under training/.
        """
        self.images += images
        if done % EVERY:
            return
        seconds = sum(self.clock.laps.values())
        waited = self.clock.laps.get("waiting for images", 0.0)
        passed = max(1e-9, seconds - self.seconds)
        speed = self.images / passed
        waiting = (waited - self.waited) / passed
        self.seconds = seconds
        self.waited = waited
        self.images = 0
        loss = metrics["loss"].item()
        self.note = f"loss {loss:.4g}, {speed:.0f} images/s, {waiting:.0%} waiting"
        if self.writer is None:
            return

        values = {"speed/images_per_second": speed, "speed/waiting": waiting}
        values["memory/mib"] = self._peak_mib()
        for name, value in metrics.items():
            values[f"loss/{name}"] = value.item()
        for name, number in others.items():
            values[f"training/{name}"] = number
        for name, number in values.items():
            self.writer.add_scalar(name, number, done)

    def _peak_mib(self) -> float:
        if self.device.type == "cuda":  # hardware: NVIDIA GPU
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
