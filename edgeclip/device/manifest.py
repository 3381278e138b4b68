"""A bundle's manifest: what ships, how it was made, and the sha256 of every file. docs/bundle.md
describes it."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeclip import disk
from edgeclip.device.cleaning import Cleaning
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.records import FORMAT, Record, from_json, to_json
from edgeclip.device.target import NamedTarget

Parents = dict[str, Any]
"""what a bundle was made of: sha256 and names, as far as its source has them"""


class VocabularyRecord(Record):
    """What `export --vocabulary` kept of the text encoder's embedding table."""

    kept: int
    """tokens"""
    lost: int
    """tokens"""
    table_bytes: int
    """of the whole table in float32"""
    table_bytes_kept: int
    texts: int
    """how many texts asked for them"""


class TextRecord(Record):
    encoder: str
    """file name"""
    context_length: int
    """tokens; a longer text is refused"""
    cleaning: Cleaning | None = None
    """what is done to a text before tokenizer.json; null: nothing"""
    vocabulary: VocabularyRecord | None = None
    """null: every token"""


class Golden(Record):
    images: list[str] = msgspec.field(default_factory=list)
    """file names; empty where the golden pixels are synthetic"""
    license: str | None = None
    """of those images"""


class CalibrationImage(Record):
    """A training image that the quantization has seen."""

    key: str
    sha256: str
    use: Literal["ranges", "judged"]


class Interval(Record):
    """A median of paired measurements, with the 99 % interval of it."""

    median: float
    low: float
    high: float


class CandidateRow(Record):
    """One int8 candidate of the search, as it would ship."""

    method: str
    """how ranges were taken"""
    smoothing: float | None
    """SmoothQuant's alpha; null: none"""
    layers: str
    """which layers were candidates: all, dense or residual"""
    model_type: str | None
    """NNCF's pattern set"""
    float_layers: int
    """layers that stay in float"""
    int8_share_of_macs: float
    """0..1"""
    centered_cosine_mean: float | None
    """null: not finite; so below"""
    centered_cosine_p1: float | None
    """first percentile"""
    top1_agreement: float | None
    """0..1; null: no labels"""
    agreement_where_right: float | None
    """0..1; null: no labels"""
    bytes: int
    """of its files"""
    latency_ms: float | None = None
    """median of one image; null: not measured on this machine"""
    times_as_fast: Interval | None = None
    """float32's time over this one's; null: not measured on this machine"""
    verdict: str = ""
    """chosen, or why not"""


class SearchRecord(Record):
    """How the image encoder was quantized."""

    method: str
    """how ranges were taken: minmax, mean, percentile or entropy"""
    smoothing: float | None
    """SmoothQuant's alpha; null: none"""
    layers: str
    """which layers were candidates: all, dense or residual"""
    model_type: str | None
    """NNCF's pattern set; null: the plain one, or another runtime"""
    reduce_range: bool
    """true: weights of 7 bits, for an x86 without VNNI"""
    float_layers: dict[str, float | None]
    """name to the centered cosine that quantizing this layer alone leaves; null: in float by choice
    of candidate"""
    int8_layers: int
    int8_nodes: list[str]
    """the layers in int8, by name"""
    int8_share_of_macs: float
    """0..1, of the candidates' multiply-accumulates"""
    judged_on: int
    """training images"""
    judged_in: str
    """the runtime that answered; for tensorrt ONNX Runtime, a proxy"""
    latency_ms_float: float | None
    """ms an image of the float32 graph on the exporting machine; null: not measured there, or under
    load"""
    learned: bool
    """true: the scales come from training with the rounding (`qat:`)"""
    frontier: list[CandidateRow]
    """every candidate that was tried"""


class LintRecord(Record):
    """What TensorRT's rules, and TensorRT-RTX where it is installed, say of the graph."""

    checked_by: str | None
    """null: by our rules alone"""
    parses: bool | None
    """null: not asked; so below"""
    builds: bool | None
    errors: list[str]
    """a line each"""


class ClassOffset(Record):
    """What is taken from the scores of the classes that had labels in training.

    They score higher than classes without labels on every image. It is fitted on training images;
    no label of the other classes takes part.
    """

    offset: float
    """in units of the score, a cosine"""
    labels: list[str]
    """the classes that had labels"""
    images: int
    """training images that it was fitted on"""
    rule: Literal["midway", "labeled images", "prior", "balanced classes"]
    """midway: between the mean lead of `labels` on the images with a label and on the others; else
    how many images name one of `labels`: as many as have a label, the share that the recipe states,
    or the share that `labels` are of the classes"""
    labeled_named: float
    """share of the images with a label that name one of `labels`, 0..1"""
    others_named: float
    """share of the images without a label that name another class, 0..1"""
    labeled_named_without: float
    """`labeled_named` where no class is set back"""
    others_named_without: float
    """`others_named` where no class is set back"""


class BundleManifest(Record, kw_only=True):
    """manifest.json of a bundle, format 2."""

    kind: Literal["bundle"] = "bundle"
    """which of edgeclip's folders this is"""
    format: int = FORMAT
    """a reader refuses a number that it does not know"""
    target: NamedTarget
    """the target's name, and every field of its YAML"""
    runtime: Literal["onnxruntime", "openvino", "tensorrt"]
    """who opens the graphs"""
    image_encoder: str
    """file name"""
    image_encoder_bytes: int
    """of all files of the image encoder"""
    session_options: dict[str, dict[str, str]] = msgspec.field(default_factory=dict)
    """file name of a graph to the session's options that its answers depend on, by the runtime's
    own names; {}: none, or a bundle of an edgeclip that did not write them"""
    preprocess: Preprocess
    logit_scale: float
    """already exponentiated"""
    embed_dim: int
    """D"""
    templates: list[str]
    """prompts with `{c}`; empty: the label alone"""
    text: TextRecord | None = None
    """null: baked labels only"""
    class_offset: ClassOffset | None = None
    """null: no class is set back"""
    golden: Golden
    licenses: dict[str, str | None]
    """of the models and the data, by what they are"""
    parents: Parents
    """what this was made of, by sha256"""
    calibration: list[CalibrationImage] = msgspec.field(default_factory=list)
    """empty for float targets"""
    quantization: SearchRecord | None = None
    """null for float targets"""
    lint: LintRecord | None = None
    """tensorrt only"""
    versions: dict[str, str]
    """of edgeclip and of the libraries that wrote the bundle"""
    files: dict[str, str] = msgspec.field(default_factory=dict)
    """relative path to sha256, of every file but the manifest; filled in by `write_manifest`"""


def read_manifest(folder: Path) -> BundleManifest:
    """Return the manifest of the bundle at `folder`, of format 2, or of format 1 of edgeclip 0.1.

    Raises `EdgeclipError` for an unfinished bundle, and for one of another format.
    """
    return from_json(disk.read_manifest(folder, "bundle"), BundleManifest, folder)


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write the manifest with the sha256 of every file in `folder`: the last step of a bundle."""
    content = to_json(msgspec.structs.replace(manifest, files={}))
    del content["kind"], content["files"]
    disk.write_manifest(folder, "bundle", content)
