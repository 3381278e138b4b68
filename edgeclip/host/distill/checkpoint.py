"""Where training stands, on disk, so that a run that is killed goes on as if it had not been.

    runs/<name>/checkpoint/<step>/state.safetensors   weights, optimizer state, random state of each process, this epoch's losses so far
                                  state.json          position, log, random state of the data order, loss scale, seconds so far
                                  manifest.json       last

The number is that of the steps done in all. The newest one whose hashes are right counts; the older ones go once a newer
one is whole. Everything else (schedule, order, views) follows from the recipe and the position, so the resumed run's
weights equal the uninterrupted run's bit for bit on a CPU (`tests/test_resume.py`).
"""

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say


class Position(NamedTuple):
    """The step that comes next."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    """within the epoch"""
    done: int = 0
    """steps of all phases"""


class Checkpoint(NamedTuple):
    position: Position
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    """JSON-able"""

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors below `name`, without it."""
        return {
            k.removeprefix(f"{name}."): v
            for k, v in self.tensors.items()
            if k.startswith(f"{name}.")
        }


def save(folder: Path, checkpoint: Checkpoint) -> None:
    new = folder / f"{checkpoint.position.done:09d}"
    with disk.new_folder(new) as temporary:
        # A clone each: safetensors refuses tensors that share memory.
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in checkpoint.tensors.items()},
            temporary / "state.safetensors",
        )
        disk.write_json(
            temporary / "state.json",
            {"position": checkpoint.position._asdict(), **checkpoint.state},
        )
        disk.write_manifest(temporary, "checkpoint", {})
    for old in folder.iterdir():
        if old != new:
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`; None where there is none."""
    for path in (
        sorted((p for p in folder.glob("[0-9]*") if p.is_dir()), reverse=True)
        if folder.is_dir()
        else []
    ):
        try:
            disk.verify(path, disk.read_manifest(path, "checkpoint"))
        except EdgeclipError as e:
            say(f"passed over: {e}")
            continue
        state = disk.read_json(path / "state.json")
        return Checkpoint(
            Position(**state.pop("position")), load_file(path / "state.safetensors"), state
        )
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """ "<parameter's number>.<name>" to what the optimizer keeps of it; its settings follow from the recipe."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}": value
        for i, own in state.items()
        for name, value in own.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The other way round, each tensor in its parameter's memory layout.

    Raises `EdgeclipError` for the state of other parameters, as of an edgeclip that numbered them otherwise.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        p = parameters[int(number)] if int(number) < len(parameters) else None
        if p is None or (name != "step" and value.shape != p.shape):
            raise EdgeclipError(
                "checkpoint",
                f"its optimizer state '{key}' is of another weight (an older edgeclip wrote it?)",
                "begin anew with --fresh",
            )
        state.setdefault(int(number), {})[name] = (
            torch.empty_like(p, dtype=value.dtype).copy_(value)
            if value.shape == p.shape and p.ndim
            else value
        )
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM is only noted, so that a step can be finished; a second one acts at once."""
    noted: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        restore()
