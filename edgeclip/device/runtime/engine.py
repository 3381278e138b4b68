"""TensorRT engines that were built on this machine: kept, and only used under the same conditions.

    <folder>/<onnx>/<key>/engine.plan      the engine
                          timing.cache     what TensorRT measured; given to the next build
                          manifest.json    the conditions, in full

A change of the ONNX file, TensorRT, GPU, JetPack, power mode or options is another key, so another
build; the old ones stay (KEEP of them). What each engine was worth is kept on the host
(edgeclip/reports/engines.py).
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from edgeclip import disk
from edgeclip.device import machine
from edgeclip.device.manifest import BundleManifest
from edgeclip.device.records import BuildOptions, EngineConditions, from_json, to_json
from edgeclip.device.runtime.tensorrt_build import Built

KEEP = 3
"""engines of one ONNX file; each is about as large as that file"""


class Kept(NamedTuple):
    folder: Path
    built: Built
    """what `tensorrt_build.build` said of it"""


def folder() -> Path:
    """Return where engines are kept: EDGECLIP_ENGINES (set on a board), or the user's cache."""
    named = os.environ.get("EDGECLIP_ENGINES")
    return Path(named) if named else disk.cache_folder() / "engines"


def names(manifests: Iterable[BundleManifest]) -> list[str]:
    """Return what the engines of these bundles are kept under, below `folder`."""
    return [m.files[m.image_encoder][:16] for m in manifests if m.runtime == "tensorrt"]


def conditions(
    model: Path, version: str, sm: str, options: BuildOptions, root: Path = machine.ROOT
) -> EngineConditions:
    """Return everything that an engine depends on.

    version: TensorRT's. sm: the GPU's compute capability, as "8.7".
    """
    state = machine.state(str(model.parent), root)
    return EngineConditions(
        onnx=disk.sha256(model),
        tensorrt=version,
        sm=sm,
        jetpack=state.jetpack,
        l4t=state.l4t,
        power_mode=state.power_mode,
        options=options,
    )


def engine(asked: EngineConditions, make: Callable[[Path], Built]) -> Kept:
    """Return the engine for these conditions; `make` builds the one that is not there.

    make writes engine.plan into the folder that it is given, where a timing.cache may lie; nothing
    is left where it raises. Raises `EdgeclipError` for a kept engine whose files were changed.
    """
    of_file = folder() / asked.onnx[:16]
    kept = of_file / disk.fingerprint(to_json(asked))[:16]
    if not (kept / disk.MANIFEST).exists():
        timings = _timings(of_file, asked)
        with disk.new_folder(kept) as temporary:
            if timings is not None:
                shutil.copyfile(timings, temporary / "timing.cache")
            built = make(temporary)
            content = {"conditions": to_json(asked), "built": built}
            disk.write_manifest(temporary, "engine", content)
        for old in _newest(of_file)[KEEP:]:
            shutil.rmtree(old)
    manifest = disk.read_manifest(kept, "engine")
    disk.verify(kept, manifest)
    return Kept(kept, manifest["built"])


def _timings(of_file: Path, asked: EngineConditions) -> Path | None:
    """Return the newest timing cache of the same GPU and TensorRT version."""
    for kept in _newest(of_file):
        manifest = disk.read_manifest(kept, "engine")
        before = from_json(manifest["conditions"], EngineConditions, kept)
        timings = kept / "timing.cache"
        if (before.tensorrt, before.sm) == (asked.tensorrt, asked.sm) and timings.exists():
            return timings
    return None


def _newest(of_file: Path) -> list[Path]:
    """Return the folders of one ONNX file's engines, newest first."""
    return sorted(
        disk.finished_in(of_file),
        key=lambda path: (path / disk.MANIFEST).stat().st_mtime_ns,
        reverse=True,
    )
