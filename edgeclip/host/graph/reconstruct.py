"""Learn the rounding: every block of a student answers as in float, whatever the ones before lost.

Block by block (BRECQ, Li et al. 2021) each weight learns whether it is rounded up or down
(AdaRound), each activation its scale (LSQ) and each bias a shift. The input is what the rounded
blocks before give, the target what the float block gives for the float input. QDrop's random half
of the activations in float is left out: at 8 bits it changed nothing.

What comes out is a float graph again, whose weights lie on the integers' grid already. The largest
weight of a channel, which gives its scale, keeps its place, so the quantizer of any runtime finds
the very integers that were learned (NNCF's 7 bits all but some of the largest), and no target needs
a writer of its own.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from edgeclip.host.graph import differentiable
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.blocks import Block, cut, flowing, layer_by_layer, static
from edgeclip.host.graph.fake_quantize import FakeQuantize, LearnedRounding
from edgeclip.host.graph.qdq import Calibrated, quantize, rounded_outputs, with_ranges
from edgeclip.host.graph.view import GraphView, attribute
from edgeclip.progress import say, track

BATCH = 8
LEAST_IMAGES = 64
"""with fewer a block would learn them by heart"""
EXPONENTS = (20.0, 2.0)
"""of AdaRound's regularizer, in the first and the last step"""
FREE = 0.2
"""the part of the steps before the regularizer"""
RATES = {"direction": 2e-2, "scale": 1e-3, "shift": 1e-3}
"""Adam's learning rates"""
LEAST_ERROR = 1e-12
"""of a block whose rounding loses nothing"""


class Form(NamedTuple):
    """How a target rounds."""

    symmetric: bool
    """activations too, as TensorRT's"""
    outputs: bool
    """what most convolutions put out is rounded, as ONNX Runtime's"""
    nncf: bool
    """OpenVINO's: NNCF takes activations' ranges itself, so they are not learned"""
    reduce_range: bool
    """weights of 7 bits"""


class Layer(NamedTuple):
    """What a product learns."""

    weight: LearnedRounding
    bias: str | None
    """the constant that is added to its output; None: it has none of its own"""
    shift: nn.Parameter
    """[channels], of `size`; [0] without a bias"""
    size: float
    """the mean magnitude of the bias"""


class Parts(NamedTuple):
    """What is rounded in a graph."""

    layers: dict[str, Layer]
    """by the name of the product"""
    activations: dict[str, FakeQuantize]
    """by the name of the tensor: what a product reads or puts out"""
    outputs: set[str]
    """tensors that are rounded for whoever reads them"""


def reconstruct(
    calibrated: Calibrated, nodes: list[str], images: np.ndarray, form: Form, steps: int
) -> Calibrated:
    """Return a copy whose weights lie where the integers of `form` answer best.

    nodes: the products in int8. images: float32 [n, 3, H, W], n at least `LEAST_IMAGES`. steps: of
    Adam, for each block. Equal inputs give equal weights. Raises `KeyError` for an operator that
    has no gradient here (`blocks.unsupported`).
    """
    generator = torch.Generator().manual_seed(0)
    view = GraphView(calibrated.model)
    parts = _parts(calibrated, view, nodes, form)
    constants = static(view, flowing(view), images[:BATCH])
    in_float = in_int8 = torch.from_numpy(images[: len(images) // BATCH * BATCH])
    blocks = cut(view, set(nodes))
    large = [block for block in blocks if len(layer_by_layer(block, set(nodes))) > 1]
    if large:
        say(f"reconstruction: {len(large)} of {len(blocks)} blocks are learned layer by layer")
    for block in track(blocks, "reconstruction", len(blocks)):
        for part in layer_by_layer(block, set(nodes)):
            runner = _Runner(part, constants, parts)
            target = runner.all(in_float, rounded=False)
            learned = _learned(runner, parts, form)
            if learned:
                _learn(runner, learned, in_int8, target, steps, generator)
        whole = _Runner(block, constants, parts)
        in_int8 = whole.all(in_int8, rounded=True)
        in_float = whole.all(in_float, rounded=False)
    return _written(calibrated, view, parts, form)


class _Runner:
    """Runs one block, in float or rounded."""

    def __init__(self, block: Block, constants: dict[str, Tensor], parts: Parts) -> None:
        self.block = block
        self.constants = constants
        self.parts = parts
        self.layers = {n.name: parts.layers[n.name] for n in block.nodes if n.name in parts.layers}

    def __call__(self, x: Tensor, rounded: bool, hard: bool = False) -> Tensor:
        """Return the block's output for a batch; hard: weights on the grid."""
        values = {**self.constants, self.block.source: x}
        if rounded:
            values.update(self._biases())
        for node in self.block.nodes:
            if not rounded or node.name not in self.layers:
                differentiable.compute(node, values)
                continue
            inside = {name: values[name] for name in node.input if name}
            inside[node.input[0]] = self.parts.activations[node.input[0]](inside[node.input[0]])
            weight = self.layers[node.name].weight
            settled = not weight.direction.requires_grad
            inside[node.input[1]] = weight(hard or settled)
            differentiable.compute(node, inside)
            output = inside[node.output[0]]
            if node.output[0] in self.parts.outputs:
                output = self.parts.activations[node.output[0]](output)
            values[node.output[0]] = output
        return values[self.block.result]

    def _biases(self) -> dict[str, Tensor]:
        found = {}
        for layer in self.layers.values():
            if layer.bias is not None:
                found[layer.bias] = self.constants[layer.bias] + layer.shift * layer.size
        return found

    @torch.no_grad()
    def all(self, x: Tensor, rounded: bool) -> Tensor:
        """Return the block's outputs for all images [n, ...]."""
        return torch.cat([self(part, rounded, hard=True) for part in x.split(BATCH)])


def _learned(runner: _Runner, parts: Parts, form: Form) -> list[dict[str, Any]]:
    """Return Adam's groups: what this block is the first to use."""
    layers = runner.layers.values()
    tensors = [n.input[0] for n in runner.block.nodes if n.name in runner.layers]
    tensors += [n.output[0] for n in runner.block.nodes if n.output[0] in parts.outputs]
    scales = [parts.activations[name].log_scale for name in dict.fromkeys(tensors)]
    groups = {
        "direction": [layer.weight.direction for layer in layers],
        "shift": [layer.shift for layer in layers],
        "scale": [] if form.nncf else scales,
    }
    learned = []
    for name, parameters in groups.items():
        free = [p for p in parameters if p.requires_grad]
        if free:
            learned.append({"params": free, "lr": RATES[name]})
    return learned


def _learn(
    runner: _Runner,
    learned: list[dict[str, Any]],
    x: Tensor,
    target: Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Fit a block to `target`; one that found nothing better keeps its nearest rounding."""
    parameters = [parameter for group in learned for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    nearest = _error(runner, x, target)
    optimizer = torch.optim.Adam(learned)
    roundings = [layer.weight for layer in runner.layers.values()]
    for step in range(steps):
        at = torch.randint(len(x), (BATCH,), generator=generator)
        loss = ((runner(x[at], rounded=True) - target[at]) ** 2).mean() / nearest
        done = (step / steps - FREE) / (1 - FREE)
        if done > 0:
            first, last = EXPONENTS
            exponent = last + (first - last) * (1 + math.cos(math.pi * done)) / 2
            for rounding in roundings:
                loss = loss + rounding.undecided(exponent)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    better = _error(runner, x, target) < nearest
    for parameter, value in zip(parameters, before, strict=True):
        parameter.requires_grad_(False)  # settled for the blocks behind
        if not better:
            parameter.copy_(value)


def _error(runner: _Runner, x: Tensor, target: Tensor) -> float:
    """Return the mean squared error of a block on all images, rounded hard."""
    return max(float(((runner.all(x, rounded=True) - target) ** 2).mean()), LEAST_ERROR)


# --- a graph and what it learns


def _parts(calibrated: Calibrated, view: GraphView, nodes: list[str], form: Form) -> Parts:
    in_int8 = quantize(
        calibrated,
        nodes,
        activations="int8",
        for_tensorrt=form.symmetric,
        reduce_range=form.reduce_range,
    )
    rounded = GraphView(in_int8)
    top = 127.0
    if form.reduce_range:
        top = 63.5 if form.nncf else 64.0  # NNCF's steps are twice those of 8 bits
    behind = rounded_outputs(calibrated.model, nodes) if form.outputs else set()
    parts = Parts({}, {}, set())
    for name in nodes:
        node = view.nodes[name]
        scale = torch.from_numpy(rounded.value(f"{node.input[1]}_scale").copy())
        if form.nncf and form.reduce_range:
            scale = scale * 64 / top
        parts.layers[name] = _layer(view, node, scale, top)
        tensors = [node.input[0]]
        if name in behind:
            tensors.append(node.output[0])
            parts.outputs.add(node.output[0])
        for tensor in tensors:
            low, high = (np.asarray(v).item() for v in calibrated.ranges[tensor].range_value)
            parts.activations.setdefault(tensor, FakeQuantize(low, high, form.symmetric))
    return parts


def _layer(view: GraphView, node: onnx.NodeProto, scale: Tensor, top: float) -> Layer:
    weight = torch.from_numpy(view.value(node.input[1]).copy())
    shape = [1] * weight.ndim
    shape[0 if node.op_type == "Conv" or attribute(node, "transB", 0) else -1] = -1
    rounding = LearnedRounding(weight, scale.reshape(shape), top)
    bias = _bias(view, node)
    if bias is None:
        return Layer(rounding, None, nn.Parameter(torch.zeros(0)), 0.0)
    value = view.value(bias)
    size = max(float(np.abs(value).mean()), 1e-3)
    return Layer(rounding, bias, nn.Parameter(torch.zeros(value.shape)), size)


def _bias(view: GraphView, node: onnx.NodeProto) -> str | None:
    """Return the constant that is added to each output channel and to nothing else."""
    if len(node.input) > 2:
        name = node.input[2]
        return name if view.is_constant(name) and len(view.consumers[name]) == 1 else None
    readers = view.consumers.get(node.output[0], [])
    if node.op_type == "Conv" or len(readers) != 1 or readers[0].op_type != "Add":
        return None
    for name in readers[0].input:
        if view.is_constant(name) and view.value(name).ndim == 1:
            return name if len(view.consumers[name]) == 1 else None
    return None


def _written(calibrated: Calibrated, view: GraphView, parts: Parts, form: Form) -> Calibrated:
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    nodes = GraphView(model).nodes
    readers = {name: view.consumers[name][0].name for name in view.consumers}

    def store(value: Tensor, name: str) -> str:
        array = value.detach().numpy().astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    for name, layer in parts.layers.items():
        # Of its own: equal weights may be one constant.
        nodes[name].input[1] = store(layer.weight(hard=True), f"{name}_weight_learned")
        if layer.bias is not None:
            reader = nodes[readers[layer.bias]]
            at = list(reader.input).index(layer.bias)
            bias = torch.from_numpy(view.value(layer.bias).copy()) + layer.shift * layer.size
            reader.input[at] = store(bias, f"{name}_bias_learned")
    graph.drop_unread(model)
    ranges = calibrated.ranges
    if not form.nncf:
        found = {tensor: rounding.range() for tensor, rounding in parts.activations.items()}
        ranges = with_ranges(ranges, found)
    return Calibrated(model, ranges)
