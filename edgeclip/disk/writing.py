"""Nothing half-written is ever taken for whole: temporary name, sync, rename; a manifest last."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.disk.places import kind_of, real, refuse_foreign
from edgeclip.disk.reading import MANIFEST, Json, sha256


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
    """Write JSON, indented."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file without pickled objects."""
    with new_file(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path`.

    Where `path` is a link, of what it leads to. On failure nothing is left. Raises `EdgeclipError`
    when something else than a folder of the same kind lies at `path`, and as `refuse_foreign`.
    """
    refuse_foreign(path, None)
    path = real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        refuse_foreign(path, kind_of(temporary))
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, kind: str, content: Json) -> None:
    """Write `content`, the kind and the sha256 of every file: the last step of a folder."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            files[str(file.relative_to(folder))] = sha256(file)
    write_json(folder / MANIFEST, {"kind": kind, **content, "files": files})


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
