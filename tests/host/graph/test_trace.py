"""Graph surgery keeps the answers, and layers are counted and named as they are."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from edgeclip.host.graph import trace as graph


def weight(name, *shape, seed=0):
    return numpy_helper.from_array(
        np.random.default_rng(seed).normal(size=shape).astype(np.float32), name
    )


def ints(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def model(nodes, constants, shape, outputs=("y",)):
    for i, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}_{i}"
    g = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        constants,
    )
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(m, x):
    return ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )


def x(*shape):
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


def padded(pads, own=None, mode=None, value=None, outputs=("y",), extra=()):
    conv = helper.make_node("Conv", ["p", "w"], ["y"], **({"pads": own} if own else {}))
    constants = [weight("w", 4, 3, 3, 3), ints("pads", *pads)]
    inputs = ["x", "pads"]
    if value is not None:
        constants.append(numpy_helper.from_array(np.float32(value), "value"))
        inputs.append("value")
    pad = helper.make_node("Pad", inputs, ["p"], **({"mode": mode} if mode else {}))
    return model([pad, conv, *extra], constants, [1, 3, 9, 8], outputs)


@pytest.mark.parametrize("own", [None, [1, 0, 2, 1]])
@pytest.mark.parametrize("value", [None, 0.0])
def test_zero_padding_moves_into_the_convolution(own, value):
    m = padded([0, 0, 1, 2, 0, 0, 3, 0], own, value=value)
    before = run(m, x(1, 3, 9, 8))[0]
    graph.merge_pads(m)
    assert [n.op_type for n in m.graph.node] == ["Conv"]
    np.testing.assert_allclose(run(m, x(1, 3, 9, 8))[0], before, atol=1e-6)


@pytest.mark.parametrize(
    "m",
    [
        padded([0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"),
        padded([0, 0, 1, 1, 0, 0, 1, 1], value=1.5),
        padded([0, 0, 1, 1, 0, 0, 1, 1], outputs=("y", "p")),
        padded(
            [0, 0, 1, 1, 0, 0, 1, 1],
            outputs=("y", "z"),
            extra=[helper.make_node("Relu", ["p"], ["z"])],
        ),
    ],
    ids=["reflect", "ones", "padded tensor is an output", "two readers"],
)
def test_any_other_padding_stays(m):
    before = run(m, x(1, 3, 9, 8))
    graph.merge_pads(m)
    assert "Pad" in [n.op_type for n in m.graph.node]
    for a, b in zip(run(m, x(1, 3, 9, 8)), before, strict=True):
        np.testing.assert_array_equal(a, b)


class SamePadding(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, pixels):
        return self.conv(F.pad(pixels, (0, 1, 0, 1))).mean(dim=(2, 3))


def test_a_traced_module_is_equal_at_any_batch_and_has_one_named_input_and_output():
    module = SamePadding().eval()
    m = graph.to_onnx(module, torch.zeros(1, 3, 8, 8), "x", "features", 18)
    assert "Pad" not in [n.op_type for n in m.graph.node] and [o.name for o in m.graph.output] == [
        "features"
    ]
    assert m.ir_version == graph.IR_VERSION and m.opset_import[0].version == 18
    for batch in (1, 2, 5):
        data = x(batch, 3, 8, 8)
        np.testing.assert_allclose(
            run(m, data)[0], module(torch.from_numpy(data)).detach().numpy(), atol=1e-5
        )


def attention():
    """x [B, 4, 6]: a linear layer, a product of two activations, a Gemm without and with transB."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], "linear"),
        helper.make_node("Transpose", ["x"], ["t"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "t"], ["a"], "attention"),
        helper.make_node("ReduceMean", ["a", "axis"], ["m"], "mean", keepdims=0),
        helper.make_node("Gemm", ["m", "g"], ["h"], "gemm"),
        helper.make_node("Gemm", ["h", "gt"], ["y"], "gemm_t", transB=1),
    ]
    constants = [weight("w", 6, 6), ints("axis", 1), weight("g", 4, 5), weight("gt", 7, 5)]
    return model(nodes, constants, [1, 4, 6])


def test_products_of_two_activations_are_no_matrix_products_for_int8():
    assert graph.matrix_products(attention()) == ["linear", "gemm", "gemm_t"]


def test_multiply_accumulates_of_matrix_products_by_hand():
    assert graph.macs(attention(), ["linear", "gemm", "gemm_t"], x(1, 4, 6)) == {
        "linear": 4 * 6 * 6,
        "gemm": 4 * 5,
        "gemm_t": 5 * 7,
    }


@pytest.mark.parametrize("groups", [1, 3])
def test_multiply_accumulates_of_a_convolution_are_torchs(groups):
    from edgeclip.host.towers.counting import macs

    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=groups, bias=False)
    ).eval()
    m = graph.to_onnx(module, torch.zeros(1, 3, 16, 16), "x", "y", 18)
    (count,) = graph.macs(m, graph.matrix_products(m), x(1, 3, 16, 16)).values()
    assert count == 6 * 8 * 8 * (3 // groups) * 9 == macs(module, 16)


def test_constants_are_found_as_initializers_and_as_nodes():
    node = helper.make_node("Constant", [], ["k"], value=weight("", 2, 2))
    found = graph.initializers(
        model(
            [
                node,
                helper.make_node("MatMul", ["x", "k"], ["h"]),
                helper.make_node("MatMul", ["h", "i"], ["y"]),
            ],
            [weight("i", 2, 2, seed=1)],
            [1, 2],
        )
    )
    assert set(found) == {"k", "i"} and found["k"].shape == (2, 2)


def test_an_embedding_table_becomes_int8_with_a_scale_for_each_row():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(500, 16)
            with torch.no_grad():
                self.table.weight.mul_(torch.logspace(-4, 1, 500)[:, None])  # rare tokens are small
            self.places = nn.Parameter(torch.randn(6, 16))

        def forward(self, ids):
            return self.table(ids) + self.places

    ids = torch.randint(0, 500, (3, 6), generator=torch.Generator().manual_seed(1))
    m = graph.to_onnx(Text().eval(), ids, "x", "y", 18)
    small = graph.int8_embeddings(m)
    assert {
        k: v.dtype for k, v in graph.initializers(small).items() if v.shape == (500, 16)
    }.popitem()[1] == np.int8
    table, places = (p.detach().numpy() for p in (Text().table.weight, Text().places))
    error = np.abs(run(small, ids.numpy())[0] - table[ids] - places)
    assert (
        error <= np.abs(table[ids]).max(axis=-1, keepdims=True) / 254 + 1e-6
    ).all()  # half a step of its own row
    assert small.ByteSize() < 0.45 * m.ByteSize() and run(m, ids.numpy())[0].shape == (3, 6, 16)
