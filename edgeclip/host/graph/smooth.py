"""SmoothQuant on the graph: outlier channels behind a LayerNorm move into the weights.

A LayerNorm's scale and bias are divided by s and the rows of every product that reads it are
multiplied by s, channel by channel, so the float function stays what it was while its activations
become easy to quantize per tensor:

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)         (Xiao et al. 2023, equation 4)

It costs nothing at run time, and it is the same rewriting for ONNX Runtime, OpenVINO and TensorRT.
NNCF's own smoothing is switched off: it would insert multiplications where it cannot fold them.
"""

import copy
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.view import GraphView, attribute, probe, run_batches

BATCH = 16
LEAST = 1e-5
"""no magnitude is taken for smaller"""


class _Group(NamedTuple):
    """What is scaled together."""

    norm: onnx.NodeProto
    readers: list[onnx.NodeProto]
    """the products that alone read the norm"""


def smooth(
    model: onnx.ModelProto, images: np.ndarray, alpha: float | None
) -> onnx.ModelProto | None:
    """Return a smoothed copy; for alpha None the model itself.

    images: float32 [n, 3, H, W]. None where no LayerNorm feeds products alone, so that there is
    nothing to move.
    """
    if alpha is None:
        return model
    model = copy.deepcopy(model)
    view = GraphView(model)
    groups = _groups(view)
    if not groups:
        return None
    largest = _largest(model, [group.norm.output[0] for group in groups], images)
    for norm, readers in groups:
        weights = {}
        for reader in readers:
            weights[reader.input[1]] = view.value(reader.input[1])
        scale = _scale(largest[norm.output[0]], list(weights.values()), alpha)
        for i in range(1, len(norm.input)):
            smaller = view.value(norm.input[i]) / scale
            norm.input[i] = _put(model, f"{norm.name}_smooth_{i}", smaller)
        for reader in readers:
            larger = weights[reader.input[1]] * scale[:, None]
            reader.input[1] = _put(model, f"{reader.name}_smooth_weight", larger)
    graph.drop_unread(model)
    return model


def _scale(largest: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """Return the channels' s [C] for magnitudes `largest` [C] and weights [C, out]."""
    by_weight = [np.abs(weight).max(axis=1) for weight in weights]
    of_weights = np.maximum(np.max(by_weight, axis=0), LEAST)
    of_activations = np.maximum(largest, LEAST)
    scale = np.maximum(of_activations**alpha / of_weights ** (1 - alpha), LEAST)
    scale = scale.astype(np.float32)
    scale /= np.exp(np.log(scale).mean())  # only ratios matter: the norm's outputs keep their size
    return scale


def _groups(view: GraphView) -> list[_Group]:
    """Each LayerNorm over the last axis whose readers are all MatMuls with a constant weight."""
    groups = []
    for norm in view.model.graph.node:
        if norm.op_type != "LayerNormalization" or norm.output[0] in view.outputs:
            continue
        if not all(view.is_constant(name) for name in norm.input[1:]):
            continue
        readers = _readers(view, norm.output[0])
        if readers and all(_is_product(view, reader) for reader in readers):
            groups.append(_Group(norm, readers))
    return groups


def _is_product(view: GraphView, node: onnx.NodeProto) -> bool:
    if node.op_type != "MatMul" or view.is_constant(node.input[0]):
        return False
    return view.is_constant(node.input[1])


def _readers(view: GraphView, name: str) -> list[onnx.NodeProto]:
    """Who reads a tensor, through transpositions that leave its last axis the last."""
    readers = []
    for node in view.consumers.get(name, []):
        turn = []
        if node.op_type == "Transpose":
            turn = attribute(node, "perm", [])
        if turn and turn[-1] == len(turn) - 1:
            readers += _readers(view, node.output[0])
        else:
            readers.append(node)
    return readers


def _largest(model: onnx.ModelProto, names: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the largest magnitude a channel [C] over the images, for each tensor [..., C]."""
    best: dict[str, np.ndarray] = {}
    for values in run_batches(probe(model, names), images, BATCH):
        for name, value in values.items():
            largest = np.abs(value).reshape(-1, value.shape[-1]).max(axis=0)
            best[name] = np.maximum(best.get(name, largest), largest)
    return best


def _put(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return name
