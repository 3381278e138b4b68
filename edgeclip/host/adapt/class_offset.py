"""Classes with labels against classes without: how far the former are set back.

Training on labels lifts the scores of the labeled classes on every image, so over all labels an
image of another class is hardly ever named. One offset, taken from the labeled classes' scores,
moves answers from the ones to the others (calibrated stacking, Chao et al. 2016, arXiv 1605.04253).
It is fitted on training images, of which is only known whether they have a label. What it decides
between is the best labeled and the best unlabeled class of each image, so an image is three numbers
here, `Choices`; the first is the labeled class's lead. The offset is midway between the mean lead
of the images with a label and that of the others, so it does not hug one half where training has
set them apart. Images that were learned by heart lead by more than new ones will, so it is a bound;
the other one is the offset at which as many images name a labeled class as have a label: classes
without labels get no more answers than there are images of them. The smaller one counts.
"""

from typing import Literal, NamedTuple

import numpy as np

from edgeclip.device.manifest import ClassOffset
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.data import Dataset
from edgeclip.reports.results import Trade, TradePoint

POINTS = 41
"""of the trade's curve"""
Rule = Literal["midway", "labeled images", "prior", "balanced classes"]


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


def of_share(lead: np.ndarray, share: float, weight: float = 1.0) -> float:
    """Return the offset with which this share of the images names a labeled class.

    weight: a factor of its odds.
    """
    odds = weight * share / (1 - share)
    return float(np.quantile(lead, 1 / (1 + odds)))


def midway(lead: np.ndarray, has_label: np.ndarray, weight: float = 1.0) -> float:
    """Return the offset midway between the mean lead of images with a label and of the others.

    weight: how much closer it is to the others than to the labeled ones.
    """
    return float((lead[has_label].mean() + weight * lead[~has_label].mean()) / (1 + weight))


def fit(
    scores: np.ndarray, data: Dataset, has_label: np.ndarray, spec: R.Calibration
) -> ClassOffset:
    """Return the offset for the labeled classes of `data`.

    scores: [n, N] of training images over all classes, without an offset. has_label: bool [n], some
    and not all of them. Raises `EdgeclipError` where they are not finite.
    """
    labeled = data.labeled_classes
    lead = choices(scores, labeled, np.full(len(scores), -1)).lead
    if not np.isfinite(lead).all():
        raise EdgeclipError(
            "class offset",
            "is not finite: neither are the scores of the training images",
            "train with a lower learning rate, or set calibration to null",
        )
    rule: Rule
    if spec.prior is not None:
        rule = "prior"
        offset = of_share(lead, spec.prior, spec.labeled_weight)
    elif data.parted:
        weight = spec.labeled_weight
        bounds: dict[Rule, float] = {
            "midway": midway(lead, has_label, weight),
            "labeled images": of_share(lead, float(has_label.mean()), weight),
        }
        rule = min(bounds, key=lambda r: bounds[r])
        offset = bounds[rule]
    else:
        # Assigned in balance (Sinkhorn), each class gets as many images as another.
        rule = "balanced classes"
        offset = of_share(lead, len(labeled) / len(data.classes), spec.labeled_weight)
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
