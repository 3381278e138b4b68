"""Merge what inference does not need apart: re-parameterizable branches, batch norms into what
precedes them, and the padding that TF-style convolutions compute from their input's size, which is
a constant here.

The folded model is another model until it is shown to be the same one, so `fold` compares both
before it returns.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

MAX_RELATIVE_ERROR = 1e-4


@torch.no_grad()  # not inference mode: a folded student may be trained on
def fold(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """A folded copy of `module` in eval mode; raises `AssertionError` where it does not compute the
    same.

    example: an input [B, ...] of the module, B at least 1.
    """
    from timm.utils.model import reparameterize_model

    module = module.eval()
    folded = reparameterize_model(module)  # a copy
    _fold_batch_norms(folded)
    _fix_padding(folded, example)
    expected, got = module(example), folded(example)
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    assert error < MAX_RELATIVE_ERROR, (
        f"folding changed the output by {error:.1e} of its largest value"
    )
    return folded


def _fold_batch_norms(module: nn.Module) -> None:
    previous: nn.Module | None = None
    for name, child in list(module.named_children()):
        if (
            isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d)
            and isinstance(previous, nn.Conv2d | nn.Linear)
            and previous.weight.shape[0] == child.num_features
        ):
            fuse = (
                fuse_conv_bn_weights if isinstance(previous, nn.Conv2d) else fuse_linear_bn_weights
            )
            previous.weight, previous.bias = fuse(
                previous.weight,
                previous.bias,
                child.running_mean,
                child.running_var,
                child.eps,
                child.weight,
                child.bias,
            )
            # timm's BatchNormAct2d carries its activation
            setattr(
                module,
                name,
                nn.Sequential(child.drop, child.act) if hasattr(child, "act") else nn.Identity(),
            )
        else:
            _fold_batch_norms(child)
        previous = child


class PaddedConv2d(nn.Conv2d):
    """Zero padding that may differ from side to side: (left, right, top, bottom)."""

    sides: tuple[int, int, int, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, self.sides) if any(self.sides) else x
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _fix_padding(module: nn.Module, example: torch.Tensor) -> None:
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.padding import get_same_padding

    sizes: dict[nn.Module, torch.Size] = {}
    convs = [m for m in module.modules() if isinstance(m, Conv2dSame)]
    hooks = [
        m.register_forward_pre_hook(lambda m, x: sizes.update({m: x[0].shape[-2:]})) for m in convs
    ]
    if convs:
        module(example)
    for hook in hooks:
        hook.remove()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in sizes:
                both = [
                    get_same_padding(n, k, s, d)
                    for n, k, s, d in zip(
                        sizes[child], child.kernel_size, child.stride, child.dilation, strict=True
                    )
                ]
                (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in both)
                fixed = PaddedConv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size,
                    child.stride,
                    0,
                    child.dilation,
                    child.groups,
                )
                fixed.weight, fixed.bias, fixed.sides = (
                    child.weight,
                    child.bias,
                    (left, right, top, bottom),
                )
                setattr(parent, name, fixed.train(child.training))
