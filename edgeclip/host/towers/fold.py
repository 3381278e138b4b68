"""Merge what inference does not need apart.

That is re-parameterizable branches, batch norms into what precedes them, and the padding that
TF-style convolutions compute from their input's size, which is a constant here. The folded model is
another model until it is shown to be the same one, so `fold` compares both before it returns.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from edgeclip.errors import WrongGraph

MAX_RELATIVE_ERROR = 1e-4


@torch.no_grad()  # not inference mode: a folded student may be trained on
def fold(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """Return a folded copy of `module` in eval mode.

    example: an input [B, ...] of the module, B at least 1. Raises `WrongGraph` where the copy does
    not compute the same.
    """
    from timm.utils.model import reparameterize_model

    module = module.eval()
    folded = reparameterize_model(module)  # a copy
    _fold_batch_norms(folded)
    _fix_padding(folded, example)
    expected = module(example)
    largest = expected.abs().max().clamp(min=1e-12)
    error = float((folded(example) - expected).abs().max() / largest)
    if not error < MAX_RELATIVE_ERROR:
        raise WrongGraph(
            "fold",
            f"folding changed the output by {error:.1e} of its largest value",
            "report this with the model's name",
        )
    return folded


def _fold_batch_norms(module: nn.Module) -> None:
    previous: nn.Module | None = None
    for name, child in list(module.named_children()):
        if _takes(previous, child):
            _merge(previous, child)
            setattr(module, name, _what_remains(child))
        else:
            _fold_batch_norms(child)
        previous = child


def _takes(previous: nn.Module | None, norm: nn.Module) -> bool:
    """Return whether `norm` is a batch norm that can become a part of `previous`."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
        return False
    if not isinstance(previous, nn.Conv2d | nn.Linear):
        return False
    return bool(previous.weight.shape[0] == norm.num_features)


def _merge(previous: nn.Module | None, norm: nn.Module) -> None:
    fuse = fuse_linear_bn_weights
    if isinstance(previous, nn.Conv2d):
        fuse = fuse_conv_bn_weights
    assert previous is not None
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    previous.weight, previous.bias = fuse(previous.weight, previous.bias, *statistics)


def _what_remains(norm: nn.Module) -> nn.Module:
    """Return what a merged batch norm leaves: timm's BatchNormAct2d carries its activation."""
    if hasattr(norm, "act"):
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


class PaddedConv2d(nn.Conv2d):
    """Zero padding that may differ from side to side: (left, right, top, bottom)."""

    sides: tuple[int, int, int, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(self.sides):
            x = F.pad(x, self.sides)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _fix_padding(module: nn.Module, example: torch.Tensor) -> None:
    """Replace each TF-style convolution by one whose padding is that of `example`'s size."""
    from timm.layers.conv2d_same import Conv2dSame

    sizes: dict[nn.Module, torch.Size] = {}

    def note_size(conv: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sizes[conv] = inputs[0].shape[-2:]

    convs = [m for m in module.modules() if isinstance(m, Conv2dSame)]
    if not convs:
        return
    hooks = [conv.register_forward_pre_hook(note_size) for conv in convs]
    module(example)
    for hook in hooks:
        hook.remove()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in sizes:
                setattr(parent, name, _padded(child, sizes[child]))


def _padded(conv: nn.Module, size: torch.Size) -> PaddedConv2d:
    """Return `conv`, which shares its weights, with the padding of an input of `size` (H, W)."""
    from timm.layers.padding import get_same_padding

    settings = zip(size, conv.kernel_size, conv.stride, conv.dilation, strict=True)
    height, width = (get_same_padding(*values) for values in settings)
    top, left = height // 2, width // 2
    fixed = PaddedConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        0,
        conv.dilation,
        conv.groups,
    )
    fixed.weight = conv.weight
    fixed.bias = conv.bias
    fixed.sides = (left, width - left, top, height - top)
    return fixed.train(conv.training)
