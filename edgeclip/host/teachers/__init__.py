"""Load teachers, frozen image-text dual encoders, behind one small record.

The expensive part of a teacher, its image `tower`, is frozen and gives rows that the cache stores
once. `features` maps rows to image features: the identity for a CLIP, a residual head for the
adapted assembled teacher. So a teacher can be re-adapted without running its tower again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from edgeclip.device import tokenizer
from edgeclip.device.cleaning import Cleaning
from edgeclip.device.preprocess import Preprocess
from edgeclip.device.tokenizer import Words
from edgeclip.disk import Description
from edgeclip.host import recipe as R
from edgeclip.host.towers.fold import fold


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """What export needs to ship the text side."""

    module: nn.Module
    """input_ids int64 [N, L] to unit features [N, D]"""
    tokenizer: str
    """tokenizer.json of the `tokenizers` library, as text; its padding names the id that pads"""
    context_length: int
    cleaning: Cleaning | None = None
    """of a text before that; None: none"""

    def words(self) -> Words:
        """Return the tokenizer, ready for texts."""
        return tokenizer.load(self.tokenizer, self.context_length, self.cleaning)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    name: str
    license: str
    identity: Description
    """decides the rows: weights and architecture, for the cache's fingerprint"""
    preprocess: Preprocess
    logit_scale: float
    """already exponentiated"""
    embed_dim: int
    tower: Any
    """module, pixels [B, 3, H, W] to rows [B, R]; None: its rows were computed elsewhere"""
    features: Callable[[Float[Tensor, "B R"]], Float[Tensor, "B D"]]
    """rows to image features, not normalized"""
    encode_text: Callable[[list[str]], Float[Tensor, "N D"]]
    """texts to unit features"""
    text: TextTower | None = None
    """the module behind encode_text, where stage 1 can put prompts into it; None: texts are not
    tokenized here"""
    source: R.Embeddings | R.Reinforced | None = None
    """where its rows come from when it has no tower"""
    class_features: np.ndarray | None = None
    """[N, D] unit, where they are all that is known of its text side"""


TEACHERS = {
    R.Conse: "edgeclip.host.teachers.conse",
    R.OpenClip: "edgeclip.host.teachers.open_clip",
    R.Embeddings: "edgeclip.host.cache.precomputed",
    R.Reinforced: "edgeclip.host.cache.precomputed",
}


AS_OPEN_CLIP = R.ImageOptions()


def load(spec: R.Teacher, options: R.ImageOptions = AS_OPEN_CLIP) -> Teacher:
    """Return the teacher that a recipe describes, with its weights.

    options: the recipe's `preprocess`, so that it sees the images that the student sees.
    """
    teacher: Teacher = import_module(TEACHERS[type(spec)]).load(spec)
    return replace(teacher, preprocess=options.on(teacher.preprocess))


def check_class_names(teacher: Teacher, classes: list[str], templates: tuple[str, ...]) -> None:
    """Refuse class names that the teacher's text tower cannot tell apart or cannot take whole."""
    if teacher.text is not None:
        tokenizer.check_class_names(teacher.text.words(), classes, templates)


def folded(teacher: Teacher) -> nn.Module | None:
    """Return the teacher's tower as it is run: batch norms merged, channels last.

    None where the teacher has none.
    """
    if teacher.tower is None:
        return None
    size = teacher.preprocess.size
    return fold(teacher.tower, torch.randn(2, 3, size, size)).to(memory_format=torch.channels_last)


def without_towers(teacher: Teacher) -> Teacher:
    """Return what training needs of a teacher whose cache is built; its memory is freed."""
    return replace(teacher, tower=nn.Identity(), text=None, encode_text=_gone)


def _gone(texts: list[str]) -> Float[Tensor, "N D"]:
    raise RuntimeError("this teacher's text encoder was freed")


def load_text(spec: R.Teacher) -> TextTower:
    """Return the text side alone, for export."""
    text: TextTower = import_module(TEACHERS[type(spec)]).load_text(spec)
    return text
