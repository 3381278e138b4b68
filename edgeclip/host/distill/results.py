"""The end of `edgeclip distill`: the student is scored, results.json and the manifest written."""

import resource
from functools import partial
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from torch import nn

from edgeclip import __version__, disk
from edgeclip.host import student as students
from edgeclip.host import teachers
from edgeclip.host.adapt import promptsrc
from edgeclip.host.data import Dataset
from edgeclip.host.distill.prepare import Inputs, prompts_of
from edgeclip.host.distill.targets import Lesson
from edgeclip.host.evaluation.scores import Subject, TeacherFeatures, evaluate, teacher_features
from edgeclip.host.recipe import Recipe
from edgeclip.host.student import EduAttentionHead, Saved
from edgeclip.host.teachers import TextTower
from edgeclip.host.towers import counting
from edgeclip.progress import Clock
from edgeclip.reports.results import (
    EduAttentionResult,
    EvaluationResults,
    Models,
    Network,
    write_results,
)


def score(
    inputs: Inputs, lesson: Lesson, run: Path, clock: Clock, processes: int
) -> EvaluationResults:
    """Return and write the results of the finished student in RUN/student.

    processes: that trained together.
    """
    recipe = inputs.recipe
    dataset = lesson.dataset
    saved = students.read(run / "student")
    subject = _subject(inputs, lesson, saved)
    description = saved.description
    text = students.load_text(saved)
    clock.lap("rest of stage 2")

    tower = _first_tower(recipe, run)
    scored = evaluate(
        subject,
        _teacher(inputs, lesson, tower),
        dataset,
        run / "evaluation",
        recipe.parity.max_images,
    )
    clock.lap("evaluation")
    results = EvaluationResults(
        run=str(run),
        data=dataset.name,
        data_license=dataset.license,
        sets=tuple(scored.sets),
        halves=dataset.halves,
        harmonic_mean=scored.harmonic_mean,
        own_list_harmonic_mean=scored.own_list_harmonic_mean,
        class_offset=subject.class_offset,
        teachers_class_offset=subject.teachers_class_offset,
        trade=scored.trade,
        models=Models(
            teacher=_network(lesson.teacher.name, tower, lesson.teacher.preprocess.size),
            student=_network(_name(recipe), subject.student, subject.preprocess.size, text),
        ),
        log=tuple(description["log"]),
        edu_attention=_edu_attention(subject.head),
        skipped=tuple(lesson.cache.manifest["skipped"]),
        device=str(inputs.device),
        processes=processes,
        seconds={name: round(seconds, 1) for name, seconds in clock.laps.items()},
        peak_memory_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    )
    write_results(run, results)
    _write_manifest(run, description["parents"]["recipe"])
    return results


def _write_manifest(run: Path, recipe: str) -> None:
    """Finish the run's folder. recipe: its fingerprint."""
    manifest = {
        "kind": "run",
        "edgeclip": __version__,
        "student": disk.sha256(run / "student" / disk.MANIFEST),
        "recipe": recipe,
        "recipe_file": disk.sha256(run / "recipe.yaml"),
    }
    disk.write_sealed(run / disk.MANIFEST, manifest)


def _subject(inputs: Inputs, lesson: Lesson, saved: Saved) -> Subject:
    """Return the student to be scored."""
    student, head, preprocess, description = students.load(saved)
    return Subject(
        student=student,
        head=head,
        preprocess=preprocess,
        class_features=lesson.cache.class_features,
        own_class_features=_class_features(students.load_text(saved), lesson.dataset),
        ships_with=inputs.recipe.student.class_features,
        class_offset=students.class_offset(description),
        teachers_class_offset=lesson.class_offset,
        device=inputs.device,
    )


def _class_features(text: TextTower | None, dataset: Dataset) -> np.ndarray | None:
    if text is None:
        return None
    return students.class_features(text, dataset.classes, dataset.templates)


def _edu_attention(head: EduAttentionHead | None) -> EduAttentionResult | None:
    if head is None:
        return None
    return EduAttentionResult(alpha=head.alpha.item(), kept=head.spec.keep)


def _first_tower(recipe: Recipe, run: Path) -> nn.Module | None:
    """Return the first teacher's tower once more, folded: training did without it."""
    teacher = teachers.load(recipe.teacher, recipe.preprocess)
    spec = prompts_of(recipe)
    if spec is not None:
        teacher = promptsrc.adapted(teacher, spec, run / "teacher")
    return teachers.folded(teacher)


def _teacher(inputs: Inputs, lesson: Lesson, tower: nn.Module | None) -> TeacherFeatures | None:
    """Return the features of the teacher, of all of them where they are fused.

    None where one has no tower to be scored with: ready embeddings have none.
    """
    towers = [tower]
    if lesson.fusion is not None:
        for spec in inputs.recipe.other_teachers:
            other = teachers.load(spec, inputs.recipe.preprocess)
            towers.append(teachers.folded(other))
    pairs = []
    for taught, own in zip(lesson.teachers, towers, strict=False):
        if own is None:
            return None
        pairs.append((taught.teacher, own))
    return partial(teacher_features, pairs, lesson.fusion, device=inputs.device)


def _name(recipe: Recipe) -> str:
    if recipe.student.stem is None:
        return recipe.student.tower.model
    return f"{recipe.student.tower.model} behind {recipe.student.stem.model}"


def _network(
    name: str, module: nn.Module | None, size: int, text: TextTower | None = None
) -> Network:
    """Return a model's size; size: of its input, px."""
    network = Network(name=name, parameters=None, macs=None, input=size)
    if module is not None:
        network = replace(
            network, parameters=counting.parameters(module), macs=counting.macs(module, size)
        )
    if text is not None:
        network = replace(network, text_parameters=counting.parameters(text.module))
    return network
