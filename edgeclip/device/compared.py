"""The evaluation images of a run, before and after: the float student's answers and a bundle's."""

from typing import NamedTuple

import numpy as np

from edgeclip.device import per_class, rules
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import (
    Decisions,
    Evaluation,
    decide,
    differences,
    own_list_top1,
    rows,
)
from edgeclip.device.finite import fault
from edgeclip.device.metrics import accuracy_drop, agreement, centered_cosines, cosine
from edgeclip.device.records import (
    Accuracy,
    ChangedImage,
    ClassAccuracy,
    Closeness,
    OptimizationAgreement,
    Rule,
    SetAccuracy,
    to_json,
)
from edgeclip.device.slices import Slices, per_slice, slices_of
from edgeclip.device.target import Tolerance

TIE = 1e-5
"""two processors may order scores that are closer than this differently"""


class Compared(NamedTuple):
    """The evaluation images, as far as they were compared, and what fails there."""

    images: int = 0
    cosine: Closeness | None = None
    top1_agreement: float | None = None
    agreement_where_right: float | None = None
    accuracy: Accuracy | None = None
    sets: tuple[SetAccuracy, ...] = ()
    classes: tuple[ClassAccuracy, ...] = ()
    classes_of_few: int | None = None
    changed: tuple[ChangedImage, ...] = ()
    slices: Slices = Slices()
    unseen: per_class.Answered | None = None
    optimization: OptimizationAgreement | None = None
    rules: tuple[Rule, ...] = ()
    failures: tuple[str, ...] = ()


def compare(bundle: Bundle, evaluation: Evaluation, arrays: dict[str, np.ndarray]) -> Compared:
    """Compare features, answers and accuracy; arrays: as `validate.Observed` has them."""
    tolerance = bundle.manifest.target.tolerance
    features = arrays["features_all"]
    broken = _broken(arrays)
    if broken:
        return Compared(failures=broken)

    reference = decide(bundle, evaluation, evaluation.reference)
    own = decide(bundle, evaluation, features)
    failures = []
    unlike = int(((own.answers != arrays["answers"]) & ~(own.lead <= TIE)).sum())
    if unlike:
        what = f"the device's own answers are not those of its features on {unlike} images"
        failures.append(f"head: {what}")

    parts = _parts(evaluation, reference, own)
    same = own.answers == reference.answers
    close = centered_cosines(features, evaluation.reference)
    everything = np.ones(len(same), bool)
    judged_rows = np.concatenate(
        [everything[:0], *(np.full(len(p.before), p.judged) for p in parts)]
    )
    moved = differences(bundle, evaluation, evaluation.reference, features)
    decided: list[Rule] = []
    for asked, of in (
        ([rules.closeness(tolerance, close), _same(tolerance, same)], everything),
        (_same_where_right(tolerance, same, reference.right), reference.right),
        (rules.accuracy(tolerance, parts), judged_rows),
    ):
        decided += rules.proven(asked, reference.lead, moved, of)
    unseen = _unseen(evaluation, reference, own, bundle.preprocess.size)
    decided += per_class.floors(bundle.manifest.target.floor, unseen, bundle.labels)
    classes, classes_of_few = per_class.per_class(unseen, bundle.labels)

    optimization = None
    if "features_basic" in arrays:
        optimization, rule = _optimization(bundle, evaluation, own, features, arrays)
        decided += rule

    judged = [p for p in parts if p.judged]
    return Compared(
        images=len(features),
        cosine=cosine(features, evaluation.reference),
        top1_agreement=agreement(own.answers, reference.answers),
        agreement_where_right=agreement(own.answers, reference.answers, reference.right),
        accuracy=_accuracy(judged) if judged else None,
        sets=_sets(bundle, evaluation, features, parts),
        classes=tuple(classes),
        classes_of_few=classes_of_few,
        changed=tuple(per_class.changed(unseen, bundle.labels)),
        slices=per_slice(unseen),
        unseen=unseen,
        optimization=optimization,
        rules=tuple(decided),
        failures=tuple(failures),
    )


def _broken(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return a line for each kind of features that are not finite, or have no direction."""
    lines = []
    for name, of in (("features_all", ""), ("features_basic", ", without graph optimizations")):
        wrong = fault(arrays[name], rows=True) if name in arrays else None
        if wrong is not None:
            lines.append(f"values: {wrong} (evaluation images{of})")
    return tuple(lines)


def _optimization(
    bundle: Bundle,
    evaluation: Evaluation,
    own: Decisions,
    features: np.ndarray,
    arrays: dict[str, np.ndarray],
) -> tuple[OptimizationAgreement, list[Rule]]:
    """Compare the answers of ONNX Runtime's graph optimizations `all` and `basic`."""
    basic = arrays["features_basic"]
    as_basic = own.answers == decide(bundle, evaluation, basic).answers
    agreed = float(as_basic.mean()) if len(as_basic) else None
    found = OptimizationAgreement(top1_agreement=agreed, **to_json(cosine(features, basic)))
    rule = _same_as_optimized(bundle.manifest.target.tolerance, as_basic)
    moved = differences(bundle, evaluation, basic, features)
    return found, rules.proven([rule], own.lead, moved, np.ones(len(moved), bool))


def _same_as_optimized(tolerance: Tolerance, same: np.ndarray) -> Rule:
    """Return the rule of equal answers with and without graph optimizations; same: bool [m]."""
    allowed = 1 - (tolerance.optimization_agreement or 0.0)
    return rules.share(rules.OPTIMIZED, allowed, int((~same).sum()), len(same))


def _same(tolerance: Tolerance, same: np.ndarray) -> Rule:
    """Return the rule of equal answers; same: bool [m]."""
    return rules.share(rules.CHANGED, 1 - tolerance.top1_agreement, int((~same).sum()), len(same))


def _same_where_right(tolerance: Tolerance, same: np.ndarray, right: np.ndarray) -> list[Rule]:
    """Return the rule of equal answers where the float student is right: bool [m] each."""
    if tolerance.agreement_where_right is None or not right.any():
        return []
    changed = int((~same & right).sum())
    allowed = 1 - tolerance.agreement_where_right
    return [rules.share(rules.RIGHT_CHANGED, allowed, changed, int(right.sum()))]


def _parts(evaluation: Evaluation, before: Decisions, after: Decisions) -> list[rules.Part]:
    """Return each evaluation set that has images, before and after."""
    parts = []
    start = 0
    for s in evaluation.sets:
        own = slice(start, start + len(s.rows))
        start = own.stop
        parts.append(rules.Part(s.name, s.unseen, before.right[own], after.right[own]))
    return parts


def _unseen(
    evaluation: Evaluation, before: Decisions, after: Decisions, size: int
) -> per_class.Answered:
    """Return the images of unseen sets, each once. size: of the encoder's input, px."""
    image = rows(evaluation)
    own = np.zeros(0, bool)
    for s in evaluation.sets:
        own = np.concatenate([own, np.full(len(s.rows), s.unseen)])
    places = np.flatnonzero(own)
    _, first = np.unique(image[places], return_index=True)
    at = places[first]
    looks = evaluation.looks or []
    return per_class.Answered(
        images=np.array(evaluation.chosen, int)[image[at]],
        labels=evaluation.labels[image[at]],
        before=before.answers[at],
        after=after.answers[at],
        before_scores=before.scores[at],
        after_scores=after.scores[at],
        digests=[looks[i].digest for i in image[at] if looks],
        slices=slices_of(evaluation, image[at], size),
    )


def _accuracy(parts: list[rules.Part]) -> Accuracy:
    """Return the accuracies over the images of some sets, and the paired drop."""
    before = np.concatenate([p.before for p in parts])
    after = np.concatenate([p.after for p in parts])
    return Accuracy(
        reference_top1=float(before.mean()),
        bundle_top1=float(after.mean()),
        **to_json(accuracy_drop(before, after)),
    )


def _sets(
    bundle: Bundle, evaluation: Evaluation, features: np.ndarray, parts: list[rules.Part]
) -> tuple[SetAccuracy, ...]:
    """Return a row for each evaluation set that has images; features: [n, D], the bundle's."""
    rows = []
    for s, part in zip(evaluation.sets, parts, strict=True):
        if not s.rows:
            continue
        row = SetAccuracy(
            name=s.name,
            note=s.note,
            classes=len(s.classes),
            role=s.told,
            at_floor=part.at_floor,
            reference_own_list_top1=own_list_top1(bundle, evaluation, s, evaluation.reference),
            bundle_own_list_top1=own_list_top1(bundle, evaluation, s, features),
            **to_json(_accuracy([part])),
        )
        rows.append(row)
    return tuple(rows)


def short_of_agreement(
    tolerance: Tolerance, same: float | None, where_right: float | None
) -> list[str]:
    """Return a line for each agreement below its limit; None: there is nothing to judge."""
    measured = (
        ("top-1 agreement", same, tolerance.top1_agreement),
        (
            "top-1 agreement where the student is right",
            where_right,
            tolerance.agreement_where_right,
        ),
    )
    short = []
    for what, value, limit in measured:
        if value is not None and limit is not None and not value >= limit:
            short.append(f"{what} {value:.4f}, below {limit}")
    return short
