"""MobileCLIP's reinforced shards (DataCompDR, DFNDR) as a teacher cache: views, captions and
embeddings of several teachers.

A sample of such a tar, beside the image or in tars of their own:

    <uid>.paug.json       {"param_aug": [[[top, left, height, width],
                                          [[operation, magnitude], ...]], ...]}, a view each
    <uid>.syn.json        {"syn_text": [...]}: synthetic captions
    <uid>.npz             image_emb [K, E], text_emb [C, E]: the data's own caption first;
      or <uid>.pth.gz     the same as a torch file of bfloat16. E: the teachers' widths together

DFNDR's generator writes each captioner's list and features apart: syn_text_a in the JSON,
syn_text_a_emb beside a text_emb of the data's own caption alone. They are put one after the other
by name; a list without features is left out.

One tar becomes one shard of the cache, for the part of E that is this teacher's. A view is a crop
and then RandAugment's operations, by their numbers in torchvision's order; magnitudes of TranslateX
and TranslateY are pixels of the teacher's input, and kept as fractions of its side. Sources:
MobileCLIP arXiv 2311.17049, the cards of apple/DataCompDR-12M, the generator
apple/ml-mobileclip-dr.
"""

import contextlib
import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from edgeclip import disk
from edgeclip.device import tar_file
from edgeclip.device.finite import fault
from edgeclip.device.images import MAX_UNREADABLE, ImageRef
from edgeclip.disk import Description
from edgeclip.errors import EdgeclipError
from edgeclip.host.cache.arrays import IMAGE, record
from edgeclip.host.cache.assemble import write_shard
from edgeclip.host.cache.embeddings import JOINS
from edgeclip.host.cache.views import OPERATIONS
from edgeclip.host.data.shards import matching
from edgeclip.host.recipe import Reinforced
from edgeclip.progress import track
from edgeclip.text_file.parser import parse_json

MAX_MEMBER = 2**26
"""bytes of a member, and of what it is when decompressed: a thousand times a usual one"""
MEMBERS = ("paug.json", "syn.json", "npz", "pth.gz")


def shard_files(spec: Reinforced) -> list[Path]:
    return matching(Path(spec.root), spec.shards)


def identity(spec: Reinforced) -> Description:
    """Return what decides the rows: the shards by name and size, and how they are read."""
    shards = shard_files(spec)
    files = [disk.edges(shards[0]), *([p.name, p.stat().st_size] for p in shards)]
    return {"kind": "reinforced", "files": files, "columns": spec.columns, "join": spec.join}


def width(spec: Reinforced) -> int:
    """Return the width of this teacher's rows, by the first sample that is whole."""
    first = shard_files(spec)[0]
    for _, members in _samples(first):
        with contextlib.suppress(KeyError, ValueError):
            return _columns(_arrays(members)["image_emb"], spec).shape[1]
    raise EdgeclipError(
        first, "has no whole reinforced sample", "check the recipe's teacher.shards"
    )


class Sample(NamedTuple):
    """What one sample gives an image of the data."""

    place: int
    """of the image in the data"""
    norm: np.ndarray
    """[K]"""
    views: np.ndarray
    """[K, P]"""
    rows: np.ndarray
    """[K, D] float16, unit"""
    captions: list[str]
    texts: np.ndarray | None
    """[C, D] float16, unit; None where the shard has none"""


def make(
    spec: Reinforced,
    images: Sequence[ImageRef],
    place_of: dict[str, int],
    captions: bool,
    folder: Path,
    shard: int,
    shards: int,
) -> None:
    """Make one tar's samples that have an image into a shard of the cache.

    What is broken is left out and counted. Raises `EdgeclipError` for a corrupt tar, a sample that
    is there twice, and more than 1 % of broken samples.
    """
    tar = shard_files(spec)[shard]
    samples: list[Sample] = []
    skipped: list[str] = []
    seen: set[str] = set()
    for uid, members in track(_samples(tar), f"reinforced shard {shard + 1} of {shards}", 0):
        key = JOINS[spec.join](f"{tar.stem}/{uid}")
        if key in seen:
            raise EdgeclipError(tar, f"has two samples '{key}'", "repair or remove the shard")
        seen.add(key)
        place = place_of.get(key)
        if place is None:
            continue
        try:
            sample = _sample(spec, members, place, images[place].caption)
            if samples:
                _refuse_unlike(sample, samples[0])
        except (KeyError, ValueError, TypeError) as e:
            what = f"has no {e.args[0]}" if isinstance(e, KeyError) else str(e)
            skipped.append(f"{tar}: sample '{uid}' {what}")
        else:
            samples.append(sample)
    _check_samples(tar, samples, skipped, len(seen), captions)
    arrays = _stacked(samples, captions)
    metadata = {
        "image_path": [images[s.place].key for s in samples],
        "caption": [s.captions[0] for s in samples],
        IMAGE: [s.place for s in samples],
        "more_captions": [s.captions[1:] for s in samples],
    }
    write_shard(folder, shard, shards, arrays, metadata, skipped)


def _sample(spec: Reinforced, members: dict[str, bytes], place: int, caption: str) -> Sample:
    """Return a sample's part of this teacher; raise KeyError or ValueError where it is broken."""
    arrays = _arrays(members)
    image = arrays["image_emb"]
    views = parameters(members["paug.json"], spec.image_size)
    synthetic = _parsed(members.get("syn.json", b"{}"), "syn.json")
    if not isinstance(synthetic, dict):
        raise ValueError("has a syn.json that is no mapping")
    captions, text = _captions(caption, synthetic, arrays)
    if len(views) != len(image):
        raise ValueError(f"{len(views)} views and {len(image)} rows")
    norm, rows = _unit(_columns(image, spec))
    texts = None
    if text is not None:
        texts = _unit(_columns(text, spec))[1]
    return Sample(place, norm, views, rows, captions, texts)


def _unit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the norms [n], and the rows [n, D] divided by them, float16.

    Raises ValueError for a row that is not finite or all zeros.
    """
    wrong = fault(rows, rows=True)
    if wrong is not None:
        raise ValueError(f"has embeddings of which {wrong}")
    norm = np.linalg.norm(rows, axis=1)
    return norm, (rows / np.maximum(norm, 1e-12)[:, None]).astype(np.float16)


def _refuse_unlike(sample: Sample, first: Sample) -> None:
    """Raise ValueError for a sample of other shapes than the shard's first."""
    if first.texts is not None and sample.texts is not None:
        given, wanted = len(sample.texts), len(first.texts)
        if given != wanted:
            raise ValueError(f"{given} captions, and others have {wanted}")
    if sample.rows.shape != first.rows.shape or sample.views.shape != first.views.shape:
        raise ValueError(
            f"rows {sample.rows.shape} of views {sample.views.shape}, and others have "
            f"{first.rows.shape} of {first.views.shape}"
        )


def _check_samples(
    tar: Path, samples: list[Sample], skipped: list[str], seen: int, captions: bool
) -> None:
    if len(skipped) > MAX_UNREADABLE * seen:
        raise EdgeclipError(
            tar,
            f"{len(skipped)} of {seen} samples are broken, more than {MAX_UNREADABLE:.0%} "
            f"(first: {skipped[0]})",
            "repair the shard",
        )
    if not samples:
        raise EdgeclipError(
            tar,
            "has no sample of any image of the data",
            "check the recipe's teacher.join, or remove the shard",
        )
    if captions and any(s.texts is None for s in samples):
        raise EdgeclipError(
            tar,
            "has no text_emb, and a loss or student.text needs the captions' features",
            "drop what needs them",
        )


def _stacked(samples: list[Sample], captions: bool) -> dict[str, np.ndarray]:
    """Return the shard's arrays, by the folder that each belongs in."""
    table = np.empty(len(samples), record(*samples[0].views.shape))
    table[IMAGE] = [s.place for s in samples]
    table["norm"] = np.stack([s.norm for s in samples])
    table["view"] = np.stack([s.views for s in samples])
    rows = np.stack([s.rows for s in samples])
    arrays = {"img_emb": rows[:, 0], "records": table}
    if rows.shape[1] > 1:
        arrays["more_views"] = rows[:, 1:]
    if captions:
        texts = np.stack([s.texts for s in samples if s.texts is not None])
        arrays["text_emb"] = texts[:, 0]
        if texts.shape[1] > 1:
            arrays["more_captions"] = texts[:, 1:]
    return arrays


def _parsed(text: str | bytes, name: str) -> Any:
    """Return a member's JSON. Raises ValueError where it is none."""
    try:
        return parse_json(text, name, "")
    except EdgeclipError as e:
        raise ValueError(f"has a broken {str(e).rstrip('; ')}") from None


def parameters(paug: bytes, size: int) -> np.ndarray:
    """Return [K, 5 + 2 A] view parameters (`views`) of a sample's param_aug, A operations a
    view."""
    value = _parsed(paug, "paug.json")["param_aug"]
    if isinstance(value, str):
        value = _parsed(value, "param_aug")
    views = []
    for (top, left, height, width), operations in value:
        flat = [left, top, width, height, 0]
        for number, magnitude in operations:
            if number not in range(len(OPERATIONS)):
                raise ValueError(f"has operation {number}, and RandAugment has {len(OPERATIONS)}")
            in_pixels = OPERATIONS[int(number)].startswith("Translate")
            flat += [number, magnitude / size if in_pixels else magnitude]
        views.append(flat)
    return np.array(views, np.float32)


def _columns(rows: np.ndarray, spec: Reinforced) -> np.ndarray:
    first, end = spec.columns or (0, rows.shape[1])
    if not 0 <= first < end <= rows.shape[1]:
        raise EdgeclipError(
            "teacher.columns",
            f"[{first}, {end}] does not lie within the {rows.shape[1]} columns of a row",
            "correct it",
        )
    return rows[:, first:end]


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (uid, its members) in the tar's order; only members that are a teacher's are read."""
    uid = ""
    members: dict[str, bytes] = {}
    with tar_file.open_file(tar) as file:
        for member in tar_file.members(tar):
            name, _, suffix = member.name.rpartition("/")[2].partition(".")
            if suffix not in MEMBERS or member.is_folder:
                continue
            if not member.is_file or member.size > MAX_MEMBER:
                what = f"'{member.name}' is no file, or has more than {MAX_MEMBER:,} bytes"
                raise EdgeclipError(tar, what, "repair or remove the shard")
            # WebDataset's rule: a sample's members follow one another.
            if name != uid and members:
                yield uid, members
                members = {}
            uid = name
            if suffix in members:
                raise EdgeclipError(
                    tar, f"has two members '{member.name}'", "repair or remove the shard"
                )
            file.seek(member.offset)
            members[suffix] = file.read(member.size)
    if members:
        yield uid, members


def _captions(
    own: str, synthetic: dict[str, list[str]], arrays: dict[str, np.ndarray]
) -> tuple[list[str], np.ndarray | None]:
    """Return (captions, their features [C, E]; None where there are none).

    The data's own caption comes first, then each captioner's by name.
    """
    lists = {k: v for k, v in sorted(synthetic.items()) if k.startswith("syn_text")}
    everything = [own]
    for captions in lists.values():
        everything += captions
    if "text_emb" not in arrays:
        return everything, None
    apart = {}
    for name, captions in lists.items():
        if f"{name}_emb" in arrays:
            apart[name] = (captions, arrays[f"{name}_emb"])
    together = [own] if apart else everything
    parts = {"text": (together, arrays["text_emb"]), **apart}
    named: list[str] = []
    for name, (captions, rows) in parts.items():
        if len(captions) != len(rows):
            raise ValueError(f"{len(captions)} captions and {len(rows)} rows ({name})")
        named += captions
    return named, np.concatenate([rows for _, rows in parts.values()])


def _decompressed(content: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        whole = file.read(MAX_MEMBER + 1)
    if len(whole) > MAX_MEMBER:
        raise ValueError(f"more than {MAX_MEMBER:,} bytes when decompressed")
    return whole


def _arrays(members: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Return image_emb [K, E] and what there is of text_emb [C, E] and the captioners' own,
    float32.

    Nothing is unpickled but tensors. Raises KeyError where image_emb is missing, ValueError where
    the member is damaged.
    """
    name = next((n for n in ("npz", "pth.gz") if n in members), None)
    if name is None:
        raise KeyError("npz or pth.gz")
    try:
        if name == "npz":
            found = disk.read_arrays(io.BytesIO(members[name]))
        else:
            loaded = torch.load(io.BytesIO(_decompressed(members[name])), weights_only=True)
            found = {
                k: (v if isinstance(v, torch.Tensor) else torch.stack(list(v))).float().numpy()
                for k, v in loaded.items()
                if len(v)
            }
    except Exception as e:  # zipfile, zlib, gzip, numpy and torch raise a dozen types
        raise ValueError(
            f"has an unreadable {name} ({' '.join(str(e).split())[:120] or type(e).__name__})"
        ) from None
    arrays = {"image_emb": np.asarray(found["image_emb"], np.float32)}
    for key, value in found.items():
        if key.endswith("text_emb") or key.startswith("syn_text"):
            arrays[key] = np.asarray(value, np.float32)
    for key, value in arrays.items():
        if value.ndim != 2:
            raise ValueError(f"{key} is {value.shape}, not rows")
    return arrays
