"""`edgeclip lint` and `edgeclip list`."""

import sys
from pathlib import Path

import click

from edgeclip.cli.group import command
from edgeclip.cli.options import PATH, json_option, print_json, target_option
from edgeclip.cli.tables import bundles

KINDS: tuple[str, ...] = ("recipes", "targets", "devices")


@command()
@click.argument("file", type=PATH)
@target_option(
    "target_name",
    "A TensorRT target: a name from `edgeclip list targets`, or a YAML file.",
    required=True,
)
@json_option
def lint(file: Path, target_name: str, as_json: bool) -> None:
    """Check whether TensorRT accepts an ONNX file; needs no GPU.

    For each refusal it names the node and the cure. Exits 3 when TensorRT would refuse the file.

    \b
    Example:
        edgeclip lint model.onnx --target tensorrt-int8
    """
    from edgeclip.device.target import load
    from edgeclip.host.export.lint import lint as check
    from edgeclip.reports.store import GATE_FAILED

    _, target = load(target_name)
    verdict = check(file, target)
    if as_json:
        print_json(verdict)
    else:
        bundles.lint(file, verdict)
    if verdict.errors:
        sys.exit(GATE_FAILED)


@command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False)
@json_option
def list_(kind: str | None, as_json: bool) -> None:
    """List the recipes, targets and devices that ship.

    \b
    Example:
        edgeclip list targets
    """
    from edgeclip.boards.doctor import purposes

    kinds = KINDS
    if kind is not None:
        kinds = (kind,)
    rows = []
    for each in kinds:
        rows += purposes(each.removesuffix("s"))
    if as_json:
        print_json([row._asdict() for row in rows])
    else:
        bundles.purposes(rows)
