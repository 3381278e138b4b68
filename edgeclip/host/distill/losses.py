"""ComKD-CLIP and its family: every loss a pure function of one batch, in one visible dict.

Shapes, for the whole file: B images, D embedding width, N classes of the training class list.
Features are unit rows unless they are called raw. Letters as in the papers: v, s are the student's
image and text features, V, T the teacher's; a student without a text tower classifies with the
teacher's text features, so its s is T.

Sources: ComKD-CLIP arXiv 2408.04145 (equation numbers, ambiguities A1 to A13), PromptKD 2403.02781,
CLIP-KD 2307.12732, CLIP-RD 2603.25383, TinyCLIP 2309.12314, MobileCLIP 2311.17049, CLIP-Embed-KD
2404.06170. Slips of their codes are not copied: learnable scales are exponentiated, similarities of
the prototype loss have a temperature.

What a loss may read is `batch.Batch`. To add a loss: one function, one line in `LOSSES`, one field
in `recipe.Losses`, and its name in `NEED_CAPTIONS`, `NEED_LABELS` or `NEED_CLASSES` where it reads
those.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.distill.batch import Batch, OtherTeacher

# --- ComKD-CLIP and PromptKD: a class list, no captions


def kl(batch: Batch, spec: R.KL) -> Float[Tensor, ""]:
    """Return equation 8: tau^2 KL(teacher || student) over the class list.

    Of several teachers the distributions are averaged. With `spec.offset` the classes that had
    labels are set back in the teacher's scores, as they are where it answers.
    """
    tau = spec.temperature
    q_s = batch.logit_scale * batch.head_features @ batch.class_features.T
    others = [(t.features, t.class_features, t.logit_scale) for t in batch.other_teachers]
    first = (batch.teacher_features, batch.class_features, batch.logit_scale)
    if spec.offset and batch.offsets is not None:
        q_t = batch.logit_scale * (first[0] @ first[1].T - batch.offsets)
        p_t = F.log_softmax(q_t / tau, dim=-1)
    else:
        p_t = log_average([first, *others], tau)
    loss = F.kl_div(F.log_softmax(q_s / tau, dim=-1), p_t, reduction="batchmean", log_target=True)
    if spec.reduction == "promptkd":
        return loss * tau**2 / q_s.shape[1]
    return loss * tau**2


def if_align(batch: Batch, spec: R.IFAlign) -> Float[Tensor, ""]:
    """Return equations 3 to 5: L1 between the means, plus L1 between the biased variances.

    Or between the standard deviations; or each over its own scale.
    """
    s = batch.image_features
    t = batch.teacher_features
    if not spec.normalize:
        s = _need(batch, "raw_features")
        t = _need(batch, "raw_teacher_features")
    elif spec.features == "head":
        s = batch.head_features
    axis = {"batch": 0, "channels": 1}[spec.axis]
    pairs = {
        "mean": (s.mean(dim=axis), t.mean(dim=axis)),
        "variance": (_spread(s, axis, spec), _spread(t, axis, spec)),
    }
    losses = []
    for name, (of_s, of_t) in pairs.items():
        if spec.momentum:
            of_s = _smoothed(batch, f"{name}_student", of_s, spec.momentum)
            of_t = _smoothed(batch, f"{name}_teacher", of_t, spec.momentum)
        loss = F.l1_loss(of_s, of_t, reduction=spec.reduction)
        if spec.scale == "teacher":
            loss = loss / of_t.abs().mean()
        losses.append(loss)
    return losses[0] + losses[1]


def _spread(x: Float[Tensor, "B D"], axis: int, spec: R.IFAlign) -> Tensor:
    variance = x.var(dim=axis, correction=0)
    if spec.spread == "deviation":
        # The floor keeps the gradient finite where a channel is constant.
        return variance.clamp(min=1e-12).sqrt()
    return variance


def cross_entropy(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return the cross-entropy with hard labels, of the images that have one; 0 without any."""
    return _over_labeled(batch, batch.logit_scale * batch.head_features @ batch.class_features.T)


# --- CLIP-Embed-KD


def prototype(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return CLIP-Embed-KD's cross-entropy against the class prototypes; 0 without labels."""
    prototypes = _need(batch, "prototypes")
    return _over_labeled(batch, batch.logit_scale * batch.image_features @ prototypes.T)


def teacher_match(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return CLIP-Embed-KD's live counterpart: which teacher's feature is this image's."""
    q = batch.logit_scale * batch.image_features @ batch.teacher_features.T
    return _info_nce(q, batch.teacher_features)


# --- CLIP-KD, TinyCLIP, open_clip, MobileCLIP: images with captions


def contrastive(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return InfoNCE between the student's images and texts, both ways."""
    q = batch.logit_scale * batch.image_features @ _text(batch).T
    return 0.5 * (_info_nce(q, _captions(batch)) + _info_nce(q.T, _captions(batch)))


def affinity(batch: Batch, spec: R.Affinity) -> Float[Tensor, ""]:
    """Return the teacher's against the student's image-text similarities, both ways.

    CLIP-KD's CRD (kl), or TinyCLIP's and open_clip's form (cross_entropy).
    """
    scale = spec.logit_scale or batch.logit_scale
    t = scale * batch.teacher_features @ _captions(batch).T
    s = scale * batch.image_features @ _text(batch).T
    if spec.form == "kl":
        return 0.5 * (_kl(t, s) + _kl(t.T, s.T))
    return 0.5 * (F.cross_entropy(s, t.softmax(dim=-1)) + F.cross_entropy(s.T, t.T.softmax(dim=-1)))


def distribution(batch: Batch, spec: R.Distribution) -> Float[Tensor, ""]:
    """Return MobileCLIP's soft cross-entropy to the teachers' average probabilities, both ways.

    Each teacher has its own scale.
    """
    teachers = [(batch.teacher_features, _captions(batch), batch.logit_scale)]
    teachers += [(t.features, _captions(t), t.logit_scale) for t in batch.other_teachers]
    s = (spec.logit_scale or batch.logit_scale) * batch.image_features @ _text(batch).T
    rows = log_average(teachers, 1.0).exp()
    columns = log_average([(t, v, scale) for v, t, scale in teachers], 1.0).exp()
    return 0.5 * (F.cross_entropy(s, rows) + F.cross_entropy(s.T, columns))


def feature(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return 1 - cosine, of the texts too where the student has a text tower.

    CLIP-KD's FD is 2 / D of it (2000 at D = 512: 7.8 here).
    """
    images = _distance(batch.image_features, batch.teacher_features)
    if batch.text_features is None:
        return images
    return images + _distance(batch.text_features, _captions(batch))


def masked_feature(batch: Batch, spec: R.MaskedFeature) -> Float[Tensor, ""]:
    """Return CLIP-KD's MFD: the student saw few patches, the teacher the whole image."""
    return _distance(_need(batch, "masked_features"), batch.teacher_features)


def gradient(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return CLIP-KD's GD: MSE between InfoNCE's gradients by the embeddings of either."""
    student = info_nce_gradients(batch.image_features, _text(batch), batch.logit_scale)
    teacher = info_nce_gradients(batch.teacher_features, _captions(batch), batch.logit_scale)
    return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).sum()


def info_nce_gradients(
    image: Float[Tensor, "B D"], text: Float[Tensor, "B D"], scale: float
) -> list[Float[Tensor, "B D"]]:
    """Return InfoNCE's gradients in closed form; each loss is a mean over B.

    Those of the image-to-text loss by image and text, then of text-to-image by text and image.
    """
    gradients = []
    for anchor, other in ((image, text), (text, image)):
        own = torch.eye(len(anchor), dtype=anchor.dtype, device=anchor.device)
        error = ((scale * anchor @ other.T).softmax(dim=-1) - own) * scale / len(anchor)
        gradients += [error @ other, error.T @ anchor]
    return gradients


def interactive(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return CLIP-KD's ICL: InfoNCE of student images and teacher texts, and vice versa."""
    c = _scale(batch, "interactive")
    captions = _captions(batch)
    images = _info_nce(c * batch.image_features @ captions.T, captions)
    return 0.5 * (images + _info_nce(c * _text(batch) @ batch.teacher_features.T, captions))


def augmented_feature(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return CLIP-KD's AFD: InfoNCE on student's and teacher's features, fused by a map."""
    learned = _need(batch, "learned")
    images = torch.cat([batch.image_features, batch.teacher_features], dim=1)
    texts = torch.cat([_text(batch), _captions(batch)], dim=1)
    v = F.normalize(images @ learned["augmented_image"].T, dim=-1)
    s = F.normalize(texts @ learned["augmented_text"].T, dim=-1)
    q = batch.logit_scale * v @ s.T
    return 0.5 * (_info_nce(q, _captions(batch)) + _info_nce(q.T, _captions(batch)))


# --- CLIP-RD


def vrd(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return CLIP-RD's VRD: teacher-student similarities of images take those of texts as target.

    InfoNCE on each stands beside it.
    """
    v = batch.image_features
    s = _text(batch)
    big_v = batch.teacher_features
    big_t = _captions(batch)
    image = _scale(batch, "vrd_image")
    text = _scale(batch, "vrd_text")
    images = (image * big_v @ v.T, image * v @ big_v.T)
    texts = (text * big_t @ s.T, text * s @ big_t.T)
    relation = 0.5 * sum(_kl(t.detach(), i) for t, i in zip(texts, images, strict=True))
    return relation + 0.5 * sum(_info_nce(q, big_t) for q in (*images, *texts))


def xrd(batch: Batch, spec: R.Weighted) -> Float[Tensor, ""]:
    """Return CLIP-RD's XRD: the two cross-modal teacher-student similarities agree."""
    v = batch.image_features
    s = _text(batch)
    big_v = batch.teacher_features
    big_t = _captions(batch)
    c = _scale(batch, "xrd")
    pairs = ((c * big_v @ s.T, c * big_t @ v.T), (c * s @ big_v.T, c * v @ big_t.T))
    return 0.25 * sum(_kl(b.detach(), a) + _kl(a.detach(), b) for a, b in pairs)


LOSSES: dict[str, Callable[[Batch, Any], Float[Tensor, ""]]] = {
    "kl": kl,
    "if_align": if_align,
    "cross_entropy": cross_entropy,
    "prototype": prototype,
    "teacher_match": teacher_match,
    "contrastive": contrastive,
    "affinity": affinity,
    "distribution": distribution,
    "feature": feature,
    "masked_feature": masked_feature,
    "gradient": gradient,
    "interactive": interactive,
    "augmented_feature": augmented_feature,
    "vrd": vrd,
    "xrd": xrd,
}
NEED_CAPTIONS: tuple[str, ...] = ("contrastive", "affinity", "distribution", "gradient")
NEED_CAPTIONS += ("interactive", "augmented_feature", "vrd", "xrd")
NEED_LABELS = ("cross_entropy", "prototype")
NEED_CLASSES = ("kl", *NEED_LABELS)


def active(spec: R.Losses) -> dict[str, Any]:
    """Return the recipe's fields of each loss that it asks for, by name."""
    return {name: getattr(spec, name) for name in LOSSES if getattr(spec, name) is not None}


def total(batch: Batch, spec: R.Losses) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return the weighted sum, and each loss before its weight."""
    parts = {name: LOSSES[name](batch, fields) for name, fields in active(spec).items()}
    weighted = [getattr(spec, name).weight * value for name, value in parts.items()]
    return torch.stack(weighted).sum(), {k: v.detach() for k, v in parts.items()}


def learned_parameters(spec: R.Losses, embed_dim: int, seed: int) -> nn.ParameterDict:
    """Return what the active losses learn or remember.

    Log scales (from 1 / 0.07, as CLIP), AFD's maps, IFAlign's running statistics.
    """
    learned = nn.ParameterDict()
    scales = {"interactive": ("interactive",), "vrd": ("vrd_image", "vrd_text"), "xrd": ("xrd",)}
    for loss, names in scales.items():
        if getattr(spec, loss):
            for name in names:
                start = torch.tensor(math.log(1 / 0.07))
                learned[f"{name}_log_scale"] = nn.Parameter(start)
    if spec.augmented_feature:
        # A generator of its own: the rest of the run does not depend on it.
        generator = torch.Generator().manual_seed(seed)
        for name in ("augmented_image", "augmented_text"):
            uniform = torch.empty(embed_dim, 2 * embed_dim).uniform_(-1, 1, generator=generator)
            learned[name] = nn.Parameter(uniform * (2 * embed_dim) ** -0.5)
    if spec.if_align and spec.if_align.momentum:
        for name in ("mean_student", "mean_teacher", "variance_student", "variance_teacher"):
            learned[name] = nn.Parameter(torch.full((embed_dim,), torch.nan), requires_grad=False)
    return learned


# --- shared pieces


def _info_nce(q: Float[Tensor, "B B"], captions: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Return the cross-entropy to the diagonal.

    Images of one and the same caption share the target: none is another's negative.
    """
    same = (captions @ captions.T > 1 - 1e-5).to(q.dtype)
    return F.cross_entropy(q, same / same.sum(dim=-1, keepdim=True))


def _kl(t: Float[Tensor, "B M"], s: Float[Tensor, "B M"]) -> Float[Tensor, ""]:
    p = F.log_softmax(t, dim=-1)
    q = F.log_softmax(s, dim=-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def log_average(teachers: list[tuple[Tensor, Tensor, float]], tau: float) -> Float[Tensor, "B M"]:
    """Return the log of the mean of softmax(scale V T^T / tau) over the teachers."""
    logs = [F.log_softmax(scale * v @ t.T / tau, dim=-1) for v, t, scale in teachers]
    if len(logs) == 1:
        return logs[0]
    return torch.logsumexp(torch.stack(logs), dim=0) - math.log(len(logs))


def _distance(a: Float[Tensor, "B D"], b: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    return (1.0 - (a * b).sum(dim=-1)).mean()


def _smoothed(
    batch: Batch, name: str, value: Float[Tensor, " D"], momentum: float
) -> Float[Tensor, " D"]:
    """Return an exponential moving average that starts at the first batch.

    The gradient is the present batch's.
    """
    running = _need(batch, "learned")[name]
    smooth = value
    if not running.isnan().any():
        smooth = momentum * running.detach() + (1 - momentum) * value
    running.data.copy_(smooth.detach())
    return smooth


def _over_labeled(batch: Batch, q: Float[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Return the cross-entropy of the logits `q` with the labels, a mean over the labeled images.

    A class that has no labeled images is no candidate.
    """
    labels = _need(batch, "labels")
    classes = _need(batch, "prototypes").abs().sum(dim=1) > 0
    q = q.masked_fill(~classes, -torch.inf)
    total = F.cross_entropy(q, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def _captions(batch: Batch | OtherTeacher) -> Float[Tensor, "B D"]:
    return _need(batch, "caption_features")


def _text(batch: Batch) -> Float[Tensor, "B D"]:
    if batch.text_features is None:
        return _captions(batch)
    return batch.text_features


def _scale(batch: Batch, name: str) -> Float[Tensor, ""]:
    """Return a learned scale of at most 100, as CLIP's.

    The parameter is held there, not the scale: that would have no gradient beyond.
    """
    log_scale = _need(batch, "learned")[f"{name}_log_scale"]
    log_scale.data.clamp_(max=math.log(100.0))
    return log_scale.exp()


def _need(batch: Batch | OtherTeacher, field: str) -> Any:
    value = getattr(batch, field)
    if value is None:
        raise EdgeclipError(
            "losses",
            f"need {field}, which this batch does not have",
            "build the cache with it, or remove the loss",
        )
    return value
