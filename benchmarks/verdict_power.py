"""How often the gate is wrong, and whether the number of images that it names settles a question:
by simulation.

Images are drawn with a known truth, asked as `validate` asks them, and counted:

    fails, loss 0          a bundle that loses nothing and is said to fail: at most 5 %
    holds, loss 2 margins  a bundle that loses twice the margin and is said to hold: at most 5 %
    holds at the number    of images that "cannot tell" has named, where nothing is lost: at least 80 %
    number over need       the named number over the fewest images with which 80 % of such bundles hold: within 10 %
    misses                 limits of a share (agreement, a cosine's percentile), of a percentile of times, of a harmonic mean and of
                           the classes together: how often either misses the truth, at most 5 %

    python benchmarks/verdict_power.py --check
"""

import functools
import math
from typing import Any

import common
import compare
import numpy as np

from edgeclip.device.intervals import (
    LEVEL,
    drop_limits,
    harmonic_mean_limits,
    images_for_drop,
    percentile_limits,
    share_limits,
)

DRAWS = {"whole": 20_000, "quick": 4_000, "smoke": 200}
MARGIN = 0.01
CASES = ((500, 0.03), (2000, 0.03), (2000, 0.08), (8000, 0.03), (8000, 0.08))
"""images, and the share of them whose answer is right on one side alone"""
ERROR = 1 - LEVEL
POWER = 0.8
NEAR = (0.9, 1.1)

limits_of_drop = functools.lru_cache(maxsize=None)(drop_limits)
limits_of_share = functools.lru_cache(maxsize=None)(share_limits)


def answers(
    rng: np.random.Generator, images: int, changed: float, loss: float, draws: int
) -> dict[str, float]:
    """How often each answer comes out for bundles that truly lose `loss`."""
    odds = [(changed + loss) / 2, (changed - loss) / 2, 1 - changed]
    seen: dict[str, float] = {"holds": 0.0, "fails": 0.0, "cannot tell": 0.0}
    for lost, won, _ in rng.multinomial(images, odds, size=draws):
        answer = limits_of_drop(int(lost), int(won), images).answer(MARGIN)
        seen[answer] += 1 / draws
    return seen


def named_and_needed(
    rng: np.random.Generator, images: int, changed: float, draws: int
) -> tuple[int, float, float]:
    """The number that is named, how often it settles, and that number over the fewest that do."""
    half = round(images * changed / 2)
    named = images_for_drop(half, half, images, MARGIN)
    assert named is not None
    truth = 2 * half / images
    low, high = named // 2, named * 2
    while high - low > named // 200:
        middle = (low + high) // 2
        if answers(rng, middle, truth, 0.0, draws)["holds"] >= POWER:
            high = middle
        else:
            low = middle
    return named, answers(rng, named, truth, 0.0, 5 * draws)["holds"], named / high


def misses(rng: np.random.Generator, draws: int) -> dict[str, float]:
    """How often a limit misses the truth, the worse of both sides."""
    found = {}
    for n, p in ((150, 0.01), (2000, 0.01), (400, 0.1), (400, 0.5)):
        limits = [limits_of_share(int(c), n) for c in rng.binomial(n, p, size=draws)]
        found[f"share {p:g} of {n}"] = either(limits, p)
    truth = math.log(10)
    for n in (60, 1024):
        few = max(200, draws // 10)
        limits = [percentile_limits(rng.exponential(size=n), 90.0) for _ in range(few)]
        found[f"p90 of {n} times"] = either(limits, truth)
    truth = 2 * 0.9 * 0.4 / 1.3
    pairs = rng.binomial((200, 150), (0.9, 0.4), size=(max(200, draws // 10), 2))
    limits = [harmonic_mean_limits((int(a), 200), (int(b), 150)) for a, b in pairs]
    found["harmonic mean"] = either(limits, truth)
    found["worst class of 20"] = of_classes(rng, 20, max(200, draws // 10))
    return found


def either(limits: Any, truth: float) -> float:
    """The worse of the shares of lower limits above and of upper limits below the truth."""
    above = np.mean([low is not None and low > truth for low, _ in limits])
    below = np.mean([high is not None and high < truth for _, high in limits])
    return float(max(above, below))


def of_classes(rng: np.random.Generator, classes: int, draws: int) -> float:
    """How often any of the classes' upper limits lies below its own drop, 0 for all."""
    level = 1 - ERROR / classes
    missed = 0
    for changed in rng.multinomial(40, [0.04, 0.04, 0.92], size=(draws, classes)):
        highs = [limits_of_drop(int(a), int(b), 40, level).high for a, b, _ in changed]
        missed += any(high < 0 for high in highs)
    return missed / draws


def allowed(draws: int) -> float:
    """What a true error of 5 % may show in so many draws, at three standard errors."""
    return ERROR + 3 * math.sqrt(ERROR * LEVEL / draws)


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    here = common.this_machine()
    draws = DRAWS[options.form]
    rng = np.random.default_rng(0)
    rows, required = [], []
    for images, changed in CASES:
        title = f"{images} images, {changed:.0%} change"
        nothing = answers(rng, images, changed, 0.0, draws)["fails"]
        twice = answers(rng, images, changed, 2 * MARGIN, draws)["holds"]
        named, settled, ratio = named_and_needed(rng, images, changed, max(200, draws // 5))
        rows.append(
            [title, f"{nothing:.4f}", f"{twice:.4f}", named, f"{settled:.3f}", f"{ratio:.3f}"]
        )
        most = allowed(draws)
        least = POWER - 3 * math.sqrt(POWER * (1 - POWER) / draws)
        required += [
            compare.exact(f"{title}: fails though nothing is lost", nothing, n=draws, at_most=most),
            compare.exact(f"{title}: holds at twice the margin", twice, n=draws, at_most=most),
            compare.exact(f"{title}: holds at the named number", settled, n=draws, at_least=least),
            compare.exact(f"{title}: named over needed", ratio, n=draws, at_least=NEAR[0]),
            compare.exact(f"{title}: named over needed", ratio, n=draws, at_most=NEAR[1]),
        ]
    headers = ["case", "fails, loss 0", "holds, loss 2 pp", "number", "holds there", "over need"]
    common.table(rows, headers)
    missed = misses(rng, draws)
    common.table([[name, f"{share:.4f}"] for name, share in missed.items()], ["limits of", "miss"])
    for name, share in missed.items():
        n = draws if name.startswith("share") else max(200, draws // 10)
        required.append(compare.exact(f"{name}: misses", share, n=n, at_most=allowed(n)))
    found = {"benchmark": "verdict_power", "rows": rows, "misses": missed}
    common.finish(found, required, here, options)


if __name__ == "__main__":
    main()
