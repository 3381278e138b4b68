"""What a run reached: its results.json, and a record for each protocol of `edgeclip evaluate`.

    RUN/results.json                             `EvaluationResults`, written by `edgeclip distill`
    RUN/reports/evaluate-<protocol>-<sets>.json  `AccuracyRecord` or `RetrievalRecord`

Accuracies and recalls are fractions from 0 to 1. None means not measured, or does not apply. Files
of edgeclip 0.1 have no `format`; `older` turns them into today's.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeclip import disk
from edgeclip.device.manifest import ClassOffset
from edgeclip.errors import EdgeclipError
from edgeclip.reports import older

FORMAT = 2
"""format of the files that are written"""
RESULTS = "results.json"
"""file name inside a run folder"""
PROTOCOLS = ("zero_shot", "base_to_novel", "cross_dataset", "domain_generalization", "retrieval")


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """How often one model is right about the images of one set."""

    top1: float | None
    """share of images whose label scores best among all labels that the bundle answers with; None:
    a run of edgeclip 0.1, which did not measure it; so below"""
    top5: float | None
    """share of images whose label is among the five best"""
    own_list_top1: float
    """share of images whose label scores best within the set's own class list: the papers'
    protocol, which knows beforehand whether an image is of a base or of a novel class"""
    own_list_top5: float


class OverlapResult(msgspec.Struct, frozen=True, kw_only=True):
    """How many images of a set are among the training images, which `note` says in words."""

    training_images: int
    """how many training images it was compared with, by bytes and by a perceptual hash"""
    identical: int
    """images with the bytes of a training image"""
    alike: int
    """other images that look like a training image re-encoded or resized"""
    first: tuple[str, ...]
    """keys of the first ten of both"""


class SetScore(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation set, classified by the teacher and by every reading of the student."""

    name: str
    """the set's name, as tables show it"""
    note: str
    """what to know of the figures, for people"""
    images: int
    """how many images were scored"""
    labels: int | None
    """how many labels the bundle answers with"""
    classes: int
    """how many of them are in the set's own class list"""
    chance_top1: float | None
    """top-1 accuracy of a guess among all labels"""
    own_list_chance_top1: float
    """top-1 accuracy of a guess within the set's own class list"""
    teacher: Accuracy | None = None
    """None: the teacher's tower is not at hand"""
    teacher_without_offset: Accuracy | None = None
    """no class is set back; None: `teacher` is that"""
    student: Accuracy
    """the student as it ships"""
    student_without_offset: Accuracy | None = None
    """no class is set back; None: `student` is that"""
    student_with_edu_attention: Accuracy | None = None
    """None: there is no EduAttention, or `student` has it"""
    student_without_edu_attention: Accuracy | None = None
    """plain cosines"""
    student_attending_all_classes: Accuracy | None = None
    """EduAttention over all classes of the data; None: the set has all of them, or there is none"""
    student_teacher_text: Accuracy | None = None
    """the student's images against the teacher's text; None: it has no text tower of its own"""
    student_own_text: Accuracy | None = None
    """the student's images against its own text tower; None: it has none"""
    of: str | None = None
    """name of the data set that the images are of; None in results.json"""
    transductive: bool | None = None
    """whether the student saw training images of this set, by its name or by the images
    themselves; None: not known, and in results.json"""
    overlap: OverlapResult | None = None
    """what of it is among the training images; None: not compared, so nothing says that the student
    saw none of it"""
    student_on_unseen: Accuracy | None = None
    """the student as it ships on the images that are not among the training images; None: all or
    none of them are, or it is not known"""
    shift: bool | None = None
    """whether the set is a shift of the training data; None in results.json"""
    templates: int | None = None
    """prompts for each class; None in results.json"""


class ModelScores(msgspec.Struct, frozen=True, kw_only=True):
    """One figure for each model of `SetScore` over several sets; None: not scored on all."""

    teacher: float | None = None
    teacher_without_offset: float | None = None
    student: float | None = None
    student_without_offset: float | None = None
    student_with_edu_attention: float | None = None
    student_without_edu_attention: float | None = None
    student_attending_all_classes: float | None = None
    student_teacher_text: float | None = None
    student_own_text: float | None = None


MODELS = ModelScores.__struct_fields__
"""names of the models that a set may be scored with, in the order of tables"""


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """Size of the teacher or of the student."""

    name: str
    """model and weights"""
    parameters: int | None
    """of the image encoder; None: the tower is not at hand"""
    macs: int | None
    """multiply-accumulates for one image; None: the tower is not at hand"""
    input: int
    """height and width of an image, px"""
    text_parameters: int | None = None
    """of the student's own text tower; None: it has none"""


class Models(msgspec.Struct, frozen=True, kw_only=True):
    """Who taught and who learned."""

    teacher: Network
    student: Network


class EduAttentionResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of EduAttention."""

    alpha: float
    """its weight at the end of training"""
    kept: bool
    """whether it ships in the classification head"""


class TradePoint(msgspec.Struct, frozen=True, kw_only=True):
    """The student's top-1 accuracy on both halves, over all labels, at one offset."""

    offset: float
    labeled: float
    """on the half whose classes had labels"""
    unlabeled: float


class Trade(msgspec.Struct, frozen=True, kw_only=True):
    """What offsets give and take, over all labels."""

    area: float
    """AUSUC: the area under the curve of the unlabeled half's accuracy over the labeled one's"""
    curve: tuple[TradePoint, ...]
    """by offset, ascending"""


class EvaluationResults(msgspec.Struct, frozen=True, kw_only=True):
    """What `edgeclip distill` reached: RUN/results.json."""

    format: int = FORMAT
    run: str
    """the run's folder"""
    data: str
    """name of the training data"""
    data_license: str
    """license of training and evaluation data"""
    sets: tuple[SetScore, ...]
    """the evaluation sets"""
    halves: tuple[str, str] | None = None
    """names of the sets of classes with labels and of those without; None: there are no such two"""
    harmonic_mean: ModelScores | None = None
    """of the top-1 accuracies of both halves over all labels; None: there are no halves"""
    own_list_harmonic_mean: ModelScores | None = None
    """the same, each half within its own class list"""
    class_offset: ClassOffset | None = None
    """what is taken from the student's scores of classes with labels; None: nothing"""
    teachers_class_offset: ClassOffset | None = None
    """the same of the teacher's scores"""
    trade: Trade | None = None
    """what other offsets would give; None: there are no halves"""
    models: Models
    log: tuple[dict[str, int | float], ...]
    """an epoch each: its number, every loss before its weight, and alpha"""
    edu_attention: EduAttentionResult | None
    """None: trained without it"""
    skipped: tuple[str, ...]
    """training images that could not be read, with the reason"""
    device: str
    """of torch"""
    processes: int
    """that trained together"""
    seconds: dict[str, float]
    """where the time went, s"""
    peak_memory_mib: int
    """of the first process, MiB"""


class Recall(msgspec.Struct, frozen=True, kw_only=True):
    """Retrieval one way: recall at k of all queries, and what a random order would reach."""

    r1: float
    r5: float
    r10: float
    chance_r1: float
    chance_r5: float
    chance_r10: float


class BothWays(msgspec.Struct, frozen=True, kw_only=True):
    """Retrieval by one model."""

    image_to_text: Recall
    """images are the queries"""
    text_to_image: Recall
    """texts are the queries"""


class RetrievalScore(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation set, searched by the teacher and by the student."""

    name: str
    """the set's name, as tables show it"""
    of: str
    """name of the data set that the images are of"""
    note: str
    """what to know of the figures, for people"""
    transductive: bool | None
    """whether the student saw training images of this set, by its name or by the images
    themselves; None: not known"""
    overlap: OverlapResult | None = None
    """what of it is among the training images; None: not compared"""
    images: int
    """how many images were scored"""
    texts: int
    """how many different captions they have"""
    teacher: BothWays | None
    """None: the teacher is not at hand"""
    student: BothWays


class Protocol(msgspec.Struct, frozen=True, kw_only=True):
    """What the records of all protocols share."""

    format: int = FORMAT
    run: str
    """the run's folder"""
    protocol: str
    """one of `PROTOCOLS`"""
    student: str
    """sha256 of the student's manifest: a record counts for this very student"""
    teacher: str | None
    """its name; None: not at hand"""
    teacher_missing: str | None
    """why the teacher was not scored; None: it was"""
    edu_attention: EduAttentionResult | None
    """None: trained without it"""
    text_side: str
    """what made the class features, for people"""
    report: str
    """path of this record"""


class AccuracyRecord(Protocol, frozen=True, kw_only=True):
    """What a student is worth under a protocol that classifies."""

    sets: tuple[SetScore, ...]
    harmonic_mean: ModelScores | None = None
    """of the top-1 accuracies of base and novel classes over all labels; None: another protocol"""
    own_list_harmonic_mean: ModelScores | None = None
    """the same, each half within its own class list"""
    average: ModelScores | None = None
    """mean top-1 accuracy (of the shifts under domain_generalization) over all labels; None:
    another protocol"""
    own_list_average: ModelScores | None = None
    """the same within each set's own class list"""


class RetrievalRecord(Protocol, frozen=True, kw_only=True):
    """What a student is worth at retrieval."""

    sets: tuple[RetrievalScore, ...]


ProtocolRecord = AccuracyRecord | RetrievalRecord
R = TypeVar("R", bound=msgspec.Struct)


def read_results(run: Path) -> EvaluationResults:
    """Return the results of the finished run in folder `run`.

    Raises `EdgeclipError` where the run is not finished, or its results.json cannot be understood.
    """
    disk.read_manifest(run, "run")
    path = run / RESULTS
    return _convert(path, disk.read_json(path), EvaluationResults)


def write_results(run: Path, results: EvaluationResults) -> None:
    """Write RUN/results.json."""
    disk.write_sealed(run / RESULTS, msgspec.to_builtins(results))


def read_protocol(path: Path) -> ProtocolRecord:
    """Return the record of a protocol.

    Raises `EdgeclipError` where it cannot be understood.
    """
    value = disk.read_json(path)
    if isinstance(value, dict) and value.get("protocol") == "retrieval":
        return _convert(path, value, RetrievalRecord)
    return _convert(path, value, AccuracyRecord)


def read_protocols(run: Path) -> list[ProtocolRecord]:
    """Return every record of `edgeclip evaluate` in the run, by file name."""
    paths = sorted((run / "reports").glob("evaluate-*.json"))
    return [read_protocol(path) for path in paths]


def write_protocol(path: Path, record: ProtocolRecord) -> None:
    """Write the record of a protocol to `path`."""
    disk.write_sealed(path, msgspec.to_builtins(record))


def _convert(path: Path, value: Any, kind: type[R]) -> R:
    if not isinstance(value, dict):
        raise EdgeclipError(path, "is not a JSON object", "restore the file, or make it again")
    written = value.get("format", 1)
    if written == 1:
        value = older.of_first_format(value, MODELS) | {"format": FORMAT}
    elif written != FORMAT:
        raise EdgeclipError(
            path,
            f"has format {written}, and this edgeclip reads formats 1 and {FORMAT}",
            "use the edgeclip that wrote it",
        )
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise EdgeclipError(path, str(e), "restore the file, or make it again") from None
