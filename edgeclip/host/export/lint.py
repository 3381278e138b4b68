"""`edgeclip lint FILE --target T`: would TensorRT take this graph? Each refusal is named with its node and its cure.

Two readings: the rules below, which need no TensorRT and know the cure, and TensorRT-RTX's own parser and builder where
the extra `lint` is installed (no GPU needed). Passing both is necessary, not sufficient, and says nothing of numerics or
speed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeclip.device.runtime import tensorrt_build
from edgeclip.device.target import Target
from edgeclip.errors import EdgeclipError
from edgeclip.host.graph import trace as graph

OPSETS = (17, 20)
INTEGER = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "DynamicQuantizeLinear")


def lint(path: Path, target: Target, batch: tuple[int, int, int] = (1, 4, 8)) -> dict[str, Any]:
    """{"checked_by", "parses", "builds", "errors"}; checked_by is None without TensorRT-RTX, errors are one line each."""
    if target.runtime != "tensorrt":
        raise EdgeclipError(
            "--target",
            f"lint checks graphs for TensorRT, this target is for {target.runtime}",
            "name a tensorrt target",
        )
    try:
        model = onnx.load(path)
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except Exception as e:  # protobuf's own error type
        raise EdgeclipError(
            path, f"not a readable ONNX file ({str(e)[:100]})", "give an .onnx file"
        ) from None
    errors = [f"node '{node}': {what}; {cure}" for node, what, cure in rules(model)]
    verdict: dict[str, Any] = {"checked_by": None, "parses": None, "builds": None, "errors": errors}
    try:
        trt = tensorrt_build.module(("tensorrt_rtx",))
    except tensorrt_build.BuildError:
        return verdict
    known = {n.name for n in model.graph.node}
    parsed = tensorrt_build.parse(trt, path, trt.Logger(trt.Logger.INTERNAL_ERROR))[2]
    verdict |= {
        "checked_by": f"TensorRT-RTX {trt.__version__}",
        "parses": not parsed,
        "builds": False,
    }
    errors += [
        f"node '{e['node']}' ({e['operator']}): {e['what']}; leave it in float or replace it"
        for e in parsed
        if e["node"] in known or not errors
    ]
    if not parsed:
        try:
            tensorrt_build.build(path, batch=batch, trt=trt)
            verdict["builds"] = True
        except tensorrt_build.BuildError as e:
            if not errors:
                errors.append(str(e))
    return verdict


def rules(model: onnx.ModelProto) -> Iterator[tuple[str, str, str]]:
    """(node, what TensorRT refuses, cure)."""
    for o in model.opset_import:
        if o.domain in ("", "ai.onnx") and not OPSETS[0] <= o.version <= OPSETS[1]:
            yield (
                "graph",
                f"opset {o.version}",
                f"TensorRT 10.3 takes {OPSETS[0]} to {OPSETS[1]}: set opset in the target",
            )
    constants = graph.initializers(model)
    makers = {o: n for n in model.graph.node for o in n.output}
    for n in model.graph.node:
        attributes = {a.name: a for a in n.attribute}
        if n.op_type in INTEGER:
            yield (
                n.name,
                f"{n.op_type} is no operator there",
                "export explicit Q/DQ (a tensorrt target does)",
            )
        elif n.domain not in ("", "ai.onnx"):
            yield (
                n.name,
                f"{n.domain}.{n.op_type} belongs to another runtime",
                "export without that runtime's optimizations",
            )
        elif n.op_type == "Resize" and "antialias" in attributes and attributes["antialias"].i:
            yield (
                n.name,
                "antialiased Resize",
                "resize on the host, as edgeclip's preprocessing does",
            )
        elif n.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source = constants.get(n.input[0])
            if source is not None and source.dtype == np.int32:
                yield (
                    n.name,
                    "an int32 bias behind DequantizeLinear",
                    "leave biases in float (a tensorrt target does)",
                )
            elif (
                len(n.input) > 2
                and n.input[2] in constants
                and np.asarray(constants[n.input[2]]).astype(np.float32).any()
            ):
                yield (
                    n.name,
                    "a zero point that is not 0",
                    "quantize symmetrically to int8 (a tensorrt target does)",
                )
            elif (
                len(n.input) > 2
                and n.input[2] in constants
                and constants[n.input[2]].dtype == np.uint8
            ):
                yield n.name, "uint8", "quantize symmetrically to int8 (a tensorrt target does)"
        elif n.op_type in graph.PRODUCTS:
            sides = [makers[i].op_type if i in makers else "" for i in n.input[:2]]
            if sides.count("DequantizeLinear") == 1:
                yield (
                    n.name,
                    "Q/DQ on one operand only",
                    "quantize both operands, or leave the node in float",
                )
