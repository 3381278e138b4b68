"""The folder of a data set."""

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
