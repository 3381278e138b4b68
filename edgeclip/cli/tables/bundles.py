"""Tables of `export`, `lint`, `list` and `classify`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeclip.cli.options import say
from edgeclip.cli.tables import plain
from edgeclip.cli.tables.plain import table


def bundles(rows: Sequence[Any], layout: str) -> None:
    """Print what `export` wrote, a row per target."""
    cells = [[row.target, f"{row.image_encoder_mib:.1f}", row.path] for row in rows]
    table(cells, ["target", "image encoder MiB", layout])
    for row in rows:
        if row.lint is None:
            continue
        checked = row.lint.checked_by or "not checked with TensorRT-RTX"
        said = f"parses {row.lint.parses}, builds {row.lint.builds}"
        plain.line(f"{row.target}: {checked}: {said}; the engine itself is built on the board")


def open_clip(path: Path, as_json: bool) -> None:
    """Print how to load the folder that `export --layout open_clip` wrote."""
    text = f'open_clip.create_model_and_transforms("local-dir:{path}")'
    say(as_json, {"open_clip": str(path)}, text)


def lint(file: Path, verdict: Any) -> None:
    """Print what TensorRT would refuse in an ONNX file."""
    for error in verdict.errors:
        plain.line(error)
    if not verdict.errors:
        plain.line(f"{file}: accepted; validate and bench it on the board")
    by = verdict.checked_by
    if by is None:
        by = "edgeclip's rules alone; for TensorRT's own parser: pip install 'edgeclip[lint]'"
    plain.line(f"checked by {by}")


def purposes(rows: Sequence[Any]) -> None:
    """Print what ships, a line each."""
    table([[row.kind, row.name, row.purpose] for row in rows], ["kind", "name", "purpose"])


def ranking(results: dict[str, list[Any]]) -> None:
    """Print the ranked labels of each image.

    Plain lines: importing a table library would be a tenth of the cold start.
    """
    for image, rows in results.items():
        plain.line(image)
        plain.line("  probability  cosine  label")
        for row in rows:
            plain.line(f"  {row['probability']:11.3f}  {row['score']:6.3f}  {row['label']}")
