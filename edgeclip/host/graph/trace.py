"""torch module to ONNX graph, in the form that every runtime here likes: few nodes, dynamic batch, old IR version.

The legacy exporter is asked for by name: it is several times faster than the new one and honors opset 17. Multi-head
attention's fast path is switched off, it would leak a torch-only operator into the graph.
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

IR_VERSION = 10
"""onnxruntime 1.23, the newest for JetPack 6's Python 3.10, and newer read it"""

PRODUCTS = ("Conv", "Gemm", "MatMul")


def to_onnx(
    module: nn.Module, example: torch.Tensor, input_name: str, output_name: str, opset: int
) -> onnx.ModelProto:
    """One input, one output, both with a dynamic first axis named `batch`; checked by onnx."""
    buffer = io.BytesIO()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter(
                "ignore"
            )  # tracer warnings of constant shapes, and the exporter's own age
            torch.onnx.export(
                module.eval(), (example,), buffer, input_names=[input_name], output_names=[output_name],
                dynamic_axes={input_name: {0: "batch"}, output_name: {0: "batch"}}, opset_version=opset, dynamo=False,
            )  # fmt: skip
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    model = onnx.load_from_string(buffer.getvalue())
    model = fold_constants(model)
    merge_pads(model)
    drop_unread(model)
    onnx.checker.check_model(model)
    return model


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX Runtime's BASIC level leaves, in standard operators: the exporter keeps padding as a dozen shape nodes."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "folded.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(path)
    standard = [o for o in folded.opset_import if o.domain in ("", "ai.onnx")]
    assert all(n.domain in ("", "ai.onnx") for n in folded.graph.node)
    del folded.opset_import[:]
    folded.opset_import.extend(standard)
    folded.ir_version = IR_VERSION
    return folded


def save(model: onnx.ModelProto, path: Path) -> None:
    model.ir_version = min(model.ir_version, IR_VERSION)
    onnx.save(model, path)


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Name to value of every constant, whether it is an initializer or a Constant node."""
    found = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = next(
                numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"
            )
    return found


def merge_pads(model: onnx.ModelProto) -> None:
    """Moves constant zero padding into the convolution that alone reads it.

    TF-style SAME padding is exported as a Pad node; between quantized layers it would cost a copy of the tensor.
    """
    constants = initializers(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {o.name for o in model.graph.output}
    for pad in [n for n in model.graph.node if n.op_type == "Pad"]:
        mode = next((a.s.decode() for a in pad.attribute if a.name == "mode"), "constant")
        amounts = constants.get(pad.input[1]) if len(pad.input) > 1 else None
        value = constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
        after = readers.get(pad.output[0], [])
        if (
            mode != "constant"
            or amounts is None
            or len(amounts) != 8
            or value is None
            or value.item() != 0
        ):
            continue
        if (
            pad.output[0] in outputs
            or any(amounts[[0, 1, 4, 5]])
            or len(after) != 1
            or after[0].op_type != "Conv"
        ):
            continue
        conv = after[0]
        own = next((list(a.ints) for a in conv.attribute if a.name == "pads"), [0, 0, 0, 0])
        kept = [a for a in conv.attribute if a.name not in ("pads", "auto_pad")]
        del conv.attribute[:]
        conv.attribute.extend(
            [
                *kept,
                helper.make_attribute(
                    "pads", [int(a + b) for a, b in zip(own, amounts[[2, 3, 6, 7]], strict=True)]
                ),
            ]
        )
        conv.input[0] = pad.input[0]
        model.graph.node.remove(pad)


def matrix_products(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that int8 is for: Conv, Gemm and MatMul with a constant weight.

    MatMuls of two activations (attention) stay in float: with asymmetric int8 a small ViT lost its accuracy under ONNX
    Runtime's full optimization only. Residual adds, norms, softmax and GELU are no matrix products.
    """
    constants = initializers(model)
    return [n.name for n in model.graph.node if n.op_type in PRODUCTS and n.input[1] in constants]


def depthwise(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions with one input channel a group, more than one group."""
    constants = initializers(model)
    return [
        n.name
        for n in model.graph.node
        if n.op_type == "Conv"
        and n.input[1] in constants
        and constants[n.input[1]].shape[1] == 1
        and any(a.name == "group" and a.i > 1 for a in n.attribute)
    ]


def macs(model: onnx.ModelProto, products: list[str], x: np.ndarray) -> dict[str, int]:
    """Multiply-accumulates of one image in each of `products`; x: an input [1, ...]."""
    import onnxruntime as ort

    constants = initializers(model)
    nodes = {n.name: n for n in model.graph.node if n.name in set(products)}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    names = [n.output[0] for n in nodes.values()]
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    out = session.run(names, {session.get_inputs()[0].name: x})
    count = {}
    for (name, node), y in zip(nodes.items(), out, strict=True):
        weight = constants[node.input[1]]
        # Each output value of a Conv costs a filter, each of a matrix product the shared axis.
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        per_output = (
            int(np.prod(weight.shape[1:]))
            if node.op_type == "Conv"
            else weight.shape[-1 if transposed else -2]
        )
        count[name] = int(y.size) * per_output
    return count


def after_last_product(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes between the last product and the output: the L2 norm."""
    makers = {o: n for n in model.graph.node for o in n.output}
    found, todo = [], [o.name for o in model.graph.output]
    while todo:
        node = makers.get(todo.pop())
        if (
            node is not None
            and node.op_type not in (*PRODUCTS, "QuantizeLinear", "DequantizeLinear", "Constant")
            and node.name not in found
        ):
            found.append(node.name)
            todo += node.input
    return found


def int8_embeddings(model: onnx.ModelProto, rows: int = 256) -> onnx.ModelProto:
    """A copy in which every embedding table of at least `rows` rows is int8 with a scale for each row.

    A row is dequantized after it is gathered, so nothing is computed in int8 and a token costs one multiplication more.
    Per row, because rare tokens keep small vectors: under one scale for all they would lose most of their bits.
    """
    constants = initializers(model)
    model = onnx.ModelProto.FromString(model.SerializeToString())
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for n in nodes:
        table = constants.get(n.input[0]) if n.op_type == "Gather" else None
        axis = next((a.i for a in n.attribute if a.name == "axis"), 0)
        if (
            table is None
            or table.ndim != 2
            or axis != 0
            or len(table) < rows
            or table.dtype != np.float32
            or n.input[1] in constants
        ):
            model.graph.node.append(n)
            continue
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127
        at = n.name or n.output[0]
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.round(table / scale).astype(np.int8), f"{at}_int8"),
                numpy_helper.from_array(scale, f"{at}_row_scale"),
            ]
        )
        model.graph.node.extend(
            [
                helper.make_node(
                    "Gather", [f"{at}_int8", n.input[1]], [f"{at}_rows"], f"{at}_rows"
                ),
                helper.make_node(
                    "Cast",
                    [f"{at}_rows"],
                    [f"{at}_float"],
                    f"{at}_float",
                    to=onnx.TensorProto.FLOAT,
                ),
                helper.make_node(
                    "Gather", [f"{at}_row_scale", n.input[1]], [f"{at}_scales"], f"{at}_scales"
                ),
                helper.make_node(
                    "Mul", [f"{at}_float", f"{at}_scales"], [n.output[0]], f"{at}_scaled"
                ),
            ]
        )
    drop_unread(model)
    return model


def drop_unread(model: onnx.ModelProto) -> None:
    """Takes out the constants that surgery has left without a reader."""
    read = {i for n in model.graph.node for i in n.input} | {o.name for o in model.graph.output}
    kept = [i for i in model.graph.initializer if i.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
