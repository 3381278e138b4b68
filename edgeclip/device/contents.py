"""The files of a bundle beside its graphs, each read as what the manifest says it is.

A file's hash shows that it is the one that was written, not that it is a good one: lists are
checked for their types and sizes, arrays for shape and dtype before a byte is allocated, and every
value is finite.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from edgeclip import disk
from edgeclip.device import finite
from edgeclip.device.bounds import Line
from edgeclip.device.manifest import MOST_LABELS
from edgeclip.device.metrics import UNIT, off_unit
from edgeclip.device.zero_shot import EduAttention
from edgeclip.disk import Declared
from edgeclip.errors import EdgeclipError

CHECK = "see what is wrong with: edgeclip validate"
T = TypeVar("T")
Labels = Annotated[list[Line], Meta(max_length=MOST_LABELS)]
GoldenTexts = Annotated[list[Line], Meta(min_length=1, max_length=1_000)]
MOST_GOLDEN = 2**28
"""bytes of the golden images' pixels"""
PLACES = ("query", "key_value", "output", "none")
"""where a head's layer may sit"""
SCALAR = Declared((), ("float32", "float64"), finite=True)
FLAG = Declared((), ("bool",))


def labels(file: Path) -> list[str]:
    """Return the baked labels."""
    return _json(file, Labels)


def golden_texts(file: Path) -> list[str]:
    """Return the golden texts, one at least."""
    return _json(file, GoldenTexts)


def _json(file: Path, kind: type[T] | Any) -> Any:
    try:
        return msgspec.convert(disk.read_json(file), kind)
    except msgspec.ValidationError as e:
        do = "export the bundle again"
        raise EdgeclipError(file, f"is not what it should be ({e})", do) from None


def rows(file: Path, count: int | None, width: int) -> np.ndarray:
    """Return features, float32 [count, width]; count: None: one at least."""
    found = disk.read_declared(file, Declared((count, width)))
    if count is None and not len(found):
        raise EdgeclipError(file, "has no rows", "export the bundle again")
    return finite.features(found, file, "export the bundle again")


def pixels(file: Path, size: int) -> np.ndarray:
    """Return the golden images' pixels, uint8 [G, size, size, 3], one at least."""
    declared = Declared((None, size, size, 3), ("uint8",), most=MOST_GOLDEN)
    found = disk.read_declared(file, declared)
    if not len(found):
        raise EdgeclipError(file, "has no images", "export the bundle again")
    return found


def kept_tokens(file: Path, count: int) -> np.ndarray:
    """Return the ids of the tokens that the text encoder kept, int64 [count], ascending."""
    kept = disk.read_declared(file, Declared((count,), ("int64", "int32")))
    if not count or not (kept[1:] > kept[:-1]).all() or kept[0] < 0:
        raise EdgeclipError(file, "is no ascending list of tokens", "export the bundle again")
    return kept


def head(file: Path, width: int, folder: Path) -> EduAttention:
    """Return the head for features of that width. folder: the bundle's, for messages."""
    normalizes = "normalize"
    declared = {
        "weight": Declared((width, width), finite=True),
        "bias": Declared((width,), finite=True),
        "alpha": SCALAR,
        "temperature": SCALAR,
        "fc": Declared((), ("str",)),
        normalizes: FLAG,
        "normalise": FLAG,  # edgeclip 0.1's word
        "center": FLAG,
    }
    arrays = disk.read_declared_arrays(file, declared, file)
    if "normalise" in arrays:
        normalizes = "normalise"
    missing = {"weight", "bias", "alpha", "temperature", "fc", normalizes} - arrays.keys()
    if missing:
        what = "was written by an edgeclip before 0.1"
        raise EdgeclipError(folder, what, "export it again from its run")
    place = str(arrays["fc"])
    temperature = float(arrays["temperature"])
    if place not in PLACES or not 1e-6 <= temperature <= 1e6:
        what = f"its fc is '{place}' and its temperature {temperature}"
        raise EdgeclipError(file, what, "export the bundle again")
    return EduAttention(
        arrays["weight"],
        arrays["bias"],
        float(arrays["alpha"]),
        temperature,
        place,
        bool(arrays[normalizes]),
        bool(arrays.get("center", False)),
    )


def refuse_not_unit(features: np.ndarray, folder: Path) -> None:
    """Raise `EdgeclipError` unless features [B, D] are finite and of unit length: a cosine of
    others is none. folder: the bundle's."""
    off = off_unit(features)
    if off is None:
        raise EdgeclipError(folder, "its graph gives values that are not finite", CHECK)
    if not off <= UNIT:
        what = f"its graph gives rows whose length is not 1 (by up to {off:.3g})"
        raise EdgeclipError(folder, what, CHECK)
