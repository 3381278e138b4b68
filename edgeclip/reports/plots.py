"""The plots of the report, as inline SVG. Equal reports give equal bytes."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from edgeclip.device.bench_report import BenchReport, Histogram, Sustained
from edgeclip.device.manifest import CandidateRow, SearchRecord
from edgeclip.device.records import ParityReport
from edgeclip.reports.models import MODELS
from edgeclip.reports.results import EvaluationResults
from edgeclip.reports.targets import Target, form

STYLE: Any = {
    "svg.hashsalt": "edgeclip",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Plot(NamedTuple):
    """A figure of the page."""

    caption: str
    svg: str


def plots(results: EvaluationResults, targets: Sequence[Target]) -> list[Plot]:
    """Return the offsets' trade, accuracy against latency, each search, and the losses.

    A plot of which nothing was measured is left out.
    """
    drawn = [_latency(targets), _trade(results)]
    for target in targets:
        drawn.append(_search(target))
    drawn.append(_losses(results))
    return [plot for plot in drawn if plot is not None]


def dumbbells(parity: ParityReport) -> Plot | None:
    """Return the steps from the teacher to the device, each with its interval; None: not known."""
    found = parity.waterfall
    if found is None:
        return None
    steps = [*found.steps, found.whole]
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 0.45 * len(steps) + 1.1))
        axes = figure.subplots()
        allowed = parity.tolerance.accuracy_drop_pp
        axes.axvspan(-allowed, allowed, color="C2", alpha=0.15, label=f"allowed: {allowed:g} pp")
        axes.axvline(0, color="0.5", linewidth=0.8)
        for i, step in enumerate(steps):
            axes.plot([step.lower_pp, step.upper_pp], [i, i], color="C0", linewidth=2)
            axes.plot([0, step.drop_pp], [i, i], color="C1", linewidth=4, alpha=0.5)
            axes.scatter([0, step.drop_pp], [i, i], color=["0.5", "C1"], zorder=3)
        axes.set_yticks(range(len(steps)), [step.name for step in steps])
        axes.invert_yaxis()
        axes.set_xlabel("top-1 lost, percentage points (line: 95 % limits)")
        axes.legend(fontsize=7, frameon=False, loc="lower right")
        return Plot(
            "What each step lost of the one before it, on the same unseen images", _svg(figure)
        )


def spread(bench: BenchReport) -> Plot | None:
    """Return the stages of an image, and how the times of whole images are spread."""
    whole, stages = bench.whole_image, bench.stages
    if whole is None or stages is None or whole.from_file.histogram is None:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3))
        bar, axes = figure.subplots(2, 1, height_ratios=(1, 4))
        left = 0.0
        for name in ("decode", "preprocess", "model", "head"):
            ms = getattr(stages, f"{name}_ms") or 0.0
            bar.barh([0], [ms], left=left, label=f"{name} {ms:.2f} ms")
            left += ms
        bar.set_yticks([])
        bar.set_xlim(left=0)
        bar.legend(fontsize=7, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        for what, of in (("from bytes", whole.from_file), ("from a camera", whole.from_frame)):
            if of.histogram is not None:
                _bins(axes, of.histogram, f"{what}: p90 {of.latency_ms_p90:.2f} ms")
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds from an image to its label")
        axes.set_ylabel("queries")
        axes.legend(fontsize=7, frameon=False)
        return Plot("Median stages of an image, and all queries up to their p99", _svg(figure))


def _bins(axes: Any, histogram: Histogram, label: str) -> None:
    width = (histogram.high_ms - histogram.low_ms) / len(histogram.counts)
    edges = [histogram.low_ms + i * width for i in range(len(histogram.counts) + 1)]
    axes.stairs(histogram.counts, edges, fill=True, alpha=0.5, label=label)


def load_curve(sustained: Sustained) -> Plot:
    """Return the p90 of each tenth of a sustained load."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 2.2))
        axes = figure.subplots()
        tenth = sustained.minutes / len(sustained.windows)
        minutes = [(i + 0.5) * tenth for i in range(len(sustained.windows))]
        axes.plot(minutes, [w.latency_ms_p90 for w in sustained.windows], marker="o", label="p90")
        axes.plot(minutes, [w.latency_ms_p50 for w in sustained.windows], marker=".", label="p50")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("minutes of sustained load")
        axes.set_ylabel("model, ms")
        axes.legend(fontsize=7, frameon=False)
        return Plot("The model under sustained load", _svg(figure))


def _trade(results: EvaluationResults) -> Plot | None:
    """Return what the unlabeled half gains and the labeled half loses as the offset grows."""
    if results.trade is None or results.halves is None:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(4.5, 3))
        axes = figure.subplots()
        curve = results.trade.curve
        axes.plot([p.labeled for p in curve], [p.unlabeled for p in curve], label="any offset")
        by_name = {score.name: score for score in results.sets}
        labeled, unlabeled = (by_name[name] for name in results.halves)
        for model, marker in (("student", "*"), ("student_without_offset", "o")):
            x = getattr(labeled, model)
            y = getattr(unlabeled, model)
            if x is not None and y is not None:
                axes.scatter(x.top1, y.top1, marker=marker, s=60, label=MODELS[model], zorder=3)
        axes.set_xlabel(f"top-1 over all labels, {results.halves[0]}")
        axes.set_ylabel(f"top-1, {results.halves[1]}")
        axes.legend(fontsize=7, frameon=False)
        caption = "What an offset gives to classes without labels and takes from those with labels"
        return Plot(caption, _svg(figure))


def _or_nan(value: float | int | None) -> float:
    if value is None:
        return math.nan
    return value


def _latency(targets: Sequence[Target]) -> Plot | None:
    measured = []
    for target in targets:
        latency = getattr(getattr(target.bench, "single_stream", None), "latency_ms_p90", None)
        top1 = getattr(getattr(target.parity, "accuracy", None), "bundle_top1", None)
        if latency is not None and top1 is not None:
            measured.append((target, latency, top1))
    if not measured:
        return None

    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3))
        axes = figure.subplots()
        for target, latency, top1 in measured:
            place = (latency, top1)
            axes.scatter(*place, clip_on=False, s=target.bytes / 2**20 * 12 + 20)
            axes.annotate(target.row, place, textcoords="offset points", xytext=(8, 4), fontsize=8)
        axes.margins(x=0.3, y=0.3)
        axes.set_xlim(left=0)
        axes.set_xlabel("p90 latency, ms (batch 1)")
        axes.set_ylabel("top-1 accuracy over all parity images")
        caption = "Accuracy against latency; the area grows with the image encoder's bytes"
        return Plot(caption, _svg(figure))


def _search(target: Target) -> Plot | None:
    """Return the int8 candidates that were timed: what each keeps, and what it costs."""
    if target.quantization is None:
        return None
    timed = [c for c in target.quantization.frontier if c.latency_ms is not None]
    if not timed:
        return None

    with rc_context(STYLE):
        figure = Figure(figsize=(7, 2.6))
        axes = figure.subplots()
        for candidate in timed:
            _candidate(axes, candidate)
        _float32(axes, target.quantization)
        axes.margins(x=0.3, y=0.3)
        axes.set_xlabel("latency on the machine that exported, ms (batch 1, one thread)")
        axes.set_ylabel("centered cosine p1")
        axes.legend(fontsize=7, frameon=False)
        what = "the int8 candidates that held the tolerance in the search"
        return Plot(f"{target.row}: {what}; the star was chosen", _svg(figure))


def _candidate(axes: Any, candidate: CandidateRow) -> None:
    look: dict[str, Any] = {"marker": "o", "s": 30, "color": "C0"}
    if candidate.verdict == "chosen":
        look = {"marker": "*", "s": 110, "color": "C1"}
    place = (candidate.latency_ms, candidate.centered_cosine_p1)
    axes.scatter(*place, **look)
    axes.annotate(form(candidate), place, textcoords="offset points", xytext=(7, 3), fontsize=7)


def _float32(axes: Any, search: SearchRecord) -> None:
    axes.axvline(search.latency_ms_float, color="0.6", linestyle=":", label="float32")


def _losses(results: EvaluationResults) -> Plot | None:
    log = results.log
    if len(log) < 2:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 2.6))
        axes = figure.subplots()
        epochs = [row["epoch"] for row in log]
        for name in sorted(log[-1].keys() - {"epoch", "loss"}):
            axes.plot(epochs, [_or_nan(row.get(name)) for row in log], marker=".", label=name)
        axes.set_xlabel("epoch (0: projector on the frozen tower)")
        axes.legend(fontsize=7, frameon=False)
        return Plot("Losses before their weights, and EduAttention's alpha", _svg(figure))


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
