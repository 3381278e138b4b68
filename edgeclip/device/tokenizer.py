"""Text to ids, from the `tokenizer.json` that lies in the bundle; the one tokenizer everywhere.

The library `tokenizers` is needed for new words only: baked labels do without it.
"""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.device.zero_shot import prompts
from edgeclip.errors import EdgeclipError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
else:
    Tokenizer = Any


def installed() -> bool:
    """Return whether new words can be encoded here."""
    return importlib.util.find_spec("tokenizers") is not None


def load(text: str, context_length: int) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json's text, which pads to `context_length` with id 0.

    Raises `EdgeclipError` where the library `tokenizers` is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise EdgeclipError(
            "new words",
            "the library tokenizers is not installed (baked labels do without it)",
            "pip install 'edgeclip[text]'",
        ) from None
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=context_length, pad_id=0)
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: list[str], context_length: int, truncate: bool = False
) -> np.ndarray:
    """Return int64 [N, L], padded with 0.

    truncate: a text that is longer than the context loses its end but the last token, as CLIP's
    captions do. Otherwise it raises `EdgeclipError`.
    """
    rows = []
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids = encoding.ids
        if len(ids) > context_length and not truncate:
            what = f"has {len(ids)} tokens, the text encoder takes {context_length}"
            raise EdgeclipError(f"text '{text[:40]}…'", what, "shorten it")
        if len(ids) > context_length:
            ids = [*ids[: context_length - 1], ids[-1]]
        rows.append(ids)
    return np.array(rows, np.int64)


def renumber(
    tokenizer: Tokenizer, ids: np.ndarray, kept: np.ndarray, texts: list[str]
) -> np.ndarray:
    """Return ids [N, L] of the whole vocabulary as rows of a text encoder that kept some tokens.

    kept: [K] ids of those tokens, ascending. Raises `EdgeclipError` for a text with another token:
    it is never mapped to one that is there.
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
    """Raise `EdgeclipError` for class names that cannot be scored.

    Those are two classes with equal tokens, which no score can tell apart, and a prompt that does
    not fit into the context.
    """
    first: dict[tuple[int, ...], int] = {}
    for i, tokens in enumerate(tokenizer.encode_batch(list(classes))):
        same = first.setdefault(tuple(tokens.ids), i)
        if same != i:
            raise EdgeclipError(
                f"classes '{classes[same]}' and '{classes[i]}'",
                "have the same tokens, so no score can tell them apart",
                "rename one of them",
            )
    for name in classes:
        texts = prompts([name], templates)
        for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if len(tokens.ids) > context_length:
                what = f"its prompt '{text[:40]}…' has {len(tokens.ids)} tokens"
                raise EdgeclipError(
                    f"class '{name}'",
                    f"{what}, the text encoder takes {context_length}",
                    "shorten the name",
                )
