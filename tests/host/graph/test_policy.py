"""What int8 would ruin stays in float, and no layer is asked twice."""

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper

from edgeclip.device.target import Calibration
from edgeclip.host.graph import policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.qdq import quantize
from tests.support.graphs import prepare, run

PLAIN = policy.Candidate("minmax", None, "all", None)


def choose(calibrated, images, form=PLAIN, float_layers=None, **spec):
    return policy.choose(
        calibrated.model, images, form, float_layers, Calibration(images=32, **spec)
    )


def test_a_layer_that_int8_would_ruin_stays_in_float(calibrated, images):
    strict = choose(calibrated, images, probe_layers=2, layer_cosine=1.0)
    products = graph.matrix_products(strict.calibrated.model)
    assert set(strict.float_layers) == {*products[:2], *products[-2:]} and strict.nodes == [
        products[2]
    ]
    free = choose(calibrated, images, probe_layers=2, layer_cosine=0.0)
    assert free.float_layers == {}
    assert free.nodes == products
    assert free.int8_share == 1.0
    macs = graph.macs(strict.calibrated.model, products, images[:1])
    assert abs(strict.int8_share - macs[products[2]] / sum(macs.values())) < 1e-3


def test_the_sensitivity_of_a_layer_is_its_own_and_not_the_machines(calibrated, images):
    """As the graph means it, without optimization and so in float: an x86 without VNNI would
    saturate on the first layer, and call it .85."""
    products = graph.matrix_products(calibrated.model)
    expected = run(calibrated.model, images)
    exact = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, left in policy.sensitivity(calibrated, products, images, "sensitivity").items():
        meant = run(quantize(calibrated, [name], activations="uint8"), images, exact)
        assert left > 0.99
        assert abs(left - policy.centered_cosine(meant, expected)) < 1e-3


def test_no_layer_is_probed_twice_or_judged_where_none_is_asked(calibrated, images):
    assert choose(calibrated, images, probe_layers=0).float_layers == {}


def test_bias_correction_brings_the_mean_of_every_convolution_back(images):
    import timm

    torch.manual_seed(0)
    tower = timm.create_model("mobilenetv4_conv_small_035", num_classes=8).eval()
    calibrated = prepare(tower, images, 19)
    first = graph.depthwise(calibrated.model)[:1]
    assert first
    corrected = policy.correct_bias(calibrated, first, images)
    output = next(n.output[0] for n in calibrated.model.graph.node if n.name == first[0])

    def mean(model):
        model = onnx.ModelProto.FromString(model.SerializeToString())
        del model.graph.output[:]
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
        )
        return run(model, images).mean(axis=(0, 2, 3))

    expected = mean(calibrated.model)
    rounded = {
        n: np.abs(mean(weights_only(c, first)) - expected).mean()
        for n, c in (("as it is", calibrated), ("corrected", corrected))
    }
    assert rounded["corrected"] < 0.01 * rounded["as it is"]


def weights_only(calibrated, nodes):
    """The float model with the named layers' weights rounded to int8."""
    model = onnx.ModelProto.FromString(calibrated.model.SerializeToString())
    rounded = graph.initializers(quantize(calibrated, nodes, activations="int8"))
    for i in model.graph.initializer:
        if f"{i.name}_quantized" in rounded and f"{i.name}_scale" in rounded:
            q = rounded[f"{i.name}_quantized"] * rounded[f"{i.name}_scale"].reshape(
                [-1] + [1] * (len(i.dims) - 1)
            )
            i.CopyFrom(numpy_helper.from_array(q.astype(np.float32), i.name))
    return model
