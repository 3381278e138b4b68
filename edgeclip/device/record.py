"""One record as JSON: written, and read in today's format or in that of edgeclip 0.1.

Files of 0.1 used other words and had no `format`; every field is renamed by `config.renamed`, and a
format that is not known is refused.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeclip import disk
from edgeclip.config import renamed
from edgeclip.errors import EdgeclipError

FORMAT = 2
VERDICTS = {
    "golden pictures only": "golden images only",
    "too few pictures": "too few images",
}
"""of parity reports of edgeclip 0.1"""

T = TypeVar("T")


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


def read(path: Path, kind: type[T]) -> T:
    """Return the record of type `kind` at `path`. Raises `EdgeclipError` as `from_json`."""
    return from_json(disk.read_json(path), kind, path)


def write(path: Path, record: Record) -> None:
    """Write the record as JSON to `path`."""
    disk.write_json(path, to_json(record))


def _from_format_1(value: dict[str, Any]) -> dict[str, Any]:
    """Return a report of edgeclip 0.1 in the words of format 2."""
    new: dict[str, Any] = {**renamed(value), "format": FORMAT}
    if new.get("verdict") in VERDICTS:
        new["verdict"] = VERDICTS[new["verdict"]]
    return new
