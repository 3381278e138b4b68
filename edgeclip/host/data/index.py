"""Where the images of a set lie, on disk: a list of millions costs no memory and is made once.

The index of a set of shards is an Arrow file beside the caches, memory-mapped: an image is looked
up when it is asked for. It is known by its shards' names, sizes and times, so shards that changed
are read again.

    cache/index/<fingerprint>.arrow    record batches of `BATCH` images: key, shard, offset, size, label, caption
                             .json     written last: images, and digests of keys with sizes and of captions
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from edgeclip import disk
from edgeclip.device.images import ImageRef, Lookup
from edgeclip.errors import EdgeclipError
from edgeclip.progress import track

BATCH = 4096
FORMAT = 2
"""of an index; higher when `images.index_tar` finds what it did not find before, so that no older
index is taken"""
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
    """The images of `shards` as their index has them."""

    def __init__(self, path: Path, shards: Sequence[Path]):
        self.shards = shards
        facts = disk.read_json(path.with_suffix(".json"))
        self._count: int = facts[COUNT]
        self.digests: list[str] = facts["digests"]
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batch: Callable[[int], Any] = functools.lru_cache(64)(self._reader.get_batch)

    def __len__(self) -> int:
        return self._count

    def at(self, i: int) -> ImageRef:
        batch, row = divmod(i, BATCH)
        key, shard, offset, size, label, caption = (
            self._batch(batch).column(c)[row].as_py() for c in range(6)
        )
        return ImageRef(key, str(self.shards[shard]), offset, size, label, caption)

    def __iter__(self) -> Iterator[ImageRef]:
        for b in range(self._reader.num_record_batches):
            columns = [c.to_pylist() for c in self._reader.get_batch(b).columns[:6]]
            for key, shard, offset, size, label, caption in zip(*columns, strict=True):
                yield ImageRef(key, str(self.shards[shard]), offset, size, label, caption)


def index(
    shards: Sequence[Path], cache: Path, read: Callable[[Path], list[ImageRef]]
) -> ImageIndex:
    """The images of `shards`, in their order. read: the images of one of them.

    Raises `EdgeclipError` for a key that two images have, and what `read` raises.
    """
    known = [[p.name, s.st_size, s.st_mtime_ns] for p in shards for s in [p.stat()]]
    path = cache / "index" / f"{disk.fingerprint([FORMAT, known])[:16]}.arrow"
    if not path.with_suffix(".json").exists():
        digests = [hashlib.sha256(), hashlib.sha256()]
        hashes: list[np.ndarray] = []
        count = 0
        with (
            disk.new_file(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            for rows in _batches(shards, read):
                for p, _ in rows:
                    digests[0].update(f"{p.key} {p.size}".encode() + b"\0")
                    digests[1].update(p.caption.encode() + b"\0")
                hashes.append(
                    np.fromiter(
                        (
                            int.from_bytes(
                                hashlib.blake2b(p.key.encode(), digest_size=8).digest(), "little"
                            )
                            for p, _ in rows
                        ),
                        np.uint64,
                    )
                )
                columns = [
                    [p.key for p, _ in rows],
                    [s for _, s in rows],
                    *(
                        [getattr(p, f) for p, _ in rows]
                        for f in ("offset", "size", "label", "caption")
                    ),
                ]
                arrays = [
                    pa.array(c, f.type) for c, f in zip([*columns, hashes[-1]], SCHEMA, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
                count += len(rows)
            _refuse_twice(hashes, shards)
        disk.write_json(
            path.with_suffix(".json"),
            {
                COUNT: count,
                "digests": [d.hexdigest() for d in digests],
                "shards": [p.name for p in shards],
            },
        )
    return ImageIndex(path, shards)


def _batches(
    shards: Sequence[Path], read: Callable[[Path], list[ImageRef]]
) -> Iterator[list[tuple[ImageRef, int]]]:
    rows: list[tuple[ImageRef, int]] = []
    many: Iterable[tuple[int, Path]] = (
        track(enumerate(shards), "index of shards", len(shards))
        if len(shards) > 100
        else enumerate(shards)
    )
    for s, shard in many:
        for p in read(shard):
            rows.append((p, s))
            if len(rows) == BATCH:
                yield rows
                rows = []
    if rows:
        yield rows


def _refuse_twice(hashes: list[np.ndarray], shards: Sequence[Path]) -> None:
    """Eight bytes an image while an index is made; two keys of one hash are taken for equal (a
    chance of 3e-4 at 10^8)."""
    every = np.sort(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)
    if (twice := int((every[1:] == every[:-1]).sum())) > 0:
        stems = [p.stem for p in shards]
        same = next((s for s in stems if stems.count(s) > 1), None) if len(stems) < 10_000 else None
        what = f"two shards are called '{same}'" if same else "a key occurs twice in a shard"
        where = Path(
            os.path.commonpath([str(p) for p in shards])
        )  # of relative ones perhaps nothing, which is the working folder
        raise EdgeclipError(
            where,
            f"{twice} images have a key that another has ({what})",
            "rename the shards, or repair them",
        )
