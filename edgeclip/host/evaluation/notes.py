"""What to know of a set's figure: which of its images and labels the run was trained on."""

from typing import NamedTuple

from edgeclip.host import recipe as R
from edgeclip.host.data import EvaluationSet
from edgeclip.host.evaluation.overlap import told
from edgeclip.reports.results import OverlapResult


class Note(NamedTuple):
    """What to know of a set's figure."""

    transductive: bool | None
    """whether the student saw training images of this set; None: not known"""
    text: str
    """which of its images and labels the run was trained on"""


def note(recipe: R.Recipe, spec: R.Data, s: EvaluationSet) -> Note:
    """Return what to know of the figure of `s`, a set of the data `spec`.

    A set's name says whether the student was trained on the data that it is of; whether it saw
    these images only the comparison with its training images says.
    """
    if s.seen:
        return Note(True, s.note)
    by_name = _by_name(recipe, spec, s)
    whole = f"{by_name.text}; {told(s)}"
    if by_name.transductive:
        return Note(True, whole)
    if s.overlap is None:
        return Note(None, whole)
    if s.overlap.places:
        return Note(True, f"transductive: {whole}")
    return Note(False, f"not transductive: {whole}")


def _by_name(recipe: R.Recipe, spec: R.Data, s: EvaluationSet) -> Note:
    """Return what the recipe alone says of a set that is not known to hold training images."""
    if isinstance(spec, R.OpenMoji) and isinstance(recipe.data, R.OpenMoji):
        return Note(False, s.note)
    if s.shift:
        return Note(False, "shift")
    labels = _teachers_labels(recipe, spec, s)
    if spec.name != recipe.data.name:
        return Note(False, f"not the training data by its name; {labels}")
    own = "without labels"
    if uses_labels(recipe):
        own = "with the labels that there are"
    return Note(True, f"transductive: the student saw training images of this set {own}; {labels}")


def _teachers_labels(recipe: R.Recipe, spec: R.Data, s: EvaluationSet) -> str:
    """Return which labels of the set stage 1 had."""
    stage_1 = recipe.adapt_data or recipe.data
    if recipe.adapt is None or stage_1.name != spec.name:
        return "the teacher was adapted on no label of it"
    labels = "the teacher was adapted on labels of its training images"
    if s.name == "novel" and getattr(stage_1, "protocol", "") == "base_to_novel":
        labels = "the teacher was adapted on no label of it"
    if getattr(recipe.adapt, "self_training", None):
        labels += ", and on its training images without labels"
    return labels


def uses_labels(recipe: R.Recipe) -> bool:
    """Whether the student learned from labels of the training data."""
    if recipe.losses.cross_entropy or recipe.losses.prototype:
        return True
    if recipe.fuse and recipe.fuse.labels:
        return True
    adapted_here = recipe.adapt is not None and recipe.adapt_data is None
    return recipe.losses.captions == "classes" and adapted_here


def overlap_result(s: EvaluationSet) -> OverlapResult | None:
    """Return what a set's record says of its images among the training images."""
    if s.overlap is None:
        return None
    return OverlapResult(
        training_images=s.overlap.training,
        identical=len(s.overlap.identical),
        alike=len(s.overlap.alike),
        first=tuple(s.images[i].key for i in s.overlap.places[:10]),
    )
