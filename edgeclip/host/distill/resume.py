"""A training that stops and goes on: when a checkpoint is written, and what it holds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError, Interrupted
from edgeclip.host import distributed
from edgeclip.host.distill.batches import Phase
from edgeclip.host.distill.checkpoint import (
    Checkpoint,
    Progress,
    load,
    optimizer_tensors,
    random_states,
    restore_random,
    save,
)
from edgeclip.host.distill.log import Averages
from edgeclip.host.distill.step import ADVICE
from edgeclip.host.distill.training import Training
from edgeclip.progress import say


class Keeper:
    """Write checkpoints where they are due, and end the training where a signal asks for it."""

    def __init__(
        self, training: Training, progress: Progress, folder: Path | None, noted: list[int]
    ) -> None:
        """folder: None writes none. noted: signals that came."""
        self.training = training
        self.progress = progress
        self.folder = folder
        self.noted = noted
        self.stop = 0
        """the signal that any process got; 0: none"""

    def after_step(self, phase: Phase, optimizer: torch.optim.Optimizer) -> None:
        """Save where the recipe says so. Raises `Interrupted` after a signal, when all is saved."""
        if self.folder is None:
            return
        self.stop = distributed.all_reduce_max(max(self.noted, default=0))
        at = self.progress.at
        every = self.training.recipe.train.checkpoint_every
        due = every > 0 and at.done % every == 0  # 0: at the end of an epoch and at a signal only
        if at.step < phase.steps and (self.stop or due):
            self._save(self.folder, optimizer)

    def after_epoch(self, optimizer: torch.optim.Optimizer, last: bool) -> None:
        """Save, after the very last one too, for what follows may fail; last: of its phase."""
        if self.folder is None:
            return
        if last:
            self._save(self.folder, None)
        else:
            self._save(self.folder, optimizer)

    def _save(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        training = self.training
        progress = self.progress
        at = progress.at
        refuse_broken(training.modules, f"step {at.done}")
        tensors: dict[str, Tensor] = {}
        for name, module in training.modules.items():
            tensors |= _below(name, module.state_dict())
        tensors |= random_states(training.device)
        tensors |= _below("averages", progress.averages.tensors())
        if optimizer is not None:
            tensors |= _below("optimizer", optimizer_tensors(optimizer))
        state = {
            "log": progress.log,
            "draws": {
                "order": _as_text(progress.order_state),
                "prompt_order": _as_text(progress.prompt_order.bit_generator.state),
            },
            "processes": distributed.world_size(),
            "scaler": training.step.scaler.state_dict(),
            "seconds": training.clock.laps,
        }
        if not distributed.rank():
            save(folder, Checkpoint(at, tensors, state))
        distributed.barrier()
        if self.stop:
            raise Interrupted(
                self.stop,
                f"Interrupted: step {at.done} is finished and saved in {folder};"
                " the same command goes on from there.",
            )


def refuse_broken(modules: dict[str, nn.Module], where: str) -> None:
    """Raise where a weight is not finite, before the weights replace those that were kept.

    A finite loss can have a gradient that is not.
    """
    for part, module in modules.items():
        if part == "learned":  # a running mean that has not begun is nan
            continue
        for name, value in module.state_dict().items():
            if not torch.isfinite(value).all():
                raise EdgeclipError(where, f"weight '{name}' is not finite", ADVICE)


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in tensors.items()}


def resume(training: Training, progress: Progress, folder: Path | None) -> dict[str, Tensor]:
    """Go on from the newest checkpoint in `folder`, if any; return the optimizer's state there."""
    if folder is None:
        return {}
    found = load(folder)
    if found is None:
        return {}
    say(f"{folder}: going on after step {found.position.done}")
    for name, module in training.modules.items():
        module.load_state_dict(found.part(name))
    progress.at = found.position
    progress.log = found.state["log"]
    progress.averages = Averages(found.part("averages"))
    progress.order.bit_generator.state = _as_numbers(found.state["draws"]["order"])
    progress.prompt_order.bit_generator.state = _as_numbers(found.state["draws"]["prompt_order"])
    training.step.scaler.load_state_dict(found.state["scaler"])
    laps = training.clock.laps
    training.clock.laps = dict(found.state["seconds"])
    for name, seconds in laps.items():
        training.clock.laps[name] = training.clock.laps.get(name, 0.0) + seconds

    before = found.state["processes"]
    now = distributed.world_size()
    if before == now:
        restore_random(found.tensors, training.device)
    else:
        say(
            f"the checkpoint is of {before} processes and these are {now}:"
            " masks and dropout are drawn otherwise from here on"
        )
    return found.part("optimizer")


def _as_text(state: Any) -> Json:
    """Return numpy's random state as JSON holds it: its numbers have 128 bits, JSON's 64."""
    return {**state, "state": {name: str(value) for name, value in state["state"].items()}}


def _as_numbers(state: Json) -> Json:
    """Return numpy's random state of what `_as_text` made of it."""
    return {**state, "state": {name: int(value) for name, value in state["state"].items()}}
