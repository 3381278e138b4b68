"""Which layers become int8 and how: one policy for ONNX Runtime, OpenVINO and TensorRT.

Only convolutions and linear layers may become int8 (`graph.matrix_products`). Residual additions,
norms, softmax, GELU, the L2 norm and products of two activations stay in float. Of the products the
first and the last few are quantized one at a time on the calibration images; a layer that alone
moves the features too far stays in float. Early layers of a small tower are the usual case: few
channels, flat images, and every later layer amplifies the error. The measure is the mean cosine
after the reference's mean feature is taken away, since the raw one hides damage.

Depthwise networks get their biases corrected: rounding a filter of nine weights shifts its output's
mean, and nothing after it averages that out (Nagel et al. 2019, section 4.2). Where the rounding is
learned (`reconstruct`), the biases are learned with it. A `Candidate` is everything else that may
differ; `export.search` tries them.
"""

from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeclip.device import machine
from edgeclip.device.metrics import l2_normalize
from edgeclip.device.target import Calibration, Target
from edgeclip.errors import EdgeclipError
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.qdq import Calibrated, calibrate, quantize
from edgeclip.host.graph.reconstruct import Form, reconstruct
from edgeclip.host.graph.smooth import smooth
from edgeclip.host.graph.view import GraphView, run_batches
from edgeclip.progress import track

PROBES = 32
"""calibration images that a layer is judged on"""


class Candidate(NamedTuple):
    """One way to quantize; the fields are those of `target.Calibration`, one value each."""

    method: str
    smoothing: float | None
    layers: str
    model_type: str | None
    rounding: str = "nearest"
    """of the weights: nearest or learned"""


class Quantization(NamedTuple):
    """A map of layers to types that can be written for any runtime."""

    candidate: Candidate
    calibration: np.ndarray
    """float32 [n, 3, H, W]"""
    calibrated: Calibrated
    nodes: list[str]
    """the layers that become int8"""
    float_layers: dict[str, float | None]
    """the products that stay in float, with the centered cosine that quantizing each alone leaves;
    None: in float by choice of candidate"""
    int8_share: float
    """of the products' multiply-accumulates"""
    reduce_range: bool
    """7-bit weights, for an x86 without VNNI"""


def reduced_range(target: Target) -> bool:
    """Return whether the weights get 7 bits.

    Raises `EdgeclipError` where the target leaves it to a machine that cannot tell.
    """
    if target.reduce_range != "as_host":
        return target.reduce_range == "always"
    saturates = machine.saturates(machine.facts())
    if saturates is None:
        raise EdgeclipError(
            "reduce_range: as_host",
            "the instruction set of this machine's x86 processor cannot be read",
            "set it to always or never in a target of your own",
        )
    return saturates


def outer_layers(
    calibrated: Calibrated, images: np.ndarray, spec: Calibration, reduce_range: bool = False
) -> dict[str, float]:
    """Return the first and last layers that stay in float, each with what int8 leaves of it.

    They are those that alone leave less centered cosine than the target allows.
    """
    count = spec.probe_layers
    if not count:
        return {}
    products = graph.matrix_products(calibrated.model)
    if len(products) > 2 * count:
        products = [*products[:count], *products[-count:]]

    what = "sensitivity of outer layers"
    cosines = sensitivity(calibrated, products, images[:PROBES], what, reduce_range)
    worst = {}
    for name, cosine in cosines.items():
        if not cosine >= spec.layer_cosine:  # not a number is worse too
            worst[name] = round(cosine, 4)
    return worst


def sensitivity(
    calibrated: Calibrated,
    layers: list[str],
    images: np.ndarray,
    what: str,
    reduce_range: bool = False,
) -> dict[str, float]:
    """Return the centered cosine that quantizing each layer alone leaves.

    S8S8, whatever the target: this ranks layers. The steps are those of U8S8, and no x86 saturates
    on them here, so the ranking is the layers' own and not this machine's. what: what the progress
    is called.
    """
    reference = features(calibrated.model, images)
    cosines = {}
    for name in track(layers, what, len(layers)):
        model = quantize(calibrated, [name], activations="int8", reduce_range=reduce_range)
        cosines[name] = centered_cosine(features(model, images), reference)
    return cosines


def choose(
    model: onnx.ModelProto,
    calibration: np.ndarray,
    candidate: Candidate,
    float_layers: dict[str, float] | None,
    spec: Calibration,
    reduce_range: bool = False,
    own_bias: bool = True,
    form: Form | None = None,
) -> Quantization | None:
    """Return the map of one candidate; None where the candidate is another one's double.

    A double asks for smoothing and there is nothing to smooth, for dense layers and all are, or for
    residual additions with NNCF's transformer patterns, which leave them in float.

    calibration: float32 [n, 3, H, W]. float_layers: those of `outer_layers`; None: look for them
    here. own_bias: correct biases here; NNCF does it by itself. form: how the target rounds, which
    a candidate whose rounding is learned needs.
    """
    if candidate.layers == "residual" and candidate.model_type == "transformer":
        return None
    smoothed = smooth(model, calibration, candidate.smoothing)
    if smoothed is None:
        return None

    calibrated = calibrate(smoothed, calibration, candidate.method)
    if float_layers is None:
        float_layers = outer_layers(calibrated, calibration, spec, reduce_range)
    in_float: dict[str, float | None] = dict(float_layers)
    apart = graph.depthwise(calibrated.model)
    if candidate.layers == "dense":
        if not set(apart) - in_float.keys():
            return None
        in_float = {**dict.fromkeys(apart), **in_float}

    products = graph.matrix_products(calibrated.model)
    nodes = [name for name in products if name not in in_float]
    if candidate.rounding == "learned":
        assert form is not None
        calibrated = reconstruct(calibrated, nodes, calibration, form, spec.reconstruction)
    elif apart and own_bias:
        calibrated = correct_bias(calibrated, nodes, calibration, reduce_range)
    return of_layers(candidate, calibration, calibrated, in_float, reduce_range)


def of_layers(
    candidate: Candidate,
    calibration: np.ndarray,
    calibrated: Calibrated,
    float_layers: dict[str, float | None],
    reduce_range: bool,
) -> Quantization:
    """Return the map in which every product but `float_layers` becomes int8."""
    products = graph.matrix_products(calibrated.model)
    macs = graph.macs(calibrated.model, products, calibration[:1])
    nodes = [name for name in products if name not in float_layers]
    in_int8 = sum(macs[name] for name in nodes)
    return Quantization(
        candidate=candidate,
        calibration=calibration,
        calibrated=calibrated,
        nodes=nodes,
        float_layers=float_layers,
        int8_share=round(in_int8 / sum(macs.values()), 4),
        reduce_range=reduce_range,
    )


def correct_bias(
    calibrated: Calibrated, nodes: list[str], calibration: np.ndarray, reduce_range: bool = False
) -> Calibrated:
    """Return a copy whose convolutions keep their outputs' means when their weights are rounded.

    From each bias is taken what rounding the weights adds to the mean over the calibration images,
    [n, 3, H, W]. The shift is that of the layer alone, its input as the float network gives it.
    """
    if not nodes:
        return calibrated
    view = GraphView(calibrated.model)
    stored = {initializer.name for initializer in calibrated.model.graph.initializer}
    convolutions = []
    for node in calibrated.model.graph.node:
        has_bias = len(node.input) > 2 and node.input[2] in stored
        if node.op_type == "Conv" and node.name in nodes and has_bias:
            convolutions.append(node)

    rounded = quantize(calibrated, nodes, activations="int8", reduce_range=reduce_range)
    shifts = _shifts(view, convolutions, GraphView(rounded), calibration)

    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    copies = GraphView(model).nodes
    for node in convolutions:
        # A bias of its own: equal ones may be one constant.
        name = f"{node.name}_bias_corrected"
        bias = (view.value(node.input[2]) - shifts[node.name]).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(bias, name))
        copies[node.name].input[2] = name
    graph.drop_unread(model)
    return Calibrated(model, calibrated.ranges)


def _shifts(
    view: GraphView,
    convolutions: list[onnx.NodeProto],
    rounded: GraphView,
    calibration: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return what rounding its weights adds to each convolution's mean output [channels], by name.

    Beside each convolution runs a second one with the rounding errors for weights; the mean of what
    it puts out is the shift.
    """
    model = onnx.ModelProto()
    model.CopyFrom(view.model)
    del model.graph.output[:]
    for node in convolutions:
        weight = node.input[1]
        scale = rounded.value(f"{weight}_scale").reshape(-1, 1, 1, 1)
        error = rounded.value(f"{weight}_quantized") * scale - view.value(weight)
        beside = onnx.NodeProto()
        beside.CopyFrom(node)
        del beside.input[:]
        del beside.output[:]
        beside.name = f"{node.name}_beside"
        beside.input.extend([node.input[0], f"{node.name}_error"])
        beside.output.append(f"{node.name}_shift")
        mean = f"{node.name}_mean"
        pool = helper.make_node("GlobalAveragePool", [f"{node.name}_shift"], [mean])
        model.graph.initializer.append(
            numpy_helper.from_array(error.astype(np.float32), f"{node.name}_error")
        )
        model.graph.node.extend([beside, pool])
        model.graph.output.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, None))

    shifts: dict[str, np.ndarray] = {}
    for means in run_batches(model, calibration, PROBES):
        for node in convolutions:
            total = means[f"{node.name}_mean"].sum(axis=(0, 2, 3))
            shifts[node.name] = shifts.get(node.name, 0.0) + total / len(calibration)
    return shifts


def features(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """Return the model's output [n, D] for inputs x [n, 3, H, W]."""
    output = model.graph.output[0].name
    rows = [values[output] for values in run_batches(model, x, PROBES)]
    return np.concatenate(rows)


def centered_cosine(features: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean cosine of rows [n, D] after the reference's mean row is taken from both."""
    mean = reference.mean(axis=0)
    products = l2_normalize(features - mean) * l2_normalize(reference - mean)
    return float(products.sum(axis=1).mean())
