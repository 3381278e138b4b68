"""What the verbs report: frozen structs with a unit under each field; bench's: bench_report.py.

They are JSON only on disk, over a link and at `--json`; edgeclip/disk.py writes and reads them.
"""

from typing import Any, Literal

from edgeclip.device.machine import Facts, State
from edgeclip.device.target import NamedTarget, Tolerance
from edgeclip.disk import FORMAT as FORMAT
from edgeclip.disk import Record as Record
from edgeclip.disk import from_json as from_json
from edgeclip.disk import to_json as to_json

BuildOptions = dict[str, int | list[int]]
"""name of an option of an engine's build, to its value"""


class EngineConditions(Record):
    """Everything that a TensorRT engine depends on: another value is another engine."""

    onnx: str
    """sha256 of the ONNX file"""
    tensorrt: str
    """version"""
    sm: str
    """the GPU's compute capability, as "8.7\""""
    jetpack: str | None
    """version; null: not a Jetson, or not known"""
    l4t: str | None
    """version of Jetson Linux"""
    power_mode: str | None
    """nvpmodel's name"""
    options: BuildOptions
    """of the build: `batch` (minimum, optimum, maximum) and `workspace_mib`"""


class Ran(Record):
    """What really ran, read back from the runtime after loading."""

    runtime: str
    version: str | None
    """of the runtime; null: it was never opened"""
    threads: int
    providers: list[str] = []
    """ONNX Runtime's execution providers, OpenVINO's devices, or TensorRT"""
    precision: str | None = None
    """what is stored, and where it differs what is computed"""
    optimization: str | None = None
    """ONNX Runtime only: graph optimizations `basic` or `all`"""
    largest_batch: int | None = None
    """images; TensorRT only: more are cut into batches of this size"""
    engine: str | None = None
    """TensorRT only: the key of the engine, named by its conditions"""
    conditions: EngineConditions | None = None
    """TensorRT only"""
    layers: dict[str, int] | None = None
    """TensorRT only: how many layers that compute something take each precision"""


# --- validate


class Closeness(Record):
    """Row-wise cosine of a bundle's features with the float32 student's."""

    raw_p1: float
    """first percentile"""
    raw_p5: float
    """fifth percentile"""
    raw_min: float
    centered_p1: float
    """first percentile after the reference's mean is subtracted from both: embeddings share a large
    mean that hides damage"""
    centered_p5: float
    centered_min: float


class PairedDrop(Record):
    """Top-1 accuracy lost from one system to another on the same images."""

    drop_pp: float
    """percentage points; negative: it gained"""
    upper_pp: float
    """percentage points: the one-sided 95 % limit of the drop"""
    lost: int
    """images that were right before and are wrong after"""
    won: int
    """the other way round"""
    images: int


class Accuracy(PairedDrop):
    reference_top1: float
    """of the float32 student, 0..1"""
    bundle_top1: float
    """0..1"""


class SetAccuracy(Accuracy):
    """One evaluation set over all labels of the bundle."""

    name: str
    note: str
    classes: int
    """of the set's own list"""
    role: str | None = None
    """what training had of its images; null: not known"""
    at_floor: bool = False
    """hardly an image was right before: there is nothing to lose, so it is not judged"""
    reference_own_list_top1: float | None = None
    """the float student within the set's own list, 0..1; null: a report of edgeclip 0.1, whose
    other figures are within that list; so below"""
    bundle_own_list_top1: float | None = None


class ClassAccuracy(Accuracy, kw_only=True):
    """One class's unseen images over all labels of the bundle; limits hold for all classes."""

    name: str
    lower_pp: float
    """percentage points: the other one-sided limit of the drop"""
    confused_with: str | None = None
    """the label that its images are most often given wrongly; null: none is wrong"""
    confused: int = 0
    """how often"""


class SliceAccuracy(Record, kw_only=True):
    """The unseen images that share something, over all labels of the bundle; limits hold for all
    slices at once."""

    name: str
    """what they share, as "camera: front" or "short side below 224 px\""""
    images: int
    reference_top1: float | None = None
    """of the float32 student, 0..1; null: too few images to say anything of them, so below"""
    bundle_top1: float | None = None
    lost: int | None = None
    """images that were right before and are wrong after"""
    won: int | None = None
    drop_pp: float | None = None
    """percentage points; negative: it gained"""
    lower_pp: float | None = None
    """percentage points: a one-sided limit of the drop"""
    upper_pp: float | None = None


class Earlier(Record, kw_only=True):
    """The paired difference to an earlier report, on the images that both have judged."""

    when: str
    """that report's time, ISO 8601"""
    bundle: str
    """sha256 of its bundle's manifest"""
    runtime: str
    """with its version"""
    system: str
    """its device's operating system"""
    why: str | None = None
    """why the two cannot be compared; null: they were"""
    images: int = 0
    """unseen images that both have judged by the same label"""
    judged_then: int | None = None
    """unseen images of that report; null: not known"""
    judged_now: int | None = None
    """of this one; null: it has none"""
    relabeled: int = 0
    """images that both have, left out since their label was changed"""
    top1_then: float | None = None
    """on the images of both, 0..1; null: not compared, so below"""
    top1_now: float | None = None
    lost: int | None = None
    """images that were right then and are wrong now"""
    won: int | None = None
    drop_pp: float | None = None
    """percentage points; negative: it gained"""
    lower_pp: float | None = None
    """percentage points: the one-sided 95 % limits of the drop"""
    upper_pp: float | None = None
    p: float | None = None
    """McNemar's exact two-sided test: how likely so one-sided a change is by chance"""


class ChangedImage(Record):
    """An unseen image that one system is right about and the other is not."""

    image: int
    """its place in the run's evaluation images"""
    label: str
    before: str
    """the float student's answer"""
    after: str
    """the bundle's"""
    before_score: float
    after_score: float


class WaterfallStep(PairedDrop, kw_only=True):
    """What one step lost of the answers of the step before it, on the same unseen images."""

    name: str
    top1: float
    """after it, 0..1"""
    lower_pp: float
    """percentage points: the other one-sided 95 % limit of the drop"""
    centered_cosine_p1: float | None = None
    """of its features with those of the step before; null: one of them is not at hand. Of typed
    words: the lowest of a label"""


class Waterfall(Record, kw_only=True):
    """Which step lost what, from the teacher to the device."""

    start: str
    """teacher; student where the teacher was not asked of these images"""
    start_top1: float
    """0..1"""
    whole: WaterfallStep
    """from the start to the device: its lost less its won are those of all steps"""
    steps: list[WaterfallStep]
    typed_words: WaterfallStep | None = None
    """what would be lost where all labels were typed on the device; null: no text encoder, or too
    many labels"""
    most: str
    """a sentence: which step lost most, and its usual cause"""


class Rule(Record, kw_only=True):
    """One question of the gate, or of a device's budget."""

    rule: str
    unit: Literal["%", "pp", "ms", "MiB", "mJ"]
    """of the figures: percent of the images, percentage points of accuracy lost, or a cost"""
    allowed: float
    """at most so much"""
    found: float | None = None
    """null: not measured; so below"""
    low: float | None = None
    """one-sided 95 % limit"""
    high: float | None = None
    images: int = 0
    """that it was asked of; of a time, the queries"""
    answer: Literal["holds", "fails", "cannot tell"]
    needed: int | None = None
    """images that would settle it, if they answer as these did; null: settled, or not known"""
    why: str | None = None
    """what the answer rests on where it was not counted"""


class GoldenAnswers(Record):
    """The images and texts that ship in the bundle, against the student's answers beside them."""

    images: int
    largest_pixel_difference: int | None = None
    """0..255, of the preprocessed images; null: the bundle has pixels only"""
    cosine_min: float | None = None
    """null: features are not finite"""
    text_cosine_min: float | None = None
    """null: no text encoder, or features are not finite"""


class OptimizationAgreement(Closeness):
    """ONNX Runtime's graph optimizations `all` against `basic`, over the evaluation images."""

    top1_agreement: float | None
    """share of equal answers, 0..1"""


class ParityReport(Record, kw_only=True):
    """`edgeclip validate`: whether the bundle on a device is still the model that was trained."""

    kind: Literal["parity"] = "parity"
    format: int = FORMAT
    device: str | None = None
    """the profile's name"""
    target: str
    """the target's name"""
    bundle: str
    """sha256 of the bundle's manifest"""
    machine: Facts
    ran: Ran
    tolerance: Tolerance
    golden: GoldenAnswers
    not_compared: str | None
    """why the evaluation images cannot be asked of this bundle; null: they were"""
    images: int = 0
    """evaluation images that were compared"""
    cosine: Closeness | None = None
    """null: not compared"""
    top1_agreement: float | None = None
    """share of images with the same first answer, 0..1"""
    agreement_where_right: float | None = None
    """the same over the images that the float32 student answers rightly; null: there is none"""
    accuracy: Accuracy | None = None
    """over the unseen images; null: there is none, or not compared"""
    sets: list[SetAccuracy] = []
    classes: list[ClassAccuracy] = []
    """those that lose most and those that are right least, of unseen images"""
    classes_of_few: int | None = None
    """classes with too few unseen images to say anything of; null: not compared"""
    slices: list[SliceAccuracy] = []
    """those that lose most and those that are right least, then such of too few images"""
    slices_judged: int = 0
    """slices whose limits hold at once: each one-sided at 1 - 0.05 / so many"""
    slices_left_out: int = 0
    """slices that are not listed"""
    earlier: Earlier | None = None
    """null: the first report of this bundle's name on this device"""
    changed: list[ChangedImage] = []
    """unseen images that were lost, then such that were won; the surest answers"""
    rules: list[Rule] = []
    """what the verdict rests on, beside `failures` of another kind"""
    optimization: OptimizationAgreement | None = None
    """null: not asked for by the target"""
    waterfall: Waterfall | None = None
    """null: a run of an older edgeclip, no unseen image, or not compared"""
    failures: list[str] = []
    """everything that failed, a line each"""
    verdict: Literal["holds", "fails", "cannot tell"]


# --- selftest


class SelftestStep(Record, kw_only=True):
    step: str
    status: Literal["pass", "fail", "not possible here"]
    detail: Any = None
    """JSON: what was found, or the reason of the failure; null: not possible here"""
    seconds: float


class SelftestReport(Record, kw_only=True):
    """`edgeclip selftest`: made to be attached to an issue; no image, no path, no user's name."""

    kind: Literal["selftest"] = "selftest"
    format: int = FORMAT
    device: str | None = None
    """the profile's name"""
    edgeclip: str
    """version"""
    machine: Facts
    state: State
    target: NamedTarget
    bundle: str
    """sha256 of the bundle's manifest"""
    steps: list[SelftestStep]
