"""A cache folder grows shard by shard, made by any number of processes; what is interrupted goes on
where it stopped.

It grows in `.<name>.partial` beside its final place. A shard's files come first, then
`shards/<i>.json` with their sizes and hashes; a later call checks what it finds against them and
makes anew what does not agree. Every shard is made under a file lock that ends with its process,
however it ends: each process starts with the shards of its own rank (`torchrun`'s RANK of
WORLD_SIZE) and then helps with the others'. Last comes the manifest, and one rename makes the
folder a cache.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.host.cache.arrays import FORMAT, KIND, name
from edgeclip.progress import say


def assemble(
    folder: Path,
    description: dict[str, Any],
    facts: dict[str, Any],
    plan: Callable[[Path], int],
    make: Callable[[Path, int, int], None],
    finish: Callable[[Path], dict[str, Any]],
) -> None:
    """Makes the cache that `description` describes in `folder`, unless it is there.

    facts: what the manifest is to say beside the shards. plan: writes what comes before the shards
    into the growing folder and says how many shards there are to be. make: makes shard i of n
    there, with `write_shard`. finish: looks at the growing folder once all shards are whole;
    further facts. Raises `EdgeclipError` when `folder` holds another cache, or half of one.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if not (folder / disk.MANIFEST).exists():
        try:
            _assemble(folder, partial, description, facts, plan, make, finish)
        except (
            FileNotFoundError
        ):  # another process finished meanwhile and moved the folder away under this one
            if not (folder / disk.MANIFEST).exists():
                raise
    _refuse_other(folder, disk.read_manifest(folder, KIND).get("description"), description)


def _assemble(
    folder: Path,
    partial: Path,
    description: dict[str, Any],
    facts: dict[str, Any],
    plan: Callable[[Path], int],
    make: Callable[[Path, int, int], None],
    finish: Callable[[Path], dict[str, Any]],
) -> None:
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    with _lock(partial / "start", wait=True):
        if (folder / disk.MANIFEST).exists():  # finished between this process's look and its lock
            shutil.rmtree(partial)
            return
        if (partial / "description.json").exists():
            _refuse_other(partial, disk.read_json(partial / "description.json"), description)
        disk.write_json(partial / "description.json", description)
        n = plan(partial)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    busy = []
    for i in sorted(range(n), key=lambda i: (i % world != rank, i)):
        with _lock(partial / "shards" / f"{i}.lock") as mine:
            if not mine:
                busy.append(i)
            elif not _whole(partial, i, n):
                make(partial, i, n)
    if busy:
        say(f"{folder}: another process builds this cache too; waiting for its {len(busy)} shards")
    for i in busy:
        with _lock(partial / "shards" / f"{i}.lock", wait=True):
            if not _whole(partial, i, n):  # whoever had it did not finish it
                make(partial, i, n)
    with _lock(partial / "finish", wait=True):
        if not (folder / disk.MANIFEST).exists():
            _finish(folder, partial, description, facts, n, finish)


def _finish(
    folder: Path,
    partial: Path,
    description: dict[str, Any],
    facts: dict[str, Any],
    shards: int,
    finish: Callable[[Path], dict[str, Any]],
) -> None:
    notes = finished(partial)
    parts = [notes[i] for i in range(shards)]
    files = {f: digest for p in parts for f, digest in p["files"].items()}
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        **facts,
        "images": sum(p["rows"] for p in parts),
        "skipped": [line for p in parts for line in p["skipped"]],
        "description": description,
        "shards": [{"rows": p["rows"], "bytes": p["bytes"]} for p in parts],
        "files": files | {"class_features.npy": disk.sha256(partial / "class_features.npy")},
    }
    disk.write_json(partial / disk.MANIFEST, manifest)
    try:
        manifest |= finish(partial)
    except EdgeclipError:
        discard(partial)
        raise
    disk.write_json(partial / disk.MANIFEST, manifest)
    (partial / "description.json").unlink()
    os.rename(partial, folder)
    for left in ("shards", "start", "finish"):
        path = folder / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def discard(partial: Path) -> None:
    """Half a cache that nobody can go on with: who repairs the data makes another one of it."""
    shutil.rmtree(partial, ignore_errors=True)


def as_json(value: Any) -> Any:
    """As it will be read again."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _refuse_other(folder: Path, found: Any, asked: dict[str, Any]) -> None:
    different = disk.differences(found, as_json(asked))
    if different:
        raise EdgeclipError(
            folder,
            f"is another teacher cache ({'; '.join(different[:5])})",
            "delete it, or name another folder",
        )


# --- one shard


def write_shard(
    folder: Path,
    shard: int,
    shards: int,
    arrays: dict[str, np.ndarray],
    metadata: dict[str, Any],
    skipped: list[str],
) -> None:
    """The files of one shard, and last what says that they are whole.

    Raises `EdgeclipError` when they cannot be written (a full disk): the shards before stay.
    """
    files = {}
    try:
        for what, array in arrays.items():
            files[name(what, shard, shards)] = folder / name(what, shard, shards)
            disk.write_array(folder / name(what, shard, shards), array)
        files[name("metadata", shard, shards)] = folder / name("metadata", shard, shards)
        with disk.new_file(folder / name("metadata", shard, shards)) as temporary:
            pq.write_table(pa.table(metadata), temporary)
        content = {
            "rows": len(arrays["records"]),
            "bytes": {f: p.stat().st_size for f, p in files.items()},
            "skipped": skipped,
        }
        disk.write_json(
            _note(folder, shard), content | {"files": {f: disk.sha256(p) for f, p in files.items()}}
        )
    except FileNotFoundError:
        raise
    except OSError as e:
        for file in files.values():
            file.unlink(missing_ok=True)
        raise EdgeclipError(
            folder,
            f"shard {shard + 1} of {shards} could not be written ({e})",
            "free some disk and run the same command: it goes on here",
        ) from e


def finished(partial: Path) -> dict[int, dict[str, Any]]:
    """What is noted of each shard that is there: rows, bytes, files, skipped."""
    return {
        int(p.stem): disk.read_json(p)
        for p in (partial / "shards").glob("*.json")
        if p.stem.isdigit()
    }


def _note(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard}.json"


def _whole(partial: Path, shard: int, shards: int) -> bool:
    """Whether the shard is there and its files are those that were written."""
    if not _note(partial, shard).exists():
        return False
    try:
        disk.verify(
            partial, {"kind": "shard", "files": disk.read_json(_note(partial, shard))["files"]}
        )
    except EdgeclipError as e:
        say(f"shard {shard + 1} of {shards} is made anew: {e}")
        _note(partial, shard).unlink()
        return False
    return True


@contextlib.contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock at `path` is ours now; the kernel lets go of it when the process ends."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(fd)
