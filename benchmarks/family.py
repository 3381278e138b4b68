"""The family of methods that trials compare, and what trains one student by one of them.

A trial has one teacher cache a set; its head is adapted once a seed or fold, and every method gets
that same head, the same views, order and start of the student. Methods differ in `losses` alone.
Weights within a mix are the papers' own (CLIP-KD, CLIP-RD, CLIP-Embed-KD).
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch.nn import functional as F

from edgeclip import config
from edgeclip.device.zero_shot import EduAttention
from edgeclip.host import cache, data, teachers
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.distill import calibration
from edgeclip.host.distill.targets import Lesson, Taught
from edgeclip.host.distill.train import train
from edgeclip.host.distill.training import Learner

RECIPES = Path(__file__).parent.parent / "recipes"
SETS = {"clothing": "clothing", "grocery": "grocery", "openmoji": "quickstart"}
REGIMES = ("full", "small", "vit", "frozen")
"""of which the last stops after the projector's steps; the others train as the recipe says"""
CLIP_KD = {
    "contrastive": {},
    "affinity": {"form": "kl"},
    "feature": {"weight": 7.8},
    "interactive": {},
    "captions": "classes",
}
COMKD = {"kl": {}, "if_align": {"weight": 10}, "edu_attention": {"temperature": 0.1}}
METHODS: dict[str, dict[str, Any]] = {
    "student alone": {"cross_entropy": {}},
    "contrastive": {"contrastive": {}, "captions": "classes"},
    "feature": {"feature": {}},
    "affinity": {"affinity": {}, "captions": "classes"},
    "CLIP-KD": CLIP_KD,
    "CLIP-RD": CLIP_KD | {"vrd": {}, "xrd": {}},
    "CLIP-Embed-KD": {"cross_entropy": {}, "prototype": {"weight": 0.5}},
    "PromptKD": {"kl": {}},
    "ComKD": COMKD,
    "ComKD without IFAlign": {k: v for k, v in COMKD.items() if k != "if_align"},
    "ComKD without EduAttention": {k: v for k, v in COMKD.items() if k != "edu_attention"},
    "ComKD without EduAttention, class captions": {
        **{k: v for k, v in COMKD.items() if k != "edu_attention"},
        "contrastive": {},
        "captions": "classes",
    },
    "ComKD without both": {
        "kl": {},
        "if_align": {"weight": 0},
        "edu_attention": {"temperature": 0.1, "learn_alpha": False},
    },
}


class Part(NamedTuple):
    """One evaluation set's images through the two frozen towers."""

    name: str
    classes: list[int]
    labels: np.ndarray
    images: list[Any]
    teacher_rows: np.ndarray
    tower_features: np.ndarray


class Bench(NamedTuple):
    """A data set, its teacher and its student's frozen features: all that runs share."""

    path: Path
    """of the recipe"""
    recipe: R.Recipe
    dataset: data.Dataset
    teacher: teachers.Teacher
    cached: cache.TeacherCache
    tower_features: torch.Tensor | None
    """None: no projector's steps"""
    parts: dict[str, list[Part]]


def recipe_of(name: str, regime: str) -> Path:
    """Of the data, the teacher and the regime's student."""
    return RECIPES / f"{SETS[name]}{'-vit' if regime == 'vit' else ''}.yaml"


def at_size(asked: R.Recipe, regime: str) -> R.Recipe:
    """The recipe with the student of a regime.

    At 80 px an epoch takes two fifths of the time, so the quickstart's few epochs are twice as many
    there.
    """
    if regime != "small":
        return asked
    tower, schedule = asked.student.tower, asked.train
    assert isinstance(tower, R.Timm)
    if isinstance(asked.data, R.OpenMoji):
        schedule = replace(schedule, epochs=2 * schedule.epochs)
    student = replace(asked.student, tower=replace(tower, image_size=80))
    return replace(asked, student=student, train=schedule)


def described(bench: Bench, losses: dict[str, Any], regime: str, seed: int) -> R.Recipe:
    schedule = bench.recipe.train
    if regime == "frozen":
        schedule = replace(schedule, epochs=0)
    losses_of_recipe = config.convert(losses, R.Losses, "losses")
    return replace(bench.recipe, losses=losses_of_recipe, train=schedule, seed=seed)


def learn(
    bench: Bench, losses: dict[str, Any], regime: str, seed: int, teacher: teachers.Teacher
) -> tuple[Learner, float]:
    """Trains one student; returns it and its last loss."""
    asked = described(bench, losses, regime, seed)
    torch.manual_seed(seed)
    student, preprocess = students.build(asked.student, teacher.embed_dim)
    edu = asked.losses.edu_attention
    head = (
        students.EduAttentionHead(teacher.embed_dim, edu, torch.Generator().manual_seed(seed))
        if edu
        else None
    )
    cpu = torch.device("cpu")
    with (
        torch.no_grad()
    ):  # the adapted head's answers once, not in every step: no method changes them
        rows = torch.from_numpy(bench.cached.rows[:])
        known = teacher.features(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).numpy()
    teacher, cached = (
        dataclasses.replace(teacher, features=lambda answers: answers),
        bench.cached._replace(rows=known),
    )
    learner = Learner(student, head, preprocess)
    lesson = Lesson(bench.dataset, [Taught(teacher, cached)])
    lesson = dataclasses.replace(lesson, class_offset=calibration.of_teacher(asked, lesson, cpu))
    log = train(
        learner,
        lesson,
        asked,
        cpu,
        tower_features=bench.tower_features,
    )
    return learner, log[-1]["loss"]


def projected(student: students.Student, part: Part) -> np.ndarray:
    """The student's features of a part whose tower features are at hand."""
    with torch.inference_mode():
        return F.normalize(student.projector(torch.from_numpy(part.tower_features)), dim=-1).numpy()


def taught(teacher: teachers.Teacher, part: Part) -> np.ndarray:
    """The teacher's features of a part."""
    with torch.inference_mode():
        return F.normalize(teacher.features(torch.from_numpy(part.teacher_rows)), dim=-1).numpy()


def shipped_head(learner: Learner) -> EduAttention | None:
    """EduAttention where the student keeps it."""
    if learner.head is None or not learner.head.spec.keep:
        return None
    return learner.head.numpy()
