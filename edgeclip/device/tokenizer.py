"""Text to ids: cleaned as open_clip cleans it, then split by the `tokenizer.json` of the bundle.

The one tokenizer everywhere, on the host and on a board. The library `tokenizers` is needed for new
words only: baked labels do without it.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeclip.device import spelled
from edgeclip.device.cleaning import Cleaning, clean
from edgeclip.device.zero_shot import prompts
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer
else:
    Tokenizer = Any

CONTROLS = ("<start_of_text>", "<end_of_text>")
"""open_clip's pattern takes these for one word each"""


def installed() -> bool:
    """Return whether new words can be encoded here."""
    return importlib.util.find_spec("tokenizers") is not None


class Words(NamedTuple):
    """A tokenizer that is ready for texts."""

    library: Tokenizer
    cleaning: Cleaning | None
    """None: a text goes to the library as it is"""
    context_length: int
    pad: int
    """the id that fills a row up"""
    ending: int
    """how many ids close a text, and stay where it is cut"""
    controls: tuple[str, ...]
    """what stands for a token that no text may have: open_clip's start and end of a text"""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's ids, of any length.

        Raises `EdgeclipError` for a text that cannot be cleaned here, and for one that spells a
        token of control.
        """
        if self.cleaning is not None:
            texts = [clean(text, self.cleaning.kind) for text in texts]
        for text in texts:
            for control in self.controls:
                if control in text:
                    raise EdgeclipError(
                        f"text '{text[:40]}'",
                        f"spells {control}, which ends or begins a text for the text encoder",
                        "leave it out",
                    )
        with _refusing():
            return [encoding.ids for encoding in self.library.encode_batch(list(texts))]


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Raise what the library says of a damaged tokenizer.json, which has no type of its own."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":  # Rust's
            raise
        what = f"the library tokenizers cannot use it ({' '.join(str(e).split())[:200]})"
        raise EdgeclipError("tokenizer.json", what, "make the bundle again") from None


def load(text: str, context_length: int, cleaning: Cleaning | None = None) -> Words:
    """Return the tokenizer of a tokenizer.json's text, which pads to `context_length`.

    It pads with the id that the file names, else 0. Raises `EdgeclipError` where the library
    `tokenizers` is not installed, and for a file that it cannot use.
    """
    try:
        import tokenizers
    except ImportError:
        raise EdgeclipError(
            "new words",
            "the library tokenizers is not installed (baked labels do without it)",
            "pip install 'edgeclip[text]'",
        ) from None
    with _refusing():
        library = tokenizers.Tokenizer.from_str(text)
    pad = (library.padding or {}).get("pad_id", 0)
    library.no_truncation()
    library.no_padding()
    controls: tuple[str, ...] = ()
    if cleaning is not None and not cleaning.normalizer:
        library.normalizer = tokenizers.normalizers.Sequence([])
        controls = CONTROLS
    with _refusing():
        mask = library.encode("a").special_tokens_mask
    ending = len(mask) - 1 - max((i for i, special in enumerate(mask) if not special), default=-1)
    return Words(library, cleaning, context_length, pad, ending, controls)


def padded(text: str, context_length: int) -> str:
    """Return a tokenizer.json that pads to the context's length by itself, for other readers."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(text)
    library.no_truncation()
    library.enable_padding(length=context_length, pad_id=(library.padding or {}).get("pad_id", 0))
    return library.to_str()


def encode(words: Words, texts: list[str], truncate: bool = False) -> np.ndarray:
    """Return int64 [N, L], padded to the context's length.

    truncate: a text that is longer than the context loses its end, but not what closes a text, as
    CLIP's captions do. Otherwise it raises `EdgeclipError`.
    """
    length = words.context_length
    rows = np.full((len(texts), length), words.pad, np.int64)
    for row, text, ids in zip(rows, texts, words.ids(texts), strict=True):
        if len(ids) > length and not truncate:
            what = f"has {len(ids)} tokens, the text encoder takes {length}"
            raise EdgeclipError(f"text '{text[:40]}…'", what, "shorten it")
        if len(ids) > length:
            ids = ids[: length - words.ending] + ids[len(ids) - words.ending :]
        row[: len(ids)] = ids
    return rows


def renumber(words: Words, ids: np.ndarray, kept: np.ndarray, texts: list[str]) -> np.ndarray:
    """Return ids [N, L] of the whole vocabulary as rows of a text encoder that kept some tokens.

    kept: [K] ids of those tokens, ascending. Raises `EdgeclipError` for a text with another token:
    it is never mapped to one that is there.
    """
    new = np.minimum(np.searchsorted(kept, ids), len(kept) - 1)
    for text, row, gone in zip(texts, ids, kept[new] != ids, strict=True):
        if gone.any():
            tokens = ", ".join(f"'{words.library.id_to_token(int(i))}'" for i in row[gone])
            raise EdgeclipError(
                f"text '{text[:40]}'",
                f"has tokens that this text encoder was exported without ({tokens})",
                "export with the text in --vocabulary",
            )
    return new.astype(ids.dtype)


def check_class_names(words: Words, classes: Sequence[str], templates: Sequence[str]) -> None:
    """Raise `EdgeclipError` for class names that cannot be scored.

    Those are two classes with equal tokens, which no score can tell apart, and a prompt that does
    not fit into the context. Names that are codes are taken, and it is said.
    """
    line = spelled.told(classes)
    if line is not None:
        say_once(line)
    first: dict[tuple[int, ...], int] = {}
    for i, ids in enumerate(words.ids(classes)):
        same = first.setdefault(tuple(ids), i)
        if same != i:
            raise EdgeclipError(
                f"classes '{classes[same]}' and '{classes[i]}'",
                "have the same tokens, so no score can tell them apart",
                "rename one of them",
            )
    for name in classes:
        texts = prompts([name], templates)
        for text, ids in zip(texts, words.ids(texts), strict=True):
            if len(ids) > words.context_length:
                what = f"its prompt '{text[:40]}…' has {len(ids)} tokens"
                raise EdgeclipError(
                    f"class '{name[:40]}'",
                    f"{what}, the text encoder takes {words.context_length}",
                    "shorten the name",
                )
