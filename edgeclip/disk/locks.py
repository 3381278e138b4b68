"""One lock a folder: a run, a bundle, a cache. The second asker waits, or is told who has it.

Who only reads a run shares its lock, so that nobody starts it over meanwhile.
"""

import contextlib
import datetime
import fcntl
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from edgeclip.disk import leftovers
from edgeclip.disk.places import real, refuse_unwritable
from edgeclip.errors import EdgeclipError

WAIT_S = 600.0
"""a command of seconds waits at most so long for another one"""


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `folder`, the file `.NAME.lock` beside it, which goes when it is let go.

    wait: for whoever has it, and not longer than `WAIT_S`; otherwise, and after that, raises
    `EdgeclipError` that names the holder. On a disk without locks the file itself is one. A killed
    holder's lock is free: the kernel lets it go. What it left beside the folder is removed.
    """
    from filelock import FileLock, Timeout

    folder = real(folder)
    refuse_unwritable(folder.parent)
    made = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WAIT_S if wait else 0)
    except Timeout:
        raise _busy(folder, path) from None
    try:
        path.write_text(_self(), encoding="utf-8")
        # Here and not when it is written: it may be found to be done already.
        leftovers.sweep(folder)
        yield
    finally:
        # Before it is let go: a file that was removed is no lock to those who wait for it.
        path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # something lies in it now
            for parent in made:
                parent.rmdir()


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Share the lock of `folder` with others that read what lies in it.

    Raises `EdgeclipError` that names the holder where somebody has it alone. Where no lock can be
    made, as on a disk that is read-only or has none, nothing is held.
    """
    path = real(folder)
    path = path.with_name(f".{path.name}.lock")
    fd = _open_shared(path)
    if fd is None:
        yield
        return
    try:
        os.write(fd, f"{_self()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # the last one to read removes it
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        os.close(fd)


def _open_shared(path: Path) -> int | None:
    """Return a descriptor of the lock that is shared now; None: there can be no lock."""
    how = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW
    while True:
        made = not path.exists()
        try:
            fd = os.open(path, how | os.O_CREAT, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise _busy(path.with_name(path.name[1:-5]), path) from None
        except OSError:
            os.close(fd)
            if made:
                path.unlink(missing_ok=True)
            return None
        if os.fstat(fd).st_nlink:  # else it was removed meanwhile, and is no lock
            return fd
        os.close(fd)


def _busy(folder: Path, path: Path) -> EdgeclipError:
    do = "wait until it is done, or choose another path"
    return EdgeclipError(folder, f"is in use by {_holder(path)}", do)


def _self() -> str:
    command = " ".join(["edgeclip", *sys.argv[1:2]])
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"{command}, process {os.getpid()} on {socket.gethostname()}, since {now}"


def _holder(path: Path) -> str:
    """Return the first one in the file that still runs, as far as can be known from here."""
    try:
        lines = path.read_text(encoding="utf-8")[:2000].splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for line in lines:
        found = re.search(r", process (\d+) on (\S+), since ", line[:200])
        if found is None or found[2] != socket.gethostname() or _runs(int(found[1])):
            return line[:200]
    return "another process"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
