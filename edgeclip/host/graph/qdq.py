"""Static int8 as explicit Q/DQ: the ranges of every activation, and the graph in which chosen layers are quantized.

Weights are symmetric with a scale per output channel; activations are per tensor, asymmetric so that a range behind a
ReLU has all 256 steps (x86 with VNNI wants uint8 activations, ARM int8), or symmetric for TensorRT. The writers of the
targets, the policy and quantization-aware distillation stand on this file; it runs ONNX Runtime's own quantizer and then
gives every reader but the chosen products its float tensor back.
"""

import contextlib
import copy
import io
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from edgeclip.host.graph import trace as graph
from edgeclip.progress import track

CALIBRATION_BATCH = 16


class Calibrated(NamedTuple):
    """A float model ready to be quantized any number of times."""

    model: onnx.ModelProto
    ranges: Any
    """ONNX Runtime's TensorsData: the range of every activation over the calibration images"""


def calibrate(model: onnx.ModelProto, calibration: np.ndarray, method: str) -> Calibrated:
    """Runs the calibration images [n, 3, H, W] once and keeps each activation's range."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            size = (
                CALIBRATION_BATCH if method == "minmax" else 1
            )  # the mean is over images; histograms refuse a last batch of another size
            batches = np.split(calibration, range(size, len(calibration), size))
            self.batches = iter(track(batches, "calibration", len(batches)))
            self.name = model.graph.input[0].name

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {self.name: batch}

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "mean": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        plain, prepared, augmented = (
            Path(temporary) / name for name in ("float.onnx", "prepared.onnx", "augmented.onnx")
        )
        graph.save(model, plain)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        calibrator = create_calibrator(
            prepared,
            ["Conv", "MatMul", "Gemm"],
            augmented_model_path=augmented,
            calibrate_method=methods[method],
            extra_options={"moving_average": True} if method == "mean" else {},
        )
        calibrator.collect_data(Reader())
        return Calibrated(onnx.load(prepared), calibrator.compute_data())


def quantize(
    calibrated: Calibrated,
    nodes: list[str],
    *,
    activations: str,
    for_tensorrt: bool = False,
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """A static Q/DQ int8 copy in which `nodes` are quantized: weights per channel and symmetric, activations per tensor.

    activations: uint8 or int8, asymmetric. for_tensorrt: as it wants them, symmetric, with biases in float and outputs too.
    reduce_range: weights in -64 to 64, whose products with uint8 no 16-bit sum of two overflows.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    int8 = activations == "int8"
    model = copy.deepcopy(calibrated.model)
    if not nodes:  # an empty list means "all" to ONNX Runtime
        return model
    # Relu and Clip are not among the nodes: had the quantizer removed them, ONNX Runtime's BASIC optimization would lose the
    # clipping (a ReLU6 tower fell from a centered cosine of 0.996 to 0.92, and was right again with optimization off).
    quantizer = QDQQuantizer(
        model, per_channel=True, reduce_range=reduce_range, weight_qType=QuantType.QInt8, activation_qType=QuantType.QInt8 if int8 else QuantType.QUInt8,
        tensors_range=calibrated.ranges, nodes_to_quantize=nodes, nodes_to_exclude=[], op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        extra_options={
            "ActivationSymmetric": for_tensorrt, "WeightSymmetric": True, "QuantizeBias": not for_tensorrt,
            # A dead channel's weights are all but 0, and their scale would push its int32 bias over the edge.
            "MinimumRealRange": 1e-3,
            "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul", "Gemm"] if for_tensorrt else ["MatMul", "Gemm"],
        },
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return _only_products_read_int8(
        quantizer.model.model,
        set() if for_tensorrt else rounded_outputs(calibrated.model, nodes),
        set(nodes),
    )


def rounded_outputs(model: onnx.ModelProto, nodes: list[str]) -> set[str]:
    """Which of the convolutions `nodes` of the float `model` have their own output rounded: ONNX Runtime runs a convolution in
    integers only where its output is.

    All but those behind which a Relu or Clip comes that quantized products alone read. That one's output is rounded anyway,
    to a range without what is cut off, and ONNX Runtime drops an activation that the rounding cuts off by itself; rounded before
    it as well, ReLU6 towers lost two to three times as much and took twice the time.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for n in model.graph.node:
        for name in n.input:
            readers.setdefault(name, []).append(n)
    kept, outputs = set(nodes), {o.name for o in model.graph.output}

    def once(conv: onnx.NodeProto) -> bool:
        after = readers.get(conv.output[0], [])
        if (
            len(after) != 1
            or after[0].op_type not in ("Relu", "Clip")
            or {conv.output[0], after[0].output[0]} & outputs
        ):
            return False
        return all(n.name in kept for n in readers.get(after[0].output[0], []))

    return {
        n.name for n in model.graph.node if n.op_type == "Conv" and n.name in kept and not once(n)
    }


def _only_products_read_int8(
    model: onnx.ModelProto, rounded: set[str], nodes: set[str]
) -> onnx.ModelProto:
    """Gives every other reader of a quantized tensor, a residual addition above all, the float tensor back.

    ONNX Runtime's quantizer rewires all readers. rounded: the convolutions whose own output stays quantized for whoever reads it.
    """
    makers = {o: n for n in model.graph.node for o in n.output}
    before: dict[str, str] = {}
    for n in model.graph.node:
        q = makers.get(n.input[0]) if n.op_type == "DequantizeLinear" else None
        if q is not None and q.op_type == "QuantizeLinear":
            maker = makers.get(q.input[0])
            if maker is None or maker.name not in rounded:
                before[n.output[0]] = q.input[0]
    for n in model.graph.node:
        if n.name not in nodes and n.op_type != "QuantizeLinear":
            for i, name in enumerate(n.input):
                n.input[i] = before.get(name, name)
    for op in ("DequantizeLinear", "QuantizeLinear"):  # pairs that nobody reads any more
        read = {name for n in model.graph.node for name in n.input} | {
            o.name for o in model.graph.output
        }
        for n in [n for n in model.graph.node if n.op_type == op and n.output[0] not in read]:
            model.graph.node.remove(n)
    graph.drop_unread(model)  # the scales and zero points of those pairs
    return model
