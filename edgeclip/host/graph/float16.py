"""A float32 graph in float16, strongly typed: each tensor has one type and each change of it is a Cast that one can see.

TensorRT's strongly typed network takes the types as they stand, so nothing may be left mixed. Input and output stay
float32, and so does what follows the last product: the L2 norm's sum of squares soon leaves float16 (its largest value
is 65504). Constants are held inside float16's range: a mask of -inf becomes -1e4, which a softmax takes for the same.
"""

import copy

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeclip.errors import EdgeclipError
from edgeclip.host.graph import trace as graph

LARGEST, SMALLEST, MASK = 65504.0, 2.0**-24, -1e4
STAYS_FLOAT = {"Resize": (1, 2), "Upsample": (1,)}
"""inputs that ONNX wants in float32 whatever the data's type is"""


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in float16, scales of Q/DQ included; input, output and L2 norm stay float32."""
    model = copy.deepcopy(model)
    if control := [
        n.name
        for n in model.graph.node
        if any(a.type == onnx.AttributeProto.GRAPH for a in n.attribute)
    ]:
        raise EdgeclipError(
            "float16",
            f"the graph has control flow ({control[0]})",
            "export a tower whose graph does not depend on its input",
        )
    tail = set(graph.after_last_product(model))
    constants = {
        name: value
        for name, value in graph.initializers(model).items()
        if value.dtype == np.float32
    }
    typed = onnx.shape_inference.infer_shapes(model).graph
    floats = {
        v.name
        for v in (*typed.value_info, *typed.input)
        if v.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    kept = [n for n in model.graph.node if n.op_type != "Constant" or n.output[0] not in constants]
    others = [i for i in model.graph.initializer if i.name not in constants]
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.initializer.extend(others)
    outputs = {o.name for o in model.graph.output}
    inputs = {i.name for i in model.graph.input}
    of_tail = {o for n in kept if n.name in tail for o in n.output}
    made: set[str] = set()

    def add(name: str, make: onnx.NodeProto | np.ndarray) -> str:
        if name not in made:
            made.add(name)
            if isinstance(make, onnx.NodeProto):
                model.graph.node.append(make)
            else:
                model.graph.initializer.append(numpy_helper.from_array(make, name))
        return name

    def cast(name: str, to: int, result: str) -> str:
        return add(result, helper.make_node("Cast", [name], [result], f"{result}_cast", to=to))

    for node in kept:
        half = node.name not in tail
        for i, name in enumerate(node.input):
            wants_half = half and i not in STAYS_FLOAT.get(node.op_type, ())
            if name in constants:
                node.input[i] = (
                    add(f"{name}_half", _half(constants[name]))
                    if wants_half
                    else add(name, constants[name])
                )
            elif name in floats:
                is_half = name not in of_tail and name not in inputs
                if wants_half and not is_half:
                    node.input[i] = cast(name, TensorProto.FLOAT16, f"{name}_half")
                elif is_half and not wants_half:
                    node.input[i] = cast(_inside(name, outputs), TensorProto.FLOAT, f"{name}_float")
                elif is_half:
                    node.input[i] = _inside(name, outputs)
        if half:
            for a in node.attribute:
                if node.op_type == "Cast" and a.name == "to" and a.i == TensorProto.FLOAT:
                    a.i = TensorProto.FLOAT16
                elif (
                    node.op_type == "ConstantOfShape"
                    and a.name == "value"
                    and a.t.data_type == TensorProto.FLOAT
                ):
                    a.t.CopyFrom(numpy_helper.from_array(_half(numpy_helper.to_array(a.t))))
        model.graph.node.append(node)
        for i, name in enumerate(node.output):
            if name in outputs and half:
                node.output[i] = _inside(name, outputs)
                cast(node.output[i], TensorProto.FLOAT, name)
    return model


def _inside(name: str, outputs: set[str]) -> str:
    """A graph's output is float32 under its own name; inside it is another tensor."""
    return f"{name}_inside" if name in outputs else name


def _half(value: np.ndarray) -> np.ndarray:
    """Finite float16: what is too large is cut, what is too small to be told from 0 stays on its side of 0."""
    value = np.where(np.isneginf(value), MASK, np.clip(value, -LARGEST, LARGEST))
    tiny = (value != 0) & (np.abs(value) < SMALLEST)
    return np.asarray(np.where(tiny, np.copysign(SMALLEST, value), value), np.float16)
