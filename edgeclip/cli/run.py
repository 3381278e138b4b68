"""`edgeclip evaluate` and `edgeclip report`: what a run is worth."""

from pathlib import Path

import click

from edgeclip.cli.group import command
from edgeclip.cli.options import Choice, json_option, print_json, run_argument, say

PROTOCOLS = ("zero_shot", "base_to_novel", "cross_dataset", "domain_generalization", "retrieval")
RENAMED = {"domain_generalisation": "domain_generalization"}
"""protocols of edgeclip 0.1"""


@command()
@run_argument
@click.option(
    "--protocol", type=Choice(PROTOCOLS, RENAMED), required=True, help="How to score the student."
)
@click.option(
    "--data",
    "data",
    multiple=True,
    metavar="SET",
    help="NAME=DIR, a folder in CLIP_benchmark's layout, or a YAML file; may be repeated.",
)
@json_option
def evaluate(run: Path | None, protocol: str, data: tuple[str, ...], as_json: bool) -> None:
    """Score RUN's student and its teacher under a protocol.

    RUN is a run folder, runs/latest by default. Without --data the run's own test images are
    scored.

    \b
    Example:
        edgeclip evaluate runs/clothing --protocol base_to_novel --data clothing=path/to/clothing
    """
    from edgeclip.cli.tables.scores import protocol as table
    from edgeclip.host.evaluation.protocols import evaluate as score
    from edgeclip.reports.store import latest_run

    record = score(latest_run(run), protocol, data)
    if as_json:
        print_json(record)
    else:
        table(record)


@command()
@run_argument
@json_option
def report(run: Path | None, as_json: bool) -> None:
    """Write RUN's report.html: accuracy step by step, and ship or not.

    RUN is a run folder, runs/latest by default. Nothing is measured here: a figure that `validate`
    or `bench` did not write is shown as "not measured".

    \b
    Example:
        edgeclip report runs/quickstart
    """
    from edgeclip.reports.html import report as write
    from edgeclip.reports.store import latest_run

    path, verdicts = write(latest_run(run))
    lines = [f"{target}: {verdict}" for target, verdict in verdicts.items()]
    say(as_json, {"report": str(path), "verdicts": verdicts}, "\n".join([*lines, str(path)]))
