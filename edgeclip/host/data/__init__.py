"""Data sets: what is labeled, what is only seen, what is scored.

`load` returns a `Dataset` whatever its kind. A kind is one function, in a file of its own or beside
those that it resembles, and one line in `DATASETS`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgeclip.device.images import ImageRef
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host import recipe as R
from edgeclip.host.data import captioned, labeled, openmoji
from edgeclip.host.data.dataset import Dataset, EvaluationSet, Overlap

__all__ = ["DATASETS", "Dataset", "EvaluationSet", "Overlap", "load", "shift_sets"]

DATASETS: dict[type, Callable[[Any, Path], Dataset]] = {
    R.OpenMoji: openmoji.load,
    R.WebDataset: labeled.load_webdataset,
    R.Folders: labeled.load_folders,
    R.Csv: captioned.load_csv,
}


def load(spec: R.Data, cache: Path) -> Dataset:
    """Return the data set that `spec` describes; what is made once is kept below `cache`.

    Raises `EdgeclipError` where a folder, a class list or every image is missing, for a label that
    is not in the class list, and for a template without a place for the class's name.
    """
    data = DATASETS[type(spec)](spec, cache)
    if data.classes:
        _refuse_nameless(data)

    _refuse_labels(data, data.labeled)
    for evaluation in data.evaluation:
        _refuse_labels(data, evaluation.images)
    if data.halves is not None and data.parted:  # its training images' labels tell the halves apart
        _refuse_labels(data, data.train)
    if data.parted:
        _refuse_names_on_both_sides(data)
    return data


def _refuse_nameless(data: Dataset) -> None:
    """Refuse a prompt that is the same for every class."""
    where = f"templates of the data '{data.name}'"
    if not data.templates:
        raise EdgeclipError(where, "there are none", "add one, such as: a photo of a {c}")

    for template in data.templates:
        if "{c}" not in template:
            raise EdgeclipError(
                where,
                f"'{template}' has no {{c}}",
                "write {c} where the class's name goes: a photo of a {c}",
            )


def _refuse_labels(data: Dataset, images: Iterable[ImageRef]) -> None:
    """Refuse a label outside the class list; without classes, any label."""
    count = len(data.classes)
    for image in images:
        known = 0 <= image.label < count
        unlabeled = count == 0 and image.label < 0
        if not known and not unlabeled:
            raise EdgeclipError(
                image.path,
                f"image '{image.key}' has class index {image.label}, and there are {count} classes",
                "correct the labels or the class list",
            )


def _refuse_names_on_both_sides(data: Dataset) -> None:
    """Refuse a name that a class with labels shares with one without."""
    labeled = set(data.labeled_classes)
    names = {data.classes[c] for c in labeled}
    for c, name in enumerate(data.classes):
        if c not in labeled and name in names:
            raise EdgeclipError(
                f"classes of the data '{data.name}'",
                f"'{name}' is the name of a class with labels and of one without",
                "give each class a name of its own",
            )


def shift_sets(data: Dataset, other: Dataset) -> list[EvaluationSet]:
    """Return `other`'s evaluation sets over `data`'s class list.

    A shift has the same classes as `data`, or some of them, by name. Raises `EdgeclipError` for a
    class that `data` does not have, and where there is nothing to evaluate on.
    """
    scored = [s for s in other.evaluation if s.headline]
    if not scored:
        raise EdgeclipError(
            f"shifts: {other.name}", "has no images to evaluate on", "give it a test part"
        )

    index = []
    for name in other.classes:
        if name not in data.classes:
            raise EdgeclipError(
                f"shifts: {other.name}",
                f"has a class '{name}', which '{data.name}' does not have",
                did_you_mean(name, data.classes),
            )
        index.append(data.classes.index(name))

    sets = []
    for s in scored:
        name = other.name
        if len(scored) > 1:
            name = f"{other.name}, {s.name}"
        images = [image._replace(label=index[image.label]) for image in s.images]
        classes = [index[c] for c in s.classes]
        sets.append(EvaluationSet(name, images, classes, "shift", shift=True))
    return sets
