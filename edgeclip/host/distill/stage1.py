"""ComKD stage 1 and what comes with it: teachers are adapted, cached and, if asked, made one."""

import dataclasses
from pathlib import Path

from torch import nn

from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, distributed, recipe, teachers
from edgeclip.host.adapt import promptsrc
from edgeclip.host.adapt.residual_head import adapt
from edgeclip.host.cache import TeacherCache
from edgeclip.host.distill import calibration
from edgeclip.host.distill.fuse import Fusion, fuse
from edgeclip.host.distill.prepare import (
    FirstTeacher,
    Inputs,
    residual_head_of,
    stage_1_data,
    teacher_cache,
)
from edgeclip.host.distill.targets import Lesson, Taught, TeacherRows, labels
from edgeclip.host.teachers import Teacher
from edgeclip.progress import Clock


def stage1(inputs: Inputs, first: FirstTeacher, run: Path, clock: Clock) -> Lesson:
    """Return what the student learns from; every part that is finished on disk is read from there.

    Raises `EdgeclipError` where the folder holds parts of other teachers or other data.
    """
    recipe = inputs.recipe
    dataset = inputs.dataset
    teacher = first.teacher
    if first.prompted is not None:
        # Prompts change the tower whose rows the cache keeps, so they come first.
        teacher = _train_prompts(inputs, first.teacher, first.prompted, run / "teacher")
        dataset = dataset._replace(templates=promptsrc.TEMPLATES)  # of the prompted teacher alone
        clock.lap("stage 1")
    tower = teachers.folded(teacher)
    with distributed.rank_zero_first():
        cached = teacher_cache(inputs, teacher, tower, dataset, inputs.captions)
    clock.lap("teacher cache")
    if residual_head_of(recipe) is not None:
        with distributed.rank_zero_first():
            teacher = _train_head(inputs, teacher, tower, cached, run / "teacher")
        clock.lap("stage 1")

    taught = [Taught(teacher, cached)]
    for i, spec in enumerate(recipe.other_teachers, start=2):
        taught.append(_another(inputs, spec, cached, run / f"teacher-{i}"))
    lesson = Lesson(dataset, taught)
    if recipe.fuse:
        lesson = Lesson(dataset, taught, _fuse(inputs, lesson, run / "fusion"))
    if recipe.other_teachers:
        clock.lap("other teachers")
    class_offset = calibration.of_teacher(recipe, lesson, inputs.device)
    if class_offset is None and recipe.losses.kl is not None and recipe.losses.kl.offset:
        raise EdgeclipError(
            "losses.kl.offset",
            "there is no class to set back: no image or every image has a label that is learned",
            "set it to false",
        )
    return dataclasses.replace(lesson, class_offset=class_offset)


def _train_prompts(inputs: Inputs, teacher: Teacher, prompted: Teacher, folder: Path) -> Teacher:
    labeled = inputs.labeled or inputs.dataset
    with distributed.rank_zero_first():
        return promptsrc.adapt(teacher, prompted, labeled, inputs.recipe, folder, inputs.device)


def _train_head(
    inputs: Inputs, teacher: Teacher, tower: nn.Module | None, cached: TeacherCache, folder: Path
) -> Teacher:
    """Return the teacher with the residual head, if any, that the recipe trains on its cached rows.

    Where stage 1 has images and classes of its own (cross-dataset), it has a cache of its own too.
    """
    spec = residual_head_of(inputs.recipe)
    if spec is None:
        return teacher
    dataset = inputs.dataset
    rows = cached
    if inputs.labeled is not None:
        dataset = stage_1_data(inputs.labeled)
        rows = teacher_cache(inputs, teacher, tower, dataset, captions=False)
    return adapt(teacher, rows, dataset, spec, inputs.recipe.seed, folder)


def _another(inputs: Inputs, spec: recipe.Teacher, first: TeacherCache, folder: Path) -> Taught:
    """Return one more teacher, without its tower; first: the first teacher's cache."""
    teacher = teachers.load(spec, inputs.recipe.preprocess)
    tower = teachers.folded(teacher)
    with distributed.rank_zero_first():
        rows = teacher_cache(inputs, teacher, tower, inputs.dataset, inputs.captions)
        if isinstance(spec, recipe.Conse):
            teacher = _train_head(inputs, teacher, tower, rows, folder)
    cache.refuse_other_views(first, rows)
    if inputs.recipe.student.text and rows.manifest["captions"] != first.manifest["captions"]:
        raise EdgeclipError(
            f"{inputs.path}: student.text",
            f"cache {rows.folder} has a different number of captions per image"
            " than the first teacher's",
            "remove that teacher",
        )
    return Taught(teachers.without_towers(teacher), rows)


def _fuse(inputs: Inputs, lesson: Lesson, folder: Path) -> Fusion:
    classes = lesson.dataset.train_classes
    recipe = inputs.recipe
    assert recipe.fuse is not None
    with distributed.rank_zero_first():
        rows = [TeacherRows(t.teacher, t.cache, classes, inputs.device) for t in lesson.teachers]
        return fuse(rows, labels(lesson.cache, lesson.dataset), recipe.fuse, recipe.seed, folder)
