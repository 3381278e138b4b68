"""The classification head: cosine with class features, and ComKD's EduAttention.

The image encoder emits P(u_s), so that indexes and new labels work on plain features; EduAttention
(docs/design/methods.md#24-eduattention) only sharpens the class scores and needs nothing but the
features and the active class matrix:

    f_att = softmax(FC(u) W^T / C) W        u [B, D], W [N, D], unit rows
    scores = norm(u + alpha * f_att) W^T    [B, N]

FC may sit on W or on f_att instead (A4, A5).

Classes that had labels in training score higher than those that had none, on every image: the bias
that generalized zero-shot learning knows. A `ClassOffset` is taken from the scores of the former
(calibrated stacking, Chao et al. 2016, arXiv 1605.04253).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgeclip.device.manifest import ClassOffset
from edgeclip.device.metrics import l2_normalize


class EduAttention(NamedTuple):
    weight: np.ndarray
    """[D, D], of the fully connected layer"""
    bias: np.ndarray
    """[D]"""
    alpha: float
    temperature: float
    """C in equation 6"""
    fc: str = "query"
    """where it sits: query, key_value, output, none"""
    normalize: bool = True
    """A10: unit rows before the class scores"""
    center: bool = False
    """keys and values less their mean over the classes that are attended"""


def class_scores(
    image_features: np.ndarray,
    class_features: np.ndarray,
    head: EduAttention | None = None,
    attended: np.ndarray | None = None,
    offsets: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return scores [B, N] of unit rows image_features [B, D] and class_features [N, D].

    Cosines, which the head sharpens, less `offsets` [N], those of the classes that had labels. The
    head attends over `class_features`, the active list, or over `attended` [M, D], say all classes
    of training (A11).
    """
    attended = class_features if attended is None else attended
    return sharpened(image_features, attended, head) @ class_features.T - offsets


def sharpened(
    image_features: np.ndarray, attended: np.ndarray, head: EduAttention | None
) -> np.ndarray:
    """Return image features [B, D] as the head sharpens them, attending over `attended` [M, D].

    image_features: unit rows [B, D], which are returned as they are where there is no head.
    """
    if head is None or head.alpha == 0.0:
        return image_features

    key = attended
    if head.center:
        key = key - key.mean(axis=0)
    if head.fc == "key_value":
        key = key @ head.weight.T + head.bias
    query = image_features
    if head.fc == "query":
        query = image_features @ head.weight.T + head.bias
    logits = query @ key.T / head.temperature
    attention = np.exp(logits - logits.max(axis=1, keepdims=True))
    f_att = attention / attention.sum(axis=1, keepdims=True) @ key
    if head.fc == "output":
        f_att = f_att @ head.weight.T + head.bias

    features = image_features + head.alpha * f_att
    if head.normalize:
        features = l2_normalize(features)
    return features


def offsets(known: ClassOffset | None, labels: Sequence[str]) -> np.ndarray | float:
    """Return what is taken from each label's score, [N]; 0.0: nothing from any.

    A label that had no labels in training is set back by nothing, and so is one that is new.
    """
    if known is None:
        return 0.0
    set_back = set(known.labels)
    return known.offset * np.array([label in set_back for label in labels], np.float32)


def ensemble(text_features: np.ndarray) -> np.ndarray:
    """Return class features [N, D] from text features [N, T, D] of T prompt templates.

    Normalize, average, normalize.
    """
    return l2_normalize(l2_normalize(text_features).mean(axis=1))


def prompts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return N x T prompts, class by class; `{c}` in a template is the class name."""
    return [t.replace("{c}", label) for label in labels for t in templates]
