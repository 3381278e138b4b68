"""Put a folder in the place of another, at no moment without one of them under its name."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgeclip.disk import leftovers
from edgeclip.progress import say

AT_FDCWD = -100
RENAME_EXCHANGE = 2
SAY_S = 1.0
"""who waits longer for readers says so"""


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep the folder at `folder` in its place, so that what is read of it is of one folder.

    Whoever wants to replace it waits; any number may read. A folder that does not exist, and a
    disk without locks, is not held.
    """
    fd = _shared(folder)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _shared(folder: Path) -> int | None:
    """Return a descriptor that shares the lock of the folder, or None where there is none."""
    while True:
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(fd), folder.stat()):
                return fd
        except OSError:  # a network disk without locks, or another one is just taking its place
            if folder.exists():
                return fd
        os.close(fd)


@contextlib.contextmanager
def unread(folder: Path) -> Iterator[bool]:
    """Wait until nobody is `reading` the folder, and let nobody begin.

    Yields whether it is there.
    """
    fd = _alone(folder)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def _alone(folder: Path) -> int | None:
    """Return a descriptor that has the lock of the folder alone, or None where there is none."""
    while True:
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # a network disk without locks
            _lock_alone(fd, folder)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), folder.stat()):
                return fd
        os.close(fd)


def _lock_alone(fd: int, folder: Path) -> None:
    for _ in range(int(SAY_S / 0.05)):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return
    say(f"{folder}: waiting until nobody reads it")
    fcntl.flock(fd, fcntl.LOCK_EX)


def take_place(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`; what lay there is removed, once nobody is `reading` it.

    Linux exchanges both names at once. Where a disk cannot (NFS, some overlays), the old folder is
    put aside first: who is killed between the two renames leaves it whole, and `leftovers.restore`
    puts it back.
    """
    while path.exists() or not _renamed(new, path):
        with unread(path) as there:  # nor does anybody put it back in between
            if there:
                _replace(new, path)
                return
    sync(path.parent)


def _replace(new: Path, path: Path) -> None:
    if _exchange(new, path):
        sync(path.parent)
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = leftovers.aside(path)
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
