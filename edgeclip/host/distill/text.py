"""What an open-vocabulary student's text tower learns from: captions and class prompts.

FD on text: 1 - cosine to the teacher's feature of the same words. The captions are those of the
batch's images, so that the other losses can see them too (`Batch.text_features`); class prompts,
every class name under every template, are drawn beside them, because captions alone need not name
every class.
"""

from typing import NamedTuple

import pyarrow.parquet as pq
from jaxtyping import Float, Int
from torch import Tensor, cat, nn

from edgeclip.device.zero_shot import prompts
from edgeclip.host import student as students
from edgeclip.host.cache import TeacherCache
from edgeclip.host.cache.checked import name
from edgeclip.host.distill.batch import Batch
from edgeclip.host.teachers import Teacher, TextTower


class Texts(NamedTuple):
    """A student's text tower and what it reads."""

    tower: nn.Module
    """input_ids [N, L] to the student's unit features [N, D]"""
    captions: Int[Tensor, "n C L"]
    """ids of every image's captions; view v goes with caption v modulo C, as in `targets`"""
    prompts: Int[Tensor, "P L"]
    """ids of every class name under every template; P may be 0"""
    prompt_features: Float[Tensor, "P D"]
    """the teacher's, unit"""


def texts(
    text: TextTower,
    teacher: Teacher,
    cache: TeacherCache,
    classes: list[str],
    templates: tuple[str, ...],
) -> Texts:
    """Return what the student's text tower reads, and the teacher's features of the class prompts.

    classes: those that training may name. Raises `EdgeclipError` for a prompt that is longer than
    the student's context; captions are truncated.
    """
    by_image = _captions(cache)
    flat = [caption for captions in by_image for caption in captions]
    captions = students.token_ids(text, flat, truncate=True)
    named = prompts(classes, templates)
    if named:
        ids = students.token_ids(text, named)
        features = teacher.encode_text(named)
    else:
        ids = captions[:0]
        features = captions.new_zeros((0, teacher.embed_dim)).float()
    captions = captions.reshape(len(by_image), -1, captions.shape[1])
    return Texts(text.module, captions, ids, features)


def _captions(cache: TeacherCache) -> list[list[str]]:
    """Return every image's captions, the data's own first.

    A reinforced cache has further ones beside their features.
    """
    if cache.manifest["captions"] == 1:
        return [[p.caption] for p in cache.images]
    shards = len(cache.manifest["shards"])
    captions = []
    for i in range(shards):
        if cache.metadata is not None:
            cache.metadata.look_at_all(i)
        table = pq.read_table(cache.folder / name("metadata", i, shards))
        own = table["caption"].to_pylist()
        more = table["more_captions"].to_pylist()
        for first, others in zip(own, more, strict=True):
            captions.append([first, *others])
    return captions


def text_feature(
    batch: Batch, prompts: Float[Tensor, "p D"] | None, prompt_targets: Float[Tensor, "p D"]
) -> Float[Tensor, ""]:
    """Return the mean of 1 - cosine over the batch's captions and the drawn prompts.

    prompts: the student's features; None: none were drawn. prompt_targets: the teacher's.
    """
    assert batch.text_features is not None
    assert batch.caption_features is not None
    own = batch.text_features
    target = batch.caption_features
    if prompts is not None:
        own = cat([own, prompts])
        target = cat([target, prompt_targets])
    return (1.0 - (own * target).sum(dim=-1)).mean()
