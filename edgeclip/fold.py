"""Merge what inference does not need apart: re-parameterisable branches, and batch norms into what precedes them.

The folded model is another model until it is shown to be the same one, so `fold` compares both before it returns.
"""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

MAX_RELATIVE_ERROR = 1e-4


@torch.no_grad()  # not inference mode: a folded student may be trained on
def fold(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """A folded copy of `module` in eval mode; raises `AssertionError` where it does not compute the same.

    example: an input [B, ...] of the module, B at least 1.
    """
    from timm.utils.model import reparameterize_model

    module = module.eval()
    folded = reparameterize_model(copy.deepcopy(module))
    _fold_batch_norms(folded)
    expected, got = module(example), folded(example)
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    assert error < MAX_RELATIVE_ERROR, f"folding changed the output by {error:.1e} of its largest value"
    return folded


def _fold_batch_norms(module: nn.Module) -> None:
    previous: nn.Module | None = None
    for name, child in list(module.named_children()):
        if (
            isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d)
            and isinstance(previous, nn.Conv2d | nn.Linear)
            and previous.weight.shape[0] == child.num_features
        ):
            fuse = fuse_conv_bn_weights if isinstance(previous, nn.Conv2d) else fuse_linear_bn_weights
            previous.weight, previous.bias = fuse(previous.weight, previous.bias, child.running_mean, child.running_var, child.eps, child.weight, child.bias)
            # timm's BatchNormAct2d carries its activation
            setattr(module, name, nn.Sequential(child.drop, child.act) if hasattr(child, "act") else nn.Identity())
        else:
            _fold_batch_norms(child)
        previous = child
