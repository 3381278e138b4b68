"""Say whether TensorRT would take a graph (`edgeclip lint FILE --target T`).

Each refusal is named with its node and its cure. There are two readings: the rules below, which
need no TensorRT and know the cure, and TensorRT-RTX's own parser and builder where the extra `lint`
is installed (no GPU needed). Passing both is necessary, not sufficient, and says nothing of
numerics or speed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from msgspec.structs import replace

from edgeclip.device.manifest import LintRecord
from edgeclip.device.runtime import tensorrt_build
from edgeclip.device.target import Target
from edgeclip.errors import EdgeclipError
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.view import GraphView, attribute

LOWEST_OPSET = 17
HIGHEST_OPSET = 20
INTEGER = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "DynamicQuantizeLinear")
SYMMETRIC = "quantize symmetrically to int8 (a tensorrt target does)"


class Refusal(NamedTuple):
    """One reason why TensorRT would not take a graph."""

    node: str
    """the node's name, or "graph\""""
    what: str
    cure: str


def lint(path: Path, target: Target, batch: tuple[int, int, int] = (1, 4, 8)) -> LintRecord:
    """Return what the rules, and TensorRT-RTX where it is installed, say of the graph at `path`.

    batch: least, usual and largest batch size of the engine that is built. Raises `EdgeclipError`
    for a target of another runtime and for a file that is no ONNX graph.
    """
    if target.runtime != "tensorrt":
        raise EdgeclipError(
            "--target",
            f"lint checks graphs for TensorRT, this target is for {target.runtime}",
            "name a tensorrt target",
        )
    model = _load(path)
    errors = [f"node '{node}': {what}; {cure}" for node, what, cure in rules(model)]
    by_rules = LintRecord(checked_by=None, parses=None, builds=None, errors=errors)
    try:
        trt = tensorrt_build.module(("tensorrt_rtx",))
    except tensorrt_build.BuildError:
        return by_rules
    return _ask_tensorrt(trt, path, batch, model, by_rules)


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except Exception as e:  # protobuf's own error type
        raise EdgeclipError(
            path, f"not a readable ONNX file ({str(e)[:100]})", "give an .onnx file"
        ) from None


def _ask_tensorrt(
    trt: Any, path: Path, batch: tuple[int, int, int], model: onnx.ModelProto, record: LintRecord
) -> LintRecord:
    """Return the record with what TensorRT-RTX's parser says, and its builder where it parses."""
    names = {node.name for node in model.graph.node}
    refused = tensorrt_build.parse(trt, path, trt.Logger(trt.Logger.INTERNAL_ERROR))[2]
    errors = list(record.errors)
    for e in refused:
        if e["node"] in names or not record.errors:
            line = f"node '{e['node']}' ({e['operator']}): {e['what']}"
            errors.append(f"{line}; leave it in float or replace it")

    builds = False
    if not refused:
        try:
            tensorrt_build.build(path, batch=batch, trt=trt)
            builds = True
        except tensorrt_build.BuildError as e:
            if not errors:
                errors.append(str(e))
    return replace(
        record,
        checked_by=f"TensorRT-RTX {trt.__version__}",
        parses=not refused,
        builds=builds,
        errors=errors,
    )


def rules(model: onnx.ModelProto) -> Iterator[Refusal]:
    """Yield what TensorRT refuses, in the graph's order."""
    for opset in model.opset_import:
        if opset.domain not in graph.STANDARD:
            continue
        if not LOWEST_OPSET <= opset.version <= HIGHEST_OPSET:
            yield Refusal(
                "graph",
                f"opset {opset.version}",
                f"TensorRT 10.3 takes {LOWEST_OPSET} to {HIGHEST_OPSET}: set opset in the target",
            )
    view = GraphView(model)
    for node in model.graph.node:
        refusal = _refusal(view, node)
        if refusal is not None:
            yield refusal


def _refusal(view: GraphView, node: onnx.NodeProto) -> Refusal | None:
    """Why TensorRT refuses one node; None: it does not."""
    kind = node.op_type
    if kind in INTEGER:
        cure = "export explicit Q/DQ (a tensorrt target does)"
        return Refusal(node.name, f"TensorRT has no operator {kind}", cure)
    if node.domain not in graph.STANDARD:
        what = f"{node.domain}.{kind} belongs to another runtime"
        return Refusal(node.name, what, "export without that runtime's optimizations")
    if kind == "Resize" and attribute(node, "antialias", 0):
        cure = "resize on the host, as edgeclip's preprocessing does"
        return Refusal(node.name, "antialiased Resize", cure)
    if kind in ("QuantizeLinear", "DequantizeLinear"):
        return _refusal_of_rounding(view, node)
    if kind in graph.PRODUCTS and _one_side_rounded(view, node):
        cure = "quantize both operands, or leave the node in float"
        return Refusal(node.name, "Q/DQ on one operand only", cure)
    return None


def _refusal_of_rounding(view: GraphView, node: onnx.NodeProto) -> Refusal | None:
    source = node.input[0]
    if view.is_constant(source) and view.value(source).dtype == np.int32:
        cure = "leave biases in float (a tensorrt target does)"
        return Refusal(node.name, "an int32 bias behind DequantizeLinear", cure)
    if len(node.input) < 3 or not view.is_constant(node.input[2]):
        return None
    zero_point = view.value(node.input[2])
    if np.asarray(zero_point).astype(np.float32).any():
        return Refusal(node.name, "a zero point that is not 0", SYMMETRIC)
    if zero_point.dtype == np.uint8:
        return Refusal(node.name, "uint8", SYMMETRIC)
    return None


def _one_side_rounded(view: GraphView, product: onnx.NodeProto) -> bool:
    rounded = 0
    for name in product.input[:2]:
        producer = view.producers.get(name)
        if producer is not None and producer.op_type == "DequantizeLinear":
            rounded += 1
    return rounded == 1
