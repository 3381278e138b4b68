"""More than one process, as torchrun starts them: who this one is, and the few things that they
tell each other.

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
    """The device that is this process's own, where torchrun started several on one machine."""
    return (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.type == "cuda" and "LOCAL_RANK" in os.environ
        else device
    )


def start(device: torch.device) -> torch.device:
    """Joins the other processes where torchrun started this one; returns the device that is this
    process's own."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    device = own(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Until all are here."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """What is inside is done by the first process, and then by the others, who find it done on
    disk."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def split_sizes(count: int, of: int | None = None) -> list[int]:
    """How many of `count` rows each process has (the first ones have one more where it does not
    divide); of: other parts than these."""
    n = of or world_size()
    return [count // n + (i < count % n) for i in range(n)]


def local_slice(count: int) -> slice:
    """This process's share of `count` rows."""
    shares = split_sizes(count)
    start = sum(shares[: rank()])
    return slice(start, start + shares[rank()])


def all_gather(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """[b, ...] of each process to [B, ...] of all, in the order of ranks, everywhere; no gradient
    passes.

    counts: rows of each process, where they are not as many everywhere.
    """
    if world_size() == 1:
        return rows
    counts = counts or [len(rows)] * world_size()
    longest = max(counts)
    padded = torch.cat([rows, rows.new_zeros((longest - len(rows), *rows.shape[1:]))]).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def all_reduce_max(value: int) -> int:
    """The greatest of the values that the processes give."""
    if world_size() == 1:
        return value
    box = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)
