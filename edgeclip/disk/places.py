"""Where things lie, and whether something may be written there: asked before the work."""

import os
import shutil
from pathlib import Path

from edgeclip.disk.leftovers import MANIFEST
from edgeclip.disk.reading import read_json
from edgeclip.errors import EdgeclipError

MIN_FREE = 2**24
"""bytes that a disk must have left before anything is begun: a report, and a file system's own"""


def cache_folder() -> Path:
    """Return the user's cache folder for edgeclip: below XDG_CACHE_HOME, or ~/.cache.

    Raises `EdgeclipError` for a user without a home, such as an unknown one of a container.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(cache).expanduser() / "edgeclip"
    except RuntimeError:
        what = "is not set, and this user has no home folder"
        raise EdgeclipError("HOME", what, "set HOME, or XDG_CACHE_HOME, to a folder") from None


def shown(path: object) -> str:
    """Return a path as it may be printed and kept: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(str(path)).decode("utf-8", errors="backslashreplace")


def given(path: str, where: str) -> Path:
    """Return the path that a user gave, in an option or a recipe's field called `where`.

    Raises `EdgeclipError` for the empty one of a variable that is not set, which would be the
    working folder, and for a name that is not UTF-8.
    """
    if not path:
        raise EdgeclipError(where, "is empty", "give a path; is the shell's variable set?")
    found = Path(path)
    refuse_not_utf8(found)
    return found


def refuse_not_utf8(path: Path) -> None:
    """Raise `EdgeclipError` for a name that is not UTF-8: no JSON, and few libraries, hold it."""
    if not is_utf8(str(path)):
        do = f"rename it, for example with: convmv -r -f latin1 -t utf8 --notest {shown(path)}"
        raise EdgeclipError(shown(path), "its name is not UTF-8", do)


def is_utf8(name: str) -> bool:
    """Return whether a name from the operating system, or any text, can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def real(path: Path) -> Path:
    """Return where a path leads, links followed. Raises `EdgeclipError` for a loop of links."""
    try:
        return path.resolve()
    except RuntimeError:  # Python's, until 3.13
        raise EdgeclipError(path, "is a link that leads to itself", "remove the link") from None


def refuse_unwritable(folder: Path, free: int = 0) -> None:
    """Raise `EdgeclipError` unless files can be made in `folder`, which may not exist yet.

    free: bytes that will be written there.
    """
    here = real(folder)
    while not os.path.lexists(here):
        here = here.parent
    if not here.is_dir():
        what = "a file lies where a folder is needed"
        raise EdgeclipError(here, what, "choose another path, or remove it yourself")
    if os.statvfs(here).f_flag & os.ST_RDONLY:
        what = "lies on a disk that is mounted read-only"
        raise EdgeclipError(here, what, "choose a path on another disk, or mount it for writing")
    if not os.access(here, os.W_OK | os.X_OK):
        what = "may not be written to by this user"
        raise EdgeclipError(here, what, "choose another path, or change its owner or rights")
    _refuse_full(here, max(free, MIN_FREE))


def _refuse_full(here: Path, needed: int) -> None:
    """Raise `EdgeclipError` unless a disk has `needed` bytes left, and room for another name."""
    left = shutil.disk_usage(here).free
    if left < needed:
        what = f"{_mib(left)} are left on its disk, and {_mib(needed)} are needed"
        raise EdgeclipError(here, what, "free some space, or choose a path on another disk")
    names = os.statvfs(here)
    if names.f_files and not names.f_favail:
        what = "its disk holds as many files as it can (df -i)"
        raise EdgeclipError(here, what, "remove files, or choose a path on another disk")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def refuse_foreign(path: Path, kind: str | None) -> None:
    """Raise `EdgeclipError` unless a folder of ours can be put at `path`.

    What lies there must be ours, and of this kind, or nothing; a link is followed. kind: of the
    folder that takes its place; None: not known yet. Raises as `refuse_unwritable` too.
    """
    place = real(path)
    if os.path.ismount(place):
        do = f"give a folder in it, such as {place / 'new'}"
        raise EdgeclipError(path, "is a mount point, which nothing can take the place of", do)
    refuse_unwritable(place.parent)
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    found = kind_of(place)
    if found is not None and kind in (None, found):
        return
    what = "something else"
    if found is not None:
        what = f"a {found}"
    raise EdgeclipError(
        path,
        f"{what} lies there already, and is not replaced",
        "choose another path, or remove it yourself",
    )


def finished_in(folder: Path) -> list[Path]:
    """Return the finished folders in a folder, sorted; what is hidden grows, or was left behind."""
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    return [path for path in found if not path.name.startswith(".")]


def kind_of(folder: Path) -> str | None:
    """Return what a folder's manifest calls it; None where it has none."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_json(folder / MANIFEST)
    return manifest.get("kind") if isinstance(manifest, dict) else None
