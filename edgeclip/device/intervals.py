"""Three answers to a limit: it holds, it fails, or these images cannot tell.

A limit holds where the whole one-sided 95 % interval lies on its good side, fails where the whole
of the other one lies on its bad side, and else nothing can be told, but for how many images would
settle it. Two kinds of figures are judged:

    a share     images that answer otherwise, or whose cosine is below the limit: exact binomial
                limits (Clopper and Pearson 1934). A percentile is a share: the first percentile
                lies above c where at most 1 % lies below c
    a drop      paired answers before and after: Tango's score limits (metrics.paired_drop)

What is asked of several sets at once is asked of each at a level that all of them together keep
(Bonferroni).
"""

import functools
import math
import statistics
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from edgeclip.device.metrics import drop_limit, harmonic_mean

Answer = Literal["holds", "fails", "cannot tell"]
LEVEL = 0.95
"""of a one-sided limit"""
POWER = 0.8
"""how likely the number of images that is named settles a question"""
MOST = 1_000_000
"""images; a question that takes more is not settled by counting"""
NORMAL = statistics.NormalDist()
Z_POWER = NORMAL.inv_cdf(POWER + 0.01)
"""a little more than `POWER`, because counts are whole (benchmarks/verdict_power.py)"""


class Limits(NamedTuple):
    """Two one-sided limits of a figure; the larger it is, the worse."""

    low: float
    high: float

    def answer(self, allowed: float) -> Answer:
        """Return whether the figure is at most `allowed`; what is not finite fails."""
        if not np.isfinite([self.low, self.high, allowed]).all():
            return "fails"
        if self.high <= allowed:
            return "holds"
        if self.low > allowed:
            return "fails"
        return "cannot tell"


def worst(answers: list[Answer]) -> Answer:
    """Return what several answers come to: one that fails fails all, all must hold."""
    for answer in ("fails", "cannot tell"):
        if answer in answers:
            return answer
    return "holds"


# --- a share


def share_limits(count: int, images: int, level: float = LEVEL) -> Limits:
    """Return the limits of a share of which `count` of `images` were seen, 0..1.

    level: of each limit. No images: anything from 0 to 1.
    """
    low, high = 0.0, 1.0
    if count > 0:
        low = _least(lambda p: _at_most(count - 1, images, p) <= level)
    if count < images:
        high = _least(lambda p: _at_most(count, images, p) <= 1 - level)
    return Limits(low, high)


def harmonic_mean_limits(
    first: tuple[int, int], second: tuple[int, int], level: float = LEVEL
) -> Limits:
    """Return the limits of the harmonic mean of two accuracies, each (right, images).

    The mean grows with either, so it lies between the means of both lower and of both upper limits
    where each is taken at half the error. Wider than need be, never too narrow.
    """
    each = 1 - (1 - level) / 2
    of = [share_limits(right, images, each) for right, images in (first, second)]
    return Limits(*(harmonic_mean(a, b) for a, b in zip(*of, strict=True)))


def images_for_share(count: int, images: int, allowed: float, level: float = LEVEL) -> int | None:
    """Return how many images settle whether a share is at most `allowed`, if it is as seen.

    The answer then comes out in `POWER` of the cases. None: no number does, or none was seen.
    """
    if not images:
        return None
    share = count / images
    wanted: Answer = "holds" if share <= allowed else "fails"
    towards = 1.0 if wanted == "holds" else -1.0

    def settles(n: int) -> bool:
        unlucky = share * n + towards * Z_POWER * math.sqrt(share * (1 - share) * n)
        seen = min(n, max(0, math.ceil(unlucky) if towards > 0 else math.floor(unlucky)))
        return share_limits(seen, n, level).answer(allowed) == wanted

    return _fewest(settles)


def percentile_limits(
    values: np.ndarray, percent: float, level: float = LEVEL
) -> tuple[float | None, float | None]:
    """Return the limits of a percentile of values [n] by order statistics.

    None: too few values for a limit. Values are taken for independent of each other. Of values
    that are not finite both limits are NaN.
    """
    if not np.isfinite(values).all():
        return math.nan, math.nan
    ordered = np.sort(values)
    n = len(ordered)
    k = np.arange(n + 1)
    log_ways = _log_factorial(n)[n] - _log_factorial(n)[k] - _log_factorial(n)[n - k]
    q = percent / 100
    below = np.cumsum(np.exp(log_ways + k * math.log(q) + (n - k) * math.log1p(-q)))
    # The k-th smallest lies at or above the percentile where fewer than k values lie below it.
    low, high = None, None
    ranks = np.flatnonzero(below[:n] <= 1 - level)
    if len(ranks):
        low = float(ordered[ranks[-1]])
    ranks = np.flatnonzero(below[:n] >= level)
    if len(ranks):
        high = float(ordered[ranks[0]])
    return low, high


def _at_most(count: int, images: int, p: float) -> float:
    """Return P(X <= count) of X ~ Binomial(images, p)."""
    if p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    k = np.arange(count + 1)
    ways = _log_factorial(images)[images] - _log_factorial(images)[k]
    ways = ways - _log_factorial(images)[images - k]
    return float(np.exp(ways + k * math.log(p) + (images - k) * math.log1p(-p)).sum())


@functools.lru_cache(maxsize=8)
def _log_factorial(most: int) -> np.ndarray:
    """Return [most + 1] the logarithms of 0! to most!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])


def _least(reached: Callable[[float], bool]) -> float:
    """Return the least of 0..1 at which a condition is true that stays true from there on."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if reached(middle):
            high = middle
        else:
            low = middle
    return high


# --- a drop


def drop_limits(lost: int, won: int, images: int, level: float = LEVEL) -> Limits:
    """Return the limits of the accuracy lost from one system to another on the same images, 0..1.

    lost: images that were right before and are wrong after; won: the other way round. No images:
    anything.
    """
    if not images:
        return Limits(-1.0, 1.0)
    z = NORMAL.inv_cdf(level)
    return Limits(-drop_limit(won, lost, images, z), drop_limit(lost, won, images, z))


def mcnemar(lost: int, won: int) -> float:
    """Return the p-value of McNemar's exact two-sided test that as many are lost as won.

    Source: McNemar, Psychometrika 12 (1947), by the binomial distribution in place of its limit.
    """
    return min(1.0, 2 * _at_most(min(lost, won), lost + won, 0.5))


def images_for_drop(
    lost: int, won: int, images: int, allowed: float, level: float = LEVEL
) -> int | None:
    """Return how many images settle whether a drop is at most `allowed`.

    As many answers change as were seen to. Where the drop was seen to be allowed nothing is taken
    to be lost in truth, else as much as was seen. None: no number does, or none was seen.
    """
    if not images:
        return None
    changed = (lost + won) / images
    seen = (lost - won) / images
    wanted: Answer = "holds" if seen <= allowed else "fails"
    truth, towards = (0.0, 1.0) if wanted == "holds" else (seen, -1.0)
    spread = math.sqrt(max(0.0, changed - truth**2))

    def settles(n: int) -> bool:
        # Half a count for continuity: the net loss is a whole number.
        unlucky = truth * n + towards * (Z_POWER * spread * math.sqrt(n) - 0.5)
        net = math.ceil(unlucky) if towards > 0 else math.floor(unlucky)
        after_won = max(0, round((changed * n - net) / 2))
        after_lost = max(0, after_won + net)
        return drop_limits(after_lost, after_won, n, level).answer(allowed) == wanted

    return _fewest(settles)


def _fewest(settles: Callable[[int], bool]) -> int | None:
    """Return the fewest images that settle a question; None: more than `MOST` are needed."""
    high = 1
    while not settles(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        if settles(middle):
            high = middle
        else:
            low = middle
    return high
