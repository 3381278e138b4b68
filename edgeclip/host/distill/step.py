"""One step of the optimizer, over every process and every micro-batch.

The towers see images and texts one by one, so each process runs its own share through them, in
`accumulate` micro-batches. Everything behind the towers (projector, EduAttention, losses) sees the
whole batch: features are gathered, every process computes the same loss of all of them, and its
gradient by the features goes back into the towers, a share and a micro-batch at a time:

    1  features of all micro-batches  with their graph when there is one, without it when several
    2  gather, loss, its gradient     with respect to features and new layers; the same everywhere
    3  towers' backward               of several: forward again, now with the graph, with the same
                                      dropout and the same masks

So a batch in micro-batches, on several processes, is the large batch, for every loss: negatives,
IFAlign's statistics, the projector's batch norm and CLIP-KD's gradient loss included. What stays a
micro-batch's own is what lies inside the towers: their batch norms. The second pass costs one more
forward (GradCache, arXiv 2101.06983). Gradients of the towers are averaged by torch's
DistributedDataParallel.

What fails first as the batch grows is 2: every process holds the [B, B] similarities of the
contrastive losses.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from edgeclip.errors import EdgeclipError
from edgeclip.host import distributed
from edgeclip.host.distill import masking
from edgeclip.host.distill.batch import Batch
from edgeclip.host.distill.targets import Known
from edgeclip.host.recipe import MaskedFeature, Train
from edgeclip.host.student import EduAttentionHead
from edgeclip.progress import Clock

Metrics = dict[str, Tensor]
"""each loss before its weight, by its name in the log"""
Objective = Callable[[Batch, Tensor | None], tuple[Tensor, Metrics]]
"""of a batch and of the features of its class prompts: the loss, and what the log says of it"""
Features = dict[str, Tensor]
"""a tower's features [rows, T] by what they are of: image, masked, text, prompts"""
RandomState = tuple[Tensor, ...]
"""of torch's generators: the CPU's, then the GPU's where there is one"""
ADVICE = (
    "lower the learning rate or look for broken features"
    " (the student of the last good epoch, if there is one, is the run's student.partial)"
)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class MicroBatch(NamedTuple):
    """What the towers see at once; what is None is not run."""

    pixels: Tensor | None = None
    """[b, 3, H, W]"""
    captions: Int[Tensor, "b L"] | None = None
    prompts: Int[Tensor, "p L"] | None = None
    hide: MaskedFeature | None = None


class Work(NamedTuple):
    """One step's batch, ready to be run."""

    micro_batches: list[MicroBatch]
    """of this process; empty: the features are known"""
    features: Features
    """of the whole batch, where they are known without the towers"""
    known: Known
    """the teacher's half of the whole batch"""
    counts: dict[str, list[int]]
    """rows of each process, by feature"""
    objective: Objective
    where: str
    """names the step in an error"""


class Towers(nn.Module):
    """The student's towers, run on a micro-batch."""

    def __init__(self, image: nn.Module, text: nn.Module | None) -> None:
        super().__init__()
        self.image = image
        self.text = text

    def forward(self, batch: MicroBatch) -> Features:
        """Return float32 features, whatever precision the towers ran in."""
        features: Features = {}
        if batch.pixels is not None:
            if batch.hide:
                features["masked"] = masking.forward(self.image, batch.pixels, batch.hide)
            features["image"] = self.image(batch.pixels)
        if batch.captions is not None and self.text is not None:
            features["text"] = self.text(batch.captions)
            if batch.prompts is not None and len(batch.prompts):
                features["prompts"] = self.text(batch.prompts)
        return {name: rows.float() for name, rows in features.items()}


class NewLayers(nn.Module):
    """From the towers' features of a whole batch to its loss."""

    def __init__(
        self,
        projector: nn.Module,
        head: EduAttentionHead | None,
        learned: nn.ParameterDict,
        masked: bool,
    ) -> None:
        super().__init__()
        self.projector = projector
        self.head = head
        self.learned = learned
        self.masked = masked

    def forward(
        self, features: Features, known: Known, objective: Objective
    ) -> tuple[Tensor, Metrics]:
        """Return the loss and its terms."""
        raw = self.projector(features["image"])
        v = F.normalize(raw, dim=-1)
        batch = Batch(
            image_features=v,
            head_features=self._attended(v, raw, known),
            raw_features=raw,
            masked_features=self._masked(features, v),
            text_features=features.get("text"),
            learned=self.learned,
            **known._asdict(),
        )
        return objective(batch, features.get("prompts"))

    def _attended(self, v: Tensor, raw: Tensor, known: Known) -> Tensor:
        """Return [B, D] the features after EduAttention; v itself without it."""
        if self.head is None:
            return v
        query = None
        if self.head.spec.query == "raw":
            query = raw
        residual = None
        if self.head.spec.residual == "teacher":
            residual = known.teacher_features
        return self.head(v, known.class_features, query, residual)

    def _masked(self, features: Features, v: Tensor) -> Tensor | None:
        """Return [B, D] the features of the masked images; None where no loss needs them."""
        if not self.masked:
            return None
        if "masked" not in features:  # no pixels to hide in the projector's steps: MFD is FD there
            return v
        return F.normalize(self.projector(features["masked"]), dim=-1)


class Step:
    """Train `towers` and `layers` in place, a batch a call."""

    def __init__(
        self, towers: Towers, layers: NewLayers, spec: Train, device: torch.device, clock: Clock
    ) -> None:
        self.towers = towers
        self.device = device
        self.clock = clock
        self.recomputes = spec.accumulate > 1 or spec.gradient_checkpointing
        self.max_grad_norm = spec.max_grad_norm
        self.dtype = PRECISIONS[spec.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
        self.parallel_towers = _parallel(towers)
        self.parallel_layers = _parallel(layers)

    def __call__(self, optimizer: torch.optim.Optimizer, factor: float, work: Work) -> Metrics:
        """Return the loss of the whole batch and each of its terms before its weight.

        factor: of the learning rate. Raises `EdgeclipError` for a loss that is not finite.
        """
        once = len(work.micro_batches) <= 1
        features, random = self._first_pass(work.micro_batches, once)
        buffers = self._buffers()
        after = self._random()
        own = _joined(features)

        leaves: Features = {}
        for name, rows in own.items():
            gathered = distributed.all_gather(rows.detach(), work.counts[name])
            leaves[name] = gathered.requires_grad_()
        loss, metrics = self.parallel_layers(work.features | leaves, work.known, work.objective)
        _refuse_infinite(loss, metrics, work.where)
        self._lap("forward")

        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        gradients = self._local_gradients(leaves, work.counts)
        if once:
            self._backward(own, gradients)
        else:
            self._second_pass(work.micro_batches, features, random, gradients)
            self._set_random(after)
        for name, buffer in self.towers.named_buffers():
            # A forward that was done twice must not count twice in a batch norm's statistics.
            if name in buffers:
                buffer.copy_(buffers[name])
        self._lap("backward")

        if self.max_grad_norm is not None:
            self._clip(optimizer, self.max_grad_norm)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor
        self.scaler.step(optimizer)
        self.scaler.update()
        self._lap("optimizer")
        return {"loss": loss.detach(), **metrics}

    def _first_pass(
        self, micro_batches: list[MicroBatch], once: bool
    ) -> tuple[list[Features], list[RandomState]]:
        """Return the features of each micro-batch and the random state before it."""
        towers: nn.Module = self.towers
        context: contextlib.AbstractContextManager[None] = torch.no_grad()
        if once:
            towers = self.parallel_towers
            context = contextlib.nullcontext()
        features: list[Features] = []
        random: list[RandomState] = []
        with context:
            for micro_batch in micro_batches:
                random.append(self._random())
                features.append(self._run(towers, micro_batch))
        return features, random

    def _run(self, towers: nn.Module, micro_batch: MicroBatch) -> Features:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return towers(micro_batch)

    def _local_gradients(self, leaves: Features, counts: dict[str, list[int]]) -> Features:
        """Return the gradients of this process's rows.

        The mean over processes, which comes next, is of gradients that each have their own share
        alone: hence their number as a factor.
        """
        gradients: Features = {}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                start = sum(counts[name][: distributed.rank()])
                own = leaf.grad[start : start + counts[name][distributed.rank()]]
                gradients[name] = own * distributed.world_size()
        return gradients

    def _second_pass(
        self,
        micro_batches: list[MicroBatch],
        features: list[Features],
        random: list[RandomState],
        gradients: Features,
    ) -> None:
        """Run the towers again, now with their graph, and send the gradients back into them."""
        done = dict.fromkeys(gradients, 0)
        for i, micro_batch in enumerate(micro_batches):
            own: Features = {}
            for name in features[i]:
                if name in gradients:
                    start = done[name]
                    done[name] += len(features[i][name])
                    own[name] = gradients[name][start : done[name]]
            self._set_random(random[i])
            with self._synchronized(last=i == len(micro_batches) - 1):
                self._backward(self._run(self.parallel_towers, micro_batch), own)

    def _synchronized(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context in which gradients are averaged over processes for the last one only."""
        if last or distributed.world_size() == 1:
            return contextlib.nullcontext()
        return self.parallel_towers.no_sync()

    def _backward(self, features: Features, gradients: Features) -> None:
        names = [name for name in features if name in gradients and features[name].requires_grad]
        if names:
            torch.autograd.backward([features[n] for n in names], [gradients[n] for n in names])

    def _clip(self, optimizer: torch.optim.Optimizer, norm: float) -> None:
        """Shorten the gradient of all weights together to `norm`, without fp16's loss scale."""
        self.scaler.unscale_(optimizer)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(weights, norm)

    def _buffers(self) -> Features:
        """Return copies of the towers' buffers where a second pass would change them twice."""
        if not self.recomputes:
            return {}
        return {name: buffer.clone() for name, buffer in self.towers.named_buffers()}

    def _random(self) -> RandomState:
        if not self.recomputes:
            return ()
        if self.device.type == "cuda":  # hardware: NVIDIA GPU
            return torch.get_rng_state(), torch.cuda.get_rng_state(self.device)
        return (torch.get_rng_state(),)

    def _set_random(self, state: RandomState) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self.device)

    def _lap(self, name: str) -> None:
        if self.device.type == "cuda":  # kernels run behind Python's back
            torch.cuda.synchronize(self.device)
        self.clock.lap(name)


def _joined(features: list[Features]) -> Features:
    """Return the features of all micro-batches as one."""
    if not features:
        return {}
    if len(features) == 1:
        return features[0]
    joined: Features = {}
    for name in features[0]:
        joined[name] = torch.cat([rows[name] for rows in features if name in rows])
    return joined


def _refuse_infinite(loss: Tensor, metrics: Metrics, where: str) -> None:
    if math.isfinite(loss.item()):
        return
    for name, value in metrics.items():
        if not torch.isfinite(value):
            raise EdgeclipError(where, f"loss '{name}' is {value.item()}", ADVICE)
    raise EdgeclipError(where, f"weighted sum of the losses is {loss.item()}", ADVICE)


def _parallel(module: nn.Module) -> nn.Module:
    """Return `module`, its gradients averaged over processes where there are several."""
    if distributed.world_size() == 1:
        return module
    return DistributedDataParallel(module, find_unused_parameters=True)
