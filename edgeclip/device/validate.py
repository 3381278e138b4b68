"""`edgeclip validate`: whether the bundle on a device is still the model that was trained.

Same images, same preprocess, two systems: the fp32 torch student, whose features the run kept, and
the bundle. `observe` runs the bundle on the device, which may be a board far away; `judge` compares
on the host, in the order in which things go wrong: names, shapes and dtypes of the graph; the
golden images that ship in the bundle (preprocessing first, then values); then over the run's
evaluation images cosine, decisions and accuracy. Every failed tolerance is listed, not only the
first.

How to read it: the raw cosine flatters, since embeddings share a large mean; the centered one does
not. Each tolerance is a question with three answers (rules.py): it holds, it fails, or these images
cannot tell; the verdict is the worst of them, and what was not asked cannot be told.
"""

import math
from typing import NamedTuple

import msgspec
import numpy as np

from edgeclip import disk
from edgeclip.device import rules, tokenizer
from edgeclip.device.bundle import Bundle
from edgeclip.device.compared import Compared, compare
from edgeclip.device.evaluation import (
    Evaluation,
    decide,
    images_tar,
    unseen_places,
)
from edgeclip.device.finite import fault
from edgeclip.device.images import ImageRef, index_tar, read, stream
from edgeclip.device.intervals import Answer, worst
from edgeclip.device.machine import Facts
from edgeclip.device.metrics import UNIT, off_unit
from edgeclip.device.per_class import Answered
from edgeclip.device.preprocess import fingerprint, normalize, open_image
from edgeclip.device.records import (
    GoldenAnswers,
    ParityReport,
    Ran,
    Record,
    to_json,
)
from edgeclip.device.runtime import Port, Session
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say, track

BATCH = 16
FEATURES = ("golden_features", "text_features", "features_all", "features_basic")
MOST_PIXELS = 256 << 20
"""bytes of pixels that go back to the host, at most"""
LEAST_LENGTH = 1e-12
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


def is_asked(bundle: Bundle, evaluation: Evaluation | None, image: Port, features: Port) -> bool:
    """Return whether a bundle with these ports is asked about the evaluation images."""
    fits = not _interface(bundle, image, features)
    return evaluation is not None and fits and not_compared(bundle, evaluation) is None


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
    evaluation images features_all and features_basic [n, D], answers [n], the device's own, and
    of the unseen ones whose pixels are not those of training their pixels uint8 [k, H, W, 3] and
    pixels_of [k]; pixels_of alone where they are too many to be sent"""


def observe(bundle: Bundle, evaluation: Evaluation | None) -> Observed:
    """Run the bundle on its golden images and texts, and on the evaluation images.

    Raises `EdgeclipError` for an evaluation image that cannot be read.
    """
    encoder = bundle.image_encoder
    arrays = {"golden_features": bundle.encode_pixels(bundle.golden_pixels())}
    images = bundle.manifest.golden.images
    if images:
        arrays["golden_pixels"] = np.stack([bundle.pixels(bundle.file(i)) for i in images])
    if bundle.manifest.text is not None and tokenizer.installed():
        arrays["text_features"] = bundle.encode_text(bundle.golden_texts())
    elif bundle.manifest.text is not None:
        say("golden texts are not compared: that takes tokenizers (pip install 'edgeclip[text]')")

    asked = is_asked(bundle, evaluation, encoder.input, encoder.output)
    if evaluation is not None and asked:
        sessions = {"features_all": encoder}
        if bundle.manifest.target.tolerance.optimization_agreement is not None:
            sessions["features_basic"] = bundle.open_image_encoder(optimization="basic")
        arrays |= _features(bundle, evaluation, sessions)
        if fault(arrays["features_all"], rows=True) is None:
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

    other = _OtherPixels(evaluation)
    batches = stream(range(len(images)), pixels, BATCH, skipped)
    count = math.ceil(len(images) / BATCH)
    for places, batch in track(batches, f"validate {bundle.manifest.target.name}", count):
        other.look(places, batch)
        x = normalize(batch, bundle.preprocess)
        for name, session in sessions.items():
            rows[name].append(session.run(x))
    if skipped:  # the run wrote them: a single one is wrong
        what = f"{len(skipped)} of {len(images)} images are unreadable (first: {skipped[0]})"
        raise EdgeclipError(evaluation.folder, what, "copy the run again, or make it again")
    return {name: np.concatenate(parts) for name, parts in rows.items()} | other.arrays()


class _OtherPixels:
    """The unseen images that the device sees otherwise than training did."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.expected = evaluation.student.pixels if evaluation.student is not None else None
        self.unseen = set(unseen_places(evaluation).tolist())
        self.of: list[int] = []
        self.pixels: list[np.ndarray] = []
        self.size = 0

    def look(self, places: np.ndarray, batch: np.ndarray) -> None:
        """Keep those of batch [B, H, W, 3], the images at places [B], that differ."""
        if self.expected is None:
            return
        for i, pixels in zip(places.tolist(), batch, strict=True):
            if i not in self.unseen or fingerprint(pixels) == self.expected[i]:
                continue
            self.of.append(i)
            self.size += pixels.nbytes
            if self.size <= MOST_PIXELS:
                self.pixels.append(pixels)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what goes back to the host; nothing where all are as in training."""
        if not self.of:
            return {}
        found = {"pixels_of": np.array(self.of)}
        if self.size <= MOST_PIXELS:
            found["pixels"] = np.stack(self.pixels)
        return found


def own_pixels(observed: Observed) -> dict[int, np.ndarray] | None:
    """Return the pixels [H, W, 3] of the images that the device sees otherwise than training did.

    None: they were too many to be sent.
    """
    places = observed.arrays.get("pixels_of")
    if places is None:
        return {}
    if "pixels" not in observed.arrays:
        return None
    return dict(zip(places.tolist(), observed.arrays["pixels"], strict=True))


class Seen(Record):
    """What goes over the link beside the arrays."""

    ran: Ran
    ports: tuple[Port, Port]


def to_answer(observed: Observed) -> Json:
    """Return what goes over the link beside the arrays."""
    return {"ran": to_json(observed.ran), "ports": to_json([observed.input, observed.output])}


def from_answer(answer: Json, arrays: dict[str, np.ndarray], where: object) -> Observed:
    """Return what a board observed, from what came over the link. Raises `EdgeclipError` for what
    is no such answer."""
    try:
        seen = msgspec.convert(answer, Seen)
    except msgspec.ValidationError as e:
        do = f"see: edgeclip doctor --device {where}"
        raise EdgeclipError(where, f"answered what was not asked ({e})", do) from None
    return Observed(seen.ran, *seen.ports, arrays)


# --- on the host


class Judged(NamedTuple):
    """A parity report, and the answers behind it."""

    report: ParityReport
    unseen: Answered | None
    """None: not compared"""


def judge(
    bundle: Bundle, evaluation: Evaluation | None, observed: Observed, machine: Facts
) -> ParityReport:
    """Return the parity report of what a device observed. Opens no session."""
    return judged(bundle, evaluation, observed, machine).report


def judged(
    bundle: Bundle, evaluation: Evaluation | None, observed: Observed, machine: Facts
) -> Judged:
    """Return the parity report of what a device observed, and the answers. Opens no session."""
    target = bundle.manifest.target
    interface = _interface(bundle, observed.input, observed.output)
    arrays, not_unit = _of_unit_length(observed.arrays)
    golden, failures = _golden(bundle, arrays)
    failures = interface + not_unit + failures

    reason = not_compared(bundle, evaluation)
    compared = Compared()
    if evaluation is not None and reason is None and not interface:
        compared = compare(bundle, evaluation, arrays)
    failures += compared.failures

    layers = observed.ran.layers
    if layers is not None and not layers.get(target.precision):
        what = f"no layer takes {target.precision} (found {layers})"
        failures.append(f"engine: {what}: it is not what it is called")

    answer: Answer = "fails"
    if not failures:
        answer = worst([rule.answer for rule in compared.rules])
        if not compared.rules:
            answer = "cannot tell"
    failures += [rules.line(rule) for rule in compared.rules if rule.answer == "fails"]
    report = ParityReport(
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
        classes=list(compared.classes),
        classes_of_few=compared.classes_of_few,
        changed=list(compared.changed),
        slices=list(compared.slices.rows),
        slices_judged=compared.slices.judged,
        slices_left_out=compared.slices.left_out,
        optimization=compared.optimization,
        rules=list(compared.rules),
        failures=failures,
        verdict=answer,
    )
    return Judged(report, compared.unseen)


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


def _of_unit_length(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the arrays with features of unit length, and a line for each that were not so.

    Those that are so are returned as they are. Of values that are not finite others speak.
    """
    found = dict(arrays)
    failures = []
    for name in FEATURES:
        off = None
        if name in arrays:
            off = off_unit(arrays[name])
        if off is not None and not off <= UNIT:
            rows = np.asarray(arrays[name], np.float64)  # a float32 has squares beyond float32
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            found[name] = (rows / np.maximum(lengths, LEAST_LENGTH)).astype(np.float32)
            what = f"{name} are not of unit length (by up to {off:.3g})"
            failures.append(f"values: {what}: they are compared after normalization")
    return found, failures


def _golden(bundle: Bundle, arrays: dict[str, np.ndarray]) -> tuple[GoldenAnswers, list[str]]:
    """Compare the golden images and texts; return the record and a line for each failure.

    Raises `EdgeclipError` where the bundle has not as many answers as questions.
    """
    expected = bundle.golden_features()
    _refuse_unless_alike(bundle, arrays["golden_features"], expected)
    failures = []

    difference = None
    if "golden_pixels" in arrays:
        own = bundle.golden_pixels()
        _refuse_unless_alike(bundle, arrays["golden_pixels"], own)
        difference = int(np.abs(arrays["golden_pixels"].astype(int) - own.astype(int)).max())
        if difference:
            what = f"golden images differ by up to {difference} of 255 from the host's"
            failures.append(f"preprocess: {what}")

    for what, name in (("images", "golden_features"), ("texts", "text_features")):
        wrong = fault(arrays[name], rows=True) if name in arrays else None
        if wrong is not None:
            failures.append(f"values: {wrong} (golden {what})")
    images_cosine = _lowest_cosine(arrays["golden_features"], expected)
    failures += _too_far("golden images", images_cosine)

    texts_cosine = None
    if "text_features" in arrays:
        expected_texts = bundle.golden_features("text")
        _refuse_unless_alike(bundle, arrays["text_features"], expected_texts)
        texts_cosine = _lowest_cosine(arrays["text_features"], expected_texts)
        failures += _too_far("golden texts", texts_cosine)
    record = GoldenAnswers(len(expected), difference, images_cosine, texts_cosine)
    return record, failures


def _refuse_unless_alike(bundle: Bundle, found: np.ndarray, expected: np.ndarray) -> None:
    if found.shape != expected.shape:
        what = f"its golden answers are {list(expected.shape)}, and {list(found.shape)} were asked"
        raise EdgeclipError(bundle.folder, what, "export the bundle again")


def _lowest_cosine(features: np.ndarray, expected: np.ndarray) -> float | None:
    """Return the lowest cosine of unit rows [n, D]; None where they are not finite."""
    if not np.isfinite(features).all():
        return None
    return float((features * expected).sum(axis=1).min())


def _too_far(what: str, lowest: float | None) -> list[str]:
    if lowest is None:
        return [f"{what}: cosine not finite"]
    if not lowest >= GOLDEN_COSINE:
        return [f"{what}: cosine {lowest:.3f}, below {GOLDEN_COSINE}"]
    return []
