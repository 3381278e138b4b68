"""`edgeclip export --vocabulary`: a text encoder whose embedding table keeps only the rows needed.

The table is 40 % of a CLIP text tower (25 M of 63 M numbers), and a board that names fruit needs a
few hundred of its 49,408 rows. Kept are the tokens of the labels in their templates, of the golden
texts, and of the texts that the user gives (words to come, or a frequency list); the tokenizer's
special tokens and id 0, the padding. The rows are renumbered in their old order, so that pooling by
the largest id finds the end token as before, and every kept text has the features that it had, bit
for bit.

The tokenizer stays whole: without its merges other words would fall into other pieces. A text that
needs a removed token is refused by the bundle, and never mapped to another. The manifest says how
many tokens are kept, how many removed, and how many bytes that is.
"""

import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from edgeclip.device import tokenizer
from edgeclip.device.manifest import VocabularyRecord
from edgeclip.errors import EdgeclipError
from edgeclip.host.teachers import TextTower


class Pruned(NamedTuple):
    """A text tower with fewer tokens."""

    text: TextTower
    """takes the new ids"""
    kept: np.ndarray
    """int64 [K]: the old id of each new one, ascending"""
    record: VocabularyRecord


def prune(text: TextTower, texts: list[str]) -> Pruned:
    """Return the tower with the tokens of `texts` alone.

    Raises `EdgeclipError` for a tower that pools at an end token of a fixed number, or whose
    embedding table cannot be told.
    """
    kept = _needed(text, texts)
    module = copy.deepcopy(text.module)
    if _pools_at_fixed_token(module):
        raise _no("pools at an end token of a fixed number")
    tables = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Embedding) and child.num_embeddings > kept[-1]:
            tables[name] = child
    if len(tables) != 1:
        raise _no(f"has {len(tables)} embedding tables of the vocabulary's size")

    ((name, table),) = tables.items()
    with torch.no_grad():
        rows = table.weight[torch.from_numpy(kept)].clone()
    module.set_submodule(name, nn.Embedding.from_pretrained(rows))
    record = VocabularyRecord(
        kept=len(kept),
        lost=table.num_embeddings - len(kept),
        table_bytes=table.weight.numel() * 4,
        table_bytes_kept=len(kept) * table.embedding_dim * 4,
        texts=len(texts),
    )
    return Pruned(replace(text, module=module.eval()), kept, record)


def _needed(text: TextTower, texts: list[str]) -> np.ndarray:
    """Return the ids, ascending, of the texts' tokens, the special tokens and the padding."""
    words = text.words()
    needed = tokenizer.encode(words, texts)
    always = [words.pad]
    for i, token in words.library.get_added_tokens_decoder().items():
        if token.special:
            always.append(i)
    return np.unique(np.concatenate([needed.ravel(), np.array(always, np.int64)]))


def _pools_at_fixed_token(module: nn.Module) -> bool:
    for child in module.modules():
        for field in ("pool_type", "text_pool_type"):
            if getattr(child, field, None) == "eos":
                return True
    return False


def _no(what: str) -> EdgeclipError:
    return EdgeclipError("--vocabulary", f"this text tower {what}", "leave --vocabulary out")
