"""Data sets: what is labeled, what is only seen, what is scored.

`load` gives a `Dataset` whatever the kind. A kind is one function here or in a file of its own, and
one line in `DATASETS`.
"""

import csv
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeclip.device.images import ImageRef, index_folder, index_tar
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host import recipe as R
from edgeclip.host.data import openmoji
from edgeclip.host.data.dataset import Dataset, EvaluationSet
from edgeclip.host.data.index import index
from edgeclip.host.data.shards import find

__all__ = ["DATASETS", "Dataset", "EvaluationSet", "load", "shift_sets"]


def load(spec: R.Data, cache: Path) -> Dataset:
    """Raises `EdgeclipError` where a folder, a class list or every image is missing, and for a
    template without a place for the name."""
    data = DATASETS[type(spec)](spec, cache)
    nameless = next((t for t in data.templates or ("",) if "{c}" not in t), None)
    if data.classes and nameless is not None:  # such a prompt is the same for every class
        raise EdgeclipError(
            f"templates of the data '{data.name}'",
            f"'{nameless}' has no {{c}}",
            "write {c} where the class's name goes: a photo of a {c}",
        )
    for p in (p for part in (data.labeled, *(s.images for s in data.evaluation)) for p in part):
        if not 0 <= p.label < len(data.classes) and (data.classes or p.label >= 0):
            raise EdgeclipError(
                p.path,
                f"image '{p.key}' has class index {p.label}, and there are {len(data.classes)} classes",
                "correct the labels or the class list",
            )
    return data


def _webdataset(spec: R.WebDataset, cache: Path) -> Dataset:
    root = _root(spec.root, spec.name)
    classes, templates = list[str](), spec.templates
    if spec.classes:
        classes = _lines(root / spec.classes)
        templates = templates or tuple(_lines(root / "zeroshot_classification_templates.txt"))
    train: Sequence[ImageRef] = (
        index(find(root, spec.train, spec.pipe, cache), cache, index_tar) if spec.train else []
    )
    test = (
        list(index(find(root, spec.test, spec.pipe, cache), cache, index_tar)) if spec.test else []
    )
    return _split(spec, classes, templates, train, test)


def _folders(spec: R.Folders, cache: Path) -> Dataset:
    root = _root(spec.root, spec.name)
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = [p.name.replace("_", " ") for p in folders]
    if not classes:
        raise EdgeclipError(
            root, "empty class list: it has no sub-folder", "make one sub-folder a class"
        )
    parts: dict[bool, list[ImageRef]] = {False: [], True: []}
    for label, folder in enumerate(folders):
        for p in index_folder(folder):
            p = p._replace(key=f"{folder.name}/{p.key}", label=label)
            # By a hash of the name, so that a photo keeps its part when others come or go.
            parts[
                int(hashlib.sha256(p.key.encode()).hexdigest()[:8], 16) / 2**32 < spec.test_fraction
            ].append(p)
    return _split(spec, classes, spec.templates, parts[False], parts[True])


def _split(
    spec: R.WebDataset | R.Folders,
    classes: list[str],
    templates: tuple[str, ...],
    train: Sequence[ImageRef],
    test: list[ImageRef],
) -> Dataset:
    everything = list(range(len(classes)))
    if spec.protocol == "zero_shot":
        labeled = [p for p in train if p.label >= 0] if classes else []
        sets = (
            [EvaluationSet(f"{spec.name} test", test, everything, "test images, all classes")]
            if test
            else []
        )
    else:
        half = (len(classes) + 1) // 2
        if half == len(classes):
            raise EdgeclipError(
                spec.root,
                "too few classes for base_to_novel",
                "give at least two, or use protocol: zero_shot",
            )
        for part, images in (("training", train), ("test", test)):
            for name, empty in (
                ("base", all(p.label >= half for p in images)),
                ("novel", all(p.label < half for p in images)),
            ):
                if images and empty:
                    raise EdgeclipError(
                        spec.root,
                        f"its {name} half ({half} of {len(classes)} classes are base) has no {part} images",
                        "add some, or use protocol: zero_shot",
                    )
        labeled = [p for p in train if p.label < half]
        note = (
            "test photos; transductive: the student saw this half's training photos without labels"
        )
        sets = [
            EvaluationSet(
                "base",
                [p for p in test if p.label < half],
                everything[:half],
                "test photos of the classes whose labels the teacher saw",
            ),
            EvaluationSet("novel", [p for p in test if p.label >= half], everything[half:], note),
        ]
    return Dataset(spec.name, spec.license, classes, templates, labeled, train, everything, sets)


def shift_sets(data: Dataset, other: Dataset) -> list[EvaluationSet]:
    """`other`'s evaluation sets over `data`'s class list: a shift has the same classes, or some of
    them, by name.

    Raises `EdgeclipError` for a class that `data` has not, and where there is nothing to evaluate
    on.
    """
    if not any(s.headline for s in other.evaluation):
        raise EdgeclipError(
            f"shifts: {other.name}", "has no images to evaluate on", "give it a test part"
        )
    if unknown := [c for c in other.classes if c not in data.classes]:
        raise EdgeclipError(
            f"shifts: {other.name}",
            f"has a class '{unknown[0]}' that the other data has not",
            did_you_mean(unknown[0], data.classes),
        )
    index = [data.classes.index(c) for c in other.classes]
    found = [s for s in other.evaluation if s.headline]
    return [
        EvaluationSet(
            other.name if len(found) == 1 else f"{other.name}, {s.name}",
            [p._replace(label=index[p.label]) for p in s.images],
            [index[c] for c in s.classes],
            "shift; not transductive",
            shift=True,
        )
        for s in found
    ]


def _root(root: str, name: str) -> Path:
    path = Path(root)
    if not path.is_dir():
        raise EdgeclipError(
            path,
            f"there is no such folder for the data '{name}'",
            f"say where it lies: --data {name}=DIR",
        )
    return path


def _lines(path: Path) -> list[str]:
    try:
        lines = [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except FileNotFoundError:
        raise EdgeclipError(
            path, "there is no such file", "write one line a class (or template)"
        ) from None
    if not lines:
        raise EdgeclipError(path, "is empty", "write one line a class (or template)")
    return lines


def _csv(spec: R.Csv, cache: Path) -> Dataset:
    """open_clip's own: a line an image, its path and its caption; no class."""
    root = _root(spec.root, spec.name)

    def rows(path: Path) -> list[ImageRef]:
        try:
            with open(path, encoding="utf-8", newline="") as f:
                lines = csv.DictReader(f, delimiter=spec.separator)
                for column in (spec.image, spec.caption):
                    if column not in (lines.fieldnames or []):
                        raise EdgeclipError(
                            path,
                            f"has no column '{column}'",
                            did_you_mean(column, lines.fieldnames or []),
                        )
                found = []
                for line in lines:
                    if not line[spec.image]:
                        raise EdgeclipError(
                            f"{path}: line {lines.line_num}",
                            f"has nothing in column '{spec.image}'",
                            "complete or remove it",
                        )
                    found.append(
                        ImageRef(
                            line[spec.image],
                            str(root / line[spec.image]),
                            caption=(line[spec.caption] or "").strip(),
                        )
                    )
                return found
        except FileNotFoundError:
            raise EdgeclipError(path, "there is no such file", "check the path") from None
        except (UnicodeDecodeError, csv.Error) as e:
            raise EdgeclipError(
                path, f"is no readable CSV file ({e})", "write UTF-8 text"
            ) from None

    images = rows(root / spec.file)
    seen: set[str] = set()
    for p in images:
        if p.key in seen:
            raise EdgeclipError(
                root / spec.file, f"names '{p.key}' twice", "keep one line an image"
            )
        seen.add(p.key)
        if not Path(p.path).is_file():
            raise EdgeclipError(
                root / spec.file,
                f"names '{p.key}', and there is no such file below {root}",
                "remove the line, or check data.root",
            )
    return Dataset(spec.name, spec.license, [], (), [], images, [], [])


DATASETS: dict[type, Callable[[Any, Path], Dataset]] = {
    R.OpenMoji: openmoji.load,
    R.WebDataset: _webdataset,
    R.Folders: _folders,
    R.Csv: _csv,
}
