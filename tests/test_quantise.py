"""Int8 stands exactly where the policy put it, and the answers stay close."""

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import require, toy_input
from onnx import TensorProto
from torch import nn
from torch.nn import functional as F

from edgeclip import machine, target
from edgeclip.errors import EdgeclipError
from edgeclip.export import graph, policy, tensorrt
from edgeclip.export.half import to_fp16
from edgeclip.export.onnxruntime import calibrate, quantise, rounded_outputs
from edgeclip.fold import fold
from edgeclip.metrics import cosine
from edgeclip.runtime import open_session
from edgeclip.runtime.onnxruntime import LEVELS, disabled_optimizers
from edgeclip.target import Calibration


@pytest.fixture(scope="module")
def pictures():
    return np.stack([toy_input(i) for i in range(40)])


def prepare(student, pictures, opset):
    x = torch.from_numpy(pictures[:1])
    return calibrate(graph.to_onnx(fold(student, x), x, "pixels", "image_features", opset), pictures, "minmax")


@pytest.fixture(scope="module")
def calibrated(student, pictures):
    return prepare(student, pictures, 18)


def run(model, x, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
    content, options = model.SerializeToString(), ort.SessionOptions()
    options.graph_optimization_level = level
    options.add_session_config_entry("session.qdqisint8allowed", "1")  # as edgeclip.runtime: an x86 without VNNI would saturate
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled_optimizers(content))
    return session.run(None, {model.graph.input[0].name: x})[0]


def weights_in_int8(model):
    """Names of the products whose weight comes out of a DequantizeLinear of an int8 constant."""
    makers = {o: n for n in model.graph.node for o in n.output}
    constants = graph.initializers(model)
    products = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    return [
        n.name for n in products if (d := makers.get(n.input[1])) is not None and d.op_type == "DequantizeLinear" and constants[d.input[0]].dtype == np.int8
    ]


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_exactly_the_listed_layers_are_quantised(calibrated, activations):
    products = graph.matrix_products(calibrated.model)
    assert len(products) == 5
    for nodes in (products, products[1:], [products[2]]):
        model = quantise(calibrated, nodes, activations=activations)
        assert weights_in_int8(model) == nodes
        readers = {n.name: [m for m in model.graph.node if n.output[0] in m.input] for n in model.graph.node if n.op_type == "DequantizeLinear"}
        read = {r.name for rs in readers.values() for r in rs if r.op_type in ("Conv", "Gemm", "MatMul")}
        assert read >= set(nodes)
        for name in set(products) - set(nodes):  # a float layer's weight is float
            node = next(n for n in model.graph.node if n.name == name)
            assert graph.initializers(model)[node.input[1]].dtype == np.float32


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_int8_answers_are_close_to_the_float_ones(calibrated, pictures, student, activations, method):
    ready = calibrated if method == "minmax" else calibrate(calibrated.model, pictures, method)
    reduce_range = activations == "uint8" and policy.reduced_range(target.load("onnx-int8")[1])
    model = quantise(ready, graph.matrix_products(calibrated.model), activations=activations, reduce_range=reduce_range)
    fresh = np.stack([toy_input(900 + i) for i in range(60)])
    with torch.inference_mode():
        expected = student(torch.from_numpy(fresh)).numpy()
    found = cosine(run(model, fresh), expected)
    assert found["centred_p5"] > 0.98 and not np.array_equal(run(model, fresh), expected)


def test_no_layer_listed_is_the_float_model(calibrated, pictures):
    np.testing.assert_array_equal(run(quantise(calibrated, [], activations="uint8"), pictures[:4]), run(calibrated.model, pictures[:4]))


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_a_quantised_graph_is_valid_onnx(calibrated, activations):
    onnx.checker.check_model(quantise(calibrated, graph.matrix_products(calibrated.model), activations=activations))


def test_quantising_leaves_the_calibrated_model_alone(calibrated):
    before = calibrated.model.SerializeToString()
    quantise(calibrated, graph.matrix_products(calibrated.model), activations="uint8")
    assert calibrated.model.SerializeToString() == before


def test_a_weight_has_a_scale_for_each_output_channel_and_is_symmetric(calibrated):
    model = quantise(calibrated, graph.matrix_products(calibrated.model), activations="uint8")
    constants = graph.initializers(model)
    float_constants = graph.initializers(calibrated.model)
    makers = {o: n for n in model.graph.node for o in n.output}
    for name in weights_in_int8(model):
        node = next(n for n in model.graph.node if n.name == name)
        dequantise = makers[node.input[1]]
        values, scale, zero = (constants[i] for i in dequantise.input)
        axis = next(a.i for a in dequantise.attribute if a.name == "axis")
        assert scale.shape == (values.shape[axis],) and not zero.any()
        original = float_constants[next(n for n in calibrated.model.graph.node if n.name == name).input[1]]
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        assert (np.abs(values * scale.reshape(shape) - original) <= 0.51 * scale.reshape(shape)).all()


def test_a_relu6_stays_in_the_graph_with_its_bounds(calibrated):
    # Removed by the quantiser, its clipping was lost under ONNX Runtime's BASIC optimisation.
    def clips(model):
        return sorted(n.name for n in model.graph.node if n.op_type in ("Clip", "Relu"))

    model = quantise(calibrated, graph.matrix_products(calibrated.model), activations="uint8")
    assert clips(model) == clips(calibrated.model) != []


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_what_an_activation_cuts_off_takes_no_step_of_the_rounding(calibrated, activations, tmp_path):
    """A convolution behind which a ReLU6 comes is rounded once, behind it; ONNX Runtime then needs no ReLU6 and no float convolution."""
    nodes = graph.matrix_products(calibrated.model)
    model = quantise(calibrated, nodes, activations=activations)
    makers = {o: n for n in model.graph.node for o in n.output}
    convs = {n.name for n in model.graph.node if n.op_type == "Conv"}
    activated = [n for n in model.graph.node if n.op_type in ("Clip", "Relu") and n.name in {c.name for c in calibrated.model.graph.node}]
    once = {makers[n.input[0]].name for n in activated} & convs
    assert once == convs - rounded_outputs(calibrated.model, nodes) != set()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == len(convs) and kinds.count("Clip") + kinds.count("Relu") <= len(activated) - len(once)


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("for_tensorrt", [False, True])
def test_every_initializer_is_read_and_a_bare_session_has_nothing_to_warn_of(pictures, tmp_path, capfd, activations, for_tensorrt):
    ready = prepare(Residual().eval(), pictures, 19)  # its addition gets the float tensors back
    model = quantise(ready, graph.matrix_products(ready.model), activations=activations, for_tensorrt=for_tensorrt)
    assert {i.name for i in model.graph.initializer} <= {name for n in model.graph.node for name in n.input}
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert "not used by any node" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def tensorrt_form(student, pictures):
    calibrated = prepare(student, pictures, 19)
    return to_fp16(quantise(calibrated, graph.matrix_products(calibrated.model), activations="int8", for_tensorrt=True))


def test_tensorrts_form_has_zero_points_of_zero_and_no_int32_bias(tensorrt_form):
    constants = graph.initializers(tensorrt_form)
    linears = [n for n in tensorrt_form.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(linears) >= 10
    for n in linears:
        assert len(n.input) < 3 or (constants[n.input[2]].dtype == np.int8 and not constants[n.input[2]].any())
        assert n.input[0] not in constants or constants[n.input[0]].dtype == np.int8


def test_tensorrts_form_is_half_precision_inside_and_float_outside(tensorrt_form):
    norm = {i for n in tensorrt_form.graph.node if n.name in graph.after_last_product(tensorrt_form) for i in n.input}
    assert not [i.name for i in tensorrt_form.graph.initializer if i.data_type == TensorProto.FLOAT and i.name not in norm]
    assert {v.type.tensor_type.elem_type for v in [*tensorrt_form.graph.input, *tensorrt_form.graph.output]} == {TensorProto.FLOAT}
    onnx.checker.check_model(tensorrt_form)


def test_tensorrts_form_has_q_and_dq_on_both_operands_of_every_product(tensorrt_form):
    makers = {o: n.op_type for n in tensorrt_form.graph.node for o in n.output}
    products = [n for n in tensorrt_form.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert products and all(makers.get(n.input[0]) == makers.get(n.input[1]) == "DequantizeLinear" for n in products)


def test_tensorrts_form_still_answers_in_onnxruntime(tensorrt_form, pictures, calibrated):
    assert cosine(run(tensorrt_form, pictures), run(calibrated.model, pictures))["centred_p5"] > 0.97


class Faint(nn.Module):
    """A tower whose ranges are small, as batch norms leave them: the product of two scales, a bias's step, is no number in float16."""

    def __init__(self, shrink=(0.03, 0.1)):
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)])
        self.head = nn.Linear(32, 16)
        self.size = 1.0
        with torch.no_grad():
            for conv, by in zip(self.convolutions, shrink, strict=True):
                self.size *= by
                conv.weight.mul_(by)
                conv.bias.normal_().mul_(self.size)

    def forward(self, x):
        for conv in self.convolutions:
            x = conv(x).relu()
        return F.normalize(self.head(x.mean((2, 3)) / self.size), dim=-1)


def test_half_precision_q_dq_answers_as_its_float_form_at_every_level_of_optimisation(pictures, tmp_path):
    ready = prepare(Faint().eval(), pictures, 19)
    in_float = quantise(ready, graph.matrix_products(ready.model), activations="int8", for_tensorrt=True)
    path = tmp_path / "image_encoder.onnx"
    graph.save(to_fp16(in_float), path)
    assert disabled_optimizers(path) == disabled_optimizers(path.read_bytes()) != []

    def answers(content, level):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled_optimizers(content))
        return session.run(None, {"pixels": pictures})[0]

    found = {name: open_session("onnxruntime", path, 1, name).run(pictures) for name in LEVELS}
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, *LEVELS.values()):
        expected = answers(in_float.SerializeToString(), level)
        found[level] = answers(path.read_bytes(), level)
        assert cosine(found[level], expected)["centred_min"] > 0.98, level
    exact = found[ort.GraphOptimizationLevel.ORT_DISABLE_ALL]
    assert all(np.abs(answer - exact).max() < 1e-3 for answer in found.values())


def test_what_a_graph_holds_decides_what_must_not_be_done_to_it(calibrated, tensorrt_form):
    for model, half in ((calibrated.model, False), (to_fp16(calibrated.model), True), (tensorrt_form, True)):
        assert (disabled_optimizers(model.SerializeToString()) != []) is half
    content = tensorrt_form.SerializeToString()
    for broken in (b"", b"no model at all", content[: len(content) // 2], bytes(range(256)) * 8):
        assert disabled_optimizers(broken) == []


def test_float8_stands_where_int8_stood_and_keeps_the_ranges(calibrated, tensorrt_form, pictures):
    nodes = graph.matrix_products(calibrated.model)
    symmetric = quantise(calibrated, nodes, activations="int8", for_tensorrt=True)
    float8 = tensorrt.to_fp8(quantise(calibrated, nodes, activations="int8", for_tensorrt=True), calibrated.model)
    before, after, floats = graph.initializers(symmetric), graph.initializers(float8), graph.initializers(calibrated.model)
    assert [n.op_type for n in symmetric.graph.node] == [n.op_type for n in float8.graph.node]
    assert {str(after[n.input[2]].dtype) for n in float8.graph.node if n.op_type == "QuantizeLinear"} == {"float8_e4m3fn"}
    for name in before:
        if name.endswith("_quantized"):
            scale = after[name.removesuffix("_quantized") + "_scale"].reshape([-1] + [1] * (before[name].ndim - 1))
            original = floats[name.removesuffix("_quantized")]
            restored = after[name].astype(np.float32) * (scale if scale.shape[0] == original.shape[0] else scale.reshape(1, -1))
            assert (np.abs(restored - original) <= np.abs(original) / 16 + scale.max() * 2**-9).all()  # three bits of mantissa, then subnormals
        elif name.endswith("_scale"):
            np.testing.assert_allclose(after[name] * 448, before[name] * 127, rtol=1e-6)


@pytest.mark.parametrize(("reduce_range", "least", "most"), [(False, 100, 127), (True, 60, 64)])
def test_a_reduced_range_leaves_a_bit_of_every_weight_unused(calibrated, pictures, reduce_range, least, most):
    model = quantise(calibrated, graph.matrix_products(calibrated.model), activations="uint8", reduce_range=reduce_range)
    largest = [int(np.abs(v.astype(int)).max()) for k, v in graph.initializers(model).items() if k.endswith("_quantized") and v.dtype == np.int8]
    assert len(largest) == 5 and least <= min(largest) <= max(largest) <= most
    meant = run(model, pictures, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)  # in float: 8 bits saturate on an x86 without VNNI
    assert cosine(meant, run(calibrated.model, pictures))["centred_p5"] > 0.97


@pytest.mark.parametrize(
    ("arch", "isa", "expected"), [("x86_64", ["avx2"], True), ("x86_64", ["avx2", "avx_vnni"], False), ("aarch64", ["asimddp"], None), ("x86_64", None, None)]
)
def test_a_machine_saturates_where_it_is_an_x86_without_vnni(monkeypatch, arch, isa, expected):
    facts = {"arch": arch, "isa": isa}
    assert machine.saturates(facts) is expected
    monkeypatch.setattr(machine, "facts", lambda: facts)
    shipped = target.load("onnx-int8")[1]
    if expected is None:
        with pytest.raises(EdgeclipError, match="say always or never"):
            policy.reduced_range(shipped)
    else:
        assert policy.reduced_range(shipped) is expected
    assert policy.reduced_range(msgspec.structs.replace(shipped, reduce_range="always")) is True


PLAIN = policy.Form("minmax", None, "all", None)


def choose(calibrated, pictures, form=PLAIN, float_layers=None, **spec):
    return policy.choose(calibrated.model, pictures, form, float_layers, Calibration(pictures=32, **spec))


def test_a_layer_that_int8_would_ruin_stays_in_float(calibrated, pictures):
    strict = choose(calibrated, pictures, probe_layers=2, layer_cosine=1.0)
    products = graph.matrix_products(strict.calibrated.model)
    assert set(strict.float_layers) == {*products[:2], *products[-2:]} and strict.nodes == [products[2]]
    free = choose(calibrated, pictures, probe_layers=2, layer_cosine=0.0)
    assert free.float_layers == {} and free.nodes == products and free.int8_share == 1.0
    macs = graph.macs(strict.calibrated.model, products, pictures[:1])
    assert abs(strict.int8_share - macs[products[2]] / sum(macs.values())) < 1e-3


def test_the_damage_of_a_layer_is_its_own_and_not_the_machines(calibrated, pictures):
    """As the graph means it, without optimisation and so in float: an x86 without VNNI would saturate on the first layer, and call it .85."""
    products = graph.matrix_products(calibrated.model)
    expected, exact = run(calibrated.model, pictures), ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, left in policy.damage(calibrated, products, pictures, "damage").items():
        meant = run(quantise(calibrated, [name], activations="uint8"), pictures, exact)
        assert left > 0.99 and abs(left - policy.centred_cosine(meant, expected)) < 1e-3


def test_no_layer_is_probed_twice_or_judged_where_none_is_asked(calibrated, pictures):
    assert choose(calibrated, pictures, probe_layers=0).float_layers == {}


def test_openvino_takes_a_bit_off_every_weight_where_the_machine_saturates(pictures, tmp_path):
    require("nncf", "pip install 'edgeclip[openvino]'")
    import openvino as ov

    from edgeclip.export import openvino

    asked = target.load("openvino-int8")[1]
    model = graph.to_onnx(Residual().eval(), torch.from_numpy(pictures[:1]), "pixels", "image_features", 18)
    largest = {}
    for reduce_range in (False, True):
        chosen = policy.choose(model, pictures, PLAIN, {}, asked.calibration, reduce_range, own_bias=False)
        folder = tmp_path / str(reduce_range)
        folder.mkdir()
        written = ov.Core().read_model(folder / openvino.write(model, asked, chosen, folder))
        weights = [op.data for op in written.get_ordered_ops() if op.get_type_name() == "Constant" and op.get_element_type() == ov.Type.i8]
        largest[reduce_range] = [int(np.abs(w.astype(int)).max()) for w in weights]
    assert len(largest[True]) == len(largest[False]) == 4
    assert max(largest[True]) <= 64 and max(largest[False]) == 127


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 16)

    def forward(self, x):
        x = self.stem(x).relu()
        return F.normalize(self.head((x + self.branch(x)).mean((2, 3))), dim=-1)


@pytest.mark.parametrize(("layers", "rounded"), [("all", 0), ("residual", 2)])
def test_openvino_rounds_a_residual_additions_operands_only_where_the_form_says_so(pictures, tmp_path, layers, rounded):
    require("nncf", "pip install 'edgeclip[openvino]'")
    import openvino as ov

    from edgeclip.export import openvino

    torch.manual_seed(0)
    asked = target.load("openvino-int8")[1]
    model = graph.to_onnx(Residual().eval(), torch.from_numpy(pictures[:1]), "pixels", "image_features", 18)
    chosen = policy.choose(model, pictures, policy.Form("minmax", None, layers, None), {}, asked.calibration, False, own_bias=False)
    written = ov.Core().read_model(tmp_path / openvino.write(model, asked, chosen, tmp_path))
    additions = [op for op in written.get_ordered_ops() if op.get_type_name() == "Add"]
    operands = [[v.get_node().get_type_name() for v in op.input_values()] for op in additions]
    [residual] = [o for o in operands if "Constant" not in o and "Convert" not in o]  # the others add a bias
    assert residual.count("FakeQuantize") == rounded
