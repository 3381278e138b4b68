"""Many `.npy` files as one memory-mapped array, and a cache folder opened as such arrays.

Nothing is read before it is asked for: what a batch costs is its own rows. A map holds a file
descriptor, so the process takes as many as the system grants, and each array holds its part of
them; a file that it let go of costs about 0.1 ms again.
"""

import functools
import itertools
import mmap
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeclip import disk
from edgeclip.device.images import ImageRef, Lookup
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.host.blocks import Checked
from edgeclip.host.cache import checked
from edgeclip.host.cache.checked import AGAIN, CLASS_FEATURES, name

IMAGE = "picture"
"""field of an image's place in the data, in records and metadata: the word of format 2"""
FORMAT = 2
MOST_FILES = 2**16


def record(views: int, parameters: int) -> np.dtype:
    """Return what is recorded of an image: its place, its rows' norms, its views' parameters."""
    return np.dtype(
        [(IMAGE, "<i8"), ("norm", "<f4", (views,)), ("view", "<f4", (views, parameters))]
    )


@functools.lru_cache(1)
def _room() -> int:
    """Files that one array may have mapped at a time, when there are up to sixteen arrays."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    granted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    return max(1, granted // 16)


class Shards:
    """`shards[index]`, `shards[index, more]` as of one array [n, ...]; index: an integer or
    integers [B]. checked: compares their bytes before they are used; None: rows of others."""

    def __init__(
        self,
        files: Sequence[Path],
        counts: Sequence[int],
        field: str | None = None,
        checked: Checked | None = None,
    ):
        self.files, self.field, self.checked = files, field, checked
        self.ends = np.cumsum(counts)
        # Around a row that is not in memory the system reads 128 KiB: welcome where all rows will
        # fit, a waste of 80 where not.
        self.scattered = (
            sum(f.stat().st_size for f in files)
            > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        )
        self._map = functools.lru_cache(_room())(self._open)
        first = self._map(0)
        self.dtype, self.shape = first.dtype, (int(self.ends[-1]), *first.shape[1:])
        self._bytes = first.strides[0]
        if checked is not None:  # rows end where their file ends
            self._begin = checked.sizes - self._bytes * np.array(counts, np.int64)

    def _open(self, shard: int) -> np.ndarray:
        file = self.files[shard]
        if self.checked is not None:
            self.checked.look_at(shard, 0, 1)  # the header
        try:
            mapped: Any = disk.read_array(file, mmap_mode="r")
        except (OSError, ValueError) as e:
            raise EdgeclipError(file, f"cannot be read as a shard ({e})", AGAIN) from None
        rows = int(self.ends[shard]) - self._start(shard)
        if len(mapped) != rows:
            raise EdgeclipError(
                file,
                f"has {len(mapped)} rows, and its index says {rows}",
                AGAIN,
            )
        if self.scattered:
            mapped._mmap.madvise(mmap.MADV_RANDOM)
        return np.asarray(
            mapped[self.field] if self.field else mapped
        )  # a memmap's own indexing costs twice as much

    def _start(self, shard: int) -> int:
        return int(self.ends[shard - 1]) if shard else 0

    def _look(self, of: np.ndarray, local: np.ndarray) -> None:
        """Compare the blocks of rows `local` [B] of the files `of` [B] where they are new."""
        if self.checked is not None:
            low = self._begin[of] + self._bytes * local
            self.checked.look(of, low, low + self._bytes)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *more = key if isinstance(key, tuple) else (key,)
        index: np.ndarray = (
            np.arange(len(self))[first] if isinstance(first, slice) else np.asarray(first)
        )
        if index.ndim == 0:
            shard = int(np.searchsorted(self.ends, index, side="right"))
            local = int(index) - self._start(shard)
            self._look(np.array([shard]), np.array([local]))
            return np.asarray(self._map(shard)[(local, *more)])
        if len(self.files) == 1 or not len(index):
            self._look(np.zeros(len(index), np.int64), index % max(1, len(self)))
            return _rows(self._map(0), index, more)
        # Shard by shard into one array, then back into the order asked for: two plain copies, no
        # scattered writes.
        order = np.argsort(index, kind="stable")
        of = np.searchsorted(self.ends, index[order], side="right")
        sorted_index = index[order] - np.concatenate([[0], self.ends])[of]
        self._look(of, sorted_index)
        sorted_more = [m if np.ndim(m) == 0 else m[order] for m in more]
        cuts = [0, *(np.flatnonzero(of[1:] != of[:-1]) + 1).tolist(), len(index)]
        found = np.empty((len(index), *self.shape[1 + len(more) :]), self.dtype)
        for a, b in itertools.pairwise(cuts):
            _rows(
                self._map(int(of[a])),
                sorted_index[a:b],
                [m if np.ndim(m) == 0 else m[a:b] for m in sorted_more],
                found[a:b],
            )
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return found.take(back, 0)


def _rows(
    array: np.ndarray, index: np.ndarray, more: list[Any], out: np.ndarray | None = None
) -> np.ndarray:
    """array[index, *more]; of whole rows by `take`, which is three times as fast as indexing. out:
    where to put them."""
    if array.flags.c_contiguous and len(more) <= 1:
        if more:
            index, array = index * array.shape[1] + more[0], array.reshape(-1, *array.shape[2:])
        return array.take(
            index, 0, out, "raise" if out is None else "clip"
        )  # clip: no copy on the way into out; all are inside
    rows: np.ndarray = array[(index, *more)]
    if out is not None:
        out[:] = rows
    return rows


class Joined:
    """An array's rows in another order: `joined[i]` is `array[places[i]]`."""

    def __init__(self, array: Shards, places: Shards):
        self.array, self.places = array, places
        self.dtype, self.shape = array.dtype, (len(places), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.array[self.places[key]]


class Rows:
    """[n, K, D] in up to two arrays: `rows[index, k]` is [B, D] float32, unit rows times their
    norms where these are known.

    A teacher's rows of K views, or its features of K captions.
    """

    def __init__(self, first: Shards | Joined, more: Shards | None, norms: Shards | None):
        self.first, self.more, self.norms = first, more, norms
        self.shape = (len(first), 1 if more is None else 1 + more.shape[1], first.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def unit(self, index: np.ndarray, which: np.ndarray) -> np.ndarray:
        """[B, D] as they lie on disk; index, which: [B]."""
        if self.more is None or not which.any():
            return self.first[index]
        if which.all():
            return self.more[index, which - 1]
        out = np.empty((len(index), self.shape[2]), self.first.dtype)
        first = which == 0
        out[first], out[~first] = (
            self.first[index[first]],
            self.more[index[~first], which[~first] - 1],
        )
        return out

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *rest = key if isinstance(key, tuple) else (key,)
        index: np.ndarray = (
            np.arange(len(self))[first] if isinstance(first, slice) else np.asarray(first)
        )
        if not rest:
            return np.stack([self[index, k] for k in range(self.shape[1])], axis=-2)
        which = np.broadcast_to(np.asarray(rest[0]), index.shape)
        if index.ndim == 0:
            return self[index[None], which[None]][0]
        rows = self.unit(index, which).astype(np.float32)
        return rows if self.norms is None else rows * self.norms[index, which][:, None]


class Kept(Lookup):
    """The data set's images that have a row, in the rows' order."""

    def __init__(self, images: Sequence[ImageRef], places: Shards):
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.places)

    def at(self, i: int) -> ImageRef:
        return self.images[int(self.places[i])]


class TeacherCache(NamedTuple):
    folder: Path
    manifest: Json
    images: Sequence[ImageRef]
    rows: Rows
    """[n, K, R]"""
    views: Shards
    """[n, K, P]"""
    class_features: np.ndarray
    """[N, D]"""
    caption_features: Rows | None
    """[n, C, D]"""
    metadata: Checked | None = None
    """the tables of keys and captions, to be compared before they are read; None: in memory"""


def refuse_other_views(first: TeacherCache, other: TeacherCache) -> None:
    """Refuse two caches unless row i, view k is of the same image and the same view in both.

    Teachers are joined by them.
    """

    def refuse(what: str) -> None:
        raise EdgeclipError(
            f"{other.folder} ({other.manifest['name']})",
            f"{what} those of {first.folder} ({first.manifest['name']})",
            "remove that teacher",
        )

    assert isinstance(first.images, Kept) and isinstance(other.images, Kept)
    if first.rows.shape[:2] != other.rows.shape[:2]:
        images, views = other.rows.shape[:2]
        refuse(f"has {images} images x {views} views, which differ from")
    for start in range(0, len(first.rows), 2**16):
        part = slice(start, start + 2**16)
        if (first.images.places[part] != other.images.places[part]).any():
            refuse("has images that are not")
        a, b = first.views[part], other.views[part]
        # The center crop has no numbers where nobody looked at the image.
        plain = (a[..., 2] == 0) | (b[..., 2] == 0)
        if a.shape != b.shape or not (plain | (a == b).all(axis=-1)).all():
            refuse("has views that are not")


class Embeddings(NamedTuple):
    """Rows that lie elsewhere."""

    images: Shards
    texts: Shards | None


def open_folder(
    folder: Path, images: Sequence[ImageRef], elsewhere: Embeddings | None = None
) -> TeacherCache:
    """Return the finished cache in `folder`, of a data set's `images`.

    The manifest is read, each file's size is looked at, and its bytes are compared when they are
    first used. elsewhere: of a cache that only joins rows to images. Raises `EdgeclipError` when it
    is not finished, of an older format, or a file is missing or shorter than its index says, and
    `Damaged` now or later for bytes that are not those that were written.
    """
    manifest = checked.read_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise EdgeclipError(
            folder, "is a teacher cache of an older edgeclip", "delete it; it will be made again"
        )
    checked.look(folder, manifest)
    manifest = checked.with_digests(folder, manifest)
    counts = [shard["rows"] for shard in manifest["shards"]]
    digests = checked.Digests(folder, manifest)

    def shards(what: str, field: str | None = None) -> Shards:
        files = [folder / name(what, i, len(counts)) for i in range(len(counts))]
        return Shards(files, counts, field, digests.of(what))

    captions: Rows | None = None
    if elsewhere is not None:
        places = shards("rows")
        rows = Rows(Joined(elsewhere.images, places), None, None)
        if manifest["captions"] and elsewhere.texts is not None:
            captions = Rows(Joined(elsewhere.texts, places), None, None)
    else:
        more_views = shards("more_views") if manifest["views"] > 1 else None
        rows = Rows(shards("img_emb"), more_views, shards("records", "norm"))
        if manifest["captions"]:
            more = shards("more_captions") if manifest["captions"] > 1 else None
            captions = Rows(shards("text_emb"), more, None)
    return TeacherCache(
        folder,
        manifest,
        Kept(images, shards("records", IMAGE)),
        rows,
        shards("records", "view"),
        disk.read_array(folder / CLASS_FEATURES),
        captions,
        digests.of("metadata"),
    )
