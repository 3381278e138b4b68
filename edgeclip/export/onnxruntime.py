"""ONNX Runtime: the float graph, or static Q/DQ int8 with the policy of `graph.matrix_products`.

x86 with VNNI wants U8S8 (asymmetric uint8 activations, int8 weights per output channel); ARM wants S8S8. The text
encoder is quantised dynamically, its inputs are a handful of tokens; its embedding table, 40 % of it, is int8 per row.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx

from edgeclip.export import graph
from edgeclip.export.half import to_fp16
from edgeclip.progress import track
from edgeclip.target import Target

if TYPE_CHECKING:
    from edgeclip.export.policy import Quantisation

CALIBRATION_BATCH = 16


def write(model: onnx.ModelProto, target: Target, quantisation: Quantisation | None, folder: Path) -> str:
    """Writes the image encoder into `folder`, returns its file name. `quantisation` is given for int8 targets."""
    path = folder / ("image_encoder.fp16.onnx" if target.precision == "fp16" else "image_encoder.onnx")
    if quantisation is not None:
        model = quantise(quantisation.calibrated, quantisation.nodes, activations=target.activations or "uint8", reduce_range=quantisation.reduce_range)
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
                quantize_dynamic(Path(temporary) / "float.onnx", path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)
            finally:
                logging.disable(logging.NOTSET)
        graph.save(onnx.load(path), path)
    else:
        graph.save(to_fp16(model) if target.text == "fp16" else model, path)
    return path.name


class Calibrated(NamedTuple):
    """A float model ready to be quantised any number of times."""

    model: onnx.ModelProto
    ranges: Any
    """ONNX Runtime's TensorsData: the range of every activation over the calibration pictures"""


def calibrate(model: onnx.ModelProto, calibration: np.ndarray, method: str) -> Calibrated:
    """Runs the calibration pictures [n, 3, H, W] once and keeps each activation's range."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            size = CALIBRATION_BATCH if method == "minmax" else 1  # the mean is over pictures; histograms refuse a last batch of another size
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
        plain, prepared, augmented = (Path(temporary) / name for name in ("float.onnx", "prepared.onnx", "augmented.onnx"))
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


def quantise(calibrated: Calibrated, nodes: list[str], *, activations: str, float_bias: bool = False, reduce_range: bool = False) -> onnx.ModelProto:
    """A static Q/DQ int8 copy in which `nodes` are quantised: weights per channel and symmetric, activations per tensor.

    activations: uint8 (asymmetric) or int8 (symmetric). float_bias: leave biases in float, as TensorRT wants them.
    reduce_range: weights in -64 to 64, whose products with uint8 no 16-bit sum of two overflows.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    symmetric = activations == "int8"
    model = copy.deepcopy(calibrated.model)
    if not nodes:  # an empty list means "all" to ONNX Runtime
        return model
    # Relu and Clip are not among the nodes: had the quantiser removed them, ONNX Runtime's BASIC optimisation would lose the
    # clipping (a ReLU6 tower fell from a centred cosine of 0.996 to 0.92, and was right again with optimisation off).
    quantizer = QDQQuantizer(
        model, per_channel=True, reduce_range=reduce_range, weight_qType=QuantType.QInt8, activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=calibrated.ranges, nodes_to_quantize=nodes, nodes_to_exclude=[], op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        extra_options={
            "ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not float_bias,
            # A dead channel's weights are all but 0, and their scale would push its int32 bias over the edge.
            "MinimumRealRange": 1e-3,
            "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul", "Gemm"] if float_bias else ["MatMul", "Gemm"],
        },
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return _only_products_read_int8(quantizer.model.model, set(nodes), outputs_too=not float_bias)


def _only_products_read_int8(model: onnx.ModelProto, nodes: set[str], outputs_too: bool) -> onnx.ModelProto:
    """Gives every other reader of a quantised tensor, a residual addition above all, the float tensor back.

    ONNX Runtime's quantiser rewires all readers. outputs_too: a convolution's own output stays quantised for whoever reads
    it, since ONNX Runtime runs it in integers only so.
    """
    makers = {o: n for n in model.graph.node for o in n.output}
    before: dict[str, str] = {}
    for n in model.graph.node:
        q = makers.get(n.input[0]) if n.op_type == "DequantizeLinear" else None
        if q is not None and q.op_type == "QuantizeLinear":
            maker = makers.get(q.input[0])
            if not (outputs_too and maker is not None and maker.op_type == "Conv" and maker.name in nodes):
                before[n.output[0]] = q.input[0]
    for n in model.graph.node:
        if n.name not in nodes and n.op_type != "QuantizeLinear":
            for i, name in enumerate(n.input):
                n.input[i] = before.get(name, name)
    return model
