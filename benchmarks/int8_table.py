"""What benchmarks/int8.py requires of its figures, and how it prints them."""

from typing import Any

import common
import compare

EDGECLIP = {"edgeclip onnx-int8": "onnx-int8", "edgeclip openvino-int8": "openvino-int8"}
RIVALS = {
    "edgeclip onnx-int8": ("ORT dynamic", "ORT static", "ModelOpt"),
    "edgeclip openvino-int8": ("NNCF", "NNCF as optimum-intel"),
}
SAME = 0.005
"""centered cosines that are closer than this are called equal"""


def judged(
    label: str, threads: int, figures: dict[str, Any], laps: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """No more exact rival of the same runtime is faster, nor any that is about as exact as
    edgeclip's fastest.
    """
    required = []

    def over(own: str, rival: str, note: str = "") -> None:
        what = f"{label}, {threads} thread(s): {own} over {rival}{note}"
        required.append(compare.judge(what, compare.ratios(laps, rival, own), at_least=1.0))

    cosine = {engine: of["centered_cosine_p1"] for engine, of in figures.items()}
    for own, others in RIVALS.items():
        for rival in others:
            if own in cosine and rival in cosine and cosine[rival] > cosine[own]:
                over(own, rival, " (more exact)")
    there = [engine for engine in EDGECLIP if engine in figures]
    if there:
        best = min(there, key=lambda e: figures[e][f"latency_ms_{threads}"]["median"])
        for rival in figures:
            if rival not in EDGECLIP and cosine[rival] >= cosine[best] - SAME:
                over(best, rival)
    return required


def show(label: str, figures: dict[str, Any], threads: list[int]) -> None:
    """Print a row an engine."""
    rows = []
    for engine, of in figures.items():
        times = []
        for t in threads:
            for what in ("latency_ms", "times_torch"):
                times.append(str(compare.Interval(**of[f"{what}_{t}"])))
        same, right = (
            None if of[k] is None else f"{of[k]:.3f}" for k in ("top1_agreement", "accuracy")
        )
        size = f"{of['bytes'] / 2**20:.1f}"
        rows.append([engine, *times, size, f"{of['centered_cosine_p1']:.4f}", same, right])
    heads = [h for t in threads for h in (f"ms, {t} thread(s)", "times torch")]
    print(f"{label}, batch 1")
    columns = ["MiB", "centered cosine p1", "top-1 agreement", "unseen top-1"]
    common.table(rows, ["engine", *heads, *columns])
