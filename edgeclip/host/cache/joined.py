"""Make a cache of rows that others have computed: of embeddings or of reinforced shards."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgeclip import disk
from edgeclip.disk import Description, Json
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.cache import embeddings, reinforced
from edgeclip.host.cache.arrays import IMAGE, Embeddings, TeacherCache, open_folder, record
from edgeclip.host.cache.assemble import Plan, assemble, write_shard
from edgeclip.host.cache.checked import CLASS_FEATURES, name
from edgeclip.host.cache.texts import class_features
from edgeclip.host.data import Dataset
from edgeclip.host.teachers import Teacher
from edgeclip.progress import say


class Join(NamedTuple):
    """A cache to be made without running its teacher."""

    folder: Path
    description: Description
    """everything that decides the rows"""
    facts: Json
    """what the manifest says beside"""
    teacher: Teacher
    data: Dataset
    captions: bool


def lacking(
    recipe: R.Recipe, classes: bool, captions: bool, class_list: bool
) -> tuple[str, str] | None:
    """Return (what, what to do) when a loss needs a tensor that a teacher lacks, else None.

    classes, captions: what the loss needs; class_list: whether the data has one.
    """
    of_classes = recipe.losses.captions == "classes"
    by_class = class_list and (classes or (captions and of_classes))
    for field, teacher in recipe.teachers().items():
        if not isinstance(teacher, R.Embeddings | R.Reinforced):
            continue
        if by_class and not (teacher.text or teacher.class_features):
            return (
                f"needs class features, and {field} has neither text nor class_features",
                "give one of them",
            )
        reads_captions = captions and not of_classes and isinstance(teacher, R.Embeddings)
        if reads_captions and not any(Path(teacher.root).glob("text_emb/*.npy")):
            return (
                f"needs the captions' features, and {field} has no text_emb below {teacher.root}",
                "drop the loss, or use captions: classes",
            )
    return None


def _write_class_features(job: Join, partial: Path) -> None:
    features = class_features(job.teacher, job.data.classes, job.data.templates)
    disk.write_array(partial / CLASS_FEATURES, features)


def of_embeddings(job: Join, spec: R.Embeddings) -> TeacherCache:
    """Return the cache that joins the rows of clip-retrieval's folders to the data's images.

    Raises `EdgeclipError` where captions are needed and there are none, and as
    `embeddings.join` and `embeddings.refuse_broken`.
    """
    theirs = embeddings.open_embeddings(Path(spec.root))
    images = job.data.train
    if job.captions and theirs.texts is None:
        raise EdgeclipError(
            theirs.root,
            "has no text_emb, and a loss or student.text needs the captions' features",
            "drop what needs them",
        )
    missing: list[str] = []

    def plan(partial: Path) -> int:
        _write_class_features(job, partial)
        return 1

    def make(partial: Path, shard: int, shards: int) -> None:
        places, rows, without = embeddings.join(theirs, spec, images)
        embeddings.refuse_broken(theirs, rows)
        missing.extend(without)
        records = np.zeros(len(places), record(1, 5))
        records[IMAGE] = places
        records["norm"] = np.nan
        arrays = {"records": records, "rows": rows}
        skipped = [f"'{key}' has no row" for key in without]
        write_shard(partial, shard, shards, arrays, {IMAGE: places, "row": rows}, skipped)

    facts = {**job.facts, "views": 1, "replay": None, "rows_of": str(theirs.root)}
    assemble(Plan(job.folder, job.description, facts, plan, make, lambda partial: {}))
    if missing:
        say(
            f"{theirs.root}: {len(missing)} of {len(images)} images have no row and are left out "
            "(partial: true)"
        )
    return open_folder(job.folder, images, Embeddings(theirs.images, theirs.texts))


def of_reinforced(job: Join, spec: R.Reinforced) -> TeacherCache:
    """Return the cache of one teacher's part of reinforced shards.

    Raises `EdgeclipError` where two of the data's images have the same key, and as
    `reinforced.make`.
    """
    images = job.data.train
    key_of = embeddings.JOINS[spec.join]
    place_of = {key_of(ref.key): i for i, ref in enumerate(images)}
    if len(place_of) < len(images):
        raise EdgeclipError(
            job.data.name,
            f"two of its images have the same key (join: {spec.join})",
            "use another teacher.join",
        )
    shards = len(reinforced.shard_files(spec))

    def plan(partial: Path) -> int:
        _write_class_features(job, partial)
        return shards

    def make(partial: Path, shard: int, shards: int) -> None:
        reinforced.make(spec, images, place_of, job.captions, partial, shard, shards)

    def finish(partial: Path) -> Json:
        first = disk.read_array(partial / name("records", 0, shards), mmap_mode="r")
        more = 0
        files = sorted((partial / "more_captions").glob("*.npy"))
        if files:
            more = disk.read_array(files[0], mmap_mode="r").shape[1]
        captions = int(job.captions) + more
        return {"views": first["norm"].shape[1], "replay": None, "captions": captions}

    assemble(Plan(job.folder, job.description, job.facts, plan, make, finish))
    made = open_folder(job.folder, images)
    left_out = len(images) - len(made.rows)
    if left_out:
        say(f"{spec.root}: {left_out} of {len(images)} images have no sample and are left out")
    return made
