"""Work in more than one process, as torchrun starts them.

Who this one is, and the few things that they tell each other:

    torchrun --nproc-per-node 8 -m edgeclip distill recipes/mobile.yaml

Without torchrun there is one process and nothing here does anything. All processes see the same
file system: what the first one writes, the others read. Transport is torch.distributed's (nccl on
GPUs, gloo on CPUs).
"""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

PATIENCE = datetime.timedelta(days=7)
"""for which one process waits for another (a teacher's cache takes hours); torchrun ends them all
when one dies"""


def pick_device(name: str) -> torch.device:
    """Return the torch device that a recipe's `train.device` names: cpu, cuda, or auto (a GPU where
    there is one).

    Raises `EdgeclipError` where CUDA is asked for and torch cannot use it.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise EdgeclipError(
            "train.device: cuda",
            "this machine has no CUDA device that torch can use",
            "use device: cpu, or auto",
        )
    if name == "auto":
        name = "cuda" if available else "cpu"
    say(f"device: {name}")
    return torch.device(name)


def own(device: torch.device) -> torch.device:
    """Return this process's own device, where torchrun started several on one machine."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:  # hardware: NVIDIA GPU
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def start(device: torch.device) -> torch.device:
    """Join the other processes where torchrun started this one; return this process's own
    device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    device = own(device)
    backend = "gloo"
    if device.type == "cuda":  # hardware: NVIDIA GPU
        torch.cuda.set_device(device)
        backend = "nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=PATIENCE)
    return device


def stop() -> None:
    """Leave the other processes."""
    if _joined():
        dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return how many processes there are: 1 without torchrun."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """Return which of them this one is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0 first, then on the other ranks, which find its output on disk."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def split_sizes(count: int, parts: int | None = None) -> list[int]:
    """Return how many of `count` rows each process has, or each of `parts` parts.

    The first ones have one more where it does not divide.
    """
    n = parts or world_size()
    return [count // n + (i < count % n) for i in range(n)]


def local_slice(count: int) -> slice:
    """Return this process's share of `count` rows."""
    sizes = split_sizes(count)
    start = sum(sizes[: rank()])
    return slice(start, start + sizes[rank()])


def all_gather(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Return [B, ...] of all processes, in the order of ranks, from [b, ...] of each.

    counts: rows of each process, where they differ. No gradient passes.
    """
    if world_size() == 1:
        return rows
    counts = counts or [len(rows)] * world_size()
    missing = rows.new_zeros((max(counts) - len(rows), *rows.shape[1:]))
    padded = torch.cat([rows, missing]).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def all_reduce_max(value: int) -> int:
    """Return the greatest of the values that the processes give."""
    if world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    box = torch.tensor(value, device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)
