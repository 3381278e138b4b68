"""Where the images of a set lie, on disk: a list of millions costs no memory and is made once.

The index of a set of shards is an Arrow file beside the caches, memory-mapped: an image is looked
up when it is asked for. It is known by its shards' names, sizes and times, so shards that changed
are read again.

    cache/index/<fingerprint>.arrow    record batches of `BATCH` images: `SCHEMA`
                             .json     written last: the number of images, and digests of the keys
                                       with their sizes and of the captions; what was skipped; where
                                       each batch ends, and the digests of the file's blocks

Nothing in it is used that is not as it was written: a batch's blocks are compared when it is first
read, a small index whole when it is opened (edgeclip/host/blocks.py). One that is damaged is made
again, when it is opened or by the next run.
"""

import collections
import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from edgeclip import disk
from edgeclip.device.images import ImageRef, Lookup, Skipped
from edgeclip.errors import EdgeclipError
from edgeclip.host import blocks
from edgeclip.host.blocks import Checked, Damaged
from edgeclip.progress import say, track

BATCH = 4096
FORMAT = 4
"""version of an index; raised when `images.index_tar` finds what it did not find before, so that no
older index is taken; those before 4 have no digest of anything, so they cannot be trusted"""
AGAIN = "run the same command again: the index is made again"
AT_ONCE = 2**26
"""bytes of an index that is compared whole when it is opened, in less than 0.1 s, so that it is
made again at once"""
COUNT = "pictures"  # on disk the word of 0.1, whose indexes are read
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "shard": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "label": pa.int32(),
        "caption": pa.string(),
        "hash": pa.uint64(),
    }
)


class ImageIndex(Lookup):
    """The images of `shards` as their index has them.

    Raises `Damaged`, when it is opened or a batch is first read, for what is not as it was written.
    """

    def __init__(self, path: Path, shards: Sequence[Path]):
        self.path, self.shards = path, shards
        try:
            facts = disk.read_json(path.with_suffix(".json"))
        except EdgeclipError as e:
            raise Damaged(path.with_suffix(".json"), f"cannot be read ({e})", AGAIN) from None
        self._count: int = facts[COUNT]
        self.digests: list[str] = facts["digests"]
        self.skipped: dict[str, int] = facts.get("skipped", {})

        size: int = facts["bytes"]
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise Damaged(path, f"has {found} bytes, and {size} were written", AGAIN)
        self._ends: list[int] = facts["ends"]
        known = np.frombuffer(bytes.fromhex(facts["blocks"]), np.uint8).reshape(-1, blocks.SIZE)
        self._checked = Checked([path], [size], lambda file, a, b: known[a:b], self._refuse)
        if size <= AT_ONCE:
            self._checked.look_at_all(0)
        self._checked.look_at(0, 0, max(1, self._ends[0]))  # the schema
        self._checked.look_at(0, self._ends[-1], size)  # where the batches lie

        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batch: Callable[[int], Any] = functools.lru_cache(64)(self._read)

    def _read(self, number: int) -> Any:
        self._checked.look_at(0, self._ends[number], self._ends[number + 1])
        return self._reader.get_batch(number)

    def _refuse(self, file: int, why: str) -> Damaged:
        with contextlib.suppress(OSError):  # the next run makes it again
            self.path.with_suffix(".json").unlink(missing_ok=True)
        return Damaged(self.path, why, AGAIN)

    def __len__(self) -> int:
        return self._count

    def at(self, i: int) -> ImageRef:
        """Return the i-th image, 0 <= i < n."""
        number, row = divmod(i, BATCH)
        batch = self._batch(number)
        key, shard, offset, size, label, caption = (batch.column(c)[row].as_py() for c in range(6))
        return ImageRef(key, str(self.shards[shard]), offset, size, label, caption)

    def __iter__(self) -> Iterator[ImageRef]:
        for b in range(self._reader.num_record_batches):
            columns = [c.to_pylist() for c in self._read(b).columns[:6]]
            for key, shard, offset, size, label, caption in zip(*columns, strict=True):
                yield ImageRef(key, str(self.shards[shard]), offset, size, label, caption)


def index(
    shards: Sequence[Path],
    cache: Path,
    read: Callable[[Path], list[ImageRef]],
    skipped: Skipped | None = None,
) -> ImageIndex:
    """Return the images of `shards`, in their order, by an index below `cache`.

    read: returns the images of one shard, and counts in `skipped` what it left out; called where
    there is no index yet. Raises `EdgeclipError` for a key that two images have, and what `read`
    raises.
    """
    path = cache / "index" / f"{_fingerprint(shards)}.arrow"
    if path.with_suffix(".json").exists():
        for part in (path, path.with_suffix(".json")):
            disk.sweep(part)  # of another process that was killed while this one was written
        try:
            return ImageIndex(path, shards)
        except EdgeclipError as e:
            say(f"the index is made again: {e}")
    _write(path, shards, read, {} if skipped is None else skipped)
    return ImageIndex(path, shards)


def _fingerprint(shards: Sequence[Path]) -> str:
    known = []
    for path in shards:
        stat = path.stat()
        known.append([path.name, stat.st_size, stat.st_mtime_ns])
    return disk.fingerprint([FORMAT, known])[:16]


def _write(
    path: Path,
    shards: Sequence[Path],
    read: Callable[[Path], list[ImageRef]],
    skipped: Mapping[str, int],
) -> None:
    """Write the index, then its facts."""
    sizes = hashlib.sha256()
    captions = hashlib.sha256()
    hashes: list[np.ndarray] = []
    count = 0
    with disk.new_file(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            ends = [sink.tell()]
            for images, numbers in _batches(shards, read):
                for image in images:
                    sizes.update(f"{image.key} {image.size}".encode() + b"\0")
                    captions.update(image.caption.encode() + b"\0")
                hashes.append(_key_hashes(images))
                writer.write_batch(_record_batch(images, numbers, hashes[-1]))
                ends.append(sink.tell())
                count += len(images)
            _refuse_twice(hashes, shards)
        found, _ = blocks.digests(temporary)
        size = temporary.stat().st_size

    facts: disk.Json = {
        COUNT: count,
        "digests": [sizes.hexdigest(), captions.hexdigest()],
        "shards": [shard.name for shard in shards],
        "bytes": size,
        "ends": ends,
        "blocks": found.tobytes().hex(),
    }
    if skipped:
        facts["skipped"] = dict(skipped)
    disk.write_sealed(path.with_suffix(".json"), facts)


def _batches(
    shards: Sequence[Path], read: Callable[[Path], list[ImageRef]]
) -> Iterator[tuple[list[ImageRef], list[int]]]:
    """Yield the images of all shards, `BATCH` at a time, and the number of each one's shard."""
    numbered: Iterable[tuple[int, Path]] = enumerate(shards)
    if len(shards) > 100:
        numbered = track(numbered, "index of shards", len(shards))

    images: list[ImageRef] = []
    numbers: list[int] = []
    for number, shard in numbered:
        for image in read(shard):
            images.append(image)
            numbers.append(number)
            if len(images) == BATCH:
                yield images, numbers
                images = []
                numbers = []
    if images:
        yield images, numbers


def _key_hashes(images: list[ImageRef]) -> np.ndarray:
    """Return eight bytes of each image's key: uint64 [B]."""
    hashes = np.empty(len(images), np.uint64)
    for i, image in enumerate(images):
        eight = hashlib.blake2b(image.key.encode(), digest_size=8).digest()
        hashes[i] = int.from_bytes(eight, "little")
    return hashes


def _record_batch(images: list[ImageRef], numbers: list[int], hashes: np.ndarray) -> pa.RecordBatch:
    keys, _, offsets, sizes, labels, captions, _ = zip(*images, strict=True)
    columns = [keys, numbers, offsets, sizes, labels, captions, hashes]

    arrays = []
    for column, field in zip(columns, SCHEMA, strict=True):
        arrays.append(pa.array(column, field.type))
    return pa.record_batch(arrays, schema=SCHEMA)


def _refuse_twice(hashes: list[np.ndarray], shards: Sequence[Path]) -> None:
    """Refuse a key that two images have, by the keys' hashes.

    They take eight bytes an image while an index is made; two keys of one hash are taken for equal
    (a chance of 3e-4 at 10^8 images).
    """
    if not hashes:
        return
    every = np.sort(np.concatenate(hashes))
    twice = int((every[1:] == every[:-1]).sum())
    if twice == 0:
        return

    why = "a key occurs twice in a shard"
    for stem, count in collections.Counter(shard.stem for shard in shards).items():
        if count > 1:
            why = f"two shards are named '{stem}'"
            break
    # Relative paths may have no common part: that is the working folder.
    where = Path(os.path.commonpath([str(shard) for shard in shards]))
    raise EdgeclipError(
        where,
        f"{twice} image keys are not unique ({why})",
        "rename the shards, or repair them",
    )
