"""What the operating system refuses, in one line: the boundary that every command ends at."""

import errno
import os
import sys
from pathlib import Path

DO = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "raise the limit (ulimit -f), or write to another disk",
    errno.EROFS: "write to another place, or mount the disk for writing",
    errno.EACCES: "change its owner or rights, or choose another path",
    errno.EPERM: "change its owner or rights, or choose another path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file lies where a folder is needed: choose another path",
    errno.EISDIR: "a folder lies where a file is needed: choose another path",
    errno.EEXIST: "choose another path, or remove it yourself",
    errno.ENOTEMPTY: "another program writes there: choose another path, or stop it",
    errno.EBUSY: "it is in use, or a mount point: choose another path",
    errno.EXDEV: "choose a path on one disk",
    errno.ELOOP: "remove the link that leads to itself",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files: ulimit -n 4096",
    errno.ENFILE: "close other programs: the machine has too many open files",
    errno.ENOMEM: "close other programs, or take a machine with more memory",
    errno.EIO: "the disk or the connection to it has failed: look at dmesg",
    errno.ESTALE: "the network disk has gone: mount it again",
}
"""errno, to what to do about it"""
GONE = (errno.EPIPE, errno.EIO)
"""what writing to a terminal or a pipe says that nobody reads any longer"""


def line_of(error: OSError, command: str) -> str:
    """Return *where: what; what to do* of a refusal of the operating system.

    command: what is named where the refusal names no file.
    """
    from edgeclip import disk

    if error.errno == errno.ENOENT and error.filename is None and _without_folder():
        return f"{command}: the working folder is gone; change to one that exists"
    where = command
    if error.filename is not None:
        where = disk.shown(os.fsdecode(error.filename))
    what = error.strerror or str(error) or type(error).__name__
    return f"{where}: {what}; {DO.get(error.errno or 0, 'check the path, its rights and its disk')}"


def _without_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def is_readerless(error: OSError) -> bool:
    """Return whether stdout's reader, a terminal or a pipe, has gone; files keep their names."""
    return error.filename is None and error.errno in GONE


def line_of_text(error: UnicodeEncodeError, command: str) -> str:
    """Return the line of a name, from the operating system, that is not UTF-8."""
    from edgeclip import disk

    name = str(error.object)
    if disk.is_utf8(name):
        return f"{command}: {error.reason}; set PYTHONIOENCODING=utf-8"
    return f"{command}: the name {disk.shown(name)[:200]} is not UTF-8; rename it"


def print_any_name() -> None:
    """Let stdout and stderr print names and labels that they cannot encode: escaped, as \\xff."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
