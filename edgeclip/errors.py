"""Three kinds of failure, two of them here.

A user's mistake is an `EdgeclipError`: one line, *where: what; what to do*, exit code 1. A failed
gate (parity, budget) is no exception at all: the report is written and the command exits 3, or 4
where what was measured cannot tell. Everything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class EdgeclipError(Exception):
    """`where` is a file, field or flag; `what` is what is wrong with it; `do` is the next thing to
    type."""

    def __init__(self, where: object, what: str, do: str):
        super().__init__(f"{where}: {what}; {do}")


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
