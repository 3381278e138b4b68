"""`edgeclip export`: a run's student, or any checkpoint, to one or more targets."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from edgeclip.cli import tables
from edgeclip.cli.group import command
from edgeclip.cli.options import PATH, json_option, label_file, print_json, target_option

if TYPE_CHECKING:
    from edgeclip.device.manifest import LintRecord
    from edgeclip.device.target import Target
    from edgeclip.host.export.source import Source

LAYOUTS = ("bundle", "optimum", "open_clip")


class Request(NamedTuple):
    """The options of one call."""

    targets: tuple[str, ...]
    run: Path | None
    vocabulary: Path | None
    layout: str
    no_head: bool
    model: str | None
    weights: str | None
    labels: Path | None
    images: Path | None
    image_only: bool
    out: Path | None


class Exported(NamedTuple):
    """What became of one target."""

    target: str
    image_encoder_mib: float
    path: str
    """the bundle, or the folder of another layout"""
    lint: "LintRecord | None"
    """what TensorRT's checks said; None: not a TensorRT target"""


@command()
@target_option(
    "targets",
    "A name from `edgeclip list targets`, or a YAML file; may be repeated.",
    multiple=True,
)
@click.option("--run", type=PATH, help="Run folder.  [default: runs/latest]")
@click.option(
    "--vocabulary",
    type=PATH,
    help="Keep only the text tokens of the labels, the templates and this file (one text per line).",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="bundle",
    show_default=True,
    help="optimum, open_clip: folders that those libraries load.",
)
@click.option(
    "--no-head",
    is_flag=True,
    help="With --layout optimum: leave EduAttention out, class scores are plain cosines.",
)
@click.option(
    "--model",
    help="Instead of a run: an open_clip model (name or JSON configuration) or a timm classifier.",
)
@click.option("--weights", help="With --model: a file, random, pip:PACKAGE or hub:TAG.")
@click.option("--labels", type=PATH, help="With --model: file with one label per line.")
@click.option(
    "--images",
    type=PATH,
    help="With --model: folder of images for calibration and golden answers.",
)
@click.option("--image-only", is_flag=True, help="With --model: leave the text encoder out.")
@click.option(
    "--out",
    type=PATH,
    help="Output folder.  [default: RUN/bundles or bundles/MODEL; other layouts RUN/LAYOUT]",
)
@json_option
def export(as_json: bool, **options: Any) -> None:
    """Export a student, or any checkpoint, to one or more targets.

    \b
    Examples:
        edgeclip export --target onnx-int8 --target openvino-int8
        edgeclip export --target onnx-int8 --layout optimum
        edgeclip export --layout open_clip
        edgeclip export --model MobileCLIP2-S0 --weights model.safetensors \\
            --labels labels.txt --target onnx-fp32
    """
    request = Request(**options)
    check(request)
    if request.layout == "open_clip":
        path = write_open_clip(request)
        tables.open_clip(path, as_json)
        return
    rows = write(request)
    if as_json:
        print_json([_as_json(row, request.layout) for row in rows])
    else:
        tables.bundles(rows, request.layout)


def _as_json(row: Exported, layout: str) -> dict[str, Any]:
    return {
        "target": row.target,
        "image_encoder_mib": row.image_encoder_mib,
        layout: row.path,
        "lint": row.lint,
    }


def check(request: Request) -> None:
    """Raise `click.UsageError` for options that do not go together."""
    if bool(request.model) != bool(request.weights):
        raise click.UsageError("--model and --weights go together")
    if request.model and request.run:
        raise click.UsageError("--model and --run exclude each other")
    _check_options_of_model(request)
    _check_layout(request)


def _check_options_of_model(request: Request) -> None:
    if request.model:
        return
    given = {
        "--labels": request.labels,
        "--images": request.images,
        "--image-only": request.image_only,
    }
    for option, value in given.items():
        if value:
            raise click.UsageError(f"{option} needs --model")


def _check_layout(request: Request) -> None:
    if request.layout == "open_clip":
        if request.targets:
            raise click.UsageError("--layout open_clip is the float student: leave --target out")
        if request.model:
            raise click.UsageError("--layout open_clip is for a run's student: leave --model out")
    elif not request.targets:
        raise click.UsageError("Missing option '--target'.")
    if request.no_head and request.layout != "optimum":
        raise click.UsageError("--no-head needs --layout optimum")
    if request.vocabulary and request.layout != "bundle":
        raise click.UsageError("--vocabulary needs --layout bundle")


def write_open_clip(request: Request) -> Path:
    """Write the run's student as a folder that open_clip loads, and return it."""
    from edgeclip.host.export import open_clip
    from edgeclip.host.export.source import from_run
    from edgeclip.reports.store import latest_run

    run = latest_run(request.run)
    folder = request.out or run / "open_clip"
    return open_clip.write(run, from_run(run), folder / run.name)


def write(request: Request) -> list[Exported]:
    """Export to every target. Raises `EdgeclipError` and `Refused` as `host.export` does."""
    from edgeclip.device import target as T

    targets = [T.load(name) for name in request.targets]
    source, home = _source(request)
    if request.layout == "optimum":
        _check_optimum(request, source, targets)
    return [_write_one(request, source, home, name, target) for name, target in targets]


def _source(request: Request) -> "tuple[Source, Path]":
    """(what is exported, the folder that holds a folder for each layout)"""
    from edgeclip.host.export.source import from_model, from_run, with_vocabulary
    from edgeclip.reports.store import latest_run

    if request.model and request.weights:
        labels: list[str] = []
        if request.labels:
            labels = label_file(request.labels)
        text = not request.image_only
        source = from_model(request.model, request.weights, labels, request.images, text=text)
        home = Path()
    else:
        home = latest_run(request.run)
        source = from_run(home)

    if request.vocabulary:
        source = with_vocabulary(source, label_file(request.vocabulary))
    return source, home


def _check_optimum(request: Request, source: "Source", targets: "list[tuple[str, Target]]") -> None:
    """Before anything is written: can each target be written in this layout?"""
    from edgeclip.host.export import optimum

    head = source.head
    if request.no_head:
        head = None
    for name, target in targets:
        optimum.check(target.runtime, source.load_text is not None, head, name)


def _write_one(
    request: Request, source: "Source", home: Path, name: str, target: "Target"
) -> Exported:
    from edgeclip.device.manifest import read_manifest
    from edgeclip.host.export import export as write_bundle
    from edgeclip.host.export import optimum

    bundles = _folder(request, home, "bundles")
    if request.out and request.layout == "bundle":
        bundles = request.out
    path = write_bundle(source, name, target, bundles / name)
    manifest = read_manifest(path)
    if request.layout == "optimum":
        folder = request.out or _folder(request, home, "optimum")
        path = optimum.write(path, folder / name, head=not request.no_head)
    mib = manifest.image_encoder_bytes / 2**20
    return Exported(name, mib, str(path), manifest.lint)


def _folder(request: Request, home: Path, kind: str) -> Path:
    """RUN/bundles of a run; bundles/MODEL of a model."""
    if request.model is None:
        return home / kind
    return home / kind / request.model.removesuffix(".json").replace("/", "_")
