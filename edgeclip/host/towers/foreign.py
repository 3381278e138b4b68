"""Say what a file is that holds no weights for torch: by its first bytes, else by its suffix."""

from pathlib import Path
from typing import NamedTuple

HEAD = 512
"""bytes that tell"""


class Kind(NamedTuple):
    what: str
    do: str


PAGE = Kind(
    "a web page that a server sent in place of the file",
    "download the file itself (of Hugging Face: resolve/main/FILE, logged in where it is gated)",
)
PACKED = Kind("a packed archive", "unpack it, and give the weights in it")
GRAPH = Kind("a graph for inference", "give the checkpoint that it was exported from")
OTHER = "save its tensors under the model's names as safetensors, with the library that wrote it"
GGUF = Kind("a GGUF file, llama.cpp's", "give the checkpoint that it was converted from")
HDF5 = Kind("an HDF5 file, Keras's", OTHER)
NUMPY = Kind("a file of NumPy arrays", OTHER)
JSON = Kind("JSON text", "give the file of weights that lies beside it")
MAGIC = {
    b"GGUF": GGUF,
    b"\x89HDF": HDF5,
    b"\x93NUMPY": NUMPY,
    b"\x1f\x8b": PACKED,
    b"\x28\xb5\x2f\xfd": PACKED,
    b"BZh": PACKED,
    b"\xfd7zXZ": PACKED,
    b"7z\xbc\xaf": PACKED,
    b"Rar!": PACKED,
}
TAR, TAR_AT = b"ustar", 257
FLATBUFFER = {b"TFL3": GRAPH, b"ORTM": GRAPH}
"""at byte 4"""
SUFFIXES = {
    ".onnx": GRAPH,
    ".xml": GRAPH,
    ".pb": GRAPH,
    ".tflite": GRAPH,
    ".engine": GRAPH,
    ".plan": GRAPH,
    ".mlmodel": GRAPH,
    ".msgpack": Kind("a file of msgpack, Flax's", OTHER),
    ".h5": HDF5,
    ".keras": Kind("a Keras archive", OTHER),
    ".npz": NUMPY,
    ".zip": PACKED,
}


def kind(path: Path) -> Kind | None:
    """Return what a file is that could not be read as weights; None: nobody knows."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    for magic, found in MAGIC.items():
        if head.startswith(magic):
            return found
    if head[4:8] in FLATBUFFER:
        return FLATBUFFER[head[4:8]]
    if head[TAR_AT:].startswith(TAR):
        return PACKED
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return PAGE
    if text.startswith(b"{") and path.suffix.lower() not in SUFFIXES:
        return JSON
    return SUFFIXES.get(path.suffix.lower())
