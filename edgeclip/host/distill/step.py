"""One step of the optimizer, over every process and every part of its batch.

The towers see images and texts one by one, so each process runs its own share through them, in `accumulate` parts.
Everything behind the towers (projector, EduAttention, losses) sees the whole batch: features are gathered, every
process computes the same loss of all of them, and its gradient with respect to the features goes back into the
towers, a share and a part at a time:

    1  features of all parts        with their graph when there is one part, without it when there are several
    2  gather, loss, its gradient   with respect to features and new layers; the same in every process
    3  towers' backward             several parts: forward once more, now with the graph, same dropout and same masks

So a batch in parts, on several processes, is the large batch, for every loss: negatives, IFAlign's statistics, the
projector's batch norm and CLIP-KD's gradient loss included. What stays a part's own is what lies inside the towers:
their batch norms. The second pass costs one more forward (GradCache, arXiv 2101.06983). Gradients of the towers are
averaged by torch's DistributedDataParallel.

What fails first as the batch grows is 2: every process holds the [B, B] similarities of the contrastive losses.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from edgeclip.errors import EdgeclipError
from edgeclip.host import distributed
from edgeclip.host.distill import losses as L
from edgeclip.host.distill import masking
from edgeclip.host.recipe import MaskedFeature, Train
from edgeclip.host.student import EduAttentionHead
from edgeclip.progress import Clock

Objective = Callable[[L.Batch, Tensor | None], tuple[Tensor, dict[str, Tensor]]]
"""of a batch and of the features of its class prompts: the loss, and what the log says of it"""
ADVICE = "lower the learning rate or look for broken features (the student of the last good epoch, if there is one, is the run's student.partial)"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Part(NamedTuple):
    """What the towers see at once; what is None is not run."""

    pixels: Tensor | None = None
    captions: Int[Tensor, "b L"] | None = None
    prompts: Int[Tensor, "p L"] | None = None
    hide: MaskedFeature | None = None


class Towers(nn.Module):
    def __init__(self, image: nn.Module, text: nn.Module | None):
        super().__init__()
        self.image, self.text = image, text

    def forward(self, part: Part) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if part.pixels is not None:
            if part.hide:
                found["masked"] = masking.forward(self.image, part.pixels, part.hide)
            found["image"] = self.image(part.pixels)
        if part.captions is not None and self.text is not None:
            found["text"] = self.text(part.captions)
            if part.prompts is not None and len(part.prompts):
                found["prompts"] = self.text(part.prompts)
        return {name: features.float() for name, features in found.items()}


class NewLayers(nn.Module):
    """From the towers' features of a whole batch to its loss."""

    def __init__(
        self,
        projector: nn.Module,
        head: EduAttentionHead | None,
        learned: nn.ParameterDict,
        masked: bool,
    ):
        super().__init__()
        self.projector, self.head, self.learned, self.masked = projector, head, learned, masked

    def forward(
        self, features: dict[str, Tensor], known: dict[str, Any], objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        raw = self.projector(features["image"])
        v = F.normalize(raw, dim=-1)
        f_e, head = v, self.head
        if head is not None:
            query, residual = head.spec.query == "raw", head.spec.residual == "teacher"
            f_e = head(
                v,
                known["class_features"],
                raw if query else None,
                known["teacher_features"] if residual else None,
            )
        # In the projector's steps there are no pixels to hide, so MFD is FD.
        hidden = (
            None
            if not self.masked
            else F.normalize(self.projector(features["masked"]), dim=-1)
            if "masked" in features
            else v
        )
        batch = L.Batch(
            image_features=v,
            head_features=f_e,
            raw_features=raw,
            masked_features=hidden,
            text_features=features.get("text"),
            learned=self.learned,
            **known,
        )
        return objective(batch, features.get("prompts"))


class Step:
    """`towers` and `layers` are trained in place."""

    def __init__(
        self, towers: Towers, layers: NewLayers, spec: Train, device: torch.device, clock: Clock
    ):
        self.towers, self.device, self.clock = towers, device, clock
        self.recomputes = spec.accumulate > 1 or spec.gradient_checkpointing
        self.dtype = PRECISIONS[spec.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
        self.parallel_towers, self.parallel_layers = _parallel(towers), _parallel(layers)

    def __call__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: float,
        parts: list[Part],
        features: dict[str, Tensor],
        known: dict[str, Any],
        counts: dict[str, list[int]],
        objective: Objective,
        where: str,
    ) -> dict[str, Tensor]:
        """Returns the loss of the whole batch and each of its terms before its weight.

        factor: of the learning rate. parts: of this process; empty ones are none. features: of the whole batch, where they are
        known without the towers. known: the teacher's half of the whole batch. counts: rows of each process, by feature.
        """
        once = len(parts) <= 1
        random: list[tuple[Tensor, ...]] = []
        with contextlib.nullcontext() if once else torch.no_grad():
            found = []
            for part in parts:
                random.append(self._random())
                found.append(self._run(self.parallel_towers if once else self.towers, part))
        buffers = (
            {name: b.clone() for name, b in self.towers.named_buffers()} if self.recomputes else {}
        )
        after = self._random()
        own = {
            name: torch.cat([f[name] for f in found if name in f])
            if len(found) > 1
            else found[0][name]
            for name in (found[0] if found else {})
        }
        leaves = {
            name: distributed.all_gather(f.detach(), counts[name]).requires_grad_()
            for name, f in own.items()
        }
        loss, said = self.parallel_layers(features | leaves, known, objective)
        if not math.isfinite(loss.item()):
            broken = next(
                (
                    f"loss '{name}' is {value.item()}"
                    for name, value in said.items()
                    if not torch.isfinite(value)
                ),
                None,
            )
            raise EdgeclipError(
                where, broken or f"weighted sum of the losses is {loss.item()}", ADVICE
            )
        self._lap("forward")

        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        # The mean over processes, which comes next, is of gradients that each have their own share alone: hence their number.
        share = {
            name: self._own(leaf.grad, counts[name]) * distributed.world_size()
            for name, leaf in leaves.items()
            if leaf.grad is not None
        }
        if once:
            self._backward(own, share)
        else:
            self._second_pass(parts, found, random, share)
            self._set_random(after)
        for name, b in self.towers.named_buffers():
            if (
                name in buffers
            ):  # the forward that was done twice must not count twice in a batch norm's statistics
                b.copy_(buffers[name])
        self._lap("backward")

        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor
        self.scaler.step(optimizer)
        self.scaler.update()
        self._lap("optimizer")
        return {"loss": loss.detach(), **said}

    def _run(self, towers: nn.Module, part: Part) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return towers(part)

    def _second_pass(
        self,
        parts: list[Part],
        found: list[dict[str, Tensor]],
        random: list[tuple[Tensor, ...]],
        share: dict[str, Tensor],
    ) -> None:
        done = dict.fromkeys(share, 0)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            wait = (
                contextlib.nullcontext()
                if last or distributed.world_size() == 1
                else self.parallel_towers.no_sync()
            )
            self._set_random(random[i])
            with wait:
                mine = {
                    name: share[name][done[name] : done[name] + len(found[i][name])]
                    for name in found[i]
                    if name in share
                }
                self._backward(self._run(self.parallel_towers, part), mine)
            done = {
                name: n + (len(found[i][name]) if name in found[i] else 0)
                for name, n in done.items()
            }

    def _backward(self, features: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        names = [name for name in features if name in gradients and features[name].requires_grad]
        if names:
            torch.autograd.backward([features[n] for n in names], [gradients[n] for n in names])

    def _own(self, rows: Tensor, counts: list[int]) -> Tensor:
        start = sum(counts[: distributed.rank()])
        return rows[start : start + counts[distributed.rank()]]

    def _random(self) -> tuple[Tensor, ...]:
        if not self.recomputes:
            return ()
        return (
            torch.get_rng_state(),
            *([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []),
        )

    def _set_random(self, state: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self.device)

    def _lap(self, name: str) -> None:
        if self.device.type == "cuda":  # kernels run behind Python's back
            torch.cuda.synchronize(self.device)
        self.clock.lap(name)


def _parallel(module: nn.Module) -> nn.Module:
    return (
        DistributedDataParallel(module, find_unused_parameters=True)
        if distributed.world_size() > 1
        else module
    )
