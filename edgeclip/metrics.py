"""The numbers of parity and accuracy, in numpy. Fractions run 0..1; only `_pp` is in percentage points."""

import math

import numpy as np


def l2_normalise(x: np.ndarray) -> np.ndarray:
    """Unit rows, float32; a zero row stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def hits(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """bool [B]: is the label among the k best of scores [B, N]? Ties count against: a constant score is no answer."""
    own = scores[np.arange(len(labels)), labels][:, None]
    return (scores >= own).sum(axis=1) <= k


def harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def cosine(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Row-wise cosine of two [B, D] feature sets, raw and centred: {raw,centred}_{p1,p5,min}.

    Embeddings share a large mean, which alone keeps the raw cosine near 1; what is left after subtracting the
    reference's mean from both is what decides. Of a single row no mean can be taken: centred values are then NaN-free
    copies of the raw ones.
    """
    mean = b.mean(axis=0) if len(b) > 1 else 0.0
    out: dict[str, float] = {}
    for name, x, y in (("raw", a, b), ("centred", a - mean, b - mean)):
        c = (l2_normalise(x) * l2_normalise(y)).sum(axis=1)
        out |= {f"{name}_p1": np.percentile(c, 1), f"{name}_p5": np.percentile(c, 5), f"{name}_min": c.min()}
    return {k: float(v) for k, v in out.items()}


def accuracy_drop(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """Paired comparison of two bool [B] hit vectors over the same pictures, in percentage points.

    `upper_pp` is the one-sided 95 % limit of the drop: Agresti and Min's adjusted Wald interval for paired
    proportions (2005; half a picture added to each of the four cells, so that no discordant pair does not mean
    certainty). A set whose `upper_pp` exceeds the margin cannot vouch for it, whatever its point estimate.
    """
    n = len(reference)
    lost = float((reference & ~candidate).sum())
    won = float((~reference & candidate).sum())
    b, c, m = lost + 0.5, won + 0.5, n + 2
    se = math.sqrt(b + c - (b - c) ** 2 / m) / m
    drop = 100 * (lost - won) / n
    return {"drop_pp": drop, "upper_pp": 100 * ((b - c) / m + 1.645 * se), "lost": lost, "won": won, "pictures": n}
