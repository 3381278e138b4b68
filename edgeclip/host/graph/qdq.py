"""Static int8 as explicit Q/DQ: the range of every activation, and a graph of chosen int8 layers.

Weights are symmetric with a scale per output channel. Activations are per tensor: asymmetric, so
that a range behind a ReLU has all 256 steps (x86 with VNNI wants uint8, ARM int8), or symmetric for
TensorRT. The writers of the targets, the policy and quantization-aware distillation stand on this
file; it runs ONNX Runtime's own quantizer and then gives every reader but the chosen products its
float tensor back.
"""

import contextlib
import copy
import io
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.view import GraphView
from edgeclip.progress import track

CALIBRATION_BATCH = 16
METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "mean": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
QUANTIZED = ["Conv", "MatMul", "Gemm"]


class Calibrated(NamedTuple):
    """A float model ready to be quantized any number of times."""

    model: onnx.ModelProto
    ranges: Any
    """ONNX Runtime's TensorsData: the range of every activation over the calibration images"""


class _Reader(CalibrationDataReader):
    """Hands batches of images to ONNX Runtime's calibrator."""

    def __init__(self, images: np.ndarray, name: str, size: int):
        batches = np.split(images, range(size, len(images), size))
        self.batches = iter(track(batches, "calibration", len(batches)))
        self.name = name

    def get_next(self) -> dict[str, np.ndarray] | None:
        for batch in self.batches:
            return {self.name: batch}
        return None


def calibrate(model: onnx.ModelProto, calibration: np.ndarray, method: str) -> Calibrated:
    """Run the calibration images [n, 3, H, W] once and keep each activation's range.

    method: minmax, mean (of each image's least and largest value), entropy or percentile.
    """
    # The mean is over images, and histograms refuse a last batch of another size.
    size = 1
    if method == "minmax":
        size = CALIBRATION_BATCH
    options = {}
    if method == "mean":
        options["moving_average"] = True

    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(temporary)
        prepared = folder / "prepared.onnx"
        graph.save(model, folder / "float.onnx")
        quant_pre_process(folder / "float.onnx", prepared, skip_symbolic_shape=True)
        calibrator = create_calibrator(
            prepared,
            QUANTIZED,
            augmented_model_path=folder / "augmented.onnx",
            calibrate_method=METHODS[method],
            extra_options=options,
        )
        calibrator.collect_data(_Reader(calibration, model.graph.input[0].name, size))
        ready = onnx.load(prepared)
        ranges = calibrator.compute_data()
    _cut_off(ready, ranges)
    return Calibrated(ready, ranges)


def with_ranges(ranges: Any, learned: dict[str, tuple[float, float]]) -> Any:
    """Return ONNX Runtime's TensorsData with the learned ranges in place of the measured ones."""
    names = ranges.keys()  # it has no __iter__
    pairs = {}
    for name in names:
        pairs[name] = ranges[name].range_value
    pairs.update(learned)

    values = {}
    for name, (low, high) in pairs.items():
        values[name] = (np.asarray(low, np.float32), np.asarray(high, np.float32))
    return TensorsData(CalibrationMethod.MinMax, values)


def _cut_off(model: onnx.ModelProto, ranges: Any) -> None:
    """Take from each convolution's range, in place, what a Relu or Clip behind it cuts off.

    Steps of the rounding that the activation throws away are lost to the rest: with depthwise
    layers in float, whose neighbors are rounded before their ReLU6, EfficientNet-Lite0's features
    were off by twice as much.
    """
    view = GraphView(model)
    for conv in model.graph.node:
        readers = view.consumers.get(conv.output[0], [])
        if conv.op_type != "Conv" or len(readers) != 1 or conv.output[0] in view.outputs:
            continue
        bounds = _bounds(view, readers[0])
        if bounds is not None:
            lowest, highest = ranges[conv.output[0]].range_value
            ranges[conv.output[0]] = TensorData(
                lowest=np.clip(lowest, *bounds), highest=np.clip(highest, *bounds)
            )


def _bounds(view: GraphView, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Return what a Relu or Clip lets through; None where that is not known."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip" or len(node.input) != 3:
        return None
    if not all(view.is_constant(name) for name in node.input[1:]):
        return None
    low, high = (float(view.value(name)) for name in node.input[1:])
    return low, high


def quantize(
    calibrated: Calibrated,
    nodes: list[str],
    *,
    activations: str,
    for_tensorrt: bool = False,
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """Return a static Q/DQ int8 copy in which `nodes` are quantized.

    activations: uint8 or int8, asymmetric. for_tensorrt: symmetric, biases and outputs in float.
    reduce_range: weights in -64 to 64, whose products with uint8 overflow no 16-bit sum of two.
    """
    model = copy.deepcopy(calibrated.model)
    if not nodes:  # an empty list means "all" to ONNX Runtime
        return model
    activation_type = QuantType.QUInt8
    if activations == "int8":
        activation_type = QuantType.QInt8
    # For TensorRT no product's output is rounded; elsewhere the convolutions' are.
    float_outputs = ["MatMul", "Gemm"]
    rounded: set[str] = set()
    if for_tensorrt:
        float_outputs = QUANTIZED
    else:
        rounded = rounded_outputs(calibrated.model, nodes)

    # Relu and Clip are not among the nodes: had the quantizer removed them, ONNX Runtime's BASIC
    # optimization would lose the clipping (a ReLU6 tower fell from a centered cosine of 0.996 to
    # 0.92, and was right again with optimization off).
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=activation_type,
        tensors_range=calibrated.ranges,
        nodes_to_quantize=nodes,
        nodes_to_exclude=[],
        op_types_to_quantize=QUANTIZED,
        extra_options={
            "ActivationSymmetric": for_tensorrt,
            "WeightSymmetric": True,
            "QuantizeBias": not for_tensorrt,
            # A dead channel's weights are all but 0; their scale would push its int32 bias over
            # the edge.
            "MinimumRealRange": 1e-3,
            "OpTypesToExcludeOutputQuantization": float_outputs,
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return _only_products_read_int8(quantizer.model.model, rounded, set(nodes))


def rounded_outputs(model: onnx.ModelProto, nodes: list[str]) -> set[str]:
    """Return which of the convolutions among `nodes` have their own output rounded.

    ONNX Runtime runs a convolution in integers only where its output is rounded, so all have it but
    those behind which a Relu or Clip comes that quantized products alone read. That one's output is
    rounded anyway, to a range without what is cut off, and ONNX Runtime drops an activation that
    the rounding cuts off by itself; rounded before it as well, ReLU6 towers lost two to three times
    as much and took twice the time.
    """
    view = GraphView(model)
    quantized = set(nodes)
    rounded = set()
    for node in model.graph.node:
        if node.op_type != "Conv" or node.name not in quantized:
            continue
        if not _rounded_behind_activation(view, node, quantized):
            rounded.add(node.name)
    return rounded


def _rounded_behind_activation(view: GraphView, conv: onnx.NodeProto, quantized: set[str]) -> bool:
    readers = view.consumers.get(conv.output[0], [])
    if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip"):
        return False
    activation = readers[0]
    if conv.output[0] in view.outputs or activation.output[0] in view.outputs:
        return False
    behind = view.consumers.get(activation.output[0], [])
    return all(node.name in quantized for node in behind)


def _only_products_read_int8(
    model: onnx.ModelProto, rounded: set[str], nodes: set[str]
) -> onnx.ModelProto:
    """Give every other reader of a quantized tensor, residual additions above all, the float one.

    ONNX Runtime's quantizer rewires all readers. rounded: the convolutions whose own output stays
    quantized for whoever reads it.
    """
    floats = _tensors_before_rounding(GraphView(model), rounded)
    for node in model.graph.node:
        if node.name in nodes or node.op_type == "QuantizeLinear":
            continue
        for i, name in enumerate(node.input):
            node.input[i] = floats.get(name, name)

    for kind in ("DequantizeLinear", "QuantizeLinear"):  # pairs that nobody reads any more
        view = GraphView(model)
        for node in list(model.graph.node):
            name = node.output[0]
            if node.op_type == kind and name not in view.consumers and name not in view.outputs:
                model.graph.node.remove(node)
    graph.drop_unread(model)  # the scales and zero points of those pairs
    return model


def _tensors_before_rounding(view: GraphView, rounded: set[str]) -> dict[str, str]:
    """Return each Q/DQ pair's output to its input, but for those behind the layers `rounded`."""
    floats: dict[str, str] = {}
    for node in view.model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        quantizer = view.producers.get(node.input[0])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            continue
        maker = view.producers.get(quantizer.input[0])
        if maker is None or maker.name not in rounded:
            floats[node.output[0]] = quantizer.input[0]
    return floats
