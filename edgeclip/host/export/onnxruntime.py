"""ONNX Runtime: the float graph in float32 or float16, or static Q/DQ int8 (`graph.qdq`).

The text encoder is quantized dynamically, its inputs are a handful of tokens; its embedding table, 40 % of it, is int8
per row.
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
    """Writes the image encoder into `folder`, returns its file name. `quantization` is given for int8 targets."""
    path = folder / (
        "image_encoder.fp16.onnx" if target.precision == "fp16" else "image_encoder.onnx"
    )
    if quantization is not None:
        model = quantize(
            quantization.calibrated,
            quantization.nodes,
            activations=target.activations or "uint8",
            reduce_range=quantization.reduce_range,
        )
    graph.save(to_fp16(model) if target.precision == "fp16" else model, path)
    return path.name


def write_text(model: onnx.ModelProto, target: Target, folder: Path) -> str:
    path = folder / ("text_encoder.fp16.onnx" if target.text == "fp16" else "text_encoder.onnx")
    if target.text == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as temporary:
            graph.save(graph.int8_embeddings(model), Path(temporary) / "float.onnx")
            logging.disable(logging.WARNING)  # it advises a preprocessing that folding has done
            try:
                # 7-bit weights: inputs are uint8 on every machine, and where x86 has no VNNI two full products overflow the sum of 16 bits
                how = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
                quantize_dynamic(
                    Path(temporary) / "float.onnx",
                    path,
                    op_types_to_quantize=["MatMul", "Gemm"],
                    **how,
                )
            finally:
                logging.disable(logging.NOTSET)
        graph.save(onnx.load(path), path)
    else:
        graph.save(to_fp16(model) if target.text == "fp16" else model, path)
    return path.name
