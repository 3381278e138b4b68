"""`edgeclip evaluate`: what a finished run is worth under a protocol, on its own sets or others.

    zero_shot              every test image against all classes of its set, each class an ensemble
                           of the set's prompts
    base_to_novel          the first half of the classes and the second, each scored within itself;
                           their harmonic mean
    cross_dataset          zero_shot on several sets, one table, and the average
    domain_generalization  the training set and its shifts, which have the same class list or a part
                           of it; the average is over the shifts
    retrieval              captions by image and images by caption. Captions of equal text are one
                           text, which belongs to every image that has it; any of a query's own
                           counts as a hit

Each table says of each set how many images and classes it has, what chance would reach, and whether
it is transductive, that is whether the student saw training images of this very set. One that has
the name of the recipe's data is taken for it; of every other one the images themselves are compared
with the training images (overlap.py), and where they cannot be, that is said. Protocols that train
are recipes (`data.protocol`, `adapt_data`, `shifts`); nothing is trained here. Source:
docs/design/methods.md#10-protocols; PromptKD (CVPR 2024), CLIP_benchmark's retrieval.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from edgeclip import disk
from edgeclip.device import metrics
from edgeclip.device.images import ImageRef
from edgeclip.device.manifest import ClassOffset
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.turned import say_turned
from edgeclip.device.zero_shot import ensemble, offsets, prompts
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host import cache, distributed, recipe, teachers
from edgeclip.host import student as students
from edgeclip.host.adapt import promptsrc
from edgeclip.host.adapt.residual_head import adapted
from edgeclip.host.data import Dataset
from edgeclip.host.evaluation import overlap
from edgeclip.host.evaluation.notes import note, overlap_result
from edgeclip.host.evaluation.scores import (
    Answers,
    ImageFeatures,
    image_features,
    mean_over,
    score,
    teacher_features,
)
from edgeclip.host.evaluation.sets import Loaded, headline_images, load_sets
from edgeclip.host.recipe import Recipe
from edgeclip.host.student import EduAttentionHead, Student
from edgeclip.host.teachers import Teacher, TextTower
from edgeclip.progress import say
from edgeclip.reports.results import (
    PROTOCOLS,
    AccuracyRecord,
    BothWays,
    EduAttentionResult,
    ProtocolRecord,
    Recall,
    RetrievalRecord,
    RetrievalScore,
    SetScore,
    read_results,
    write_protocol,
)


class TeacherSide(NamedTuple):
    """The teacher of a finished run, as far as it is at hand."""

    teacher: Teacher | None
    tower: nn.Module | None
    """folded; None: not at hand"""
    missing: str
    """why it is not scored; empty: it is"""
    class_offset: ClassOffset | None = None
    """what its scores of classes with labels are set back by"""


class Run(NamedTuple):
    """A finished run, ready to answer."""

    folder: Path
    recipe: Recipe
    student: Student
    head: EduAttentionHead | None
    text: TextTower | None
    """the student's own"""
    preprocess: Preprocess
    description: Json
    """student.json"""
    teacher: TeacherSide
    device: torch.device


class TextSide(NamedTuple):
    """What encodes new words for the student."""

    what: str
    encode: Callable[[list[str]], np.ndarray]
    """texts to unit features [n, D]"""


def evaluate(folder: Path, protocol: str, given: tuple[str, ...] = ()) -> ProtocolRecord:
    """Score the run in `folder` under a protocol, write the record into its reports, and return it.

    given: sets by NAME=DIR, folder (CLIP_benchmark's layout) or YAML file (one `data` block); none:
    the run's own. Raises `EdgeclipError` where a set lacks what the protocol needs.
    """
    if protocol not in PROTOCOLS:
        raise EdgeclipError(
            f"protocol '{protocol}'", "is not known", did_you_mean(protocol, PROTOCOLS)
        )
    disk.refuse_unwritable(folder / "reports")
    with disk.shared(folder):
        return _evaluate(folder, protocol, given)


def _evaluate(folder: Path, protocol: str, given: tuple[str, ...]) -> ProtocolRecord:
    disk.read_manifest(folder, "run")
    asked = recipe.of_run(folder)
    loaded = load_sets(folder, asked, protocol, given)
    images = [s.images for _, dataset in loaded for s in dataset.evaluation]
    say_turned(images, asked.preprocess.exif)
    if isinstance(asked.adapt, recipe.Prompts):
        # The learned context takes the place of the set's templates.
        loaded = [(spec, d._replace(templates=promptsrc.TEMPLATES)) for spec, d in loaded]
    training = overlap.load(folder)
    loaded = [(spec, overlap.compared(d, training)) for spec, d in loaded]
    record = _record(_open(folder, asked), protocol, loaded)
    sources = "+".join(dict.fromkeys(s.of or s.name for s in record.sets))
    name = re.sub(r"[^\w+.-]", "_", sources)
    path = folder / "reports" / f"evaluate-{protocol}-{name}.json"
    record = replace(record, report=str(path))
    write_protocol(path, record)
    return record


def _record(run: Run, protocol: str, loaded: list[Loaded]) -> ProtocolRecord:
    """Return the record of a protocol, its path left empty."""
    edu_attention = None
    if run.head is not None:
        edu_attention = EduAttentionResult(alpha=run.head.alpha.item(), kept=run.head.spec.keep)
    name = None
    if run.teacher.teacher is not None:
        name = run.teacher.teacher.name
    common: dict[str, Any] = {
        "run": str(run.folder),
        "protocol": protocol,
        "student": disk.sha256(run.folder / "student" / disk.MANIFEST),
        "teacher": name,
        "teacher_missing": run.teacher.missing or None,
        "edu_attention": edu_attention,
        "report": "",
    }
    if protocol == "retrieval":
        text = text_side(run)
        rows = [_retrieval(run, text, loaded_set) for loaded_set in loaded]
        return RetrievalRecord(sets=tuple(rows), text_side=text.what, **common)
    if protocol == "base_to_novel" and len(loaded) > 1:
        raise EdgeclipError(
            "base_to_novel", f"takes one set, not {len(loaded)}", "call it once for each"
        )
    sets, texts = _zero_shot(run, loaded)
    return AccuracyRecord(
        sets=tuple(sets),
        text_side="; ".join(dict.fromkeys(texts)),
        **_means(protocol, sets),
        **common,
    )


def _means(protocol: str, sets: list[SetScore]) -> dict[str, Any]:
    """Return the fields of a record that sum its sets up, as the protocol does."""
    if protocol == "base_to_novel":
        means = mean_over(sets, lambda top1: metrics.harmonic_mean(*top1))
        what = "harmonic_mean"
    elif protocol in ("cross_dataset", "domain_generalization"):
        if protocol == "domain_generalization":
            sets = [s for s in sets if s.shift]
        means = mean_over(sets, lambda top1: float(np.mean(top1)))
        what = "average"
    else:
        return {}
    return {what: means.over_all_labels, f"own_list_{what}": means.within_own_lists}


# --- the run


def _open(folder: Path, asked: Recipe) -> Run:
    saved = students.read(folder / "student")
    student, head, preprocess, description = students.load(saved)
    return Run(
        folder=folder,
        recipe=asked,
        student=student,
        head=head,
        text=students.load_text(saved),
        preprocess=preprocess,
        description=description,
        teacher=_teacher(folder, asked),
        device=distributed.pick_device(asked.train.device),
    )


def _teacher(folder: Path, asked: Recipe) -> TeacherSide:
    """Return the teacher as it taught; without its weights its column is not measured."""
    try:
        teacher = teachers.load(asked.teacher, asked.preprocess)
    except EdgeclipError as e:  # the weights need not be at hand any more
        say(f"teacher: {e}")
        return TeacherSide(None, None, str(e))
    if isinstance(asked.adapt, recipe.Prompts):
        teacher = promptsrc.adapted(teacher, asked.adapt, folder / "teacher")
    elif isinstance(asked.adapt, recipe.ResidualHead):
        teacher = adapted(teacher, asked.adapt, folder / "teacher")
    if asked.fuse:
        missing = "several teachers are fused, and only distill scores them"
        return TeacherSide(teacher, None, missing)
    offset = read_results(folder).teachers_class_offset
    return TeacherSide(teacher, teachers.folded(teacher), "", offset)


def text_side(run: Run) -> TextSide:
    """Return what encodes new words for the student, as in its bundle.

    It is the student's own text tower where it has one, else the teacher's. Raises `EdgeclipError`
    where neither is at hand.
    """
    if run.text is not None:
        text = run.text
        return TextSide(
            "the student's own text tower",
            lambda texts: students.text_features(text, texts).numpy(),
        )
    teacher = run.teacher.teacher
    if teacher is None:
        raise EdgeclipError(
            "evaluate",
            f"texts need the teacher's text encoder, and there is none ({run.teacher.missing})",
            "get the teacher's weights",
        )
    return TextSide(
        f"the text encoder of {teacher.name}", lambda texts: teacher.encode_text(texts).numpy()
    )


class ClassFeatures(NamedTuple):
    """The class features that a set is scored with."""

    what: str
    """where they come from, for people"""
    student: np.ndarray
    """[N, D]"""
    teacher: np.ndarray | None
    """[N, D]; None: the teacher is not at hand"""


def _class_features(run: Run, dataset: Dataset) -> ClassFeatures:
    teacher = run.teacher.teacher
    described = (run.description["labels"], tuple(run.description["templates"]))
    if described == (dataset.classes, dataset.templates):
        own = disk.read_array(run.folder / "student" / "class_features.npy")
        if run.recipe.student.class_features == "student":
            what = "the class features that the run keeps, its own text tower's"
            return ClassFeatures(what, own, _teachers(teacher, dataset))
        theirs = None
        if teacher is not None:
            theirs = own
        return ClassFeatures("the class features that the run keeps, its teacher's", own, theirs)

    text = text_side(run)
    if teacher is not None:
        teachers.check_class_names(teacher, dataset.classes, dataset.templates)
    features = text.encode(prompts(dataset.classes, dataset.templates))
    features = features.reshape(len(dataset.classes), len(dataset.templates), -1)
    return ClassFeatures(text.what, ensemble(features), _teachers(teacher, dataset))


def _teachers(teacher: Teacher | None, dataset: Dataset) -> np.ndarray | None:
    if teacher is None:
        return None
    return cache.class_features(teacher, dataset.classes, dataset.templates)


def _student_images(run: Run, images: list[ImageRef], what: str) -> ImageFeatures:
    return image_features(run.student, images, run.preprocess, f"student: {what}", run.device)


def _teacher_images(run: Run, images: list[ImageRef], what: str) -> ImageFeatures | None:
    teacher = run.teacher.teacher
    tower = run.teacher.tower
    if teacher is None or tower is None:
        return None
    return teacher_features([(teacher, tower)], None, images, what, run.device)


# --- the protocols


def _zero_shot(run: Run, loaded: list[Loaded]) -> tuple[list[SetScore], list[str]]:
    """Return every set's row, and where the class features of each data set come from."""
    head = None
    keep_head = False
    if run.head is not None:
        head = run.head.numpy()
        keep_head = run.head.spec.keep
    rows: list[SetScore] = []
    texts: list[str] = []
    for spec, dataset in loaded:
        classes = _class_features(run, dataset)
        texts.append(classes.what)
        for s in dataset.evaluation:
            if not s.headline:
                continue
            of_student = _student_images(run, s.images, s.name)
            of_teacher = _teacher_images(run, s.images, s.name)
            teacher = None
            if of_teacher is not None and classes.teacher is not None:
                set_back = offsets(run.teacher.class_offset, dataset.classes)
                teacher = Answers(*of_teacher[:2], classes.teacher, set_back)
            known = note(run.recipe, spec, s)
            set_back = offsets(students.class_offset(run.description), dataset.classes)
            student = Answers(*of_student[:2], classes.student, set_back)
            row = score(s._replace(note=known.text), student, teacher, head, keep_head)
            source = spec.name
            if s.shift:
                source = s.name
            rows.append(
                replace(
                    row,
                    of=source,
                    transductive=known.transductive,
                    shift=s.shift,
                    templates=len(dataset.templates),
                )
            )
    return rows, texts


def _retrieval(run: Run, text: TextSide, loaded: Loaded) -> RetrievalScore:
    """Return the recall of captions by image and of images by caption."""
    spec, dataset = loaded
    sets = [s for s in dataset.evaluation if s.headline]
    images = headline_images(dataset)
    position: dict[str, int] = {}
    text_of = []
    for image in images:
        text_of.append(position.setdefault(image.caption, len(position)))
    texts = list(position)
    groups = np.array(text_of)

    of_student = _student_images(run, images, spec.name)
    of_teacher = _teacher_images(run, images, spec.name)
    theirs = None
    if of_teacher is not None and run.teacher.teacher is not None:
        encoded = run.teacher.teacher.encode_text(texts).numpy()
        theirs = _recall(of_teacher, groups, encoded)
    # All of them are one set here, as `headline_images` has put them together.
    whole = sets[0]._replace(images=images, overlap=overlap.joined(sets))
    known = note(run.recipe, spec, whole)
    return RetrievalScore(
        name=f"{spec.name} test",
        of=spec.name,
        note=f"{known.text}; {len(texts)} different captions, each belonging to every image that"
        " has it; no class list, so no EduAttention",
        transductive=known.transductive,
        overlap=overlap_result(whole),
        images=len(of_student.kept),
        texts=len(texts),
        teacher=theirs,
        student=_recall(of_student, groups, text.encode(texts)),
    )


def _recall(found: ImageFeatures, groups: np.ndarray, texts: np.ndarray) -> BothWays:
    """Return the recall between images and texts; groups: [images] each image's row of `texts`."""
    kept = groups[found.kept]
    present = np.unique(kept)  # a text whose every image is unreadable is no query
    ways = metrics.recall_both_ways(found.features, texts[present], kept, present)
    return BothWays(
        image_to_text=Recall(**ways["image_to_text"]),
        text_to_image=Recall(**ways["text_to_image"]),
    )
