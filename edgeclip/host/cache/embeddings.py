"""Embeddings that others computed, as a teacher cache: clip-retrieval's folders, LAION's own among
them. No teacher runs.

    img_emb/img_emb_0.npy         [m, D] unit rows, float16 or float32
    text_emb/text_emb_0.npy       likewise of the captions, where there are any
    metadata/metadata_0.parquet   a line a row

Files of one kind belong together by their order. The rows stay where they lie: the cache keeps
which row belongs to which of the data's images, found by the recipe's join key, in the data's
order. Such rows are of the plain view (CLIP's own center crop) and have lost their norms.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edgeclip import disk
from edgeclip.device.finite import fault
from edgeclip.device.images import ImageRef
from edgeclip.disk import Description
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.cache.arrays import Shards
from edgeclip.host.recipe import Embeddings
from edgeclip.progress import track

AT_ONCE = 2**14
"""rows that are looked at together"""
JOINS: dict[str, Callable[[str], str]] = {
    "key": lambda key: key,
    "name": lambda key: PurePosixPath(key).name,
    "stem": lambda key: PurePosixPath(key).name.partition(".")[0],
}


class Folder(NamedTuple):
    """What lies in a folder of embeddings, not yet read."""

    root: Path
    images: Shards
    """[n, D]"""
    texts: Shards | None
    metadata: list[Path]
    columns: list[str]


def open_embeddings(root: Path) -> Folder:
    """Open the folders that clip-retrieval writes below `root`.

    Raises `EdgeclipError` where files are missing, broken, or of other lengths than those they
    belong to.
    """
    if not root.is_dir():
        raise EdgeclipError(root, "there is no such folder", "check the recipe's teacher.root")
    metadata = sorted((root / "metadata").glob("*.parquet"))
    footers = [_footer(f) for f in metadata]
    counts = [f.num_rows for f in footers]
    images = _shards(root, "img_emb", counts, metadata)
    if images is None:
        raise EdgeclipError(
            root, "has no img_emb/*.npy", "give the folder that clip-retrieval wrote"
        )
    return Folder(
        root,
        images,
        _shards(root, "text_emb", counts, metadata),
        metadata,
        footers[0].schema.names if footers else [],
    )


def _footer(path: Path) -> Any:
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as e:
        raise EdgeclipError(path, f"is no readable parquet file ({e})", "copy it again") from None


def _shards(root: Path, what: str, counts: list[int], metadata: list[Path]) -> Shards | None:
    files = sorted((root / what).glob("*.npy"))
    if not files:
        return None
    if len(files) != len(counts):
        raise EdgeclipError(
            root,
            f"has {len(files)} files in {what} and {len(counts)} in metadata",
            "copy what is missing",
        )
    for file, count, index in zip(files, counts, metadata, strict=True):
        rows, size = _npy_rows(file)
        if rows != count or file.stat().st_size < size:
            has = (
                f"has {rows} rows"
                if rows != count
                else f"has {file.stat().st_size} bytes of {size}"
            )
            raise EdgeclipError(file, f"{has}, and {index.name} says {count} rows", "copy it again")
    return Shards(files, counts)


def _npy_rows(file: Path) -> tuple[int, int]:
    """(rows, bytes of the whole file) by the header of an .npy file [rows, width]."""
    try:
        with file.open("rb") as f:
            version = np.lib.format.read_magic(f)
            shape, _, dtype = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version](f)
            start = f.tell()
    except (OSError, ValueError, KeyError) as e:
        raise EdgeclipError(file, f"is no readable .npy file ({e})", "copy it again") from None
    if len(shape) != 2 or dtype.kind != "f":
        raise EdgeclipError(
            file,
            f"holds {dtype} of shape {shape}, not float rows",
            "give the folder that clip-retrieval wrote",
        )
    return shape[0], start + math.prod(shape) * dtype.itemsize


def identity(spec: Embeddings) -> Description:
    """Return what decides the rows: the files by name and size, and how they are joined.

    The first of each kind goes in by its edges too: two models' files are of equal names and sizes,
    and there may be thousands.
    """
    names = []
    edges = []
    for what in ("img_emb", "text_emb", "metadata"):
        kind = sorted((Path(spec.root) / what).glob("*.*"))
        names += [[p.parent.name, p.name, p.stat().st_size] for p in kind]
        if kind:
            edges.append(disk.edges(kind[0]))
    files = [names, edges]
    return {
        "kind": "embeddings",
        "files": disk.fingerprint(files),
        "key": spec.key,
        "join": spec.join,
    }


def join(
    folder: Folder, spec: Embeddings, images: Sequence[ImageRef]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(places in `images` [m], their rows [m], keys of images without a row), in the images' order.

    Keys are compared by 64 bits of their hash; sixteen bytes of memory a row. Raises
    `EdgeclipError` for a column that is not there, a key that two rows have, and images without a
    row unless the recipe says `partial`.
    """
    if spec.key not in folder.columns:
        raise EdgeclipError(
            f"{folder.root}: metadata",
            f"has no column '{spec.key}'",
            did_you_mean(spec.key, folder.columns),
        )
    of = JOINS[spec.join]
    parts = []
    for file in track(folder.metadata, "read the metadata's keys", len(folder.metadata)):
        keys = pq.read_table(file, columns=[spec.key]).column(0)
        parts.append(
            np.fromiter((_hash(of(str(k))) for k in keys.to_pylist()), np.uint64, len(keys))
        )
    hashes = np.concatenate(parts)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    twice = np.flatnonzero(hashes[1:] == hashes[:-1])
    if twice.size:
        a, b = sorted(order[twice[0] : twice[0] + 2].tolist())
        raise EdgeclipError(
            f"{folder.root}: metadata",
            f"rows {a} and {b} have the same {spec.key} '{_key(folder, spec, a)}' "
            f"(join: {spec.join})",
            "use another key or join",
        )
    places, rows, missing = [], [], []
    for i, image in enumerate(images):
        wanted = _hash(of(image.key))
        at = int(np.searchsorted(hashes, wanted))
        if at < len(hashes) and hashes[at] == wanted:
            places.append(i)
            rows.append(int(order[at]))
        else:
            missing.append(image.key)
    if missing and (not places or not spec.partial):
        do = "set teacher.key and teacher.join"
        if places:
            do += ", or partial: true to leave them out"
        raise EdgeclipError(
            folder.root,
            f"{len(missing)} of {len(images)} images have no row (first: '{missing[0]}'; "
            f"a row's {spec.key} is '{_key(folder, spec, 0)}')",
            do,
        )
    return np.array(places, np.int64), np.array(rows, np.int64), missing


def refuse_broken(folder: Folder, rows: np.ndarray) -> None:
    """Raise `EdgeclipError` for one of `rows` [m] that is not finite or all zeros; reads them."""
    ordered = np.sort(rows)
    for kind in (folder.images, folder.texts):
        if kind is None:
            continue
        for start in range(0, len(ordered), AT_ONCE):
            part = ordered[start : start + AT_ONCE]
            wrong = fault(kind[part], rows=True)
            if wrong is not None:
                where = f"{kind.files[0].parent}: rows {part[0]} to {part[-1]}"
                raise EdgeclipError(where, wrong, "copy them again, or leave those images out")


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _key(folder: Folder, spec: Embeddings, row: int) -> str:
    for file in folder.metadata:
        keys = pq.read_table(file, columns=[spec.key]).column(0)
        if row < len(keys):
            return str(keys[row].as_py())
        row -= len(keys)
    return ""
