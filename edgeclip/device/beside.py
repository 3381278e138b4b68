"""Bundles of one student on one device, turn by turn: how many times as fast each is.

What the machine does meanwhile falls on all of a round alike, so ratios within a round are
comparable where times of one bundle after another are not. The order rotates, so that none always
follows the same one, and each takes a query to warm its caches; the least of a round counts, since
what disturbs a query only adds to it. The median of the rounds' ratios has an interval by the
bootstrap (Efron 1979).
"""

from pathlib import Path

import numpy as np

from edgeclip import disk
from edgeclip.device import machine
from edgeclip.device.bench import images_of, stage_seconds
from edgeclip.device.bench_report import Beside, BesideRow, Ratio
from edgeclip.device.bundle import Bundle
from edgeclip.device.load import OtherWork
from edgeclip.progress import say

ROUNDS = 41
QUERIES = 3
MODEL = 2
"""place of the model among the stages of an image"""
RESAMPLES = 2000
OUTSIDE = 2.5
"""percent at either end"""


def of_one_student(bundles: list[Bundle]) -> list[Bundle]:
    """Return the bundles of the first one's student; a float one, where there is one, first."""
    student = bundles[0].manifest.parents.get("student")
    same = [b for b in bundles if student and b.manifest.parents.get("student") == student]

    def order(bundle: Bundle) -> tuple[bool, bool]:
        target = bundle.manifest.target
        return target.precision != "fp32", target.runtime != "onnxruntime"

    return sorted(same, key=order)


def beside(bundles: list[Bundle], evaluation: Path | None) -> Beside:
    """Return how many times as fast as the first each bundle is: whole images, and the model alone.

    evaluation: a run's evaluation folder, for images; None: the first bundle's golden ones.
    """
    names = ", ".join(bundle.folder.name for bundle in bundles)
    say(f"bench side by side, {ROUNDS} rounds: {names}")
    sources = images_of(bundles[0], evaluation)
    laps = np.empty((ROUNDS, len(bundles), 2))
    others = OtherWork()
    for turn in range(-1, ROUNDS):  # one round to open and warm everything
        for k in range(len(bundles)):
            i = (turn + k) % len(bundles)
            source = sources[turn % len(sources)]
            stage_seconds(bundles[i], source)  # its caches were emptied by the others
            seconds = np.array([stage_seconds(bundles[i], source) for _ in range(QUERIES)])
            laps[turn, i] = seconds.sum(axis=1).min(), seconds[:, MODEL].min()
    rows = []
    for i, bundle in enumerate(bundles):
        whole, model = 1e3 * np.median(laps[:, i], axis=0)
        row = BesideRow(
            name=bundle.folder.name,
            bundle=disk.sha256(bundle.folder / disk.MANIFEST),
            precision=bundle.precision,
            whole_ms=float(whole),
            model_ms=float(model),
            whole=_ratio(laps[:, 0, 0] / laps[:, i, 0]),
            model=_ratio(laps[:, 0, 1] / laps[:, i, 1]),
        )
        rows.append(row)
    return Beside(
        machine=machine.facts(), rounds=ROUNDS, others_busy=others.processors(), rows=rows
    )


def _ratio(ratios: np.ndarray) -> Ratio:
    """Return the median of ratios [n] and its 95 % interval."""
    places = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[places], axis=1), [OUTSIDE, 100 - OUTSIDE])
    return Ratio(median=float(np.median(ratios)), low=float(low), high=float(high))
