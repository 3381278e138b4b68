"""`edgeclip completion`."""

import click
from click.shell_completion import get_completion_class

from edgeclip.cli.group import command
from edgeclip.cli.options import json_option, say

VARIABLE = "_EDGECLIP_COMPLETE"


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
