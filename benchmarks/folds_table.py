"""The table of results/folds.jsonl: means over the folds of a set."""

from typing import Any

import numpy as np

HEADERS = [
    "set, model",
    "folds",
    "no offset",
    "shipped",
    "best",
    "of its gap closed",
    "with / without labels",
    "AUSUC",
    "in own lists",
]


def averages(log: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the folds, by "set, model"; whether stage 1 learned balanced pseudo-labels as well."""
    found: dict[str, dict[str, Any]] = {}
    for name, balanced, model in dict.fromkeys(_row(x) for x in log):
        lines = [x for x in log if _row(x) == (name, balanced, model)]
        of = {r: float(np.mean([x["rules"][r]["mean"] for x in lines])) for r in lines[0]["rules"]}
        gap = of["best"] - of["none"]
        stage_1 = ", balanced stage 1" if balanced else ""
        found[f"{name}{stage_1}, {model}"] = {
            "folds": len(lines),
            "mean": of,
            "labeled": float(np.mean([x["rules"]["shipped"]["labeled"] for x in lines])),
            "unlabeled": float(np.mean([x["rules"]["shipped"]["unlabeled"] for x in lines])),
            "own_lists": float(np.mean([x["own_lists"]["mean"] for x in lines])),
            "area": float(np.mean([x["area"] for x in lines])),
            "closed": (of["shipped"] - of["none"]) / gap if gap else None,
        }
    return found


def closed_since(log: list[dict[str, Any]], name: str, model: str) -> tuple[float | None, int]:
    """How much of the gap of a set's first rows its last ones close, and on how many folds."""
    found = averages([x for x in log if (x["set"], x["model"]) == (name, model)])
    rows_of_set = list(found.values())
    before, now = rows_of_set[0], rows_of_set[-1]
    gap = before["mean"]["best"] - before["mean"]["none"]
    if not gap:
        return None, now["folds"]
    return (now["mean"]["shipped"] - before["mean"]["none"]) / gap, now["folds"]


def _row(line: dict[str, Any]) -> tuple[str, bool, str]:
    return line["set"], line["balanced"], line["model"]


def rows(log: list[dict[str, Any]]) -> list[list[Any]]:
    """A row a set and model; harmonic means over all labels, but for the last column."""
    found = []
    for name, of in averages(log).items():
        means = [f"{of['mean'][rule]:.3f}" for rule in ("none", "shipped", "best")]
        closed = None
        if of["closed"] is not None:
            closed = f"{of['closed']:.0%}"
        halves = f"{of['labeled']:.3f} / {of['unlabeled']:.3f}"
        own = f"{of['own_lists']:.3f}"
        found.append([name, of["folds"], *means, closed, halves, f"{of['area']:.3f}", own])
    return found
