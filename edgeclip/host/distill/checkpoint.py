"""Where training stands, on disk, so that a run that is killed goes on as if it had not been.

    runs/<name>/checkpoint/<step>/
        state.safetensors   weights, optimizer state, random state of each process, losses of
                            this epoch so far
        state.json          position, log, state of the data order, loss scale, seconds so far
        manifest.json       last

The number is that of the steps done in all. The newest one whose hashes are right counts; the older
ones go once a newer one is whole. Everything else (schedule, order, views) follows from the recipe
and the position, so the resumed run's weights equal the uninterrupted run's bit for bit on a CPU
(`tests/host/distill/test_checkpoint.py`).
"""

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeclip import disk
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.host import distributed
from edgeclip.host.distill.log import Averages, Log
from edgeclip.progress import say


class Position(NamedTuple):
    """The step that comes next."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    """within the epoch"""
    done: int = 0
    """steps of all phases"""


class Progress:
    """Where training stands, beside the weights."""

    def __init__(self, seed: int) -> None:
        self.at = Position()
        self.log: Log = []
        self.averages = Averages({})
        self.order = np.random.default_rng(seed)
        self.prompt_order = np.random.default_rng(seed)
        self.epoch_began()

    def epoch_began(self) -> None:
        """Remember the order's state: an epoch that is interrupted is drawn again."""
        self.order_state: Any = self.order.bit_generator.state

    def step_done(self, metrics: dict[str, Tensor]) -> None:
        """Count a step with its losses."""
        self.averages.add(metrics)
        self.at = self.at._replace(step=self.at.step + 1, done=self.at.done + 1)

    def epoch_done(self, row: dict[str, int | float], last: bool) -> None:
        """Count an epoch with its row of the log; last: of its phase."""
        self.log.append(row)
        self.averages = Averages({})
        self.epoch_began()
        if last:
            self.at = Position(self.at.phase + 1, 0, 0, self.at.done)
        else:
            self.at = self.at._replace(epoch=self.at.epoch + 1, step=0)


class Checkpoint(NamedTuple):
    """What is kept: tensors by their dotted names, and what JSON can hold."""

    position: Position
    tensors: dict[str, Tensor]
    state: Json
    """JSON-able"""

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors below `name`, without it."""
        start = f"{name}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint below `folder`, and remove the older ones."""
    new = folder / f"{checkpoint.position.done:09d}"
    tensors = {}
    for name, value in checkpoint.tensors.items():
        # A clone each: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
    with disk.new_folder(new) as temporary:
        save_file(tensors, temporary / "state.safetensors")
        position = {"position": checkpoint.position._asdict()}
        disk.write_json(temporary / "state.json", position | checkpoint.state)
        disk.write_manifest(temporary, "checkpoint", {})
    for old in folder.iterdir():
        if old != new:
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint in `folder`; None where there is none."""
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
        if not path.is_dir():
            continue
        try:
            disk.verify(path, disk.read_manifest(path, "checkpoint"))
            state = disk.read_json(path / "state.json")
        except EdgeclipError as e:
            say(f"checkpoint skipped: {e}")
            continue
        position = Position(**state.pop("position"))
        return Checkpoint(position, load_file(path / "state.safetensors"), state)
    return None


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return torch's random state of every process, [processes, bytes] by generator."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":  # hardware: NVIDIA GPU
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    gathered = {}
    for name, state in states.items():
        gathered[name] = distributed.all_gather(state[None].to(device)).cpu()
    return gathered


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Set torch's random state as `random_states` found it."""
    rank = distributed.rank()
    # A clone: a view is read from its storage's start.
    torch.set_rng_state(tensors["random.cpu"][rank].clone())
    if device.type == "cuda" and "random.cuda" in tensors:  # hardware: NVIDIA GPU
        torch.cuda.set_rng_state(tensors["random.cuda"][rank].clone(), device)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer keeps of each parameter, by "<parameter's number>.<name>".

    Its settings follow from the recipe.
    """
    tensors = {}
    for i, kept in optimizer.state_dict()["state"].items():
        for name, value in kept.items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{name}"] = value
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer what `optimizer_tensors` kept, in the parameters' memory layout.

    Raises `EdgeclipError` for the state of other parameters, as of an edgeclip that numbered them
    otherwise.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        fits = int(number) < len(parameters)
        if fits and name != "step":
            fits = value.shape == parameters[int(number)].shape
        if not fits:
            raise EdgeclipError(
                "checkpoint",
                f"its optimizer state '{key}' belongs to another weight"
                " (an older edgeclip wrote it?)",
                "start over with --fresh",
            )
        p = parameters[int(number)]
        if value.shape == p.shape and p.ndim:
            value = torch.empty_like(p, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextlib.contextmanager
def signals(catch: bool = True) -> Iterator[list[int]]:
    """Note the first SIGINT or SIGTERM in the list that is yielded, so that a step can be finished.

    A second one acts at once. catch: False leaves every signal as it is.
    """
    noted: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if catch and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
