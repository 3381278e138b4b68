"""Zero-shot accuracy of teacher and student on the same images, and what `validate` needs to compare a bundle.

Every figure says what it is: how many images, how many classes are active, chance, whether the set is transductive.
The student is scored as it ships (P(u_s), EduAttention in the head where it is kept), with and without EduAttention,
and with EduAttention over all classes where fewer are active (A11: it attended over all of them in training).

    evaluation/images.tar          the parity images' own bytes, in order
               image_features.npy    [n, D] float32, the fp32 student's unit features of them
               evaluation.json       labels, each set's name, note, classes and rows, sha256 of every image that was held out
"""

import io
import math
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device.images import ImageRef, digest, read, refuse_unreadable, stream
from edgeclip.device.metrics import harmonic_mean, hits
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.device.zero_shot import EduAttention, class_scores
from edgeclip.host import recipe as R
from edgeclip.host.data import Dataset, EvaluationSet
from edgeclip.host.student import EduAttentionHead, Student
from edgeclip.host.teachers import Teacher
from edgeclip.progress import say, track
from edgeclip.reports.models import MODELS


@torch.inference_mode()
def image_features(
    module: nn.Module,
    images: list[ImageRef],
    preprocess: Preprocess,
    what: str,
    device: torch.device,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the readable images [n], module's float32 outputs [n, D]) through the one preprocess."""
    skipped: list[str] = []

    def make(i: int) -> np.ndarray:
        return to_pixels(
            open_image(read(images[i]), f"{images[i].path} ({images[i].key})"), preprocess
        )

    module.to(device)
    indices, out = [], []
    batches = stream(range(len(images)), make, batch_size, skipped)
    for index, pixels in track(batches, what, math.ceil(len(images) / batch_size)):
        x = torch.from_numpy(normalize(pixels, preprocess)).to(
            device, memory_format=torch.channels_last
        )
        out.append(module(x).float().cpu().numpy())
        indices.append(index)
    refuse_unreadable(skipped, len(images), what)
    for line in skipped:
        say(f"skipped: {line}")
    return np.concatenate(indices), np.concatenate(out)


def teacher_features(
    teachers: list[tuple[Teacher, nn.Module]],
    fusion: nn.Module | None,
    images: list[ImageRef],
    what: str,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """`image_features` of a teacher, adapted where it is, beside its own folded tower; or of several that `fusion` makes one."""
    kept, features = np.empty(0, int), list[np.ndarray]()
    for i, (teacher, tower) in enumerate(teachers, start=1):
        said = f"teacher{f' {i}' if fusion else ''}: {what}"
        kept, own = image_features(
            nn.Sequential(tower, _Features(teacher)),
            images,
            teacher.preprocess,
            said,
            device,
            8 if device.type == "cpu" else 64,
        )
        features.append(own)  # an image that is readable is so for all of them
    if fusion is None:
        return kept, features[0]
    with torch.inference_mode():
        return kept, F.normalize(
            fusion.cpu()([torch.from_numpy(f) for f in features]), dim=-1
        ).numpy()


def note(asked: R.Recipe, spec: R.Data, s: EvaluationSet) -> tuple[bool, str]:
    """(transductive?, what to know of a set's figure): which of its images and labels the run was trained on."""
    if isinstance(spec, R.OpenMoji) and isinstance(asked.data, R.OpenMoji):
        return s.note.startswith("transductive"), s.note
    stage_1 = (asked.adapt_data or asked.data) if asked.adapt else None
    labeled = (
        stage_1 is not None
        and stage_1.name == spec.name
        and not (s.name == "novel" and getattr(stage_1, "protocol", "") == "base_to_novel")
    )
    labels = (
        "the teacher was adapted on labels of its training images"
        if labeled
        else "the teacher was adapted on no label of it"
    )
    if (
        stage_1 is not None
        and stage_1.name == spec.name
        and getattr(asked.adapt, "self_training", None)
    ):
        labels += ", and on its training images without labels"
    if s.shift:
        return False, "shift; not transductive"
    if spec.name == asked.data.name:
        as_captions = asked.losses.captions == "classes" and asked.adapt and not asked.adapt_data
        labels_used = (
            asked.losses.cross_entropy
            or asked.losses.prototype
            or as_captions
            or (asked.fuse and asked.fuse.labels)
        )
        own = "with the labels that there are" if labels_used else "without labels"
        return True, f"transductive: the student saw training images of this set {own}; {labels}"
    return False, f"not transductive: the student saw no image of this set; {labels}"


class Answers(NamedTuple):
    """What one model says of the images of a set."""

    kept: np.ndarray
    """indices of the readable ones [n]"""
    features: np.ndarray
    """[n, D], unit"""
    class_features: np.ndarray
    """[N, D], unit, over all classes of the data set"""


def score(
    s: EvaluationSet,
    student: Answers,
    teacher: Answers | None,
    head: EduAttention | None,
    keep_head: bool,
) -> dict[str, Any]:
    """One set of a table. `student` is what ships; a reading that would only repeat it is None (a teacher: not at hand)."""

    def accuracy(
        answers: Answers, head: EduAttention | None, attended: np.ndarray | None = None
    ) -> dict[str, float]:
        labels = np.array([s.classes.index(s.images[i].label) for i in answers.kept])
        scores = class_scores(answers.features, answers.class_features[s.classes], head, attended)
        return {
            "top1": float(hits(scores, labels, 1).mean()),
            "top5": float(hits(scores, labels, 5).mean()),
        }

    some = head is not None and len(s.classes) < len(student.class_features)
    return {
        "name": s.name,
        "note": s.note,
        "images": len(student.kept),
        "classes": len(s.classes),
        "chance_top1": 1 / len(s.classes),
        "teacher": accuracy(teacher, None) if teacher else None,
        "student": accuracy(student, head if keep_head else None),
        "student_with_edu_attention": accuracy(student, head) if head and not keep_head else None,
        "student_without_edu_attention": accuracy(student, None),
        "student_attending_all_classes": accuracy(student, head, student.class_features)
        if some
        else None,
    }


def mean_over(sets: list[dict[str, Any]], mean: Callable[[list[float]], float]) -> dict[str, float]:
    """Of each model that all `sets` have: one number of its R@1."""
    return {
        m: mean([s[m]["top1"] for s in sets])
        for m in MODELS
        if sets and all(s.get(m) for s in sets)
    }


def evaluate(
    student: Student,
    head: EduAttentionHead | None,
    preprocess: Preprocess,
    of_teacher: Callable[[list[ImageRef], str], tuple[np.ndarray, np.ndarray]] | None,
    data: Dataset,
    class_features: np.ndarray,
    max_images: int,
    folder: Path,
    device: torch.device,
    own_class_features: np.ndarray | None = None,
    baked: Literal["teacher", "student"] = "teacher",
) -> dict[str, Any]:
    """Accuracy of each evaluation set; writes the evaluation folder. class_features: [N, D] over all of data.classes.

    of_teacher: images, and their name for the progress line, to what `teacher_features` gives; None: no teacher is at hand.
    own_class_features: the same of the student's own text tower; the student is then scored with either, and `baked`
    says which of them it ships with.
    """
    edu, keep_head = (head.numpy(), head.spec.keep) if head is not None else (None, False)
    either = (
        {}
        if own_class_features is None
        else {"student_teacher_text": class_features, "student_own_text": own_class_features}
    )
    shipped = either["student_own_text"] if baked == "student" else class_features
    sets: list[dict[str, Any]] = []
    parity: list[tuple[EvaluationSet, ImageRef, np.ndarray]] = []
    for s in data.evaluation:
        kept, features = image_features(student, s.images, preprocess, f"student: {s.name}", device)
        parity += [(s, s.images[i], f) for i, f in zip(kept, features, strict=True)]
        if not s.headline:
            continue
        theirs = Answers(*of_teacher(s.images, s.name), class_features) if of_teacher else None
        row = score(s, Answers(kept, features, shipped), theirs, edu, keep_head)
        row |= {
            m: score(s, Answers(kept, features, w), None, edu, keep_head)["student"]
            for m, w in either.items()
        }
        sets.append(row)
    _write(folder, parity, data, max_images)
    result: dict[str, Any] = {"sets": sets}
    scored = {s["name"]: s for s in sets}
    if {"base", "novel"} <= scored.keys():
        result["harmonic_mean"] = mean_over(
            [scored["base"], scored["novel"]], lambda r1: harmonic_mean(*r1)
        )
    return result


class _Features(nn.Module):
    def __init__(self, teacher: Teacher):
        super().__init__()
        self.features = teacher.features  # a head is a module, and then goes where this one goes

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.features(rows), dim=-1)


def _write(
    folder: Path,
    parity: list[tuple[EvaluationSet, ImageRef, np.ndarray]],
    data: Dataset,
    max_images: int,
) -> None:
    held_out = sorted({digest(p) for s, p, _ in parity if not s.seen})
    if len(parity) > max_images:
        keep = sorted(random.Random(0).sample(range(len(parity)), max_images))
        parity = [parity[i] for i in keep]
    with disk.new_folder(folder) as temporary:
        with tarfile.open(temporary / "images.tar", "w") as tar:
            for i, (_, image, _) in enumerate(parity):
                content = read(image)
                member = tarfile.TarInfo(f"{i:06d}{Path(image.key).suffix or '.jpg'}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        disk.write_array(temporary / "image_features.npy", np.stack([f for _, _, f in parity]))
        sets = []
        for s in data.evaluation:
            rows = [i for i, (own, _, _) in enumerate(parity) if own is s]
            sets.append(
                {"name": s.name, "note": s.note, "rows": rows, "classes": s.classes, "seen": s.seen}
            )
        record = {
            "labels": [p.label for _, p, _ in parity],
            "class_names": data.classes,
            "sets": sets,
            "held_out": held_out,
        }
        disk.write_json(temporary / "evaluation.json", record)
        disk.write_manifest(
            temporary, "evaluation", {"license": data.license, "images": len(parity)}
        )
