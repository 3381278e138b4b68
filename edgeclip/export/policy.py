"""Which layers become int8: one policy for every runtime.

Only convolutions and linear layers are candidates (`graph.matrix_products`). Of these the first and the last few are
quantised one at a time on the calibration pictures; a layer that alone moves the features too far goes back to float.
Early layers of a small tower are the usual case: few channels, flat pictures, and every later layer amplifies the error.
The measure is the mean cosine after the reference's mean feature is taken away, since the raw one hides damage.
"""

from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort

from edgeclip import machine
from edgeclip.errors import EdgeclipError
from edgeclip.export import graph
from edgeclip.export.onnxruntime import Calibrated, calibrate, quantise
from edgeclip.metrics import l2_normalise
from edgeclip.progress import track
from edgeclip.target import Calibration, Target

PROBES = 32
"""calibration pictures a layer is judged on"""


class Quantisation(NamedTuple):
    calibration: np.ndarray
    """float32 [n, 3, H, W]"""
    calibrated: Calibrated
    nodes: list[str]
    """the layers that become int8"""
    float_layers: dict[str, float]
    """the candidates that stay in float, with the centred cosine that quantising each alone leaves"""
    int8_share: float
    """of the candidates' multiply-accumulates"""
    reduce_range: bool
    """7-bit weights, for an x86 without VNNI"""

    def record(self) -> dict[str, Any]:
        return {
            "float_layers": self.float_layers,
            "int8_layers": len(self.nodes),
            "int8_share_of_macs": self.int8_share,
            "reduce_range": self.reduce_range,
        }


def choose(model: onnx.ModelProto, calibration: np.ndarray, spec: Calibration, reduce_range: bool = False) -> Quantisation:
    """Calibrates once and picks the layers. calibration: float32 [n, 3, H, W]."""
    calibrated = calibrate(model, calibration, spec.method)
    products = graph.matrix_products(calibrated.model)
    probes = calibration[:PROBES]
    reference = _features(calibrated.model, probes)
    edge = products if len(products) <= 2 * spec.probe_layers else [*products[: spec.probe_layers], *products[-spec.probe_layers :]]
    damaged = {}
    for name in track(edge, "sensitivity of outer layers", len(edge)):
        cosine = _centred_cosine(_features(quantise(calibrated, [name], activations="uint8", reduce_range=reduce_range), probes), reference)
        if cosine < spec.layer_cosine:
            damaged[name] = round(cosine, 4)
    macs = graph.macs(calibrated.model, products, probes[:1])
    kept = [n for n in products if n not in damaged]
    return Quantisation(calibration, calibrated, kept, damaged, round(sum(macs[n] for n in kept) / sum(macs.values()), 4), reduce_range)


def reduced_range(target: Target) -> bool:
    """Do the weights get 7 bits? Raises `EdgeclipError` where the target leaves it to a machine that cannot tell."""
    if target.reduce_range == "as_host":
        saturates = machine.saturates(machine.facts())
        if saturates is None:
            raise EdgeclipError("reduce_range: as_host", "this machine's x86 instruction set cannot be read", "say always or never in a target of your own")
        return saturates
    return target.reduce_range == "always"


def _features(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return out


def _centred_cosine(features: np.ndarray, reference: np.ndarray) -> float:
    mean = reference.mean(axis=0)
    return float((l2_normalise(features - mean) * l2_normalise(reference - mean)).sum(axis=1).mean())
