"""What the commands share: `--json`, and which labels are meant."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeclip.errors import EdgeclipError


def json_option(f: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(f)


def say(as_json: bool, value: Any, text: str) -> None:
    click.echo(json.dumps(value, indent=1) if as_json else text)


def label_file(path: Path) -> list[str]:
    try:
        labels = [
            line.strip()
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except OSError as e:
        raise EdgeclipError(
            path, f"cannot be read ({e.strerror})", "give a text file, one label a line"
        ) from None
    except UnicodeDecodeError:
        raise EdgeclipError(
            path, "is not UTF-8", "save it as UTF-8 (iconv -f cp1252 -t utf-8)"
        ) from None
    if not labels:
        raise EdgeclipError(path, "empty class list", "write one label a line")
    return labels
