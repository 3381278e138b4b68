"""`edgeclip validate`: whether the bundle on a device is still the model that was trained.

Same images, same preprocess, two systems: the fp32 torch student, whose features the run kept, and
the bundle. `observe` runs the bundle on the device, which may be a board far away; `judge` compares
on the host, in the order in which things go wrong: names, shapes and dtypes of the graph; the
golden images that ship in the bundle (preprocessing first, then values); then over the run's
evaluation images cosine, decisions and accuracy. Every failed tolerance is listed, not only the
first.

How to read it: the raw cosine flatters, since embeddings share a large mean; the centered one does
not. Accuracy is paired, and `upper_pp` is the largest drop (one-sided 95 %) that these images do
not exclude: where it exceeds the margin although the measured drop does not, there are too few
images to tell, and that is the verdict.
"""

import math
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from edgeclip import disk
from edgeclip.device import tokenizer
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import (
    Decisions,
    Evaluation,
    decide,
    images_tar,
    own_list_top1,
)
from edgeclip.device.images import ImageRef, index_tar, read, stream
from edgeclip.device.machine import Facts
from edgeclip.device.metrics import accuracy_drop, agreement, cosine
from edgeclip.device.preprocess import normalize, open_image
from edgeclip.device.records import (
    Accuracy,
    Closeness,
    GoldenAnswers,
    OptimizationAgreement,
    ParityReport,
    Ran,
    SetAccuracy,
    from_json,
    to_json,
)
from edgeclip.device.runtime import Port, Session
from edgeclip.device.target import Tolerance
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say, track

Verdict = Literal["pass", "fail", "golden images only", "too few images"]
BATCH = 16
TIE = 1e-5
"""two processors may order scores that are closer than this differently"""
GOLDEN_COSINE = 0.9
"""of the golden images, raw: only a broken bundle or preprocess falls below; the tolerances judge
the rest"""


def not_compared(bundle: Bundle, evaluation: Evaluation | None) -> str | None:
    """Return why the bundle cannot be asked about the evaluation images; None: it can.

    Their labels are numbers in the run's class list.
    """
    if evaluation is None:
        return "no run beside this bundle"
    names = evaluation.class_names
    other = names is not None and names != bundle.labels
    if names is None:  # a run older than this field: was `edgeclip labels` here?
        other = "bundle" in bundle.manifest.parents
    return "its labels are not the run's classes" if other else None


def validate(bundle: Bundle, evaluation: Evaluation | None, machine: Facts) -> ParityReport:
    """Run the bundle here and return the parity report.

    Without an evaluation folder of the bundle's own labels only the golden images are compared.
    """
    return judge(bundle, evaluation, observe(bundle, evaluation), machine)


# --- on the device


class Observed(NamedTuple):
    """What a device says of a bundle: all that must come back from a board."""

    ran: Ran
    input: Port
    output: Port
    arrays: dict[str, np.ndarray]
    """golden_features, and where the bundle has them golden_pixels and text_features; of the
    evaluation images features_all and features_basic [n, D], and answers [n], the device's own"""


def observe(bundle: Bundle, evaluation: Evaluation | None) -> Observed:
    """Run the bundle on its golden images and texts, and on the evaluation images.

    Raises `EdgeclipError` for an evaluation image that cannot be read.
    """
    encoder = bundle.image_encoder
    golden = bundle.folder / "golden"
    arrays = {"golden_features": bundle.encode_pixels(disk.read_array(golden / "pixels.npy"))}
    images = bundle.manifest.golden.images
    if images:
        arrays["golden_pixels"] = np.stack([bundle.pixels(bundle.folder / i) for i in images])
    if bundle.manifest.text is not None and tokenizer.installed():
        arrays["text_features"] = bundle.encode_text(disk.read_json(golden / "texts.json"))
    elif bundle.manifest.text is not None:
        say("golden texts are not compared: that takes tokenizers (pip install 'edgeclip[text]')")

    fits = not _interface(bundle, encoder.input, encoder.output)
    if evaluation is not None and fits and not_compared(bundle, evaluation) is None:
        sessions = {"features_all": encoder}
        if bundle.manifest.target.tolerance.optimization_agreement is not None:
            sessions["features_basic"] = bundle.open_image_encoder(optimization="basic")
        arrays |= _features(bundle, evaluation, sessions)
        if np.isfinite(arrays["features_all"]).all():
            arrays["answers"] = decide(bundle, evaluation, arrays["features_all"]).answers
    ran = msgspec.structs.replace(encoder.facts, precision=bundle.precision)
    return Observed(ran, encoder.input, encoder.output, arrays)


def _features(
    bundle: Bundle, evaluation: Evaluation, sessions: dict[str, Session]
) -> dict[str, np.ndarray]:
    """Return [n, D] of every evaluation image from each session; every image is decoded once."""
    every = index_tar(images_tar(evaluation.folder))
    images: list[ImageRef] = [every[i] for i in evaluation.chosen]
    skipped: list[str] = []
    rows: dict[str, list[np.ndarray]] = {name: [] for name in sessions}

    def pixels(i: int) -> np.ndarray:
        return bundle.pixels(open_image(read(images[i]), images[i].key))

    batches = stream(range(len(images)), pixels, BATCH, skipped)
    count = math.ceil(len(images) / BATCH)
    for _, batch in track(batches, f"validate {bundle.manifest.target.name}", count):
        x = normalize(batch, bundle.preprocess)
        for name, session in sessions.items():
            rows[name].append(session.run(x))
    if skipped:  # the run wrote them: a single one is wrong
        what = f"{len(skipped)} of {len(images)} images are unreadable (first: {skipped[0]})"
        raise EdgeclipError(evaluation.folder, what, "copy the run again, or make it again")
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def to_answer(observed: Observed) -> Json:
    """Return what goes over the link beside the arrays."""
    return {"ran": to_json(observed.ran), "ports": to_json([observed.input, observed.output])}


def from_answer(answer: Json, arrays: dict[str, np.ndarray], where: object) -> Observed:
    """Return what a board observed, from what came over the link."""
    image, features = msgspec.convert(answer["ports"], tuple[Port, Port])
    return Observed(from_json(answer["ran"], Ran, where), image, features, arrays)


# --- on the host


class Compared(NamedTuple):
    """The evaluation images, as far as they were compared, and what fails there."""

    images: int = 0
    cosine: Closeness | None = None
    top1_agreement: float | None = None
    agreement_where_right: float | None = None
    accuracy: Accuracy | None = None
    sets: tuple[SetAccuracy, ...] = ()
    optimization: OptimizationAgreement | None = None
    failures: tuple[str, ...] = ()
    verdict: Verdict = "golden images only"


def judge(
    bundle: Bundle, evaluation: Evaluation | None, observed: Observed, machine: Facts
) -> ParityReport:
    """Return the parity report of what a device observed. Opens no session."""
    target = bundle.manifest.target
    interface = _interface(bundle, observed.input, observed.output)
    golden, failures = _golden(bundle, observed.arrays)
    failures = interface + failures

    reason = not_compared(bundle, evaluation)
    compared = Compared()
    if evaluation is not None and reason is None and not interface:
        compared = _compare(bundle, evaluation, observed.arrays)
    failures += compared.failures

    layers = observed.ran.layers
    if layers is not None and not layers.get(target.precision):
        what = f"no layer takes {target.precision} (found {layers})"
        failures.append(f"engine: {what}: it is not what it is called")

    verdict: Verdict = "fail" if failures else compared.verdict
    return ParityReport(
        target=target.name,
        bundle=disk.sha256(bundle.folder / disk.MANIFEST),
        machine=machine,
        ran=observed.ran,
        tolerance=target.tolerance,
        golden=golden,
        not_compared=reason,
        images=compared.images,
        cosine=compared.cosine,
        top1_agreement=compared.top1_agreement,
        agreement_where_right=compared.agreement_where_right,
        accuracy=compared.accuracy,
        sets=list(compared.sets),
        optimization=compared.optimization,
        failures=failures,
        verdict=verdict,
    )


def _interface(bundle: Bundle, image: Port, features: Port) -> list[str]:
    """Return where the image encoder's ports differ from the manifest."""
    size = bundle.preprocess.size
    wanted = (
        (image, Port("pixels", [None, 3, size, size], "float32")),
        (features, Port("image_features", [None, bundle.manifest.embed_dim], "float32")),
    )
    wrong = []
    for port, want in wanted:
        shape = port.shape
        if len(shape) == len(want.shape):
            # A runtime may know the last axis of the output only after a run.
            shape = [w if s is None else s for s, w in zip(shape, want.shape, strict=True)]
        found = port._replace(shape=shape)
        if found != want:
            wrong.append(f"interface: {tuple(found)} instead of {tuple(want)}")
    return wrong


def _golden(bundle: Bundle, arrays: dict[str, np.ndarray]) -> tuple[GoldenAnswers, list[str]]:
    """Compare the golden images and texts; return the record and a line for each failure."""
    folder = bundle.folder / "golden"
    expected = disk.read_array(folder / "image_features.npy")
    failures = []

    difference = None
    if "golden_pixels" in arrays:
        pixels = arrays["golden_pixels"].astype(int)
        difference = int(np.abs(pixels - disk.read_array(folder / "pixels.npy").astype(int)).max())
        if difference:
            what = f"golden images differ by up to {difference} of 255 from the host's"
            failures.append(f"preprocess: {what}")

    if not np.isfinite(arrays["golden_features"]).all():
        failures.append("values: not finite on the golden images")
    images_cosine = _lowest_cosine(arrays["golden_features"], expected)
    failures += _too_far("golden images", images_cosine)

    texts_cosine = None
    if "text_features" in arrays:
        expected_texts = disk.read_array(folder / "text_features.npy")
        texts_cosine = _lowest_cosine(arrays["text_features"], expected_texts)
        failures += _too_far("golden texts", texts_cosine)
    record = GoldenAnswers(len(expected), difference, images_cosine, texts_cosine)
    return record, failures


def _lowest_cosine(features: np.ndarray, expected: np.ndarray) -> float | None:
    """Return the lowest cosine of unit rows [n, D]; None where they are not finite."""
    lowest = float((features * expected).sum(axis=1).min())
    return lowest if math.isfinite(lowest) else None


def _too_far(what: str, lowest: float | None) -> list[str]:
    if lowest is None:
        return [f"{what}: cosine not finite"]
    if lowest < GOLDEN_COSINE:
        return [f"{what}: cosine {lowest:.3f}, below {GOLDEN_COSINE}"]
    return []


def _compare(bundle: Bundle, evaluation: Evaluation, arrays: dict[str, np.ndarray]) -> Compared:
    """Compare the evaluation images: features, answers, accuracy."""
    tolerance = bundle.manifest.target.tolerance
    features = arrays["features_all"]
    if not np.isfinite(features).all():
        failure = "values: not finite on the evaluation images"
        return Compared(failures=(failure,), verdict="fail")

    reference = decide(bundle, evaluation, evaluation.reference)
    own = decide(bundle, evaluation, features)
    failures = []
    unlike = int(((own.answers != arrays["answers"]) & (own.lead > TIE)).sum())
    if unlike:
        what = f"the device's own answers are not those of its features on {unlike} images"
        failures.append(f"head: {what}")

    optimization = None
    if "features_basic" in arrays:
        basic = arrays["features_basic"]
        same = agreement(own.answers, decide(bundle, evaluation, basic).answers)
        close = to_json(cosine(features, basic))
        optimization = OptimizationAgreement(top1_agreement=same, **close)
        failures += _optimizations_differ(tolerance, same)

    close = cosine(features, evaluation.reference)
    accuracy = _accuracy(reference.right, own.right)
    top1_agreement = agreement(own.answers, reference.answers)
    where_right = agreement(own.answers, reference.answers, reference.right)
    if not close.centered_p1 >= tolerance.centered_cosine_p1:
        limit = tolerance.centered_cosine_p1
        failures.append(f"centered cosine p1 {close.centered_p1:.4f}, below {limit}")
    failures += short_of_agreement(tolerance, top1_agreement, where_right)
    if not accuracy.drop_pp <= tolerance.accuracy_drop_pp:
        limit = tolerance.accuracy_drop_pp
        failures.append(f"accuracy drop {accuracy.drop_pp:.2f} pp, above {limit}")

    verdict: Verdict = "too few images"
    if accuracy.upper_pp <= tolerance.accuracy_drop_pp:
        verdict = "pass"
    return Compared(
        images=len(features),
        cosine=close,
        top1_agreement=top1_agreement,
        agreement_where_right=where_right,
        accuracy=accuracy,
        sets=_sets(bundle, evaluation, features, reference, own),
        optimization=optimization,
        failures=tuple(failures),
        verdict=verdict,
    )


def _accuracy(before: np.ndarray, after: np.ndarray) -> Accuracy:
    """Return the accuracies of two bool vectors [n] over the same images, and the paired drop."""
    return Accuracy(
        reference_top1=float(before.mean()),
        bundle_top1=float(after.mean()),
        **to_json(accuracy_drop(before, after)),
    )


def _sets(
    bundle: Bundle,
    evaluation: Evaluation,
    features: np.ndarray,
    reference: Decisions,
    own: Decisions,
) -> tuple[SetAccuracy, ...]:
    """Return a row for each evaluation set that has images; features: [n, D], the bundle's."""
    rows = []
    start = 0
    for s in evaluation.sets:
        part = slice(start, start + len(s.rows))
        start = part.stop
        if not s.rows:
            continue
        accuracy = _accuracy(reference.right[part], own.right[part])
        row = SetAccuracy(
            name=s.name,
            note=s.note,
            classes=len(s.classes),
            reference_own_list_top1=own_list_top1(bundle, evaluation, s, evaluation.reference),
            bundle_own_list_top1=own_list_top1(bundle, evaluation, s, features),
            **to_json(accuracy),
        )
        rows.append(row)
    return tuple(rows)


def _optimizations_differ(tolerance: Tolerance, same: float | None) -> list[str]:
    limit = tolerance.optimization_agreement or 0.0
    if same is None or same >= limit:  # not a number is short too
        return []
    return [f"graph optimizations BASIC and ALL agree on {same:.4f} of the answers, below {limit}"]


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
