"""Building a teacher cache: by running a teacher over the data, or out of what others have
computed.

The teacher sees every view of every image once. Before it starts, one batch tells how long all of
it will take and what the disk must hold; last, views drawn at random are replayed from their stored
parameters and put to the live teacher once more. How a folder grows, resumes and is shared by
processes: `assemble`.
"""

import hashlib
import math
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import nn

from edgeclip import disk
from edgeclip.device import tokenizer
from edgeclip.device.images import MAX_UNREADABLE, ImageRef, read, refuse_unreadable, stream
from edgeclip.device.preprocess import normalize, open_image
from edgeclip.device.zero_shot import ensemble, prompts
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.cache import embeddings, reinforced
from edgeclip.host.cache.arrays import FORMAT, Embeddings, TeacherCache, name, open_folder, record
from edgeclip.host.cache.assemble import as_json, assemble, discard, finished, write_shard
from edgeclip.host.cache.views import apply_view, draw_views
from edgeclip.host.data import Dataset
from edgeclip.host.data.index import ImageIndex
from edgeclip.host.recipe import Views
from edgeclip.host.teachers import Teacher
from edgeclip.progress import say, track

SHARD_BYTES = 2**28
"""of one shard's rows, which are held in memory while it is made"""
SHARD_IMAGES = (2**8, 2**16)
"""fewest and most planned for one shard; between them a sixteenth of the data"""
METADATA_BYTES = 200
"""estimate of one image's key and caption, compressed"""
REPLAYED, SAME = 200, 0.999
"""that many views are put to the live teacher again, and must have at least that cosine with their
rows"""


class _Job(NamedTuple):
    """What every step of running a teacher needs to know."""

    teacher: Teacher
    tower: nn.Module
    data: Dataset
    spec: Views
    seed: int
    captions: bool
    device: torch.device
    threads: int

    @property
    def images(self) -> Sequence[ImageRef]:
        return self.data.train


def build(
    cache: Path,
    teacher: Teacher,
    tower: nn.Module | None,
    data: Dataset,
    spec: Views,
    seed: int,
    *,
    captions: bool,
    device: torch.device,
    threads: int,
    out: Path | None = None,
) -> TeacherCache:
    """The cache for these ingredients: the finished one where it exists, else made now. `tower` is
    the teacher's, folded.

    out: a folder of its own instead of `cache`/<fingerprint>. Raises `EdgeclipError` when more than
    1 % of the images are unreadable, the disk cannot hold it, a stored view does not give its row
    again, or `out` holds (half of) another cache.
    """
    if not data.train:
        raise EdgeclipError(data.name, "has no images to train on", "check its folder and globs")
    description = describe(teacher, data, spec, seed, captions)
    folder = out or cache / disk.fingerprint(description)[:16]
    if not out and not (folder / disk.MANIFEST).exists():
        _say_nearest(cache, description)
    known = {
        "name": teacher.name,
        "teacher": teacher.identity,
        "data": data.name,
        "captions": int(captions),
    }
    if isinstance(teacher.source, R.Embeddings):
        return _of_embeddings(folder, description, known, teacher.source, teacher, data, captions)
    if isinstance(teacher.source, R.Reinforced):
        return _of_reinforced(folder, description, known, teacher.source, teacher, data, captions)
    assert tower is not None
    if teacher.text is not None:
        teacher.text.module.to(device)  # encode_text and captions run where it lies
    job = _Job(teacher, tower.to(device), data, spec, seed, captions, device, threads)
    assemble(
        folder,
        description,
        known | {"views": spec.count},
        lambda partial: _plan(job, partial),
        lambda *shard: _make(job, *shard),
        lambda partial: {"replay": _replay(job, open_folder(partial, data.train))},
    )
    return open_folder(folder, data.train)


def describe(
    teacher: Teacher, data: Dataset, spec: Views, seed: int, captions: bool
) -> dict[str, Any]:
    """Everything that decides the rows; its fingerprint is the cache's name."""
    return {
        "format": FORMAT,
        "teacher": teacher.identity,
        "preprocess": msgspec.to_builtins(teacher.preprocess),
        "views": msgspec.to_builtins(spec) if teacher.source is None else "the teacher's own",
        "seed": seed if teacher.source is None else None,
        "classes": data.classes,
        "templates": list(data.templates),
        "captions": _digests(data)[1] if captions else None,
        "images": len(data.train),
        "data": _digests(data)[0],
    }


def _digests(data: Dataset) -> list[str]:
    """Of the images' keys with their sizes, and of their captions; an index has them."""
    if isinstance(data.train, ImageIndex):
        return data.train.digests
    return [
        _digest(
            f"{p.key} {p.size if p.size >= 0 else Path(p.path).stat().st_size}" for p in data.train
        ),
        _digest(p.caption for p in data.train),
    ]


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\0")
    return digest.hexdigest()


def _say_nearest(cache: Path, description: dict[str, Any]) -> None:
    """Hours of a teacher are about to be spent: says what sets these ingredients apart from the
    nearest cache that there is."""
    others = [
        (p.parent.name, disk.read_json(p).get("description"))
        for p in sorted(cache.glob(f"*/{disk.MANIFEST}"))
    ]
    found = sorted(
        (len(d), at, d)
        for at, other in others
        if other
        for d in [disk.differences(other, as_json(description))]
    )
    if found and found[0][0] <= 3:
        say(
            f"teacher cache: none of these ingredients yet; {cache / found[0][1]} is of others ({'; '.join(found[0][2])})"
        )


# --- a teacher that runs


@torch.inference_mode()
def _plan(job: _Job, partial: Path) -> int:
    """How many shards. Says what the rest of the work takes, judged by one batch, and refuses what
    the disk cannot hold."""
    # Texts first: a class name that does not fit is better known before the hours of the images.
    disk.write_array(
        partial / "class_features.npy",
        class_features(job.teacher, job.data.classes, job.data.templates),
    )
    n, k = len(job.images), job.spec.count
    skipped: list[str] = []
    first = next(_batches(job, range(min(n, 4 * _batch_size(job))), skipped), None)
    if first is None:
        discard(partial)
        raise EdgeclipError(
            job.data.name,
            f"none of the first images can be read (first: {skipped[0]})",
            "repair the data",
        )
    pixels = first[1][1]
    width = _rows(job, pixels).shape[1]
    before = time.perf_counter()
    _rows(job, pixels)
    seconds = (time.perf_counter() - before) / len(first[0])
    done = sum(s["rows"] for s in finished(partial).values())
    bytes_each = (
        2 * k * width
        + record(k, 5).itemsize
        + METADATA_BYTES
        + 2 * job.teacher.embed_dim * job.captions
    )
    need, free = max(0, n - done) * bytes_each, shutil.disk_usage(partial).free
    rest = f"{n - done:,} of {n:,} images" if done else f"{n:,} images"
    about = _minutes((n - done) * seconds) + (" (captions not counted)" if job.captions else "")
    say(
        f"teacher cache: {rest} x {k} views, about {about} and {need / 2**20:,.1f} MiB of {free / 2**30:,.1f} GiB free"
    )
    if need > free:
        raise EdgeclipError(
            partial.parent,
            f"the cache needs {need / 2**30:,.1f} GiB more and the disk has {free / 2**30:,.1f} GiB free",
            "free some, or take fewer views",
        )
    return math.ceil(n / _shard_size(n, 2 * k * width))


def _shard_size(n: int, bytes_each: int) -> int:
    """ImageIndex a shard, a power of two."""
    planned = min(max(SHARD_IMAGES[0], 2 ** math.ceil(math.log2(n / 16))), SHARD_IMAGES[1])
    return min(planned, 2 ** max(0, int(math.log2(SHARD_BYTES / bytes_each))))


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _batch_size(job: _Job) -> int:
    return max(
        1, (8 if job.device.type == "cpu" else 256) // job.spec.count
    )  # a CPU's caches hold a few images


def _batches(
    job: _Job, places: Sequence[int], skipped: list[str]
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """(places [B], (views [B, K, P], pixels [B * K, H, W, 3])) of the images at `places`."""
    views: dict[int, np.ndarray] = {}

    def make(i: int) -> np.ndarray:
        ref = job.images[i]
        image = open_image(read(ref), f"{ref.path} ({ref.key})")
        views[i] = draw_views(*image.size, job.spec, random.Random(f"{job.seed} {ref.key}"))
        return np.stack([apply_view(image, v, job.teacher.preprocess) for v in views[i]])

    for index, pixels in stream(places, make, _batch_size(job), skipped, job.threads):
        yield (
            index,
            (np.stack([views.pop(int(i)) for i in index]), pixels.reshape(-1, *pixels.shape[2:])),
        )


def _rows(job: _Job, pixels: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] to float32 [B, R]."""
    x = torch.from_numpy(normalize(pixels, job.teacher.preprocess)).to(
        job.device, memory_format=torch.channels_last
    )
    rows: np.ndarray = job.tower(x).float().cpu().numpy()
    return rows


@torch.inference_mode()
def _make(job: _Job, partial: Path, shard: int, shards: int) -> None:
    size = math.ceil(len(job.images) / shards)
    places = range(shard * size, min((shard + 1) * size, len(job.images)))
    k, batch = job.spec.count, _batch_size(job)
    rows = records = None
    skipped: list[str] = []
    done = 0
    what = f"teacher cache ({k} views)" + (f", {shard + 1} of {shards}" if shards > 1 else "")
    for index, (views, pixels) in track(
        _batches(job, places, skipped), what, math.ceil(len(places) / batch)
    ):
        made = _rows(job, pixels).reshape(len(index), k, -1)
        norm = np.linalg.norm(made, axis=2)
        if rows is None or records is None:
            rows, records = (
                np.empty((len(places), k, made.shape[2]), np.float16),
                np.empty(len(places), record(k, views.shape[2])),
            )
        here = slice(done, done + len(index))
        rows[here] = made / np.maximum(norm, 1e-12)[:, :, None]
        records["image"][here], records["norm"][here], records["view"][here] = index, norm, views
        done += len(index)
    found = finished(partial).values()
    before, seen = (
        [line for s in found for line in s["skipped"]],
        sum(s["rows"] + len(s["skipped"]) for s in found) + len(places),
    )
    if (
        len(before) + len(skipped) > MAX_UNREADABLE * len(job.images)
        or rows is None
        or records is None
    ):
        discard(partial)
        refuse_unreadable([*before, *skipped], seen, job.data.name)
        raise EdgeclipError(
            job.data.name,
            f"none of the images {places.start} to {places.stop - 1} can be read (first: {skipped[0]})",
            "repair the data",
        )
    for line in skipped:
        say(f"skipped: {line}")
    kept = [job.images[int(i)] for i in records["image"][:done]]
    arrays = {"img_emb": rows[:done, 0], "records": records[:done]}
    if k > 1:
        arrays["more_views"] = rows[:done, 1:]
    if job.captions:
        arrays["text_emb"] = caption_features(job.teacher, [p.caption for p in kept])
    metadata = {
        "image_path": [p.key for p in kept],
        "caption": [p.caption for p in kept],
        "image": records["image"][:done],
    }
    write_shard(partial, shard, shards, arrays, metadata, skipped)


@torch.inference_mode()
def _replay(job: _Job, made: TeacherCache) -> dict[str, Any]:
    """Random stored views through the live teacher again: what a student will see is what the rows
    were made of."""
    rng = np.random.default_rng(job.seed)
    count = min(REPLAYED, len(made.rows) * job.spec.count)
    drawn = rng.choice(len(made.rows) * job.spec.count, count, replace=False)
    places = [divmod(int(d), job.spec.count) for d in drawn]

    def make(j: int) -> np.ndarray:
        i, view = places[j]
        return apply_view(
            open_image(read(made.images[i]), made.images[i].key),
            made.views[i, view],
            job.teacher.preprocess,
        )

    skipped: list[str] = []
    cosines = []
    batch = _batch_size(job) * job.spec.count
    for index, pixels in track(
        stream(range(count), make, batch, skipped, job.threads), "replay", math.ceil(count / batch)
    ):
        live = _rows(job, pixels)
        stored = made.rows[
            np.array([places[j][0] for j in index]), np.array([places[j][1] for j in index])
        ]
        cosines.append(
            (live * stored).sum(axis=1)
            / np.maximum(np.linalg.norm(live, axis=1) * np.linalg.norm(stored, axis=1), 1e-12)
        )
    lowest = float(np.concatenate(cosines).min()) if cosines else 0.0
    if skipped or not lowest >= SAME:  # not a number is another row
        what = (
            f"is unreadable now ({skipped[0]})"
            if skipped
            else f"gives another row (cosine {lowest:.4f}, at least {SAME} is needed)"
        )
        raise EdgeclipError(
            job.data.name,
            f"a stored view of {count} replayed {what}",
            "let the data lie still while the cache is built",
        )
    return {"views": count, "cosine_min": round(lowest, 6)}


# --- what others have computed


def lacking(
    asked: R.Recipe, classes: bool, captions: bool, class_list: bool
) -> tuple[str, str] | None:
    """(what, what to do) when a loss needs a tensor that a teacher of the recipe has not; None when
    they have all.

    classes, captions: what the loss needs; class_list: whether the data has one.
    """
    for field, teacher in [
        ("teacher", asked.teacher),
        *((f"other_teachers.{i}", t) for i, t in enumerate(asked.other_teachers)),
    ]:
        if not isinstance(teacher, R.Embeddings | R.Reinforced):
            continue
        by_class = class_list and (classes or (captions and asked.losses.captions == "classes"))
        if by_class and not (teacher.text or teacher.class_features):
            return (
                f"needs class features, and {field} has neither text nor class_features",
                "give one of them",
            )
        if (
            captions
            and asked.losses.captions == "data"
            and isinstance(teacher, R.Embeddings)
            and not any(Path(teacher.root).glob("text_emb/*.npy"))
        ):
            return (
                f"needs the captions' features, and {field} has no text_emb below {teacher.root}",
                "drop the loss, or use captions: classes",
            )
    return None


def _of_embeddings(
    folder: Path,
    description: dict[str, Any],
    known: dict[str, Any],
    spec: R.Embeddings,
    teacher: Teacher,
    data: Dataset,
    captions: bool,
) -> TeacherCache:
    theirs = embeddings.open_embeddings(Path(spec.root))
    if captions and theirs.texts is None:
        raise EdgeclipError(
            theirs.root,
            "has no text_emb, and a loss or student.text needs the captions' features",
            "drop what needs them",
        )
    missing: list[str] = []

    def plan(partial: Path) -> int:
        disk.write_array(
            partial / "class_features.npy", class_features(teacher, data.classes, data.templates)
        )
        return 1

    def make(partial: Path, shard: int, shards: int) -> None:
        places, rows, without = embeddings.join(theirs, spec, data.train)
        missing.extend(without)
        records = np.zeros(len(places), record(1, 5))
        records["image"], records["norm"] = places, np.nan
        write_shard(
            partial,
            shard,
            shards,
            {"records": records, "rows": rows},
            {"image": places, "row": rows},
            [f"'{k}' has no row" for k in without],
        )

    known |= {"views": 1, "replay": None, "rows_of": str(theirs.root)}
    assemble(folder, description, known, plan, make, lambda partial: {})
    if missing:
        say(
            f"{theirs.root}: {len(missing)} of {len(data.train)} images have no row and are left out (partial: true)"
        )
    return open_folder(folder, data.train, Embeddings(theirs.images, theirs.texts))


def _of_reinforced(
    folder: Path,
    description: dict[str, Any],
    known: dict[str, Any],
    spec: R.Reinforced,
    teacher: Teacher,
    data: Dataset,
    captions: bool,
) -> TeacherCache:
    of = embeddings.JOINS[spec.join]
    place_of = {of(p.key): i for i, p in enumerate(data.train)}
    if len(place_of) < len(data.train):
        raise EdgeclipError(
            data.name,
            f"two of its images have the same key (join: {spec.join})",
            "use another teacher.join",
        )

    def plan(partial: Path) -> int:
        disk.write_array(
            partial / "class_features.npy", class_features(teacher, data.classes, data.templates)
        )
        return len(reinforced.shard_files(spec))

    def make(partial: Path, shard: int, shards: int) -> None:
        reinforced.make(spec, data.train, place_of, captions, partial, shard, shards)

    def finish(partial: Path) -> dict[str, Any]:
        first = np.load(
            partial / name("records", 0, len(reinforced.shard_files(spec))), mmap_mode="r"
        )
        of_captions = sorted((partial / "more_captions").glob("*.npy"))
        several = np.load(of_captions[0], mmap_mode="r").shape[1] if of_captions else 0
        return {
            "views": first["norm"].shape[1],
            "replay": None,
            "captions": int(captions) + several,
        }

    assemble(folder, description, known, plan, make, finish)
    made = open_folder(folder, data.train)
    if len(made.rows) < len(data.train):
        say(
            f"{spec.root}: {len(data.train) - len(made.rows)} of {len(data.train)} images have no sample and are left out"
        )
    return made


# --- texts


def caption_features(teacher: Teacher, captions: list[str]) -> np.ndarray:
    """[n, D] float16, unit. A caption that is longer than the text tower's context loses its end,
    as in CLIP's own training."""
    if teacher.text is None:
        return teacher.encode_text(captions).numpy().astype(np.float16)
    words, length = (
        tokenizer.load(teacher.text.tokenizer, teacher.text.context_length),
        teacher.text.context_length,
    )
    out, place = [], next(teacher.text.module.parameters()).device
    for start in track(range(0, len(captions), 256), "captions", math.ceil(len(captions) / 256)):
        ids = torch.from_numpy(
            tokenizer.encode(words, captions[start : start + 256], length, truncate=True)
        ).to(place)
        out.append(teacher.text.module(ids).cpu().numpy().astype(np.float16))
    return np.concatenate(out)


def class_features(teacher: Teacher, classes: list[str], templates: tuple[str, ...]) -> np.ndarray:
    """[N, D] unit class features: the prompt ensemble of each class name, or the teacher's own
    where it has but them."""
    if not classes:
        return np.zeros((0, teacher.embed_dim), np.float32)
    if teacher.class_features is not None:
        if len(teacher.class_features) != len(classes):
            raise EdgeclipError(
                "teacher.class_features",
                f"has {len(teacher.class_features)} rows, and there are {len(classes)} classes",
                "write a row a class",
            )
        return teacher.class_features
    features = teacher.encode_text(prompts(classes, templates)).numpy()
    return ensemble(features.reshape(len(classes), len(templates), -1))
