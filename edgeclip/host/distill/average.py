"""The mean of a module's weights over the last steps of training (stochastic weight averaging).

Source: Izmailov et al. 2018, arXiv 1803.05407; here with the schedule as it is, over its last part.
"""

import copy

import torch
from torch import nn


class Average(nn.Module):
    """The running mean of a module's tensors; a checkpoint keeps it as it keeps any module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.mean = copy.deepcopy(module).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        """Count the module's tensors in; what is not a float (a batch norm's counter) is copied."""
        self.count += 1
        now = module.state_dict()
        for name, mean in self.mean.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(now[name], 1 / self.count)
            else:
                mean.copy_(now[name])

    def give(self, module: nn.Module) -> None:
        """Make the module the mean; without a step counted in it stays what it is."""
        if self.count:
            module.load_state_dict(self.mean.state_dict())
