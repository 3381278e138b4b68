"""Half precision inside, float outside, and the answers of the float form at every level of
optimization.
"""

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto
from torch import nn
from torch.nn import functional as F

from edgeclip.device.metrics import cosine
from edgeclip.device.runtime import open_session
from edgeclip.device.runtime.onnxruntime import LEVELS, disabled_optimizers
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.float16 import to_fp16
from edgeclip.host.graph.qdq import quantize
from tests.support.graphs import prepare


def test_tensorrts_form_is_half_precision_inside_and_float_outside(tensorrt_form):
    norm = {
        i
        for n in tensorrt_form.graph.node
        if n.name in graph.after_last_product(tensorrt_form)
        for i in n.input
    }
    assert not [
        i.name
        for i in tensorrt_form.graph.initializer
        if i.data_type == TensorProto.FLOAT and i.name not in norm
    ]
    assert {
        v.type.tensor_type.elem_type
        for v in [*tensorrt_form.graph.input, *tensorrt_form.graph.output]
    } == {TensorProto.FLOAT}
    onnx.checker.check_model(tensorrt_form)


class Faint(nn.Module):
    """A tower whose ranges are small, as batch norms leave them: the product of two scales, a
    bias's step, is no number in float16.
    """

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


def test_half_precision_q_dq_answers_as_its_float_form_at_every_level_of_optimization(
    images, tmp_path
):
    ready = prepare(Faint().eval(), images, 19)
    in_float = quantize(
        ready, graph.matrix_products(ready.model), activations="int8", for_tensorrt=True
    )
    path = tmp_path / "image_encoder.onnx"
    graph.save(to_fp16(in_float), path)
    assert disabled_optimizers(path) == disabled_optimizers(path.read_bytes()) != []

    def answers(content, level):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        session = ort.InferenceSession(
            content,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=disabled_optimizers(content),
        )
        return session.run(None, {"pixels": images})[0]

    found = {name: open_session("onnxruntime", path, 1, name).run(images) for name in LEVELS}
    for level in (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        *LEVELS.values(),
    ):
        expected = answers(in_float.SerializeToString(), level)
        found[level] = answers(path.read_bytes(), level)
        assert cosine(found[level], expected).centered_min > 0.98, level
    exact = found[ort.GraphOptimizationLevel.ORT_DISABLE_ALL]
    assert all(np.abs(answer - exact).max() < 1e-3 for answer in found.values())


def test_what_a_graph_holds_decides_what_must_not_be_done_to_it(calibrated, tensorrt_form):
    for model, half in (
        (calibrated.model, False),
        (to_fp16(calibrated.model), True),
        (tensorrt_form, True),
    ):
        assert (disabled_optimizers(model.SerializeToString()) != []) is half
    content = tensorrt_form.SerializeToString()
    for broken in (b"", b"no model at all", content[: len(content) // 2], bytes(range(256)) * 8):
        assert disabled_optimizers(broken) == []
