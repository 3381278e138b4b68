"""Candidates on this machine: opened, timed beside each other, and told apart where possible."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgeclip.device import machine
from edgeclip.device.load import OtherWork
from edgeclip.device.metrics import median_interval
from edgeclip.device.rules import QUIET
from edgeclip.device.runtime import open_session
from edgeclip.device.runtime.onnxruntime import disabled_optimizers
from edgeclip.device.target import Target
from edgeclip.progress import say

ROUNDS = 31
QUERIES = 4
ATTEMPTS = 3
"""under load, before times are given up"""
SAME_SPEED = 1.05
"""a candidate is slower than another when the whole interval of their paired times' ratio lies
above this"""

Run = Callable[[np.ndarray], np.ndarray]
"""an encoder: inputs to features"""


def measured_here(target: Target) -> bool:
    """Return whether this machine is of the kind that the target's int8 form is for."""
    arch = machine.facts().arch
    if target.runtime == "openvino":
        return arch == "x86_64"
    if target.runtime != "onnxruntime":
        return False
    if target.activations == "uint8":
        return arch == "x86_64"
    return arch == "aarch64"


def interleaved(runs: list[Run], x: np.ndarray) -> np.ndarray:
    """Run all of `runs` on `x` in rounds; return [ROUNDS, runs], each one's least milliseconds.

    What the machine does meanwhile falls on all of a round alike, so that ratios within it are
    comparable; the order rotates, so that none always follows the same one. The least of a round,
    since what disturbs a run only adds to it.
    """
    laps = np.empty((ROUNDS, len(runs)))
    for turn in range(ROUNDS):
        for k in range(len(runs)):
            i = (turn + k) % len(runs)
            runs[i](x)  # its caches were emptied by the others
            times = []
            for _ in range(QUERIES):
                before = time.perf_counter()
                runs[i](x)
                times.append(1e3 * (time.perf_counter() - before))
            laps[turn, i] = min(times)
    return laps


def quiet(runs: list[Run], x: np.ndarray) -> np.ndarray | None:
    """Return the laps of `interleaved`; None where other work had the machine `ATTEMPTS` times."""
    for _ in range(ATTEMPTS):
        others = OtherWork()
        laps = interleaved(runs, x)
        busy = others.processors()
        if busy is None or busy <= QUIET:
            return laps
        say(f"other work had {busy:.1f} processors while candidates were timed: once more")
    say("times are unknown: the most exact candidate is taken; export again on a quiet machine")
    return None


def slower(laps: np.ndarray, i: int) -> bool:
    """Return whether candidate `i` of laps [ROUNDS, candidates] is resolved as slower.

    Slower than the fastest, by more than what counts as the same speed.
    """
    fastest = laps[:, np.median(laps, axis=0).argmin()]
    _, low, _ = median_interval(laps[:, i] / fastest)
    return not low <= SAME_SPEED


def milliseconds(laps: np.ndarray) -> float:
    """Return the median of laps [ROUNDS], rounded for a report."""
    return round(float(np.median(laps)), 4)


def open_encoder(target: Target, path: Path) -> Run:
    """Open the graph at `path` as the target's device would, TensorRT's in ONNX Runtime."""
    if target.runtime != "tensorrt":
        return open_session(target.runtime, path, 1).run

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
