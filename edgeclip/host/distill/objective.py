"""What a step minimizes: the recipe's losses and the text tower's, or Pea-KD's first training."""

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from edgeclip.host.distill import losses as L
from edgeclip.host.distill.batch import Batch
from edgeclip.host.distill.step import Metrics, Objective
from edgeclip.host.distill.text import text_feature
from edgeclip.host.recipe import Pretrain, Recipe, Weighted


def objective(
    recipe: Recipe, pretrain: Pretrain | None, prompt_features: Tensor | None
) -> Objective:
    """Return the loss of a batch as a function.

    pretrain: takes the place of the recipe's losses; None: it does not. prompt_features: [p, D] the
    teacher's, of the drawn class prompts; None: the student has no text tower.
    """
    if pretrain is not None:
        return partial(_pretrain, spec=pretrain)
    return partial(_total, recipe=recipe, prompt_features=prompt_features)


def _total(
    batch: Batch, prompts: Tensor | None, recipe: Recipe, prompt_features: Tensor | None
) -> tuple[Tensor, Metrics]:
    loss, metrics = L.total(batch, recipe.losses)
    if prompt_features is None:
        return loss, metrics
    text = text_feature(batch, prompts, prompt_features)
    return loss + recipe.student.text_weight * text, metrics | {"text_feature": text.detach()}


def _pretrain(batch: Batch, _: Tensor | None, spec: Pretrain) -> tuple[Tensor, Metrics]:
    return pretrain_loss(batch, spec)


def pretrain_loss(batch: Batch, spec: Pretrain) -> tuple[Tensor, Metrics]:
    """Return the loss of Pea-KD's first training, and the same for the log.

    FD, or cross-entropy with the class that the teacher itself finds best. Source:
    docs/design/methods.md#9-mst-kd-and-pea-kd.
    """
    if spec.labels == "features":
        loss = L.feature(batch._replace(text_features=None), Weighted())
    else:
        best = (batch.teacher_features @ batch.class_features.T).argmax(dim=-1)
        logits = batch.logit_scale * batch.image_features @ batch.class_features.T
        loss = F.cross_entropy(logits, best)
    return loss, {f"pretrain_{spec.labels}": loss.detach()}
