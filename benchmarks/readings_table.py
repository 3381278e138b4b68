"""The readings' table from their log: what each gains over the default reading, paired by seed."""

from typing import Any

import numpy as np
from scipy import stats

CHOOSE = ("clothing", "grocery")
CHECK = "openmoji"
DEFAULT = "default: batch axis, unit, mean L1, lambda 100, C .1, FC on the query"


def scores(log: list[dict[str, Any]]) -> dict[tuple[str, str, int], float]:
    """Return (set, reading, seed) to the score."""
    return {(line["set"], line["reading"], line["seed"]): line["score"] for line in log}


def gains(log: list[dict[str, Any]], name: str, reading: str) -> np.ndarray:
    """Return the gains of `reading` over the default on set `name`, one for each seed that has
    both, in their order.
    """
    found = scores(log)
    seeds = sorted(seed for set_, own, seed in found if (set_, own) == (name, reading))
    paired = [seed for seed in seeds if (name, DEFAULT, seed) in found]
    return np.array([found[name, reading, seed] - found[name, DEFAULT, seed] for seed in paired])


def mean_gain(log: list[dict[str, Any]], reading: str) -> float:
    """Return the mean gain over the sets that the choice is made on."""
    return float(np.mean([gains(log, name, reading).mean() for name in CHOOSE]))


def sorted_readings(log: list[dict[str, Any]], names: list[str] | None = None) -> list[str]:
    """Return the readings of the log (or of `names`), the best on average first."""
    if names is None:
        names = list(dict.fromkeys(line["reading"] for line in log))
    return sorted(names, key=lambda reading: -mean_gain(log, reading))


def cell(log: list[dict[str, Any]], name: str, reading: str) -> str:
    """Return the mean gain in percentage points with its 95 % t-interval over the seeds; nothing
    for the default.
    """
    if reading == DEFAULT:
        return ""
    gain = 100 * gains(log, name, reading)
    half = float(stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain)))
    return f"{gain.mean():+.1f} ({gain.mean() - half:+.1f} to {gain.mean() + half:+.1f})"
