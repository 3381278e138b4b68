"""Three kinds of failure, two of them here.

A user's mistake is an `EdgeclipError`: one line, *where: what; what to do*, exit code 1. A failed
gate (parity, budget) is no exception at all: the report is written and the command exits 3, or 4
where what was measured cannot tell. Everything else is a bug and keeps its traceback.
"""

import difflib
import re
from collections.abc import Iterable

MOST = 2_000
"""characters of each half of a message: what is in it may be anybody's"""
ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # a terminal's command: color, cursor, erase
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)"  # its strings: title, link, clipboard
    r"|\x9b[0-?]*[ -/]*[@-~]"  # the same in one byte of C1
    r"|\x1b[ -/]*[0-~]?",  # any other
    re.DOTALL,
)
"""ECMA-48, 5.4 and 5.6; xterm's control sequences"""
BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]+"
)
"""controls, and what turns the order of letters around"""


def printable(text: str, most: int | None = None) -> str:
    """Return a text from outside as it may reach a terminal: one line, no escapes, no controls.

    Every text that is printed goes through here, since a label, a name or a board's error may be
    anybody's. most: characters; what is cut ends in "…".
    """
    if not text.isprintable():
        text = UNSEEN.sub("", BREAKS.sub(" ", ESCAPES.sub("", text)))
    if most is not None and len(text) > most:
        text = text[: most - 1] + "…"
    return text


class EdgeclipError(Exception):
    """`where` is a file, field or flag; `what` is what is wrong with it; `do` is the next thing to
    type."""

    def __init__(self, where: object, what: str, do: str):
        self.where, self.what, self.do = where, what, do
        told = f"{printable(str(where))}: {printable(what, MOST)}; {printable(do, MOST)}"
        super().__init__(told)


class Refused(EdgeclipError):
    """A gate that `export` itself holds: no bundle is written, and the command exits 3."""


class WrongGraph(EdgeclipError):
    """What was traced, folded or pruned does not compute what the model computes: nothing is
    written.

    Raised and never asserted, so that it holds under `python -O` too. `what` gives the difference.
    """


class Interrupted(Exception):
    """A signal, after everything that was done has been saved; the message says how to go on."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class LinkLost(EdgeclipError):
    """A board stopped answering in the middle of something."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return what to do about an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(known)}"
