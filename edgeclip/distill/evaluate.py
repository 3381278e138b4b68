"""Zero-shot accuracy of teacher and student on the same pictures, and what `validate` needs to compare a bundle.

Every figure says what it is: how many pictures, how many classes are active, chance, whether the set is transductive.
The student is scored as it ships (P(u_s), EduAttention in the head where it is kept) and without EduAttention.

    evaluation/pictures.tar          the parity pictures' own bytes, in order
               image_features.npy    [n, D] float32, the fp32 student's unit features of them
               evaluation.json       labels, and each set's name, note, classes and rows
"""

import io
import math
import random
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.data import Dataset, EvaluationSet
from edgeclip.metrics import harmonic_mean, hits
from edgeclip.pictures import Picture, read, refuse_unreadable, stream
from edgeclip.preprocess import Preprocess, normalise, open_picture, to_pixels
from edgeclip.progress import say, track
from edgeclip.students import EduAttentionHead, Student
from edgeclip.teachers import Teacher
from edgeclip.zero_shot import EduAttention, class_scores

MODELS = ("teacher", "student", "student_without_edu_attention", "student_teacher_text", "student_own_text")
"""what is scored; the last two where the student has a text tower of its own"""


@torch.inference_mode()
def image_features(
    module: nn.Module, pictures: list[Picture], preprocess: Preprocess, what: str, device: torch.device, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the readable pictures [n], module's float32 outputs [n, D]) through the one preprocess."""
    skipped: list[str] = []

    def make(i: int) -> np.ndarray:
        return to_pixels(open_picture(read(pictures[i]), f"{pictures[i].path} ({pictures[i].key})"), preprocess)

    module.to(device)
    indices, out = [], []
    batches = stream(range(len(pictures)), make, batch_size, skipped)
    for index, pixels in track(batches, what, math.ceil(len(pictures) / batch_size)):
        x = torch.from_numpy(normalise(pixels, preprocess)).to(device, memory_format=torch.channels_last)
        out.append(module(x).float().cpu().numpy())
        indices.append(index)
    refuse_unreadable(skipped, len(pictures), what)
    for line in skipped:
        say(f"skipped: {line}")
    return np.concatenate(indices), np.concatenate(out)


def _accuracy(features: np.ndarray, labels: np.ndarray, class_features: np.ndarray, head: EduAttention | None) -> dict[str, float]:
    scores = class_scores(features, class_features, head)
    return {"r1": float(hits(scores, labels, 1).mean()), "r5": float(hits(scores, labels, 5).mean())}


def evaluate(
    student: Student,
    head: EduAttentionHead | None,
    keep_head: bool,
    preprocess: Preprocess,
    teacher: Teacher,
    teacher_tower: nn.Module,
    data: Dataset,
    class_features: np.ndarray,
    max_pictures: int,
    folder: Path,
    device: torch.device,
    own_class_features: np.ndarray | None = None,
    baked: Literal["teacher", "student"] = "teacher",
) -> dict[str, Any]:
    """Accuracy of each evaluation set; writes the evaluation folder. class_features: [N, D] over all of data.classes.

    own_class_features: the same of the student's own text tower; the student is then scored with either, and `baked`
    says which of them it ships with.
    """
    edu = head.numpy() if head is not None else None
    sets: list[dict[str, Any]] = []
    parity: list[tuple[EvaluationSet, Picture, np.ndarray]] = []
    for s in data.evaluation:
        kept, features = image_features(student, s.pictures, preprocess, f"student: {s.name}", device)
        parity += [(s, s.pictures[i], f) for i, f in zip(kept, features, strict=True)]
        if not s.headline:
            continue
        active = class_features[s.classes]
        own = active if own_class_features is None else own_class_features[s.classes]
        shipped = own if baked == "student" else active
        labels = np.array([s.classes.index(s.pictures[i].label) for i in kept])
        adapted = nn.Sequential(teacher_tower, _Features(teacher))
        teacher_kept, teacher_features = image_features(
            adapted, s.pictures, teacher.preprocess, f"teacher: {s.name}", device, 8 if device.type == "cpu" else 64
        )
        teacher_labels = np.array([s.classes.index(s.pictures[i].label) for i in teacher_kept])
        sets.append(
            {
                "name": s.name,
                "note": s.note,
                "pictures": len(kept),
                "classes": len(active),
                "chance_r1": 1 / len(active),
                "teacher": _accuracy(teacher_features, teacher_labels, active, None),
                "student": _accuracy(features, labels, shipped, edu if keep_head else None),
                "student_without_edu_attention": _accuracy(features, labels, shipped, None),
            }
        )
        if own_class_features is not None:
            sets[-1]["student_teacher_text"] = _accuracy(features, labels, active, edu if keep_head else None)
            sets[-1]["student_own_text"] = _accuracy(features, labels, own, edu if keep_head else None)
    _write(folder, parity, data, max_pictures)
    result: dict[str, Any] = {"sets": sets}
    scored = {s["name"]: s for s in sets}
    if {"base", "novel"} <= scored.keys():
        models = [m for m in MODELS if m in sets[0]]
        result["harmonic_mean"] = {m: harmonic_mean(scored["base"][m]["r1"], scored["novel"][m]["r1"]) for m in models}
    return result


class _Features(nn.Module):
    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.teacher.features(rows), dim=-1)


def _write(folder: Path, parity: list[tuple[EvaluationSet, Picture, np.ndarray]], data: Dataset, max_pictures: int) -> None:
    if len(parity) > max_pictures:
        keep = sorted(random.Random(0).sample(range(len(parity)), max_pictures))
        parity = [parity[i] for i in keep]
    with disk.new_folder(folder) as temporary:
        with tarfile.open(temporary / "pictures.tar", "w") as tar:
            for i, (_, picture, _) in enumerate(parity):
                content = read(picture)
                member = tarfile.TarInfo(f"{i:06d}{Path(picture.key).suffix or '.jpg'}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        disk.write_array(temporary / "image_features.npy", np.stack([f for _, _, f in parity]))
        sets = []
        for s in data.evaluation:
            rows = [i for i, (own, _, _) in enumerate(parity) if own is s]
            sets.append({"name": s.name, "note": s.note, "rows": rows, "classes": s.classes})
        disk.write_json(temporary / "evaluation.json", {"labels": [p.label for _, p, _ in parity], "sets": sets})
        disk.write_manifest(temporary, "evaluation", {"licence": data.licence, "pictures": len(parity)})
