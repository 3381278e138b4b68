"""`edgeclip evaluate`: what a finished run is worth under a protocol, on its own sets or on others.

    zero_shot              every test image against all classes of its set, each class an ensemble of the set's prompts
    base_to_novel          the first half of the classes and the second, each scored within itself; their harmonic mean
    cross_dataset          zero_shot on several sets, one table, and the average
    domain_generalization  the set of training and its shifts, which have the same class list or a part of it; the
                           average is over the shifts
    retrieval              captions by image and images by caption. Captions of equal text are one text, which
                           belongs to every image that has it; any of a query's own counts as a hit

Each table says of each set how many images and classes it has, what chance would reach, and whether it is
transductive, that is whether the student saw training images of this very set. A set is known by its name: one that
has the name of the recipe's data is taken for it. Protocols that train are recipes (`data.protocol`, `adapt_data`,
`shifts`); nothing is trained here. Source: METHODS 1.4; PromptKD (CVPR 2024), CLIP_benchmark's retrieval.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import nn

from edgeclip import config, disk
from edgeclip.device import metrics
from edgeclip.device.images import ImageRef
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.zero_shot import ensemble, prompts
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, data, distributed, recipe, teachers
from edgeclip.host import student as students
from edgeclip.host.adapt import promptsrc
from edgeclip.host.adapt.residual_head import adapted
from edgeclip.host.cache import CACHE
from edgeclip.host.data import Dataset
from edgeclip.host.evaluation.scores import (
    Answers,
    image_features,
    mean_over,
    note,
    score,
    teacher_features,
)
from edgeclip.host.recipe import Data, Recipe
from edgeclip.host.student import EduAttentionHead, Student
from edgeclip.host.teachers import Teacher, TextTower
from edgeclip.progress import say


class Run(NamedTuple):
    """A finished run, ready to answer."""

    folder: Path
    asked: Recipe
    student: Student
    head: EduAttentionHead | None
    text: TextTower | None
    """the student's own"""
    preprocess: Preprocess
    description: dict[str, Any]
    teacher: Teacher | None
    teacher_tower: nn.Module | None
    teacher_missing: str
    """why there is no teacher; empty: there is"""
    device: torch.device


class TextSide(NamedTuple):
    what: str
    encode: Callable[[list[str]], np.ndarray]
    """texts to unit features [n, D]"""


def evaluate(folder: Path, protocol: str, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """The record of one protocol, also written to RUN/reports/evaluate-<protocol>-<sets>.json.

    given: sets by NAME=DIR, folder (CLIP_benchmark's layout) or YAML file (one `data` block); none: the run's own.
    Raises `EdgeclipError` where a set lacks what the protocol needs.
    """
    disk.read_manifest(folder, "run")
    asked = recipe.of_run(folder)
    specs = choose_sets(asked, protocol, given)
    loaded = [(spec, data.load(_for_protocol(spec, protocol), CACHE)) for spec in specs]
    if protocol == "domain_generalization":
        loaded = [_with_shifts(asked, loaded)]
    if isinstance(
        asked.adapt, recipe.Prompts
    ):  # the learned context takes the place of the set's templates
        loaded = [
            (spec, dataset._replace(templates=promptsrc.TEMPLATES)) for spec, dataset in loaded
        ]
    for spec, dataset in loaded:
        _check(spec, dataset, protocol)
    run = _open(folder, asked)
    record: dict[str, Any] = {
        "run": str(folder),
        "protocol": protocol,
        "student": disk.sha256(folder / "student" / disk.MANIFEST),
    }
    record |= {
        "teacher": run.teacher.name if run.teacher else None,
        "teacher_missing": run.teacher_missing or None,
    }
    record |= {
        "edu_attention": None
        if run.head is None
        else {"alpha": run.head.alpha.item(), "kept": run.head.spec.keep}
    }
    record |= PROTOCOLS[protocol](run, loaded)
    name = re.sub(r"[^\w+.-]", "_", "+".join(dict.fromkeys(s["of"] for s in record["sets"])))
    path = folder / "reports" / f"evaluate-{protocol}-{name}.json"
    record["report"] = str(path)
    disk.write_json(path, record)
    return record


# --- which sets


def choose_sets(asked: Recipe, protocol: str, given: tuple[str, ...]) -> list[Data]:
    """The sets that `--data` names, or the run's own."""
    own = asked.evaluation_data or asked.data
    if not given:
        return [own, *(asked.shifts if protocol == "domain_generalization" else ())]
    known = {d.name: d for d in (*recipe.data_sets(asked).values(), own)}
    found: list[Data] = []
    for value in given:
        name, equals, root = value.partition("=")
        if value.endswith((".yaml", ".yml")):
            found.append(config.load(Path(value), recipe.DataFile).data)
            continue
        if not equals:
            name, root = Path(value).resolve().name, value
        spec = known.get(name)
        if isinstance(spec, recipe.OpenMoji):
            raise EdgeclipError(
                f"--data {value}",
                "OpenMoji comes from pip and lies in no folder",
                "leave --data out, or give a YAML file",
            )
        if spec is None:
            classes = "classnames.txt" if (Path(root) / "classnames.txt").exists() else None
            spec = recipe.WebDataset(name=name, root=root, classes=classes)
        found.append(msgspec.structs.replace(spec, root=root))
    return found


def _for_protocol(spec: Data, protocol: str) -> Data:
    if isinstance(spec, recipe.OpenMoji):
        if protocol == "base_to_novel":
            raise EdgeclipError(
                "openmoji",
                "has a split of its own (held-out, unlabeled and base concepts)",
                "use --protocol zero_shot",
            )
        return spec
    if isinstance(spec, recipe.Csv):
        raise EdgeclipError(
            f"--data {spec.name}",
            "is of kind csv, which nothing is evaluated on",
            "name a set with a test part",
        )
    spec = msgspec.structs.replace(
        spec, protocol="base_to_novel" if protocol == "base_to_novel" else "zero_shot"
    )
    return (
        msgspec.structs.replace(spec, train=None) if isinstance(spec, recipe.WebDataset) else spec
    )


def _with_shifts(asked: Recipe, loaded: list[tuple[Data, Dataset]]) -> tuple[Data, Dataset]:
    """The run's own evaluation data, with the other sets beside it as its shifts."""
    spec = asked.evaluation_data or asked.data
    dataset = next((found for d, found in loaded if d.name == spec.name), None) or data.load(
        _for_protocol(spec, "zero_shot"), CACHE
    )
    for other in (found for d, found in loaded if d.name != spec.name):
        dataset = dataset._replace(evaluation=dataset.evaluation + data.shift_sets(dataset, other))
    if not any(s.shift for s in dataset.evaluation):
        raise EdgeclipError(
            dataset.name, "has no shift", "name one with --data, or in the recipe's shifts"
        )
    return spec, dataset


def _check(spec: Data, dataset: Dataset, protocol: str) -> None:
    images = [p for s in dataset.evaluation if s.headline for p in s.images]
    if not images:
        raise EdgeclipError(f"--data {spec.name}", "has no test images", "give it a test part")
    if protocol == "retrieval":
        if missing := [p for p in images if not p.caption]:
            raise EdgeclipError(
                f"--data {spec.name}",
                f"retrieval needs captions, and image '{missing[0].key}' of {missing[0].path} has none",
                "add .txt files",
            )
    elif not dataset.classes:
        raise EdgeclipError(
            f"--data {spec.name}",
            f"has no class list, which {protocol} needs",
            "add classnames.txt, or use --protocol retrieval",
        )


# --- the run


def _open(folder: Path, asked: Recipe) -> Run:
    student, head, preprocess, description = students.load(folder / "student")
    text = students.load_text(folder / "student")
    teacher, tower, missing = None, None, ""
    try:
        teacher = teachers.load(asked.teacher)
    except (
        EdgeclipError
    ) as e:  # its weights need not be at hand any more: its column is then not measured
        missing = str(e)
        say(f"teacher: {missing}")
    if teacher is not None:
        if isinstance(asked.adapt, recipe.Prompts):
            teacher = promptsrc.adapted(teacher, asked.adapt, folder / "teacher")
        elif asked.adapt:
            teacher = adapted(teacher, asked.adapt, folder / "teacher")
        tower = teachers.folded(teacher) if not asked.fuse else None
        missing = "several teachers are fused, and only distill scores them" if asked.fuse else ""
    return Run(
        folder,
        asked,
        student,
        head,
        text,
        preprocess,
        description,
        teacher,
        tower,
        missing,
        distributed.pick_device(asked.train.device),
    )


def text_side(run: Run) -> TextSide:
    """What encodes new words for the student, as in its bundle: its own text tower where it has one, else the teacher's."""
    if run.text is not None:
        text = run.text
        return TextSide(
            "the student's own text tower",
            lambda texts: students.text_features(text, texts).numpy(),
        )
    teacher = run.teacher
    if teacher is None:
        raise EdgeclipError(
            "evaluate",
            f"texts need the teacher's text encoder, and there is none ({run.teacher_missing})",
            "get the teacher's weights",
        )
    return TextSide(
        f"the text encoder of {teacher.name}", lambda texts: teacher.encode_text(texts).numpy()
    )


def _class_features(run: Run, dataset: Dataset) -> tuple[str, np.ndarray, np.ndarray | None]:
    """(what they are, the student's class features [N, D], the teacher's or None)."""
    if (run.description["labels"], run.description["templates"]) == (
        dataset.classes,
        list(dataset.templates),
    ):
        own = np.load(run.folder / "student" / "class_features.npy")
        if run.asked.student.class_features == "teacher":
            return (
                "the class features that the run keeps, its teacher's",
                own,
                own if run.teacher else None,
            )
        theirs = (
            cache.class_features(run.teacher, dataset.classes, dataset.templates)
            if run.teacher
            else None
        )
        return "the class features that the run keeps, its own text tower's", own, theirs
    text = text_side(run)
    if run.teacher:
        teachers.check_class_names(run.teacher, dataset.classes, dataset.templates)
    features = text.encode(prompts(dataset.classes, dataset.templates)).reshape(
        len(dataset.classes), len(dataset.templates), -1
    )
    return (
        text.what,
        ensemble(features),
        cache.class_features(run.teacher, dataset.classes, dataset.templates)
        if run.teacher
        else None,
    )


def _images(
    run: Run, images: list[ImageRef], what: str
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray] | None]:
    """(kept, features) of the student and of the teacher."""
    of_student = image_features(run.student, images, run.preprocess, f"student: {what}", run.device)
    if run.teacher is None or run.teacher_tower is None:
        return of_student, None
    return of_student, teacher_features(
        [(run.teacher, run.teacher_tower)], None, images, what, run.device
    )


# --- the protocols: sets to a record


def _zero_shot(run: Run, loaded: list[tuple[Data, Dataset]]) -> dict[str, Any]:
    head = run.head.numpy() if run.head is not None else None
    rows, texts = [], []
    for spec, dataset in loaded:
        what, for_student, for_teacher = _class_features(run, dataset)
        texts.append(what)
        for s in (s for s in dataset.evaluation if s.headline):
            of_student, of_teacher = _images(run, s.images, s.name)
            teacher = (
                None
                if of_teacher is None or for_teacher is None
                else Answers(*of_teacher, for_teacher)
            )
            transductive, said = note(run.asked, spec, s)
            row = score(
                s._replace(note=said),
                Answers(*of_student, for_student),
                teacher,
                head,
                bool(run.head and run.head.spec.keep),
            )
            rows.append(
                row
                | {
                    "of": s.name if s.shift else spec.name,
                    "transductive": transductive,
                    "shift": s.shift,
                    "templates": len(dataset.templates),
                }
            )
    return {"sets": rows, "text_side": "; ".join(dict.fromkeys(texts))}


def _base_to_novel(run: Run, loaded: list[tuple[Data, Dataset]]) -> dict[str, Any]:
    if len(loaded) > 1:
        raise EdgeclipError(
            "base_to_novel", f"takes one set, not {len(loaded)}", "call it once for each"
        )
    record = _zero_shot(run, loaded)
    return record | {
        "harmonic_mean": mean_over(record["sets"], lambda r1: metrics.harmonic_mean(*r1))
    }


def _cross_dataset(run: Run, loaded: list[tuple[Data, Dataset]]) -> dict[str, Any]:
    record = _zero_shot(run, loaded)
    return record | {"average": mean_over(record["sets"], lambda r1: float(np.mean(r1)))}


def _domain_generalization(run: Run, loaded: list[tuple[Data, Dataset]]) -> dict[str, Any]:
    record = _zero_shot(run, loaded)
    return record | {
        "average": mean_over(
            [s for s in record["sets"] if s["shift"]], lambda r1: float(np.mean(r1))
        )
    }


def _retrieval(run: Run, loaded: list[tuple[Data, Dataset]]) -> dict[str, Any]:
    text, rows = text_side(run), []
    for spec, dataset in loaded:
        sets = [s for s in dataset.evaluation if s.headline]
        images = [p for s in sets for p in s.images]
        position = {text: i for i, text in enumerate(dict.fromkeys(p.caption for p in images))}
        texts = list(position)
        of_student, of_teacher = _images(run, images, spec.name)

        def recall(
            found: tuple[np.ndarray, np.ndarray], features: np.ndarray
        ) -> dict[str, dict[str, float]]:
            kept = [position[images[i].caption] for i in found[0]]  # noqa: B023  (called in this turn)
            present = sorted(set(kept))  # a text whose every image is unreadable is no query
            return metrics.recall_both_ways(
                found[1], features[present], np.array(kept), np.array(present)
            )

        transductive, said = note(run.asked, spec, sets[0])
        rows.append(
            {
                "name": f"{spec.name} test",
                "of": spec.name,
                "note": f"{said}; {len(texts)} different captions, each belonging to every image that has it; no class list, so no EduAttention",
                "transductive": transductive,
                "images": len(of_student[0]),
                "texts": len(texts),
                "student": recall(of_student, text.encode(texts)),
                "teacher": recall(of_teacher, run.teacher.encode_text(texts).numpy())
                if of_teacher and run.teacher
                else None,
            }
        )
    return {"sets": rows, "text_side": text.what}


PROTOCOLS: dict[str, Callable[[Run, list[tuple[Data, Dataset]]], dict[str, Any]]] = {
    "zero_shot": _zero_shot,
    "base_to_novel": _base_to_novel,
    "cross_dataset": _cross_dataset,
    "domain_generalization": _domain_generalization,
    "retrieval": _retrieval,
}
