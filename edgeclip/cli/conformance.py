"""`edgeclip conformance`: a bundle's preprocess and tokenizer beside the reference's."""

import sys
from pathlib import Path

import click

from edgeclip.cli.group import command
from edgeclip.cli.options import PATH, device_option, json_option, print_json


@command()
@click.argument("bundle", type=PATH)
@device_option("device", "Answer on this device: a name, or a YAML file.  [default: host-cpu]")
@click.option("--pack", type=PATH, help="The pack's folder, made if missing.  [default: a cache's]")
@click.option(
    "--answers", type=PATH, help="Score these tensors and ids, of another implementation."
)
@click.option("--keep", type=PATH, help="Write the device's own tensors and ids to this folder.")
@click.option(
    "--clean", is_flag=True, help="Afterwards remove everything edgeclip left on the board."
)
@json_option
def conformance(
    bundle: Path,
    device: str | None,
    pack: Path | None,
    answers: Path | None,
    keep: Path | None,
    clean: bool,
    as_json: bool,
) -> None:
    """Compare a bundle's pixels and token ids with open_clip's.

    Golden images and strings of every kind, scored in levels, ids and answers that change. Exits 3
    when any image differs, or any string that is not too long; docs/conformance.md has the layout
    of --answers.

    \b
    Examples:
        edgeclip conformance runs/quickstart/bundles/onnx-fp32 --device raspberry-pi-5
        edgeclip conformance bundle --pack pack --answers from-cpp
    """
    if answers is not None and (device or keep or clean):
        raise click.UsageError("--answers are scored here: leave --device, --keep and --clean out")
    from edgeclip.cli.conforming import Request, run
    from edgeclip.cli.tables.conformance import conformance as show
    from edgeclip.reports.store import GATE_FAILED

    report = run(Request(bundle, device or "host-cpu", pack, answers, keep, clean))
    if as_json:
        print_json(report)
    else:
        show(report)
    if report.failures:
        sys.exit(GATE_FAILED)
