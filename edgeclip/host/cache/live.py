"""Run a teacher over the data: every view of every image once.

Before it starts, one batch tells how long all of it will take and what the disk must hold; last,
views drawn at random are replayed from their stored parameters and put to the live teacher again.
"""

import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from edgeclip import disk
from edgeclip.device.finite import fault
from edgeclip.device.images import MAX_UNREADABLE, ImageRef, read, refuse_unreadable, stream
from edgeclip.device.preprocess import normalize, open_image, prepared
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.host.cache.arrays import IMAGE, TeacherCache, record
from edgeclip.host.cache.assemble import discard, finished, write_shard
from edgeclip.host.cache.texts import caption_features, class_features
from edgeclip.host.cache.views import apply_view, draw_views
from edgeclip.host.data import Dataset
from edgeclip.host.recipe import Views
from edgeclip.host.teachers import Teacher
from edgeclip.progress import say, track

SHARD_BYTES = 2**28
"""of one shard's rows, which are held in memory while it is made"""
SHARD_IMAGES = (2**8, 2**16)
"""fewest and most planned for one shard; between them a sixteenth of the data"""
METADATA_BYTES = 200
"""estimate of one image's key and caption, compressed"""
REPLAYED = 200
"""stored views that are put to the live teacher again"""
SAME = 0.999
"""the least cosine that a replayed view's row must have with the stored one"""
IMAGES_AT_ONCE = {"cpu": 8, "cuda": 256}
"""a CPU's caches hold a few images"""


class Job(NamedTuple):
    """What every step of running a teacher needs to know."""

    teacher: Teacher
    tower: nn.Module
    """the teacher's, folded"""
    data: Dataset
    views: Views
    seed: int
    captions: bool
    device: torch.device
    threads: int

    @property
    def images(self) -> Sequence[ImageRef]:
        return self.data.train

    @property
    def batch_size(self) -> int:
        return max(1, IMAGES_AT_ONCE[self.device.type] // self.views.count)


@torch.inference_mode()
def plan(job: Job, partial: Path) -> int:
    """Return how many shards there will be, and say what the work takes, judged by one batch.

    Raises `EdgeclipError` where no image can be read, or the disk cannot hold the cache.
    """
    # Texts first: a class name that does not fit is better known before the hours of the images.
    features = class_features(job.teacher, job.data.classes, job.data.templates)
    disk.write_array(partial / "class_features.npy", features)
    n = len(job.images)
    width, seconds = _try_one_batch(job, partial)
    done = sum(note.rows for note in finished(partial).values())
    rows = 2 * job.views.count * width
    captions = 2 * job.teacher.embed_dim * job.captions
    each = rows + record(job.views.count, 5).itemsize + METADATA_BYTES + captions
    need = max(0, n - done) * each
    free = shutil.disk_usage(partial).free
    rest = f"{n:,} images"
    if done:
        rest = f"{n - done:,} of {rest}"
    about = _minutes((n - done) * seconds)
    if job.captions:
        about += " (captions not counted)"
    say(
        f"teacher cache: {rest} x {job.views.count} views, about {about} and "
        f"{need / 2**20:,.1f} MiB of {free / 2**30:,.1f} GiB free"
    )
    if need > free:
        raise EdgeclipError(
            partial.parent,
            f"the cache needs {need / 2**30:,.1f} GiB more "
            f"and the disk has {free / 2**30:,.1f} GiB free",
            "free some, or take fewer views",
        )
    return math.ceil(n / _shard_size(n, rows))


def _try_one_batch(job: Job, partial: Path) -> tuple[int, float]:
    """Return the width of a row, and the seconds that an image takes."""
    skipped: list[str] = []
    first = range(min(len(job.images), 4 * job.batch_size))
    batch = next(_batches(job, first, skipped), None)
    if batch is None:
        discard(partial)
        raise EdgeclipError(
            job.data.name,
            f"none of the first images can be read (first: {skipped[0]})",
            "repair the data",
        )
    width = _rows(job, batch.pixels).shape[1]
    before = time.perf_counter()
    _rows(job, batch.pixels)
    return width, (time.perf_counter() - before) / len(batch.places)


def _shard_size(n: int, bytes_each: int) -> int:
    """Return the images of a shard, a power of two."""
    fewest, most = SHARD_IMAGES
    planned = min(max(fewest, 2 ** math.ceil(math.log2(n / 16))), most)
    return min(planned, 2 ** max(0, int(math.log2(SHARD_BYTES / bytes_each))))


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Batch(NamedTuple):
    """Some images' views."""

    places: np.ndarray
    """[B]: which images"""
    views: np.ndarray
    """[B, K, P]"""
    pixels: np.ndarray
    """uint8 [B * K, H, W, 3]"""


def _batches(job: Job, places: Sequence[int], skipped: list[str]) -> Iterator[Batch]:
    """Yield the views of the images at `places`."""
    views: dict[int, np.ndarray] = {}

    def make(i: int) -> np.ndarray:
        ref = job.images[i]
        image = open_image(read(ref), f"{ref.path} ({ref.key})")
        image = prepared(image, job.teacher.preprocess)
        views[i] = draw_views(*image.size, job.views, random.Random(f"{job.seed} {ref.key}"))
        return np.stack([apply_view(image, view, job.teacher.preprocess) for view in views[i]])

    for index, pixels in stream(places, make, job.batch_size, skipped, job.threads):
        drawn = np.stack([views.pop(int(i)) for i in index])
        yield Batch(index, drawn, pixels.reshape(-1, *pixels.shape[2:]))


def _rows(job: Job, pixels: np.ndarray) -> np.ndarray:
    """Return float32 [B, R] of uint8 [B, H, W, 3]."""
    x = torch.from_numpy(normalize(pixels, job.teacher.preprocess))
    x = x.to(job.device, memory_format=torch.channels_last)
    rows: np.ndarray = job.tower(x).float().cpu().numpy()
    return rows


@torch.inference_mode()
def make(job: Job, partial: Path, shard: int, shards: int) -> None:
    """Make shard `shard` of `shards` in the growing folder.

    Raises `EdgeclipError` when more than 1 % of the images so far are unreadable.
    """
    size = math.ceil(len(job.images) / shards)
    places = range(shard * size, min((shard + 1) * size, len(job.images)))
    skipped: list[str] = []
    title = f"teacher cache ({job.views.count} views)"
    if shards > 1:
        title += f", {shard + 1} of {shards}"
    rows, records = _run(job, places, skipped, title)
    _refuse_too_many(job, partial, places, skipped, len(records))
    for line in skipped:
        say(f"skipped: {line}")

    kept = [job.images[int(i)] for i in records[IMAGE]]
    captions = [ref.caption for ref in kept]
    arrays = {"img_emb": rows[:, 0], "records": records}
    if job.views.count > 1:
        arrays["more_views"] = rows[:, 1:]
    if job.captions:
        arrays["text_emb"] = caption_features(job.teacher, captions)
    keys = [ref.key for ref in kept]
    metadata = {"image_path": keys, "caption": captions, IMAGE: records[IMAGE]}
    write_shard(partial, shard, shards, arrays, metadata, skipped)


def _run(job: Job, places: range, skipped: list[str], title: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows [m, K, R] float16, unit, and the records [m] of the readable images."""
    k = job.views.count
    rows = np.empty((0, k, 0), np.float16)
    records = np.empty(0, record(k, 5))
    done = 0
    batches = math.ceil(len(places) / job.batch_size)
    for batch in track(_batches(job, places, skipped), title, batches):
        made = _rows(job, batch.pixels).reshape(len(batch.places), k, -1)
        _refuse_broken(job, batch, made)
        norm = np.linalg.norm(made, axis=2)
        if not done:
            rows = np.empty((len(places), k, made.shape[2]), np.float16)
            records = np.empty(len(places), record(k, batch.views.shape[2]))
        here = slice(done, done + len(batch.places))
        rows[here] = made / np.maximum(norm, 1e-12)[:, :, None]
        records[IMAGE][here] = batch.places
        records["norm"][here] = norm
        records["view"][here] = batch.views
        done += len(batch.places)
    return rows[:done], records[:done]


def _refuse_broken(job: Job, batch: Batch, rows: np.ndarray) -> None:
    """Refuse rows [B, K, R] that are not finite or all zeros, by the image's name."""
    for place, of_image in zip(batch.places.tolist(), rows, strict=True):
        wrong = fault(of_image, rows=True)
        if wrong is not None:
            raise EdgeclipError(
                f"{job.teacher.name}: image '{job.images[place].key}'",
                f"of its views {wrong}",
                "check the teacher's weights: it does not compute numbers",
            )


def _refuse_too_many(
    job: Job, partial: Path, places: range, skipped: list[str], readable: int
) -> None:
    """Refuse a shard without a readable image, and data with more than 1 % unreadable ones."""
    before: list[str] = []
    seen = len(places)
    for note in finished(partial).values():
        before += note.skipped
        seen += note.rows + len(note.skipped)
    if readable and len(before) + len(skipped) <= MAX_UNREADABLE * len(job.images):
        return
    discard(partial)
    refuse_unreadable([*before, *skipped], seen, job.data.name)
    raise EdgeclipError(
        job.data.name,
        f"none of the images {places.start} to {places.stop - 1} can be read (first: {skipped[0]})",
        "repair the data",
    )


@torch.inference_mode()
def replay(job: Job, made: TeacherCache) -> Json:
    """Put random stored views to the live teacher again; return how many and the least cosine.

    What a student will see is then what the rows were made of. Raises `EdgeclipError` where a view
    gives another row.
    """
    k = job.views.count
    count = min(REPLAYED, len(made.rows) * k)
    drawn = np.random.default_rng(job.seed).choice(len(made.rows) * k, count, replace=False)
    images, views = np.divmod(drawn, k)

    def make(j: int) -> np.ndarray:
        ref = made.images[int(images[j])]
        view = made.views[int(images[j]), int(views[j])]
        image = prepared(open_image(read(ref), ref.key), job.teacher.preprocess)
        return apply_view(image, view, job.teacher.preprocess)

    skipped: list[str] = []
    cosines = []
    batch = job.batch_size * k
    batches = stream(range(count), make, batch, skipped, job.threads)
    for index, pixels in track(batches, "replay", math.ceil(count / batch)):
        live = _rows(job, pixels)
        stored = made.rows[images[index], views[index]]
        lengths = np.linalg.norm(live, axis=1) * np.linalg.norm(stored, axis=1)
        cosines.append((live * stored).sum(axis=1) / np.maximum(lengths, 1e-12))
    if skipped:
        raise _changed(job, count, f"is unreadable now ({skipped[0]})")
    lowest = float(np.concatenate(cosines).min())
    if not lowest >= SAME:  # not a number is another row
        raise _changed(job, count, f"gives another row (cosine {lowest:.4f}, needs {SAME})")
    return {"views": count, "cosine_min": round(lowest, 6)}


def _changed(job: Job, count: int, what: str) -> EdgeclipError:
    return EdgeclipError(
        job.data.name,
        f"a stored view of {count} replayed {what}",
        "do not modify the data set while the cache is being built",
    )
