"""Float nodes of an ONNX graph in torch, so that gradients pass through a part of it.

ONNX Runtime has no gradients, and the student's own modules are not the graph that ships: it is
folded, smoothed and optimized. Only operators that the towers of this project leave after folding
are here, batch sizes included; `supports` says whether a node is one of them.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeclip.host.graph.view import attribute

Operator = Callable[..., Tensor | tuple[Tensor, ...]]
"""a node and the values of its inputs (None: left out) to the values of its outputs"""


def supports(node: onnx.NodeProto) -> bool:
    """Return whether `compute` knows the node's operator, of padding that by a constant alone."""
    if node.op_type == "Pad" and attribute(node, "mode", b"constant") != b"constant":
        return False
    return node.op_type in OPERATORS


def compute(node: onnx.NodeProto, values: dict[str, Tensor]) -> None:
    """Add the outputs of a node to `values`, which has its inputs. Raises `KeyError` for others."""
    inputs = [values[name] if name else None for name in node.input]
    outputs = OPERATORS[node.op_type](node, *inputs)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    for name, value in zip(node.output, outputs, strict=True):
        values[name] = value


def _ints(value: Tensor | None) -> list[int]:
    return [] if value is None else [int(v) for v in value.tolist()]


def _conv(node: onnx.NodeProto, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    spatial = weight.ndim - 2
    pads = attribute(node, "pads", [0] * 2 * spatial)
    begin, end = pads[:spatial], pads[spatial:]
    if begin != end:
        # torch counts from the last axis.
        sides = [side for pair in zip(begin[::-1], end[::-1], strict=True) for side in pair]
        x = F.pad(x, sides)
        begin = [0] * spatial
    convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    ones = [1] * spatial
    strides = attribute(node, "strides", ones)
    dilations = attribute(node, "dilations", ones)
    groups = attribute(node, "group", 1)
    result: Tensor = convolve(x, weight, bias, strides, begin, dilations, groups)
    return result


def _gemm(node: onnx.NodeProto, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    if attribute(node, "transA", 0):
        a = a.T
    if attribute(node, "transB", 0):
        b = b.T
    product = attribute(node, "alpha", 1.0) * (a @ b)
    return product if c is None else product + attribute(node, "beta", 1.0) * c


def _clip(
    node: onnx.NodeProto, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _layer_norm(
    node: onnx.NodeProto, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    axis = attribute(node, "axis", -1) % x.ndim
    return F.layer_norm(x, x.shape[axis:], scale, bias, attribute(node, "epsilon", 1e-5))


def _batch_norm(
    node: onnx.NodeProto, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    epsilon = attribute(node, "epsilon", 1e-5)
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


def _gelu(node: onnx.NodeProto, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attribute(node, "approximate", b"none").decode())


def _hard_sigmoid(node: onnx.NodeProto, x: Tensor) -> Tensor:
    return (attribute(node, "alpha", 0.2) * x + attribute(node, "beta", 0.5)).clamp(0, 1)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def reduced(node: onnx.NodeProto, x: Tensor, axes: Tensor | None = None) -> Tensor:
        over = _ints(axes) or attribute(node, "axes") or list(range(x.ndim))
        return function(x, dim=tuple(over), keepdim=bool(attribute(node, "keepdims", 1)))

    return reduced


def _reshape(node: onnx.NodeProto, x: Tensor, shape: Tensor) -> Tensor:
    sizes = _ints(shape)
    if not attribute(node, "allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(node: onnx.NodeProto, x: Tensor) -> Tensor:
    axis = attribute(node, "axis", 1)
    return x.reshape(x.shape[:axis].numel(), -1)


def _transpose(node: onnx.NodeProto, x: Tensor) -> Tensor:
    return x.permute(attribute(node, "perm", list(range(x.ndim))[::-1]))


def _squeeze(node: onnx.NodeProto, x: Tensor, axes: Tensor | None = None) -> Tensor:
    over = _ints(axes) or attribute(node, "axes")
    return x.squeeze() if over is None else x.squeeze(tuple(over))


def _unsqueeze(node: onnx.NodeProto, x: Tensor, axes: Tensor | None = None) -> Tensor:
    over = _ints(axes) or attribute(node, "axes")
    for axis in sorted(a % (x.ndim + len(over)) for a in over):
        x = x.unsqueeze(axis)
    return x


def _slice(
    node: onnx.NodeProto,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = _ints(starts), _ints(ends)
    over = _ints(axes) or list(range(len(first)))
    by = _ints(steps) or [1] * len(first)
    for start, end, axis, step in zip(first, last, over, by, strict=True):
        at = range(*slice(start, end, step).indices(x.shape[axis]))
        x = x.index_select(axis, torch.tensor(at))
    return x


def _split(node: onnx.NodeProto, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = attribute(node, "axis", 0)
    parts = _ints(sizes)
    if parts:
        return x.split(parts, axis)
    count = len(node.output)
    return x.split(-(-x.shape[axis] // count), axis)


def _gather(node: onnx.NodeProto, x: Tensor, index: Tensor) -> Tensor:
    axis = attribute(node, "axis", 0) % x.ndim
    chosen = x.index_select(axis, index.reshape(-1) % x.shape[axis])
    return chosen.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _pad(node: onnx.NodeProto, x: Tensor, pads: Tensor, value: Tensor | None = None) -> Tensor:
    amounts = _ints(pads)
    if attribute(node, "mode", b"constant") != b"constant" or len(amounts) != 2 * x.ndim:
        raise KeyError("Pad")
    pairs = zip(amounts[: x.ndim][::-1], amounts[x.ndim :][::-1], strict=True)
    sides = [side for pair in pairs for side in pair]
    return F.pad(x, sides, value=0.0 if value is None else value.item())


OPERATORS: dict[str, Operator] = {
    "Add": lambda node, a, b: a + b,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda node, *parts: torch.cat(parts, attribute(node, "axis")),
    "Conv": _conv,
    "Div": lambda node, a, b: a / b,
    "Erf": lambda node, x: torch.erf(x),
    "Expand": lambda node, x, shape: x * torch.ones(_ints(shape)),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node, x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda node, x: F.hardswish(x),
    "Identity": lambda node, x: x,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda node, a, b: a @ b,
    "Mul": lambda node, a, b: a * b,
    "Pad": _pad,
    "Pow": lambda node, a, b: a**b,
    "ReduceL2": _reduce(lambda x, dim, keepdim: torch.linalg.vector_norm(x, 2, dim, keepdim)),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": lambda node, x: torch.relu(x),
    "Reshape": _reshape,
    "Sigmoid": lambda node, x: torch.sigmoid(x),
    "Slice": _slice,
    "Softmax": lambda node, x: torch.softmax(x, attribute(node, "axis", -1)),
    "Split": _split,
    "Sqrt": lambda node, x: torch.sqrt(x),
    "Squeeze": _squeeze,
    "Sub": lambda node, a, b: a - b,
    "Tanh": lambda node, x: torch.tanh(x),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
