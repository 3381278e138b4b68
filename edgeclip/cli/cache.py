"""`edgeclip cache`: the teacher's answers on disk. The host layer is imported inside."""

import json
from pathlib import Path

import click

from edgeclip.cli import tables
from edgeclip.cli.options import json_option


@click.group()
def cache() -> None:
    """Build a teacher cache, or say what is inside one."""


@cache.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "roots",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Where the data lies on this machine; may be repeated.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the cache.  [default: cache/<fingerprint>, where distill finds it]",
)
@json_option
def build(recipe: Path, roots: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Build the teacher caches that RECIPE needs. The same line again resumes; so do other processes, which share the work.

    \b
    Example:
        edgeclip cache build recipes/quickstart.yaml
        torchrun --nproc-per-node 8 -m edgeclip cache build recipes/mobile.yaml
    """
    from edgeclip.host.distill.prepare import build_for

    found = build_for(recipe, roots, out)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    tables.caches(found)


@cache.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Also hash every file and compare with the manifest.")
@json_option
def inspect(folder: Path, verify: bool, as_json: bool) -> None:
    """Say what is inside the cache in FOLDER.

    \b
    Example:
        edgeclip cache inspect cache/0123456789abcdef
    """
    from edgeclip.host.cache.inspect import inspect as examine

    found = examine(folder, verify)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    tables.caches([found])
