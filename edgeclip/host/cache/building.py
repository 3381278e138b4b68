"""Build a teacher cache: by running a teacher over the data, or out of what others have computed.

How a folder grows, resumes and is shared by processes: `assemble`. How a teacher is run: `live`.
How rows that others have computed are joined: `joined`.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from edgeclip import disk
from edgeclip.device.preprocess import Preprocess
from edgeclip.disk import Description, Json
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.cache import live
from edgeclip.host.cache.arrays import FORMAT, TeacherCache, open_folder
from edgeclip.host.cache.assemble import Plan, as_json, assemble
from edgeclip.host.cache.joined import Join, of_embeddings, of_reinforced
from edgeclip.host.data import Dataset
from edgeclip.host.data.index import ImageIndex
from edgeclip.host.teachers import Teacher
from edgeclip.progress import say

NEAR = 3
"""a cache that differs in at most so many fields is named before another one is made"""


class Ingredients(NamedTuple):
    """What a cache is made of, and where the work is done."""

    teacher: Teacher
    tower: nn.Module | None
    """the teacher's, folded; None: its rows are ready"""
    data: Dataset
    views: R.Views
    seed: int
    captions: bool
    """whether the captions' features are wanted too"""
    device: torch.device
    threads: int
    """that decode images"""


def build(cache: Path, ingredients: Ingredients, out: Path | None = None) -> TeacherCache:
    """Return the cache of these ingredients: the finished one where it exists, else made now.

    out: a folder of its own instead of `cache`/<fingerprint>. Raises `EdgeclipError` when more than
    1 % of the images are unreadable, the disk cannot hold it, a stored view does not give its row
    again, or `out` holds (half of) another cache.
    """
    teacher, tower, data = ingredients.teacher, ingredients.tower, ingredients.data
    if not data.train:
        raise EdgeclipError(data.name, "has no images to train on", "check its folder and globs")
    description = describe(ingredients)
    folder = out or cache / disk.fingerprint(description)[:16]
    if not out and not (folder / disk.MANIFEST).exists():
        _say_nearest(cache, description)
    captions = ingredients.captions
    facts = {
        "name": teacher.name,
        "teacher": teacher.identity,
        "data": data.name,
        "captions": int(captions),
    }
    join = Join(folder, description, facts, teacher, data, captions)
    if isinstance(teacher.source, R.Embeddings):
        return of_embeddings(join, teacher.source)
    if isinstance(teacher.source, R.Reinforced):
        return of_reinforced(join, teacher.source)
    assert tower is not None
    if teacher.text is not None:
        teacher.text.module.to(ingredients.device)  # encode_text and captions run where it lies
    job = live.Job(*ingredients._replace(tower=tower.to(ingredients.device)))

    def make(partial: Path, shard: int, shards: int) -> None:
        live.make(job, partial, shard, shards)

    def finish(partial: Path) -> Json:
        return {"replay": live.replay(job, open_folder(partial, data.train))}

    facts["views"] = ingredients.views.count
    plan = Plan(folder, description, facts, lambda partial: live.plan(job, partial), make, finish)
    assemble(plan)
    return open_folder(folder, data.train)


def describe(ingredients: Ingredients) -> Description:
    """Return everything that decides the rows; its fingerprint is the cache's name.

    Its words are format 2's, `pictures` among them: with others, nobody would find the caches that
    there are.
    """
    teacher, data = ingredients.teacher, ingredients.data
    keys, captions = _digests(data)
    views: Any = "the teacher's own"
    seed = None
    if teacher.source is None:
        views = msgspec.to_builtins(ingredients.views)
        seed = ingredients.seed
    return {
        "format": FORMAT,
        "teacher": teacher.identity,
        "preprocess": _preprocess(teacher.preprocess),
        "views": views,
        "seed": seed,
        "classes": data.classes,
        "templates": list(data.templates),
        "captions": captions if ingredients.captions else None,
        "pictures": len(data.train),
        "data": keys,
    }


def _preprocess(spec: Preprocess) -> Json:
    """Return the record in format 2's words: what is off is left out, as before there was it."""
    value: Json = msgspec.to_builtins(spec)
    for option in {"exif", "background"} - set(spec.options()):
        del value[option]
    if spec.crop == 1.0:
        del value["crop"]
    return value


def _digests(data: Dataset) -> list[str]:
    """Return digests of the images' keys with their sizes, and of their captions."""
    if isinstance(data.train, ImageIndex):
        return data.train.digests
    sizes = (ref.size if ref.size >= 0 else Path(ref.path).stat().st_size for ref in data.train)
    keys = (f"{ref.key} {size}" for ref, size in zip(data.train, sizes, strict=True))
    return [_digest(keys), _digest(ref.caption for ref in data.train)]


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\0")
    return digest.hexdigest()


def _say_nearest(cache: Path, description: Description) -> None:
    """Say how the nearest cache that there is differs: hours of a teacher are about to be spent."""
    wanted = as_json(description)
    found = []
    for folder in disk.finished_in(cache):
        other = disk.read_json(folder / disk.MANIFEST).get("description")
        if other:
            differences = disk.differences(other, wanted)
            found.append((len(differences), folder.name, differences))
    if not found:
        return
    count, nearest, differences = min(found)
    if count <= NEAR:
        say(
            f"teacher cache: there is none of these ingredients yet; {cache / nearest} differs "
            f"({'; '.join(differences)})"
        )
