"""One lock a folder: a run, a bundle, a cache. The second asker waits, or is told who has it."""

import contextlib
import datetime
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from edgeclip.disk.places import real, refuse_unwritable
from edgeclip.errors import EdgeclipError

WAIT_S = 600.0
"""a command of seconds waits at most so long for another one"""


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `folder`, the file `.NAME.lock` beside it, which goes when it is let go.

    wait: for whoever has it, and not longer than `WAIT_S`; otherwise, and after that, raises
    `EdgeclipError` that names the holder. On a disk without locks the file itself is one. A killed
    holder's lock is free: the kernel lets it go.
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
        do = "wait until it is done, or choose another path"
        raise EdgeclipError(folder, f"is in use by {_holder(path)}", do) from None
    try:
        path.write_text(_self(), encoding="utf-8")
        yield
    finally:
        # Before it is let go: a file that was removed is no lock to those who wait for it.
        path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # something lies in it now
            for parent in made:
                parent.rmdir()


def _self() -> str:
    command = " ".join(["edgeclip", *sys.argv[1:2]])
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"{command}, process {os.getpid()} on {socket.gethostname()}, since {now}"


def _holder(path: Path) -> str:
    try:
        found = path.read_text(encoding="utf-8")[:200].strip()
    except (OSError, UnicodeDecodeError):
        found = ""
    return found or "another process"
