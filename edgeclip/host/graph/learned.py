"""The scales that a student learned with its int8 target's rounding, from distill to export.

run/quantized/quantized.safetensors   the folded student's weights
              quantized.json          `LearnedScales`
              manifest.json           last
"""

from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from edgeclip import disk
from edgeclip.device.target import Target
from edgeclip.disk import Json
from edgeclip.host.graph import policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.policy import Candidate, Quantization
from edgeclip.host.graph.qdq import Calibrated, calibrate, with_ranges
from edgeclip.host.towers.fold import fold

WEIGHTS = "quantized.safetensors"
RECORD = "quantized.json"


class Rounding(msgspec.Struct, frozen=True):
    """What two targets must share for the scales learned for one to be right for the other."""

    runtime: str
    activations: str | None
    reduce_range: str | None
    opset: int


class LearnedScales(msgspec.Struct, frozen=True):
    """quantized.json: which layers round, and in which ranges."""

    target: Rounding
    nodes: list[str]
    """the layers in int8, by the name of their node in the folded student's graph"""
    float_layers: dict[str, float | None]
    """the other products, with the centered cosine that quantizing each alone leaves"""
    ranges: dict[str, tuple[float, float]]
    """tensor to the lowest and highest value that its learned scale covers"""
    log: list[Json]
    """the training's log, a row an epoch"""
    reduce_range: bool
    """true: weights of 7 bits"""
    candidate: Json = msgspec.field(name="form")
    """how the first ranges were taken: the fields of `policy.Candidate`"""


def rounding_of(target: Target) -> Rounding:
    """Return what decides how the graph of `target` rounds."""
    return Rounding(target.runtime, target.activations, target.reduce_range, target.opset)


def load(
    folder: Path, student: nn.Module, target: Target, images: np.ndarray
) -> Quantization | None:
    """Return the map of the fine-tuned copy in `folder`; None where it has none for `target`.

    student: the module that was folded and fine-tuned. images: float32 [n, 3, H, W]; they give the
    ranges that were not learned. Raises `EdgeclipError` where a file of the folder was changed.
    """
    if not (folder / disk.MANIFEST).exists():
        return None
    disk.verify(folder, disk.read_manifest(folder, "quantized student"))
    record = msgspec.convert(disk.read_json(folder / RECORD), LearnedScales)
    if record.target != rounding_of(target):
        return None

    x = torch.from_numpy(images[:1])
    folded = fold(student, x)
    folded.load_state_dict(load_file(folder / WEIGHTS))
    model = graph.to_onnx(folded, x, "pixels", "image_features", target.opset)

    candidate = Candidate(**record.candidate)
    calibrated = calibrate(model, images, candidate.method)
    ready = Calibrated(calibrated.model, with_ranges(calibrated.ranges, record.ranges))
    return policy.of_layers(candidate, images, ready, record.float_layers, record.reduce_range)
