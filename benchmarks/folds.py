"""Accuracy over all labels, over folds: what the class offset gives, beside none and beside the best that any could give.

Each fold parts the classes anew into those with labels and those without, and the images into training and test: no fixed
test part can be learned by heart. On clothing and grocery a fold is a random half of the classes and every fifth image of
each class; on OpenMoji it is a split of the concepts (`split_seed`), tested on held-out concepts and on line drawings of
labeled ones. A fold adapts the teacher, trains each method on the student's frozen features, and scores:

    none     no class is set back
    shipped  the product's rule (`class_offset.fit`): as many training images name a labeled class as have a label
    best     the best harmonic mean that any offset has on the test images: a diagnosis by their labels, never shipped

    results/folds.jsonl  a line a fold and model, appended when it is done; a line that is there is not made again

Required of each set, for the student of ComKD: what the recipe now ships closes at least 80 % of the way from no offset to
the best one of the recipe before (stage 1 by labels alone, where the log has it), in harmonic mean over all labels, on average
over the folds. An offset moves no answer within a set's own list.

    python benchmarks/folds.py --data clothing=DIR --data grocery=DIR --check
    python benchmarks/folds.py --sets openmoji --folds 0 1
"""

import random
from pathlib import Path
from typing import Any, NamedTuple

import common
import compare
import folds_table
import methods
import methods_table
import numpy as np
import torch
import toy
from methods import Bench, Part
from msgspec.structs import replace

from edgeclip import disk
from edgeclip.device.metrics import harmonic_mean, hits
from edgeclip.device.zero_shot import EduAttention, class_scores
from edgeclip.host import cache, data, recipe, teachers
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.adapt.class_offset import Choices, choices, fit, trade
from edgeclip.host.adapt.residual_head import adapt
from edgeclip.host.data import Dataset, EvaluationSet
from edgeclip.host.distill.pixels import frozen_features
from edgeclip.host.evaluation.scores import image_features

LOG = Path(__file__).parent.parent / "results" / "folds.jsonl"
FOLDS = range(5)
METHODS = ("PromptKD", "ComKD")
JUDGED = "ComKD"
CLOSED = 0.8
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


def pool(path: Path, roots: tuple[str, ...], folder: Path) -> Bench:
    """Every image of a set through both towers, once for all folds; kept below `folder`."""
    asked = recipe.load(path, roots)
    dataset = everything(asked.data, folder)
    images = dataset.evaluation[0].images
    teacher = teachers.load(asked.teacher)
    tower = teachers.folded(teacher)
    threads = asked.train.threads
    ingredients = cache.Ingredients(teacher, tower, dataset, asked.views, 0, False, CPU, threads)
    cached = cache.build(folder, ingredients)
    student, preprocess = students.build(asked.student, teacher.embed_dim)
    key = [cached.folder.name, disk.fingerprint(R.description(asked)["student"]), len(images)]
    kept = folder / f"folds-{disk.fingerprint(key)[:16]}"
    if not (kept / disk.MANIFEST).exists():
        with disk.new_folder(kept) as new:
            views = frozen_features(student, cached, preprocess, asked, CPU).numpy()
            disk.write_array(new / "views.npy", views)
            of_teacher = image_features(tower, images, teacher.preprocess, "teacher", CPU, 8)
            disk.write_array(new / "teacher.npy", of_teacher.features)
            of_student = image_features(student.tower, images, preprocess, "student", CPU)
            disk.write_array(new / "student.npy", of_student.features)
            disk.write_manifest(new, "folds", {})
    part = Part(
        "all",
        list(range(len(dataset.classes))),
        np.array([image.label for image in images]),
        images,
        disk.read_array(kept / "teacher.npy"),
        disk.read_array(kept / "student.npy"),
    )
    views = torch.from_numpy(disk.read_array(kept / "views.npy"))
    return Bench(path, asked, dataset, teacher, cached, views, {"all": [part]})


def everything(spec: Any, folder: Path) -> Dataset:
    """A data set whose training images are all that any fold trains on, and whose one evaluation set is all images."""
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


def means(labeled: Choices, unlabeled: Choices, offsets: np.ndarray) -> np.ndarray:
    """Harmonic means over all labels at each offset."""
    pairs = zip(labeled.top1(offsets), unlabeled.top1(offsets), strict=True)
    return np.array([harmonic_mean(float(a), float(b)) for a, b in pairs])


def scored(
    bench: Bench, features: dict[str, np.ndarray], head: EduAttention | None
) -> dict[str, Any]:
    """One model's line: top-1 of both halves and their harmonic mean, by rule; the area; within own lists."""
    dataset, every = bench.dataset, bench.cached.class_features
    classes = dataset.labeled_classes
    (train,), (labeled, unlabeled) = bench.parts["train"], bench.parts["test"]
    on_train = class_scores(features[train.name], every, head)
    has_label = np.isin(train.labels, classes)
    shipped = fit(on_train, dataset, has_label, R.Calibration()).offset
    halves = [
        choices(class_scores(features[part.name], every, head), classes, part.labels)
        for part in (labeled, unlabeled)
    ]
    leads = np.unique(np.concatenate([half.lead for half in halves]))
    best = float(leads[means(*halves, leads).argmax()])
    rules = {}
    for name, offset in (("none", 0.0), ("shipped", shipped), ("best", best)):
        at = np.array([offset])
        top1 = [float(half.top1(at)[0]) for half in halves]
        mean = float(means(*halves, at)[0])
        rules[name] = {"offset": offset, "labeled": top1[0], "unlabeled": top1[1], "mean": mean}
    own = []
    for part in (labeled, unlabeled):
        place = {c: i for i, c in enumerate(part.classes)}
        truth = np.array([place[c] for c in part.labels])
        active = every[part.classes]
        own.append(float(hits(class_scores(features[part.name], active, head), truth).mean()))
    return {
        "rules": rules,
        "area": trade(*halves).area,
        "own_lists": {"labeled": own[0], "unlabeled": own[1], "mean": harmonic_mean(*own)},
        "images": [len(labeled.labels), len(unlabeled.labels)],
    }


def answers(
    bench: Bench, model: str, seed: int, teacher: teachers.Teacher
) -> tuple[dict[str, np.ndarray], EduAttention | None]:
    """A model's features of every part, by its name, and the head that it ships with."""
    parts = bench.parts["train"] + bench.parts["test"]
    if model == "teacher":
        return {part.name: methods.taught(teacher, part) for part in parts}, None
    learner, _ = methods.learn(bench, methods.METHODS[model], "frozen", seed, teacher)
    features = {part.name: methods.projected(learner.student, part) for part in parts}
    return features, methods.shipped_head(learner)


def trial(
    name: str, bench: Bench, names: list[str], folds: list[int], folder: Path, log: Path
) -> None:
    """Every line of a set that `log` does not hold yet."""
    spec = bench.recipe.adapt
    assert isinstance(spec, R.ResidualHead)
    recorded = disk.fingerprint(R.description(bench.recipe))[:16]
    key = {"set": name, "balanced": spec.self_training is not None, "recipe": recorded}
    for k in folds:
        lines = [x for x in methods_table.read(log) if x["fold"] == k and key.items() <= x.items()]
        done = {x["model"] for x in lines}
        missing = [m for m in ("teacher", *names) if m not in done]
        if not missing:
            continue
        fold = fold_of(bench, k, folder)
        own = bench_of(bench, fold)
        head = folder / "folds-heads" / f"{recorded}-{k}"
        teacher = adapt(own.teacher, own.cached, fold.dataset, spec, k, head)
        for model in missing:
            line = scored(own, *answers(own, model, k, teacher))
            methods.append(key | {"fold": k, "model": model} | line, log)
            print(f"{name} fold {k} {model}: {line['rules']['shipped']}", flush=True)


def judged(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The required figures."""
    required = []
    for name in dict.fromkeys(x["set"] for x in log):
        what = f"{name}, {JUDGED}: of the way from no offset to the best one before, closed"
        closed, folds = folds_table.closed_since(log, name, JUDGED)
        if closed is not None:
            required.append(compare.exact(what, closed, n=folds, at_least=CLOSED))
    return required


def smoke(folder: Path) -> list[dict[str, Any]]:
    """Two folds of generated shapes; returns the log's lines."""
    log = folder / "folds.jsonl"
    bench = pool(toy.write_recipe(folder, toy.TRIAL), (), folder / "cache")
    trial("shapes", bench, [JUDGED], [0, 1], folder / "cache", log)
    return methods_table.read(log)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--sets", nargs="+", choices=list(methods.SETS), default=list(methods.SETS))
    parser.add_argument("--methods", nargs="+", choices=list(methods.METHODS), default=METHODS)
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=list(FOLDS))
    parser.add_argument("--data", action="append", default=[], help="NAME=DIR")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    options = parser.parse_args()
    here = common.this_machine()
    if options.form == common.SMOKE:
        with common.workplace() as folder:
            log = smoke(folder)
    else:
        for name in options.sets:
            roots = tuple(r for r in options.data if r.partition("=")[0] == name)
            bench = pool(methods.recipe_of(name, "frozen"), roots, options.cache)
            trial(name, bench, list(options.methods), options.folds, options.cache, LOG)
        log = methods_table.read(LOG)
    found = folds_table.averages(log)
    common.table(folds_table.rows(log), folds_table.HEADERS)
    common.finish({"benchmark": "folds", "means": found}, judged(log), here, options)


if __name__ == "__main__":
    main()
