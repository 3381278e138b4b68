"""What else a graph's file would have a runtime open: nothing that the bundle does not list.

An ONNX tensor may lie in another file, whose name is in the graph; a node may hold an engine that a
provider compiled; XML knows entities. A runtime follows all of these, so they are looked for first.
"""

import io
import mmap
import re
from pathlib import Path, PurePosixPath

from edgeclip.device.runtime.protobuf import fields
from edgeclip.errors import EdgeclipError

DO = "export the bundle again: it is one file"
DEEPEST = 16
"""graphs within graphs"""
TENSOR = "tensor"
INSIDE = {
    "model": ((7, "graph"), (20, "training"), (25, "function")),
    "graph": ((1, "node"), (5, TENSOR), (15, "sparse")),
    "node": ((5, "attribute"),),
    "attribute": (
        (5, TENSOR),
        (6, "graph"),
        (10, TENSOR),
        (11, "graph"),
        (22, "sparse"),
        (23, "sparse"),
    ),
    "sparse": ((1, TENSOR), (2, TENSOR)),
    "function": ((7, "node"), (11, "attribute")),
    "training": ((1, "graph"), (2, "graph")),
}
"""onnx.proto: each message's fields that may hold a tensor, by number"""
EXTERNAL_DATA = 13
"""TensorProto.external_data: pairs of key (1) and value (2)"""
DECLARATION = re.compile(rb"<!(?!--)")
LOCATION = b"location"
COMPILED = b"EPContext"
"""the operator whose node names a provider's engine"""


def others(graph: Path) -> list[str]:
    """Return the files that a graph needs beside itself, as paths relative to its folder.

    Raises `EdgeclipError` for a graph that names what no bundle may hold: an engine of a provider,
    an entity of XML, a place outside its folder.
    """
    if graph.suffix == ".xml":
        return _of_openvino(graph)
    if graph.suffix != ".onnx" or not graph.stat().st_size:
        return []
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(COMPILED) >= 0:
            what = f"has {COMPILED.decode()}, an engine that only its maker can read"
            raise EdgeclipError(graph, what, "export the bundle again")
        if content.find(LOCATION) < 0:  # most graphs: every reference has this word
            return []
    with graph.open("rb") as file:
        found = _locations(file, graph.stat().st_size, "model", 0, graph)
    for name in found:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "*" in name or not path.parts:
            what = f"has a tensor that lies at '{name[:80]}'"
            raise EdgeclipError(graph, what, DO)
    return sorted(found)


def _locations(
    file: io.BufferedReader, end: int, message: str, depth: int, graph: Path
) -> set[str]:
    """Return the locations of every tensor in the message from here to `end`."""
    if depth > 4 * DEEPEST:
        raise EdgeclipError(graph, "has graphs within graphs beyond reason", DO)
    if message == TENSOR:
        return _of_tensor(file, end)
    start = file.tell()
    found: set[str] = set()
    for number, inner in INSIDE[message]:
        file.seek(start)
        for inner_end in fields(file, end, number):
            found |= _locations(file, inner_end, inner, depth + 1, graph)
    return found


def _of_tensor(file: io.BufferedReader, end: int) -> set[str]:
    found = set()
    for pair_end in fields(file, end, EXTERNAL_DATA):
        start = file.tell()
        texts = []
        for number in (1, 2):
            file.seek(start)
            text = b""
            for text_end in fields(file, pair_end, number):
                text = file.read(text_end - file.tell())
            texts.append(text)
        if texts[0] == LOCATION:
            found.add(texts[1].decode("utf-8", errors="backslashreplace"))
    return found


def _of_openvino(graph: Path) -> list[str]:
    """Return the weights' file, where there is one: an IR has no other."""
    content = graph.read_bytes()
    if not content[:100].lstrip().startswith((b"<?xml", b"<net")):
        raise EdgeclipError(graph, "is no graph of OpenVINO", "export the bundle again")
    if DECLARATION.search(content):
        what = "has a document type or an entity, which may name other files"
        raise EdgeclipError(graph, what, "export the bundle again")
    weights = graph.with_suffix(".bin")
    return [weights.name] if weights.is_file() else []
