"""TensorRT: one strongly typed ONNX with explicit Q/DQ that versions 10.3 and 11 accept; the board builds the engine.

Rules (EDGE.md 3): symmetric int8 with zero point 0, activations per tensor, weights per output channel, Q/DQ on both
operands directly before the operation, biases in float, everything that is not wrapped in fp16. No engine is built
here: an engine is tied to its GPU. Where TensorRT-RTX is installed its parser and builder, which need no GPU, say
whether the graph is legal: necessary, not sufficient, and nothing about numerics or speed.
"""

from pathlib import Path
from typing import Any

import onnx

from edgeclip.errors import EdgeclipError
from edgeclip.export import graph
from edgeclip.export.onnxruntime import quantise
from edgeclip.export.policy import Quantisation
from edgeclip.target import Target


def write(model: onnx.ModelProto, target: Target, quantisation: Quantisation | None, folder: Path) -> str:
    """Writes the image encoder into `folder`, returns its file name. `quantisation` is given for int8 targets."""
    if target.precision == "int8":
        assert quantisation is not None
        model = quantise(quantisation.calibrated, quantisation.nodes, activations="int8", float_bias=True)
    path = folder / "image_encoder.onnx"
    graph.save(to_fp16(model), path)
    return path.name


def write_text(model: onnx.ModelProto, target: Target, folder: Path) -> str:
    path = folder / "text_encoder.onnx"
    graph.save(to_fp16(model), path)
    return path.name


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every float32 tensor inside becomes float16, scales of Q/DQ included; input and output stay float32."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    blocked: list[str] = []  # nothing stays behind: a strongly typed network refuses mixed operands
    converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked, disable_shape_infer=True)
    sortable = ONNXModel(converted)
    sortable.topological_sort()  # its casts of the input are appended at the end
    return sortable.model


def lint(path: Path, batch: tuple[int, int, int] = (1, 4, 8)) -> dict[str, Any]:
    """Parses and builds with TensorRT-RTX on this machine, no GPU needed; `batch` is the profile's minimum, optimum, maximum.

    Returns {"checked_by", "parses", "builds", "errors"}; {"checked_by": None} where TensorRT-RTX is not installed.
    """
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return {"checked_by": None, "parses": None, "builds": None, "errors": ["not checked: pip install 'edgeclip[lint]'"]}
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parses = parser.parse(path.read_bytes())
    errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
    builds = False
    if parses:
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, *((b, *rest) for b in batch))
        config.add_optimization_profile(profile)
        builds = builder.build_serialized_network(network, config) is not None
    return {"checked_by": f"TensorRT-RTX {trt.__version__}", "parses": parses, "builds": builds, "errors": errors}


def require_legal(path: Path) -> dict[str, Any]:
    verdict = lint(path)
    if verdict["checked_by"] and not verdict["builds"]:
        step = "builder" if verdict["parses"] else "parser"
        raise EdgeclipError(
            path.name,
            f"{verdict['checked_by']}'s {step} refuses it ({'; '.join(verdict['errors'])[:300] or 'no reason given'})",
            "report this: the export policy should not have let it through",
        )
    return verdict
