"""Grow a cache folder shard by shard, by any number of processes.

What is interrupted goes on where it stopped. It grows in `.<name>.partial` beside its final place.
A shard's files come first, then `shards/<i>.json` with their sizes and hashes; a later call checks
what it finds against them and makes anew what does not agree. So a finished cache that was damaged
is made growing again, and its damaged shards are made anew. Every shard is made under a file lock
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
from edgeclip.host.blocks import BLOCK, Damaged
from edgeclip.host.cache import checked
from edgeclip.host.cache.arrays import FORMAT
from edgeclip.host.cache.checked import CLASS_FEATURES, KIND, name
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

    @property
    def named(self) -> bool:
        """Whether the folder's name tells what it holds."""
        return self.folder.name == disk.fingerprint(self.description)[:16]


def assemble(plan: Plan) -> None:
    """Make the cache that `plan` describes, unless it is there.

    What is damaged is made again. Raises `EdgeclipError` when its folder holds another cache, or
    half of one.
    """
    if plan.done:
        _reopen_damaged(plan)
    if not plan.done:
        try:
            _assemble(plan)
        except FileNotFoundError:
            # Another process finished meanwhile and moved the folder away under this one.
            if not plan.done:
                raise
    found = checked.read_manifest(plan.folder).get("description")
    _tidy(plan.folder)
    _refuse_other(plan.folder, found, plan.description)


def _assemble(plan: Plan) -> None:
    partial = plan.partial
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    with _lock(partial / "start", wait=True):
        if plan.done:  # between this process's look and its lock
            shutil.rmtree(partial)
            return
        found = _description(plan)
        if found is not None:
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


def _description(plan: Plan) -> Any:
    """Return what the growing folder is said to become; None where nothing says it but its name.

    Raises `EdgeclipError` where it cannot be read.
    """
    path = plan.partial / "description.json"
    if plan.named or not path.exists():
        return None
    try:
        return disk.read_json(path)
    except EdgeclipError as e:
        raise EdgeclipError(
            plan.partial, f"is damaged ({e})", "delete it: the cache is then made anew"
        ) from None


def _reopen_damaged(plan: Plan) -> None:
    """Make a finished cache that was damaged a growing one, which keeps the shards that are whole.

    Raises `EdgeclipError` where it is another cache, or nothing tells that it is this one.
    """
    if _damage(plan)[1] is None:
        return
    with disk.locked(plan.folder, wait=True):
        manifest, damage = _damage(plan)
        if damage is not None:
            say(f"{damage}; it is verified whole now, and the shards that differ are made again")
            _reopen(plan, manifest)


def _damage(plan: Plan) -> tuple[Json | None, str | None]:
    """Return the manifest where it can be read, and what is damaged; None: nothing that shows."""
    if not plan.done:  # another process was faster
        return None, None
    try:
        manifest = checked.read_manifest(plan.folder)
    except Damaged as e:
        if not plan.named:
            raise
        return None, e.found
    if manifest.get("format") != FORMAT:
        return manifest, None  # `open_folder` refuses it
    _refuse_other(plan.folder, manifest.get("description"), plan.description)
    try:
        checked.look(plan.folder, manifest)
    except Damaged as e:
        return manifest, e.found
    return manifest, None


def _reopen(plan: Plan, manifest: Json | None) -> None:
    """Rename the finished folder to the growing one, with a note of each shard."""
    disk.write_json(plan.folder / "description.json", plan.description)
    if manifest is not None:
        skipped = list(manifest["skipped"])
        for i, shard in enumerate(manifest["shards"]):
            files = {file: manifest["files"][file] for file in shard["bytes"]}
            # A manifest of an older edgeclip does not say whose they are.
            own = shard.get("skipped", len(skipped))
            note = ShardNote(shard["rows"], shard["bytes"], skipped[:own], files)
            disk.write_sealed(_note(plan.folder, i), msgspec.to_builtins(note))
            skipped = skipped[own:]
    shutil.rmtree(plan.partial, ignore_errors=True)
    plan.folder.rename(plan.partial)
    (plan.partial / disk.MANIFEST).unlink()
    (plan.partial / checked.NOTE).unlink(missing_ok=True)


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
    files = {CLASS_FEATURES: disk.sha256(partial / CLASS_FEATURES)}
    skipped: list[str] = []
    of_shards = []
    for i in range(shards):
        note = notes[i]
        files |= note.files
        skipped += note.skipped
        of_shards.append({"rows": note.rows, "skipped": len(note.skipped), "bytes": note.bytes})
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        **plan.facts,
        "pictures": sum(notes[i].rows for i in range(shards)),
        "skipped": skipped,
        "description": as_json(plan.description),
        "block_bytes": BLOCK,
        "shards": of_shards,
        "files": files,
    }
    checked.write_manifest(partial, manifest)
    try:
        manifest |= plan.finish(partial)
    except Damaged:  # the next run finds the shard
        raise
    except EdgeclipError:
        discard(partial)
        raise
    checked.write_manifest(partial, manifest)
    (partial / "description.json").unlink()
    (partial / checked.NOTE).unlink(missing_ok=True)
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
        hashes = checked.write_digests(folder, shard, shards, list(files))
        own = name("digests", shard, shards)
        files[own] = folder / own
        note = ShardNote(
            rows=len(arrays["records"]),
            bytes={file: path.stat().st_size for file, path in files.items()},
            skipped=skipped,
            files=hashes,
        )
        disk.write_sealed(_note(folder, shard), msgspec.to_builtins(note))
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
    """Return what is noted of each shard that is there; a note that is damaged says nothing."""
    notes = {}
    for path in (partial / "shards").glob("*.json"):
        if path.stem.isdigit():
            with contextlib.suppress(EdgeclipError):
                notes[int(path.stem)] = _read_note(path)
    return notes


def _note(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard}.json"


def _read_note(path: Path) -> ShardNote:
    value = disk.read_json(path)
    try:
        note = msgspec.convert(value, ShardNote)
    except msgspec.ValidationError as e:
        raise EdgeclipError(path, f"is no note of a shard ({e})", "delete it") from None
    return note


def _whole(partial: Path, shard: int, shards: int) -> bool:
    """Return whether the shard is there and its files are those that were written."""
    path = _note(partial, shard)
    if not path.exists():
        return False
    try:
        note = _read_note(path)
        disk.verify_files(partial, note.files, "shard")
    except EdgeclipError as e:
        say(f"shard {shard + 1} of {shards} is made again: {e}")
        path.unlink()
        return False
    own = name("digests", shard, shards)
    if own not in note.files:  # of an older edgeclip
        hashes = checked.write_digests(partial, shard, shards, list(note.files))
        sizes = {**note.bytes, own: (partial / own).stat().st_size}
        note = ShardNote(note.rows, sizes, note.skipped, hashes)
        disk.write_sealed(path, msgspec.to_builtins(note))
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
