"""What lies below a folder of data: linked folders as their own, and no system's leavings."""

import collections
import os
import re
from collections.abc import Iterator
from pathlib import Path

from edgeclip import disk
from edgeclip.errors import EdgeclipError

LEFT_BY_SYSTEMS = {
    "__macosx",
    ".ds_store",
    ".ipynb_checkpoints",
    "@eadir",
    "desktop.ini",
    "ehthumbs.db",
    "thumbs.db",
}
"""names in lower case"""
OF_WEBDATASET = re.compile(r"__[^/]*__($|/)")
"""what webdataset's own reader of tars passes over"""


def no_data(member: str) -> bool:
    """Return whether a path in a tar is a system's leaving, or WebDataset's note of its own."""
    if OF_WEBDATASET.match(member):
        return True
    parts = member.split("/")
    return any(part.startswith("._") or part.lower() in LEFT_BY_SYSTEMS for part in parts)


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield (where it really lies, its files) of `folder` and of each folder below, once.

    Links come last, so that what also lies below `folder` itself keeps its own path. Raises
    `EdgeclipError` as `entries`.
    """
    seen: set[Path] = set()
    pending = collections.deque([folder])
    while pending:
        here = pending.popleft()
        real = here.resolve()
        if real in seen:
            continue
        seen.add(real)
        folders, files = entries(here)
        yield real, files
        for path in folders:
            if path.is_symlink():
                pending.append(path)
            else:
                pending.appendleft(path)


def entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the files in a folder, each sorted.

    Left out: what is hidden, what systems leave, and a link to a folder that it lies in, which
    would be a loop. Raises `EdgeclipError` for a folder that cannot be read, and for a name that is
    not UTF-8.
    """
    folders = []
    files = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.startswith(".") or entry.name.lower() in LEFT_BY_SYSTEMS:
                    continue
                path = folder / entry.name
                disk.refuse_not_utf8(path)
                link = entry.is_symlink()
                target = path if link else entry  # a path needs no target, an entry raises
                if target.is_dir():
                    if not (link and _is_loop(path)):
                        folders.append(path)
                elif target.is_file() or not path.exists():  # a broken link is told when it is read
                    files.append(path)
    except OSError as e:
        do = "check the path and its rights"
        raise EdgeclipError(folder, f"cannot be read ({e.strerror})", do) from None
    return sorted(folders), sorted(files)


def _is_loop(link: Path) -> bool:
    return link.parent.resolve().is_relative_to(link.resolve())
