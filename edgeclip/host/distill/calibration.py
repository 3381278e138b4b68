"""The class offsets of a run, teacher's and student's, fitted on its training images.

Where nothing says that some classes score too high there is none: no class or every class had
labels in training, or all of the training images that are looked at have one, or none has.
"""

import random

import numpy as np
import torch
from torch.nn import functional as F

from edgeclip.device.manifest import ClassOffset
from edgeclip.device.zero_shot import class_scores
from edgeclip.host.adapt.class_offset import fit
from edgeclip.host.distill.targets import Lesson, Targets
from edgeclip.host.distill.training import Learner
from edgeclip.host.evaluation.notes import uses_labels
from edgeclip.host.evaluation.scores import image_features
from edgeclip.host.recipe import Recipe
from edgeclip.progress import say

IMAGES = 4096
"""training images that an offset is fitted on, at most"""
CHUNK = 1024


def of_teacher(recipe: Recipe, lesson: Lesson, device: torch.device) -> ClassOffset | None:
    """Return what the teacher's scores of classes with labels are set back by."""
    places = _places(recipe, lesson)
    if places is None:
        return None
    targets = Targets(lesson, recipe.losses, device)
    scores = []
    for part in np.array_split(places, max(1, len(places) // CHUNK)):
        unit = F.normalize(targets.features(part, np.zeros_like(part)), dim=-1)
        scores.append(class_scores(unit.cpu().numpy(), lesson.cache.class_features))
    return _fit(recipe, lesson, places, np.concatenate(scores))


def of_student(
    recipe: Recipe,
    lesson: Lesson,
    learner: Learner,
    class_features: np.ndarray,
    device: torch.device,
) -> ClassOffset | None:
    """Return the same for the student as it ships. class_features: [N, D], its bundle's."""
    places = _places(recipe, lesson)
    if places is None:
        return None
    images = [lesson.cache.images[int(i)] for i in places]
    learner.student.eval()
    kept, features, _ = image_features(
        learner.student, images, learner.preprocess, "class offset", device
    )
    head = None
    if learner.head is not None and learner.head.spec.keep:
        head = learner.head.numpy()
    scores = class_scores(features, class_features, head)
    return _fit(recipe, lesson, places[kept], scores)


def _places(recipe: Recipe, lesson: Lesson) -> np.ndarray | None:
    """Return the places in the cache of the images to fit on; None: there is nothing to fit."""
    dataset = lesson.dataset
    some = 0 < len(dataset.labeled_classes) < len(dataset.classes)
    if recipe.calibration is None or not some or not learns_labels(recipe):
        return None
    count = len(lesson.cache.images)
    places = np.array(sorted(random.Random(recipe.seed).sample(range(count), min(count, IMAGES))))
    has_label = _has_label(lesson, places)
    if has_label.all() or not has_label.any():
        say(f"class offset: left out, {has_label.sum()} of {len(places)} images have a label")
        return None
    return places


def learns_labels(recipe: Recipe) -> bool:
    """Return whether teacher or student learns from labels of the training data."""
    adapted_here = recipe.adapt is not None and recipe.adapt_data is None
    return adapted_here or uses_labels(recipe)


def _has_label(lesson: Lesson, places: np.ndarray) -> np.ndarray:
    labeled = {image.key for image in lesson.dataset.labeled}
    return np.array([lesson.cache.images[int(i)].key in labeled for i in places])


def _fit(recipe: Recipe, lesson: Lesson, places: np.ndarray, scores: np.ndarray) -> ClassOffset:
    assert recipe.calibration is not None
    return fit(scores, lesson.dataset, _has_label(lesson, places), recipe.calibration)
