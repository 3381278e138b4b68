"""The plots of the report, as inline SVG. Equal reports give equal bytes."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from edgeclip.device.manifest import CandidateRow, SearchRecord
from edgeclip.reports.models import MODELS
from edgeclip.reports.results import EvaluationResults
from edgeclip.reports.targets import Target, Waterfall, form

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


def plots(results: EvaluationResults, targets: Sequence[Target], steps: Waterfall) -> list[Plot]:
    """Return accuracy by step, the offsets' trade, accuracy against latency, each search, and the
    losses.

    A plot of which nothing was measured is left out.
    """
    drawn = [_steps(steps), _trade(results), _latency(targets)]
    for target in targets:
        drawn.append(_search(target))
    drawn.append(_losses(results))
    return [plot for plot in drawn if plot is not None]


def _steps(steps: Waterfall) -> Plot:
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3))
        axes = figure.subplots()
        width = 0.8 / len(steps.steps)
        for i, step in enumerate(steps.steps):
            places = [x + i * width for x in range(len(step.scores))]
            heights = [_or_nan(score.top1) for score in step.scores]
            axes.bar(places, heights, width, label=step.name)
        ticks = [x + 0.4 - width / 2 for x in range(len(steps.sets))]
        axes.set_xticks(ticks, steps.sets)
        axes.set_ylabel("top-1 accuracy")
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return Plot("Accuracy of each step; a bundle's on a part of the images", _svg(figure))


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
