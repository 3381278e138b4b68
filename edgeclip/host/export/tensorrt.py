"""TensorRT: one strongly typed ONNX with explicit Q/DQ that versions 10.3 and 11 accept.

Rules (docs/design/edge.md#34-tensorrt): symmetric int8 with zero point 0, activations per tensor,
weights per output channel, Q/DQ on both operands directly before the operation, biases in float,
everything that is not wrapped in fp16. No engine is built here: an engine is tied to its GPU, so
the board builds it. Where TensorRT-RTX is installed its parser and builder, which need no GPU, say
whether the graph is legal: necessary, not sufficient, and nothing about numerics or speed.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edgeclip.device.manifest import LintRecord
from edgeclip.device.runtime import tensorrt_build
from edgeclip.device.target import Target
from edgeclip.errors import EdgeclipError
from edgeclip.host.export.lint import lint
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.float16 import to_fp16
from edgeclip.host.graph.policy import Quantization
from edgeclip.host.graph.qdq import quantize
from edgeclip.host.graph.view import GraphView, attribute

E4M3_MAX = 448.0
"""the largest finite float8 E4M3"""


def write(
    model: onnx.ModelProto, target: Target, quantization: Quantization | None, folder: Path
) -> str:
    """Write the image encoder into `folder`; return its file name.

    quantization: the map of an int8 or fp8 target.
    """
    if quantization is not None:
        model = quantize(
            quantization.calibrated, quantization.nodes, activations="int8", for_tensorrt=True
        )
        if target.precision == "fp8":
            model = to_fp8(model, quantization.calibrated.model)
    path = folder / "image_encoder.onnx"
    graph.save(to_fp16(model), path)
    return path.name


def write_text(model: onnx.ModelProto, target: Target, folder: Path) -> str:
    """Write the text encoder into `folder` in float16; return its file name."""
    path = folder / "text_encoder.onnx"
    graph.save(to_fp16(model), path)
    return path.name


def to_fp8(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Turn the symmetric int8 Q/DQ graph `model` of `original` into float8 E4M3, in place.

    Places, ranges and channels stay; weights are rounded from the float ones of `original`. E4M3
    ends at 448, so a scale is the range over 448 and not over 127. Returns `model`.
    """
    from ml_dtypes import float8_e4m3fn

    floats = GraphView(original)
    stored = {initializer.name: initializer for initializer in model.graph.initializer}
    done: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        source, scale_name, zero_name = node.input
        scale = numpy_helper.to_array(stored[scale_name])
        if scale_name not in done:
            scale = np.asarray(scale * np.float32(127 / E4M3_MAX))
            _store(stored[scale_name], scale)
            done.add(scale_name)
        if zero_name not in done:
            zero = numpy_helper.to_array(stored[zero_name])
            _store(stored[zero_name], np.zeros(zero.shape, float8_e4m3fn))
            done.add(zero_name)
        if source in stored and source not in done:
            weight = floats.value(source.removesuffix("_quantized"))
            scaled = weight / _across(scale, weight.ndim, attribute(node, "axis", 0))
            rounded = np.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(float8_e4m3fn)
            _store(stored[source], rounded)
            done.add(source)
    return model


def _across(scale: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    """Return a scale per channel [C] in the shape that a weight of `ndim` axes is divided by."""
    if not scale.ndim:
        return scale
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def _store(tensor: TensorProto, value: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def require_legal(path: Path, target: Target) -> LintRecord:
    """Return `lint`'s record of the graph at `path`. Raises `EdgeclipError` for a refused one."""
    record = lint(path, target)
    if record.errors:
        raise EdgeclipError(
            path.name,
            f"TensorRT refuses the graph ({'; '.join(record.errors)[:300]})",
            "report this: the export policy should not have let it through",
        )
    return record


def write_build_script(folder: Path) -> None:
    """Put the engine's builder beside the graph: one file that needs TensorRT alone."""
    (folder / "build_engine.py").write_bytes(Path(tensorrt_build.__file__).read_bytes())
