"""Data sets with a class list: WebDataset shards, and photos in one sub-folder per class."""

import collections
import functools
from collections.abc import Sequence
from pathlib import Path

from edgeclip import text_file
from edgeclip.device.images import ImageRef, Skipped, index_classes, index_tar, say_skipped
from edgeclip.errors import EdgeclipError
from edgeclip.host.data import slices
from edgeclip.host.data.dataset import Dataset, EvaluationSet
from edgeclip.host.data.files import data_root
from edgeclip.host.data.index import index
from edgeclip.host.data.shards import find
from edgeclip.host.data.split import split
from edgeclip.host.recipe import Folders, WebDataset
from edgeclip.progress import say_once

TEMPLATES = "zeroshot_classification_templates.txt"


def load_webdataset(spec: WebDataset, cache: Path) -> Dataset:
    """Return the images of tar shards; without a class list they have captions only.

    Raises `EdgeclipError` where the folder, a list or every shard is missing.
    """
    root = data_root(spec.root, spec.name)

    classes: list[str] = []
    templates = spec.templates
    if spec.classes:
        classes = text_file.names(root / spec.classes, "class name")
        if not templates:
            templates = tuple(text_file.texts(root / TEMPLATES, "prompt template"))

    train_shards: list[Path] = []
    test_shards: list[Path] = []
    if spec.train:
        train_shards = find(root, spec.train, spec.pipe, cache)
    if spec.test:
        test_shards = find(root, spec.test, spec.pipe, cache)
    train = _read_shards(root / (spec.train or ""), train_shards, cache)
    test = list(_read_shards(root / (spec.test or ""), test_shards, cache))
    test = slices.of_shards(test, test_shards, spec.slices)
    data = _dataset(spec, classes, templates, train, test)
    if set(train_shards) & set(test_shards):
        return data._replace(evaluation=[_of_training(s) for s in data.evaluation])
    return data


def _read_shards(where: Path, shards: list[Path], cache: Path) -> Sequence[ImageRef]:
    """Return the images of shards, and print what was left out of them.

    Raises `EdgeclipError` where there are shards and no image.
    """
    if not shards:
        return []
    skipped: Skipped = collections.Counter()
    images = index(shards, cache, functools.partial(index_tar, skipped=skipped), skipped)
    say_skipped(where, len(images), images.skipped, "samples")
    if not len(images):
        raise EdgeclipError(where, "has no image", "see what a shard holds with: tar tf SHARD")
    return images


def _of_training(s: EvaluationSet) -> EvaluationSet:
    """Return a set whose images are training images, and that says so."""
    return s._replace(note=f"TRAINING IMAGES are among these: {s.note}", role="trained with names")


def load_folders(spec: Folders, cache: Path) -> Dataset:
    """Return the photos of a folder that has one sub-folder per class.

    Raises `EdgeclipError` where the folder is missing or has no sub-folder, or a link puts one
    folder into two classes.
    """
    root = data_root(spec.root, spec.name)
    skipped: Skipped = collections.Counter()
    folders = index_classes(root, skipped)
    say_skipped(root, sum(map(len, folders.values())), skipped, "files")
    empty = [name for name, images in folders.items() if not images]
    if empty:
        say_once(
            f"{root}: {len(empty)} of {len(folders)} classes have no image: {', '.join(empty)}"
        )
    if not folders:
        raise EdgeclipError(
            root,
            "has no sub-folder, so the class list is empty",
            "put the images of each class into a sub-folder named after it",
        )

    photos = []
    for label, (folder, images) in enumerate(folders.items()):
        photos.append([_photo(p, folder, label) for p in images])
    train, test = split(photos, spec.test_fraction, spec.split)

    classes = [folder.replace("_", " ") for folder in folders]
    return _dataset(spec, classes, spec.templates, train, test)


def _photo(image: ImageRef, folder: str, label: int) -> ImageRef:
    """Return a class's image as one of the data set; its key is still relative to the class."""
    return image._replace(
        key=f"{folder}/{image.key}", label=label, slices=slices.of_path(Path(image.key))
    )


def _dataset(
    spec: WebDataset | Folders,
    classes: list[str],
    templates: tuple[str, ...],
    train: Sequence[ImageRef],
    test: list[ImageRef],
) -> Dataset:
    halves = None
    if spec.protocol == "zero_shot":
        labeled, sets = _zero_shot(spec, classes, train, test)
    else:
        labeled, sets = _base_to_novel(spec, classes, train, test)
        halves = (sets[0].name, sets[1].name)
    return Dataset(
        name=spec.name,
        license=spec.license,
        classes=classes,
        templates=templates,
        labeled=labeled,
        train=train,
        train_classes=list(range(len(classes))),
        evaluation=sets,
        halves=halves,
        parted=halves is not None,
    )


def _zero_shot(
    spec: WebDataset | Folders,
    classes: list[str],
    train: Sequence[ImageRef],
    test: list[ImageRef],
) -> tuple[list[ImageRef], list[EvaluationSet]]:
    """Return the labeled images and the evaluation sets of protocol zero_shot."""
    labeled: list[ImageRef] = []
    if classes:
        labeled = [image for image in train if image.label >= 0]
        unlabeled = len(train) - len(labeled)
        if unlabeled and labeled:
            say_once(f"{spec.name}: {unlabeled:,} of {len(train):,} training images have no label")

    sets = []
    if test:
        everything = list(range(len(classes)))
        sets = [EvaluationSet(f"{spec.name} test", test, everything, "test images, all classes")]
    return labeled, sets


def _base_to_novel(
    spec: WebDataset | Folders,
    classes: list[str],
    train: Sequence[ImageRef],
    test: list[ImageRef],
) -> tuple[list[ImageRef], list[EvaluationSet]]:
    """Return the labeled images and the evaluation sets of protocol base_to_novel.

    The first half of the classes (rounded up) is base, the other half novel.
    """
    half = (len(classes) + 1) // 2
    if half == len(classes):
        raise EdgeclipError(
            spec.root,
            "too few classes for base_to_novel",
            "give at least two, or use protocol: zero_shot",
        )

    labeled, novel = _halves(train, half)
    _refuse_empty_half(spec.root, "training", labeled, novel)
    base_test, novel_test = _halves(test, half)
    _refuse_empty_half(spec.root, "test", base_test, novel_test)

    everything = list(range(len(classes)))
    base_set = EvaluationSet(
        "base",
        base_test,
        everything[:half],
        "test photos of the classes whose labels the teacher saw",
    )
    novel_set = EvaluationSet(
        "novel",
        novel_test,
        everything[half:],
        "test photos; transductive: the student saw this half's training photos without labels",
    )
    return labeled, [base_set, novel_set]


def _halves(images: Sequence[ImageRef], half: int) -> tuple[list[ImageRef], list[ImageRef]]:
    """Return the images of the base classes (those below `half`), and of the novel ones."""
    base = []
    novel = []
    for image in images:
        if image.label < half:
            base.append(image)
        else:
            novel.append(image)
    return base, novel


def _refuse_empty_half(root: str, part: str, base: list[ImageRef], novel: list[ImageRef]) -> None:
    """Refuse a part that has images of one half of the classes only."""
    if bool(base) == bool(novel):
        return
    empty = "novel"
    if novel:
        empty = "base"
    raise EdgeclipError(
        root,
        f"there are {part} images, but none of a {empty} class",
        f"add {part} images of the {empty} classes, or use protocol: zero_shot",
    )
