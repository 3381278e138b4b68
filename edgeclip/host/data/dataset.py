"""The records that every kind of data set is loaded into."""

from collections.abc import Sequence
from typing import NamedTuple

from edgeclip.device.evaluation import Role
from edgeclip.device.images import ImageRef


class Overlap(NamedTuple):
    """Which images of an evaluation set were found among the training images."""

    training: int
    """how many training images it was compared with"""
    identical: tuple[int, ...]
    """places of those with the bytes of one"""
    alike: tuple[int, ...]
    """places of others that look like one re-encoded or resized"""

    @property
    def places(self) -> tuple[int, ...]:
        """The places of both, ascending: these images are not unseen."""
        return tuple(sorted(self.identical + self.alike))


class EvaluationSet(NamedTuple):
    """Images that are scored together, over one class list."""

    name: str
    images: list[ImageRef]
    classes: list[int]
    """the class list that is active when this set is scored: indices into Dataset.classes"""
    note: str
    """how to read its figure: transductive or not, style; the report adds chance"""
    headline: bool = True
    """False: kept for parity only, never scored for the teacher"""
    shift: bool = False
    """of another style or data set than what was trained on"""
    role: Role = "unseen"
    """what training had of its images, by how the data set is made; its figure says so"""
    overlap: Overlap | None = None
    """what a comparison with the training images found; None: not compared"""

    @property
    def seen(self) -> bool:
        """Whether there are training images among its images."""
        return self.role != "unseen"


class Dataset(NamedTuple):
    """A data set: what is labeled, what is only seen, what is scored."""

    name: str
    license: str
    classes: list[str]
    """class names in index order; empty: the images have captions only"""
    templates: tuple[str, ...]
    labeled: list[ImageRef]
    """what the teacher may be adapted on"""
    train: Sequence[ImageRef]
    """what the student sees, without labels"""
    train_classes: list[int]
    """the class list of the distillation losses: no class that is held out from training"""
    evaluation: list[EvaluationSet]
    halves: tuple[str, str] | None = None
    """names of the evaluation sets of classes with labels and of those without, whose harmonic mean
    is told"""
    parted: bool = False
    """whether the training images without a label are all of classes without labels"""

    @property
    def labeled_classes(self) -> list[int]:
        """The classes that have labels, ascending."""
        return sorted({image.label for image in self.labeled})
