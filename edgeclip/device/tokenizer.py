"""Text to ids, from the `tokenizer.json` that lies in the bundle; the one tokenizer for host and board."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from edgeclip.device.zero_shot import prompts
from edgeclip.errors import EdgeclipError


def load(text: str, context_length: int) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=context_length, pad_id=0)
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: list[str], context_length: int, truncate: bool = False
) -> np.ndarray:
    """int64 [N, L], padded with 0. A text that is longer than the context is refused; truncate: loses its end, as CLIP's captions do."""
    ids = [e.ids for e in tokenizer.encode_batch(texts)]
    if truncate:
        ids = [
            row if len(row) <= context_length else [*row[: context_length - 1], row[-1]]
            for row in ids
        ]  # the end token stays
    for text, row in zip(texts, ids, strict=True):
        if len(row) > context_length:
            raise EdgeclipError(
                f"text '{text[:40]}…'",
                f"has {len(row)} tokens, the text encoder takes {context_length}",
                "shorten it",
            )
    return np.array(ids, np.int64)


def renumber(
    tokenizer: Tokenizer, ids: np.ndarray, kept: np.ndarray, texts: list[str]
) -> np.ndarray:
    """ids [N, L] of the whole vocabulary as those of a text encoder that has the tokens `kept` [K], ascending, alone.

    Raises `EdgeclipError` for a text with another token: it is never mapped to one that is there.
    """
    new = np.minimum(np.searchsorted(kept, ids), len(kept) - 1)
    for text, row, gone in zip(texts, ids, kept[new] != ids, strict=True):
        if gone.any():
            words = ", ".join(f"'{tokenizer.id_to_token(int(i))}'" for i in row[gone])
            raise EdgeclipError(
                f"text '{text[:40]}'",
                f"has tokens that this text encoder was exported without ({words})",
                "export with the text in --vocabulary",
            )
    return new.astype(ids.dtype)


def check_class_names(
    tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str], context_length: int
) -> None:
    """Raises `EdgeclipError` for two classes with equal tokens, which no score can tell apart, and for a prompt that does not fit."""
    first: dict[tuple[int, ...], int] = {}
    for i, tokens in enumerate(tokenizer.encode_batch(list(classes))):
        if (same := first.setdefault(tuple(tokens.ids), i)) != i:
            raise EdgeclipError(
                f"classes '{classes[same]}' and '{classes[i]}'",
                "have the same tokens, so no score can tell them apart",
                "rename one of them",
            )
    for name in classes:
        for text, tokens in zip(
            prompts([name], templates),
            tokenizer.encode_batch(prompts([name], templates)),
            strict=True,
        ):
            if len(tokens.ids) > context_length:
                raise EdgeclipError(
                    f"class '{name}'",
                    f"its prompt '{text[:40]}…' has {len(tokens.ids)} tokens, the text encoder takes {context_length}",
                    "shorten the name",
                )
