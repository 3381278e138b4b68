"""Temporary names beside what is written, and what a killed process left under them.

`.NAME.<16 hex digits>.tmp` is a folder that grows, or one that was just replaced; `.old` one that
a disk without an exchange of names put aside; `.STEM.<16 hex digits>.SUFFIX` a file that grows.
Whoever writes holds a lock on it, so what nobody holds was left behind, whatever its process's
number was and in whichever container it ran.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

MANIFEST = "manifest.json"
"""a folder that has it is whole"""
TOKEN = re.compile("[0-9a-f]{16}|[0-9]{1,10}")
"""what makes a temporary name; digits: a process's number, which stood there until edgeclip 0.2"""


def temporary_folder(path: Path) -> Path:
    """Return the path, which nothing has, of a folder that will take the place of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def temporary_file(path: Path) -> Path:
    """Return the path, which nothing has, of a file that will take the place of `path`.

    The suffix stays: numpy and others choose a format, or append one, by it.
    """
    return path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")


def aside(path: Path) -> Path:
    """Return the path, which nothing has, where a folder waits until it is replaced."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.old")


@contextlib.contextmanager
def new_held(name: Callable[[], Path], create: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a new temporary file or folder that no other process takes for left behind.

    One that another process swept before it was held is made anew under another name.
    """
    while True:
        path = name()
        create(path)
        with held(path):
            if path.exists():
                yield path
                return


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a file or folder, once whoever looks whether it is free has looked."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a network disk without locks: nobody sweeps there
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def sweep(path: Path) -> None:
    """Remove what killed processes left beside `path`; of a folder also what they put aside.

    A whole folder that was put aside when nothing had taken its place yet is put back.
    """
    restore(path)
    for left in _beside(path):
        of_folder = any(_is_temporary(left, path.name, end) for end in (".tmp", ".old"))
        if of_folder and left.is_dir():
            with _free(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
        elif _is_temporary(left, path.stem, path.suffix) and left.is_file():
            with _free(left) as free:
                if free:
                    left.unlink(missing_ok=True)


def restore(path: Path) -> None:
    """Put back a whole folder that a killed process put aside, where nothing lies at `path`."""
    if path.exists() or not path.parent.is_dir():
        return
    for left in _beside(path):
        if _is_temporary(left, path.name, ".old") and (left / MANIFEST).is_file():
            with _free(left) as free:
                if free:
                    left.rename(path)
                    return


def _is_temporary(left: Path, stem: str, end: str) -> bool:
    """Return whether a name is `.STEM.TOKENEND`.

    No pattern is made of the path: Python keeps 512 of them, and each checkpoint has a new path.
    """
    start = f".{stem}."
    if not (left.name.startswith(start) and left.name.endswith(end)):
        return False
    return TOKEN.fullmatch(left.name[len(start) : len(left.name) - len(end)]) is not None


def _beside(path: Path) -> list[Path]:
    """Return what is hidden in the folder of `path`; links are nobody's leavings."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f".{path.stem}") and not entry.is_symlink():
                found.append(path.parent / entry.name)
    return sorted(found)


@contextlib.contextmanager
def _free(path: Path) -> Iterator[bool]:
    """Yield whether no process holds it, holding it meanwhile; False where that is not known."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        free = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            free = False
        yield free
    finally:
        os.close(fd)
