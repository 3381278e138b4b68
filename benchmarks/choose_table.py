"""The tables of results/choices.jsonl: a candidate's mean over the inner folds of a set, and which
one is chosen.
"""

from typing import Any

import numpy as np
from scipy import stats

Log = list[dict[str, Any]]
TITLES = {
    "stage1": "stage 1",
    "readings": "reading",
    "schedules": "schedule of stage 2",
    "captions": "losses, every weight at 80 px",
}


def shared(log: Log, kind: str, name: str) -> dict[str, np.ndarray]:
    """The harmonic means of each candidate over the inner folds that all candidates of a set have,
    in the log's order.
    """
    own = [x for x in log if (x["kind"], x["set"]) == (kind, name)]
    means: dict[str, dict[tuple[int, int], float]] = {}
    for line in own:
        place = (line["fold"], line["inner"])
        means.setdefault(line["candidate"], {})[place] = line["rules"]["shipped"]["mean"]
    places = sorted(set.intersection(*[set(of) for of in means.values()]))
    return {c: np.array([of[p] for p in places]) for c, of in means.items()}


def chosen(log: Log, kind: str) -> dict[str, str]:
    """By set, the first candidate within one standard error of the best; the paired differences
    give the error.
    """
    found = {}
    for name in dict.fromkeys(x["set"] for x in log if x["kind"] == kind):
        of = shared(log, kind, name)
        best = max(of.values(), key=np.mean)
        for candidate, means in of.items():
            behind = best - means
            if behind.mean() <= (stats.sem(behind) if len(behind) > 1 else 0.0):
                found[name] = candidate
                break
    return found


def candidates(log: Log, kind: str) -> list[str]:
    """Those that the log has, in its order."""
    return list(dict.fromkeys(x["candidate"] for x in log if x["kind"] == kind))


def mean(lines: Log, rule: str = "shipped") -> float:
    """The mean harmonic mean of some lines over all labels."""
    return float(np.mean([x["rules"][rule]["mean"] for x in lines]))


def rows(log: Log, kind: str) -> list[list[Any]]:
    """A row a candidate: its mean on each set; the one that is chosen is bold."""
    of = {name: shared(log, kind, name) for name in chosen(log, kind)}
    found = []
    for candidate in candidates(log, kind):
        cells: list[Any] = [candidate]
        for name, taken in chosen(log, kind).items():
            cell = ""
            if candidate in of[name]:
                cell = f"{of[name][candidate].mean():.3f}"
            cells.append(f"**{cell}**" if candidate == taken else cell)
        found.append(cells)
    return found


def headers(log: Log, kind: str) -> list[str]:
    """Of the table; how many inner folds a set's means are over."""
    cells = [TITLES[kind]]
    for name in chosen(log, kind):
        (count,) = {len(means) for means in shared(log, kind, name).values()}
        cells.append(f"{name} ({count} inner folds)")
    return cells


OFFSETS = ("none", "shares", "midway", "shipped", "best")
OFFSET_HEADERS = [
    "set, stage 1",
    "no offset",
    "as many as have a label",
    "midway",
    "the smaller (ships)",
    "best",
]


def offset_rows(log: Log) -> list[list[Any]]:
    """The harmonic mean by the rule that sets the offset: of labels alone, and of the stage 1 that
    is chosen.
    """
    found = []
    for name, taken in chosen(log, "stage1").items():
        for candidate in dict.fromkeys(("labels alone", taken)):
            key = ("stage1", name, candidate)
            lines = [x for x in log if (x["kind"], x["set"], x["candidate"]) == key]
            if lines:
                means = [f"{mean(lines, rule):.3f}" for rule in OFFSETS]
                found.append([f"{name}, {candidate}", *means])
    return found
