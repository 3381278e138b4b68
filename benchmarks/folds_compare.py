"""Paired differences over the folds of results/folds.jsonl, and what may be said of them.

Every method of a fold had the same teacher, images and steps, so a fold gives one difference to
PromptKD in harmonic mean over all labels, as it ships. The rows of one set and regime are judged
together:

    better, worse        the t-test over the folds, after Holm's correction for the number of rows, at 5 %
    level within 2 pp    the 90 % t-interval lies within 2 pp either way (two one-sided tests at 5 %)
    not told apart       neither

Folds share images, so their differences are not quite independent; the intervals are a little too
narrow (Nadeau and Bengio 2003).
"""

from typing import Any, NamedTuple

import numpy as np
from folds_table import REGIMES
from scipy import stats

REFERENCE = "PromptKD"
LEVEL = 0.02
"""harmonic mean; what is closer than this is called level"""
ALPHA = 0.05
HEADERS = [
    "set, regime",
    "model",
    "folds",
    f"minus {REFERENCE}, pp (95 % t)",
    "p (Holm)",
    "verdict",
]


class Difference(NamedTuple):
    """A model's harmonic means less the reference's, over the folds that both have."""

    model: str
    values: np.ndarray
    """[folds]"""

    def interval(self, cover: float) -> tuple[float, float]:
        """The t-interval of the mean."""
        half = stats.t.ppf(0.5 + cover / 2, len(self.values) - 1) * stats.sem(self.values)
        return float(self.values.mean() - half), float(self.values.mean() + half)

    def p(self) -> float:
        """Of the two-sided t-test; where all differences are the same, 1 if they are 0, else 0."""
        error = stats.sem(self.values)
        if not error:
            return float(not self.values.any())
        t = abs(self.values.mean()) / error
        return float(2 * stats.t.sf(t, len(self.values) - 1))


def holm(p: list[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): the i-th smallest of m times m - i, and none below a smaller
    one's.
    """
    adjusted = [0.0] * len(p)
    floor = 0.0
    for rank, i in enumerate(np.argsort(p)):
        floor = max(floor, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = floor
    return adjusted


def verdict(difference: Difference, p: float) -> str:
    """What may be said, of an adjusted p."""
    if p < ALPHA:
        return "better" if difference.values.mean() > 0 else "worse"
    low, high = difference.interval(1 - 2 * ALPHA)
    if -LEVEL <= low and high <= LEVEL:
        return f"level within {100 * LEVEL:g} pp"
    return "not told apart"


def differences(log: list[dict[str, Any]], name: str, regime: str) -> list[Difference]:
    """Every model of a set and regime less the reference, at the newest stage 1 that the log has
    of it.
    """
    own = [x for x in log if (x["set"], x["regime"]) == (name, regime)]
    if not own:
        return []
    own = [x for x in own if x["stage_1"] == own[-1]["stage_1"]]
    means: dict[str, dict[int, float]] = {}
    for line in own:
        means.setdefault(line["model"], {})[line["fold"]] = line["rules"]["shipped"]["mean"]
    reference = means.pop(REFERENCE, {})
    found = []
    for model, of in means.items():
        folds = sorted(of.keys() & reference.keys())
        if len(folds) > 1:
            found.append(Difference(model, np.array([of[k] - reference[k] for k in folds])))
    return found


def rows(log: list[dict[str, Any]]) -> list[list[Any]]:
    """A row a set, regime and model, the best first."""
    found = []
    for name, regime in dict.fromkeys((x["set"], x["regime"]) for x in log):
        group = differences(log, name, regime)
        adjusted = holm([d.p() for d in group])
        pairs = sorted(zip(group, adjusted, strict=True), key=lambda x: -x[0].values.mean())
        for difference, p in pairs:
            low, high = difference.interval(0.95)
            mean = difference.values.mean()
            found.append(
                [
                    f"{name}, {REGIMES.get(regime, regime)}",
                    difference.model,
                    len(difference.values),
                    f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
                    f"{p:.3f}",
                    verdict(difference, p),
                ]
            )
    return found
