"""Records: JSON in today's format, or in that of 0.1, which used other words and no `format`."""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeclip.config import renamed
from edgeclip.disk.reading import Json, read_json
from edgeclip.disk.writing import write_sealed
from edgeclip.errors import EdgeclipError

T = TypeVar("T")
FORMAT = 2
VERDICTS = {
    "golden pictures only": "cannot tell",
    "too few pictures": "cannot tell",
    "pass": "cannot tell",
    "fail": "fails",
}
"""of parity reports of edgeclip 0.1, whose gate asked training images as well"""


class Record(msgspec.Struct, frozen=True):
    """Immutable; what a file of the same format has besides is passed over."""


def to_json(record: Any) -> Any:
    """Return the record, or a list of records, as dicts, lists, strings and numbers."""
    return msgspec.to_builtins(record)


def from_json(value: Any, kind: type[T], where: object) -> T:
    """Return the record of type `kind` that was written as `value`, by this edgeclip or by 0.1.

    Raises `EdgeclipError` that names `where` for another format and for what is no such record.
    """
    found = value.get("format", 1) if isinstance(value, dict) else None
    if found not in (1, FORMAT):
        raise EdgeclipError(
            where,
            f"is of format {found}, and this edgeclip reads 1 and {FORMAT}",
            "update edgeclip, or write it again with the command that made it",
        )
    if found == 1:
        value = _from_format_1(value)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise EdgeclipError(
            where, f"is not what it should be ({e})", "write it again with the command that made it"
        ) from None


def read_record(path: Path, kind: type[T]) -> T:
    """Return the record of type `kind` at `path`. Raises `EdgeclipError` as `from_json`."""
    return from_json(read_json(path), kind, path)


def write_record(path: Path, record: Record) -> None:
    """Write the record as JSON to `path`, sealed."""
    write_sealed(path, to_json(record))


def _from_format_1(value: Json) -> Json:
    """Return a report of edgeclip 0.1 in the words of format 2."""
    new: Json = {**renamed(value), "format": FORMAT}
    verdict = new.get("verdict")
    if isinstance(verdict, str):  # it may be anything yet
        new["verdict"] = VERDICTS.get(verdict, verdict)
    return new
