"""A recipe: the complete description of one training run, and nothing but a description.

Read `recipes/quickstart.yaml` beside this file. Every field has its meaning and unit under it; a field that the
papers leave open (METHODS ambiguities A1 to A13) is a field here, with the default that was chosen.

Weights are named in one small language, here for teachers and students alike:
`random` | `pip:PACKAGE` (weights that a Python package ships) | `hub:TAG` (open_clip's or timm's pretrained tag) | a file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgeclip import config, disk
from edgeclip.config import Config
from edgeclip.errors import EdgeclipError
from edgeclip.host.recipe.ingredients import (
    Adapt,
    Conse,
    Csv,
    Data,
    DataFile,
    Embeddings,
    Folders,
    Fuse,
    OpenClip,
    OpenMoji,
    Prompts,
    Reinforced,
    ResidualHead,
    SelfTraining,
    Share,
    Stem,
    Student,
    Teacher,
    Timm,
    Views,
    VisualPrompts,
    WebDataset,
)
from edgeclip.host.recipe.training import (
    KL,
    QAT,
    Affinity,
    Bench,
    Distribution,
    EduAttention,
    IFAlign,
    Losses,
    MaskedFeature,
    Parity,
    Pretrain,
    Train,
    Weighted,
)

__all__ = [
    "KL",
    "QAT",
    "Adapt",
    "Affinity",
    "Bench",
    "Conse",
    "Csv",
    "Data",
    "DataFile",
    "Distribution",
    "EduAttention",
    "Embeddings",
    "Folders",
    "Fuse",
    "IFAlign",
    "Losses",
    "MaskedFeature",
    "OpenClip",
    "OpenMoji",
    "Parity",
    "Pretrain",
    "Prompts",
    "Recipe",
    "Reinforced",
    "ResidualHead",
    "SelfTraining",
    "Share",
    "Stem",
    "Student",
    "Teacher",
    "Timm",
    "Train",
    "Views",
    "VisualPrompts",
    "WebDataset",
    "Weighted",
    "check",
    "data_sets",
    "description",
    "load",
    "of_run",
    "replace_data",
    "roots",
]


class Recipe(Config):
    data: Data
    teacher: Teacher
    student: Student
    losses: Losses
    other_teachers: tuple[Teacher, ...] = ()
    """further teachers of the same images (MobileCLIP, MST-KD): `kl` and `distribution` average the probabilities of all, each
    with its own logit scale; the student lives in the first one's space, and whose classifier is assembled is adapted like it"""
    fuse: Fuse | None = None
    """the teachers' features side by side and one learned linear map into the first one's space, in place of the average"""
    evaluation_data: Data | None = None
    """another set to evaluate on, whose class list the KL uses when `data` has none; null: `data`'s own test part"""
    adapt_data: Data | None = None
    """the labeled set of stage 1, with classes of its own (cross-dataset); null: `data`'s own labeled part"""
    shifts: tuple[Data, ...] = ()
    """further sets to evaluate on whose classes are among those of the evaluation, by name (domain generalization)"""
    adapt: Adapt | None = None
    """null: the teacher is taken as it is"""
    views: Views = Views()
    train: Train = Train()
    qat: QAT | None = None
    """null: the student is quantized after training alone"""
    parity: Parity = Parity()
    bench: Bench | None = None
    """a short run for this recipe's `bench`; null: the device profile's own minimum"""
    text_encoder: bool = True
    """ship a text encoder in the bundle, for words that were never baked: the student's where it has one, else the teacher's"""
    seed: int = 0


def load(path: Path, roots: tuple[str, ...] = ()) -> Recipe:
    """The recipe at `path`, with each `--data` value of `roots` (DIR or NAME=DIR) put where it belongs."""
    recipe = config.load(path, Recipe)
    check(recipe, path)
    for given in roots:
        recipe = _with_root(recipe, given)
    return recipe


def _with_root(recipe: Recipe, given: str) -> Recipe:
    names = list(
        dict.fromkeys(d.name for d in data_sets(recipe).values() if not isinstance(d, OpenMoji))
    )
    name, equals, root = given.partition("=")
    if not equals:
        if len(names) != 1:
            raise EdgeclipError(
                f"--data {given}",
                f"the recipe has not exactly one folder to name (its data: {', '.join(names) or 'none'})",
                "use --data NAME=DIR",
            )
        name, root = names[0], given
    if name not in names:
        raise EdgeclipError(
            f"--data {given}",
            f"the recipe has no data named '{name}'",
            f"use one of: {', '.join(names)}",
        )
    return replace_data(
        recipe,
        lambda d: (
            msgspec.structs.replace(d, root=root)
            if d.name == name and not isinstance(d, OpenMoji)
            else d
        ),
    )


DATA_FIELDS = ("data", "evaluation_data", "adapt_data", "shifts")
"""Every field of a recipe that names data: one set, none, or several."""


def data_sets(recipe: Recipe) -> dict[str, Data]:
    """Where in the recipe, to data: {"data": ..., "shifts.0": ..., ...}."""
    found: dict[str, Data] = {}
    for field in DATA_FIELDS:
        value = getattr(recipe, field)
        found |= (
            {f"{field}.{i}": d for i, d in enumerate(value)}
            if isinstance(value, tuple)
            else {field: value}
            if value
            else {}
        )
    return found


def replace_data(recipe: Recipe, change: Callable[[Data], Data]) -> Recipe:
    """The recipe with each of its data sets changed."""
    new: dict[str, Any] = {}
    for field in DATA_FIELDS:
        value = getattr(recipe, field)
        new[field] = (
            tuple(map(change, value))
            if isinstance(value, tuple)
            else change(value)
            if value
            else None
        )
    return msgspec.structs.replace(recipe, **new)


def check(recipe: Recipe, where: object) -> None:
    """What no single field can tell: combinations that cannot work."""
    losses = recipe.losses
    if losses.edu_attention and not losses.kl:
        raise EdgeclipError(
            f"{where}: losses.edu_attention",
            "has no loss of its own",
            "add losses.kl, which trains it",
        )
    if not any(
        isinstance(getattr(losses, f), Config) and f != "edu_attention"
        for f in losses.__struct_fields__
    ):
        raise EdgeclipError(
            f"{where}: losses", "is empty", "add at least one loss, for example kl: {}"
        )
    if recipe.student.inherit and recipe.student.tower.weights != "random":
        raise EdgeclipError(
            f"{where}: student.inherit",
            "would overwrite the weights of student.tower",
            "give the tower weights: random",
        )
    if recipe.student.class_features == "student" and not recipe.student.text:
        raise EdgeclipError(
            f"{where}: student.class_features",
            "the student has no text tower",
            "give student.text, or take the teacher's",
        )
    for field in ("batch_size", "warmup_batch_size"):
        if recipe.student.projector_hidden and getattr(recipe.train, field) == 1:
            raise EdgeclipError(
                f"{where}: train.{field}",
                "is 1, and the projector's batch norm needs two",
                "raise it, or set student.projector_hidden to null",
            )
    if losses.if_align and losses.if_align.axis == "tokens":
        raise EdgeclipError(
            f"{where}: losses.if_align.axis: tokens",
            "needs token_features, which a teacher cache does not hold",
            "use axis: batch",
        )
    align = losses.if_align
    if align and align.axis == "channels" and align.momentum:
        raise EdgeclipError(
            f"{where}: losses.if_align.momentum",
            "channels have no statistics that outlive a batch",
            "use axis: batch",
        )
    if align and align.features == "head" and not align.normalize:
        raise EdgeclipError(
            f"{where}: losses.if_align",
            "EduAttention's output has no raw form",
            "use normalize: true, or features: image",
        )
    if losses.captions == "classes" and recipe.student.text:
        raise EdgeclipError(
            f"{where}: losses.captions: classes",
            "a student's text tower reads the captions themselves",
            "use captions: data",
        )
    edu = losses.edu_attention
    if edu and edu.keep and (edu.query == "raw" or edu.axis == "batch"):
        raise EdgeclipError(
            f"{where}: losses.edu_attention",
            "this reading needs more than one image's unit feature",
            "set keep: false",
        )
    if isinstance(recipe.adapt, ResidualHead) and not isinstance(recipe.teacher, Conse):
        raise EdgeclipError(
            f"{where}: adapt",
            "a residual_head is for the assembled teacher (kind: conse) only",
            "use kind: prompts, or set adapt to null",
        )
    if isinstance(recipe.adapt, Prompts) and not isinstance(recipe.teacher, OpenClip):
        raise EdgeclipError(
            f"{where}: adapt",
            "prompts are for an open_clip teacher only",
            "use kind: residual_head, or set adapt to null",
        )
    for field, teacher in [
        ("teacher", recipe.teacher),
        *((f"other_teachers.{i}", t) for i, t in enumerate(recipe.other_teachers)),
    ]:
        if isinstance(teacher, Conse) and "{c}" not in teacher.anchor_prompt:
            raise EdgeclipError(
                f"{where}: {field}.anchor_prompt",
                f"'{teacher.anchor_prompt}' has no {{c}}",
                "write {c} where the class's name goes",
            )
        if not isinstance(teacher, Embeddings | Reinforced):
            continue
        if teacher.text and teacher.class_features:
            raise EdgeclipError(
                f"{where}: {field}", "has both text and class_features", "give one of them"
            )
        if isinstance(teacher, Embeddings) and losses.if_align and not losses.if_align.normalize:
            raise EdgeclipError(
                f"{where}: losses.if_align",
                f"needs the teacher's norms, which {field} (kind: embeddings) has lost",
                "use normalize: true",
            )
    head = recipe.adapt
    if (
        isinstance(head, ResidualHead)
        and head.self_training
        and head.self_training.start >= head.steps
    ):
        raise EdgeclipError(
            f"{where}: adapt.self_training.start",
            f"is beyond the {head.steps} steps of stage 1",
            "start earlier, or set it to null",
        )
    if recipe.fuse and not recipe.other_teachers:
        raise EdgeclipError(
            f"{where}: fuse", "needs several teachers", "add other_teachers, or set fuse to null"
        )
    first = recipe.teacher
    if (
        isinstance(first, Embeddings | Reinforced)
        and not first.text
        and recipe.text_encoder
        and not recipe.student.text
    ):
        raise EdgeclipError(
            f"{where}: text_encoder",
            "the teacher has none to ship",
            "set text_encoder: false, or give teacher.text",
        )
    if recipe.adapt_data and not recipe.adapt:
        raise EdgeclipError(
            f"{where}: adapt_data",
            "is for stage 1, and adapt is null",
            "add adapt: {kind: residual_head}, or set adapt_data to null",
        )


def description(recipe: Recipe) -> dict[str, Any]:
    """What decides the outcome, JSON-able: the recipe without the folders where its data lie."""
    value: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode(recipe)
    )  # as it will be read again
    for field in data_sets(recipe):
        _at(value, field).pop("root", None)
    return value


def roots(recipe: Recipe) -> dict[str, str]:
    """Where the data lay, from wherever one looks: what `description` leaves out."""
    return {
        f: str(Path(d.root).absolute())
        for f, d in data_sets(recipe).items()
        if not isinstance(d, OpenMoji)
    }


def of_run(run: Path) -> Recipe:
    """The recipe of a run folder, with the roots that its data had."""
    value = disk.read_json(run / "recipe.json")
    for field, root in disk.read_json(run / "roots.json").items():
        _at(value, field)["root"] = root
    return config.convert(value, Recipe, run / "recipe.json")


def _at(value: dict[str, Any], field: str) -> dict[str, Any]:
    """The data at `field` of a recipe as JSON: "data", or "shifts.0"."""
    name, dot, index = field.partition(".")
    found: dict[str, Any] = value[name][int(index)] if dot else value[name]
    return found
