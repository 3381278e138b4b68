"""The command line: parse, call the library, print.

Results go to stdout as a table, or as JSON with --json; progress goes to stderr. Exit codes:

    0          done, and every gate held
    1          a mistake of the user's, in one line: where, what, what to do
    2          a malformed command line
    3          a gate failed
    4          no gate failed, but one cannot be told from what was measured
    130, 143   interrupted, terminated

The host layer (torch) is imported inside the commands that need it, so `edgeclip --help` answers
at once.
"""

import click

from edgeclip.cli import bundle, cache, conformance, device, export, look, more, run, train
from edgeclip.cli.group import HELP, Group


@click.group(cls=Group, context_settings=HELP)
@click.version_option(package_name="edgeclip")
def main() -> None:
    """Distill a large CLIP for a small board, and prove on the board that it is the same model."""


COMMANDS = (
    train.init,
    train.distill,
    export.export,
    device.validate,
    device.bench,
    run.report,
    bundle.classify,
    bundle.labels,
    bundle.embed,
    run.evaluate,
    cache.cache,
    look.lint,
    look.list_,
    device.doctor,
    device.selftest,
    conformance.conformance,
    more.migrate,
    more.completion,
)
for command in COMMANDS:
    main.add_command(command)
