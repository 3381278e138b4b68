"""Turn a float32 graph into a strongly typed float16 one: each change of a type is a visible Cast.

TensorRT's strongly typed network takes the types as they stand, so nothing may be left mixed. Input
and output stay float32, and so does what follows the last product: the L2 norm's sum of squares
soon leaves float16 (its largest value is 65504). Constants are held inside float16's range: a mask
of -inf becomes -1e4, which a softmax takes for the same.

onnxruntime.transformers.float16.convert_float_to_float16 (1.31, with keep_io_types and the L2 norm
as node_block_list) does not do it: it casts to float16 and back between each two nodes that it is
to leave alone, out of the graph's order, and gives two nodes one name, which ONNX Runtime refuses.
"""

import copy

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeclip.errors import EdgeclipError
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.view import GraphView

LARGEST = 65504.0
SMALLEST = 2.0**-24
MASK = -1e4
STAYS_FLOAT = {"Resize": (1, 2), "Upsample": (1,)}
"""inputs that ONNX wants in float32 whatever the data's type is"""


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in float16, scales of Q/DQ included; input, output and L2 norm stay float32.

    Raises `EdgeclipError` for a graph with control flow.
    """
    model = copy.deepcopy(model)
    _refuse_control_flow(model)
    conversion = _Conversion(model)
    for node in conversion.take_nodes():
        conversion.add(node)
    return model


def _refuse_control_flow(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for a in node.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                raise EdgeclipError(
                    "float16",
                    f"the graph has control flow (node '{node.name}')",
                    "export a tower whose graph does not depend on its input",
                )


class _Conversion:
    """The types of a graph's tensors, and the graph as it is written anew, node by node."""

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        view = GraphView(model)
        self.tail = set(graph.after_last_product(model))
        self.inputs = view.inputs
        self.outputs = view.outputs

        self.constants: dict[str, np.ndarray] = {}
        for name in view.constants:
            value = view.value(name)
            if value.dtype == np.float32:
                self.constants[name] = value

        self.floats = set()
        for name, kind in view.value_types.items():
            if kind == TensorProto.FLOAT:
                self.floats.add(name)

        self.float_in_result = set(self.inputs)
        for node in model.graph.node:
            if node.name in self.tail:
                self.float_in_result.update(node.output)
        self.written: set[str] = set()

    def take_nodes(self) -> list[onnx.NodeProto]:
        """Empty the graph but for constants of other types; return the nodes to write anew."""
        nodes = []
        for node in self.model.graph.node:
            if node.op_type != "Constant" or node.output[0] not in self.constants:
                nodes.append(node)
        others = [i for i in self.model.graph.initializer if i.name not in self.constants]
        del self.model.graph.node[:]
        del self.model.graph.initializer[:]
        del self.model.graph.value_info[:]
        self.model.graph.initializer.extend(others)
        return nodes

    def add(self, node: onnx.NodeProto) -> None:
        """Append `node` with inputs and attributes of the type that it computes in."""
        half = node.name not in self.tail
        stays_float = STAYS_FLOAT.get(node.op_type, ())
        for i, name in enumerate(node.input):
            wants_half = half and i not in stays_float
            node.input[i] = self._read(name, wants_half)
        if half:
            _retype_attributes(node)
        self.model.graph.node.append(node)
        if not half:
            return
        for i, name in enumerate(node.output):
            if name in self.outputs:
                node.output[i] = self._inside(name)
                self._cast(node.output[i], TensorProto.FLOAT, name)

    def _read(self, name: str, wants_half: bool) -> str:
        """Return the name under which tensor `name` has the wanted type, adding what is missing."""
        if name in self.constants:
            return self._constant(name, wants_half)
        if name not in self.floats:
            return name
        if name in self.float_in_result:
            if wants_half:
                return self._cast(name, TensorProto.FLOAT16, f"{name}_half")
            return name
        if wants_half:
            return self._inside(name)
        return self._cast(self._inside(name), TensorProto.FLOAT, f"{name}_float")

    def _inside(self, name: str) -> str:
        """Return the name inside: a graph's output is float32 under its own name."""
        if name in self.outputs:
            return f"{name}_inside"
        return name

    def _constant(self, name: str, wants_half: bool) -> str:
        value = self.constants[name]
        if wants_half:
            name = f"{name}_half"
            value = _half(value)
        if name not in self.written:
            self.written.add(name)
            self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _cast(self, name: str, to: int, result: str) -> str:
        if result not in self.written:
            self.written.add(result)
            cast = helper.make_node("Cast", [name], [result], f"{result}_cast", to=to)
            self.model.graph.node.append(cast)
        return result


def _retype_attributes(node: onnx.NodeProto) -> None:
    """Make float16 of the float32 that a node's attributes name or hold."""
    for a in node.attribute:
        if node.op_type == "Cast" and a.name == "to" and a.i == TensorProto.FLOAT:
            a.i = TensorProto.FLOAT16
        if node.op_type != "ConstantOfShape" or a.name != "value":
            continue
        if a.t.data_type == TensorProto.FLOAT:
            a.t.CopyFrom(numpy_helper.from_array(_half(numpy_helper.to_array(a.t))))


def _half(value: np.ndarray) -> np.ndarray:
    """Finite float16: clipped where too large, and on its side of 0 where too small to be told."""
    value = np.where(np.isneginf(value), MASK, np.clip(value, -LARGEST, LARGEST))
    tiny = (value != 0) & (np.abs(value) < SMALLEST)
    return np.asarray(np.where(tiny, np.copysign(SMALLEST, value), value), np.float16)
