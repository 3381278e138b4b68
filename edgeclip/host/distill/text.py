"""What an open-vocabulary student's text tower learns from: captions and class prompts, and the teacher's features of them.

FD on text: 1 - cosine to the teacher's feature of the same words. The captions are those of the batch's images, so that
the other losses can see them too (`Batch.text_features`); class prompts, every class name under every template, are
drawn beside them, because captions alone need not name every class.
"""

from typing import NamedTuple

import pyarrow.parquet as pq
from jaxtyping import Float, Int
from torch import Tensor, cat, nn

from edgeclip.device.zero_shot import prompts
from edgeclip.host import student as students
from edgeclip.host.cache import TeacherCache
from edgeclip.host.cache.arrays import name
from edgeclip.host.distill.losses import Batch
from edgeclip.host.teachers import Teacher, TextTower


class Texts(NamedTuple):
    tower: nn.Module
    """input_ids [N, L] to the student's unit features [N, D]"""
    captions: Int[Tensor, "n C L"]
    """ids of every training image's captions; view v goes with caption v modulo C, as in `targets`"""
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
    """classes: those that training may name. Raises `EdgeclipError` for a text longer than the student's context."""
    named = prompts(classes, templates)
    said = _captions(cache)
    captions = students.token_ids(text, [c for of_image in said for c in of_image], truncate=True)
    ids = students.token_ids(text, named) if named else captions[:0]
    features = (
        teacher.encode_text(named) if named else captions.new_zeros((0, teacher.embed_dim)).float()
    )
    return Texts(text.module, captions.reshape(len(said), -1, captions.shape[1]), ids, features)


def _captions(cache: TeacherCache) -> list[list[str]]:
    """Of every image, the data's own first; a reinforced cache has all of them beside their features."""
    if cache.manifest["captions"] == 1:
        return [[p.caption] for p in cache.images]
    tables = [
        pq.read_table(cache.folder / name("metadata", i, len(cache.manifest["shards"])))
        for i in range(len(cache.manifest["shards"]))
    ]
    return [
        [own, *more]
        for t in tables
        for own, more in zip(t["caption"].to_pylist(), t["more_captions"].to_pylist(), strict=True)
    ]


def text_feature(
    batch: Batch, prompts: Float[Tensor, "p D"] | None, prompt_targets: Float[Tensor, "p D"]
) -> Float[Tensor, ""]:
    """Mean of 1 - cosine over the batch's captions and the drawn prompts, a text each. prompts: the student's; None: none were drawn."""
    assert batch.text_features is not None and batch.caption_features is not None
    own, target = batch.text_features, batch.caption_features
    if prompts is not None:
        own, target = cat([own, prompts]), cat([target, prompt_targets])
    return (1.0 - (own * target).sum(dim=-1)).mean()
