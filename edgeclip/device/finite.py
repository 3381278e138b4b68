"""Refuse what is not a number where it arises, by name: from there on it would only look like an
answer.

NaN is below no limit and above none, an argmax takes it for the best, and a feature without a
length is as near to one class as to any other. So arrays are looked at where they come from a file,
a model or another machine; comparisons beside are written so that NaN fails (`not x >= limit`).
"""

import numpy as np

from edgeclip.errors import EdgeclipError


def fault(array: np.ndarray, rows: bool = False) -> str | None:
    """Return what is wrong with an array of floats: its first row that is not finite.

    None: nothing is.
    rows: of [n, D] features, which must have a length too. The row is the first axis.
    """
    each = array.reshape(len(array), -1) if array.ndim and len(array) else array.reshape(1, -1)
    wrong = ~np.isfinite(each).all(axis=1)
    if wrong.any():
        return f"row {int(wrong.argmax())} of {len(each)} is not finite"
    if rows and each.shape[1]:
        wrong = ~each.any(axis=1)
        if wrong.any():
            return f"row {int(wrong.argmax())} of {len(each)} is all zeros, so it has no direction"
    return None


def finite(array: np.ndarray, where: object, do: str) -> np.ndarray:
    """Return the array. Raises `EdgeclipError` that names `where` and a row that is not finite."""
    wrong = fault(array)
    if wrong is not None:
        raise EdgeclipError(where, wrong, do)
    return array


def features(array: np.ndarray, where: object, do: str) -> np.ndarray:
    """Return rows [n, D]. Raises `EdgeclipError` as `finite`, and for a row of zeros."""
    wrong = fault(array, rows=True)
    if wrong is not None:
        raise EdgeclipError(where, wrong, do)
    return array
