"""Say which class names are codes, or words written together: a text encoder reads what is written.

Folders named by WordNet ids or numbers, lists whose lines begin with their number and names without
spaces are all taken as they are; what they cost is seen in no error, only in the accuracy.
"""

import re
from collections.abc import Sequence

KINDS = {
    "WordNet ids": r"n\d{8}\b.*",
    "numbers": r"\d+",
    "names that begin with a number": r"\d+\s*[.,:;_)\t -]\s*\D*[^\W\d].*",
    "words joined by _ or -": r"[^\W_]+(?:_[^\W_]+)+|[^\W\d_]+(?:-[^\W\d_]+){2,}",
    "words without spaces": r"(?:[A-Z][a-z]+){2,}",
}
"""kind, to the whole of such a name"""
LEAST = 2
SHARE = 0.5
"""of all names: fewer may be what they should be"""


def told(names: Sequence[str]) -> str | None:
    """Return a line on the names that are no words, where most are of one such kind."""
    for what, pattern in KINDS.items():
        found = [name for name in names if re.fullmatch(pattern, name, re.DOTALL)]
        if len(found) >= max(LEAST, SHARE * len(names)):
            return (
                f"class names: {len(found):,} of {len(names):,} are {what} (first: '{found[0]}'), "
                "and are read as they are written; give words if they stand for words"
            )
    return None
