"""What `edgeclip distill` does before it trains: loads the data and refuses what cannot work."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from edgeclip import disk
from edgeclip.device import target
from edgeclip.device.turned import say_turned
from edgeclip.device.zero_shot import prompts
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, data, distributed, recipe, teachers
from edgeclip.host import student as students
from edgeclip.host.adapt import promptsrc
from edgeclip.host.cache import CACHE, TeacherCache
from edgeclip.host.cache.inspect import inspect
from edgeclip.host.data import Dataset, enough
from edgeclip.host.distill import losses, qat, small_sets
from edgeclip.host.distill.run_folder import claim
from edgeclip.host.evaluation import overlap
from edgeclip.host.evaluation.notes import note
from edgeclip.host.recipe import Recipe
from edgeclip.host.teachers import Teacher
from edgeclip.progress import is_rank_zero

CLASS_LIST = "give data.classes or evaluation_data"


class Inputs(NamedTuple):
    """A recipe and its data."""

    path: Path
    """of the recipe"""
    recipe: Recipe
    device: torch.device
    dataset: Dataset
    """what the student is trained and scored on"""
    labeled: Dataset | None
    """stage 1's labeled data; None: they are `dataset`'s"""
    captions: bool
    """whether a caption is needed of every image"""


class FirstTeacher(NamedTuple):
    """The teacher in whose space the student lives, as stage 1 finds it."""

    teacher: Teacher
    prompted: Teacher | None
    """the same with untrained prompts; None: the recipe asks for none"""


def load_inputs(path: Path, recipe: Recipe, device: torch.device) -> Inputs:
    """Return the recipe's data, loaded and checked.

    Raises `EdgeclipError` where something that the recipe asks for cannot be had of the data.
    """
    dataset = data.load(recipe.data, CACHE)
    if recipe.evaluation_data:
        dataset = _with_evaluation(dataset, data.load(recipe.evaluation_data, CACHE))
    for spec in recipe.shifts:
        shifts = data.shift_sets(dataset, data.load(spec, CACHE))
        dataset = dataset._replace(evaluation=dataset.evaluation + shifts)
    labeled = None
    if recipe.adapt_data:
        labeled = data.load(recipe.adapt_data, CACHE)
    captions = _needs_captions(recipe)
    inputs = Inputs(path, recipe, device, dataset, labeled, captions)
    _check_losses(inputs)
    _check_class_list(inputs)
    _check_images(inputs)
    small_sets.refuse(dataset, labeled, recipe)
    small_sets.warn(dataset, labeled, recipe)
    _refuse_telling_captions(inputs)
    images = [dataset.train, *(s.images for s in dataset.evaluation)]
    if labeled is not None:
        images.append(labeled.labeled)
    say_turned(images, recipe.preprocess.exif)
    if recipe.qat:
        qat.check(*target.load(recipe.qat.target), len(dataset.train))
    return inputs


def first_teacher(inputs: Inputs, run: Path, fresh: bool) -> FirstTeacher:
    """Return the first teacher, and claim the run folder once nothing speaks against the recipe.

    Raises `EdgeclipError` for a teacher or a student that cannot work; the folder is not made then.
    """
    recipe = inputs.recipe
    dataset = inputs.dataset
    teacher = teachers.load(recipe.teacher, recipe.preprocess)
    teachers.check_class_names(teacher, dataset.classes, dataset.templates)
    labeled = dataset
    if inputs.labeled is not None:
        labeled = inputs.labeled
        teachers.check_class_names(teacher, labeled.classes, labeled.templates)
    prompted = None
    spec = prompts_of(recipe)
    if spec is not None:
        prompted = promptsrc.with_prompts(teacher, labeled, dataset.classes, spec, recipe.seed)
    if fresh or not (run / "student" / disk.MANIFEST).exists():
        _check_student(dataset, recipe, teacher.embed_dim)
    distributed.barrier()
    with distributed.rank_zero_first():
        if not distributed.rank():
            claim(run, inputs.path, recipe, fresh)
    return FirstTeacher(teacher, prompted)


def compare_images(inputs: Inputs, run: Path) -> Inputs:
    """Return the inputs with evaluation sets that were compared with the training images.

    The hashes of these are kept in the run's folder, for `evaluate`. Rank 0 alone looks: it scores.
    """
    if not is_rank_zero():
        return inputs
    dataset = inputs.dataset
    parts = [dataset.train]
    if inputs.labeled is not None:
        parts.append(inputs.labeled.labeled)
    threads = inputs.recipe.train.threads
    dataset = overlap.compared(dataset, overlap.keep(run, parts, threads), threads)
    overlap.say_overlaps(dataset)
    spec = inputs.recipe.evaluation_data or inputs.recipe.data
    evaluation = []
    for s in dataset.evaluation:
        evaluation.append(s._replace(note=note(inputs.recipe, spec, s).text))
    return inputs._replace(dataset=dataset._replace(evaluation=evaluation))


def prompts_of(asked: Recipe) -> recipe.Prompts | None:
    """Return the prompts (PromptSRC) that stage 1 trains; None: it trains none."""
    if isinstance(asked.adapt, recipe.Prompts):
        return asked.adapt
    return None


def residual_head_of(asked: Recipe) -> recipe.ResidualHead | None:
    """Return the residual head that stage 1 trains; None: it trains none."""
    if isinstance(asked.adapt, recipe.ResidualHead):
        return asked.adapt
    return None


def teacher_cache(
    inputs: Inputs,
    teacher: Teacher,
    tower: nn.Module | None,
    dataset: Dataset,
    captions: bool,
    out: Path | None = None,
) -> TeacherCache:
    """Return the teacher's cache of the data, built where it is not there yet.

    tower: the teacher's, folded. out: its folder, instead of cache/<fingerprint>.
    """
    ingredients = cache.Ingredients(
        teacher,
        tower,
        dataset,
        inputs.recipe.views,
        inputs.recipe.seed,
        captions,
        inputs.device,
        inputs.recipe.train.threads,
    )
    return cache.build(CACHE, ingredients, out)


def stage_1_data(labeled: Dataset) -> Dataset:
    """Return stage 1's data of its own, of which only the labeled images count."""
    return labeled._replace(train=labeled.labeled)


def build_for(path: Path, roots: tuple[str, ...] = (), out: Path | None = None) -> list[Json]:
    """Build every cache that `distill` would make of a recipe; return what `inspect` says of each.

    out: folder of the only teacher's cache, instead of cache/<fingerprint>. Raises `EdgeclipError`
    where the rows depend on a stage 1 that has not run.
    """
    asked = recipe.load(path, roots)
    if prompts_of(asked) is not None:
        raise EdgeclipError(
            f"{path}: adapt",
            "prompts change the rows, and stage 1 makes them",
            f"use: edgeclip distill {path}",
        )
    own_stage_1 = asked.adapt_data is not None and residual_head_of(asked) is not None
    if out and (asked.other_teachers or own_stage_1):
        raise EdgeclipError(
            f"--out {out}",
            "is one folder, and the recipe needs several caches",
            "leave it out: they are found by their fingerprints",
        )
    disk.refuse_unwritable(out or CACHE)
    device = distributed.own(distributed.pick_device(asked.train.device))
    inputs = load_inputs(path, asked, device)
    dataset = inputs.dataset
    built = []
    for spec in (asked.teacher, *asked.other_teachers):
        teacher = teachers.load(spec, asked.preprocess)
        teachers.check_class_names(teacher, dataset.classes, dataset.templates)
        tower = teachers.folded(teacher)
        built.append(teacher_cache(inputs, teacher, tower, dataset, inputs.captions, out))
        if own_stage_1 and inputs.labeled and isinstance(spec, recipe.Conse):
            labeled = stage_1_data(inputs.labeled)
            built.append(teacher_cache(inputs, teacher, tower, labeled, False, out))
    return [inspect(cached.folder) for cached in built]


# --- checks


def _with_evaluation(dataset: Dataset, other: Dataset) -> Dataset:
    """Return `dataset` with the class list and the evaluation sets of `other`."""
    if dataset.classes and dataset.classes != other.classes:
        raise EdgeclipError(
            "evaluation_data",
            "has another class list than data",
            "set data.classes to null, or use one class list",
        )
    return dataset._replace(
        classes=other.classes,
        templates=other.templates,
        train_classes=list(range(len(other.classes))),
        evaluation=other.evaluation,
        halves=other.halves,
        license=f"{dataset.license}; {other.name}: {other.license}",
    )


def _needs_captions(recipe: Recipe) -> bool:
    if recipe.student.text is not None:
        return True
    if recipe.losses.captions != "data":
        return False
    return any(name in losses.NEED_CAPTIONS for name in losses.active(recipe.losses))


def _check_losses(inputs: Inputs) -> None:
    """Raise where a loss needs what data or teachers have not."""
    classes = bool(inputs.dataset.classes)
    for name in losses.active(inputs.recipe.losses):
        where = f"{inputs.path}: losses.{name}"
        by_class = name in losses.NEED_CLASSES
        by_caption = name in losses.NEED_CAPTIONS
        if not classes and (by_class or (by_caption and not inputs.captions)):
            raise EdgeclipError(where, "needs a class list, and the data has none", CLASS_LIST)
        lacking = cache.lacking(inputs.recipe, by_class, by_caption, classes)
        if lacking:
            raise EdgeclipError(where, *lacking)
        if name in losses.NEED_LABELS and not inputs.dataset.labeled:
            raise EdgeclipError(
                where,
                "needs labels, and the data has no labeled images",
                "remove the loss, or label some",
            )


def _check_class_list(inputs: Inputs) -> None:
    """Raise where something else than a loss needs a class list, and the data has none."""
    recipe = inputs.recipe
    if inputs.dataset.classes:
        return
    needs = "needs a class list, and the data has none"
    if recipe.fuse:
        raise EdgeclipError(f"{inputs.path}: fuse", needs, CLASS_LIST)
    if recipe.train.pretrain and recipe.train.pretrain.labels == "predictions":
        raise EdgeclipError(
            f"{inputs.path}: train.pretrain.labels",
            "predictions need a class list, and the data has none",
            "use labels: features",
        )
    if recipe.student.class_features == "student":
        where = f"{inputs.path}: student.class_features"
        raise EdgeclipError(where, needs, "use class_features: teacher")
    if inputs.dataset.evaluation:
        raise EdgeclipError(
            f"{inputs.path}: data",
            "has images to evaluate on and no class list",
            f"{CLASS_LIST}, or set data.test to null",
        )


def _check_images(inputs: Inputs) -> None:
    """Raise where there are too few images to train or to evaluate on, or one lacks its caption."""
    path = inputs.path
    train = inputs.dataset.train
    if inputs.captions:
        for image in train:
            if not image.caption:
                raise EdgeclipError(
                    f"{path}: losses",
                    "a loss or student.text needs captions,"
                    f" and image '{image.key}' of {image.path} has none",
                    "add .txt files, or remove what needs them",
                )
    evaluate_on = "give a test part or evaluation_data"
    if not inputs.dataset.evaluation:
        what = "has no images to evaluate on"
        if inputs.dataset.classes:
            of = enough.counts(inputs.dataset)
            what += f" (training images: {enough.without_test(of)})"
        raise EdgeclipError(f"{path}: data", what, evaluate_on)
    for s in inputs.dataset.evaluation:
        if not s.images:
            what = f"has no images to evaluate on {s.name}".rstrip()
            raise EdgeclipError(f"{path}: data", what, evaluate_on)
    if len(train) < 2:
        raise EdgeclipError(
            path,
            f"the data has {len(train)} training images",
            "give two at least: losses and batch norm compare images",
        )
    spec = inputs.recipe.train
    processes = distributed.world_size()
    share = _least_share(inputs.recipe, len(train))
    if share < spec.accumulate:
        raise EdgeclipError(
            f"{path}: train.batch_size",
            f"gives each of {processes} processes {share} images"
            f" for {spec.accumulate} micro-batches",
            "raise it, or lower accumulate",
        )


def _least_share(recipe: Recipe, images: int) -> int:
    """Return how many images of a batch each process has at least."""
    return min(recipe.train.batch_size, images) // distributed.world_size()


def _refuse_telling_captions(inputs: Inputs) -> None:
    """Raise where captions tell the classes of images whose labels are kept back."""
    dataset = inputs.dataset
    if not inputs.captions or not dataset.parted:
        return
    labeled = set(dataset.labeled_classes)
    names = [re.compile(rf"\b{re.escape(c)}\b", re.IGNORECASE) for c in dataset.classes]
    telling = []
    for image in dataset.train:
        novel = image.label >= 0 and image.label not in labeled
        if novel and names[image.label].search(image.caption):
            telling.append(image)
    if telling:
        raise EdgeclipError(
            f"{inputs.path}: losses.captions",
            f"the captions of {len(telling)} training images name the class that is to be novel"
            f" (the first: '{telling[0].caption}')",
            "use captions: classes, or a loss that needs none",
        )


def _check_student(dataset: Dataset, recipe: Recipe, embed_dim: int) -> None:
    """Build the student once for nothing, so that what cannot be built is refused in time."""
    student, preprocess = students.build(recipe.student, embed_dim)
    least = _least_share(recipe, len(dataset.train)) // recipe.train.accumulate
    if least == 1 and not recipe.train.freeze_batch_norm:
        _refuse_lone_image(student.tower, preprocess.size)
    if recipe.qat:
        qat.check_student(student, preprocess.size, recipe.qat.target)
    if recipe.train.gradient_checkpointing:
        students.checkpoint_gradients(student.tower)
    if recipe.student.text:
        text = students.build_text(recipe.student.text, embed_dim)
        classes = [dataset.classes[i] for i in dataset.train_classes]
        students.token_ids(text, prompts(classes, dataset.templates))


def _refuse_lone_image(tower: nn.Module, size: int) -> None:
    """Refuse a tower that cannot be trained on one image; the tower is spoiled by it."""
    try:
        with torch.no_grad():
            tower.train()(torch.zeros(1, 3, size, size))
    except ValueError:  # a batch norm that has one value a channel
        raise EdgeclipError(
            "train.batch_size",
            "leaves micro-batches of one image, and the batch norm of student.tower needs two",
            "raise it, lower accumulate, or set freeze_batch_norm: true",
        ) from None
