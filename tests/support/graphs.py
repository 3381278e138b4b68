"""Graphs of a student: calibrated, run, and asked for what is in int8."""

import numpy as np
import onnxruntime as ort
import torch

from edgeclip.device.runtime.onnxruntime import disabled_optimizers
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.qdq import calibrate
from edgeclip.host.towers.fold import fold


def prepare(student, images, opset):
    x = torch.from_numpy(images[:1])
    return calibrate(
        graph.to_onnx(fold(student, x), x, "pixels", "image_features", opset), images, "minmax"
    )


def run(model, x, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
    content, options = model.SerializeToString(), ort.SessionOptions()
    options.graph_optimization_level = level
    options.add_session_config_entry(
        "session.qdqisint8allowed", "1"
    )  # as edgeclip.runtime: an x86 without VNNI would saturate
    session = ort.InferenceSession(
        content,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled_optimizers(content),
    )
    return session.run(None, {model.graph.input[0].name: x})[0]


def weights_in_int8(model):
    """Names of the products whose weight comes out of a DequantizeLinear of an int8 constant."""
    makers = {o: n for n in model.graph.node for o in n.output}
    constants = graph.initializers(model)
    products = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    return [
        n.name
        for n in products
        if (d := makers.get(n.input[1])) is not None
        and d.op_type == "DequantizeLinear"
        and constants[d.input[0]].dtype == np.int8
    ]
