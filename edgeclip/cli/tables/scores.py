"""Tables of `distill` and `evaluate`: accuracy and retrieval of teacher and student."""

from collections.abc import Sequence
from typing import Any

from edgeclip.cli.tables import plain
from edgeclip.cli.tables.plain import NOT_MEASURED, number, table
from edgeclip.reports.models import MODELS
from edgeclip.reports.results import (
    AccuracyRecord,
    BothWays,
    EvaluationResults,
    ModelScores,
    Network,
    ProtocolRecord,
    Recall,
    RetrievalRecord,
    SetScore,
)

INERT = 0.01
"""below this alpha EduAttention moves a unit feature by less than a hundredth of its length"""
ALWAYS = ("student", "student_teacher_text", "student_own_text")
"""readings of the student that do not depend on EduAttention"""
CUTOFFS = (1, 5, 10)
HEADERS = [
    "set",
    "model",
    "top-1",
    "top-5",
    "chance",
    "top-1 in own list",
    "top-5 in own list",
    "images",
    "labels",
    "own list",
]


def accuracy(results: EvaluationResults) -> None:
    """Print what a training reached, and where the time went."""
    _sets(results)
    halves = " and ".join(results.halves or ("base", "novel"))
    _harmonic_means(halves, results)
    _class_offset(results)
    _edu_attention(results)
    _notes(results.sets)
    _networks(results)
    for line in results.skipped:
        plain.line(f"skipped: {line}")

    whole = sum(results.seconds.values())
    rows = []
    for name, seconds in results.seconds.items():
        rows.append([name, f"{seconds:.1f}", f"{seconds / max(whole, 1e-9):.0%}"])
    table(rows, ["where the time went", "s", "share"])
    plain.line(f"time: {whole:.0f} s; peak memory {results.peak_memory_mib} MiB")
    plain.line(f"run: {results.run}")


def protocol(record: ProtocolRecord) -> None:
    """Print what a student is worth under a protocol."""
    if isinstance(record, RetrievalRecord):
        _retrieval(record)
    else:
        _sets(record)
        _harmonic_means("base and novel", record)
        _figures("average top-1 accuracy over all labels", record.average, record)
        _figures("average top-1 accuracy within own lists", record.own_list_average, record)
        _edu_attention(record)
    _notes(record.sets)
    plain.line(f"text side: {record.text_side}")
    plain.line(f"teacher: {record.teacher or f'not at hand: {record.teacher_missing}'}")
    plain.line(f"report: {record.report}")


def _sets(results: EvaluationResults | AccuracyRecord) -> None:
    rows = []
    for score in results.sets:
        for model in _shown(score, bool(results.edu_attention)):
            scored = getattr(score, model)
            every: list[str | None] = [None, None]
            own: list[str | None] = [None, None]
            if scored is not None:
                every = [number(scored.top1, 3), number(scored.top5, 3)]
                own = [number(scored.own_list_top1, 3), number(scored.own_list_top5, 3)]
            every.append(number(score.chance_top1, 4))
            sizes = [score.images, score.labels, score.classes]
            rows.append([score.name, MODELS[model], *every, *own, *sizes])
    table(rows, HEADERS)
    plain.line("top-1, top-5, chance: over all labels of the bundle, as it answers")


def _shown(score: SetScore, edu_attention: bool) -> list[str]:
    """Return the models with a row: the teacher, and what of the student was scored."""
    shown = ["teacher"]
    for model in MODELS:
        if model == "teacher" or getattr(score, model) is None:
            continue
        if edu_attention or model in ALWAYS:
            shown.append(model)
    return shown


def _figures(
    what: str, scores: ModelScores | None, results: EvaluationResults | AccuracyRecord
) -> None:
    if scores is None:
        return
    for model, name in MODELS.items():
        value = getattr(scores, model)
        if value is None:
            continue
        if results.edu_attention or model in ("teacher", "student"):
            plain.line(f"{what}, {name}: {value:.3f}")


def _harmonic_means(halves: str, results: EvaluationResults | AccuracyRecord) -> None:
    what = f"harmonic mean of {halves}"
    _figures(f"{what} over all labels", results.harmonic_mean, results)
    _figures(f"{what}, each in its own list", results.own_list_harmonic_mean, results)


def _class_offset(results: EvaluationResults) -> None:
    """Print how far the classes with labels are set back, and what other offsets would give."""
    fitted = results.class_offset
    if fitted is not None:
        plain.line(
            f"class offset: {fitted.offset:+.4f} from the scores of the {len(fitted.labels)} "
            f"classes with labels, by {fitted.rule} on {fitted.images} training images: "
            f"{fitted.labeled_named:.1%} of those with a label name one of them "
            f"({fitted.labeled_named_without:.1%} without it), {fitted.others_named:.1%} of the "
            f"others another class ({fitted.others_named_without:.1%} without it)"
        )
    if results.trade is not None:
        plain.line(f"area under the curve of all offsets (AUSUC): {results.trade.area:.3f}")


def _edu_attention(results: EvaluationResults | AccuracyRecord) -> None:
    """EduAttention's weight, and the top-1 accuracy with it less that without it."""
    if results.edu_attention is None:
        return
    alpha = results.edu_attention.alpha
    gains = []
    for score in results.sets:
        gains.append(f"{_gain(score, results.edu_attention.kept)} on {score.name}")
    inert = ""
    if abs(alpha) < INERT:
        inert = " (inert)"
    what = "top-1 in own lists with it minus without"
    plain.line(f"EduAttention: alpha {alpha:+.3f} at the end{inert}; {what}: {', '.join(gains)}")


def _gain(score: SetScore, kept: bool) -> str:
    with_it = score.student_with_edu_attention
    if kept:
        with_it = score.student
    without = score.student_without_edu_attention
    if with_it is None or without is None:
        return NOT_MEASURED
    return f"{100 * (with_it.own_list_top1 - without.own_list_top1):+.1f} pp"


def _notes(sets: Sequence[Any]) -> None:
    for score in sets:  # of either protocol
        plain.line(f"{score.name}: {score.note}")


def _networks(results: EvaluationResults) -> None:
    teacher = results.models.teacher
    student = results.models.student
    share = ""
    if teacher.macs and student.macs:
        share = f" ({student.macs / teacher.macs:.3f} of the teacher's)"
    plain.line(f"teacher: {teacher.name}, {_size(teacher)}")
    plain.line(f"student: {student.name}, {_size(student)}{share}")


def _size(network: Network) -> str:
    if network.parameters is None or network.macs is None:
        return "no tower at hand"
    millions = f"{network.parameters / 1e6:.1f} M parameters, {network.macs / 1e6:.0f} M MACs"
    return f"{millions} at {network.input} px"


def _retrieval(record: RetrievalRecord) -> None:
    rows = []
    for score in record.sets:
        for model in ("teacher", "student"):
            for way in ("image_to_text", "text_to_image"):
                recalls = _recalls(getattr(score, model), way)
                chance = _chance(getattr(score.student, way))
                names = [score.name, MODELS[model], way.replace("_", " ")]
                rows.append([*names, *recalls, chance, score.images, score.texts])
    headers = ["set", "model", "way", "R@1", "R@5", "R@10", "chance", "images", "texts"]
    table(rows, headers)


def _recalls(scored: BothWays | None, way: str) -> list[str | None]:
    if scored is None:
        return [None, None, None]
    recall = getattr(scored, way)
    return [number(getattr(recall, f"r{k}"), 3) for k in CUTOFFS]


def _chance(recall: Recall) -> str:
    return "/".join(f"{getattr(recall, f'chance_r{k}'):.3f}" for k in CUTOFFS)
