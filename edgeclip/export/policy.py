"""Which layers become int8 and how: one policy for ONNX Runtime, OpenVINO and TensorRT.

Only convolutions and linear layers are candidates (`graph.matrix_products`). Residual additions, norms, softmax, GELU,
the L2 norm and products of two activations stay in float. Of the candidates the first and the last few are quantised one
at a time on the calibration pictures; a layer that alone moves the features too far goes back to float. Early layers of
a small tower are the usual case: few channels, flat pictures, and every later layer amplifies the error. The measure is
the mean cosine after the reference's mean feature is taken away, since the raw one hides damage.

Depthwise networks get their biases corrected: rounding a filter of nine weights shifts its output's mean, and nothing
after it averages that out (Nagel et al. 2019, section 4.2). A `Form` is everything else that a candidate may differ in;
`search` tries them.
"""

from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgeclip import machine
from edgeclip.errors import EdgeclipError
from edgeclip.export import graph
from edgeclip.export.onnxruntime import Calibrated, calibrate, quantise
from edgeclip.export.smooth import smooth
from edgeclip.metrics import l2_normalise
from edgeclip.progress import track
from edgeclip.target import Calibration, Target

PROBES = 32
"""calibration pictures a layer is judged on"""


class Form(NamedTuple):
    """What candidates differ in; the fields are those of `target.Calibration`, one value each."""

    method: str
    smoothing: float | None
    layers: str
    model_type: str | None


class Quantisation(NamedTuple):
    """A map that can be written for any runtime."""

    form: Form
    calibration: np.ndarray
    """float32 [n, 3, H, W]"""
    calibrated: Calibrated
    nodes: list[str]
    """the layers that become int8"""
    float_layers: dict[str, float | None]
    """the candidates that stay in float, with the centred cosine that quantising each alone leaves (null: left by choice of form)"""
    int8_share: float
    """of the candidates' multiply-accumulates"""
    reduce_range: bool
    """7-bit weights, for an x86 without VNNI"""

    def record(self) -> dict[str, Any]:
        return {
            **self.form._asdict(),
            "reduce_range": self.reduce_range,
            "float_layers": self.float_layers,
            "int8_layers": len(self.nodes),
            "int8_nodes": self.nodes,
            "int8_share_of_macs": self.int8_share,
        }


def reduced_range(target: Target) -> bool:
    """Do the weights get 7 bits? Raises `EdgeclipError` where the target leaves it to a machine that cannot tell."""
    if target.reduce_range == "as_host":
        saturates = machine.saturates(machine.facts())
        if saturates is None:
            raise EdgeclipError("reduce_range: as_host", "this machine's x86 instruction set cannot be read", "say always or never in a target of your own")
        return saturates
    return target.reduce_range == "always"


def outer_layers(calibrated: Calibrated, pictures: np.ndarray, spec: Calibration, reduce_range: bool = False) -> dict[str, float]:
    """The first and last layers that alone leave less centred cosine than the target allows, each with what it leaves."""
    products = graph.matrix_products(calibrated.model)
    edge = products if len(products) <= 2 * spec.probe_layers else [*products[: spec.probe_layers], *products[-spec.probe_layers :]]
    if not spec.probe_layers:
        return {}
    found = damage(calibrated, edge, pictures[:PROBES], "sensitivity of outer layers", reduce_range)
    return {name: round(cosine, 4) for name, cosine in found.items() if not cosine >= spec.layer_cosine}


def damage(calibrated: Calibrated, layers: list[str], pictures: np.ndarray, what: str, reduce_range: bool = False) -> dict[str, float]:
    """The centred cosine that quantising each layer alone leaves (S8S8, whatever the target: it ranks layers).

    The steps are those of U8S8, and no x86 saturates on them here: the ranking is the layers' own, not this machine's.
    """
    reference = features(calibrated.model, pictures)
    return {
        name: centred_cosine(features(quantise(calibrated, [name], activations="int8", reduce_range=reduce_range), pictures), reference)
        for name in track(layers, what, len(layers))
    }


def choose(
    model: onnx.ModelProto,
    calibration: np.ndarray,
    form: Form,
    float_layers: dict[str, float] | None,
    spec: Calibration,
    reduce_range: bool = False,
    own_bias: bool = True,
) -> Quantisation | None:
    """The map of one form. float_layers: those of `outer_layers`, None to look for them here. calibration: float32 [n, 3, H, W].

    own_bias: correct biases here; NNCF does it by itself.

    None where the form is another one's double: it asks for smoothing and there is nothing to smooth, for dense layers and all are,
    or for residual additions with NNCF's transformer patterns, which leave them in float.
    """
    if (form.layers, form.model_type) == ("residual", "transformer"):
        return None
    smoothed = smooth(model, calibration, form.smoothing)
    if smoothed is None:
        return None
    calibrated = calibrate(smoothed, calibration, form.method)
    damaged: dict[str, float | None] = dict(outer_layers(calibrated, calibration, spec, reduce_range) if float_layers is None else float_layers)
    apart = graph.depthwise(calibrated.model)
    if form.layers == "dense":
        if not set(apart) - damaged.keys():
            return None
        damaged = {**dict.fromkeys(apart), **damaged}
    if apart and own_bias:
        calibrated = correct_bias(calibrated, [n for n in graph.matrix_products(calibrated.model) if n not in damaged], calibration, reduce_range)
    return of_layers(form, calibration, calibrated, damaged, reduce_range)


def of_layers(form: Form, calibration: np.ndarray, calibrated: Calibrated, float_layers: dict[str, float | None], reduce_range: bool) -> Quantisation:
    products = graph.matrix_products(calibrated.model)
    macs = graph.macs(calibrated.model, products, calibration[:1])
    kept = [n for n in products if n not in float_layers]
    return Quantisation(form, calibration, calibrated, kept, float_layers, round(sum(macs[n] for n in kept) / sum(macs.values()), 4), reduce_range)


def correct_bias(calibrated: Calibrated, nodes: list[str], calibration: np.ndarray, reduce_range: bool = False) -> Calibrated:
    """Takes from each convolution's bias what rounding its weights adds to its output's mean over the calibration pictures.

    The shift is that of the layer alone, its input as the float network gives it: beside each convolution runs a second one
    with the rounding errors for weights, and the mean of what it puts out is the shift.
    """
    if not nodes:
        return calibrated
    constants, rounded = graph.initializers(calibrated.model), graph.initializers(quantise(calibrated, nodes, activations="int8", reduce_range=reduce_range))
    wanted = set(nodes)
    stored = {i.name for i in calibrated.model.graph.initializer}
    convolutions = [n for n in calibrated.model.graph.node if n.name in wanted and n.op_type == "Conv" and len(n.input) > 2 and n.input[2] in stored]
    probe = onnx.ModelProto()
    probe.CopyFrom(calibrated.model)
    del probe.graph.output[:]
    for n in convolutions:
        scale = rounded[f"{n.input[1]}_scale"].reshape(-1, 1, 1, 1)
        error = (rounded[f"{n.input[1]}_quantized"] * scale - constants[n.input[1]]).astype(np.float32)
        beside = onnx.NodeProto()
        beside.CopyFrom(n)
        del beside.input[:], beside.output[:]
        beside.name, weight, out, mean = (f"{n.name}_{what}" for what in ("beside", "error", "shift", "mean"))
        beside.input.extend([n.input[0], weight])
        beside.output.append(out)
        probe.graph.initializer.append(numpy_helper.from_array(error, weight))
        probe.graph.node.extend([beside, helper.make_node("GlobalAveragePool", [out], [mean])])
        probe.graph.output.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, None))
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    shift = [0.0] * len(convolutions)
    for at in range(0, len(calibration), PROBES):
        means = session.run(None, {session.get_inputs()[0].name: calibration[at : at + PROBES]})
        shift = [total + m.sum(axis=(0, 2, 3)) / len(calibration) for total, m in zip(shift, means, strict=True)]
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    by_name = {n.name: n for n in model.graph.node}
    for n, by in zip(convolutions, shift, strict=True):  # a bias of its own: equal ones may be one constant
        name = f"{n.name}_bias_corrected"
        model.graph.initializer.append(numpy_helper.from_array((constants[n.input[2]] - by).astype(np.float32), name))
        by_name[n.name].input[2] = name
    graph.drop_unread(model)
    return Calibrated(model, calibrated.ranges)


def features(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """[n, D] of inputs x [n, 3, H, W], in ONNX Runtime, S8S8 in exact integers as `edgeclip.runtime` opens it."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[i : i + PROBES]})[0] for i in range(0, len(x), PROBES)])


def centred_cosine(features: np.ndarray, reference: np.ndarray) -> float:
    mean = reference.mean(axis=0)
    return float((l2_normalise(features - mean) * l2_normalise(reference - mean)).sum(axis=1).mean())
