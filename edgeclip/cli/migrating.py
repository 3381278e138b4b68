"""What `edgeclip migrate` does: write what edgeclip 0.1 wrote in today's format, in place.

Everything of 0.1 stays readable without it, but for YAML files in old words. A run's trained
weights and its student folder are left as they are: their hashes name them.
"""

from pathlib import Path
from typing import Any

import msgspec
import yaml

from edgeclip import config, disk, text_file
from edgeclip.device import profile, target
from edgeclip.device.bench_report import BenchReport
from edgeclip.device.manifest import read_manifest, write_manifest
from edgeclip.device.records import (
    FORMAT,
    ParityReport,
)
from edgeclip.errors import EdgeclipError
from edgeclip.host import older, recipe
from edgeclip.reports import results
from edgeclip.text_file.parser import compose_yaml, parse_yaml

MOVED = {
    ("distill",): "qat",
    ("distill", "quantize"): "target",
    ("train", "first"): "pretrain",
}
"""path of a key in a recipe of 0.1, to the key's name today"""


def migrate(path: Path) -> list[Path]:
    """Return the files that were written anew; [] where all are of today's format.

    Raises `EdgeclipError` when `path` is no run, bundle or YAML file, or cannot be read.
    """
    if path.suffix in (".yaml", ".yml"):
        return _yaml(path)
    if not path.is_dir():
        do = "give a run, a bundle or a YAML file"
        raise EdgeclipError(path, "there is no such folder or YAML file", do)

    manifest = path / disk.MANIFEST
    kind = None
    if manifest.exists():
        kind = disk.read_json(manifest).get("kind")
    if kind == "bundle":
        return _bundle(path)
    if kind == "run":
        return _run(path)
    raise EdgeclipError(path, "is neither a run nor a bundle", "check the path")


# --- YAML


def _yaml(path: Path) -> list[Path]:
    """Rename keys where they stand, so that comments and layout stay."""
    text = text_file.read(path)
    root = compose_yaml(text, path)
    edits = _edits(root, ())
    if not edits:
        return []
    for start, end, name in sorted(edits, reverse=True):
        text = text[:start] + name + text[end:]
    with disk.new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        _load(temporary)
    return [path]


def _edits(node: Any, path: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """(start, end, new name) of each key of 0.1 at or below a node."""
    edits = []
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            edits += _edits(item, path)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            place = (*path, str(key.value))
            name = MOVED.get(place) or config.RENAMED.get(key.value)
            if name is not None:
                edits.append((key.start_mark.index, key.end_mark.index, name))
            edits += _edits(value, place)
    return edits


def _load(path: Path) -> None:
    """Raise `EdgeclipError` unless the file is a device, target or recipe of today."""
    fields = parse_yaml(text_file.read(path), path)
    if "runtimes" in fields:
        profile.load(str(path))
    elif "runtime" in fields:
        target.load(str(path))
    else:
        recipe.load(path)


# --- folders


def _bundle(folder: Path) -> list[Path]:
    raw = disk.read_manifest(folder, "bundle")
    if raw.get("format") == FORMAT:
        return []
    disk.verify(folder, raw)
    write_manifest(folder, read_manifest(folder))
    return [folder / disk.MANIFEST]


def _run(folder: Path) -> list[Path]:
    written = [*_recipe(folder), *_results(folder)]
    for path in [f / disk.MANIFEST for f in disk.finished_in(folder / "bundles")]:
        before = disk.sha256(path)
        written += _bundle(path.parent)
        written += _reports(folder, path, before)
    return written


def _recipe(folder: Path) -> list[Path]:
    path = folder / "recipe.json"
    if not path.exists():
        return []
    value = disk.read_json(path)
    new = older.recipe_description(value)
    if new == value:
        return []
    disk.write_sealed(path, new)
    return [path]


def _results(folder: Path) -> list[Path]:
    written = []
    path = folder / results.RESULTS
    if path.exists() and _is_older(path):
        results.write_results(folder, results.read_results(folder))
        written.append(path)
    for path in sorted((folder / "reports").glob("evaluate-*.json")):
        if _is_older(path):
            results.write_protocol(path, results.read_protocol(path))
            written.append(path)
    return written


def _reports(run: Path, manifest: Path, before: str) -> list[Path]:
    """Parity and bench reports of a bundle, which name it by its manifest's hash.

    before: that hash before the manifest was written anew.
    """
    digest = disk.sha256(manifest)
    written = []
    kinds: dict[str, type[Any]] = {"parity": ParityReport, "bench": BenchReport}
    for word, kind in kinds.items():
        for path in sorted((run / "reports").glob(f"{manifest.parent.name}.*.{word}.json")):
            report = disk.read_record(path, kind)
            moved = report.bundle == before and digest != before
            if moved:
                report = msgspec.structs.replace(report, bundle=digest)
            if moved or _is_older(path):
                disk.write_record(path, report)
                written.append(path)
    return written


def _is_older(path: Path) -> bool:
    return bool(disk.read_json(path).get("format", 1) != FORMAT)
