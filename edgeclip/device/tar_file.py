"""The one way through a tar shard: its members as they lie in the file, whatever their headers say.

tarfile reads a header in full before anyone can look at it, follows headers of headers until
Python's stack ends, goes backwards for a negative size, and gives a sparse member's holes as if
they were there. Here a header is bounded, a member lies within its file, and only what is stored
byte for byte is a file. benchmarks/fuzz.py tries it.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from edgeclip.device.image_file import LACKING
from edgeclip.errors import EdgeclipError

MAX_HEADER = 2**14
"""bytes of a header that belongs to a member's header: a long name, or pax fields"""
MAX_HEADERS = 8
"""of those before one member: each is a level of Python's stack"""
OF_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
SPARSE = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")
"""pax fields of members whose bytes are not those of the file that they were"""
CUT = "it was cut off, or is damaged in the middle"


class Member(NamedTuple):
    """What lies in a shard under a name."""

    name: str
    offset: int
    """of its first byte in the shard"""
    size: int
    """in bytes"""
    is_file: bool
    """else it is a folder, a link, a device or a sparse file"""
    is_folder: bool


class _Header(tarfile.TarInfo):
    """A member's header; `_proc_member` is where tarfile lets a subclass look at it first."""

    is_stored = False
    """whether its bytes lie in the archive as they are"""

    def _proc_member(self, tar: "_Archive") -> "_Header":
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("it has a sparse member; make it without --sparse")
        if self.type in OF_HEADERS:
            tar.headers += 1
            if not 0 <= self.size <= MAX_HEADER:
                raise tarfile.ReadError(f"a header has more than {MAX_HEADER:,} bytes")
            if tar.headers > MAX_HEADERS:
                raise tarfile.ReadError(f"a member has more than {MAX_HEADERS} headers")
        found: _Header = super()._proc_member(tar)
        tar.headers = 0
        # A size of pax may be another than that by which the next header was found.
        end: int = found.offset_data + found._block(found.size)  # type: ignore[attr-defined]
        if found.size < 0 or not self.offset < tar.offset <= tar.length:
            raise tarfile.ReadError(CUT)
        sparse = found.sparse is not None or any(map(_is_sparse, found.pax_headers))
        found.is_stored = found.isreg() and end == tar.offset and not sparse
        return found

    def _proc_gnusparse_10(self, *_: object) -> None:
        """Leave the map of a sparse member unread: it is as long as its writer likes."""


class _Archive(tarfile.TarFile):
    tarinfo = _Header
    headers = 0
    """of headers, since the last member"""

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return os.fstat(cast(BinaryIO, self.fileobj).fileno()).st_size


def _is_sparse(field: str) -> bool:
    return field.startswith(SPARSE)


def open_file(path: Path) -> BinaryIO:
    """Return a shard's file, open. Raises `EdgeclipError` that names it."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except (OSError, ValueError) as e:  # ValueError: a path with a NUL in it
        what = f"cannot be read ({getattr(e, 'strerror', None) or e})"
        raise EdgeclipError(path, what, "give a tar file") from None


def members(path: Path) -> Iterator[Member]:
    """Yield what lies in an uncompressed shard, in its order.

    Raises `EdgeclipError` that names the shard for what is no tar, is damaged or was cut off, and
    for headers that are more than a header needs.
    """
    with open_file(path) as file:
        try:
            archive = _Archive.open(fileobj=file, mode="r:")
        except Exception as e:
            raise damaged(path, e) from None
        while (found := _next(archive, path)) is not None:
            vars(archive)["members"] = []  # it would keep all of them
            yield Member(found.name, found.offset_data, found.size, found.is_stored, found.isdir())


def _next(archive: tarfile.TarFile, path: Path) -> _Header | None:
    """Return the next member's header; None at the end, which is a block of zeros."""
    try:
        found: _Header | None = archive.next()  # type: ignore[assignment]
        if found is None:
            _refuse_cut(archive)
        return found
    except Exception as e:
        if isinstance(e, OSError) and e.errno in LACKING:
            raise
        # Of damaged bytes tarfile makes any error that Python has.
        raise damaged(path, e) from None


def _refuse_cut(archive: tarfile.TarFile) -> None:
    """Raise `tarfile.ReadError` unless the archive, read to its end, ends with a block of zeros.

    tarfile takes one that was cut off between two members, or has rubbish there, for a whole one.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(CUT)


def damaged(path: Path, why: object) -> EdgeclipError:
    """Return the error for a shard that is refused."""
    reason = " ".join(str(why).split())[:200] or type(why).__name__
    return EdgeclipError(
        path, f"not a readable WebDataset shard ({reason})", "replace or remove it"
    )
