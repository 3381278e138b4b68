"""The table of results/folds.jsonl: means over the folds of a set."""

from typing import Any, NamedTuple

import numpy as np

REGIMES = {"full": "every weight", "small": "every weight, 80 px"}
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


class Row(NamedTuple):
    """What the lines of a row share."""

    set: str
    stage_1: str
    regime: str
    model: str

    def title(self) -> str:
        """What the table calls it."""
        stage_1 = f" ({self.stage_1.removeprefix('labels, ').replace(' (before)', ', before')})"
        regime = ""
        if self.regime not in ("teacher", "frozen"):
            regime = f", {REGIMES[self.regime]}"
        return f"{self.set}, {self.model}{stage_1}{regime}"


def row(line: dict[str, Any]) -> Row:
    """The row that a line belongs to."""
    return Row(*(line[field] for field in Row._fields))


def averages(log: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the folds, by the row's title."""
    found: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(row(x) for x in log):
        lines = [x for x in log if row(x) == key]
        of = {r: float(np.mean([x["rules"][r]["mean"] for x in lines])) for r in lines[0]["rules"]}
        gap = of["best"] - of["none"]
        found[key.title()] = {
            "folds": len(lines),
            "mean": of,
            "labeled": float(np.mean([x["rules"]["shipped"]["labeled"] for x in lines])),
            "unlabeled": float(np.mean([x["rules"]["shipped"]["unlabeled"] for x in lines])),
            "own_lists": float(np.mean([x["own_lists"]["mean"] for x in lines])),
            "area": float(np.mean([x["area"] for x in lines])),
            "closed": (of["shipped"] - of["none"]) / gap if gap else None,
        }
    return found


BEFORE = "ComKD"
"""what the recipes trained before the readings were judged"""


def closed_since(log: list[dict[str, Any]], name: str, model: str) -> tuple[float | None, int]:
    """How much of the gap of a set's first rows its last ones of `model` close, and on how many
    folds.
    """
    own = [x for x in log if (x["set"], x["regime"]) == (name, "frozen")]
    first = list(averages([x for x in own if x["model"] == BEFORE]).values())
    last = list(averages([x for x in own if x["model"] == model]).values())
    if not first or not last:
        return None, 0
    before, now = first[0], last[-1]
    gap = before["mean"]["best"] - before["mean"]["none"]
    if not gap:
        return None, now["folds"]
    return (now["mean"]["shipped"] - before["mean"]["none"]) / gap, now["folds"]


def of_teacher(log: list[dict[str, Any]], name: str, model: str, regime: str) -> list[float]:
    """A student's harmonic mean as it ships over that of its fold's teacher, fold by fold."""
    own = [x for x in log if x["set"] == name]
    found = []
    for line in own:
        if (line["model"], line["regime"]) != (model, regime):
            continue
        same = ("fold", "stage_1")
        teachers = [
            x for x in own if x["model"] == "teacher" and all(x[k] == line[k] for k in same)
        ]
        if teachers:
            mean = teachers[-1]["rules"]["shipped"]["mean"]
            found.append(line["rules"]["shipped"]["mean"] / mean)
    return found


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


KEPT_HEADERS = ["set, model, regime", "folds", "over its teacher, all labels", "each fold"]


def kept_rows(log: list[dict[str, Any]]) -> list[list[Any]]:
    """A row a set, model and regime of today's stage 1: a student's harmonic mean over its
    teacher's.
    """
    now = [x for x in log if "before" not in x["stage_1"] and x["model"] != "teacher"]
    found = []
    for name, model, regime in dict.fromkeys((x["set"], x["model"], x["regime"]) for x in now):
        ratios = of_teacher(now + [x for x in log if x["model"] == "teacher"], name, model, regime)
        if ratios:
            title = f"{name}, {model}, {REGIMES.get(regime, 'frozen features')}"
            each = ", ".join(f"{r:.2f}" for r in ratios)
            found.append([title, len(ratios), f"{np.mean(ratios):.3f}", each])
    return sorted(found)
