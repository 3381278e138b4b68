"""`edgeclip evaluate` and `edgeclip report`: what a run is worth."""

from pathlib import Path

import click

from edgeclip.cli.group import command
from edgeclip.cli.options import PATH, Choice, json_option, print_json, run_argument, say

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
@click.argument("runs", type=PATH, nargs=-1)
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
@json_option
def report(runs: tuple[Path, ...], show: bool, as_json: bool) -> None:
    """Write report.html into each of RUNS: ship or not, and why.

    RUNS are run folders, runs/latest by default. Of several one more page has all side by side.
    Nothing is measured here: a figure that `validate` or `bench` did not write is shown as "not
    measured".

    \b
    Examples:
        edgeclip report runs/quickstart
        edgeclip report runs/clothing runs/grocery --open
    """
    from edgeclip.device.records import to_json
    from edgeclip.reports.answers import between
    from edgeclip.reports.earlier import sentence
    from edgeclip.reports.html import report as write
    from edgeclip.reports.html import side_by_side
    from edgeclip.reports.store import latest_run

    folders = [latest_run(run) for run in runs or (None,)]
    pages = []
    verdicts: dict[str, str] = {}
    for folder in folders:
        path, of_targets = write(folder)
        pages.append(path)
        before = f"{folder.name}: " if len(folders) > 1 else ""
        verdicts |= {f"{before}{target}": verdict for target, verdict in of_targets.items()}
    if len(folders) > 1:
        pages.append(side_by_side(folders))
    lines = [f"{target}: {verdict}" for target, verdict in verdicts.items()]
    record: dict[str, object] = {"report": str(pages[-1]), "verdicts": verdicts}
    if len(folders) > 1:
        pairs = between(folders)
        record["reports"] = [str(page) for page in pages]
        record["paired"] = to_json(pairs)
        lines += [f"{pair.name}: {sentence(pair.found)}" for pair in pairs]
    say(as_json, record, "\n".join([*lines, *(str(page) for page in pages)]))
    if show:
        click.launch(str(pages[-1]))
