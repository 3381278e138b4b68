"""All images of a set through both towers, once, and the folds that part them.

On clothing and grocery a fold is a random half of the classes and every fifth image of each class;
on OpenMoji it is a split of the concepts (`split_seed`), tested on held-out concepts and on line
drawings of labeled ones. `inner_fold` parts a fold's training images once more, by the labels that
its training has: what is chosen there has seen neither the fold's test images nor a label of a
class without labels.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import family
import numpy as np
import torch
from family import Bench, Part
from msgspec.structs import replace

from edgeclip import disk
from edgeclip.device.images import ImageRef
from edgeclip.host import cache, data, recipe, teachers
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.allocator import keep_freed_memory
from edgeclip.host.data import Dataset, EvaluationSet
from edgeclip.host.distill.pixels import frozen_features
from edgeclip.host.evaluation.scores import image_features

FOLDS = range(5)
PHOTOS = ("train", "val", "test")
"""parts of a photo set, which a fold does away with"""
CPU = torch.device("cpu")


class Fold(NamedTuple):
    """Places in a pool's images."""

    dataset: Dataset
    """what is trained on"""
    train: list[int]
    labeled: list[int]
    """test images of classes with labels"""
    unlabeled: list[int]
    """test images of the others"""
    lists: tuple[list[int], list[int]]
    """the own class lists of the two"""


def pool(
    path: Path,
    roots: tuple[str, ...],
    folder: Path,
    regime: str = "frozen",
    count: int | None = None,
) -> Bench:
    """Every image of a set through both towers, once for all folds; kept below `folder`.

    count: views cached of an image; none: as many as the recipe has.
    """
    keep_freed_memory()
    asked = family.at_size(recipe.load(path, roots), regime)
    if count is not None:
        asked = replace(asked, views=replace(asked.views, count=count))
    dataset = everything(asked.data, folder)
    images = dataset.evaluation[0].images
    teacher = teachers.load(asked.teacher)
    tower = teachers.folded(teacher)
    threads = asked.train.threads
    ingredients = cache.Ingredients(teacher, tower, dataset, asked.views, 0, False, CPU, threads)
    cached = cache.build(folder, ingredients)
    student, preprocess = students.build(asked.student, teacher.embed_dim)
    described = R.description(asked)

    def of_teacher() -> np.ndarray:
        return image_features(tower, images, teacher.preprocess, "teacher", CPU, 8).features

    def of_student() -> np.ndarray:
        return image_features(student.tower, images, preprocess, "student", CPU).features

    def of_views() -> np.ndarray:
        return frozen_features(student, cached, preprocess, asked, CPU).numpy()

    keys = [image.key for image in images]
    of = {"teacher": [described["teacher"], keys], "student": [described["student"], keys]}
    part = Part(
        "all",
        list(range(len(dataset.classes))),
        np.array([image.label for image in images]),
        images,
        kept(folder, of["teacher"], of_teacher),
        kept(folder, of["student"], of_student),
    )
    views = kept(folder, [described["student"], cached.folder.name], of_views)
    return Bench(path, asked, dataset, teacher, cached, torch.from_numpy(views), {"all": [part]})


def kept(folder: Path, key: Any, made: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that is made once, by what it is of."""
    own = folder / f"folds-{disk.fingerprint(key)[:16]}"
    if not (own / disk.MANIFEST).exists():
        with disk.new_folder(own) as new:
            disk.write_array(new / "features.npy", made())
            disk.write_manifest(new, "folds", {})
    return disk.read_array(own / "features.npy")


def everything(spec: Any, folder: Path) -> Dataset:
    """A data set whose training images are all that any fold trains on, and whose one evaluation
    set is all images.
    """
    if isinstance(spec, R.OpenMoji):
        dataset = data.load(spec, folder)
        colored, lines = {}, {}
        for seed in FOLDS:  # a concept that shares its drawing is left out of some splits
            for s in data.load(replace(spec, split_seed=seed), folder).evaluation:
                of_style = lines if "line" in s.name else colored
                of_style |= {(i.path, i.key): i for i in s.images}
        train = list(colored.values())
        every = train + list(lines.values())
    else:
        train = []
        for name in PHOTOS:
            part = replace(spec, protocol="zero_shot", train=f"{name}/*.tar", test=None)
            dataset = data.load(part, folder)
            train += [i._replace(key=f"{name}/{i.key}") for i in dataset.train]
        every = train
    classes = list(range(len(dataset.classes)))
    sets = [EvaluationSet("all", every, classes, "")]
    return dataset._replace(labeled=train, train=train, train_classes=classes, evaluation=sets)


def fold_of(bench: Bench, k: int, folder: Path) -> Fold:
    """The k-th fold of a pool."""
    images = bench.parts["all"][0].images
    if isinstance(bench.recipe.data, R.OpenMoji):
        place = {(image.path, image.key): i for i, image in enumerate(images)}
        dataset = data.load(replace(bench.recipe.data, split_seed=k), folder)
        by_name = {s.name: s for s in dataset.evaluation}

        def places(found: Any) -> list[int]:
            return [place[(image.path, image.key)] for image in found]

        labeled, unlabeled = (by_name[name] for name in dataset.halves or ())
        tests = places(labeled.images), places(unlabeled.images)
        return Fold(dataset, places(dataset.train), *tests, (labeled.classes, unlabeled.classes))
    order = list(range(len(bench.dataset.classes)))
    random.Random(k).shuffle(order)
    base = set(order[: len(order) // 2])
    train, labeled, unlabeled = [], [], []
    for c in order:
        own = [i for i, image in enumerate(images) if image.label == c]
        random.Random(1000 + c).shuffle(own)
        test = own[k :: len(FOLDS)]
        train += sorted(set(own) - set(test))
        (labeled if c in base else unlabeled).extend(test)
    train.sort()
    dataset = bench.dataset._replace(
        train=[images[i] for i in train],
        labeled=[images[i] for i in train if images[i].label in base],
        parted=True,
    )
    novel = sorted(set(order) - base)
    return Fold(dataset, train, labeled, unlabeled, (sorted(base), novel))


def inner_fold(bench: Bench, fold: Fold, seed: int, parts: int) -> Fold:
    """A fold of a fold's training images: some of its labeled classes lose their labels and are
    judged without.

    parts: 2, half of the classes lose them, so that there are many to judge on; 5, one in five (at
    least two), so that stage 1 has nearly as many labels as in the fold itself. Photos: every
    fourth of the labeled images is judged on, in training no more. OpenMoji, which has one image a
    concept: of the concepts that lose their labels the images of five in eight are judged on, and
    of the others the training images themselves.
    """
    dataset = fold.dataset
    place = {(image.path, image.key): i for i, image in enumerate(bench.parts["all"][0].images)}
    order = dataset.labeled_classes
    draw = random.Random(seed)
    draw.shuffle(order)
    lost = max(2, len(order) // parts)
    kept, others = order[lost:], order[:lost]
    if parts == 2:
        kept, others = order[: len(order) // 2], order[len(order) // 2 :]
    own: dict[int, list[ImageRef]] = {c: [] for c in order}
    for image in dataset.labeled:
        own[image.label].append(image)
    tests: dict[int, list[ImageRef]] = {}
    left_out = set()
    if isinstance(bench.recipe.data, R.OpenMoji):
        judged = others[len(others) * 3 // 8 :]
        tests = {c: own[c] for c in (*kept, *judged)}
        left_out = set(judged)
        withheld = {image.key for c in judged for image in own[c]}
    else:
        judged = others
        for c in order:
            draw.shuffle(own[c])
            tests[c] = own[c][::4]
        withheld = {image.key for images in tests.values() for image in images}
    train = [image for image in dataset.train if image.key not in withheld]
    labels = set(kept)
    inner = dataset._replace(
        train=train,
        labeled=[i for i in dataset.labeled if i.label in labels and i.key not in withheld],
        train_classes=[c for c in dataset.train_classes if c not in left_out],
    )

    def places(images: list[ImageRef]) -> list[int]:
        return [place[(image.path, image.key)] for image in images]

    halves = [[image for c in half for image in tests[c]] for half in (kept, judged)]
    return Fold(
        inner, places(train), places(halves[0]), places(halves[1]), (sorted(kept), sorted(judged))
    )


def bench_of(bench: Bench, fold: Fold) -> Bench:
    """The pool with the fold's images alone."""
    place = {(image.path, image.key): i for i, image in enumerate(bench.cached.images)}
    rows = np.array([place[(image.path, image.key)] for image in fold.dataset.train])
    every = bench.parts["all"][0]

    def part(name: str, places: list[int], own_list: list[int]) -> Part:
        at = np.array(places)
        return every._replace(
            name=name,
            classes=own_list,
            labels=every.labels[at],
            images=[every.images[i] for i in places],
            teacher_rows=every.teacher_rows[at],
            tower_features=every.tower_features[at],
        )

    cached = bench.cached._replace(
        images=[bench.cached.images[int(i)] for i in rows],
        rows=np.asarray(bench.cached.rows[rows]),
        views=np.asarray(bench.cached.views[rows]),
    )
    parts = {
        "train": [part("train", fold.train, every.classes)],
        "test": [
            part("labeled", fold.labeled, fold.lists[0]),
            part("unlabeled", fold.unlabeled, fold.lists[1]),
        ],
    }
    assert bench.tower_features is not None
    views = bench.tower_features[torch.from_numpy(rows)]
    return bench._replace(dataset=fold.dataset, cached=cached, tower_features=views, parts=parts)
