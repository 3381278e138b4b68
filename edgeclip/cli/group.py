"""What every command shares: the order in `--help`, and the one place where errors become lines."""

import functools
import signal
import sys
from typing import Any, NoReturn

import click

from edgeclip.cli import system
from edgeclip.errors import EdgeclipError, Interrupted, Refused, printable
from edgeclip.progress import is_rank_zero

HELP = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}
SECTIONS = {
    "Train and ship": ("init", "distill", "export", "validate", "bench", "report"),
    "Use a bundle": ("classify", "labels", "embed"),
    "Look": ("evaluate", "cache", "lint", "list", "doctor", "selftest", "conformance"),
    "More": ("migrate", "completion"),
}
"""the commands, in the order of work"""
RENAMED_OPTIONS = {
    "--pictures": ("--images-limit", "--images"),
    "--images": ("--images-limit",),
}
"""old options, to what they are called now; the first that a command has"""
HOST_PACKAGES = (
    "jaxtyping",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "open_clip",
    "pyarrow",
    "safetensors",
    "timm",
    "torch",
    "torchvision",
)
"""modules that the extra `train` installs"""
EXTRAS = {**dict.fromkeys(HOST_PACKAGES, "train"), "tokenizers": "text"}
"""module, to the extra that installs it"""
RESUME = "no partial output was left; run the same command again to resume"


class Command(click.Command):
    """A command that names the new word for an old option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            has = {name for param in self.params for name in param.opts}
            for new in RENAMED_OPTIONS.get(e.option_name, ()):
                if new in has:
                    message = f"{e.option_name} was renamed to {new}"
                    raise click.UsageError(message, ctx) from None
            raise


command = functools.partial(click.command, cls=Command)
"""`@click.command()` of edgeclip"""


class Group(click.Group):
    """Commands in sections; a user's mistake becomes one line, and a signal its exit code."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        ordered = [name for names in SECTIONS.values() for name in names]
        return [name for name in ordered if name in self.commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            rows = []
            for name in names:
                if name in self.commands:
                    # no limit: a summary is wrapped, never cut
                    rows.append((name, self.commands[name].get_short_help_str(limit=1000)))
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _terminated)
        system.print_any_name()
        try:
            return super().invoke(ctx)
        except Refused as e:
            from edgeclip.reports.store import GATE_FAILED

            click.echo(f"Refused: {_one_line(e)}", err=True)
            sys.exit(GATE_FAILED)
        except EdgeclipError as e:
            raise click.ClickException(_one_line(e)) from None
        except Interrupted as e:
            if is_rank_zero():
                click.echo(str(e), err=True)
            sys.exit(128 + e.number)
        except KeyboardInterrupt:
            click.echo(f"Interrupted: {RESUME}.", err=True)
            sys.exit(128 + signal.SIGINT)
        except OSError as e:
            if system.is_readerless(e):
                raise  # click ends quietly where stdout's reader has gone
            line = printable(system.line_of(e, ctx.invoked_subcommand or ""))
            raise click.ClickException(line) from None
        except UnicodeEncodeError as e:
            line = system.line_of_text(e, ctx.invoked_subcommand or "")
            raise click.ClickException(line) from None
        except ModuleNotFoundError as e:
            extra = EXTRAS.get((e.name or "").split(".")[0])
            if extra is None:
                raise
            what = f"{ctx.invoked_subcommand}: {e.name} is not installed"
            raise click.ClickException(f"{what}; pip install 'edgeclip[{extra}]'") from None


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())


def _terminated(*_: object) -> NoReturn:
    click.echo(f"Terminated: {RESUME}.", err=True)
    sys.exit(128 + signal.SIGTERM)
