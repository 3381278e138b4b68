"""Put a folder in the place of another, at no moment without one of them under its name."""

import ctypes
import errno
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from edgeclip.disk import leftovers

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def take_place(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`; what lay there is removed.

    Linux exchanges both names at once. Where a disk cannot (NFS, some overlays), the old folder is
    put aside first: who is killed between the two renames leaves it whole, and `leftovers.restore`
    puts it back.
    """
    if not path.exists() and _renamed(new, path):
        sync(path.parent)
    elif _exchange(new, path):
        sync(path.parent)
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = leftovers.aside(path)
        with leftovers.held(path):  # nobody puts it back in between
            path.rename(old)
            new.rename(path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)


def _renamed(new: Path, path: Path) -> bool:
    """Rename a folder; False where another process has just put its own there."""
    try:
        new.rename(path)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _exchange(a: Path, b: Path) -> bool:
    """Let two paths change places; False where this system or disk cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    done = rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)
    return bool(done == 0)


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """Return the C library's function; None where it has none.

    Once a process: each `CDLL` is a class of its own, 3 KiB that only the garbage collector frees.
    """
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    return found


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
