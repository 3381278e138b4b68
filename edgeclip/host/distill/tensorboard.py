"""What training says of itself while it runs: the note beside the progress bar and, where the recipe asks, TensorBoard.

tensorboard --logdir runs/<name>/tensorboard

loss/<name>                    before its weight, of that step
training/alpha, learning_rate  EduAttention's alpha; the last parameter group's rate (the new layers')
speed/images_per_second      of all processes
speed/waiting                  share of the time in which the towers waited for images: above a few per cent, more threads
memory/mib                     peak so far: of the GPU where there is one, else of the process
"""

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
    """Raises `EdgeclipError` where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401  (is it there?)
    except ImportError:
        raise EdgeclipError(
            "train.tensorboard",
            "tensorboard is not installed",
            "pip install 'edgeclip[tensorboard]', or leave the field out",
        ) from None


class Board:
    def __init__(self, folder: Path | None, done: int):
        """folder: None writes none. done: steps of an earlier call; what it wrote beyond them is dropped."""
        self.writer: Any = None
        if folder is not None and not distributed.rank():
            check()
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=done + 1)
        self.seconds, self.waited, self.images, self.note = 0.0, 0.0, 0, ""

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def step(
        self,
        done: int,
        images: int,
        said: dict[str, Tensor],
        others: dict[str, float],
        clock: Clock,
        device: torch.device,
    ) -> None:
        """After step number `done`. said: the losses; others: what else to draw under training/."""
        self.images += images
        if done % EVERY:
            return
        seconds, waited = sum(clock.laps.values()), clock.laps.get("waiting for images", 0.0)
        passed = max(1e-9, seconds - self.seconds)
        speed, waiting = self.images / passed, (waited - self.waited) / passed
        self.seconds, self.waited, self.images = seconds, waited, 0
        self.note = f"loss {said['loss'].item():.4g}, {speed:.0f} images/s, {waiting:.0%} waiting"
        if self.writer is None:
            return
        peak = (
            torch.cuda.max_memory_allocated(device) / 2**20
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        )
        values = {f"loss/{k}": v.item() for k, v in said.items()} | {
            f"training/{k}": v for k, v in others.items()
        }
        values |= {"speed/images_per_second": speed, "speed/waiting": waiting, "memory/mib": peak}
        for name, value in values.items():
            self.writer.add_scalar(name, value, done)
