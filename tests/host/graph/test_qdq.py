"""Int8 stands exactly where the policy put it, and the answers stay close."""

import dataclasses

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeclip.device import machine, target
from edgeclip.device.metrics import cosine
from edgeclip.errors import EdgeclipError
from edgeclip.host.export import tensorrt
from edgeclip.host.graph import policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.qdq import calibrate, quantize, rounded_outputs
from tests.support.graphs import prepare, run, weights_in_int8
from tests.support.optional import require
from tests.support.toy_bundle import toy_input


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_exactly_the_listed_layers_are_quantized(calibrated, activations):
    products = graph.matrix_products(calibrated.model)
    assert len(products) == 5
    for nodes in (products, products[1:], [products[2]]):
        model = quantize(calibrated, nodes, activations=activations)
        assert weights_in_int8(model) == nodes
        readers = {
            n.name: [m for m in model.graph.node if n.output[0] in m.input]
            for n in model.graph.node
            if n.op_type == "DequantizeLinear"
        }
        read = {
            r.name for rs in readers.values() for r in rs if r.op_type in ("Conv", "Gemm", "MatMul")
        }
        assert read >= set(nodes)
        for name in set(products) - set(nodes):  # a float layer's weight is float
            node = next(n for n in model.graph.node if n.name == name)
            assert graph.initializers(model)[node.input[1]].dtype == np.float32


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_int8_answers_are_close_to_the_float_ones(calibrated, images, student, activations, method):
    ready = calibrated if method == "minmax" else calibrate(calibrated.model, images, method)
    reduce_range = activations == "uint8" and policy.reduced_range(target.load("onnx-int8")[1])
    model = quantize(
        ready,
        graph.matrix_products(calibrated.model),
        activations=activations,
        reduce_range=reduce_range,
    )
    fresh = np.stack([toy_input(900 + i) for i in range(60)])
    with torch.inference_mode():
        expected = student(torch.from_numpy(fresh)).numpy()
    found = cosine(run(model, fresh), expected)
    assert found.centered_p5 > 0.98 and not np.array_equal(run(model, fresh), expected)


def test_no_layer_listed_is_the_float_model(calibrated, images):
    np.testing.assert_array_equal(
        run(quantize(calibrated, [], activations="uint8"), images[:4]),
        run(calibrated.model, images[:4]),
    )


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_a_quantized_graph_is_valid_onnx(calibrated, activations):
    onnx.checker.check_model(
        quantize(calibrated, graph.matrix_products(calibrated.model), activations=activations)
    )


def test_quantizing_leaves_the_calibrated_model_alone(calibrated):
    before = calibrated.model.SerializeToString()
    quantize(calibrated, graph.matrix_products(calibrated.model), activations="uint8")
    assert calibrated.model.SerializeToString() == before


def test_a_weight_has_a_scale_for_each_output_channel_and_is_symmetric(calibrated):
    model = quantize(calibrated, graph.matrix_products(calibrated.model), activations="uint8")
    constants = graph.initializers(model)
    float_constants = graph.initializers(calibrated.model)
    makers = {o: n for n in model.graph.node for o in n.output}
    for name in weights_in_int8(model):
        node = next(n for n in model.graph.node if n.name == name)
        dequantize = makers[node.input[1]]
        values, scale, zero = (constants[i] for i in dequantize.input)
        axis = next(a.i for a in dequantize.attribute if a.name == "axis")
        assert scale.shape == (values.shape[axis],) and not zero.any()
        original = float_constants[
            next(n for n in calibrated.model.graph.node if n.name == name).input[1]
        ]
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        assert (
            np.abs(values * scale.reshape(shape) - original) <= 0.51 * scale.reshape(shape)
        ).all()


def test_a_relu6_stays_in_the_graph_with_its_bounds(calibrated):
    # Removed by the quantizer, its clipping was lost under ONNX Runtime's BASIC optimization.
    def clips(model):
        return sorted(n.name for n in model.graph.node if n.op_type in ("Clip", "Relu"))

    model = quantize(calibrated, graph.matrix_products(calibrated.model), activations="uint8")
    assert clips(model) == clips(calibrated.model) != []


@pytest.mark.parametrize("method", ["minmax", "entropy"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_a_convolution_before_a_float_reader_is_rounded_within_its_activation(activation, method):
    """The mean reads the activation in float, so the convolution's own output is rounded: to what
    the activation lets through.
    """
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        tower[0].weight *= 20
    x = torch.randn(32, 3, 16, 16)
    model = graph.to_onnx(tower.eval(), x[:1], "pixels", "image_features", 18)
    ready = calibrate(model, x.numpy(), method)
    [conv] = [n for n in ready.model.graph.node if n.op_type == "Conv"]
    low, high = (float(np.asarray(v).item()) for v in ready.ranges[conv.output[0]].range_value)
    with torch.inference_mode():
        before = tower[0](x)
        expected = tower(x).numpy()
    assert before.min() < -20 and before.max() > 20
    assert low == 0.0
    assert high == 6.0 if isinstance(activation, nn.ReLU6) else high > 6.0
    found = run(quantize(ready, [conv.name], activations="int8"), x.numpy())
    assert np.abs(found - expected).max() < (high - low) / 255


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_what_an_activation_cuts_off_takes_no_step_of_the_rounding(
    calibrated, activations, tmp_path
):
    """A convolution behind which a ReLU6 comes is rounded once, behind it; ONNX Runtime then needs
    no ReLU6 and no float convolution.
    """
    nodes = graph.matrix_products(calibrated.model)
    model = quantize(calibrated, nodes, activations=activations)
    makers = {o: n for n in model.graph.node for o in n.output}
    convs = {n.name for n in model.graph.node if n.op_type == "Conv"}
    activated = [
        n
        for n in model.graph.node
        if n.op_type in ("Clip", "Relu") and n.name in {c.name for c in calibrated.model.graph.node}
    ]
    once = {makers[n.input[0]].name for n in activated} & convs
    assert once == convs - rounded_outputs(calibrated.model, nodes) != set()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == len(convs) and kinds.count("Clip") + kinds.count(
        "Relu"
    ) <= len(activated) - len(once)


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("for_tensorrt", [False, True])
def test_every_initializer_is_read_and_a_bare_session_has_nothing_to_warn_of(
    images, tmp_path, capfd, activations, for_tensorrt
):
    ready = prepare(Residual().eval(), images, 19)  # its addition gets the float tensors back
    model = quantize(
        ready,
        graph.matrix_products(ready.model),
        activations=activations,
        for_tensorrt=for_tensorrt,
    )
    assert {i.name for i in model.graph.initializer} <= {
        name for n in model.graph.node for name in n.input
    }
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert "not used by any node" not in capfd.readouterr().err


def test_tensorrts_form_has_zero_points_of_zero_and_no_int32_bias(tensorrt_form):
    constants = graph.initializers(tensorrt_form)
    linears = [
        n for n in tensorrt_form.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert len(linears) >= 10
    for n in linears:
        assert len(n.input) < 3 or (
            constants[n.input[2]].dtype == np.int8 and not constants[n.input[2]].any()
        )
        assert n.input[0] not in constants or constants[n.input[0]].dtype == np.int8


def test_tensorrts_form_has_q_and_dq_on_both_operands_of_every_product(tensorrt_form):
    makers = {o: n.op_type for n in tensorrt_form.graph.node for o in n.output}
    products = [n for n in tensorrt_form.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert products and all(
        makers.get(n.input[0]) == makers.get(n.input[1]) == "DequantizeLinear" for n in products
    )


def test_tensorrts_form_still_answers_in_onnxruntime(tensorrt_form, images, calibrated):
    assert cosine(run(tensorrt_form, images), run(calibrated.model, images)).centered_p5 > 0.97


def test_float8_stands_where_int8_stood_and_keeps_the_ranges(calibrated, tensorrt_form, images):
    nodes = graph.matrix_products(calibrated.model)
    symmetric = quantize(calibrated, nodes, activations="int8", for_tensorrt=True)
    float8 = tensorrt.to_fp8(
        quantize(calibrated, nodes, activations="int8", for_tensorrt=True), calibrated.model
    )
    before, after, floats = (
        graph.initializers(symmetric),
        graph.initializers(float8),
        graph.initializers(calibrated.model),
    )
    assert [n.op_type for n in symmetric.graph.node] == [n.op_type for n in float8.graph.node]
    assert {
        str(after[n.input[2]].dtype) for n in float8.graph.node if n.op_type == "QuantizeLinear"
    } == {"float8_e4m3fn"}
    for name in before:
        if name.endswith("_quantized"):
            scale = after[name.removesuffix("_quantized") + "_scale"].reshape(
                [-1] + [1] * (before[name].ndim - 1)
            )
            original = floats[name.removesuffix("_quantized")]
            restored = after[name].astype(np.float32) * (
                scale if scale.shape[0] == original.shape[0] else scale.reshape(1, -1)
            )
            assert (
                np.abs(restored - original) <= np.abs(original) / 16 + scale.max() * 2**-9
            ).all()  # three bits of mantissa, then subnormals
        elif name.endswith("_scale"):
            np.testing.assert_allclose(after[name] * 448, before[name] * 127, rtol=1e-6)


@pytest.mark.parametrize(("reduce_range", "least", "most"), [(False, 100, 127), (True, 60, 64)])
def test_a_reduced_range_leaves_a_bit_of_every_weight_unused(
    calibrated, images, reduce_range, least, most
):
    model = quantize(
        calibrated,
        graph.matrix_products(calibrated.model),
        activations="uint8",
        reduce_range=reduce_range,
    )
    largest = [
        int(np.abs(v.astype(int)).max())
        for k, v in graph.initializers(model).items()
        if k.endswith("_quantized") and v.dtype == np.int8
    ]
    assert len(largest) == 5 and least <= min(largest) <= max(largest) <= most
    meant = run(
        model, images, ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # in float: 8 bits saturate on an x86 without VNNI
    assert cosine(meant, run(calibrated.model, images)).centered_p5 > 0.97


@pytest.mark.parametrize(
    ("arch", "isa", "expected"),
    [
        ("x86_64", ["avx2"], True),
        ("x86_64", ["avx2", "avx_vnni"], False),
        ("aarch64", ["asimddp"], None),
        ("x86_64", None, None),
    ],
)
def test_a_machine_saturates_where_it_is_an_x86_without_vnni(monkeypatch, arch, isa, expected):
    facts = dataclasses.replace(machine.facts(), arch=arch, isa=isa)
    assert machine.saturates(facts) is expected
    monkeypatch.setattr(machine, "facts", lambda: facts)
    shipped = target.load("onnx-int8")[1]
    if expected is None:
        with pytest.raises(EdgeclipError, match="set it to always or never"):
            policy.reduced_range(shipped)
    else:
        assert policy.reduced_range(shipped) is expected
    assert policy.reduced_range(msgspec.structs.replace(shipped, reduce_range="always")) is True


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.head = nn.Linear(8, 16)

    def forward(self, x):
        x = self.stem(x).relu()
        return F.normalize(self.head((x + self.branch(x)).mean((2, 3))), dim=-1)


@pytest.mark.parametrize(("layers", "rounded"), [("all", 0), ("residual", 2)])
def test_openvino_rounds_a_residual_additions_operands_only_where_the_form_says_so(
    images, tmp_path, layers, rounded
):
    require("nncf", "pip install 'edgeclip[openvino]'")
    import openvino as ov

    from edgeclip.host.export import openvino

    torch.manual_seed(0)
    asked = target.load("openvino-int8")[1]
    model = graph.to_onnx(
        Residual().eval(), torch.from_numpy(images[:1]), "pixels", "image_features", 18
    )
    chosen = policy.choose(
        model,
        images,
        policy.Candidate("minmax", None, layers, None),
        {},
        asked.calibration,
        False,
        own_bias=False,
    )
    written = ov.Core().read_model(tmp_path / openvino.write(model, asked, chosen, tmp_path))
    additions = [op for op in written.get_ordered_ops() if op.get_type_name() == "Add"]
    operands = [[v.get_node().get_type_name() for v in op.input_values()] for op in additions]
    [residual] = [
        o for o in operands if "Constant" not in o and "Convert" not in o
    ]  # the others add a bias
    assert residual.count("FakeQuantize") == rounded


def test_openvino_takes_a_bit_off_every_weight_where_the_machine_saturates(images, tmp_path):
    require("nncf", "pip install 'edgeclip[openvino]'")
    import openvino as ov

    from edgeclip.host.export import openvino

    asked = target.load("openvino-int8")[1]
    example = torch.from_numpy(images[:1])
    model = graph.to_onnx(Residual().eval(), example, "pixels", "image_features", 18)
    plain = policy.Candidate("minmax", None, "all", None)
    largest = {}
    for reduce_range in (False, True):
        chosen = policy.choose(
            model, images, plain, {}, asked.calibration, reduce_range, own_bias=False
        )
        folder = tmp_path / str(reduce_range)
        folder.mkdir()
        written = ov.Core().read_model(folder / openvino.write(model, asked, chosen, folder))
        constants = [op for op in written.get_ordered_ops() if op.get_type_name() == "Constant"]
        weights = [op.data for op in constants if op.get_element_type() == ov.Type.i8]
        largest[reduce_range] = [int(np.abs(w.astype(int)).max()) for w in weights]
    assert len(largest[True]) == len(largest[False]) == 4
    assert max(largest[True]) <= 64
    assert max(largest[False]) == 127
