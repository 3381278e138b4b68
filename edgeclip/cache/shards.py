"""Many `.npy` files as one memory-mapped array, and a cache folder opened as such arrays.

Nothing is read before it is asked for: what a batch costs is its own rows. At most `OPEN` files of an array are mapped
at a time (a map holds a file descriptor); one that is asked for again costs about 0.1 ms.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.pictures import Picture

KIND = "teacher cache"
FORMAT = 2
OPEN = 256


def name(what: str, shard: int, shards: int) -> str:
    """A file's place below a cache folder, in clip-retrieval's manner: numbers of equal length, so that names sort."""
    suffix = ".parquet" if what == "metadata" else ".npy"
    return f"{what}/{what}_{shard:0{len(str(shards))}d}{suffix}"


def record(views: int, parameters: int) -> np.dtype:
    return np.dtype([("picture", "<i8"), ("norm", "<f4", (views,)), ("view", "<f4", (views, parameters))])


class Shards:
    """`shards[index]`, `shards[index, more]` as of one array [n, ...]; index: an integer or integers [B]."""

    def __init__(self, files: Sequence[Path], counts: Sequence[int], field: str | None = None):
        self.files, self.field = files, field
        self.ends = np.cumsum(counts)
        self._map = functools.lru_cache(OPEN)(self._open)
        first = self._map(0)
        self.dtype, self.shape = first.dtype, (int(self.ends[-1]), *first.shape[1:])

    def _open(self, shard: int) -> np.ndarray:
        file = self.files[shard]
        try:
            mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as e:
            raise EdgeclipError(file, f"cannot be read as a shard ({e})", "make the cache anew, or copy it again") from None
        rows = int(self.ends[shard]) - self._start(shard)
        if len(mapped) != rows:
            raise EdgeclipError(file, f"has {len(mapped)} rows, and its index says {rows}", "make the cache anew, or copy it again")
        # A plain array view: a memmap's own indexing costs twice as much.
        return np.asarray(mapped[self.field] if self.field else mapped)

    def _start(self, shard: int) -> int:
        return int(self.ends[shard - 1]) if shard else 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *more = key if isinstance(key, tuple) else (key,)
        index: np.ndarray = np.arange(len(self))[first] if isinstance(first, slice) else np.asarray(first)
        if index.ndim == 0:
            shard = int(np.searchsorted(self.ends, index, side="right"))
            return np.asarray(self._map(shard)[(int(index) - self._start(shard), *more)])
        if len(self.files) == 1 or not len(index):
            return self._map(0)[(index, *more)]
        of = np.searchsorted(self.ends, index, side="right")
        order = np.argsort(of, kind="stable")
        cuts = np.flatnonzero(np.diff(of[order])) + 1
        out: np.ndarray | None = None
        for places in np.split(order, cuts):
            shard = int(of[places[0]])
            part = self._map(shard)[(index[places] - self._start(shard), *(m if np.ndim(m) == 0 else m[places] for m in more))]
            if out is None:
                out = np.empty((len(index), *part.shape[1:]), self.dtype)
            out[places] = part
        assert out is not None
        return out


class Rows:
    """The tower's rows [n, K, R]: `rows[index, view]` is [B, R] float32, unit rows times their norms."""

    def __init__(self, first: Shards, more: Shards | None, norms: Shards):
        self.first, self.more, self.norms = first, more, norms
        self.shape = (len(first), 1 if more is None else 1 + more.shape[1], first.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def unit(self, index: np.ndarray, view: np.ndarray) -> np.ndarray:
        """[B, R] float16, as they lie on disk."""
        if self.more is None:
            return self.first[index]
        if not view.any():
            return self.first[index]
        if view.all():
            return self.more[index, view - 1]
        out = np.empty((len(index), self.shape[2]), np.float16)
        plain = view == 0
        out[plain], out[~plain] = self.first[index[plain]], self.more[index[~plain], view[~plain] - 1]
        return out

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *view = key if isinstance(key, tuple) else (key,)
        index: np.ndarray = np.arange(len(self))[first] if isinstance(first, slice) else np.asarray(first)
        if not view:
            return np.stack([self[index, k] for k in range(self.shape[1])], axis=-2)
        of = np.broadcast_to(np.asarray(view[0]), index.shape)
        if index.ndim == 0:
            return self[index[None], of[None]][0]
        return self.unit(index, of).astype(np.float32) * self.norms[index, of][:, None]


class Kept(Sequence[Picture]):
    """The data set's pictures that have a row, in the rows' order."""

    def __init__(self, pictures: Sequence[Picture], places: Shards):
        self.pictures, self.places = pictures, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, i: int) -> Picture: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Picture]: ...
    def __getitem__(self, i: int | slice) -> Picture | Sequence[Picture]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.pictures[int(self.places[i % len(self)])]


class TeacherCache(NamedTuple):
    folder: Path
    manifest: dict[str, Any]
    pictures: Sequence[Picture]
    rows: Rows
    """[n, K, R]"""
    views: Shards
    """[n, K, P]"""
    class_features: np.ndarray
    caption_features: Shards | None


def open_folder(folder: Path, pictures: Sequence[Picture]) -> TeacherCache:
    """The finished cache in `folder`, of a data set's `pictures`; no file but the manifest is read, each one's size is looked at.

    Raises `EdgeclipError` when it is not finished, of an older format, or a file is missing or shorter than its index says.
    """
    manifest = disk.read_manifest(folder, KIND)
    if manifest.get("format") != FORMAT:
        raise EdgeclipError(folder, "is a teacher cache of an older edgeclip", "delete it; it will be made anew")
    counts = [s["rows"] for s in manifest["shards"]]

    def shards(what: str, field: str | None = None) -> Shards:
        return Shards([folder / name(what, i, len(counts)) for i in range(len(counts))], counts, field)

    for shard in manifest["shards"]:
        for file, size in shard["bytes"].items():
            try:
                found = (folder / file).stat().st_size
            except FileNotFoundError:
                raise EdgeclipError(folder, f"{file} is missing", "make the cache anew, or copy it again") from None
            if found != size:
                raise EdgeclipError(folder, f"{file} has {found} bytes, and its index says {size}", "make the cache anew, or copy it again")
    return TeacherCache(
        folder=folder,
        manifest=manifest,
        pictures=Kept(pictures, shards("records", "picture")),
        rows=Rows(shards("img_emb"), shards("more_views") if manifest["views"] > 1 else None, shards("records", "norm")),
        views=shards("records", "view"),
        class_features=np.load(folder / "class_features.npy"),
        caption_features=shards("text_emb") if manifest["captions"] else None,
    )
