"""Distillation losses: pure functions of one batch, in one visible dict.

Shapes, for the whole file: B pictures, D embedding width, N classes of the training class list. All features are unit
rows. A batch is the `Batch` record below; a loss takes it and its recipe fields and returns a scalar. The equation
numbers are ComKD-CLIP's (arXiv 2408.04145); the ambiguities A1 to A13 are resolved as the recipe fields say.

To add a loss: one function, one line in `LOSSES`, one field in `recipe.Losses`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from edgeclip import recipe as R


class Batch(NamedTuple):
    image_features: Float[Tensor, "B D"]
    """P(u_s), what ships"""
    head_features: Float[Tensor, "B D"]
    """after EduAttention; the same tensor without it"""
    teacher_features: Float[Tensor, "B D"]
    class_features: Float[Tensor, "N D"]
    caption_features: Float[Tensor, "B D"] | None
    """the teacher's, of each picture's caption"""
    logit_scale: float
    """the teacher's, already exponentiated; frozen"""
    text_features: Float[Tensor, "B D"] | None = None
    """the student's own, of each picture's caption; None: it has no text tower"""


def kl(batch: Batch, spec: R.KL) -> Float[Tensor, ""]:
    """Equation 8: KL(teacher || student) over the class list."""
    q_t = batch.logit_scale * batch.teacher_features @ batch.class_features.T
    q_s = batch.logit_scale * batch.head_features @ batch.class_features.T
    tau = spec.temperature
    loss = F.kl_div(F.log_softmax(q_s / tau, dim=-1), F.log_softmax(q_t / tau, dim=-1), reduction="batchmean", log_target=True)
    return loss * tau**2 / q_s.shape[1] if spec.reduction == "promptkd" else loss


def if_align(batch: Batch, spec: R.IFAlign) -> Float[Tensor, ""]:
    """Equations 3 to 5: L1 between the batch means, plus L1 between the biased batch variances, a channel each."""
    s, t = batch.image_features, batch.teacher_features
    variance_s, variance_t = s.var(dim=0, correction=0), t.var(dim=0, correction=0)
    return F.l1_loss(s.mean(dim=0), t.mean(dim=0)) + F.l1_loss(variance_s, variance_t)


def feature(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """1 - cosine: CLIP-KD's FD is 2 / D of it, so its weight 2000 at D = 512 is 7.8 here."""
    return (1.0 - (batch.image_features * batch.teacher_features).sum(dim=-1)).mean()


def affinity(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """TinyCLIP: soft cross-entropy between teacher's and student's image-to-caption similarities, both ways."""
    t = batch.logit_scale * batch.teacher_features @ _captions(batch).T
    s = batch.logit_scale * batch.image_features @ _captions(batch).T
    return 0.5 * (F.cross_entropy(s, t.softmax(dim=-1)) + F.cross_entropy(s.T, t.T.softmax(dim=-1)))


def contrastive(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """InfoNCE between the student's images and the captions, both ways."""
    s = batch.logit_scale * batch.image_features @ _captions(batch).T
    target = torch.arange(len(s), device=s.device)
    return 0.5 * (F.cross_entropy(s, target) + F.cross_entropy(s.T, target))


def _captions(batch: Batch) -> Float[Tensor, "B D"]:
    assert batch.caption_features is not None, "the cache was built without captions"
    return batch.caption_features


LOSSES: dict[str, Callable[[Batch, Any], Float[Tensor, ""]]] = {
    "kl": kl,
    "if_align": if_align,
    "feature": feature,
    "affinity": affinity,
    "contrastive": contrastive,
}
NEED_CAPTIONS = ("affinity", "contrastive")


def active(spec: R.Losses) -> dict[str, Any]:
    """Name to recipe fields of the losses that a recipe asks for."""
    return {name: fields for name in LOSSES if (fields := getattr(spec, name)) is not None}


def total(batch: Batch, spec: R.Losses) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The weighted sum, and each loss before its weight."""
    parts = {name: LOSSES[name](batch, fields) for name, fields in active(spec).items()}
    weighted = [getattr(spec, name).weight * value for name, value in parts.items()]
    return torch.stack(weighted).sum(), {k: v.detach() for k, v in parts.items()}
