"""`edgeclip export --vocabulary`: a text encoder that keeps the rows of its embedding table that will be asked for.

The table is 40 % of a CLIP text tower (25 M of 63 M numbers), and a board that names fruit needs a few hundred of its 49,408
rows. What is kept: the tokens of the labels in their templates, of the golden texts, and of the texts that the user gives (words
to come, or a frequency list); the tokenizer's special tokens and id 0, the padding. The rows are renumbered in their old order,
so that pooling by the largest id finds the end token as before, and every kept text has the features that it had, bit for bit.

The tokenizer stays whole: without its merges other words would fall into other pieces. A text with a token that is gone is
refused by the bundle, and never mapped to another. The manifest says how many tokens are kept, lost, and how many bytes that is.
"""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from edgeclip.device import tokenizer
from edgeclip.errors import EdgeclipError
from edgeclip.host.teachers import TextTower


class Pruned(NamedTuple):
    text: TextTower
    """takes the new ids"""
    kept: np.ndarray
    """int64 [K]: the old id of each new one, ascending"""
    record: dict[str, Any]
    """JSON-able: tokens kept and lost, bytes of the float32 table before and after"""


def prune(text: TextTower, texts: list[str]) -> Pruned:
    """The tower with the tokens of `texts` alone. Raises `EdgeclipError` for a tower whose table or pooling is not as said above."""
    words = tokenizer.load(text.tokenizer, text.context_length)
    needed = tokenizer.encode(words, texts, text.context_length)
    special = [i for i, token in words.get_added_tokens_decoder().items() if token.special]
    kept = np.unique(np.concatenate([needed.ravel(), np.array([0, *special], np.int64)]))
    module = copy.deepcopy(text.module)
    tables = [
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, nn.Embedding) and m.num_embeddings > kept[-1]
    ]
    pooling = {
        getattr(m, field)
        for m in module.modules()
        for field in ("pool_type", "text_pool_type")
        if hasattr(m, field)
    }
    if len(tables) != 1 or "eos" in pooling:
        what = (
            "pools at an end token of a fixed number"
            if "eos" in pooling
            else f"has {len(tables)} embedding tables of the vocabulary's size"
        )
        raise EdgeclipError("--vocabulary", f"this text tower {what}", "leave --vocabulary out")
    name, table = tables[0]
    with torch.no_grad():
        module.set_submodule(
            name, nn.Embedding.from_pretrained(table.weight[torch.from_numpy(kept)].clone())
        )
    record = {
        "kept": len(kept),
        "lost": table.num_embeddings - len(kept),
        "table_bytes": table.weight.numel() * 4,
        "table_bytes_kept": len(kept) * table.embedding_dim * 4,
        "texts": len(texts),
    }
    return Pruned(replace(text, module=module.eval()), kept, record)
