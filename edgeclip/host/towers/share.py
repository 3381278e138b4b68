"""Share blocks: n unique transformer blocks stacked m times.

Pea-KD's shuffled parameter sharing (arXiv 2009.14822): the depth of n * m blocks at the weights of
n. When shuffled, query and key projections change places in every repeated pass, so that the passes
differ: their attention logits are each other's transpose. (What Pea-KD itself shuffles was not
read; swapping query and key is the common reading.)

`fold` unrolls them before a graph is traced. The unrolled passes read one copy of every weight;
only the exchanged query-key-value weights are a second copy, 3 W^2 + 3 W numbers a block, which all
repeated passes share. ViT-Tiny's graph is 22.0 MB with 12 blocks of its own, 11.3 MB with 6 passed
twice, 14.0 MB when shuffled (int8: 5.8, 3.1, 3.7 MB).
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.towers.inherit import vision_transformer


class SharedBlocks(nn.Module):
    """In the place of a ViT's list of blocks: tokens [B, L, W] to tokens [B, L, W]."""

    def __init__(self, unique: list[nn.Module], times: int, shuffle: bool):
        super().__init__()
        self.unique = nn.ModuleList(unique)
        self.times = times
        self.shuffle = shuffle

    def __len__(self) -> int:
        return len(self.unique) * self.times

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        for repeat in range(self.times):
            for block in self.unique:
                if repeat and self.shuffle:
                    yield partial(swapped, block)
                else:
                    yield block

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self:
            tokens = block(tokens)
        return tokens

    def fuse(self) -> nn.Sequential:
        """Return the same passes as plain blocks, which a tracer takes.

        timm's re-parameterization, and so `fold`, asks for it.
        """
        repeated = list(self.unique)
        if self.shuffle:
            repeated = [_exchanged(block) for block in self.unique]
        return nn.Sequential(*self.unique, *repeated * (self.times - 1))


def swapped(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Return the block's answer with the roles of its query and key projections exchanged."""
    out: Tensor = torch.func.functional_call(block, _exchanged_weights(block), args, kwargs)
    return out


def _exchanged_weights(block: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, value in block.named_parameters():
        if name in ("attn.qkv.weight", "attn.qkv.bias", "attn.in_proj_weight", "attn.in_proj_bias"):
            query, key, v = value.chunk(3)
            state[name] = torch.cat([key, query, v])
        elif name.startswith(("attn.q_norm.", "attn.k_norm.")):  # a projection's norm goes with it
            _, norm, rest = name.split(".", 2)
            other = {"q_norm": "k_norm", "k_norm": "q_norm"}[norm]
            state[name] = block.get_parameter(f"attn.{other}.{rest}")
    return state


def _exchanged(block: nn.Module) -> nn.Module:
    """Return a block that shares every weight with `block` but those that are exchanged."""
    own = {id(p): p for p in block.parameters()}
    other = copy.deepcopy(block, own)
    for name, value in _exchanged_weights(block).items():
        module, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(module), leaf, nn.Parameter(value.detach().clone()))
    return other


def share(tower: nn.Module, spec: R.Share) -> None:
    """Put shared blocks into a ViT tower, in place.

    Block i is the tower's block i * (depth // blocks). Raises `EdgeclipError` for a tower that is
    no ViT or has fewer blocks than are asked for.
    """
    vit = vision_transformer(tower, "student.tower")
    own = list(vit.module.get_submodule(vit.blocks).children())
    if len(own) < spec.blocks:
        raise EdgeclipError(
            "student.share.blocks",
            f"is {spec.blocks}, and student.tower has {len(own)} blocks",
            "ask for fewer",
        )
    stride = len(own) // spec.blocks
    unique = own[: stride * spec.blocks : stride]
    vit.module.set_submodule(vit.blocks, SharedBlocks(unique, spec.times, spec.shuffle))
