"""ONNX Runtime: the float graph in float32 or float16, or static Q/DQ int8 (`graph.qdq`).

The text encoder is quantized dynamically, its inputs are a handful of tokens; its embedding table,
40 % of it, is int8 per row.
"""

import logging
import tempfile
from pathlib import Path

import onnx

from edgeclip.device.target import Target
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.float16 import to_fp16
from edgeclip.host.graph.policy import Quantization
from edgeclip.host.graph.qdq import quantize


def write(
    model: onnx.ModelProto, target: Target, quantization: Quantization | None, folder: Path
) -> str:
    """Write the image encoder into `folder`; return its file name.

    quantization: the map of an int8 target.
    """
    if quantization is not None:
        model = quantize(
            quantization.calibrated,
            quantization.nodes,
            activations=target.activations or "uint8",
            reduce_range=quantization.reduce_range,
        )
    return _save(model, target.precision, folder, "image_encoder")


def write_text(model: onnx.ModelProto, target: Target, folder: Path) -> str:
    """Write the text encoder into `folder`; return its file name."""
    if target.text == "int8":
        model = _quantize_dynamically(graph.int8_embeddings(model))
    return _save(model, target.text, folder, "text_encoder")


def _save(model: onnx.ModelProto, precision: str | None, folder: Path, name: str) -> str:
    suffix = ".onnx"
    if precision == "fp16":
        suffix = ".fp16.onnx"
        model = to_fp16(model)
    graph.save(model, folder / f"{name}{suffix}")
    return f"{name}{suffix}"


def _quantize_dynamically(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the text encoder's copy whose linear layers have int8 weights per channel.

    Weights get 7 bits: inputs are uint8 on every machine, and where an x86 has no VNNI two full
    products overflow the sum of 16 bits.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as temporary:
        in_float = Path(temporary) / "float.onnx"
        in_int8 = Path(temporary) / "int8.onnx"
        graph.save(model, in_float)
        logging.disable(logging.WARNING)  # it advises a preprocessing that folding has done
        try:
            quantize_dynamic(
                in_float,
                in_int8,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(in_int8)
