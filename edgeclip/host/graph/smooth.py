"""SmoothQuant on the graph, before any runtime sees it: outlier channels behind a LayerNorm move into the weights.

A LayerNorm's scale and bias are divided by s and the rows of every product that reads it are multiplied by s, channel by
channel, so the float function stays what it was while its activations become easy to quantize per tensor:

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)         (Xiao et al. 2023, equation 4)

It costs nothing at run time, and it is the same rewriting for ONNX Runtime, OpenVINO and TensorRT. NNCF's own smoothing
is switched off, since it would insert multiplications where it cannot fold them.
"""

import copy

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeclip.host.graph import trace as graph

BATCH = 16


def smooth(
    model: onnx.ModelProto, images: np.ndarray, alpha: float | None
) -> onnx.ModelProto | None:
    """A smoothed copy (alpha None: the model itself); None where no LayerNorm feeds products alone, so that there is nothing to move."""
    if alpha is None:
        return model
    groups = _groups(model)
    if not groups:
        return None
    model = copy.deepcopy(model)
    largest = _largest(model, [norm.output[0] for norm, _ in groups], images)
    nodes = {n.name: n for n in model.graph.node}
    for norm, readers in groups:
        weights = {r.input[1]: graph.initializers(model)[r.input[1]] for r in readers}
        by_input = np.max([np.abs(w).max(axis=1) for w in weights.values()], axis=0)
        activation = np.maximum(largest[norm.output[0]], 1e-5)
        scale = np.maximum(
            activation**alpha / np.maximum(by_input, 1e-5) ** (1 - alpha), 1e-5
        ).astype(np.float32)
        scale /= np.exp(
            np.log(scale).mean()
        )  # only ratios matter: the norm's outputs keep their size
        own = nodes[norm.name]
        for i in range(1, len(own.input)):
            own.input[i] = _put(
                model, f"{norm.name}_smooth_{i}", graph.initializers(model)[own.input[i]] / scale
            )
        for r in readers:
            nodes[r.name].input[1] = _put(
                model, f"{r.name}_smooth_weight", weights[r.input[1]] * scale[:, None]
            )
    graph.drop_unread(model)
    return model


def _groups(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    """Each LayerNorm over the last axis whose readers are all MatMuls with a constant weight, with those readers."""
    constants = graph.initializers(model)
    outputs = {o.name for o in model.graph.output}
    found = []
    for norm in model.graph.node:
        if (
            norm.op_type != "LayerNormalization"
            or norm.output[0] in outputs
            or any(i not in constants for i in norm.input[1:])
        ):
            continue
        readers = _readers(model, norm.output[0])
        if readers and all(
            n.op_type == "MatMul" and n.input[0] not in constants and n.input[1] in constants
            for n in readers
        ):
            found.append((norm, readers))
    return found


def _readers(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    """Who reads a tensor, through transpositions that leave its last axis the last."""
    found = []
    for n in (n for n in model.graph.node if name in n.input):
        turn = (
            next((list(a.ints) for a in n.attribute if a.name == "perm"), [])
            if n.op_type == "Transpose"
            else []
        )
        found += _readers(model, n.output[0]) if turn and turn[-1] == len(turn) - 1 else [n]
    return found


def _largest(model: onnx.ModelProto, names: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """Of each tensor [..., C] its largest magnitude a channel [C] over the images."""
    import onnxruntime as ort

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names
    )
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    best: dict[str, np.ndarray] = {}
    for at in range(0, len(images), BATCH):
        for name, value in zip(
            names,
            session.run(names, {session.get_inputs()[0].name: images[at : at + BATCH]}),
            strict=True,
        ):
            found = np.abs(value).reshape(-1, value.shape[-1]).max(axis=0)
            best[name] = np.maximum(best[name], found) if name in best else found
    return best


def _put(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return name
