"""Count what a model costs: parameters and multiply-accumulates."""

import torch
from torch import nn


def macs(model: nn.Module, size: int) -> int:
    """Return the multiply-accumulates of one image of `size` x `size` pixels through `model`.

    Convolutions and matrix products are counted: half of what torch's flop counter says.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=device))
    return int(counter.get_total_flops() // 2)


def parameters(model: nn.Module) -> int:
    """Return the number of weights, frozen ones included."""
    return sum(p.numel() for p in model.parameters())
