"""Cut a graph into blocks: parts through whose ends alone everything flows.

A residual block, an attention or an MLP with its addition, a single layer of a plain chain. What a
block is needs no names and no modules: between two nodes lies a cut where one tensor alone is still
to be read. Shapes do not flow; they are constants of a batch size.
"""

from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from edgeclip.host.graph import differentiable
from edgeclip.host.graph.view import GraphView, run_model

MOST_LAYERS = 12
"""of a block; with more it is learned layer by layer"""


class Block(NamedTuple):
    """Nodes in the graph's order, with what goes in and what comes out."""

    nodes: list[onnx.NodeProto]
    source: str
    """the one tensor that comes from the block before"""
    result: str
    """the one tensor that the next block reads"""


def flowing(view: GraphView) -> list[onnx.NodeProto]:
    """Return the nodes whose outputs depend on the pixels, and not on their shape alone."""
    depends = set(view.inputs)
    nodes = []
    for node in view.model.graph.node:
        if node.op_type != "Shape" and depends.intersection(node.input):
            depends.update(node.output)
            nodes.append(node)
    return nodes


def static(view: GraphView, nodes: list[onnx.NodeProto], x: np.ndarray) -> dict[str, torch.Tensor]:
    """Return what the flowing `nodes` read besides each other, as of an input `x` [B, ...]."""
    made = {name for node in nodes for name in node.output} | view.inputs
    outside = {name for node in nodes for name in node.input if name} - made
    values = {name: view.value(name) for name in outside if view.is_constant(name)}
    shapes = sorted(outside - values.keys())
    if shapes:
        model = onnx.ModelProto()
        model.CopyFrom(view.model)
        del model.graph.output[:]
        for name in shapes:
            kind = view.value_types.get(name, TensorProto.FLOAT)
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        (source,) = view.inputs
        values.update(run_model(model, {source: x}))
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


def cut(view: GraphView, layers: set[str]) -> list[Block]:
    """Return the flowing part of a graph of one input and one output as a chain of blocks.

    layers: names of nodes of which each block but the first and last has at least one; what follows
    a layer and is none itself belongs to its block.
    """
    nodes = flowing(view)
    (source,) = view.inputs
    ends = _cuts(view, nodes)
    blocks: list[Block] = []
    start = 0
    for end in ends:
        part = nodes[start : end + 1]
        start = end + 1
        result = part[-1].output[0]
        if blocks and (not _has(part, layers) or not _has(blocks[-1].nodes, layers)):
            last = blocks.pop()
            blocks.append(Block(last.nodes + part, last.source, result))
        else:
            blocks.append(Block(part, source, result))
        source = result
    return blocks


def layer_by_layer(block: Block, layers: set[str]) -> list[Block]:
    """Return the block, or where it has too many layers its beginnings up to each of them."""
    ends = [i for i, node in enumerate(block.nodes) if node.name in layers]
    if len(ends) <= MOST_LAYERS:
        return [block]
    return [Block(block.nodes[: i + 1], block.source, block.nodes[i].output[0]) for i in ends]


def _has(nodes: list[onnx.NodeProto], layers: set[str]) -> bool:
    return any(node.name in layers for node in nodes)


def _cuts(view: GraphView, nodes: list[onnx.NodeProto]) -> list[int]:
    """Return after which of `nodes` one tensor alone is still to be read: that node's output."""
    last_read = {name: len(nodes) for name in view.outputs}
    for i, node in enumerate(nodes):
        for name in node.input:
            if last_read.get(name, -1) < i:
                last_read[name] = i
    cuts = []
    live = set(view.inputs)
    for i, node in enumerate(nodes):
        live.update(name for name in node.output if name in last_read)
        live = {name for name in live if last_read[name] > i}
        if live == {node.output[0]}:
            cuts.append(i)
    return cuts


def unsupported(view: GraphView) -> list[str]:
    """Return the operators of a graph that have no gradients here."""
    found = {node.op_type for node in flowing(view) if not differentiable.supports(node)}
    return sorted(found)
