"""What the commands share: `--json`, and which run, bundle or labels are meant."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeclip.errors import EdgeclipError

DEFAULT_RUN = Path("runs/latest")


def json_option(f: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(f)


def say(as_json: bool, value: Any, text: str) -> None:
    click.echo(json.dumps(value, indent=1) if as_json else text)


def latest(run: Path | None) -> Path:
    run = run or DEFAULT_RUN
    if not run.exists():
        raise EdgeclipError(
            run,
            "there is no such run",
            "name one with --run, or make one with: edgeclip distill RECIPE",
        )
    if run.is_symlink():
        click.echo(f"run: {run.resolve()}", err=True)
    return run.resolve()


def one_bundle(bundle: Path | None) -> Path:
    """--bundle, or the newest run's only bundle for this machine's CPU: int8 of its kind before fp32, onnx before others."""
    if bundle is not None:
        return bundle
    run = latest(None)
    for name in (
        "onnx-int8-arm" if platform.machine() == "aarch64" else "onnx-int8",
        "onnx-fp32",
        "openvino-int8",
    ):
        if (run / "bundles" / name).is_dir():
            click.echo(f"bundle: {run / 'bundles' / name}", err=True)
            return run / "bundles" / name
    raise EdgeclipError(
        run,
        "has no bundle that classifies on this machine",
        "name one with --bundle, or make one with: edgeclip export --target onnx-int8",
    )


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
