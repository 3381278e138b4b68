"""`edgeclip export`: a run's student, or any checkpoint, to one or more targets."""

from typing import Any

import click

from edgeclip.cli import words
from edgeclip.cli.group import command
from edgeclip.cli.options import PATH, json_option, print_json, target_option
from edgeclip.cli.request import Request
from edgeclip.cli.tables import bundles

LAYOUTS = ("bundle", "optimum", "open_clip")


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
    help="Keep only the text tokens of labels, templates and this file (one text per line).",
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
    help="Instead of a run: an open_clip model (name or JSON configuration), a timm classifier, or "
    "hf-hub:ORG/NAME of either.",
)
@click.option(
    "--weights",
    help="With --model: a file, FILE:KEY of several sets, random, pip:PACKAGE, hub:TAG or, of "
    "hf-hub:ORG/NAME, hub:REVISION.",
)
@click.option(
    "--like",
    help="With --weights FILE: published tag that activation and preprocessing are taken from.",
)
@click.option(
    "--resize-pos-embed",
    is_flag=True,
    help="With --weights: resample positions that are of another image size.",
)
@click.option("--labels", help=f"With --model: {words.HELP}")
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
            --labels @labels.txt --target onnx-fp32
    """
    request = Request(**options)
    check(request)
    from edgeclip.cli import exporting

    if request.layout == "open_clip":
        bundles.open_clip(exporting.write_open_clip(request), as_json)
        return
    rows = exporting.write(request)
    if as_json:
        print_json([row.as_json(request.layout) for row in rows])
    else:
        bundles.bundles(rows, request.layout)


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
        "--like": request.like,
        "--resize-pos-embed": request.resize_pos_embed,
    }
    for option, value in given.items():
        if value not in (None, False):
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
