"""`edgeclip cache`: builds the caches that a recipe needs, and says what is inside one."""

from pathlib import Path
from typing import Any

import numpy as np

from edgeclip import disk, recipe, teachers
from edgeclip.cache.building import build
from edgeclip.cache.shards import KIND, TeacherCache, open_folder
from edgeclip.errors import EdgeclipError

SAMPLE = 4096
"""rows that `inspect` looks at"""


def build_for(path: Path, roots: tuple[str, ...] = (), out: Path | None = None) -> list[dict[str, Any]]:
    """Every cache that `distill` would make of the recipe at `path`, before it trains; what `inspect` says of each.

    out: folder of the only teacher's cache, instead of cache/<fingerprint>.
    Raises `EdgeclipError` where the rows depend on a stage 1 that has not run.
    """
    from edgeclip.distill import run

    asked = recipe.load(path, roots)
    if isinstance(asked.adapt, recipe.Prompts):
        raise EdgeclipError(f"{path}: adapt", "prompts change the rows, and stage 1 makes them", f"use: edgeclip distill {path}")
    if out and asked.other_teachers:
        raise EdgeclipError(f"--out {out}", "is one folder, and the recipe has several teachers", "leave it out: caches are found by their fingerprints")
    dataset, _, captions = run.load_data(asked, path)
    device = run.pick_device(asked.train.device)
    found = []
    for spec in (asked.teacher, *asked.other_teachers):
        teacher = teachers.load(spec)
        teachers.check_class_names(teacher, dataset.classes, dataset.templates)
        made = build(
            run.CACHE,
            teacher,
            teachers.folded(teacher),
            dataset,
            asked.views,
            asked.seed,
            captions=captions,
            device=device,
            threads=asked.train.threads,
            out=out,
        )
        found.append(inspect(made.folder))
    return found


def inspect(folder: Path, verify: bool = False) -> dict[str, Any]:
    """What a cache holds. verify: also hash every file and compare with the manifest.

    Raises `EdgeclipError` for what is no finished cache, or is not what its manifest says.
    """
    cache = open_folder(folder, [])
    if verify:
        disk.verify(folder, disk.read_manifest(folder, KIND))
    return _of(cache) | {"verified": verify}


def _of(cache: TeacherCache) -> dict[str, Any]:
    m = cache.manifest
    n, k, width = cache.rows.shape
    some = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    norms = cache.rows.norms[some]
    drift = np.abs(np.linalg.norm(cache.rows.first[some].astype(np.float32), axis=1) - 1)
    return {
        "folder": str(cache.folder),
        "teacher": m["name"],
        "identity": m["teacher"],
        "data": m["data"],
        "pictures": n,
        "views": k,
        "view_parameters": cache.views.shape[2],
        "width": width,
        "captions": m["captions"],
        "classes": len(cache.class_features),
        "shards": len(m["shards"]),
        "bytes": sum(size for s in m["shards"] for size in s["bytes"].values()),
        "skipped": m["skipped"],
        "norm": {"min": float(norms.min()), "mean": float(norms.mean()), "max": float(norms.max())},
        "unit_error": float(drift.max()),
        "replay": m["replay"],
        "seed": m["description"]["seed"],
    }
