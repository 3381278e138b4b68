"""TensorRT: one strongly typed ONNX with explicit Q/DQ that versions 10.3 and 11 accept; the board builds the engine.

Rules (EDGE.md 3): symmetric int8 with zero point 0, activations per tensor, weights per output channel, Q/DQ on both
operands directly before the operation, biases in float, everything that is not wrapped in fp16. No engine is built
here: an engine is tied to its GPU. Where TensorRT-RTX is installed its parser and builder, which need no GPU, say
whether the graph is legal: necessary, not sufficient, and nothing about numerics or speed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgeclip.device.runtime import tensorrt_build
from edgeclip.device.target import Target
from edgeclip.errors import EdgeclipError
from edgeclip.host.export.lint import lint
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.float16 import to_fp16
from edgeclip.host.graph.policy import Quantization
from edgeclip.host.graph.qdq import quantize

E4M3_MAX = 448.0
"""the largest finite float8 E4M3"""


def write(
    model: onnx.ModelProto, target: Target, quantization: Quantization | None, folder: Path
) -> str:
    """Writes the image encoder into `folder`, returns its file name. `quantization` is given for int8 and fp8 targets."""
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
    path = folder / "text_encoder.onnx"
    graph.save(to_fp16(model), path)
    return path.name


def to_fp8(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """The symmetric int8 Q/DQ graph `model` of `original` with float8 E4M3 in place of int8: same places, ranges and channels.

    Weights are rounded anew from the float ones. E4M3 ends at 448, so a scale is the range over 448 and not over 127.
    """
    from ml_dtypes import float8_e4m3fn

    floats, constants = graph.initializers(original), {i.name: i for i in model.graph.initializer}
    done: set[str] = set()

    def put(name: str, value: np.ndarray) -> None:
        if name not in done:
            done.add(name)
            constants[name].CopyFrom(numpy_helper.from_array(value, name))

    for node in (
        n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ):
        scale, zero = (numpy_helper.to_array(constants[i]) for i in node.input[1:])
        if node.input[1] not in done:
            scale = np.asarray(scale * np.float32(127 / E4M3_MAX))
        put(node.input[1], scale)
        put(node.input[2], np.zeros(zero.shape, float8_e4m3fn))
        if node.input[0] in constants and node.input[0] not in done:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            weight = floats[node.input[0].removesuffix("_quantized")]
            across = (
                scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
                if scale.ndim
                else scale
            )
            put(node.input[0], np.clip(weight / across, -E4M3_MAX, E4M3_MAX).astype(float8_e4m3fn))
    return model


def require_legal(path: Path, target: Target) -> dict[str, Any]:
    verdict = lint(path, target)
    if verdict["errors"]:
        raise EdgeclipError(
            path.name,
            f"TensorRT refuses it ({'; '.join(verdict['errors'])[:300]})",
            "report this: the export policy should not have let it through",
        )
    return verdict


def write_build_script(folder: Path) -> None:
    """The board builds its own engine: the builder goes with the bundle, as one file that needs TensorRT alone."""
    (folder / "build_engine.py").write_bytes(Path(tensorrt_build.__file__).read_bytes())
