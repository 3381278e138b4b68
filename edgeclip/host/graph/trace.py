"""Trace a torch module into an ONNX graph that every runtime here likes: few nodes, dynamic batch.

The legacy exporter is asked for by name: it is several times faster than the new one and honors
opset 17. Multi-head attention's fast path is switched off: it would put an operator of torch's own
into the graph. docs/design/edge.md#12-tracing has the reasons.
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgeclip.errors import WrongGraph
from edgeclip.host.graph.view import GraphView, attribute, probe, run_model

IR_VERSION = 10
"""read by onnxruntime 1.23, the newest for JetPack 6's Python 3.10, and by newer ones"""

PRODUCTS = ("Conv", "Gemm", "MatMul")
STANDARD = ("", "ai.onnx")
"""the two spellings of ONNX's own domain"""


def to_onnx(
    module: nn.Module, example: torch.Tensor, input_name: str, output_name: str, opset: int
) -> onnx.ModelProto:
    """Return the graph of `module`, checked by onnx: one input, one output, a first axis `batch`.

    example: an input [B, ...] of the module. Raises `WrongGraph` where the graph needs an operator
    that is not standard.
    """
    buffer = io.BytesIO()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            # It warns of constant shapes, and of the exporter's own age.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                (example,),
                buffer,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_axes={input_name: {0: "batch"}, output_name: {0: "batch"}},
                opset_version=opset,
                dynamo=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)

    model = onnx.load_from_string(buffer.getvalue())
    model = fold_constants(model)
    merge_pads(model)
    drop_unread(model)
    onnx.checker.check_model(model)
    return model


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what ONNX Runtime's BASIC level leaves of `model`, in standard operators.

    The exporter writes padding as a dozen shape nodes. Raises `WrongGraph` where an operator of
    ONNX Runtime's own is left.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "folded.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(path)

    for node in folded.graph.node:
        if node.domain not in STANDARD:
            raise WrongGraph(
                f"node '{node.name}'",
                f"constant folding made it {node.domain}.{node.op_type}, not standard ONNX",
                "install another version of onnxruntime, and report this",
            )
    standard = [opset for opset in folded.opset_import if opset.domain in STANDARD]
    del folded.opset_import[:]
    folded.opset_import.extend(standard)
    folded.ir_version = IR_VERSION
    return folded


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` to `path` with an IR version that old runtimes read."""
    model.ir_version = min(model.ir_version, IR_VERSION)
    onnx.save(model, path)


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return name to value of every constant, whether it is an initializer or a Constant node."""
    view = GraphView(model)
    return {name: view.value(name) for name in view.constants}


def merge_pads(model: onnx.ModelProto) -> None:
    """Move constant zero padding into the convolution that alone reads it, in place.

    TF-style SAME padding is exported as a Pad node; between quantized layers it would cost a copy
    of the tensor.
    """
    view = GraphView(model)
    for pad in list(model.graph.node):
        if pad.op_type != "Pad" or pad.output[0] in view.outputs:
            continue
        sides = _zero_padding(view, pad)
        readers = view.consumers.get(pad.output[0], [])
        if sides is None or len(readers) != 1 or readers[0].op_type != "Conv":
            continue
        conv = readers[0]
        _add_padding(conv, sides)
        conv.input[0] = pad.input[0]
        model.graph.node.remove(pad)


def _zero_padding(view: GraphView, pad: onnx.NodeProto) -> list[int] | None:
    """Top, left, bottom and right of an image's padding by zeros; None where it is another one."""
    if attribute(pad, "mode", b"constant") != b"constant":
        return None
    if len(pad.input) < 2 or not view.is_constant(pad.input[1]):
        return None
    amounts = view.value(pad.input[1])
    if len(amounts) != 8 or any(amounts[[0, 1, 4, 5]]):
        return None
    sides = amounts[[2, 3, 6, 7]].tolist()
    if len(pad.input) < 3 or not pad.input[2]:
        return sides  # zeros, where no value is given
    if not view.is_constant(pad.input[2]) or view.value(pad.input[2]).item() != 0:
        return None
    return sides


def _add_padding(conv: onnx.NodeProto, sides: list[int]) -> None:
    own = attribute(conv, "pads", [0, 0, 0, 0])
    kept = [a for a in conv.attribute if a.name not in ("pads", "auto_pad")]
    total = np.add(own, sides).tolist()
    del conv.attribute[:]
    conv.attribute.extend([*kept, helper.make_attribute("pads", total)])


def matrix_products(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that int8 is for: Conv, Gemm and MatMul of a constant weight.

    MatMuls of two activations (attention) stay in float: with asymmetric int8 a small ViT lost its
    accuracy, and under ONNX Runtime's full optimization only. Residual additions, norms, softmax
    and GELU are no matrix products.
    """
    view = GraphView(model)
    products = []
    for node in model.graph.node:
        if node.op_type in PRODUCTS and view.is_constant(node.input[1]):
            products.append(node.name)
    return products


def depthwise(model: onnx.ModelProto) -> list[str]:
    """Return the names of the convolutions of several groups with one input channel each."""
    view = GraphView(model)
    names = []
    for node in model.graph.node:
        if node.op_type != "Conv" or attribute(node, "group", 1) <= 1:
            continue
        if view.is_constant(node.input[1]) and view.value(node.input[1]).shape[1] == 1:
            names.append(node.name)
    return names


def macs(model: onnx.ModelProto, products: list[str], x: np.ndarray) -> dict[str, int]:
    """Return the multiply-accumulates of one image in each of `products`.

    x: an input [1, ...] of the model.
    """
    view = GraphView(model)
    wanted = set(products)
    nodes = [node for node in model.graph.node if node.name in wanted]
    outputs = [node.output[0] for node in nodes]
    values = run_model(probe(model, outputs), {model.graph.input[0].name: x})
    count = {}
    for node in nodes:
        size = int(values[node.output[0]].size)
        count[node.name] = size * _macs_per_value(node, view.value(node.input[1]))
    return count


def _macs_per_value(node: onnx.NodeProto, weight: np.ndarray) -> int:
    """Each output value of a Conv costs a filter, each of a matrix product the shared axis."""
    if node.op_type == "Conv":
        return int(np.prod(weight.shape[1:]))
    if attribute(node, "transB", 0):
        return weight.shape[-1]
    return weight.shape[-2]


def after_last_product(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes between the last product and the output: the L2 norm."""
    view = GraphView(model)
    before = (*PRODUCTS, "QuantizeLinear", "DequantizeLinear", "Constant")
    names: list[str] = []
    todo = [output.name for output in model.graph.output]
    while todo:
        node = view.producers.get(todo.pop())
        if node is None or node.op_type in before or node.name in names:
            continue
        names.append(node.name)
        todo += node.input
    return names


def int8_embeddings(model: onnx.ModelProto, rows: int = 256) -> onnx.ModelProto:
    """Return a copy in which each embedding table of at least `rows` rows is int8.

    Every row has a scale of its own, because rare tokens keep small vectors: under one scale for
    all they would lose most of their bits. A row is dequantized after it is gathered, so nothing
    is computed in int8 and a token costs one multiplication more.
    """
    view = GraphView(model)
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    for node in nodes:
        if _reads_table(view, node, rows):
            _gather_int8(copy, node, view.value(node.input[0]))
        else:
            copy.graph.node.append(node)
    drop_unread(copy)
    return copy


def _reads_table(view: GraphView, node: onnx.NodeProto, rows: int) -> bool:
    """Return whether a node gathers rows of a large float table, by indices that vary."""
    if node.op_type != "Gather" or attribute(node, "axis", 0) != 0:
        return False
    if not view.is_constant(node.input[0]) or view.is_constant(node.input[1]):
        return False
    table = view.value(node.input[0])
    return table.ndim == 2 and len(table) >= rows and table.dtype == np.float32


def _gather_int8(model: onnx.ModelProto, gather: onnx.NodeProto, table: np.ndarray) -> None:
    """Append what computes the same rows as `gather` from an int8 `table` [rows, D]."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scale = np.maximum(largest, 1e-12).astype(np.float32) / 127
    rounded = np.round(table / scale).astype(np.int8)
    at = gather.name or gather.output[0]
    ids = gather.input[1]
    model.graph.initializer.append(numpy_helper.from_array(rounded, f"{at}_int8"))
    model.graph.initializer.append(numpy_helper.from_array(scale, f"{at}_row_scale"))
    float32 = onnx.TensorProto.FLOAT
    model.graph.node.extend(
        [
            helper.make_node("Gather", [f"{at}_int8", ids], [f"{at}_rows"], f"{at}_rows"),
            helper.make_node("Cast", [f"{at}_rows"], [f"{at}_float"], f"{at}_float", to=float32),
            helper.make_node("Gather", [f"{at}_row_scale", ids], [f"{at}_scales"], f"{at}_scales"),
            helper.make_node(
                "Mul", [f"{at}_float", f"{at}_scales"], [gather.output[0]], f"{at}_scaled"
            ),
        ]
    )


def drop_unread(model: onnx.ModelProto) -> None:
    """Remove the initializers that surgery has left without a reader, in place."""
    read = {output.name for output in model.graph.output}
    for node in model.graph.node:
        read.update(node.input)
    kept = [stored for stored in model.graph.initializer if stored.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
