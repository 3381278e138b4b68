"""`edgeclip cache inspect`: says what is inside a cache."""

from pathlib import Path

import numpy as np

from edgeclip import disk
from edgeclip.device import finite
from edgeclip.disk import Json
from edgeclip.host.cache import checked
from edgeclip.host.cache.arrays import Embeddings, Joined, Shards, TeacherCache, open_folder
from edgeclip.host.cache.embeddings import open_embeddings

SAMPLE = 4096
"""rows that `inspect` looks at"""


def inspect(folder: Path, verify: bool = False) -> Json:
    """Return what a cache holds, or a folder of embeddings in clip-retrieval's layout.

    verify: also hash every file and compare with the manifest. Raises `EdgeclipError` for what is
    neither, or is not what its manifest or metadata say.
    """
    if not (folder / disk.MANIFEST).exists() and (folder / "img_emb").is_dir():
        return _embeddings(folder) | {"verified": False}
    manifest = checked.read_manifest(folder)
    if verify:
        checked.verify(folder, manifest)
    theirs = open_embeddings(Path(manifest["rows_of"])) if "rows_of" in manifest else None
    cache = open_folder(folder, [], Embeddings(theirs.images, theirs.texts) if theirs else None)
    return _of(cache) | {"verified": verify}


def _rows(folder: Path, rows: Shards | Joined) -> tuple[np.ndarray, np.ndarray]:
    """Return (a sample of places, the norms of the rows there).

    Raises `EdgeclipError` for a row that is not finite or all zeros.
    """
    n = len(rows)
    some = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    found = finite.features(rows[some], f"{folder}: rows", "copy it again, or make it again")
    return some, np.linalg.norm(found.astype(np.float32), axis=1)


def _embeddings(folder: Path) -> Json:
    theirs = open_embeddings(folder)
    files = [p for what in ("img_emb", "text_emb", "metadata") for p in (folder / what).glob("*.*")]
    return {
        "folder": str(folder),
        "teacher": None,
        "identity": None,
        "data": f"metadata columns: {', '.join(theirs.columns)}",
        "images": len(theirs.images),
        "views": 1,
        "view_parameters": 0,
        "width": int(theirs.images.shape[1]),
        "captions": int(theirs.texts is not None),
        "classes": 0,
        "shards": len(theirs.metadata),
        "bytes": sum(p.stat().st_size for p in files),
        "skipped": [],
        "norm": None,
        "unit_error": float(np.abs(_rows(folder, theirs.images)[1] - 1).max()),
        "replay": None,
        "seed": None,
    }


def _of(cache: TeacherCache) -> Json:
    m = cache.manifest
    n, k, width = cache.rows.shape
    some, lengths = _rows(cache.folder, cache.rows.first)
    norms = cache.rows.norms[some] if cache.rows.norms else None
    return {
        "folder": str(cache.folder),
        "teacher": m["name"],
        "identity": m["teacher"],
        "data": m["data"],
        "images": n,
        "views": k,
        "view_parameters": cache.views.shape[2],
        "width": width,
        "captions": m["captions"],
        "classes": len(cache.class_features),
        "shards": len(m["shards"]),
        "bytes": sum(size for s in m["shards"] for size in s["bytes"].values()),
        "skipped": m["skipped"],
        "norm": None
        if norms is None
        else {"min": float(norms.min()), "mean": float(norms.mean()), "max": float(norms.max())},
        "unit_error": float(np.abs(lengths - 1).max()),
        "replay": m["replay"],
        "seed": m["description"]["seed"],
    }
