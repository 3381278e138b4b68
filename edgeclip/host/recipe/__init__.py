"""A recipe: the complete description of one training run, and nothing but a description.

Read `recipes/quickstart.yaml` beside this file. Every field has its meaning and unit under it; a
field that the papers leave open (METHODS ambiguities A1 to A13) is a field here, with the default
that was chosen.

Weights are named in one small language, here for teachers and students alike: `random` |
`pip:PACKAGE` (weights that a Python package ships) | `hub:TAG` (open_clip's or timm's pretrained
tag) | a file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgeclip import config, disk
from edgeclip.config import BrokenRule, Config
from edgeclip.device.target import Floor
from edgeclip.disk import Description, Json
from edgeclip.errors import EdgeclipError
from edgeclip.host import older
from edgeclip.host.recipe.adaptation import (
    Adapt,
    Fuse,
    Prompts,
    ResidualHead,
    SelfTraining,
)
from edgeclip.host.recipe.ingredients import (
    Conse,
    Csv,
    Data,
    DataFile,
    Embeddings,
    Folders,
    ImageOptions,
    OpenClip,
    OpenMoji,
    Reinforced,
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
    Calibration,
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
    "Calibration",
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
    "ImageOptions",
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
    """further teachers of the same images (MobileCLIP, MST-KD): `kl` and `distribution` average the
    probabilities of all, each with its own logit scale; the student lives in the first one's space,
    and whose classifier is assembled is adapted like it"""
    fuse: Fuse | None = None
    """the teachers' features side by side and one learned linear map into the first one's space, in
    place of the average"""
    evaluation_data: Data | None = None
    """another set to evaluate on, whose class list the KL uses when `data` has none; null: `data`'s
    own test part"""
    adapt_data: Data | None = None
    """the labeled set of stage 1, with classes of its own (cross-dataset); null: `data`'s own
    labeled part"""
    shifts: tuple[Data, ...] = ()
    """further sets to evaluate on whose classes are among those of the evaluation, by name (domain
    generalization)"""
    adapt: Adapt | None = None
    """null: the teacher is taken as it is"""
    preprocess: ImageOptions = ImageOptions()
    """what every tower's own preprocess does besides: turn photos by EXIF, lay transparent images
    on a color"""
    views: Views = Views()
    train: Train = Train()
    qat: QAT | None = None
    """null: the student is quantized after training alone"""
    calibration: Calibration | None = Calibration()
    """of classes with labels against those without; null: none is set back"""
    parity: Parity = Parity()
    floor: Floor = Floor()
    """what every bundle of this run must reach; a target's own comes before it"""
    bench: Bench | None = None
    """a short run for this recipe's `bench`; null: the device profile's own minimum"""
    text_encoder: bool = True
    """ship a text encoder in the bundle, for words that were never baked: the student's where it
    has one, else the teacher's"""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, each block's after its fields."""
        self._check_losses()
        self._check_batch_norm()
        self._check_teachers()
        self._check_stage_1()

    def _check_losses(self) -> None:
        if not self.losses.names():
            raise BrokenRule("losses", "has no loss", "add at least one, for example kl: {}")
        if self.losses.captions == "classes" and self.student.text:
            raise BrokenRule(
                "losses.captions",
                "classes is not possible with student.text, which reads the captions themselves",
                "use captions: data",
            )
        self._check_offset()
        align = self.losses.if_align
        if align is None or align.normalize:
            return
        for field, teacher in self.teachers().items():
            if isinstance(teacher, Embeddings):
                raise BrokenRule(
                    "losses.if_align",
                    f"needs the teacher's norms, which {field} (kind: embeddings) has lost",
                    "use normalize: true",
                )

    def _check_offset(self) -> None:
        if self.losses.kl is None or not self.losses.kl.offset:
            return
        if self.calibration is None:
            raise BrokenRule(
                "losses.kl.offset", "needs the offset of calibration", "set it to false"
            )
        if self.other_teachers and not self.fuse:
            raise BrokenRule(
                "losses.kl.offset",
                "is of one teacher's scores, and there are several",
                "set it to false, or fuse the teachers",
            )

    def _check_batch_norm(self) -> None:
        if not self.student.projector_hidden:
            return
        for field in ("batch_size", "warmup_batch_size"):
            if getattr(self.train, field) == 1:
                raise BrokenRule(
                    f"train.{field}",
                    "is 1, and the projector's batch norm needs at least 2 images",
                    "raise it, or set student.projector_hidden to null",
                )

    def _check_teachers(self) -> None:
        if self.fuse and not self.other_teachers:
            raise BrokenRule(
                "fuse", "needs several teachers", "add other_teachers, or set fuse to null"
            )
        for field, teacher in self.teachers().items():
            if self.preprocess.exif and isinstance(teacher, Reinforced):
                raise BrokenRule(
                    "preprocess.exif",
                    f"would turn images below the stored views of {field} (kind: reinforced)",
                    "set it to false",
                )
        first = self.teacher
        without_text = isinstance(first, Embeddings | Reinforced) and not first.text
        if without_text and self.text_encoder and not self.student.text:
            raise BrokenRule(
                "text_encoder",
                "the teacher has no text encoder to ship",
                "set text_encoder: false, or give teacher.text",
            )

    def _check_stage_1(self) -> None:
        if isinstance(self.adapt, ResidualHead) and not isinstance(self.teacher, Conse):
            raise BrokenRule(
                "adapt",
                "a residual_head is for the assembled teacher (kind: conse) only",
                "use kind: prompts, or set adapt to null",
            )
        if isinstance(self.adapt, Prompts) and not isinstance(self.teacher, OpenClip):
            raise BrokenRule(
                "adapt",
                "prompts are for an open_clip teacher only",
                "use kind: residual_head, or set adapt to null",
            )
        if self.adapt_data and not self.adapt:
            raise BrokenRule(
                "adapt_data",
                "is for stage 1, and adapt is null",
                "add adapt: {kind: residual_head}, or set adapt_data to null",
            )

    def teachers(self) -> dict[str, Teacher]:
        """Return every teacher by where the recipe names it: "teacher", "other_teachers.0"."""
        others = {f"other_teachers.{i}": t for i, t in enumerate(self.other_teachers)}
        return {"teacher": self.teacher, **others}


def load(path: Path, roots: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe at `path`, with each `--data` value of `roots` (DIR or NAME=DIR) put where
    it belongs."""
    recipe = config.load(path, Recipe)
    for given in roots:
        recipe = _with_root(recipe, given)
    for field, data in data_sets(recipe).items():
        if not isinstance(data, OpenMoji):
            disk.given(data.root, f"{field}.root")
    return recipe


def _with_root(recipe: Recipe, given: str) -> Recipe:
    folders = [d.name for d in data_sets(recipe).values() if not isinstance(d, OpenMoji)]
    names = list(dict.fromkeys(folders))
    name, equals, root = given.partition("=")
    if not equals:
        if len(names) != 1:
            known = ", ".join(names) or "none"
            raise EdgeclipError(
                f"--data {given}",
                f"the recipe has not exactly one folder to name (its data: {known})",
                "use --data NAME=DIR",
            )
        name = names[0]
        root = given
    disk.given(root, f"--data {given}".strip())
    if name not in names:
        raise EdgeclipError(
            f"--data {given}",
            f"the recipe has no data named '{name}'",
            f"use one of: {', '.join(names)}",
        )

    def at_root(data: Data) -> Data:
        if isinstance(data, OpenMoji) or data.name != name:
            return data
        return msgspec.structs.replace(data, root=root)

    return replace_data(recipe, at_root)


DATA_FIELDS = ("data", "evaluation_data", "adapt_data", "shifts")
"""Every field of a recipe that names data: one set, none, or several."""


def data_sets(recipe: Recipe) -> dict[str, Data]:
    """Return where in the recipe, to data: {"data": ..., "shifts.0": ..., ...}."""
    found: dict[str, Data] = {}
    for field in DATA_FIELDS:
        value = getattr(recipe, field)
        if isinstance(value, tuple):
            found |= {f"{field}.{i}": data for i, data in enumerate(value)}
        elif value is not None:
            found[field] = value
    return found


def replace_data(recipe: Recipe, change: Callable[[Data], Data]) -> Recipe:
    """Return the recipe with each of its data sets changed."""
    new: dict[str, Any] = {}
    for field in DATA_FIELDS:
        value = getattr(recipe, field)
        if isinstance(value, tuple):
            new[field] = tuple(change(data) for data in value)
        elif value is not None:
            new[field] = change(value)
    return msgspec.structs.replace(recipe, **new)


def description(recipe: Recipe) -> Description:
    """Return what decides the outcome, JSON-able: the recipe without the folders where its data
    lie."""
    value: Json = msgspec.json.decode(msgspec.json.encode(recipe))  # as it will be read again
    for field in data_sets(recipe):
        _at(value, field).pop("root", None)
    return value


def roots(recipe: Recipe) -> dict[str, str]:
    """Return where the data lay, from wherever one looks: what `description` leaves out."""
    return {
        f: str(Path(d.root).absolute())
        for f, d in data_sets(recipe).items()
        if not isinstance(d, OpenMoji)
    }


def of_run(run: Path) -> Recipe:
    """Return the recipe of a run folder, with the roots that its data had."""
    value = older.recipe_description(disk.read_json(run / "recipe.json"))
    for field, root in disk.read_json(run / "roots.json").items():
        _at(value, field)["root"] = root
    return config.convert(value, Recipe, run / "recipe.json")


def _at(value: Json, field: str) -> Json:
    """Return the data at `field` of a recipe as JSON: "data", or "shifts.0"."""
    name, dot, index = field.partition(".")
    found: Json = value[name][int(index)] if dot else value[name]
    return found
