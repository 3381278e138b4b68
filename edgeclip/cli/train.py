"""`edgeclip init` and `edgeclip distill`: from a folder of photos to a trained student."""

from pathlib import Path

import click

from edgeclip.cli.group import command
from edgeclip.cli.options import (
    PATH,
    data_option,
    json_option,
    print_json,
    recipe_argument,
    say,
)


@command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="Path of the recipe.  [default: <folder name>.yaml]")
@json_option
def init(folder: Path, out: Path | None, as_json: bool) -> None:
    """Write a recipe for FOLDER, a folder of photos by class.

    FOLDER has one sub-folder per class; its name is the label.

    \b
    Example:
        edgeclip init ~/photos && edgeclip distill photos.yaml
    """
    from edgeclip.host.data.starter import write_recipe

    found = write_recipe(folder, out)
    counts = {"classes": found.classes, "train": found.train, "test": found.test}
    text = (
        f"{found.path}: {found.classes} classes, {found.train} photos train and {found.test} test;"
        f" next: fill in data.license, then edgeclip distill {found.path}"
    )
    value = {"recipe": str(found.path), **counts, "enough": found.enough}
    say(as_json, value, "\n".join([*found.enough, text]))


@command()
@recipe_argument
@data_option
@click.option("--out", type=PATH, help="Run folder.  [default: runs/<recipe name>]")
@click.option("--fresh", is_flag=True, help="Start over instead of resuming.")
@json_option
def distill(
    recipe: Path, roots: tuple[str, ...], out: Path | None, fresh: bool, as_json: bool
) -> None:
    """Distill a teacher into a student, as RECIPE describes.

    RECIPE is a name from `edgeclip list recipes`, or a YAML file. A run that was interrupted is
    resumed by the same command.

    \b
    Examples:
        edgeclip distill quickstart
        torchrun --nproc-per-node 8 -m edgeclip distill recipes/mobile.yaml
    """
    from edgeclip.cli.tables.scores import accuracy
    from edgeclip.host.distill import run as host

    results = host.distill(recipe, roots, out, fresh)
    if results is None:
        return  # one of several processes; rank 0 prints
    if as_json:
        print_json(results)
    else:
        accuracy(results)
