"""`--labels`: words, or a file of them. One reading at every door: classify, labels, export."""

import csv
from pathlib import Path

from edgeclip import text_file
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

HELP = 'Words ("a cat, a dog"; quotes around one with a comma) or @FILE, one a line.'
LABELS = "--labels"
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".yaml", ".yml", ".names", ".md")
"""of files of words: a missing one of them is not taken for a label"""


def labels(given: str, where: str = LABELS) -> list[str]:
    """Return the labels that `given` means: words between commas, or those of @FILE.

    Quotes hold a word's comma, as in CSV. What is no list and the path or the name of a file is
    read, which is said. Raises `EdgeclipError` for no words, an empty one, a control character, a
    quote that is not closed, and as `text_file.names`. Whether labels can be told apart is judged
    where their tokens are known (`tokenizer.check_class_names`), alike for all.
    """
    if given.startswith("@"):
        from edgeclip import disk  # numpy, which --help does without

        return text_file.names(disk.given(given[1:], f"{where} @"), "label")
    if _is_file(given):
        say(f"{where}: the labels of the file {given} (@{given} says it outright)")
        return text_file.names(Path(given), "label")

    words = [word.strip() for word in _split(given, where)]
    if words and not words[-1]:
        words.pop()  # "a, b," ends as people end lists
    if not any(words):
        do = 'give words, such as "a cat, a dog", or @FILE'
        raise EdgeclipError(where, "the list is empty", do)
    for i, word in enumerate(words, 1):
        if not word:
            do = "remove the comma too many, or write the word"
            raise EdgeclipError(where, f"label {i} is empty", do)
        text_file.refuse_unprintable(word, where, "label")
    return words


def _split(given: str, where: str) -> list[str]:
    if "\n" in given or "\r" in given:
        do = "separate them by commas, or write them to a file and give @FILE"
        raise EdgeclipError(where, "has several lines", do)
    try:
        rows = list(csv.reader([given], skipinitialspace=True, strict=True))
    except csv.Error as e:
        do = "quote a whole label, such as: '\"salt, pepper\", a cat'"
        raise EdgeclipError(where, f"its quotes cannot be read ({e})", do) from None
    return rows[0] if rows else []


def _is_file(given: str) -> bool:
    """Return whether a lone word means a file: one that is there, or a text file's name."""
    if Path(given).suffix.lower() in SUFFIXES and "," not in given:
        return True
    try:
        return Path(given).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False
