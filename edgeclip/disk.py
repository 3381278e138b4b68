"""Everything edgeclip leaves on disk goes through here, so that a half-written thing is never taken
for a whole one.

A file is written under a temporary name, synced and renamed. A folder is built beside its final
place, its `manifest.json` is written last and carries the sha256 of every other file, and one
rename makes it visible. Whoever finds a manifest may trust the folder; whoever distrusts it can
check the hashes.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from edgeclip import text_file
from edgeclip.config import renamed
from edgeclip.errors import EdgeclipError

MANIFEST = "manifest.json"

T = TypeVar("T")

_header = threading.Lock()
"""numpy parses an array's header by `ast`, which until Python 3.12 fails now and then in two
threads at once ("AST constructor recursion depth mismatch", python/cpython#106905)"""

Json = dict[str, Any]
"""a JSON object that no record describes: its fields are those of whoever writes it"""
Description = dict[str, Any]
"""all that decides what a folder holds, as JSON: `fingerprint` names it, `differences` compares"""


def cache_folder() -> Path:
    """Return the user's cache folder for edgeclip: below XDG_CACHE_HOME, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "edgeclip"


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
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success the file there is synced and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: numpy and others choose a format, or append one, by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented. Raises `EdgeclipError` for a number that is not finite."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as e:
        raise EdgeclipError(
            path, f"would hold a number that is not finite ({e})", "nothing was written"
        ) from None
    write_text(path, text + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file without pickled objects."""
    with new_file(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def read_array(file: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Return a .npy file's array, from any thread. Raises as `numpy.load`; pickles are refused."""
    with _header:
        array: np.ndarray = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    return array


def read_arrays(file: Path | io.BytesIO) -> dict[str, np.ndarray]:
    """Return a .npz file's arrays, from any thread. Raises as `numpy.load`; pickles are refused."""
    with _header, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def finite(constant: str) -> Any:
    """Refuse NaN and the infinities, which Python's json reads and JSON does not know."""
    raise json.JSONDecodeError(f"{constant} is no number of JSON", constant, 0)


def read_json(path: Path) -> Any:
    """Return a JSON file's value. Raises `EdgeclipError` where there is none, or it is broken."""
    try:
        return json.loads(text_file.read(path), parse_constant=finite)
    except json.JSONDecodeError as e:
        raise EdgeclipError(
            path, f"not valid JSON ({e})", "make it again with the command that wrote it"
        ) from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path`.

    On failure nothing is left. Raises `EdgeclipError` when something else than a folder of the same
    kind lies at `path`.
    """
    refuse_foreign(path, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        refuse_foreign(path, _kind(temporary))
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_foreign(path: Path, kind: str | None) -> None:
    """Raise `EdgeclipError` unless what lies at `path` is ours, and of this kind, or nothing.

    kind: of the folder that takes its place; None: not known yet.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    found = _kind(path)
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


def _kind(folder: Path) -> str | None:
    """Return what a folder's manifest calls it; None where it has none."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_json(folder / MANIFEST)
    return manifest.get("kind") if isinstance(manifest, dict) else None


def write_manifest(folder: Path, kind: str, content: Json) -> None:
    """Write `content`, the kind and the sha256 of every file: the last step of a folder."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            files[str(file.relative_to(folder))] = sha256(file)
    write_json(folder / MANIFEST, {"kind": kind, **content, "files": files})


def read_manifest(folder: Path, kind: str) -> Json:
    """Return the manifest of a finished folder of this kind; raises for any other."""
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
        if not file.exists():
            wrong.append(f"{name} is missing")
        elif sha256(file) != digest:
            wrong.append(f"{name} was changed")
    if wrong:
        raise EdgeclipError(folder, ", ".join(wrong), f"make the {kind} again or copy it again")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- records: JSON in today's format, or in that of 0.1, which used other words and no `format`

FORMAT = 2
VERDICTS = {
    "golden pictures only": "cannot tell",
    "too few pictures": "cannot tell",
    "pass": "cannot tell",
    "fail": "fails",
}
"""of parity reports of edgeclip 0.1, whose gate asked training images as well"""


class Record(msgspec.Struct, frozen=True):
    """Immutable; what a file of the same format has besides is passed over."""


def to_json(record: Any) -> Any:
    """Return the record, or a list of records, as dicts, lists, strings and numbers."""
    return msgspec.to_builtins(record)


def from_json(value: Any, kind: type[T], where: object) -> T:
    """Return the record of type `kind` that was written as `value`, by this edgeclip or by 0.1.

    Raises `EdgeclipError` that names `where` for another format and for what is no such record.
    """
    found = value.get("format", 1) if isinstance(value, dict) else None
    if found not in (1, FORMAT):
        raise EdgeclipError(
            where,
            f"is of format {found}, and this edgeclip reads 1 and {FORMAT}",
            "update edgeclip, or write it again with the command that made it",
        )
    if found == 1:
        value = _from_format_1(value)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise EdgeclipError(
            where, f"is not what it should be ({e})", "write it again with the command that made it"
        ) from None


def read_record(path: Path, kind: type[T]) -> T:
    """Return the record of type `kind` at `path`. Raises `EdgeclipError` as `from_json`."""
    return from_json(read_json(path), kind, path)


def write_record(path: Path, record: Record) -> None:
    """Write the record as JSON to `path`."""
    write_json(path, to_json(record))


def _from_format_1(value: Json) -> Json:
    """Return a report of edgeclip 0.1 in the words of format 2."""
    new: Json = {**renamed(value), "format": FORMAT}
    if new.get("verdict") in VERDICTS:
        new["verdict"] = VERDICTS[new["verdict"]]
    return new
