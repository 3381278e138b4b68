"""Building a teacher cache, shard by shard: what is interrupted goes on at the first shard that is not whole.

A cache grows in `.<fingerprint>.partial` beside its final place. A shard's files come first, then `shards/<i>.json` with
their sizes and hashes; a later call checks what it finds against them and makes anew what does not agree. Every shard is
made under a file lock that ends with its process, so any number of processes may build the same cache: each starts with
the shards of its own rank (`torchrun`'s RANK of WORLD_SIZE) and then helps with the others'. Last, views drawn at random
are replayed from their stored parameters and put to the live teacher once more, the manifest is written, and one rename
makes the folder a cache.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from edgeclip import disk, tokenizer
from edgeclip.cache.shards import FORMAT, KIND, TeacherCache, name, open_folder, record
from edgeclip.cache.views import draw_views, replay
from edgeclip.data import Dataset
from edgeclip.errors import EdgeclipError
from edgeclip.pictures import MAX_UNREADABLE, Picture, read, refuse_unreadable, stream
from edgeclip.preprocess import normalise, open_picture
from edgeclip.progress import say, track
from edgeclip.recipe import Views
from edgeclip.teachers import Teacher
from edgeclip.zero_shot import ensemble, prompts

SHARD_BYTES = 2**28
"""of one shard's rows, which are held in memory while it is made"""
SHARD_PICTURES = (2**8, 2**16)
"""fewest and most planned for one shard; between them a sixteenth of the data"""
METADATA_BYTES = 200
"""estimate of one picture's key and caption, compressed"""
REPLAYED, SAME = 200, 0.999
"""that many views are put to the live teacher again, and must have at least that cosine with their rows"""


def build(
    cache: Path,
    teacher: Teacher,
    tower: nn.Module,
    data: Dataset,
    spec: Views,
    seed: int,
    *,
    captions: bool,
    device: torch.device,
    threads: int,
    out: Path | None = None,
) -> TeacherCache:
    """The cache for these ingredients: the finished one where it exists, else made now. `tower` is the teacher's, folded.

    out: a folder of its own instead of `cache`/<fingerprint>.
    Raises `EdgeclipError` when more than 1 % of the pictures are unreadable, the disk cannot hold it, a stored view does
    not give its row again, or `out` holds (half of) another cache.
    """
    if not data.train:
        raise EdgeclipError(data.name, "has no pictures to train on", "check its folder and globs")
    description = describe(teacher, data, spec, seed, captions)
    folder = out or cache / disk.fingerprint(description)[:16]
    if not (folder / disk.MANIFEST).exists():
        if not out:
            _say_nearest(cache, description)
        partial = folder.with_name(f".{folder.name}.partial")
        job = _Job(folder, partial, teacher, tower.to(device), data, spec, seed, captions, device, threads)
        try:
            _build(job, description)
        except FileNotFoundError:  # another process finished meanwhile and moved the folder away under this one
            if not (folder / disk.MANIFEST).exists():
                raise
    _refuse_other(folder, disk.read_manifest(folder, KIND).get("description"), description)
    return open_folder(folder, data.train)


def describe(teacher: Teacher, data: Dataset, spec: Views, seed: int, captions: bool) -> dict[str, Any]:
    """Everything that decides the rows; its fingerprint is the cache's name."""
    return {
        "format": FORMAT,
        "teacher": teacher.identity,
        "preprocess": msgspec.to_builtins(teacher.preprocess),
        "views": msgspec.to_builtins(spec),
        "seed": seed,
        "classes": data.classes,
        "templates": list(data.templates),
        "captions": _digest(p.caption for p in data.train) if captions else None,
        "pictures": len(data.train),
        "data": _digest(f"{p.key} {p.size if p.size >= 0 else Path(p.path).stat().st_size}" for p in data.train),
    }


def _json(value: Any) -> Any:
    """As it will be read again."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\0")
    return digest.hexdigest()


def _refuse_other(folder: Path, found: Any, asked: dict[str, Any]) -> None:
    different = disk.differences(found, _json(asked))
    if different:
        raise EdgeclipError(folder, f"is another teacher cache ({'; '.join(different[:5])})", "delete it, or name another folder")


def _say_nearest(cache: Path, description: dict[str, Any]) -> None:
    """Hours of a teacher are about to be spent: says what sets these ingredients apart from the nearest cache that there is."""
    others = [(p.parent.name, disk.read_json(p).get("description")) for p in sorted(cache.glob(f"*/{disk.MANIFEST}"))]
    found = sorted((len(d), at, d) for at, other in others if other for d in [disk.differences(other, _json(description))])
    if found and found[0][0] <= 3:
        say(f"teacher cache: none of these ingredients yet; {cache / found[0][1]} is of others ({'; '.join(found[0][2])})")


class _Job(NamedTuple):
    """What every step of a build needs to know."""

    folder: Path
    partial: Path
    teacher: Teacher
    tower: nn.Module
    data: Dataset
    spec: Views
    seed: int
    captions: bool
    device: torch.device
    threads: int

    @property
    def pictures(self) -> Sequence[Picture]:
        return self.data.train


@torch.inference_mode()
def _build(job: _Job, description: dict[str, Any]) -> None:
    (job.partial / "shards").mkdir(parents=True, exist_ok=True)
    with _lock(job.partial / "start", wait=True):
        if (job.folder / disk.MANIFEST).exists():  # finished between this process's look and its lock
            shutil.rmtree(job.partial)
            return
        if (job.partial / "description.json").exists():
            _refuse_other(job.partial, disk.read_json(job.partial / "description.json"), description)
        disk.write_json(job.partial / "description.json", description)
        # Texts first: a class name that does not fit is better known before the hours of the pictures.
        disk.write_array(job.partial / "class_features.npy", class_features(job.teacher, job.data.classes, job.data.templates))
        size = _plan(job)
    n = math.ceil(len(job.pictures) / size)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own = [i for i in range(n) if i % world == rank]
    busy = []
    for i in own + [i for i in range(n) if i % world != rank]:
        with _lock(_lock_file(job, i, n)) as mine:
            if not mine:
                busy.append(i)
            elif not _whole(job, i, n):
                _make(job, i, n, size)
    if busy:
        say(f"{job.folder}: another process builds this cache too; waiting for its {len(busy)} shards")
    for i in busy:
        with _lock(_lock_file(job, i, n), wait=True):
            if not _whole(job, i, n):  # whoever had it did not finish it
                _make(job, i, n, size)
    with _lock(job.partial / "finish", wait=True):
        if not (job.folder / disk.MANIFEST).exists():
            _finish(job, description, n)


def _plan(job: _Job) -> int:
    """Pictures a shard. Says what the rest of the work takes, judged by one batch, and refuses what the disk cannot hold."""
    n, k = len(job.pictures), job.spec.count
    skipped: list[str] = []
    first = next(_batches(job, range(min(n, 4 * _batch_size(job))), skipped), None)
    if first is None:
        shutil.rmtree(job.partial, ignore_errors=True)
        raise EdgeclipError(job.data.name, f"none of the first pictures can be read (first: {skipped[0]})", "repair the data")
    pixels = first[1][1]
    _rows(job, pixels)
    before = time.perf_counter()
    width = _rows(job, pixels).shape[1]
    seconds = (time.perf_counter() - before) / len(first[0])
    size = min(max(SHARD_PICTURES[0], 2 ** math.ceil(math.log2(n / 16))), SHARD_PICTURES[1], 2 ** max(0, int(math.log2(SHARD_BYTES / (2 * k * width)))))
    done = sum(s["rows"] for s in _finished(job).values())
    bytes_each = 2 * k * width + record(k, 5).itemsize + METADATA_BYTES + 2 * job.teacher.embed_dim * job.captions
    need, free = max(0, n - done) * bytes_each, shutil.disk_usage(job.partial).free
    rest = f"{n - done:,} of {n:,} pictures" if done else f"{n:,} pictures"
    say(f"teacher cache: {rest} x {k} views, about {_minutes((n - done) * seconds)} and {need / 2**20:,.1f} MiB of {free / 2**30:,.1f} GiB free")
    if need > free:
        raise EdgeclipError(
            job.folder.parent, f"the cache needs {need / 2**30:,.1f} GiB more and the disk has {free / 2**30:,.1f} GiB free", "free some, or take fewer views"
        )
    return size


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- one shard


def _batch_size(job: _Job) -> int:
    return max(1, (8 if job.device.type == "cpu" else 256) // job.spec.count)  # a CPU's caches hold a few pictures


def _batches(job: _Job, places: Sequence[int], skipped: list[str]) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """(places [B], (views [B, K, P], pixels [B * K, H, W, 3])) of the pictures at `places`."""
    views: dict[int, np.ndarray] = {}

    def make(i: int) -> np.ndarray:
        picture = job.pictures[i]
        image = open_picture(read(picture), f"{picture.path} ({picture.key})")
        views[i] = draw_views(*image.size, job.spec, random.Random(f"{job.seed} {picture.key}"))
        return np.stack([replay(image, v, job.teacher.preprocess) for v in views[i]])

    for index, pixels in stream(places, make, _batch_size(job), skipped, job.threads):
        yield index, (np.stack([views.pop(int(i)) for i in index]), pixels.reshape(-1, *pixels.shape[2:]))


def _rows(job: _Job, pixels: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] to float32 [B, R]."""
    x = torch.from_numpy(normalise(pixels, job.teacher.preprocess)).to(job.device, memory_format=torch.channels_last)
    rows: np.ndarray = job.tower(x).float().cpu().numpy()
    return rows


def _make(job: _Job, shard: int, shards: int, size: int) -> None:
    places = range(shard * size, min((shard + 1) * size, len(job.pictures)))
    k, batch = job.spec.count, _batch_size(job)
    rows = records = None
    skipped: list[str] = []
    done = 0
    what = f"teacher cache ({k} views)" + (f", {shard + 1} of {shards}" if shards > 1 else "")
    for index, (views, pixels) in track(_batches(job, places, skipped), what, math.ceil(len(places) / batch)):
        made = _rows(job, pixels).reshape(len(index), k, -1)
        norm = np.linalg.norm(made, axis=2)
        if rows is None or records is None:
            rows, records = np.empty((len(places), k, made.shape[2]), np.float16), np.empty(len(places), record(k, views.shape[2]))
        here = slice(done, done + len(index))
        rows[here] = made / np.maximum(norm, 1e-12)[:, :, None]
        records["picture"][here], records["norm"][here], records["view"][here] = index, norm, views
        done += len(index)
    found = _finished(job).values()
    before, seen = [line for s in found for line in s["skipped"]], sum(s["rows"] + len(s["skipped"]) for s in found) + len(places)
    if len(before) + len(skipped) > MAX_UNREADABLE * len(job.pictures) or rows is None or records is None:
        shutil.rmtree(job.partial, ignore_errors=True)  # who repairs the data makes another cache of it
        refuse_unreadable([*before, *skipped], seen, job.data.name)
        raise EdgeclipError(job.data.name, f"none of the pictures {places.start} to {places.stop - 1} can be read (first: {skipped[0]})", "repair the data")
    for line in skipped:
        say(f"skipped: {line}")
    kept = [job.pictures[int(i)] for i in records["picture"][:done]]
    arrays = {"img_emb": rows[:done, 0], "records": records[:done]}
    if k > 1:
        arrays["more_views"] = rows[:done, 1:]
    if job.captions:
        arrays["text_emb"] = caption_features(job.teacher, [p.caption for p in kept])
    metadata = {"image_path": [p.key for p in kept], "caption": [p.caption for p in kept], "picture": records["picture"][:done]}
    write_shard(job.partial, shard, shards, arrays, metadata, skipped)


def write_shard(folder: Path, shard: int, shards: int, arrays: dict[str, np.ndarray], metadata: dict[str, Any], skipped: list[str]) -> None:
    """The files of one shard, and last what says that they are whole.

    Raises `EdgeclipError` when they cannot be written (a full disk): the shards before stay.
    """
    files = {}
    try:
        for what, array in arrays.items():
            files[name(what, shard, shards)] = folder / name(what, shard, shards)
            disk.write_array(folder / name(what, shard, shards), array)
        files[name("metadata", shard, shards)] = folder / name("metadata", shard, shards)
        with disk.new_file(folder / name("metadata", shard, shards)) as temporary:
            pq.write_table(pa.table(metadata), temporary)
        content = {"rows": len(arrays["img_emb"]), "bytes": {f: p.stat().st_size for f, p in files.items()}, "skipped": skipped}
        disk.write_json(_note(folder, shard), content | {"files": {f: disk.sha256(p) for f, p in files.items()}})
    except FileNotFoundError:
        raise
    except OSError as e:
        for file in files.values():
            file.unlink(missing_ok=True)
        raise EdgeclipError(
            folder, f"shard {shard + 1} of {shards} could not be written ({e})", "free some disk and run the same command: it goes on here"
        ) from e


def _note(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard}.json"


def _lock_file(job: _Job, shard: int, shards: int) -> Path:
    return job.partial / "shards" / f"{shard}.lock"


@contextlib.contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock at `path` is ours now; the kernel lets go of it when the process ends, however it ends."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(fd)


def _finished(job: _Job) -> dict[int, dict[str, Any]]:
    return {int(p.stem): disk.read_json(p) for p in (job.partial / "shards").glob("*.json") if p.stem.isdigit()}


def _whole(job: _Job, shard: int, shards: int) -> bool:
    """Whether the shard is there and its files are those that were written."""
    if not _note(job.partial, shard).exists():
        return False
    try:
        disk.verify(job.partial, {"kind": "shard", "files": disk.read_json(_note(job.partial, shard))["files"]})
    except EdgeclipError as e:
        say(f"shard {shard + 1} of {shards} is made anew: {e}")
        _note(job.partial, shard).unlink()
        return False
    return True


# --- the whole


def _finish(job: _Job, description: dict[str, Any], shards: int) -> None:
    notes = _finished(job)
    parts = [notes[i] for i in range(shards)]
    files = {f: digest for p in parts for f, digest in p["files"].items()}
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "teacher": job.teacher.identity,
        "name": job.teacher.name,
        "data": job.data.name,
        "pictures": sum(p["rows"] for p in parts),
        "views": job.spec.count,
        "captions": int(job.captions),
        "skipped": [line for p in parts for line in p["skipped"]],
        "description": description,
        "shards": [{"rows": p["rows"], "bytes": p["bytes"]} for p in parts],
        "files": files | {"class_features.npy": disk.sha256(job.partial / "class_features.npy")},
    }
    disk.write_json(job.partial / disk.MANIFEST, manifest | {"replay": None})
    try:
        found = _replay(job, open_folder(job.partial, job.pictures))
    except EdgeclipError:
        shutil.rmtree(job.partial, ignore_errors=True)
        raise
    disk.write_json(job.partial / disk.MANIFEST, manifest | {"replay": found})
    (job.partial / "description.json").unlink()
    os.rename(job.partial, job.folder)
    for left in ("shards", "start", "finish"):
        path = job.folder / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replay(job: _Job, made: TeacherCache) -> dict[str, Any]:
    """Random stored views through the live teacher again: what a student will see is what the rows were made of."""
    rng = np.random.default_rng(job.seed)
    count = min(REPLAYED, len(made.rows) * job.spec.count)
    drawn = rng.choice(len(made.rows) * job.spec.count, count, replace=False)
    places = [divmod(int(d), job.spec.count) for d in drawn]

    def make(j: int) -> np.ndarray:
        i, view = places[j]
        return replay(open_picture(read(made.pictures[i]), made.pictures[i].key), made.views[i, view], job.teacher.preprocess)

    skipped: list[str] = []
    cosines = []
    batch = _batch_size(job) * job.spec.count
    for index, pixels in track(stream(range(count), make, batch, skipped, job.threads), "replay", math.ceil(count / batch)):
        live = _rows(job, pixels)
        stored = made.rows[np.array([places[j][0] for j in index]), np.array([places[j][1] for j in index])]
        cosines.append((live * stored).sum(axis=1) / np.maximum(np.linalg.norm(live, axis=1) * np.linalg.norm(stored, axis=1), 1e-12))
    lowest = float(np.concatenate(cosines).min()) if cosines else 0.0
    if skipped or lowest < SAME:
        what = f"is unreadable now ({skipped[0]})" if skipped else f"gives another row (cosine {lowest:.4f}, at least {SAME} is needed)"
        raise EdgeclipError(job.data.name, f"a stored view of {count} replayed {what}", "let the data lie still while the cache is built")
    return {"views": count, "cosine_min": round(lowest, 6)}


# --- texts


def caption_features(teacher: Teacher, captions: list[str]) -> np.ndarray:
    """[n, D] float16, unit. A caption that is longer than the text tower's context loses its end, as in CLIP's own training."""
    if teacher.text is None:
        return teacher.encode_text(captions).numpy().astype(np.float16)
    words, length = tokenizer.load(teacher.text.tokenizer, teacher.text.context_length), teacher.text.context_length
    out, place = [], next(teacher.text.module.parameters()).device
    for start in track(range(0, len(captions), 256), "captions", math.ceil(len(captions) / 256)):
        ids = torch.from_numpy(tokenizer.encode(words, captions[start : start + 256], length, cut=True)).to(place)
        out.append(teacher.text.module(ids).cpu().numpy().astype(np.float16))
    return np.concatenate(out)


def class_features(teacher: Teacher, classes: list[str], templates: tuple[str, ...]) -> np.ndarray:
    """[N, D] unit class features: the prompt ensemble of each class name."""
    if not classes:
        return np.zeros((0, teacher.embed_dim), np.float32)
    features = teacher.encode_text(prompts(classes, templates)).numpy()
    return ensemble(features.reshape(len(classes), len(templates), -1))
