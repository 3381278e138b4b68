"""Options and arguments that several commands share."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeclip.cli import complete

F = Callable[..., Any]


class Place(click.Path):
    """A path of the user's: not the empty one of an unset variable, and of UTF-8."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from edgeclip import disk

        where = param.opts[0] if param else "path"
        return disk.given(str(super().convert(value, param, ctx) if value else ""), where)


PATH = Place(path_type=Path)
IMAGE = click.Path(path_type=Path)
"""its name may be of any bytes: an image is opened, and its name is only printed"""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
run_argument = click.argument("run", type=PATH, required=False)
recipe_argument = click.argument(
    "recipe",
    callback=lambda _, __, name: recipe_path(name),
    shell_complete=complete.names("recipe"),
)
data_option = click.option(
    "--data",
    "roots",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Where the data is on this machine; may be repeated.",
)
bundle_option = click.option(
    "--bundle", type=PATH, help="Bundle folder.  [default: the latest run's for this CPU]"
)


def target_option(name: str, help: str, **more: Any) -> Callable[[F], F]:
    return click.option(
        "--target", name, help=help, shell_complete=complete.names("target"), **more
    )


def device_option(name: str, help: str, **more: Any) -> Callable[[F], F]:
    return click.option(
        "--device", name, help=help, shell_complete=complete.names("device"), **more
    )


class FiniteFloat(click.FloatRange):
    """A number of at least `min`; click's own range takes "nan" for one that is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


class Choice(click.Choice):  # type: ignore[type-arg]  # generic from click 8.2 on alone
    """A choice that names the new word for an old one."""

    def __init__(self, choices: tuple[str, ...], renamed: dict[str, str]):
        super().__init__(choices)
        self.renamed = renamed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.renamed:
            self.fail(f"'{value}' was renamed to '{self.renamed[value]}'", param, ctx)
        return super().convert(value, param, ctx)


def recipe_path(name: str) -> Path:
    """Return the path of a recipe: a YAML file as it is, a bare name among the shipped ones.

    Raises `EdgeclipError` with a did-you-mean for an unknown name.
    """
    from edgeclip import config

    return config.find("recipe", name)


def print_json(value: Any) -> None:
    """Print a record, or what JSON knows, as JSON."""
    import msgspec

    click.echo(json.dumps(msgspec.to_builtins(value), indent=1))


def say(as_json: bool, value: Any, text: str) -> None:
    """Print `value` as JSON, or the lines of `text` instead."""
    from edgeclip.errors import printable

    if as_json:
        print_json(value)
    else:
        for line in text.split("\n"):
            click.echo(printable(line))
