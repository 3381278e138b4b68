"""ComKD stage 2: the student is built, trained and written; after it, if asked, its int8 copy."""

import shutil
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from edgeclip import disk
from edgeclip.device.records import to_json
from edgeclip.disk import Json
from edgeclip.host import distributed, recipe
from edgeclip.host import student as students
from edgeclip.host.distill import calibration, qat
from edgeclip.host.distill.log import Log
from edgeclip.host.distill.prepare import Inputs
from edgeclip.host.distill.targets import Lesson
from edgeclip.host.distill.text import texts
from edgeclip.host.distill.train import train
from edgeclip.host.distill.training import Learner, Output
from edgeclip.host.recipe import Recipe
from edgeclip.host.teachers import TextTower
from edgeclip.progress import Clock


class NewStudent(NamedTuple):
    """A student that has not learned yet, and what its folder will say of it."""

    learner: Learner
    text: TextTower | None
    """the student's own; None: it has none"""
    description: Json
    """student.json without the log"""


def new_student(inputs: Inputs, lesson: Lesson) -> NewStudent:
    """Return the student as the recipe describes it; this needs the first teacher's text side.

    Raises `EdgeclipError` for a text that is longer than the student's context.
    """
    spec = inputs.recipe.student
    embed_dim = lesson.teacher.embed_dim
    torch.manual_seed(inputs.recipe.seed)
    student, preprocess = students.build(spec, embed_dim)
    preprocess = inputs.recipe.preprocess.on(preprocess)
    edu = inputs.recipe.losses.edu_attention
    head = None
    if edu is not None:
        generator = torch.Generator().manual_seed(inputs.recipe.seed)
        head = students.EduAttentionHead(embed_dim, edu, generator)
    text = None
    read = None
    if spec.text is not None:
        text = students.build_text(spec.text, embed_dim)
        dataset = lesson.dataset
        classes = [dataset.classes[i] for i in dataset.train_classes]
        read = texts(text, lesson.teacher, lesson.cache, classes, dataset.templates)
    description = {
        "architecture": msgspec.to_builtins(students.resolved(spec)),
        "assumed": students.assumed_of(spec),
        "embed_dim": embed_dim,
        "edu_attention": msgspec.to_builtins(edu),
        "preprocess": msgspec.to_builtins(preprocess),
        "logit_scale": lesson.teacher.logit_scale,
        "labels": lesson.dataset.classes,
        "templates": list(lesson.dataset.templates),
        "cleaning": to_json(text.cleaning) if text is not None else None,
        "licenses": _licenses(inputs.recipe, lesson),
        "parents": {
            "recipe": disk.fingerprint(recipe.description(inputs.recipe)),
            "teacher_cache": disk.sha256(lesson.cache.folder / disk.MANIFEST),
        },
    }
    return NewStudent(Learner(student, head, preprocess, read), text, description)


def stage2(inputs: Inputs, lesson: Lesson, new: NewStudent, run: Path, clock: Clock) -> None:
    """Train the student and write RUN/student and, for an int8 target, RUN/quantized.

    Raises `Interrupted` after a signal, when the state is saved.
    """
    asked = inputs.recipe
    output = Output(
        keep=lambda log: _save(run / "student.partial", inputs, lesson, new, log),
        checkpoints=run / "checkpoint",
    )
    if asked.train.tensorboard:
        output = output._replace(board=run / "tensorboard")
    log = train(new.learner, lesson, asked, inputs.device, clock, output)
    if asked.qat and not (run / "quantized" / disk.MANIFEST).exists():
        own = Output(checkpoints=run / "checkpoint_quantized")

        def again(copy: Learner, recipe: Recipe) -> Log:
            return train(copy, lesson, recipe, inputs.device, clock, own)

        parents = new.description["parents"]
        qat.after_stage_2(asked, lesson.cache, new.learner, run / "quantized", parents, again)
    if not distributed.rank():
        _save(run / "student", inputs, lesson, new, log, calibrate=True)


def remove_interim(run: Path) -> None:
    """Remove what only a run needs that has no student yet."""
    for name in ("student.partial", "checkpoint", "checkpoint_quantized"):
        shutil.rmtree(run / name, ignore_errors=True)


def _save(
    folder: Path,
    inputs: Inputs,
    lesson: Lesson,
    new: NewStudent,
    log: Log,
    calibrate: bool = False,
) -> None:
    """Write the student; calibrate: with its class offset, which is for the last time alone."""
    class_features = lesson.cache.class_features
    if new.text is not None and inputs.recipe.student.class_features == "student":
        dataset = lesson.dataset
        class_features = students.class_features(new.text, dataset.classes, dataset.templates)
    description = new.description | {"log": log}
    learner = new.learner
    if calibrate:
        offset = calibration.of_student(
            inputs.recipe, lesson, learner, class_features, inputs.device
        )
        description |= {"class_offset": msgspec.to_builtins(offset)}
    students.save(folder, learner.student, learner.head, description, class_features, new.text)


def _licenses(asked: Recipe, lesson: Lesson) -> dict[str, str]:
    """Return the licenses of everything that went into the student and its evaluation."""
    of_data = [lesson.dataset.license]
    for spec in (asked.adapt_data, *asked.shifts):
        if spec and not isinstance(spec, recipe.OpenMoji):
            of_data.append(spec.license)
    of_student = []
    for tower in (asked.student.tower, asked.student.inherit, asked.student.text):
        if isinstance(tower, recipe.OpenClip):
            of_student.append(f"{tower.model}: {tower.license}")
    found = {
        "teacher": [t.teacher.license for t in lesson.teachers],
        "data": of_data,
        "student": of_student,
    }
    joined = {}
    for what, licenses in found.items():
        if licenses:
            joined[what] = "; ".join(dict.fromkeys(licenses))
    return joined
