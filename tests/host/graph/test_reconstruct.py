"""Learned rounding answers closer than the nearest, on the integers that every runtime finds."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeclip.device import target
from edgeclip.host.graph import blocks, differentiable, policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.fake_quantize import FakeQuantize, LearnedRounding
from edgeclip.host.graph.qdq import calibrate, quantize
from edgeclip.host.graph.reconstruct import Form, reconstruct
from edgeclip.host.graph.view import GraphView, run_model
from tests.support.optional import require
from tests.support.toy_bundle import toy_input

FORMS = [Form(*values, False, r) for *values, r in itertools.product((False, True), repeat=3)]
"""of the runtimes that ONNX Runtime's quantizer writes for"""
ONNX = Form(symmetric=False, outputs=True, nncf=False, reduce_range=False)


@pytest.fixture(scope="module")
def photos():
    return np.stack([toy_input(i) for i in range(72)])


def to_graph(module):
    return graph.to_onnx(module.eval(), torch.zeros(1, 3, 32, 32), "pixels", "image_features", 18)


def small(name, **options):
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=16, **options)


TOWERS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 8)),
    "depthwise": lambda: small("efficientnet_lite0"),
    "squeeze and excitation": lambda: small("mobilenetv3_small_050"),
    "attention": lambda: small("vit_tiny_patch16_224", img_size=32, depth=2),
    "hybrid": lambda: small("fastvit_t8"),
    "channels last": lambda: small("convnext_atto"),
    "reparameterized": lambda: small("repvit_m0_9"),
    "linear attention": lambda: small("efficientvit_b0"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_the_blocks_one_after_the_other_are_the_graph(photos, name):
    model = calibrate(to_graph(TOWERS[name]()), photos[:16], "minmax").model
    view = GraphView(model)
    layers = set(graph.matrix_products(model))
    found = blocks.cut(view, layers)
    assert not blocks.unsupported(view)
    assert len(found) > 1
    inside = [sum(node.name in layers for node in block.nodes) for block in found]
    assert sum(inside) == len(layers) and all(inside)
    constants = blocks.static(view, blocks.flowing(view), photos[:4])
    y = torch.from_numpy(photos[:4])
    for block in found:
        values = {**constants, block.source: y}
        for node in block.nodes:
            differentiable.compute(node, values)
        y = values[block.result]
    expected = run_model(model, {"pixels": photos[:4]})["image_features"]
    assert np.abs(y.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_gradient_passes_through_every_block(photos):
    model = to_graph(TOWERS["attention"]())
    view = GraphView(model)
    constants = blocks.static(view, blocks.flowing(view), photos[:2])
    for block in blocks.cut(view, set(graph.matrix_products(model))):
        shape = photos[:2].shape
        if block.source != "pixels":
            shape = run_probe(model, block.source, photos[:2]).shape
        x = torch.randn(shape, requires_grad=True)
        values = {**constants, block.source: x}
        for node in block.nodes:
            differentiable.compute(node, values)
        values[block.result].square().sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def run_probe(model, name, x):
    from edgeclip.host.graph.view import probe

    return run_model(probe(model, [name]), {"pixels": x})[name]


def test_a_weight_moves_by_less_than_a_step_and_the_largest_not_at_all():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    scale = weight.flatten(1).abs().amax(1).reshape(-1, 1, 1, 1) / 127
    rounding = LearnedRounding(weight, scale, 127.0)
    torch.testing.assert_close(rounding(), weight, rtol=0, atol=1e-4)  # it begins where it was
    with torch.no_grad():
        rounding.direction.copy_(torch.randn_like(weight) * 9)
    hard = rounding(hard=True)
    steps = hard / scale
    assert (steps - steps.round()).abs().max() < 1e-3
    assert ((hard - weight).abs() < scale * 1.001).all()
    torch.testing.assert_close(hard.flatten(1).abs().amax(1), weight.flatten(1).abs().amax(1))


def test_the_regularizer_is_0_where_all_is_decided_and_1_halfway():
    rounding = LearnedRounding(torch.full((2, 2), 0.5), torch.ones(2, 1), 127.0)
    assert rounding.undecided(2.0).item() == pytest.approx(1)
    with torch.no_grad():
        rounding.direction.copy_(torch.tensor([[9.0, -9.0], [9.0, -9.0]]))
    assert rounding.undecided(2.0).item() == pytest.approx(0, abs=1e-6)
    assert rounding(hard=True).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_range_of_a_scale_gives_the_scale_again(symmetric):
    first = FakeQuantize(-0.7, 2.1, symmetric)
    again = FakeQuantize(*first.range(), symmetric)
    assert again.log_scale.item() == pytest.approx(first.log_scale.item(), abs=1e-6)
    assert again.zero_point == first.zero_point


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_quantizer_finds_the_integers_that_were_learned(calibrated, photos, form):
    nodes = graph.matrix_products(calibrated.model)[1:]
    learned = reconstruct(calibrated, nodes, photos, form, steps=8)
    options = {"for_tensorrt": form.symmetric, "reduce_range": form.reduce_range}
    written = GraphView(quantize(learned, nodes, activations="int8", **options))
    plain = GraphView(quantize(calibrated, nodes, activations="int8", **options))
    view = GraphView(learned.model)
    old = GraphView(calibrated.model)
    moved = 0
    for name in nodes:
        weight = view.nodes[name].input[1]
        before = old.nodes[name].input[1]
        integers = written.value(f"{weight}_quantized").astype(int)
        scale = written.value(f"{weight}_scale")
        np.testing.assert_allclose(scale, plain.value(f"{before}_scale"), rtol=1e-6)
        moved += int((integers != plain.value(f"{before}_quantized")).sum())
        assert np.abs(integers - plain.value(f"{before}_quantized")).max() <= 1
        assert np.abs(integers).max() <= (64 if form.reduce_range else 127)
    assert moved
    first = graph.matrix_products(calibrated.model)[0]  # stays in float
    weights = (view.value(view.nodes[first].input[1]), old.value(old.nodes[first].input[1]))
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize("reduce_range", [False, True])
def test_openvino_finds_them_too(photos, tmp_path, reduce_range):
    require("nncf", "pip install 'edgeclip[openvino]'")
    import openvino as ov

    from edgeclip.host.export import openvino

    asked = target.load("openvino-int8")[1]
    model = to_graph(TOWERS["plain"]())
    plain = policy.Candidate("minmax", None, "all", None, "learned")
    form = Form(symmetric=False, outputs=False, nncf=True, reduce_range=reduce_range)
    chosen = policy.choose(
        model, photos, plain, {}, asked.calibration, reduce_range, own_bias=False, form=form
    )
    written = ov.Core().read_model(tmp_path / openvino.write(model, asked, chosen, tmp_path))
    stored = [op.data for op in written.get_ordered_ops() if op.get_type_name() == "Constant"]
    found = sorted((w for w in stored if w.dtype == np.int8), key=np.size)
    view = GraphView(chosen.calibrated.model)
    top = 63.5 if reduce_range else 127
    expected = []
    for name in chosen.nodes:
        weight = view.value(view.nodes[name].input[1])
        flat = np.abs(weight.reshape(len(weight), -1)).max(axis=1)
        scale = flat.reshape(-1, *[1] * (weight.ndim - 1)) / top
        expected.append(np.round(weight / scale).astype(int))
    expected.sort(key=np.size)
    assert [w.size for w in found] == [w.size for w in expected]
    for ours, theirs in zip(expected, found, strict=True):
        ordered = np.sort(ours, axis=None)
        apart = np.abs(ordered - np.sort(theirs.astype(int), axis=None))
        # Its 7 bits end at 63 on one side and at 64 on the other.
        assert apart.max() <= int(reduce_range)
        assert (np.abs(ordered[apart > 0]) >= 62).all()


@pytest.mark.parametrize("name", ["squeeze and excitation", "attention"])
def test_learned_rounding_is_closer_than_the_nearest_with_corrected_biases(photos, name):
    model = to_graph(TOWERS[name]())
    fresh = np.stack([toy_input(500 + i) for i in range(40)])
    expected = policy.features(model, fresh)
    spec = target.Calibration(images=64, probe_layers=0, reconstruction=40)
    error = {}
    for rounding in ("nearest", "learned"):
        candidate = policy.Candidate("minmax", None, "all", None, rounding)
        chosen = policy.choose(
            model, photos, candidate, {}, spec, True, form=ONNX._replace(reduce_range=True)
        )
        written = quantize(chosen.calibrated, chosen.nodes, activations="int8", reduce_range=True)
        error[rounding] = 1 - policy.centered_cosine(policy.features(written, fresh), expected)
    assert error["learned"] < 0.95 * error["nearest"]


def test_equal_inputs_give_equal_weights(calibrated, photos):
    nodes = graph.matrix_products(calibrated.model)
    first, second = (reconstruct(calibrated, nodes, photos, ONNX, steps=5) for _ in range(2))
    assert first.model.SerializeToString() == second.model.SerializeToString()


class Dense(nn.Module):
    """Every layer reads what all layers before it have put out: there is no cut inside."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, 1, 1) for i in range(depth))

    def forward(self, x):
        found = [x[:, :, ::4, ::4]]
        for layer in self.layers:
            found.append(F.relu(layer(torch.cat(found, dim=1))))
        return torch.cat(found, dim=1).mean(dim=(2, 3))


@pytest.mark.parametrize(("depth", "says"), [(3, ""), (14, "layer by layer")])
def test_a_tower_without_blocks_is_learned_layer_by_layer(photos, capsys, depth, says):
    torch.manual_seed(0)
    model = to_graph(Dense(depth))
    calibrated = calibrate(model, photos, "minmax")
    nodes = graph.matrix_products(calibrated.model)
    assert len(nodes) == depth
    learned = reconstruct(calibrated, nodes, photos, ONNX, steps=150)
    assert says in capsys.readouterr().err
    expected = policy.features(model, photos)
    near, better = (
        np.square(
            policy.features(quantize(c, nodes, activations="uint8"), photos) - expected
        ).mean()
        for c in (calibrated, learned)
    )
    assert better <= near


def test_an_operator_without_a_gradient_is_named():
    class Pooled(nn.Module):
        def forward(self, x):
            return F.max_pool2d(x, 4).flatten(1)

    assert blocks.unsupported(GraphView(to_graph(Pooled()))) == ["MaxPool"]


def test_padding_by_reflection_has_no_gradient_either():
    class Padded(nn.Module):
        def forward(self, x):
            return F.pad(x, (1, 1, 1, 1), mode="reflect").flatten(1)

    assert blocks.unsupported(GraphView(to_graph(Padded()))) == ["Pad"]
