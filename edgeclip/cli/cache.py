"""`edgeclip cache`: the teachers' answers on disk."""

from pathlib import Path

import click

from edgeclip.cli.group import Command
from edgeclip.cli.options import PATH, data_option, json_option, print_json, recipe_argument
from edgeclip.cli.tables.caches import caches


@click.group()
def cache() -> None:
    """Build a teacher cache, or describe one."""


@cache.command(cls=Command)
@recipe_argument
@data_option
@click.option(
    "--out",
    type=PATH,
    help="Cache folder.  [default: cache/<fingerprint>, where distill finds it]",
)
@json_option
def build(recipe: Path, roots: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Build the teacher caches that RECIPE needs.

    RECIPE is a name from `edgeclip list recipes`, or a YAML file. The same command resumes an
    interrupted build; run it in several processes, and they share the work.

    \b
    Examples:
        edgeclip cache build quickstart
        torchrun --nproc-per-node 8 -m edgeclip cache build recipes/mobile.yaml
    """
    from edgeclip.host.distill.prepare import build_for

    found = build_for(recipe, roots, out)
    if as_json:
        print_json(found)
    else:
        caches(found)


@cache.command(cls=Command)
@click.argument("folder", type=PATH)
@click.option("--verify", is_flag=True, help="Also hash every file and compare with the manifest.")
@json_option
def inspect(folder: Path, verify: bool, as_json: bool) -> None:
    """Describe the cache in FOLDER.

    \b
    Example:
        edgeclip cache inspect cache/0123456789abcdef
    """
    from edgeclip.host.cache.inspect import inspect as examine

    found = examine(folder, verify)
    if as_json:
        print_json(found)
    else:
        caches([found])
