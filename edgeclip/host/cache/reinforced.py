"""MobileCLIP's reinforced shards (DataCompDR, DFNDR) as a teacher cache: views, captions and
embeddings of several teachers.

A sample of such a tar, beside the image or in tars of their own:

    <uid>.paug.json       {"param_aug": [[[top, left, height, width], [[operation, magnitude], ...]], ...]}, a view each
    <uid>.syn.json        {"syn_text": [...]}: synthetic captions
    <uid>.npz             image_emb [K, E], text_emb [C, E]: the data's own caption first, then the synthetic ones;
      or <uid>.pth.gz     the same as a torch file of bfloat16. E: the teachers' widths one after the other

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
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeclip import disk
from edgeclip.device.images import MAX_UNREADABLE, ImageRef, refuse_cut
from edgeclip.errors import EdgeclipError
from edgeclip.host.cache.arrays import record
from edgeclip.host.cache.assemble import write_shard
from edgeclip.host.cache.embeddings import JOINS
from edgeclip.host.cache.views import OPERATIONS
from edgeclip.host.data.shards import matching
from edgeclip.host.recipe import Reinforced
from edgeclip.progress import track

MEMBERS = ("paug.json", "syn.json", "npz", "pth.gz")


def shard_files(spec: Reinforced) -> list[Path]:
    return matching(Path(spec.root), spec.shards)


def identity(spec: Reinforced) -> dict[str, Any]:
    shards = shard_files(spec)
    files = [disk.edges(shards[0]), *([p.name, p.stat().st_size] for p in shards)]
    return {"kind": "reinforced", "files": files, "columns": spec.columns, "join": spec.join}


def width(spec: Reinforced) -> int:
    """This teacher's, by the first sample that is whole."""
    for _, members in _samples(shard_files(spec)[0]):
        with contextlib.suppress(KeyError, ValueError):
            return _columns(_arrays(members)["image_emb"], spec).shape[1]
    raise EdgeclipError(
        shard_files(spec)[0], "has no whole reinforced sample", "check the recipe's teacher.shards"
    )


def make(
    spec: Reinforced,
    images: Sequence[ImageRef],
    place_of: dict[str, int],
    captions: bool,
    folder: Path,
    shard: int,
    shards: int,
) -> None:
    """One tar's samples that have an image, as a shard of the cache. What is broken is left out and
    counted.

    Raises `EdgeclipError` for a corrupt tar, a sample that is there twice, and more than 1 % of
    broken samples.
    """
    tar = shard_files(spec)[shard]
    rows, texts, records = (
        list[np.ndarray](),
        list[np.ndarray](),
        list[tuple[int, np.ndarray, np.ndarray]](),
    )
    places, said, skipped = list[int](), list[list[str]](), list[str]()
    seen: set[str] = set()
    for uid, members in track(_samples(tar), f"reinforced shard {shard + 1} of {shards}", 0):
        key = JOINS[spec.join](f"{tar.stem}/{uid}")
        if key in seen:
            raise EdgeclipError(tar, f"has two samples '{key}'", "repair or remove the shard")
        seen.add(key)
        if key not in place_of:
            continue
        try:
            arrays_of = _arrays(members)
            image, view = arrays_of["image_emb"], parameters(members["paug.json"], spec.image_size)
            if not isinstance(synthetic := json.loads(members.get("syn.json", b"{}")), dict):
                raise ValueError("has a syn.json that is no mapping")
            captioned, text = _captions(images[place_of[key]].caption, synthetic, arrays_of)
            if len(view) != len(image):
                raise ValueError(f"{len(view)} views and {len(image)} rows")
            if texts and text is not None and len(text) != len(texts[0]):
                raise ValueError(f"{len(text)} captions, and others have {len(texts[0])}")
            own, of_text = _columns(image, spec), None if text is None else _columns(text, spec)
            if rows and (own.shape != rows[0].shape or view.shape != records[0][2].shape):
                raise ValueError(
                    f"rows {own.shape} of views {view.shape}, and others have {rows[0].shape} of {records[0][2].shape}"
                )
            norm = np.linalg.norm(own, axis=1)
            records.append((place_of[key], norm, view))
            rows.append((own / np.maximum(norm, 1e-12)[:, None]).astype(np.float16))
            if of_text is not None:
                texts.append(
                    (
                        of_text / np.maximum(np.linalg.norm(of_text, axis=1, keepdims=True), 1e-12)
                    ).astype(np.float16)
                )
            places.append(place_of[key])
            said.append(captioned)
        except (KeyError, ValueError, TypeError) as e:
            what = f"has no {e.args[0]}" if isinstance(e, KeyError) else str(e)
            skipped.append(f"{tar}: sample '{uid}' {what}")
    if len(skipped) > MAX_UNREADABLE * len(seen):
        raise EdgeclipError(
            tar,
            f"{len(skipped)} of {len(seen)} samples are broken, more than {MAX_UNREADABLE:.0%} (first: {skipped[0]})",
            "repair the shard",
        )
    if not rows:
        raise EdgeclipError(
            tar,
            "has no sample of any image of the data",
            "check the recipe's teacher.join, or remove the shard",
        )
    if captions and len(texts) != len(rows):
        raise EdgeclipError(
            tar,
            "has no text_emb, and a loss or student.text needs the captions' features",
            "drop what needs them",
        )
    table = np.empty(len(rows), record(*records[0][2].shape))
    table["image"], table["norm"], table["view"] = (
        np.array([r[i] for r in records]) for i in range(3)
    )
    unit = np.stack(rows)
    arrays = {"img_emb": unit[:, 0], "records": table}
    if unit.shape[1] > 1:
        arrays["more_views"] = unit[:, 1:]
    if captions:
        of_captions = np.stack(texts)
        arrays["text_emb"] = of_captions[:, 0]
        if of_captions.shape[1] > 1:
            arrays["more_captions"] = of_captions[:, 1:]
    metadata = {
        "image_path": [images[i].key for i in places],
        "caption": [c[0] for c in said],
        "image": places,
        "more_captions": [c[1:] for c in said],
    }
    write_shard(folder, shard, shards, arrays, metadata, skipped)


def parameters(paug: bytes, size: int) -> np.ndarray:
    """[K, 5 + 2 A] view parameters (`views`) of a sample's param_aug; A operations a view."""
    value = json.loads(paug)["param_aug"]
    views = []
    for (top, left, height, width), operations in (
        json.loads(value) if isinstance(value, str) else value
    ):
        flat = [left, top, width, height, 0]
        for number, magnitude in operations:
            if number not in range(len(OPERATIONS)):
                raise ValueError(f"has operation {number}, and RandAugment has {len(OPERATIONS)}")
            flat += [
                number,
                magnitude / size if OPERATIONS[int(number)].startswith("Translate") else magnitude,
            ]
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
    """(uid, its members) in the tar's order; only members that are a teacher's are read."""
    uid, members = "", dict[str, bytes]()
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                name, _, suffix = member.name.rpartition("/")[2].partition(".")
                if not member.isfile() or suffix not in MEMBERS:
                    continue
                if (
                    name != uid and members
                ):  # WebDataset's rule: a sample's members follow one another
                    yield uid, members
                    members = {}
                uid = name
                if suffix in members:
                    raise EdgeclipError(
                        tar, f"has two members '{member.name}'", "repair or remove the shard"
                    )
                members[suffix] = opened.extractfile(member).read()  # type: ignore[union-attr]  # a file, asked above
                if len(members[suffix]) != member.size:
                    raise tarfile.ReadError(f"'{member.name}' is cut off")
            refuse_cut(opened)
    except (tarfile.TarError, OSError) as e:
        raise EdgeclipError(tar, f"not a readable shard ({e})", "replace or remove it") from None
    if members:
        yield uid, members


def _captions(
    own: str, synthetic: dict[str, list[str]], arrays: dict[str, np.ndarray]
) -> tuple[list[str], np.ndarray | None]:
    """(captions, their features [C, E]; None where there are none): the data's own first, then each
    captioner's by name."""
    lists = {k: v for k, v in sorted(synthetic.items()) if k.startswith("syn_text")}
    everything = [own, *(c for v in lists.values() for c in v)]
    if "text_emb" not in arrays:
        return everything, None
    apart = {k: (said, arrays[f"{k}_emb"]) for k, said in lists.items() if f"{k}_emb" in arrays}
    parts = {"text": ([own] if apart else everything, arrays["text_emb"])} | apart
    for name, (said, rows) in parts.items():
        if len(said) != len(rows):
            raise ValueError(f"{len(said)} captions and {len(rows)} rows ({name})")
    return [c for said, _ in parts.values() for c in said], np.concatenate(
        [rows for _, rows in parts.values()]
    )


def _arrays(members: dict[str, bytes]) -> dict[str, np.ndarray]:
    """image_emb [K, E] and what there is of text_emb [C, E] and the captioners' own, float32;
    nothing is unpickled but tensors.

    Raises KeyError where image_emb is missing, ValueError where the member is damaged.
    """
    name = next((n for n in ("npz", "pth.gz") if n in members), None)
    if name is None:
        raise KeyError("npz or pth.gz")
    try:
        if name == "npz":
            with np.load(io.BytesIO(members[name]), allow_pickle=False) as z:
                found = {k: z[k] for k in z.files}
        else:
            loaded = torch.load(io.BytesIO(gzip.decompress(members[name])), weights_only=True)
            found = {
                k: (v if isinstance(v, torch.Tensor) else torch.stack(list(v))).float().numpy()
                for k, v in loaded.items()
                if len(v)
            }
    except Exception as e:  # for bytes that are not theirs zipfile, zlib, gzip, numpy and torch raise a dozen types
        raise ValueError(
            f"has an unreadable {name} ({' '.join(str(e).split())[:120] or type(e).__name__})"
        ) from None
    wanted = {"image_emb": found["image_emb"]} | {
        k: v for k, v in found.items() if k.endswith("text_emb") or k.startswith("syn_text")
    }
    arrays = {k: np.asarray(v, np.float32) for k, v in wanted.items()}
    if odd := next((k for k, v in arrays.items() if v.ndim != 2), None):
        raise ValueError(f"{odd} is {arrays[odd].shape}, not rows")
    return arrays
