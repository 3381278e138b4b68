"""The tables of results/choices.jsonl: a candidate's mean over the inner folds of a set, and how many folds prefer it."""

from typing import Any

import numpy as np

Log = list[dict[str, Any]]
TITLES = {"stage1": "stage 1", "readings": "reading"}


def preferred(log: Log, kind: str) -> dict[str, dict[int, str]]:
    """What each fold of a set prefers, by set and fold: the best mean over its inner folds."""
    found: dict[str, dict[int, str]] = {}
    for name, k in dict.fromkeys((x["set"], x["fold"]) for x in log if x["kind"] == kind):
        own = [x for x in log if (x["kind"], x["set"], x["fold"]) == (kind, name, k)]
        means = {c: mean([x for x in own if x["candidate"] == c]) for c in candidates(own, kind)}
        found.setdefault(name, {})[k] = max(means, key=lambda c: means[c])
    return found


def candidates(log: Log, kind: str) -> list[str]:
    """Those that the log has, in its order."""
    return list(dict.fromkeys(x["candidate"] for x in log if x["kind"] == kind))


def mean(lines: Log, rule: str = "shipped") -> float:
    """The mean harmonic mean of some lines over all labels."""
    return float(np.mean([x["rules"][rule]["mean"] for x in lines]))


def rows(log: Log, kind: str) -> list[list[Any]]:
    """A row a candidate."""
    chosen = preferred(log, kind)
    found = []
    for candidate in candidates(log, kind):
        cells: list[Any] = [candidate]
        for name in chosen:
            own = [x for x in log if (x["kind"], x["set"]) == (kind, name)]
            lines = [x for x in own if x["candidate"] == candidate]
            cells += [
                f"{mean(lines):.3f}" if lines else "",
                list(chosen[name].values()).count(candidate),
            ]
        found.append(cells)
    return found


def headers(log: Log, kind: str) -> list[str]:
    """Of the table."""
    cells = [TITLES[kind]]
    for name in preferred(log, kind):
        cells += [name, "folds that prefer it"]
    return cells


def offset_rows(log: Log) -> list[list[Any]]:
    """A row a set and stage 1: the harmonic mean by the rule that sets the offset."""
    found = []
    for name in dict.fromkeys(x["set"] for x in log):
        for candidate in candidates(log, "stage1"):
            key = ("stage1", name, candidate)
            lines = [x for x in log if (x["kind"], x["set"], x["candidate"]) == key]
            if lines:
                means = [f"{mean(lines, rule):.3f}" for rule in OFFSETS]
                found.append([f"{name}, {candidate}", *means])
    return found


OFFSETS = ("none", "shares", "shipped", "best")
OFFSET_HEADERS = [
    "set, stage 1",
    "no offset",
    "as many as have a label",
    "midway (ships)",
    "best",
]
