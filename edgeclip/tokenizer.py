"""Text to ids, from the `tokenizer.json` that lies in the bundle; the one tokenizer for host and board."""

import numpy as np
from tokenizers import Tokenizer

from edgeclip.errors import EdgeclipError


def load(text: str, context_length: int) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=context_length, pad_id=0)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], context_length: int) -> np.ndarray:
    """int64 [N, L], padded with 0. A text that is longer than the context is refused, never cut silently."""
    ids = [e.ids for e in tokenizer.encode_batch(texts)]
    for text, row in zip(texts, ids, strict=True):
        if len(row) > context_length:
            raise EdgeclipError(f"text '{text[:40]}…'", f"has {len(row)} tokens, the text encoder takes {context_length}", "shorten it")
    return np.array(ids, np.int64)
