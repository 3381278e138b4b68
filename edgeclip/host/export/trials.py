"""The candidates of an int8 target: chosen, written as they would ship, and judged.

Each is opened in its own runtime and compared with the float student on training images that gave
no ranges. `search` decides between them.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import onnx

from edgeclip.device.compared import short_of_agreement
from edgeclip.device.manifest import CandidateRow
from edgeclip.device.metrics import agreement, cosine
from edgeclip.device.target import Calibration, Target
from edgeclip.errors import EdgeclipError
from edgeclip.host.export.calibration import CalibrationImages
from edgeclip.host.export.speed import Run, open_encoder
from edgeclip.host.graph import policy
from edgeclip.host.graph.blocks import unsupported
from edgeclip.host.graph.policy import Candidate, Quantization
from edgeclip.host.graph.reconstruct import LEAST_IMAGES, Form
from edgeclip.host.graph.view import GraphView
from edgeclip.progress import say

BATCH = 16


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate as it was written and judged; equal only to itself."""

    quantization: Quantization
    run: Run
    row: CandidateRow
    """its line of the frontier; times and verdict are filled in when all have been tried"""
    short: list[str]
    """tolerances that it misses"""


class Task(NamedTuple):
    """What stays the same for all candidates."""

    model: onnx.ModelProto
    images: CalibrationImages
    target: Target
    spec: Calibration
    """the target's"""
    exporter: ModuleType
    answers: Run | None
    """[n, D] features to the class index each image gets; None where the student has no labels"""
    reference: np.ndarray
    """[m, D]: the float student's features of the judged images"""
    folder: Path
    """temporary"""


def candidates(task: Task) -> list[Trial]:
    """Return a trial of each candidate of the target that is no other one's double."""
    spec = task.spec
    trials: list[Trial] = []
    outer: dict[str, float] | None = None
    for values in itertools.product(spec.methods, spec.smoothing, spec.layers, spec.model_types):
        quantization = _choose(task, Candidate(*values), outer)
        if quantization is None:
            continue
        if outer is None:
            outer = _outer(quantization)
        trials.append(try_one(task, quantization, len(trials)))
    if not trials:
        raise EdgeclipError(
            "calibration",
            "no quantization candidate of this target applies to this model (no LayerNorm to "
            "smooth, no depthwise convolution, or residual with transformer)",
            "add null to smoothing, all to layers",
        )
    return trials


def _choose(
    task: Task, candidate: Candidate, outer: dict[str, float] | None
) -> Quantization | None:
    target = task.target
    reduce_range = policy.reduced_range(target)
    form = Form(
        symmetric=target.runtime == "tensorrt",
        outputs=target.runtime == "onnxruntime",
        nncf=target.runtime == "openvino",
        reduce_range=reduce_range,
    )
    return policy.choose(
        task.model,
        task.images.ranges,
        candidate,
        outer,
        task.spec,
        reduce_range,
        own_bias=target.runtime != "openvino",
        form=form,
    )


def _outer(quantization: Quantization) -> dict[str, float]:
    """Return the outer layers that stay in float for what they cost."""
    found = {}
    for name, cosine_left in quantization.float_layers.items():
        if cosine_left is not None:
            found[name] = cosine_left
    return found


def learn_rounding(task: Task, trials: list[Trial]) -> Trial:
    """Return the most exact of the trials with the most in int8 once more, its rounding learned."""
    most = max(trial.quantization.int8_share for trial in trials)
    fast = [trial for trial in trials if trial.quantization.int8_share == most]
    best = max(fast, key=mean_cosine).quantization
    candidate = best.candidate._replace(rounding="learned")
    quantization = _choose(task, candidate, _outer(best))
    assert quantization is not None
    return try_one(task, quantization, len(trials))


def not_learned(task: Task) -> str | None:
    """Return why no rounding can be learned; None: it can."""
    if task.target.precision != "int8":
        return f"{task.target.precision} has no grid of integers"
    if len(task.images.ranges) < LEAST_IMAGES:
        return f"{len(task.images.ranges)} calibration images, {LEAST_IMAGES} are needed"
    missing = unsupported(GraphView(task.model))
    if missing:
        return f"no gradient of {', '.join(missing)}"
    return None


def try_one(task: Task, quantization: Quantization, number: int) -> Trial:
    """Write a map as it would ship, run it on the judged images and compare."""
    folder = task.folder / str(number)
    folder.mkdir()
    file = task.exporter.write(task.model, task.target, quantization, folder)
    run = open_encoder(task.target, folder / file)
    judged = task.images.judged
    batches = [run(judged[start : start + BATCH]) for start in range(0, len(judged), BATCH)]
    features = np.concatenate(batches)

    close = cosine(features, task.reference)
    same = None
    where_right = None
    if task.answers is not None:
        answers = task.answers(features)
        reference = task.answers(task.reference)
        same = agreement(answers, reference)
        where_right = agreement(answers, reference, reference == task.images.labels)
    row = CandidateRow(
        **quantization.candidate._asdict(),
        float_layers=len(quantization.float_layers),
        int8_share_of_macs=quantization.int8_share,
        centered_cosine_mean=policy.centered_cosine(features, task.reference),
        centered_cosine_p1=close.centered_p1,
        top1_agreement=same,
        agreement_where_right=where_right,
        bytes=sum(f.stat().st_size for f in folder.iterdir()),
    )
    _say(quantization.candidate, row)
    return Trial(quantization, run, row, _short(task, row))


def _short(task: Task, row: CandidateRow) -> list[str]:
    """Return a line for each tolerance that a candidate misses."""
    tolerance = task.target.tolerance
    least = max(tolerance.centered_cosine_p1, task.spec.judged_cosine_p1)
    short = []
    p1 = row.centered_cosine_p1
    assert p1 is not None
    if not p1 >= least:  # not a number is short too
        short.append(f"centered cosine p1 {p1:.4f}, below {least}")
    return short + short_of_agreement(tolerance, row.top1_agreement, row.agreement_where_right)


def _say(candidate: Candidate, row: CandidateRow) -> None:
    name = ", ".join(str(value) for value in candidate if value is not None)
    line = (
        f"{name}, {row.float_layers} layers in float: int8 share {row.int8_share_of_macs:.3f}, "
        f"centered cosine p1 {row.centered_cosine_p1:.4f}"
    )
    if row.top1_agreement is not None:
        line += f", top-1 agreement {row.top1_agreement:.4f}"
    if row.agreement_where_right is not None:
        line += f", where right {row.agreement_where_right:.4f}"
    say(line)


def mean_cosine(trial: Trial) -> float:
    """Return a trial's mean cosine; one that is not finite is the least of all."""
    mean = finite(trial.row.centered_cosine_mean)
    if mean is None:
        return -math.inf
    return mean


def finite(value: float | None) -> float | None:
    """None for what is not finite: JSON has no word for it."""
    if value is None or not math.isfinite(value):
        return None
    return value
