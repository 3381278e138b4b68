"""The teacher cache: what the teacher says of K reproducible views of every picture and of every text, once.

CLIP-Embed-KD's idea with MobileCLIP's views: an epoch of distillation then costs what the student alone costs. A view
is its explicit parameters (crop box in source pixels, flip), not a seed, so that a student of another input size can
replay it anywhere. Rows are the frozen tower's, as float16; an adapted teacher's head is applied to them on the fly.

    cache/<fingerprint>/rows.npy              [n, K, R] float16
                        views.npy             [n, K, 5] float32: left, top, width, height in pixels, flip 0 or 1
                        class_features.npy    [N, D] float32, unit
                        caption_features.npy  [n, D] float16, unit; where a loss needs captions
                        keys.json             the n pictures' keys; those that could not be read are not among them

The fingerprint knows a picture by its key and size, not by its bytes: who repaints a file at equal size deletes the cache.
"""

import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import nn

from edgeclip import disk, tokenizer
from edgeclip.data import Dataset
from edgeclip.errors import EdgeclipError
from edgeclip.pictures import Picture, read, refuse_unreadable, stream
from edgeclip.preprocess import FILTERS, Preprocess, normalise, open_picture
from edgeclip.progress import say, track
from edgeclip.recipe import Views
from edgeclip.teachers import Teacher
from edgeclip.zero_shot import ensemble, prompts


class TeacherCache(NamedTuple):
    folder: Path
    manifest: dict[str, Any]
    pictures: list[Picture]
    rows: np.ndarray
    views: np.ndarray
    class_features: np.ndarray
    caption_features: np.ndarray | None


def draw_views(width: int, height: int, spec: Views, rng: random.Random) -> np.ndarray:
    """[K, 5] view parameters for a picture of width x height pixels: the centre square, then random resized crops."""
    side = min(width, height)
    views = [[(width - side) / 2, (height - side) / 2, side, side, 0]]
    for _ in range(spec.count - 1):
        for _attempt in range(10):
            area = width * height * rng.uniform(*spec.scale)
            ratio = math.exp(rng.uniform(math.log(spec.ratio[0]), math.log(spec.ratio[1])))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                break
        else:
            w = h = side
        views.append([rng.uniform(0, width - w), rng.uniform(0, height - h), w, h, rng.random() < spec.flip])
    return np.array(views, np.float32)


def replay(image: Image.Image, view: np.ndarray, spec: Preprocess) -> np.ndarray:
    """uint8 [H, W, 3]: one view of a picture at an encoder's size."""
    left, top, width, height, flip = (float(v) for v in view)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    pixels = np.asarray(image.resize((spec.size, spec.size), FILTERS[spec.interpolation], box=box))
    return pixels[:, ::-1] if flip else pixels


def build(
    cache: Path, teacher: Teacher, tower: nn.Module, data: Dataset, spec: Views, seed: int, *, captions: bool, device: torch.device, threads: int
) -> TeacherCache:
    """The cache for these ingredients: the finished one where it exists, else made now. `tower` is the teacher's, folded.

    Raises `EdgeclipError` when more than 1 % of the pictures are unreadable.
    """
    description = {
        "teacher": teacher.identity,
        "preprocess": msgspec.to_builtins(teacher.preprocess),
        "views": msgspec.to_builtins(spec),
        "seed": seed,
        "texts": [data.classes, data.templates, [p.caption for p in data.train] if captions else None],
        "pictures": [[p.key, p.size if p.size >= 0 else Path(p.path).stat().st_size] for p in data.train],
    }
    folder = cache / disk.fingerprint(description)[:16]
    if not (folder / disk.MANIFEST).exists():
        _build(folder, teacher, tower, data, spec, seed, captions, device, threads)
    manifest = disk.read_manifest(folder, "teacher cache")
    kept = set(disk.read_json(folder / "keys.json"))
    return TeacherCache(
        folder=folder,
        manifest=manifest,
        pictures=[p for p in data.train if p.key in kept],
        rows=np.load(folder / "rows.npy", mmap_mode="r"),
        views=np.load(folder / "views.npy"),
        class_features=np.load(folder / "class_features.npy"),
        caption_features=np.load(folder / "caption_features.npy", mmap_mode="r") if captions else None,
    )


@torch.inference_mode()
def _build(folder: Path, teacher: Teacher, tower: nn.Module, data: Dataset, spec: Views, seed: int, captions: bool, device: torch.device, threads: int) -> None:
    pictures, skipped = data.train, list[str]()
    if not pictures:
        raise EdgeclipError(data.name, "has no pictures to train on", "check its folder and globs")
    views = np.zeros((len(pictures), spec.count, 5), np.float32)

    def make(i: int) -> np.ndarray:
        image = open_picture(read(pictures[i]), f"{pictures[i].path} ({pictures[i].key})")
        views[i] = draw_views(*image.size, spec, random.Random(f"{seed} {pictures[i].key}"))
        return np.stack([replay(image, v, teacher.preprocess) for v in views[i]])

    # Texts first: they take minutes, and a class name that does not fit is better known before the hours of the pictures.
    of_classes = class_features(teacher, data.classes, data.templates)
    of_captions = caption_features(teacher, [p.caption for p in pictures]) if captions else None
    tower.to(device)
    rows, kept = [], []
    batch_size = max(1, (8 if device.type == "cpu" else 256) // spec.count)  # a CPU's caches hold a few pictures
    batches = stream(range(len(pictures)), make, batch_size, skipped, threads)
    for indices, pixels in track(batches, f"teacher cache ({spec.count} views)", math.ceil(len(pictures) / batch_size)):
        x = torch.from_numpy(normalise(pixels.reshape(-1, *pixels.shape[2:]), teacher.preprocess)).to(device, memory_format=torch.channels_last)
        rows.append(tower(x).float().cpu().numpy().reshape(len(indices), spec.count, -1).astype(np.float16))
        kept += indices.tolist()
    refuse_unreadable(skipped, len(pictures), data.name)
    for line in skipped:
        say(f"skipped: {line}")

    with disk.new_folder(folder) as temporary:
        disk.write_array(temporary / "rows.npy", np.concatenate(rows))
        disk.write_array(temporary / "views.npy", views[kept])
        disk.write_array(temporary / "class_features.npy", of_classes)
        if of_captions is not None:
            disk.write_array(temporary / "caption_features.npy", of_captions[kept])
        disk.write_json(temporary / "keys.json", [pictures[i].key for i in kept])
        disk.write_manifest(temporary, "teacher cache", {"teacher": teacher.identity, "pictures": len(kept), "views": spec.count, "skipped": skipped})


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
