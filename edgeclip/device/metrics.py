"""The numbers of parity and accuracy, in numpy.

Fractions run 0..1; only `_pp` is in percentage points.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from edgeclip.device.records import Closeness, PairedDrop

Z_ONE_SIDED = statistics.NormalDist().inv_cdf(0.95)
UNIT = 0.02
"""so much the length of a unit row may differ from 1: float16 rounds to a thousandth"""
NEVER = np.iinfo(np.int64).max
"""the rank of a query whose own score is not finite: beyond every k"""


def off_unit(rows: np.ndarray) -> float | None:
    """Return by how much the length of a row [B, D] differs from 1 at most.

    None where a value is not finite, or so large that no length can be computed.
    """
    lengths = np.linalg.norm(np.asarray(rows, np.float64), axis=-1)
    if not np.isfinite(lengths).all():
        return None
    return float(np.abs(lengths - 1).max(initial=0.0))


def l2_normalize(x: np.ndarray) -> np.ndarray:
    """Return unit rows, float32; a zero row stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def hits(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Return whether the label is among the k best of scores [B, N]: bool [B].

    Ties count against: a constant score is no answer. So does another's score that is not a number,
    and an own score that is not finite is no hit whatever k is.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    not_below = (~(scores < own)).sum(axis=1)
    return np.isfinite(own[:, 0]) & (not_below <= k)


def agreement(
    answers: np.ndarray, reference: np.ndarray, where: np.ndarray | None = None
) -> float | None:
    """Return the share of equal answers [B], over the images for which `where` [B] is true.

    None where there is none of them.
    """
    same = answers == reference
    if where is not None:
        same = same[where]
    return float(same.mean()) if len(same) else None


def harmonic_mean(a: float, b: float) -> float:
    """Return the harmonic mean of two accuracies; 0 where both are."""
    return 2 * a * b / (a + b) if a + b else 0.0


def recall_both_ways(
    image_features: np.ndarray,
    text_features: np.ndarray,
    image_groups: np.ndarray,
    text_groups: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[str, float]]:
    """Return retrieval between unit rows image_features [B, D] and text_features [T, D].

    {image_to_text, text_to_image}: {r1, r5, r10, chance_r1, ...}. An image and a text belong
    together when their groups ([B] and [T], integers) are equal, so one text may belong to several
    images and the other way round. A query is a hit at k when any of its own is among the k best;
    what is not its own and ties with it or is not a number counts against, as in `hits`, and a
    query whose best own score is not finite is a miss. Every query must have at least one of its
    own.
    """
    ways = {
        "image_to_text": (image_features, text_features, image_groups, text_groups),
        "text_to_image": (text_features, image_features, text_groups, image_groups),
    }
    recalls: dict[str, dict[str, float]] = {}
    for name, (queries, candidates, query_groups, candidate_groups) in ways.items():
        ranks = []
        positives = []
        for at in range(0, len(queries), 512):  # [512, candidates] at a time
            scores = queries[at : at + 512] @ candidates.T
            own = query_groups[at : at + 512, None] == candidate_groups[None]
            best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
            rank = (~own & ~(scores < best)).sum(axis=1)
            ranks.append(np.where(np.isfinite(best[:, 0]), rank, NEVER))
            positives.append(own.sum(axis=1))
        rank = np.concatenate(ranks)
        positive = np.concatenate(positives)
        found = {f"r{k}": float((rank < k).mean()) for k in ks}
        for k in ks:
            chance = chance_recall(positive, len(candidates), k)
            found[f"chance_r{k}"] = float(chance.mean())
        recalls[name] = found
    return recalls


def chance_recall(positives: np.ndarray, candidates: int, k: int) -> np.ndarray:
    """Return the probability [Q] that a random order has one of a query's own among its first k.

    positives: [Q], how many of the `candidates` are a query's own.
    """
    missed = np.ones(len(positives))
    for i in range(min(k, candidates)):
        missed *= np.maximum(candidates - positives - i, 0) / (candidates - i)
    return 1.0 - missed


def centered_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return [B] the row-wise cosine after the mean of the reference b [B, D] is subtracted."""
    mean = b.mean(axis=0) if len(b) > 1 else 0.0
    found: np.ndarray = (l2_normalize(a - mean) * l2_normalize(b - mean)).sum(axis=1)
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> Closeness:
    """Return the row-wise cosine of features a [B, D] with the reference b [B, D].

    Raw and centered: embeddings share a large mean, which alone keeps the raw cosine near 1; what
    is left after subtracting the reference's mean from both is what decides. Of a single row no
    mean can be taken: its centered values are the raw ones.
    """
    raw = (l2_normalize(a) * l2_normalize(b)).sum(axis=1)
    centered = centered_cosines(a, b)
    return Closeness(
        raw_p1=float(np.percentile(raw, 1)),
        raw_p5=float(np.percentile(raw, 5)),
        raw_min=float(raw.min()),
        centered_p1=float(np.percentile(centered, 1)),
        centered_p5=float(np.percentile(centered, 5)),
        centered_min=float(centered.min()),
    )


def median_interval(values: np.ndarray, confidence: float = 0.99) -> tuple[float, float, float]:
    """Return the median of [n] values, and the low and high end of its interval.

    The ends are order statistics, so they hold whatever the values' distribution is: so many values
    lie below the true median as heads fall in n tosses of a coin (Conover, Practical Nonparametric
    Statistics, section 3.2). Of fewer values than the confidence needs (8 for 99 %) the ends are
    the least and the largest. Of values that are not finite all three are NaN.
    """
    if not np.isfinite(values).all():
        return math.nan, math.nan, math.nan
    ordered = np.sort(values)
    n = len(ordered)
    outside = 0.0
    cut = 0
    while True:
        outside += math.comb(n, cut) / 2**n
        if outside > (1 - confidence) / 2:
            break
        cut += 1
    below = max(cut - 1, 0)
    return float(np.median(ordered)), float(ordered[below]), float(ordered[n - 1 - below])


def accuracy_drop(reference: np.ndarray, candidate: np.ndarray) -> PairedDrop:
    """Return the paired comparison of two bool [B] hit vectors over the same images."""
    lost = int((reference & ~candidate).sum())
    won = int((~reference & candidate).sum())
    return paired_drop(lost, won, len(reference))


def paired_drop(lost: int, won: int, images: int) -> PairedDrop:
    """Return the paired drop of so many images.

    lost: images that were right before and are wrong after; won: the other way round.

    `upper_pp` is the one-sided 95 % limit of the drop, Tango's score limit for paired proportions
    (Statistics in Medicine 17, 1998): the largest drop that the images do not reject. It holds with
    few discordant pairs, and none of them does not mean certainty. A set whose `upper_pp` exceeds
    the margin cannot vouch for it, whatever its point estimate.
    """
    return PairedDrop(
        drop_pp=100 * (lost - won) / images,
        upper_pp=100 * drop_limit(lost, won, images, Z_ONE_SIDED),
        lost=lost,
        won=won,
        images=images,
    )


def drop_limit(lost: int, won: int, images: int, z: float) -> float:
    """Return the largest drop, 0..1, that paired images do not reject by `z` standard errors."""
    low = (lost - won) / images
    high = 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _score(middle, lost, won, images) < -z:
            high = middle
        else:
            low = middle
    return high


def _score(drop: float, lost: int, won: int, images: int) -> float:
    """Return by how many standard errors the images fall short of a true `drop`, below 0.

    The standard error is that under `drop`, with the likeliest share of won images.
    """
    linear = (2 * images - lost + won) * drop - lost - won
    constant = -won * drop * (1 - drop)
    root = math.sqrt(linear**2 - 8 * images * constant)
    share_won = (root - linear) / (4 * images)
    variance = images * (2 * share_won + drop * (1 - drop))
    difference = lost - won - images * drop
    if variance <= 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)
