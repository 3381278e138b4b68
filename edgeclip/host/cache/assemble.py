"""Grow a cache folder shard by shard, by any number of processes.

What is interrupted goes on where it stopped. It grows in `.<name>.partial` beside its final place.
A shard's files come first, then `shards/<i>.json` with their sizes and hashes; a later call checks
what it finds against them and makes anew what does not agree. Every shard is made under a file lock
that ends with its process, however it ends: each process starts with the shards of its own rank
(`torchrun`'s RANK of WORLD_SIZE) and then helps with the others'. Last comes the manifest, and one
rename makes the folder a cache.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from edgeclip import disk
from edgeclip.disk import Description, Json
from edgeclip.errors import EdgeclipError
from edgeclip.host.cache.arrays import FORMAT, KIND, name
from edgeclip.progress import say


class Plan(NamedTuple):
    """A cache, and how it is made."""

    folder: Path
    description: Description
    """everything that decides the rows"""
    facts: Json
    """what the manifest is to say beside the shards"""
    prepare: Callable[[Path], int]
    """write what comes before the shards into the growing folder; return how many there will be"""
    make: Callable[[Path, int, int], None]
    """make shard i of n there, with `write_shard`"""
    finish: Callable[[Path], Json]
    """look at the growing folder once all shards are whole; return further facts"""

    @property
    def partial(self) -> Path:
        """The growing folder."""
        return self.folder.with_name(f".{self.folder.name}.partial")

    @property
    def done(self) -> bool:
        return (self.folder / disk.MANIFEST).exists()


def assemble(plan: Plan) -> None:
    """Make the cache that `plan` describes, unless it is there.

    Raises `EdgeclipError` when its folder holds another cache, or half of one.
    """
    if not plan.done:
        try:
            _assemble(plan)
        except FileNotFoundError:
            # Another process finished meanwhile and moved the folder away under this one.
            if not plan.done:
                raise
    found = disk.read_manifest(plan.folder, KIND).get("description")
    _tidy(plan.folder)
    _refuse_other(plan.folder, found, plan.description)


def _assemble(plan: Plan) -> None:
    partial = plan.partial
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    with _lock(partial / "start", wait=True):
        if plan.done:  # between this process's look and its lock
            shutil.rmtree(partial)
            return
        if (partial / "description.json").exists():
            found = disk.read_json(partial / "description.json")
            _refuse_other(partial, found, plan.description)
        disk.write_json(partial / "description.json", plan.description)
        shards = plan.prepare(partial)
    busy = _make_free_shards(plan, shards)
    if busy:
        say(
            f"{plan.folder}: another process builds this cache too; waiting for its "
            f"{len(busy)} shards"
        )
    for i in busy:
        with _lock(partial / "shards" / f"{i}.lock", wait=True):
            if not _whole(partial, i, shards):  # whoever had it did not finish it
                plan.make(partial, i, shards)
    with _lock(partial / "finish", wait=True):
        if not plan.done:
            _finish(plan, shards)


def _make_free_shards(plan: Plan, shards: int) -> list[int]:
    """Make every shard that no other process holds, those of this rank first; return the others."""
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    busy = []
    for i in sorted(range(shards), key=lambda i: (i % world_size != rank, i)):
        with _lock(plan.partial / "shards" / f"{i}.lock") as mine:
            if not mine:
                busy.append(i)
            elif not _whole(plan.partial, i, shards):
                plan.make(plan.partial, i, shards)
    return busy


def _finish(plan: Plan, shards: int) -> None:
    partial = plan.partial
    notes = finished(partial)
    files = {"class_features.npy": disk.sha256(partial / "class_features.npy")}
    skipped: list[str] = []
    for i in range(shards):
        files |= notes[i].files
        skipped += notes[i].skipped
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        **plan.facts,
        "pictures": sum(notes[i].rows for i in range(shards)),
        "skipped": skipped,
        "description": plan.description,
        "shards": [{"rows": notes[i].rows, "bytes": notes[i].bytes} for i in range(shards)],
        "files": files,
    }
    disk.write_json(partial / disk.MANIFEST, manifest)
    try:
        manifest |= plan.finish(partial)
    except EdgeclipError:
        discard(partial)
        raise
    disk.write_sealed(partial / disk.MANIFEST, manifest)
    (partial / "description.json").unlink()
    partial.rename(plan.folder)
    _tidy(plan.folder)


def _tidy(folder: Path) -> None:
    """Remove what only a growing cache needs; a process that was killed here left it."""
    shutil.rmtree(folder / "shards", ignore_errors=True)
    for left in ("start", "finish"):
        (folder / left).unlink(missing_ok=True)


def discard(partial: Path) -> None:
    """Remove half a cache that nobody can go on with: repaired data make another one."""
    shutil.rmtree(partial, ignore_errors=True)


def as_json(value: Any) -> Any:
    """Return a value as it will be read again."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _refuse_other(folder: Path, found: Any, asked: Description) -> None:
    different = disk.differences(found, as_json(asked))
    if different:
        raise EdgeclipError(
            folder,
            f"is another teacher cache ({'; '.join(different[:5])})",
            "delete it, or name another folder",
        )


# --- one shard


class ShardNote(msgspec.Struct, frozen=True):
    """shards/<i>.json: that the files of shard i are whole."""

    rows: int
    """images"""
    bytes: dict[str, int]
    """file name to size"""
    skipped: list[str]
    """each image that could not be read, and why"""
    files: dict[str, str]
    """file name to sha256"""


def write_shard(
    folder: Path,
    shard: int,
    shards: int,
    arrays: dict[str, np.ndarray],
    metadata: Mapping[str, object],
    skipped: list[str],
) -> None:
    """Write the files of one shard, and last what says that they are whole.

    Raises `EdgeclipError` when they cannot be written (a full disk): the shards before stay.
    """
    files = {}
    try:
        for what, array in arrays.items():
            file = name(what, shard, shards)
            files[file] = folder / file
            disk.write_array(folder / file, array)
        file = name("metadata", shard, shards)
        files[file] = folder / file
        with disk.new_file(folder / file) as temporary:
            pq.write_table(pa.table(metadata), temporary)
        note = ShardNote(
            rows=len(arrays["records"]),
            bytes={file: path.stat().st_size for file, path in files.items()},
            skipped=skipped,
            files={file: disk.sha256(path) for file, path in files.items()},
        )
        disk.write_json(_note(folder, shard), msgspec.to_builtins(note))
    except FileNotFoundError:
        raise
    except OSError as e:
        for path in files.values():
            path.unlink(missing_ok=True)
        raise EdgeclipError(
            folder,
            f"shard {shard + 1} of {shards} could not be written ({e})",
            "free some disk and run the same command: it goes on here",
        ) from e


def finished(partial: Path) -> dict[int, ShardNote]:
    """Return what is noted of each shard that is there."""
    notes = {}
    for path in (partial / "shards").glob("*.json"):
        if path.stem.isdigit():
            notes[int(path.stem)] = msgspec.convert(disk.read_json(path), ShardNote)
    return notes


def _note(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard}.json"


def _whole(partial: Path, shard: int, shards: int) -> bool:
    """Return whether the shard is there and its files are those that were written."""
    note = _note(partial, shard)
    if not note.exists():
        return False
    try:
        disk.verify(partial, {"kind": "shard", "files": disk.read_json(note)["files"]})
    except EdgeclipError as e:
        say(f"shard {shard + 1} of {shards} is made again: {e}")
        note.unlink()
        return False
    return True


@contextlib.contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Yield whether the lock at `path` is ours now; the kernel frees it when the process ends."""
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
