"""The folder of a data set, and the lists that lie in it."""

from pathlib import Path

from edgeclip.errors import EdgeclipError


def data_root(root: str, name: str) -> Path:
    """Return the folder of the data `name`. Raises `EdgeclipError` where it is missing."""
    path = Path(root)
    if not path.is_dir():
        raise EdgeclipError(
            path,
            f"there is no such folder for the data '{name}'",
            f"give its folder: --data {name}=DIR",
        )
    return path


def read_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a text file, stripped, without the empty ones.

    what: what a line holds. Raises `EdgeclipError` where the file is missing or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EdgeclipError(
            path, "there is no such file", f"write one {what} per line into it"
        ) from None

    lines = []
    for line in text.splitlines():
        if line.strip():
            lines.append(line.strip())
    if not lines:
        raise EdgeclipError(path, "is empty", f"write one {what} per line into it")
    return lines
