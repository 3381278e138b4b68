"""What `edgeclip distill` does before it trains: loads the data and refuses what cannot work."""

from pathlib import Path
from typing import Any

from edgeclip.device import target
from edgeclip.device.zero_shot import prompts
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, data, distributed, recipe, teachers
from edgeclip.host import student as students
from edgeclip.host.cache import CACHE
from edgeclip.host.cache.inspect import inspect
from edgeclip.host.distill import losses
from edgeclip.host.distill import qat as quantized
from edgeclip.host.evaluation.scores import note
from edgeclip.host.recipe import Recipe


def build_for(
    path: Path, roots: tuple[str, ...] = (), out: Path | None = None
) -> list[dict[str, Any]]:
    """Every cache that `distill` would make of the recipe at `path`, before it trains; what `inspect` says of each.

    out: folder of the only teacher's cache, instead of cache/<fingerprint>.
    Raises `EdgeclipError` where the rows depend on a stage 1 that has not run.
    """
    asked = recipe.load(path, roots)
    if isinstance(asked.adapt, recipe.Prompts):
        raise EdgeclipError(
            f"{path}: adapt",
            "prompts change the rows, and stage 1 makes them",
            f"use: edgeclip distill {path}",
        )
    own_stage_1 = bool(asked.adapt_data and isinstance(asked.adapt, recipe.ResidualHead))
    if out and (asked.other_teachers or own_stage_1):
        raise EdgeclipError(
            f"--out {out}",
            "is one folder, and the recipe needs several caches",
            "leave it out: they are found by their fingerprints",
        )
    dataset, labeled, captions = load_data(asked, path)
    device = distributed.own(distributed.pick_device(asked.train.device))
    found = []
    for spec in (asked.teacher, *asked.other_teachers):
        teacher = teachers.load(spec)
        teachers.check_class_names(teacher, dataset.classes, dataset.templates)
        tower, sets = teachers.folded(teacher), [(dataset, captions)]
        if own_stage_1 and labeled and isinstance(spec, recipe.Conse):
            sets.append((labeled._replace(train=labeled.labeled), False))
        for part, with_captions in sets:
            made = cache.build(
                CACHE,
                teacher,
                tower,
                part,
                asked.views,
                asked.seed,
                captions=with_captions,
                device=device,
                threads=asked.train.threads,
                out=out,
            )
            found.append(inspect(made.folder))
    return found


def load_data(asked: Recipe, path: Path) -> tuple[data.Dataset, data.Dataset | None, bool]:
    """(what the recipe trains and scores on, stage 1's labeled set where it is another, whether a caption is needed of every image)."""
    dataset = data.load(asked.data, CACHE)
    if asked.evaluation_data:
        dataset = _with_evaluation(dataset, data.load(asked.evaluation_data, CACHE))
    for spec in asked.shifts:
        dataset = dataset._replace(
            evaluation=dataset.evaluation + data.shift_sets(dataset, data.load(spec, CACHE))
        )
    scored = asked.evaluation_data or asked.data
    dataset = dataset._replace(
        evaluation=[s._replace(note=note(asked, scored, s)[1]) for s in dataset.evaluation]
    )
    labeled = data.load(asked.adapt_data, CACHE) if asked.adapt_data else None
    need = any(name in losses.NEED_CAPTIONS for name in losses.active(asked.losses))
    captions = asked.student.text is not None or (need and asked.losses.captions == "data")
    _check(dataset, asked, captions, path)
    if asked.qat:
        quantized.check(*target.load(asked.qat.target), len(dataset.train))
    return dataset, labeled, captions


def _with_evaluation(dataset: data.Dataset, other: data.Dataset) -> data.Dataset:
    if dataset.classes and dataset.classes != other.classes:
        raise EdgeclipError(
            "evaluation_data",
            "has another class list than data",
            "set data.classes to null, or use one class list",
        )
    everything = list(range(len(other.classes)))
    return dataset._replace(
        classes=other.classes,
        templates=other.templates,
        train_classes=everything,
        evaluation=other.evaluation,
        license=f"{dataset.license}; {other.name}: {other.license}",
    )


def _check(dataset: data.Dataset, asked: Recipe, captions: bool, path: Path) -> None:
    for name in losses.active(asked.losses):
        if not dataset.classes and (
            name in losses.NEED_CLASSES or (name in losses.NEED_CAPTIONS and not captions)
        ):
            raise EdgeclipError(
                f"{path}: losses.{name}",
                "needs a class list, and the data has none",
                "give data.classes or evaluation_data",
            )
        if lacks := cache.lacking(
            asked, name in losses.NEED_CLASSES, name in losses.NEED_CAPTIONS, bool(dataset.classes)
        ):
            raise EdgeclipError(f"{path}: losses.{name}", *lacks)
        if name in losses.NEED_LABELS and not dataset.labeled:
            raise EdgeclipError(
                f"{path}: losses.{name}",
                "needs labels, and the data has no labeled images",
                "drop the loss, or label some",
            )
    if asked.fuse and not dataset.classes:
        raise EdgeclipError(
            f"{path}: fuse",
            "needs a class list, and the data has none",
            "give data.classes or evaluation_data",
        )
    first = asked.train.pretrain
    if first and first.labels == "predictions" and not dataset.classes:
        raise EdgeclipError(
            f"{path}: train.pretrain.labels",
            "predictions need a class list, and the data has none",
            "use labels: features",
        )
    if asked.student.class_features == "student" and not dataset.classes:
        raise EdgeclipError(
            f"{path}: student.class_features",
            "needs a class list, and the data has none",
            "take the teacher's",
        )
    if dataset.evaluation and not dataset.classes:
        raise EdgeclipError(
            f"{path}: data",
            "has images to evaluate on and no class list",
            "give data.classes or evaluation_data, or set data.test to null",
        )
    if captions and any(not p.caption for p in dataset.train):
        missing = next(p for p in dataset.train if not p.caption)
        raise EdgeclipError(
            f"{path}: losses",
            f"a loss or student.text needs captions, and image '{missing.key}' of {missing.path} has none",
            "add .txt files, or drop what needs them",
        )
    if not dataset.evaluation or not all(s.images for s in dataset.evaluation):
        empty = next((s.name for s in dataset.evaluation if not s.images), "")
        raise EdgeclipError(
            f"{path}: data",
            f"has no images to evaluate on {empty}".rstrip(),
            "give a test part or evaluation_data",
        )
    if len(dataset.train) < 2:
        raise EdgeclipError(
            path,
            f"the data has {len(dataset.train)} training images",
            "give two at least: losses and batch norm compare images",
        )
    share = min(asked.train.batch_size, len(dataset.train)) // distributed.world_size()
    if share < asked.train.accumulate:
        raise EdgeclipError(
            f"{path}: train.batch_size",
            f"gives each of {distributed.world_size()} processes {share} images for {asked.train.accumulate} parts",
            "raise it, or lower accumulate",
        )


def check_student(dataset: data.Dataset, asked: Recipe, embed_dim: int) -> None:
    """Builds the student once for nothing: what cannot be built is refused before the teacher has run."""
    student, preprocess = students.build(asked.student, embed_dim)
    if asked.qat:
        quantized.check_student(student, preprocess.size, asked.qat.target)
    if asked.train.gradient_checkpointing:
        students.checkpoint_gradients(student.tower)
    if asked.student.text:
        text = students.build_text(asked.student.text, embed_dim)
        classes = [dataset.classes[i] for i in dataset.train_classes]
        students.token_ids(text, prompts(classes, dataset.templates))
