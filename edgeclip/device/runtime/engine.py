"""Engines that were built on this machine: kept, named by all that they depend on, and never used under other conditions.

    <folder>/<onnx>/<key>/engine.plan      the engine
                          timing.cache     what TensorRT measured while it built; given to the next build
                          manifest.json    the conditions, in full

A change of the ONNX file, TensorRT, GPU, JetPack, power mode or options is another key, so another build; the old ones stay
(KEEP of them). What each engine was worth is kept on the host, in RUN/reports/<target>.<device>.engines.json: after a
JetPack upgrade it shows whether accuracy moved (SigLIP's has: 71.6 to 68.4 with the same graph, TensorRT issue 3908).
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgeclip import disk
from edgeclip.device import machine
from edgeclip.device.manifest import BundleManifest

KEEP = 3
"""engines of one ONNX file; each is about as large as that file"""


def folder() -> Path:
    """EDGECLIP_ENGINES (the runner sets it on a board), or the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("EDGECLIP_ENGINES") or cache / "edgeclip" / "engines")


def names(manifests: Iterable[BundleManifest]) -> list[str]:
    """What the engines of bundles with these manifests are kept under, below `folder`."""
    return [m.files[m.image_encoder][:16] for m in manifests if m.runtime == "tensorrt"]


def conditions(
    model: Path, version: str, sm: str, options: dict[str, Any], root: Path = machine.ROOT
) -> dict[str, Any]:
    """All that an engine depends on. sm: the GPU's compute capability."""
    state = machine.state(str(model.parent), root)
    return {
        "onnx": disk.sha256(model),
        "tensorrt": version,
        "sm": sm,
        **{k: state[k] for k in ("jetpack", "l4t", "power_mode")},
        "options": options,
    }


def engine(
    conditions: dict[str, Any], make: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """(the folder of the engine for these conditions, what its build said of it); `make` builds what is not there.

    make writes engine.plan into the folder that it is given, where a timing.cache may lie; nothing is left where it raises.
    """
    own = folder() / conditions["onnx"][:16]
    kept = own / disk.fingerprint(conditions)[:16]
    if not (kept / disk.MANIFEST).exists():
        alike = [
            p
            for p in _newest(own)
            if all(_manifest(p)["conditions"][k] == conditions[k] for k in ("tensorrt", "sm"))
        ]  # of one GPU and version
        timings = next((p / "timing.cache" for p in alike if (p / "timing.cache").exists()), None)
        with disk.new_folder(kept) as temporary:
            if timings:
                shutil.copyfile(timings, temporary / "timing.cache")
            built = make(temporary)
            disk.write_manifest(temporary, "engine", {"conditions": conditions, "built": built})
        for old in _newest(own)[KEEP:]:
            shutil.rmtree(old)
    manifest = _manifest(kept)
    disk.verify(kept, manifest)
    return kept, manifest["built"]


def _newest(own: Path) -> list[Path]:
    found = [p.parent for p in own.glob(f"*/{disk.MANIFEST}")]
    return sorted(found, key=lambda p: (p / disk.MANIFEST).stat().st_mtime_ns, reverse=True)


def _manifest(kept: Path) -> dict[str, Any]:
    return disk.read_manifest(kept, "engine")
