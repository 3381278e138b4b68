"""What lies on disk is read by its hash, and JSON without what JSON does not know."""

import contextlib
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeclip import text_file
from edgeclip.disk import leftovers
from edgeclip.disk.leftovers import MANIFEST
from edgeclip.errors import EdgeclipError
from edgeclip.text_file.parser import MAX_JSON, parse_json

SEAL = "seal"
"""field of a JSON object's own fingerprint: that of all its other fields"""

HEADER = threading.Lock()
"""numpy parses an array's header by `ast`, which until Python 3.12 fails now and then in two
threads at once ("AST constructor recursion depth mismatch", python/cpython#106905)"""

Json = dict[str, Any]
"""a JSON object that no record describes: its fields are those of whoever writes it"""
Description = dict[str, Any]
"""all that decides what a folder holds, as JSON: `fingerprint` names it, `differences` compares"""


def edges(path: Path) -> str:
    """Return the sha256 of a file's first and last 64 KiB, which tells large files apart."""
    edge = 2**16
    with path.open("rb") as file:
        head = file.read(edge)
        file.seek(max(0, path.stat().st_size - edge))
        return hashlib.sha256(head + file.read()).hexdigest()


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):  # Python 3.11 and newer
            return hashlib.file_digest(file, "sha256").hexdigest()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Return the sha256 of a JSON-able description: equal descriptions, and only they, share it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Return what differs between two descriptions, a line a field: "views.count was 2, now 3"."""
    if isinstance(a, dict) and isinstance(b, dict):
        lines = []
        for key in sorted(a.keys() | b.keys()):
            lines += differences(a.get(key), b.get(key), f"{at}.{key}".lstrip("."))
        return lines
    if a == b:
        return []
    return [f"{at} was {a}, now {b}"]


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    """Raise what numpy raises of a damaged header or archive, a dozen types, as ValueError."""
    try:
        yield
    except (OSError, EOFError, ValueError):
        raise
    except Exception as e:
        raise ValueError(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}") from None


def read_array(file: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Return a .npy file's array, from any thread; pickles are refused.

    Raises OSError, EOFError or ValueError.
    """
    with HEADER, _as_value_error():
        array: np.ndarray = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    return array


def read_arrays(file: Path | io.BufferedIOBase) -> dict[str, np.ndarray]:
    """Return a .npz file's arrays, from any thread; pickles are refused. Raises as `read_array`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(HEADER)
        stack.enter_context(_as_value_error())
        if isinstance(file, Path):  # of a broken archive numpy leaves its own file open
            file = stack.enter_context(file.open("rb"))
        return dict(stack.enter_context(np.load(file, allow_pickle=False)))


def read_json(path: Path) -> Any:
    """Return a JSON file's value, without its seal.

    Raises `EdgeclipError` where there is none, it is broken, or its seal says that it was changed;
    what an edgeclip before 0.2 wrote has none.
    """
    value = parse_json(text_file.read(path, MAX_JSON), path)
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    if seal is not None and seal != fingerprint(value):
        do = "make it again with the command that wrote it"
        raise EdgeclipError(path, "was changed since it was written", do)
    return value


def read_entries(path: Path) -> list[Any]:
    """Return the `entries` of a JSON file; before they were sealed it was their list."""
    value = read_json(path)
    found = value.get("entries") if isinstance(value, dict) else value
    if not isinstance(found, list):
        raise EdgeclipError(path, "is no list of entries", "remove it: it is made again")
    return found


def read_manifest(folder: Path, kind: str) -> Json:
    """Return the manifest of a finished folder of this kind; raises for any other.

    A whole folder that a killed process had put aside is put back first.
    """
    leftovers.restore(folder)
    if not folder.is_dir():
        raise EdgeclipError(folder, "there is no such folder", "check the path")
    if not (folder / MANIFEST).exists():
        raise EdgeclipError(
            folder,
            f"has no {MANIFEST}, so it is no finished {kind}",
            f"check the path, or make the {kind} again",
        )
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise EdgeclipError(folder, f"is not a {kind}", "check the path")
    return manifest


def verify(folder: Path, manifest: Json) -> None:
    """Compare every file of a folder with its manifest. Raises as `verify_files`."""
    verify_files(folder, manifest["files"], manifest["kind"])


def verify_files(folder: Path, files: dict[str, str], kind: str) -> None:
    """Compare files {relative path: sha256} of a folder with what lies there.

    Raises `EdgeclipError` that names every file that is missing or has other bytes.
    """
    wrong = []
    root = folder.resolve()
    for name, digest in files.items():
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            raise EdgeclipError(
                folder, f"its manifest names a file outside it ({name})", "do not use this folder"
            )
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif sha256(file) != digest:
            wrong.append(f"{name} was changed")
    if wrong:
        raise EdgeclipError(folder, ", ".join(wrong), f"make the {kind} again or copy it again")
