"""Where the figures of a page come from: commands, recipe, sources, and every figure as JSON."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgeclip import config, disk, text_file
from edgeclip.device.manifest import read_manifest
from edgeclip.errors import EdgeclipError
from edgeclip.reports.targets import Target


class Provenance(NamedTuple):
    commands: list[str]
    """that make all of this again"""
    recipe: str
    shipped: str | None
    """the shipped recipe of that name; None: there is none"""
    difference: str
    """from it; empty: none"""
    sources: str
    """JSON: parents, licenses and versions of each bundle, and the calibration's size"""
    figures: str
    """JSON: every report that the page is made of"""


def provenance(run: Path, name: str, targets: Sequence[Target]) -> Provenance:
    """Return where a run's page comes from. name: the run, as commands call it."""
    recipe = _recipe(run)
    shipped = _shipped(run.name)
    difference = ""
    if shipped is not None:
        before = text_file.lines(text_file.read(shipped))
        lines = difflib.unified_diff(
            before, text_file.lines(recipe), "shipped", "this run", lineterm=""
        )
        difference = "\n".join(lines)
    return Provenance(
        commands=_commands(name, targets),
        recipe=recipe,
        shipped=None if shipped is None else shipped.stem,
        difference=difference,
        sources=_json({t.name: _source(run / "bundles" / t.name) for t in targets}),
        figures=_json(
            {t.row: {"parity": _record(t.parity), "bench": _record(t.bench)} for t in targets}
        ),
    )


def _recipe(run: Path) -> str:
    """Return the recipe as it was written. Raises `EdgeclipError` where it was changed since."""
    file = run / "recipe.yaml"
    known = disk.read_manifest(run, "run").get("recipe_file")  # None: of 0.1
    if known is not None and disk.sha256(file) != known:
        do = "put a copy in its place; recipe.json says what was understood"
        raise EdgeclipError(file, "was changed since the run was made", do)
    return text_file.read(file)


def _commands(name: str, targets: Sequence[Target]) -> list[str]:
    lines = [f"edgeclip distill {name}/recipe.yaml"]
    for bundle in dict.fromkeys(t.name for t in targets):
        lines.append(f"edgeclip export --run {name} --target {bundle}")
    for device in dict.fromkeys(t.device for t in targets if t.device):
        lines.append(f"edgeclip validate --run {name} --device {device}")
        lines.append(f"edgeclip bench --run {name} --device {device}")
    return [*lines, f"edgeclip report {name}"]


def _shipped(name: str) -> Path | None:
    try:
        return config.find("recipe", name)
    except EdgeclipError:
        return None


def _source(bundle: Path) -> dict[str, Any]:
    manifest = read_manifest(bundle)
    return {
        "manifest sha256": disk.sha256(bundle / disk.MANIFEST),
        "parents": manifest.parents,
        "licenses": manifest.licenses,
        "versions": manifest.versions,
        "calibration images": len(manifest.calibration),
    }


def _record(report: Any) -> Any:
    return None if report is None else msgspec.to_builtins(report)


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
