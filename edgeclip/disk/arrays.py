"""Arrays whose shape and dtype are known beforehand: compared before a byte of them is allocated.

A header of 100 bytes may promise a terabyte, and a zip of 3 MB unpacks to 3 GB. So nothing is read
by what a file says of itself: it holds what was declared, to the byte, or it is refused.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgeclip.disk.reading import HEADER
from edgeclip.errors import EdgeclipError

MOST_HEADER = 4096
"""bytes of a .npy header"""
AGAIN = "make it again with the command that wrote it"


class Declared(NamedTuple):
    """What an array must be."""

    shape: tuple[int | None, ...]
    """None: any size, as far as `most` allows"""
    dtypes: tuple[str, ...] = ("float32",)
    """numpy's names; "str": a text of at most 16 characters"""
    most: int = 2**31
    """bytes"""
    finite: bool = False
    """whether a value that is not finite is refused"""

    def largest(self) -> int:
        """Return the bytes of the largest .npy file that can be this."""
        known = [size for size in self.shape if size is not None]
        if len(known) < len(self.shape):
            return MOST_HEADER + self.most
        widest = max(64 if name == "str" else np.dtype(name).itemsize for name in self.dtypes)
        return MOST_HEADER + min(self.most, math.prod(known) * widest)


def read_declared(file: Path, declared: Declared) -> np.ndarray:
    """Return a .npy file's array. Raises `EdgeclipError` unless it is what was declared."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        return _read(stream, size, declared, file, AGAIN)


def read_declared_arrays(
    file: Path | bytes, declared: dict[str, Declared], where: object, do: str = AGAIN
) -> dict[str, np.ndarray]:
    """Return those of the declared arrays that a .npz file holds, by name.

    file: its path, or its content. where, do: for messages. Raises `EdgeclipError` for an array
    that was not declared, or is not what was declared, and for what is no .npz file.
    """
    source: io.BytesIO | Path = io.BytesIO(file) if isinstance(file, bytes) else file
    found = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name not in declared or name in found:
                    what = f"holds an array '{name[:40]}' that nobody asked for, or twice"
                    raise EdgeclipError(where, what, do)
                at = f"{where}: {name}"
                with archive.open(info) as stream:
                    content = stream.read(declared[name].largest() + 1)
                found[name] = _read(io.BytesIO(content), len(content), declared[name], at, do)
    except EdgeclipError:
        raise
    except Exception as e:  # of a damaged archive zipfile makes half a dozen kinds
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise EdgeclipError(where, f"is no .npz file that can be read ({reason})", do) from None
    return found


def _read(
    stream: io.BufferedIOBase, size: int, declared: Declared, where: object, do: str
) -> np.ndarray:
    """Return the array in a stream of `size` bytes."""
    try:
        with HEADER:
            shape, dtype = _shape_and_dtype(stream)
    except Exception as e:  # numpy parses the header as Python
        reason = " ".join(str(e).split())[:200]
        raise EdgeclipError(where, f"is no readable .npy array ({reason})", do) from None

    fits = len(shape) == len(declared.shape) and all(
        want in (None, size) for want, size in zip(declared.shape, shape, strict=True)
    )
    name = dtype.name
    if dtype.kind == "U" and dtype.itemsize <= 64:
        name = "str"
    if not fits or name not in declared.dtypes or dtype.hasobject:
        wanted = [size if size is not None else "any" for size in declared.shape]
        what = f"is {str(dtype)[:40]} {str(list(shape))[:80]}, not {' or '.join(declared.dtypes)}"
        raise EdgeclipError(where, f"{what} {wanted}", do)

    length = math.prod(shape) * dtype.itemsize
    if length > declared.most or length != size - stream.tell():
        what = f"has {size - stream.tell()} bytes of values, and its header needs {length}"
        raise EdgeclipError(where, what, do)
    stream.seek(0)
    with HEADER:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    if declared.finite and not np.isfinite(array).all():
        raise EdgeclipError(where, "has values that are not finite", do)
    return array


def _shape_and_dtype(stream: io.BufferedIOBase) -> tuple[tuple[int, ...], np.dtype]:
    """Read a header; raises as numpy does."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"version {version} of the format")
    shape, _, dtype = read[version](stream, max_header_size=MOST_HEADER)
    if any(size < 0 for size in shape):
        raise ValueError("a negative size")
    return shape, dtype
