"""Which step lost what, from the teacher to the device, on the same unseen images.

    teacher     as it was scored when the run was distilled
    student     the float32 student in torch: what distillation cost
    export      its float32 graph in ONNX Runtime on this host: what tracing and folding cost
    preprocess  that graph on the pixels that the device sees: another resize, crop, channel order
    float16     TensorRT's int8 only: the run's float16 graph in ONNX Runtime
    int8        the bundle's own graph on this host; called by its precision
    device      the bundle on the device

The images are the unseen ones that the teacher was asked about; all unseen ones where it was not.
Each step is compared with the one before it, answer by answer over all labels and with the head
that ships, so what the steps lost less what they won is that of the whole way. Steps that cannot be
told apart are one: without a float32 bundle in the run there is no `export`, and where this host
cannot run the bundle, rounding and device are one.

Words that are typed on the device go another way, through the exported text encoder: they are
measured beside the sum.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgeclip import disk
from edgeclip.device import tokenizer
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import Evaluation, Student, images_tar, unseen_places
from edgeclip.device.finite import fault
from edgeclip.device.images import index_tar, read, stream
from edgeclip.device.intervals import drop_limits
from edgeclip.device.manifest import read_manifest
from edgeclip.device.metrics import centered_cosines, hits, paired_drop
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.device.records import Waterfall, WaterfallStep, to_json
from edgeclip.device.runtime import open_session
from edgeclip.device.validate import Observed, own_pixels
from edgeclip.device.zero_shot import class_scores
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say, track

BATCH = 16
MOST_PROMPTS = 2048
"""of all labels, for the way that typed words go"""
FLOAT = ("fp32", "onnxruntime")
"""precision and runtime of the graph that others are compared with"""
DISTILLED = "student"
STILL = 0.9999
"""first percentile of the centered cosine above which features have not moved"""
CAUSES = {
    "export": "the graph or its weights are not the trained ones: export again",
    "preprocess": "another resize filter, crop, channel order or normalization than in training",
    "float16": "values beyond float16's range or finer than its steps",
    "int8": "rounding, most often of residual additions or of the first layers",
    "fp8": "rounding, most often of residual additions or of the first layers",
    "fp16": "values beyond float16's range or finer than its steps",
    "fp32": "other kernels, or other weights, than those of the run's float32 bundle",
    "typed words": "the text encoder's mask, tokenizer or rounding; baked labels are not concerned",
    "device": "a runtime of another version or provider, or an x86 without VNNI, which saturates",
}
"""the usual one of each step"""


class Stage(NamedTuple):
    """What one system says of the unseen images."""

    name: str
    right: np.ndarray
    """bool [m]"""
    features: np.ndarray | None
    """[m, D]; None: not at hand"""


class Steps:
    """The unseen images of a run through its float graphs, each once for all its bundles."""

    def __init__(self, run: Path, evaluation: Evaluation, student: Student) -> None:
        self.run = run
        self.evaluation = evaluation
        self.student = student
        self.places = unseen_places(evaluation)
        asked = self.places[student.teacher[self.places] >= 0]
        if len(asked):  # the whole way, on the images that all of it is known of
            self.places = asked
        self.labels = evaluation.labels[self.places]
        self._done: dict[tuple[str, Preprocess], np.ndarray] = {}

    def of(self, bundle: Bundle, observed: Observed, here: bool) -> Waterfall | None:
        """Return the steps of a bundle that was observed on a device; None: no image to compare on.

        here: the device is this host. Raises `EdgeclipError` for a float bundle whose files were
        changed.
        """
        features = observed.arrays.get("features_all")
        if features is None or fault(features, rows=True) or not len(self.places):
            return None
        shipped = self._stage("device", bundle, features[self.places])
        if here and own_pixels(observed) == {} and _is_float(bundle):  # it need not run again
            graph = bundle.file(bundle.manifest.image_encoder)
            self._done[disk.sha256(graph), bundle.preprocess] = features[self.places]
        stages = [
            *self._trained(bundle),
            *self._exported(bundle, observed),
            *self._rounded(bundle, observed, shipped, here),
        ]
        return summary(stages, self._typed_words(bundle, shipped))

    def _stage(self, name: str, bundle: Bundle, features: np.ndarray) -> Stage:
        return Stage(name, hits(bundle.scores(features), self.labels), features)

    def _trained(self, bundle: Bundle) -> list[Stage]:
        """Return the teacher, where it was asked of every image, and the student."""
        student = self._stage(DISTILLED, bundle, self.evaluation.reference[self.places])
        answers = self.student.teacher[self.places]
        if (answers < 0).any():
            return [student]
        features = self.student.teacher_features
        if features is not None:
            features = features[self.places]
        return [Stage("teacher", answers == self.labels, features), student]

    def _exported(self, bundle: Bundle, observed: Observed) -> list[Stage]:
        """Run the float32 graph on training's pixels and on the device's, then the float16 one."""
        in_float = self._sibling(bundle, *FLOAT)
        if in_float is None:
            return []
        as_trained = self._features(in_float, self.student.preprocess, {})
        pixels = own_pixels(observed)
        if pixels is None:  # too many differ to be sent: preprocess is part of what follows
            return [self._stage("export", bundle, as_trained)]
        as_seen = self._features(in_float, bundle.preprocess, pixels)
        stages = [
            self._stage("export", bundle, as_trained),
            self._stage("preprocess", bundle, as_seen),
        ]
        half = None
        if bundle.manifest.runtime == "tensorrt" and bundle.manifest.target.precision != "fp16":
            half = self._sibling(bundle, "fp16", "tensorrt")
        if half is not None:
            in_half = self._features(half, bundle.preprocess, pixels)
            stages.append(self._stage("float16", bundle, in_half))
        return stages

    def _rounded(
        self, bundle: Bundle, observed: Observed, shipped: Stage, here: bool
    ) -> list[Stage]:
        """Run the bundle's own graph on this host where the device is another machine."""
        precision = bundle.manifest.target.precision
        pixels = own_pixels(observed)
        if here:
            return [shipped._replace(name=precision)]
        if pixels is None:
            return [shipped]
        try:
            features = self._features(bundle, bundle.preprocess, pixels)
        except EdgeclipError as e:  # this host has not got its runtime
            say(f"{bundle.folder.name}: {precision} and device are one step ({e})")
            return [shipped]
        return [self._stage(precision, bundle, features), shipped]

    def _sibling(self, bundle: Bundle, precision: str, runtime: str) -> Bundle | None:
        """Return a bundle of the same student in this run; the bundle itself where it is one."""
        for folder in (bundle.folder, *disk.finished_in(self.run / "bundles")):
            other = read_manifest(folder)
            same = other.parents.get("student") == bundle.manifest.parents.get("student")
            if same and (other.target.precision, other.runtime) == (precision, runtime):
                return Bundle.load(folder, threads=bundle.threads, check=True)
        return None

    def _features(
        self, bundle: Bundle, preprocess: Preprocess, pixels: dict[int, np.ndarray]
    ) -> np.ndarray:
        """Return [m, D] through a bundle's graph on this host, TensorRT's in ONNX Runtime.

        pixels: the device's own, of the images that it sees otherwise.
        """
        graph = bundle.file(bundle.manifest.image_encoder)
        key = disk.sha256(graph), preprocess
        if not pixels and key in self._done:
            return self._done[key]
        runtime = bundle.manifest.runtime
        if runtime == "tensorrt":
            runtime = "onnxruntime"
        session = open_session(runtime, graph, bundle.threads)
        rows = []
        for places, batch in self._batches(preprocess, f"steps: {bundle.folder.name}"):
            seen = [pixels.get(int(i), own) for i, own in zip(places, batch, strict=True)]
            rows.append(session.run(normalize(np.stack(seen), preprocess)))
        found = np.concatenate(rows)
        if not pixels:
            self._done[key] = found
        return found

    def _batches(
        self, preprocess: Preprocess, what: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (places [B], pixels uint8 [B, H, W, 3]) of the unseen images."""
        every = index_tar(images_tar(self.evaluation.folder))
        images = [every[self.evaluation.chosen[i]] for i in self.places]

        def make(i: int) -> np.ndarray:
            return to_pixels(open_image(read(images[i]), images[i].key), preprocess)

        batches = stream(range(len(images)), make, BATCH, [])
        for at, pixels in track(batches, what, -(-len(images) // BATCH)):
            yield self.places[at], pixels

    def _typed_words(self, bundle: Bundle, shipped: Stage) -> WaterfallStep | None:
        """Return what the answers lose where every label is typed on the device, not baked.

        None where the bundle has no text encoder, its library is not here, or it takes minutes.
        """
        prompts = len(bundle.labels) * max(1, len(bundle.manifest.templates))
        if bundle.manifest.text is None or prompts > MOST_PROMPTS or not tokenizer.installed():
            return None
        if bundle.manifest.runtime == "tensorrt":
            return None
        typed = bundle.bake(bundle.labels)
        assert shipped.features is not None
        scores = class_scores(shipped.features, typed, bundle.head, offsets=bundle.offsets)
        closest = float(centered_cosines(typed, bundle.class_features).min())
        return _step("typed words", shipped.right, hits(scores, self.labels), closest)


def _is_float(bundle: Bundle) -> bool:
    target = bundle.manifest.target
    return (target.precision, target.runtime) == FLOAT


def summary(stages: list[Stage], typed_words: WaterfallStep | None) -> Waterfall:
    """Return the steps between stages of the same images, two at least."""
    steps = []
    for before, after in itertools.pairwise(stages):
        steps.append(_step(after.name, before.right, after.right, _closeness(before, after)))
    return Waterfall(
        start=stages[0].name,
        start_top1=float(stages[0].right.mean()),
        whole=_step("the whole way", stages[0].right, stages[-1].right, None),
        steps=steps,
        typed_words=typed_words,
        most=_most(steps, typed_words),
    )


def _step(name: str, before: np.ndarray, after: np.ndarray, cosine: float | None) -> WaterfallStep:
    lost = int((before & ~after).sum())
    won = int((~before & after).sum())
    images = len(before)
    return WaterfallStep(
        name=name,
        top1=float(after.mean()),
        lower_pp=100 * drop_limits(lost, won, images).low,
        centered_cosine_p1=cosine,
        **to_json(paired_drop(lost, won, images)),
    )


def _closeness(before: Stage, after: Stage) -> float | None:
    """Return the first percentile of the centered cosine; None: not the same space, not at hand."""
    if before.features is None or after.features is None:
        return None
    if before.features.shape != after.features.shape:
        return None
    return float(np.percentile(centered_cosines(after.features, before.features), 1))


def _most(steps: list[WaterfallStep], typed_words: WaterfallStep | None) -> str:
    """Return a sentence that names the step that lost most after training, and its usual cause."""
    distilled = [step for step in steps if step.name == DISTILLED]
    first = ""
    if distilled:
        first = f"distillation {_cost(distilled[0])}; after it "
    shipping = [step for step in steps if step.name != DISTILLED]
    if typed_words is not None:
        shipping.append(typed_words)
    sure = [step for step in shipping if step.lower_pp > 0]
    if not sure:
        told = f"{first}no step lost so much that {steps[0].images:,} images can tell"
        return told + _moved(steps)
    most = max(sure, key=lambda step: step.drop_pp)
    usual = CAUSES[most.name]
    return f"{first}most was lost by {most.name}: {_lost(most)}. Usual cause: {usual}"


def _moved(steps: list[WaterfallStep]) -> str:
    """Return which step after training moved the features most, where one moved them."""
    cosines = {}
    for step in steps:
        if step.name != DISTILLED and step.centered_cosine_p1 is not None:
            cosines[step.name] = step.centered_cosine_p1
    name = min(cosines, key=lambda step: cosines[step], default="")
    if not name or not cosines[name] <= STILL:
        return ""
    return f"; {name} moved the features most (centered cosine p1 {cosines[name]:.3f})"


def _cost(step: WaterfallStep) -> str:
    if step.drop_pp >= 0:
        return f"cost {_lost(step)}"
    return f"gained {-step.drop_pp:.2f} pp ({-step.upper_pp:.2f} to {-step.lower_pp:.2f})"


def _lost(step: WaterfallStep) -> str:
    return f"{step.drop_pp:.2f} pp ({step.lower_pp:.2f} to {step.upper_pp:.2f})"
