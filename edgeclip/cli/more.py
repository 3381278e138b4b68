"""`edgeclip migrate` and `edgeclip completion`."""

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from edgeclip.cli.group import command
from edgeclip.cli.options import PATH, json_option, say

VARIABLE = "_EDGECLIP_COMPLETE"


@command()
@click.argument("path", type=PATH)
@json_option
def migrate(path: Path, as_json: bool) -> None:
    """Rewrite what edgeclip 0.1 wrote in today's format.

    PATH is a run, a bundle, or a recipe, target or device. It is changed in place; comments stay,
    and reports go on counting for their bundle.

    \b
    Examples:
        edgeclip migrate runs/quickstart
        edgeclip migrate my-recipe.yaml
    """
    from edgeclip.cli.migrating import migrate as write

    written = [str(file) for file in write(path)]
    text = "\n".join(written) or f"{path}: is of today's format already"
    say(as_json, {"written": written}, text)


@command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that completes edgeclip's words in SHELL.

    It completes commands, options, recipes, targets, devices and a bundle's labels.

    \b
    Examples:
        edgeclip completion bash >> ~/.bashrc
        edgeclip completion zsh >> ~/.zshrc
        edgeclip completion fish > ~/.config/fish/completions/edgeclip.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # one of the choices above
    script = kind(ctx.find_root().command, {}, "edgeclip", VARIABLE).source()
    say(as_json, {"shell": shell, "script": script}, script)
