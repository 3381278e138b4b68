"""What the shell completes: names of recipes, targets and devices, and the labels of a bundle."""

from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names(kind: str) -> Completer:
    """Return a completer for the shipped names of a kind ('recipe', 'target' or 'device').

    Where no name begins so, files are completed: each of them may be a YAML file of one's own.
    """

    def complete(ctx: click.Context, param: click.Parameter, word: str) -> list[CompletionItem]:
        from edgeclip import config

        known = [name for name in sorted(config.shipped(kind)) if name.startswith(word)]
        if not known:
            return [CompletionItem(word, type="file")]
        return [CompletionItem(name) for name in known]

    return complete


def labels(ctx: click.Context, param: click.Parameter, word: str) -> list[CompletionItem]:
    """Complete the last of several comma-separated labels from the bundle's baked ones."""
    from edgeclip import disk
    from edgeclip.errors import EdgeclipError, printable
    from edgeclip.reports.store import one_bundle

    try:
        bundle = one_bundle(_path(ctx.params.get("bundle")))
        known = disk.read_json(bundle / "labels.json")
    except (EdgeclipError, OSError, ValueError):
        return []
    before, comma, last = word.rpartition(",")
    start = f"{before}{comma}"
    space = last[: len(last) - len(last.lstrip())]
    items = []
    for label in known if isinstance(known, list) else []:
        if not isinstance(label, str) or label != printable(label):  # a shell prints it
            continue
        if label.startswith(last.strip()):
            items.append(CompletionItem(f"{start}{space}{label}"))
    return items


def _path(value: str | Path | None) -> Path | None:
    if value is None:
        return None
    return Path(value)
