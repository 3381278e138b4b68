"""Search until it holds: the fastest int8 form, measured on this machine, among those that keep the answers.

Every form that the target lists (range method, smoothing, layer set, model type) is written as it would ship, opened in
its own runtime and compared with the float student on training images that gave no ranges. Of those inside the
tolerance the fastest is chosen; within 5 % the more exact one. Times are noise, so they are compared in pairs, and what lies
within the interval of a comparison decides nothing: equal inputs make equal bundles. Where none holds, the layers of the best
form are ranked by the damage that quantizing each alone does, and the worst go back to float, by bisection, until the
tolerance holds.

A target is refused (exit 3) when it cannot hold the tolerance with `min_int8_share` of the multiply-accumulates left in
int8, or when it is not `min_speedup` times as fast as float32 in the same runtime. Speed is measured only where this
machine is of the target's kind; elsewhere it is null, and forms are chosen by accuracy. TensorRT's graph runs in ONNX
Runtime here: a proxy of its numerics, and so it is called in the record.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx

from edgeclip.device import machine
from edgeclip.device.metrics import agreement, cosine, median_interval
from edgeclip.device.runtime import open_session
from edgeclip.device.target import Calibration, Target
from edgeclip.device.validate import short_of_agreement
from edgeclip.errors import EdgeclipError, Refused
from edgeclip.host.export.calibration import CalibrationImages
from edgeclip.host.graph import policy
from edgeclip.host.graph.policy import Quantization
from edgeclip.progress import say

ROUNDS, QUERIES = 31, 4
SAME_SPEED = 1.05
"""a form is slower than another when the whole interval of their paired times lies above this ratio"""
BATCH = 16


class Candidate(NamedTuple):
    quantization: Quantization
    run: Callable[[np.ndarray], np.ndarray]
    row: dict[str, Any]
    """its line of the frontier, JSON-able"""
    short: list[str]
    """tolerances that it misses"""


class Task(NamedTuple):
    """What stays the same for all candidates."""

    model: onnx.ModelProto
    images: CalibrationImages
    target: Target
    exporter: Any
    answers: Callable[[np.ndarray], np.ndarray] | None
    """[n, D] features to the class index each image gets; None where the student has no labels"""
    reference: np.ndarray
    folder: Path


def search(
    model: onnx.ModelProto,
    images: CalibrationImages,
    target: Target,
    exporter: Any,
    answers: Callable[[np.ndarray], np.ndarray] | None,
    learned: Quantization | None = None,
) -> tuple[Quantization, dict[str, Any]]:
    """The map to ship, and its record with the frontier. Raises `Refused` where no map holds what the target asks.

    learned: the map of a student that was trained with this target's rounding: it alone is tried, as it is.
    """
    spec = target.calibration
    assert spec is not None
    reduce_range = policy.reduced_range(target)
    with tempfile.TemporaryDirectory() as temporary:
        task = Task(
            model,
            images,
            target,
            exporter,
            answers,
            policy.features(model, images.judged),
            Path(temporary),
        )
        tried = [_try(task, learned, 0)] if learned else list[Candidate]()
        if learned and tried[0].short:
            raise Refused(
                "qat",
                f"the student that learned with rounding does not hold: {'; '.join(tried[0].short)}",
                "train it longer (qat.epochs)",
            )
        outer: dict[str, float] | None = None
        forms = (
            []
            if learned
            else itertools.product(spec.methods, spec.smoothing, spec.layers, spec.model_types)
        )
        for form in (policy.Candidate(*values) for values in forms):
            found = policy.choose(
                model,
                images.ranges,
                form,
                outer,
                spec,
                reduce_range,
                own_bias=target.runtime != "openvino",
            )
            if found is None:
                continue
            if outer is None:
                outer = {k: v for k, v in found.float_layers.items() if v is not None}
            tried.append(_try(task, found, len(tried)))
        if not tried:
            what = "none of the target's forms is one of this student: nothing to smooth, no depthwise convolution, or residual with transformer"
            raise EdgeclipError("calibration", what, "add null to smoothing, all to layers")
        holding = [c for c in tried if not c.short]
        if not holding:
            best = max(tried, key=lambda c: c.row["centered_cosine_mean"])
            more = _give_back(task, best, spec, len(tried))
            tried += more
            holding = [c for c in more if not c.short][-1:]
        laps = _time(task, holding)
    as_fast = (
        holding
        if laps is None
        else [c for i, c in enumerate(holding) if not slower(laps[:, 1:], i)]
    )
    chosen = max(
        as_fast, key=lambda c: c.row["centered_cosine_p1"]
    )  # the first of equals: the target's order
    float_ms = None if laps is None else _milliseconds(laps[:, 0])
    if laps is not None:
        for c, own in zip(holding, laps.T[1:], strict=True):
            c.row["latency_ms"] = _milliseconds(own)
            c.row["times_as_fast"] = _rounded(median_interval(laps[:, 0] / own))
    for c in tried:
        c.row["verdict"] = (
            "chosen"
            if c is chosen
            else "; ".join(c.short) or ("less exact" if any(c is a for a in as_fast) else "slower")
        )
    _refuse(chosen, target, spec)
    record = {
        **chosen.quantization.candidate._asdict(),
        "reduce_range": chosen.quantization.reduce_range,
        "float_layers": chosen.quantization.float_layers,
        "int8_layers": len(chosen.quantization.nodes),
        "int8_nodes": chosen.quantization.nodes,
        "int8_share_of_macs": chosen.quantization.int8_share,
        "judged_on": len(images.judged),
        "judged_in": _judged_in(target),
        "latency_ms_float": float_ms,
        "learned": learned is not None,
    }
    return chosen.quantization, record | {"frontier": [c.row for c in tried]}


def _try(task: Task, quantization: Quantization, number: int) -> Candidate:
    folder = task.folder / str(number)
    folder.mkdir()
    path = folder / task.exporter.write(task.model, task.target, quantization, folder)
    run = _session(task.target, path)
    found = np.concatenate(
        [run(task.images.judged[i : i + BATCH]) for i in range(0, len(task.images.judged), BATCH)]
    )
    close, tolerance, spec = (
        cosine(found, task.reference),
        task.target.tolerance,
        task.target.calibration,
    )
    least = max(tolerance.centered_cosine_p1, spec.judged_cosine_p1 if spec else 0.0)
    same, where_right = None, None
    if task.answers is not None:
        answers, reference = task.answers(found), task.answers(task.reference)
        same, where_right = (
            agreement(answers, reference),
            agreement(answers, reference, reference == task.images.labels),
        )
    row: dict[str, Any] = {
        **quantization.candidate._asdict(),
        "float_layers": len(quantization.float_layers),
        "int8_share_of_macs": quantization.int8_share,
        "centered_cosine_mean": policy.centered_cosine(found, task.reference),
        "centered_cosine_p1": close.centered_p1,
        "top1_agreement": same,
        "agreement_where_right": where_right,
        "bytes": sum(f.stat().st_size for f in folder.iterdir()),
        "latency_ms": None,
        "times_as_fast": None,
    }
    short = []
    if not close.centered_p1 >= least:  # not a number is short too
        short.append(f"centered cosine p1 {close.centered_p1:.4f}, below {least}")
    short += short_of_agreement(tolerance, same, where_right)
    form = ", ".join(str(v) for v in quantization.candidate if v is not None)
    say(
        f"{form}, {row['float_layers']} layers in float: int8 share {quantization.int8_share:.3f}, centered cosine p1 {close.centered_p1:.4f}"
        + "".join(
            f", {what} {v:.4f}"
            for what, v in (("top-1 agreement", same), ("where right", where_right))
            if v is not None
        )
    )
    return Candidate(quantization, run, row, short)


def _give_back(task: Task, best: Candidate, spec: Calibration, number: int) -> list[Candidate]:
    """Candidates with ever fewer of the worst layers in float, the last of which holds; raises `Refused` where none can.

    The most that the int8 share allows is tried first: where even that fails, nothing between can hold.
    """
    q = best.quantization
    alone = policy.sensitivity(
        q.calibrated,
        q.nodes,
        task.images.ranges[: policy.PROBES],
        "damage of each layer",
        q.reduce_range,
    )
    worst = sorted(q.nodes, key=alone.__getitem__)

    def given(count: int) -> Quantization:
        back = {n: round(alone[n], 4) for n in worst[:count]}
        return policy.of_layers(
            q.candidate, q.calibration, q.calibrated, {**q.float_layers, **back}, q.reduce_range
        )

    most = 0
    while most < len(worst) and given(most + 1).int8_share >= spec.min_int8_share:
        most += 1
    tried = [_try(task, given(most), number)] if most else [best]
    if tried[0].short:
        raise Refused(
            task.target.runtime,
            f"int8 does not hold: with the {len(tried[0].quantization.float_layers)} worst layers in float (int8 share {tried[0].quantization.int8_share:.3f}) "
            + "; ".join(tried[0].short),
            "take a float16 or float32 target, distil with `qat`, or lower the tolerance in a target of your own",
        )
    low, high = 0, most  # low fails, high holds
    while high - low > 1:
        middle = (low + high) // 2
        candidate = _try(task, given(middle), number + len(tried))
        low, high = (middle, high) if candidate.short else (low, middle)
        if candidate.short:
            tried.insert(0, candidate)
        else:
            tried.append(candidate)
    return tried


def _time(task: Task, candidates: list[Candidate]) -> np.ndarray | None:
    """[ROUNDS, 1 + candidates] milliseconds of float32 and of each candidate (batch 1, one thread). None: not this machine's kind."""
    if not measured_here(task.target):
        return None
    folder = task.folder / "float"
    folder.mkdir()
    plain = msgspec.structs.replace(task.target, precision="fp32", calibration=None)
    in_float = _session(plain, folder / task.exporter.write(task.model, plain, None, folder))
    return interleaved([in_float, *(c.run for c in candidates)], task.images.judged[:1])


def interleaved(runs: list[Callable[[np.ndarray], np.ndarray]], x: np.ndarray) -> np.ndarray:
    """Run all of `runs` on `x` in rounds; return [ROUNDS, runs], the least milliseconds of each in each round.

    What the machine does meanwhile falls on all of a round alike, so that their ratios within it are comparable; the order rotates, so
    that none always follows the same one. The least of a round, since what disturbs a run only adds to it.
    """
    laps = np.empty((ROUNDS, len(runs)))
    for turn in range(ROUNDS):
        for k in range(len(runs)):
            i = (turn + k) % len(runs)
            runs[i](x)  # its caches were emptied by the others
            found = []
            for _ in range(QUERIES):
                before = time.perf_counter()
                runs[i](x)
                found.append(1e3 * (time.perf_counter() - before))
            laps[turn, i] = min(found)
    return laps


def slower(laps: np.ndarray, i: int) -> bool:
    """Is candidate `i` of laps [ROUNDS, candidates] resolved as slower than the fastest, by more than what counts as the same speed?"""
    fastest = laps[:, np.median(laps, axis=0).argmin()]
    _, low, _ = median_interval(laps[:, i] / fastest)
    return low > SAME_SPEED


def _milliseconds(own: np.ndarray) -> float:
    return round(float(np.median(own)), 4)


def _rounded(values: tuple[float, float, float]) -> dict[str, float]:
    return {
        name: round(value, 4) for name, value in zip(("median", "low", "high"), values, strict=True)
    }


def measured_here(target: Target) -> bool:
    """Is this machine of the kind that the target's int8 form is for?"""
    arch = machine.facts().arch
    if target.runtime == "onnxruntime":
        return arch == ("x86_64" if target.activations == "uint8" else "aarch64")
    return target.runtime == "openvino" and arch == "x86_64"


def _refuse(chosen: Candidate, target: Target, spec: Calibration) -> None:
    """Raises `Refused` for too small an int8 share, and for a speed that the interval of its measurement excludes."""
    share, speed = chosen.quantization.int8_share, chosen.row["times_as_fast"]
    do = "take a float16 or float32 target, or lower the limit in a target of your own"
    if share < spec.min_int8_share:
        raise Refused(
            target.runtime,
            f"only {share:.3f} of the multiply-accumulates stay in int8, below {spec.min_int8_share}",
            do,
        )
    if speed is not None and not speed["high"] >= spec.min_speedup:
        what = f"int8 is {speed['median']:.2f} times as fast as float32 here ({speed['low']:.2f} to {speed['high']:.2f}; {chosen.row['latency_ms']:.2f} ms)"
        raise Refused(target.runtime, f"{what}, below {spec.min_speedup:g}", do)


def _judged_in(target: Target) -> str:
    return (
        "onnxruntime on the CPU, a proxy of TensorRT's numerics"
        if target.runtime == "tensorrt"
        else target.runtime
    )


def _session(target: Target, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    if target.runtime != "tensorrt":
        return open_session(target.runtime, path, 1).run
    import onnxruntime as ort

    from edgeclip.device.runtime.onnxruntime import disabled_optimizers

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if target.precision == "fp8":  # ONNX Runtime's rewriting of Q/DQ takes float8 for int8
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled_optimizers(path),
    )
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]
