"""A read-only view of an ONNX graph, so that nobody builds maps of it by hand, and what runs one.

A view is of a graph as it is: after surgery on the graph, take a new one.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgeclip.device.runtime.onnxruntime import session_options


class GraphView:
    """The names of a graph: who makes a tensor, who reads it, and the values of the constants."""

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self._stored: dict[str, TensorProto] = {}
        for stored in model.graph.initializer:
            self._stored[stored.name] = stored
        for node in model.graph.node:
            if node.op_type == "Constant":
                self._stored[node.output[0]] = _constant(node)
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def constants(self) -> list[str]:
        """Names of all initializers and of the outputs of all Constant nodes."""
        return list(self._stored)

    def is_constant(self, name: str) -> bool:
        """Return whether `name` is an initializer or the output of a Constant node."""
        return name in self._stored

    def value(self, name: str) -> np.ndarray:
        """Return a constant's value, converted once, when first asked for; raises `KeyError`."""
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._stored[name])
        return self._arrays[name]

    @cached_property
    def nodes(self) -> dict[str, onnx.NodeProto]:
        """Each node by its name."""
        return {node.name: node for node in self.model.graph.node}

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """Tensor to the node that makes it; inputs and initializers have none."""
        producers: dict[str, onnx.NodeProto] = {}
        for node in self.model.graph.node:
            for name in node.output:
                producers[name] = node
        return producers

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Tensor to the nodes that read it, in the graph's order, once for each reading input."""
        consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                consumers.setdefault(name, []).append(node)
        return consumers

    @cached_property
    def inputs(self) -> set[str]:
        """Names of the graph's inputs."""
        return {port.name for port in self.model.graph.input}

    @cached_property
    def outputs(self) -> set[str]:
        """Names of the graph's outputs."""
        return {port.name for port in self.model.graph.output}

    @cached_property
    def value_types(self) -> dict[str, int]:
        """Input or inner tensor to its `TensorProto` element type, as shape inference finds it."""
        typed = onnx.shape_inference.infer_shapes(self.model).graph
        types: dict[str, int] = {}
        for port in (*typed.value_info, *typed.input):
            types[port.name] = port.type.tensor_type.elem_type
        return types


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return a node's attribute as a Python value (int, list, `TensorProto`) or `default`."""
    for candidate in node.attribute:
        if candidate.name == name:
            return helper.get_attribute_value(candidate)
    return default


def _constant(node: onnx.NodeProto) -> TensorProto:
    value = attribute(node, "value")
    if value is not None:
        return value
    plain = helper.get_attribute_value(node.attribute[0])  # value_float, value_ints and their like
    array = np.asarray(plain)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return numpy_helper.from_array(array, node.output[0])


def probe(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """Return a copy whose outputs are the float tensors `names`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for name in names:
        copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return copy


def run_model(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every output of `model` by name, as ONNX Runtime computes it on the CPU."""
    session, names = _session(model)
    return dict(zip(names, session.run(names, feeds), strict=True))


def run_batches(
    model: onnx.ModelProto, x: np.ndarray, size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the outputs by name for each `size` rows of `x` [n, ...], the one input of `model`."""
    session, names = _session(model)
    source = session.get_inputs()[0].name
    for start in range(0, len(x), size):
        values = session.run(names, {source: x[start : start + size]})
        yield dict(zip(names, values, strict=True))


def _session(model: onnx.ModelProto) -> tuple[Any, list[str]]:
    """Return a session on one model, and the names of its outputs in their order.

    S8S8 in exact integers, as edgeclip.device.runtime opens it.
    """
    content = model.SerializeToString()
    options = ort.SessionOptions()
    for key, value in session_options(content).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session, [output.name for output in session.get_outputs()]
