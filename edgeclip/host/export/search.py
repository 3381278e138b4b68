"""Search until it holds: the fastest int8 candidate among those that keep the answers.

Every candidate that the target lists (range method, smoothing, layer set, model type) is written as
it would ship, opened in its own runtime and compared with the float student on training images that
gave no ranges. Of those inside the tolerance the fastest is chosen; within 5 % the more exact one.
Times are noise, so they are compared in pairs, and what lies within the interval of a comparison
decides nothing: equal inputs make equal bundles. Times under load are unknown: after three
attempts the most exact candidate is taken. Where none holds, the layers of the best candidate
are ranked by their sensitivity, and the worst fall back to float, by bisection, until the tolerance
holds.

A target is refused (exit 3) when it cannot hold the tolerance with `min_int8_share` of the
multiply-accumulates left in int8, or when it is not `min_speedup` times as fast as float32 in the
same runtime. Speed is measured only where this machine is of the target's kind; elsewhere it is
null, and candidates are chosen by accuracy. TensorRT's graph runs in ONNX Runtime here: a proxy of
its numerics, and so it is called in the record.
"""

import itertools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import onnx
from msgspec.structs import replace

from edgeclip.device.compared import short_of_agreement
from edgeclip.device.manifest import CandidateRow, Interval, SearchRecord
from edgeclip.device.metrics import agreement, cosine, median_interval
from edgeclip.device.target import Calibration, Target
from edgeclip.errors import EdgeclipError, Refused
from edgeclip.host.export.calibration import CalibrationImages
from edgeclip.host.export.speed import (
    Run,
    measured_here,
    milliseconds,
    open_encoder,
    quiet,
    slower,
)
from edgeclip.host.graph import policy
from edgeclip.host.graph.policy import Candidate, Quantization
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


def search(
    model: onnx.ModelProto,
    images: CalibrationImages,
    target: Target,
    exporter: ModuleType,
    answers: Run | None,
    learned: Quantization | None = None,
) -> tuple[Quantization, SearchRecord]:
    """Return the map to ship, and its record with the frontier.

    learned: the map of a student that was trained with this target's rounding: it alone is tried,
    as it is. Raises `Refused` where no map holds what the target asks for.
    """
    assert target.calibration is not None
    reference = policy.features(model, images.judged)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = Task(model, images, target, target.calibration, exporter, answers, reference, folder)
        trials = [_try_learned(task, learned)] if learned else _try_candidates(task)
        holding = [trial for trial in trials if not trial.short]
        if not holding:
            more = _fall_back_to_float(task, trials)
            trials += more
            holding = [trial for trial in more if not trial.short][-1:]
        laps = _time(task, holding)

    as_fast = holding
    if laps is not None:
        as_fast = [trial for i, trial in enumerate(holding) if not slower(laps[:, 1:], i)]
    # The first of equals, in the target's order.
    chosen = max(as_fast, key=_lowest_cosine)

    rows = _rows(trials, holding, laps, as_fast, chosen)
    _refuse(rows[trials.index(chosen)], task)
    return chosen.quantization, _record(task, chosen.quantization, rows, laps, learned is not None)


def _try_learned(task: Task, learned: Quantization) -> Trial:
    """Return the one trial of a student that learned with the rounding."""
    trial = _try(task, learned, 0)
    if trial.short:
        raise Refused(
            "qat",
            f"the student trained with rounding does not hold the target: {'; '.join(trial.short)}",
            "train it longer (qat.epochs)",
        )
    return trial


def _try_candidates(task: Task) -> list[Trial]:
    """Return a trial of each candidate of the target that is no other one's double."""
    spec = task.spec
    trials: list[Trial] = []
    outer: dict[str, float] | None = None
    for values in itertools.product(spec.methods, spec.smoothing, spec.layers, spec.model_types):
        quantization = policy.choose(
            task.model,
            task.images.ranges,
            Candidate(*values),
            outer,
            spec,
            policy.reduced_range(task.target),
            own_bias=task.target.runtime != "openvino",
        )
        if quantization is None:
            continue
        if outer is None:
            outer = {}
            for name, cosine_left in quantization.float_layers.items():
                if cosine_left is not None:
                    outer[name] = cosine_left
        trials.append(_try(task, quantization, len(trials)))
    if not trials:
        raise EdgeclipError(
            "calibration",
            "no quantization candidate of this target applies to this model (no LayerNorm to "
            "smooth, no depthwise convolution, or residual with transformer)",
            "add null to smoothing, all to layers",
        )
    return trials


def _try(task: Task, quantization: Quantization, number: int) -> Trial:
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


def _fall_back_to_float(task: Task, trials: list[Trial]) -> list[Trial]:
    """Trials with ever fewer of the worst layers in float, the last of which holds.

    The most that the int8 share allows is tried first: where even that fails, nothing between can
    hold, and `Refused` is raised.
    """
    best = max(trials, key=_mean_cosine)
    steps = _fallbacks(task, best.quantization)
    more = [best]
    if steps:
        more = [_try(task, steps[-1], len(trials))]
    if more[0].short:
        row = more[0].row
        raise Refused(
            task.target.runtime,
            f"int8 does not hold: with the {row.float_layers} worst layers in float (int8 share "
            f"{row.int8_share_of_macs:.3f}) {'; '.join(more[0].short)}",
            "take a float16 or float32 target, distil with `qat`, or lower the tolerance in a "
            "target of your own",
        )
    low = 0  # so many layers in float fail
    high = len(steps)  # so many hold
    while high - low > 1:
        middle = (low + high) // 2
        trial = _try(task, steps[middle - 1], len(trials) + len(more))
        if trial.short:
            low = middle
            more.insert(0, trial)
        else:
            high = middle
            more.append(trial)
    return more


def _mean_cosine(trial: Trial) -> float:
    """Return a trial's mean cosine; one that is not finite is the least of all."""
    mean = _finite(trial.row.centered_cosine_mean)
    if mean is None:
        return -math.inf
    return mean


def _lowest_cosine(trial: Trial) -> float:
    """Return a holding trial's first percentile: it is finite, or the trial would not hold."""
    assert trial.row.centered_cosine_p1 is not None
    return trial.row.centered_cosine_p1


def _fallbacks(task: Task, best: Quantization) -> list[Quantization]:
    """Return maps with ever more of the worst layers in float, as far as the share allows."""
    probes = task.images.ranges[: policy.PROBES]
    what = "sensitivity of each layer"
    cosines = policy.sensitivity(best.calibrated, best.nodes, probes, what, best.reduce_range)
    steps: list[Quantization] = []
    in_float = dict(best.float_layers)
    for name in sorted(best.nodes, key=cosines.__getitem__):
        in_float = {**in_float, name: round(cosines[name], 4)}
        step = policy.of_layers(
            best.candidate, best.calibration, best.calibrated, in_float, best.reduce_range
        )
        if not step.int8_share >= task.spec.min_int8_share:
            break
        steps.append(step)
    return steps


def _time(task: Task, trials: list[Trial]) -> np.ndarray | None:
    """Milliseconds [ROUNDS, 1 + trials] of float32 and of each trial, batch 1 on one thread.

    None: this machine is not of the target's kind, or other work has it.
    """
    if not measured_here(task.target):
        return None
    folder = task.folder / "float"
    folder.mkdir()
    plain = replace(
        task.target, precision="fp32", calibration=None, activations=None, reduce_range=None
    )
    in_float = open_encoder(plain, folder / task.exporter.write(task.model, plain, None, folder))
    return quiet([in_float, *(trial.run for trial in trials)], task.images.judged[:1])


def _rows(
    trials: list[Trial],
    holding: list[Trial],
    laps: np.ndarray | None,
    as_fast: list[Trial],
    chosen: Trial,
) -> list[CandidateRow]:
    """Return the frontier in the order of `trials`, with times and verdicts."""
    rows = []
    for trial in trials:
        if trial is chosen:
            verdict = "chosen"
        elif trial.short:
            verdict = "; ".join(trial.short)
        elif trial in as_fast:
            verdict = "less exact"
        else:
            verdict = "slower"
        row = replace(
            trial.row,
            centered_cosine_mean=_finite(trial.row.centered_cosine_mean),
            centered_cosine_p1=_finite(trial.row.centered_cosine_p1),
            verdict=verdict,
        )
        rows.append(row)
    if laps is None:
        return rows

    for i, trial in enumerate(holding):
        own = laps[:, 1 + i]
        median, low, high = median_interval(laps[:, 0] / own)
        at = trials.index(trial)
        rows[at] = replace(
            rows[at],
            latency_ms=milliseconds(own),
            times_as_fast=Interval(median=round(median, 4), low=round(low, 4), high=round(high, 4)),
        )
    return rows


def _refuse(row: CandidateRow, task: Task) -> None:
    """Raise `Refused` for too small an int8 share, and for a speed that its interval excludes."""
    do = "take a float16 or float32 target, or lower the limit in a target of your own"
    share = row.int8_share_of_macs
    if not share >= task.spec.min_int8_share:
        raise Refused(
            task.target.runtime,
            f"only {share:.3f} of the multiply-accumulates stay in int8, below "
            f"{task.spec.min_int8_share}",
            do,
        )
    speed = row.times_as_fast
    if speed is not None and not speed.high >= task.spec.min_speedup:
        raise Refused(
            task.target.runtime,
            f"int8 is {speed.median:.2f} times as fast as float32 here ({speed.low:.2f} to "
            f"{speed.high:.2f}; {row.latency_ms:.2f} ms), below {task.spec.min_speedup:g}",
            do,
        )


def _record(
    task: Task,
    quantization: Quantization,
    rows: list[CandidateRow],
    laps: np.ndarray | None,
    learned: bool,
) -> SearchRecord:
    latency_ms_float = None
    if laps is not None:
        latency_ms_float = milliseconds(laps[:, 0])
    judged_in: str = task.target.runtime
    if judged_in == "tensorrt":
        judged_in = "onnxruntime on the CPU, a proxy of TensorRT's numerics"
    return SearchRecord(
        **quantization.candidate._asdict(),
        reduce_range=quantization.reduce_range,
        float_layers=quantization.float_layers,
        int8_layers=len(quantization.nodes),
        int8_nodes=quantization.nodes,
        int8_share_of_macs=quantization.int8_share,
        judged_on=len(task.images.judged),
        judged_in=judged_in,
        latency_ms_float=latency_ms_float,
        learned=learned,
        frontier=rows,
    )


def _finite(value: float | None) -> float | None:
    """None for what is not finite: JSON has no word for it."""
    if value is None or not math.isfinite(value):
        return None
    return value
