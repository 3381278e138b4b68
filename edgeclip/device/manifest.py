"""A bundle's manifest: what ships, how it was made, and the sha256 of every file. docs/bundle.md
describes it.

Whoever writes into a bundle writes its hashes too, so the manifest is a claim of a stranger: every
field has bounds (bounds.py), and nothing lies in the folder that it does not list, nor any link.
"""

import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeclip import disk
from edgeclip.device.bounds import (
    Bytes,
    Cosine,
    Count,
    Difference,
    Digest,
    Line,
    Name,
    Positive,
    Scale,
    Share,
    Text,
    Tokens,
    Width,
)
from edgeclip.device.cleaning import Cleaning
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.records import FORMAT, Record, from_json, to_json
from edgeclip.device.target import NamedTarget
from edgeclip.errors import EdgeclipError

MOST_BYTES = 2**24
"""of a manifest; a search of hundreds of candidates writes a tenth of a MiB"""
MOST_FILES = 10_000
MOST_LABELS = 1_000_000
MOST_LAYERS = 100_000
GRAPHS = {"onnxruntime": ".onnx", "tensorrt": ".onnx", "openvino": ".xml"}
"""runtime to the ending of its graphs: by another one a runtime would take another reader"""

Parents = Annotated[dict[Line, Any], Meta(max_length=100)]
"""what a bundle was made of: sha256 and names, as far as its source has them"""


class VocabularyRecord(Record):
    """What `export --vocabulary` kept of the text encoder's embedding table."""

    kept: Count
    """tokens"""
    lost: Count
    """tokens"""
    table_bytes: Bytes
    """of the whole table in float32"""
    table_bytes_kept: Bytes
    texts: Count
    """how many texts asked for them"""


class TextRecord(Record):
    encoder: Name
    """file name"""
    context_length: Tokens
    """tokens; a longer text is refused"""
    cleaning: Cleaning | None = None
    """what is done to a text before tokenizer.json; null: nothing"""
    vocabulary: VocabularyRecord | None = None
    """null: every token"""


class Golden(Record):
    images: Annotated[list[Name], Meta(max_length=1_000)] = msgspec.field(default_factory=list)
    """file names; empty where the golden pixels are synthetic"""
    license: Text | None = None
    """of those images"""


class CalibrationImage(Record):
    """A training image that the quantization has seen."""

    key: Line
    sha256: Digest
    use: Literal["ranges", "judged"]


class Interval(Record):
    """A median of paired measurements, with the 99 % interval of it."""

    median: Positive
    low: Positive
    high: Positive


class CandidateRow(Record):
    """One int8 candidate of the search, as it would ship."""

    method: Line
    """how ranges were taken"""
    smoothing: Share | None
    """SmoothQuant's alpha; null: none"""
    layers: Line
    """which layers were candidates: all, dense or residual"""
    model_type: Line | None
    """NNCF's pattern set"""
    float_layers: Count
    """layers that stay in float"""
    int8_share_of_macs: Share
    """0..1"""
    centered_cosine_mean: Cosine | None
    """null: not finite; so below"""
    centered_cosine_p1: Cosine | None
    """first percentile"""
    top1_agreement: Share | None
    """0..1; null: no labels"""
    agreement_where_right: Share | None
    """0..1; null: no labels"""
    bytes: Bytes
    """of its files"""
    rounding: Literal["nearest", "learned"] = "nearest"
    """of the weights; learned: block by block against the float student's features"""
    latency_ms: Positive | None = None
    """median of one image; null: not measured on this machine"""
    times_as_fast: Interval | None = None
    """float32's time over this one's; null: not measured on this machine"""
    verdict: Line = ""
    """chosen, or why not"""


class SearchRecord(Record):
    """How the image encoder was quantized."""

    method: Line
    """how ranges were taken: minmax, mean, percentile or entropy"""
    smoothing: Share | None
    """SmoothQuant's alpha; null: none"""
    layers: Line
    """which layers were candidates: all, dense or residual"""
    model_type: Line | None
    """NNCF's pattern set; null: the plain one, or another runtime"""
    reduce_range: bool
    """true: weights of 7 bits, for an x86 without VNNI"""
    float_layers: Annotated[dict[Line, Cosine | None], Meta(max_length=MOST_LAYERS)]
    """name to the centered cosine that quantizing this layer alone leaves; null: in float by choice
    of candidate"""
    int8_layers: Count
    int8_nodes: Annotated[list[Line], Meta(max_length=MOST_LAYERS)]
    """the layers in int8, by name"""
    int8_share_of_macs: Share
    """0..1, of the candidates' multiply-accumulates"""
    judged_on: Count
    """training images"""
    judged_in: Line
    """the runtime that answered; for tensorrt ONNX Runtime, a proxy"""
    latency_ms_float: Positive | None
    """ms an image of the float32 graph on the exporting machine; null: not measured there, or under
    load"""
    learned: bool
    """true: the scales come from training with the rounding (`qat:`)"""
    frontier: Annotated[list[CandidateRow], Meta(max_length=10_000)]
    """every candidate that was tried"""
    rounding: Literal["nearest", "learned"] = "nearest"
    """of the weights; learned: block by block against the float student's features"""
    not_reconstructed: Line | None = None
    """why no rounding was learned though the target asks for it; null: it was, or is not asked"""


class LintRecord(Record):
    """What TensorRT's rules, and TensorRT-RTX where it is installed, say of the graph."""

    checked_by: Line | None
    """null: by our rules alone"""
    parses: bool | None
    """null: not asked; so below"""
    builds: bool | None
    errors: Annotated[list[Text], Meta(max_length=1_000)]
    """a line each"""


class ClassOffset(Record):
    """What is taken from the scores of the classes that had labels in training.

    They score higher than classes without labels on every image. It is fitted on training images;
    no label of the other classes takes part.
    """

    offset: Difference
    """in units of the score, a cosine"""
    labels: Annotated[list[Line], Meta(max_length=MOST_LABELS)]
    """the classes that had labels"""
    images: Count
    """training images that it was fitted on"""
    rule: Literal["midway", "labeled images", "prior", "balanced classes"]
    """midway: between the mean lead of `labels` on the images with a label and on the others; else
    how many images name one of `labels`: as many as have a label, the share that the recipe states,
    or the share that `labels` are of the classes"""
    labeled_named: Share
    """share of the images with a label that name one of `labels`, 0..1"""
    others_named: Share
    """share of the images without a label that name another class, 0..1"""
    labeled_named_without: Share
    """`labeled_named` where no class is set back"""
    others_named_without: Share
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
    image_encoder: Name
    """file name"""
    image_encoder_bytes: Bytes
    """of all files of the image encoder"""
    session_options: dict[Name, dict[Line, Line]] = msgspec.field(default_factory=dict)
    """file name of a graph to the session's options that its answers depend on, by the runtime's
    own names; {}: none, or a bundle of an edgeclip that did not write them"""
    preprocess: Preprocess
    logit_scale: Scale
    """already exponentiated"""
    embed_dim: Width
    """D"""
    templates: Annotated[list[Line], Meta(max_length=1_000)]
    """prompts with `{c}`; empty: the label alone"""
    text: TextRecord | None = None
    """null: baked labels only"""
    class_offset: ClassOffset | None = None
    """null: no class is set back"""
    golden: Golden
    licenses: Annotated[dict[Line, Text | None], Meta(max_length=100)]
    """of the models and the data, by what they are"""
    parents: Parents
    """what this was made of, by sha256"""
    calibration: Annotated[list[CalibrationImage], Meta(max_length=100_000)] = msgspec.field(
        default_factory=list
    )
    """empty for float targets"""
    quantization: SearchRecord | None = None
    """null for float targets"""
    lint: LintRecord | None = None
    """tensorrt only"""
    versions: Annotated[dict[Line, Line], Meta(max_length=100)]
    """of edgeclip and of the libraries that wrote the bundle"""
    files: Annotated[dict[Name, Digest], Meta(max_length=MOST_FILES)] = msgspec.field(
        default_factory=dict
    )
    """relative path to sha256, of every file but the manifest; filled in by `write_manifest`"""


def read_manifest(folder: Path) -> BundleManifest:
    """Return the manifest of the bundle at `folder`, of format 2, or of format 1 of edgeclip 0.1.

    Raises `EdgeclipError` for an unfinished bundle, for one of another format, for a field beyond
    its bounds, and for a folder that holds a link or a file that the manifest does not list.
    """
    file = folder / disk.MANIFEST
    if file.is_file() and not file.stat().st_size <= MOST_BYTES:
        what = f"its manifest has {file.stat().st_size:,} bytes, and {MOST_BYTES:,} is the most"
        raise EdgeclipError(folder, what, "export the bundle again")
    manifest = from_json(disk.read_manifest(folder, "bundle"), BundleManifest, folder)
    _refuse_unlisted(folder, manifest.files)
    _refuse_unnamed(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write the manifest with the sha256 of every file in `folder`: the last step of a bundle.

    Raises `EdgeclipError` for a field beyond its bounds: no bundle is written that cannot be read.
    """
    content = to_json(msgspec.structs.replace(manifest, files={}))
    from_json(content, BundleManifest, folder)
    del content["kind"], content["files"]
    disk.write_manifest(folder, "bundle", content)


def _refuse_unlisted(folder: Path, files: dict[str, str]) -> None:
    """Raise `EdgeclipError` for the first thing in a bundle that is no file of its manifest."""
    unfinished = re.compile(r"\.manifest\.[0-9a-f]{1,16}\.json")  # of a killed process: never read
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                kind = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(kind):
                    folders.append(Path(entry.path))
                elif not stat.S_ISREG(kind):
                    what = f"holds {name}, which is a link or a device"
                    raise EdgeclipError(folder, what, "put the file itself there, or remove it")
                elif name not in files and name != disk.MANIFEST and not unfinished.fullmatch(name):
                    what = f"holds {name}, which its manifest does not list"
                    raise EdgeclipError(folder, what, "remove it, or copy the bundle again")


def _refuse_unnamed(folder: Path, manifest: BundleManifest) -> None:
    """Raise `EdgeclipError` where the manifest names a file that it does not list."""
    graphs = [manifest.image_encoder]
    if manifest.text is not None:
        graphs.append(manifest.text.encoder)
    for name in graphs:
        if not name.endswith(GRAPHS[manifest.runtime]):
            what = f"its manifest calls {name} a graph of {manifest.runtime}"
            raise EdgeclipError(folder, what, "export the bundle again")
    for name in (*graphs, *manifest.golden.images):
        if name not in manifest.files:
            what = f"its manifest names {name} and does not list it"
            raise EdgeclipError(folder, what, "export the bundle again")
