"""Nothing half-written is ever taken for whole: temporary name, sync, rename; a manifest last."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeclip.disk import leftovers
from edgeclip.disk.exchange import sync, take_place
from edgeclip.disk.leftovers import MANIFEST
from edgeclip.disk.places import kind_of, real, refuse_foreign
from edgeclip.disk.reading import SEAL, Json, fingerprint, sha256
from edgeclip.errors import EdgeclipError


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success the file there is synced and renamed to `path`.

    What a killed writer of `path` left beside it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    leftovers.sweep(path)
    with leftovers.new_held(
        lambda: leftovers.temporary_file(path), lambda new: new.touch(exist_ok=False)
    ) as temporary:
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
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


def write_sealed(path: Path, value: Json) -> None:
    """Write a JSON object with the fingerprint of all its fields in one more."""
    value = msgspec.to_builtins(value, str_keys=True)  # as it will be read
    write_json(path, {**value, SEAL: fingerprint(value)})


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file without pickled objects."""
    with new_file(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path`.

    Where `path` is a link, of what it leads to. On failure nothing is left, and what a killed
    writer of `path` left is removed. Raises `EdgeclipError` when something else than a folder of
    the same kind lies at `path`, and as `refuse_foreign`.
    """
    refuse_foreign(path, None)
    path = real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    leftovers.sweep(path)
    with leftovers.new_held(lambda: leftovers.temporary_folder(path), Path.mkdir) as temporary:
        try:
            yield temporary
            for file in temporary.rglob("*"):
                sync(file)
            sync(temporary)
            refuse_foreign(path, kind_of(temporary))
            take_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, kind: str, content: Json) -> None:
    """Write `content`, the kind and the sha256 of every file: the last step of a folder."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            files[str(file.relative_to(folder))] = sha256(file)
    write_sealed(folder / MANIFEST, {"kind": kind, **content, "files": files})
