"""Search until it holds: the fastest int8 candidate among those that keep the answers.

Every candidate that the target lists (range method, smoothing, layer set, model type) is written as
it would ship, opened in its own runtime and compared with the float student on training images that
gave no ranges; the most exact of those with the most in int8 once more, its rounding learned. Of
those inside the tolerance the fastest is chosen; within 5 % the more exact one. Times are noise, so
they are compared in pairs, and what lies within the interval of a comparison decides nothing: equal
inputs make equal bundles. Times under load are unknown: after three attempts the most exact
candidate is taken. Where none holds, the layers of the best candidate are ranked by their
sensitivity, and the worst fall back to float, by bisection, until the tolerance holds.

A target is refused (exit 3) when it cannot hold the tolerance with `min_int8_share` of the
multiply-accumulates left in int8, or when it is not `min_speedup` times as fast as float32 in the
same runtime. Speed is measured only where this machine is of the target's kind; elsewhere it is
null, and candidates are chosen by accuracy. TensorRT's graph runs in ONNX Runtime here: a proxy of
its numerics, and so it is called in the record.
"""

import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
from msgspec.structs import replace

from edgeclip.device.manifest import CandidateRow, Interval, SearchRecord
from edgeclip.device.metrics import median_interval
from edgeclip.device.target import Target
from edgeclip.errors import Refused
from edgeclip.host.export.calibration import CalibrationImages
from edgeclip.host.export.speed import (
    Run,
    measured_here,
    milliseconds,
    open_encoder,
    quiet,
    slower,
)
from edgeclip.host.export.trials import (
    Task,
    Trial,
    candidates,
    finite,
    learn_rounding,
    mean_cosine,
    not_learned,
    try_one,
)
from edgeclip.host.graph import policy
from edgeclip.host.graph.policy import Quantization
from edgeclip.progress import say


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
        trials = [_try_learned(task, learned)] if learned else candidates(task)
        nearest = None
        if task.spec.reconstruction and not learned:
            nearest = not_learned(task)
            if nearest is None:
                trials.append(learn_rounding(task, trials))
            else:
                say(f"rounding is not learned, biases are corrected instead: {nearest}")
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
    record = _record(task, chosen.quantization, rows, laps, learned is not None)
    return chosen.quantization, replace(record, not_reconstructed=nearest)


def _try_learned(task: Task, learned: Quantization) -> Trial:
    """Return the one trial of a student that learned with the rounding."""
    trial = try_one(task, learned, 0)
    if trial.short:
        raise Refused(
            "qat",
            f"the student trained with rounding does not hold the target: {'; '.join(trial.short)}",
            "train it longer (qat.epochs)",
        )
    return trial


def _fall_back_to_float(task: Task, trials: list[Trial]) -> list[Trial]:
    """Trials with ever fewer of the worst layers in float, the last of which holds.

    The most that the int8 share allows is tried first: where even that fails, nothing between can
    hold, and `Refused` is raised.
    """
    best = max(trials, key=mean_cosine)
    steps = _fallbacks(task, best.quantization)
    more = [best]
    if steps:
        more = [try_one(task, steps[-1], len(trials))]
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
        trial = try_one(task, steps[middle - 1], len(trials) + len(more))
        if trial.short:
            low = middle
            more.insert(0, trial)
        else:
            high = middle
            more.append(trial)
    return more


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
            centered_cosine_mean=finite(trial.row.centered_cosine_mean),
            centered_cosine_p1=finite(trial.row.centered_cosine_p1),
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
