"""`edgeclip export`: a source and a target become a bundle, or nothing at all.

The float graph is compared with torch at two batch sizes before it is converted, so a wrong trace
never ships; what the conversion to int8 costs is the question of `search` here and of `validate` on
the device.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import msgspec
import numpy as np
import onnx
import torch
from torch import nn

from edgeclip import disk
from edgeclip.device.manifest import (
    CalibrationImage,
    LintRecord,
    SearchRecord,
    TextRecord,
    write_manifest,
)
from edgeclip.device.target import Floor, Target
from edgeclip.errors import EdgeclipError
from edgeclip.host.export import calibration, tensorrt, write
from edgeclip.host.export.search import search
from edgeclip.host.export.source import Source
from edgeclip.host.export.write import GOLDEN_TEXTS, GoldenAnswers
from edgeclip.host.graph import learned
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.policy import Quantization
from edgeclip.host.towers.fold import fold
from edgeclip.progress import say

__all__ = ["EXPORTERS", "GOLDEN_TEXTS", "export"]

EXPORTERS = {
    "onnxruntime": "edgeclip.host.export.onnxruntime",
    "openvino": "edgeclip.host.export.openvino",
    "tensorrt": "edgeclip.host.export.tensorrt",
}
MAX_ONNX = 2**31
"""bytes of an ONNX file, which is one protobuf message"""
BATCHES = (1, 3)
"""batch sizes at which the graph must give torch's answers"""


class Int8(NamedTuple):
    """How the image encoder is quantized; the fields are empty for a float target."""

    quantization: Quantization | None = None
    record: SearchRecord | None = None
    images: list[CalibrationImage] = []


def export(source: Source, name: str, target: Target, out: Path) -> Path:
    """Write the bundle of `source` for `target`, which is called `name`, to `out`; return `out`.

    Raises `EdgeclipError` for too few calibration images, a missing runtime or a folder that
    another command writes, `WrongGraph` where an exported graph does not compute what torch
    computes, and `Refused` where int8 does not hold what the target asks for. Nothing is written
    then.
    """
    with disk.locked(out):
        return _export(source, name, target, out)


def _export(source: Source, name: str, target: Target, out: Path) -> Path:
    if target.floor == Floor():
        target = msgspec.structs.replace(target, floor=source.floor)
    if write.up_to_date(out, name, target, source):
        say(f"{out}: up to date (delete it to export again)")
        return out
    disk.refuse_foreign(out, "bundle")  # before the work, not after it
    _refuse_too_large(source.image_encoder)
    exporter = importlib.import_module(EXPORTERS[target.runtime])

    say(f"1/5 fold and trace the image encoder at {source.preprocess.size} px")
    golden = write.golden_answers(source)
    model = _trace(source, golden, target)

    int8 = Int8()
    if target.calibration:
        int8 = _quantize(source, model, name, target, exporter)
    in_int8 = ""
    if int8.quantization:
        share = int8.quantization.int8_share
        in_int8 = f", {share:.1%} of the multiply-accumulates in int8"
    say(f"2/5 write the image encoder as {name}{in_int8}")
    with disk.new_folder(out) as folder:
        image_encoder = exporter.write(model, target, int8.quantization, folder)
        (folder / "golden").mkdir()
        text = None
        if source.load_text:
            say("3/5 write the text encoder")
            text = write.text_encoder(source, target, exporter, folder)

        say("4/5 write labels, head and golden answers")
        write.labels_and_head(source, folder)
        golden_record = write.golden(source, golden, folder)

        lint = None
        if target.runtime == "tensorrt":
            say("5/5 check with TensorRT-RTX's parser and builder")
            lint = _check_for_tensorrt(folder, image_encoder, text, target)
        manifest = write.manifest(
            source,
            name,
            target,
            embed_dim=int(golden.features.shape[1]),
            image_encoder=image_encoder,
            image_encoder_bytes=sum(f.stat().st_size for f in folder.glob("image_encoder.*")),
            text=text,
            golden=golden_record,
            calibration=int8.images,
            quantization=int8.record,
            lint=lint,
        )
        write_manifest(folder, manifest)
    return out


def _refuse_too_large(module: nn.Module) -> None:
    """Raise `EdgeclipError` for weights that no ONNX file holds: protobuf ends at 2 GiB."""
    size = sum(p.numel() * 4 for p in module.parameters())
    if size >= MAX_ONNX:
        raise EdgeclipError(
            "image encoder",
            f"its weights are {size / 2**30:.1f} GiB in float32, an ONNX file holds less than 2",
            "distil it into a smaller student, or take a smaller model",
        )


def _trace(source: Source, golden: GoldenAnswers, target: Target) -> onnx.ModelProto:
    """Return the image encoder's graph.

    Raises `WrongGraph` where it does not give torch's answers.
    """
    example = torch.from_numpy(golden.inputs[:1])
    encoder = fold(source.image_encoder, example)
    model = graph.to_onnx(encoder, example, "pixels", "image_features", target.opset)
    for batch in BATCHES:
        rows = np.arange(batch) % len(golden.inputs)
        write.compare("image", model, golden.inputs[rows], golden.features[rows])
    return model


def _quantize(
    source: Source, model: onnx.ModelProto, name: str, target: Target, exporter: ModuleType
) -> Int8:
    """Return the int8 map that the search finds on the source's training images."""
    assert target.calibration is not None
    images = calibration.draw(source, target.calibration)
    say(
        f"search for the int8 candidate of {name}: ranges from {len(images.ranges)} training "
        f"images, judged on {len(images.judged)}"
    )
    scales = None
    if source.quantized:
        scales = learned.load(source.quantized, source.image_encoder, target, images.ranges)
    quantization, record = search(model, images, target, exporter, _answers(source), scales)
    return Int8(quantization, record, images.used)


def _answers(source: Source) -> Callable[[np.ndarray], np.ndarray] | None:
    """Image features [n, D] to each image's best class; None for a student without labels."""
    if not source.labels:
        return None

    return lambda features: source.scores(features).argmax(axis=1)


def _check_for_tensorrt(
    folder: Path, image_encoder: str, text: TextRecord | None, target: Target
) -> LintRecord:
    """Return what TensorRT says of the graphs. Raises `EdgeclipError` where it refuses one."""
    lint = tensorrt.require_legal(folder / image_encoder, target)
    if text:
        tensorrt.require_legal(folder / text.encoder, target)
    if lint.checked_by is None:
        say("checked by edgeclip's rules alone; for TensorRT-RTX: pip install 'edgeclip[lint]'")
    tensorrt.write_build_script(folder)
    return lint
