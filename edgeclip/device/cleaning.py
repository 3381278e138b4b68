"""Clean a text as open_clip does before it is split into words: half of what its tokenizer does.

A model was trained on cleaned captions, so "a dog’s bed" and "cat &amp; dog" have the ids of
"a dog's bed" and "cat & dog". What open_clip calls for that, ftfy, is pure Python and comes with
the extra `text`. Where it is not installed, a text that it would certainly leave as it is goes
through, and another one is refused by name: no text gets other ids than it should.
"""

import html
import string
import unicodedata
from typing import Literal

from edgeclip.device.records import Record
from edgeclip.errors import EdgeclipError

Kind = Literal["whitespace", "lower", "canonicalize"]
PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
SOUND = ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd")
REWRITTEN = "ªºµƒˆˇʼŉĲĳǄǅǆǇǈǉǊǋǌǱǲǳ"
"""letters that ftfy takes apart, or for a sign of another encoding"""
STRAIGHT = str.maketrans("‘’“”", "''\"\"")
LEADS = "ÂÃÎÐ"
"""what begins a letter of UTF-8 that was read as Windows-1252"""


class Cleaning(Record):
    """What is done to a text before tokenizer.json splits it; a model of open_clip's names it."""

    kind: Kind
    """all: broken encodings and HTML entities are mended, white space becomes single spaces; lower:
    and in lower case; canonicalize: that, and without ASCII punctuation"""
    normalizer: bool = False
    """whether tokenizer.json's own normalizer runs after it; false: it is for readers who cannot
    clean, and comes near it"""


def clean(text: str, kind: Kind) -> str:
    """Return `text` as open_clip's cleaning of that name gives it.

    Raises `EdgeclipError` where that takes ftfy, and it is not installed.
    """
    text = html.unescape(html.unescape(_fixed(text)))
    if kind == "canonicalize":
        text = text.translate(PUNCTUATION)
    if kind != "whitespace":
        text = text.lower()
    return " ".join(text.split())


def _fixed(text: str) -> str:
    """Return the text with ftfy's repairs: encodings, entities, quotes, widths, control codes."""
    try:
        import ftfy
    except ImportError:
        pass
    else:
        return ftfy.fix_text(text)
    composed = unicodedata.normalize("NFC", text)
    if is_sound(composed):
        return composed.translate(STRAIGHT)
    raise EdgeclipError(
        f"text '{text[:40]}'",
        "may need repairs that take the library ftfy, which is not installed",
        "pip install 'edgeclip[text]'",
    )


def is_sound(text: str) -> bool:
    """Return whether ftfy certainly leaves a text in NFC as it is, but for curled quotes.

    Letters of any script and plain ASCII pass, but for the pairs in which ftfy sees a text that was
    read in the wrong encoding (tests/device/test_cleaning.py compares with ftfy itself).
    """
    return all(map(_is_sound, " " + text, text, text[1:] + " "))


def _is_sound(before: str, c: str, after: str) -> bool:
    if c.isascii():
        return c != "&" and (c.isprintable() or c in "\t\n")
    if c in "‘’“”–—…¿¡":
        return before.isascii() and after.isascii()
    if "\u3001" <= c <= "\u303f":  # punctuation of Chinese and Japanese
        return True
    if unicodedata.category(c) not in SOUND or c in REWRITTEN:
        return False
    if "\ufb00" <= c <= "\ufb06" or "\uff00" <= c <= "\uffff":  # ligatures, widths
        return False
    if c.isupper() and before.islower() and not before.isascii():
        return False
    if c in "Œœ":
        return after.isascii() and after.isalpha()
    return c not in LEADS or (after.isalpha() and after not in "ŠŸœšž")
