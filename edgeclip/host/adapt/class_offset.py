"""Classes with labels against classes without: how far the former are set back.

Training on labels lifts the scores of the labeled classes on every image, so over all labels an
image of another class is hardly ever named. One offset, taken from the labeled classes' scores,
moves answers from the ones to the others (calibrated stacking, Chao et al. 2016, arXiv 1605.04253).
It is fitted on training images, of which is only known whether they have a label: with it as many
of them name a labeled class as have a label. What the offset decides between is the best labeled
and the best unlabeled class of each image, so an image is three numbers here: `Choices`.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from edgeclip.device.manifest import ClassOffset
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.data import Dataset
from edgeclip.reports.results import Trade, TradePoint

POINTS = 41
"""of the trade's curve"""
Rule = Literal["labeled images", "prior", "balanced classes"]


class Choices(NamedTuple):
    """What an offset chooses between, image by image."""

    lead: np.ndarray
    """[n]: the best labeled class's score less the best unlabeled one's"""
    labeled_right: np.ndarray
    """bool [n]: whether the best labeled class is the image's"""
    unlabeled_right: np.ndarray
    """bool [n]: whether the best unlabeled class is"""

    def top1(self, offsets: np.ndarray) -> np.ndarray:
        """Return the share of images [m] whose answer is right at each of these offsets [m]."""
        order = np.argsort(self.lead)
        labeled = np.concatenate([[0], np.cumsum(self.labeled_right[order])])
        unlabeled = np.concatenate([[0], np.cumsum(self.unlabeled_right[order])])
        moved = np.searchsorted(self.lead[order], offsets, side="right")
        return (unlabeled[moved] + labeled[-1] - labeled[moved]) / len(self.lead)


def choices(scores: np.ndarray, labeled: list[int], truth: np.ndarray) -> Choices:
    """Return what an offset chooses between.

    scores: [n, N], without an offset. labeled: the classes that had labels, some and not all of
    them. truth: [n], class indices; -1 where it is not known.
    """
    mask = np.zeros(scores.shape[1], bool)
    mask[labeled] = True
    best_labeled = np.where(mask, scores, -np.inf)
    best_unlabeled = np.where(mask, -np.inf, scores)
    return Choices(
        lead=best_labeled.max(axis=1) - best_unlabeled.max(axis=1),
        labeled_right=best_labeled.argmax(axis=1) == truth,
        unlabeled_right=best_unlabeled.argmax(axis=1) == truth,
    )


def trade(labeled: Choices, unlabeled: Choices) -> Trade:
    """Return the accuracies of both halves as the offset goes from one end to the other.

    labeled, unlabeled: of the images of either half. The area is exact; the curve is thinned.
    """
    leads = np.unique(np.concatenate([labeled.lead, unlabeled.lead]))
    steps = np.concatenate([[leads[0] - 1e-6], leads])
    of_labeled = labeled.top1(steps)
    of_unlabeled = unlabeled.top1(steps)
    # The labeled half loses and the unlabeled half gains as the offset grows; an image that either
    # choice gets right counts all along.
    heights = (of_unlabeled[1:] + of_unlabeled[:-1]) / 2
    area = float((heights * -np.diff(of_labeled)).sum())
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))
    curve = []
    for i in kept:
        point = TradePoint(
            offset=float(steps[i]), labeled=float(of_labeled[i]), unlabeled=float(of_unlabeled[i])
        )
        curve.append(point)
    return Trade(area=area, curve=tuple(curve))


def fit(
    scores: np.ndarray, data: Dataset, has_label: np.ndarray, spec: R.Calibration
) -> ClassOffset:
    """Return the offset for the labeled classes of `data`.

    scores: [n, N] of training images over all classes, without an offset. has_label: bool [n], some
    and not all of them. Raises `EdgeclipError` where they are not finite.
    """
    labeled = data.labeled_classes
    lead = choices(scores, labeled, np.full(len(scores), -1)).lead
    rule: Rule
    if spec.prior is not None:
        rule = "prior"
        share = spec.prior
    elif data.parted:
        rule = "labeled images"
        share = float(has_label.mean())
    else:
        # Assigned in balance (Sinkhorn), each class gets as many images as another.
        rule = "balanced classes"
        share = len(labeled) / len(data.classes)
    odds = spec.labeled_weight * share / (1 - share)
    offset = float(np.quantile(lead, 1 / (1 + odds)))
    if not math.isfinite(offset):
        raise EdgeclipError(
            "class offset",
            "is not finite: neither are the scores of the training images",
            "train with a lower learning rate, or set calibration to null",
        )
    return ClassOffset(
        offset=offset,
        labels=[data.classes[c] for c in labeled],
        images=len(scores),
        rule=rule,
        labeled_named=float((lead[has_label] > offset).mean()),
        others_named=float((lead[~has_label] <= offset).mean()),
        labeled_named_without=float((lead[has_label] > 0).mean()),
        others_named_without=float((lead[~has_label] <= 0).mean()),
    )
