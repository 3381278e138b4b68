"""Every text file that a user gives is read here: lists, captions, templates, YAML.

UTF-8 with or without a byte-order mark, or UTF-16 and UTF-32 with one: it says which. Nothing else
is guessed: bytes that are not UTF-8 are refused with their line, and with a command that converts
them. Lines end at \\n, \\r\\n or \\r: `str.splitlines` ends them at eight other characters too, and
makes two labels of one that holds such a character.
"""

import codecs
import csv
import os
import re
import shlex
import unicodedata
from pathlib import Path

from edgeclip.errors import EdgeclipError

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the first half of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MAX_BYTES = 2**32
"""of a text file; a list of 10^7 captions has a third"""
END = re.compile(r"\r\n|\r|\n")
TABLES = {".csv": ",", ".tsv": "\t"}
QUOTES = ("'", '"')
JSON = re.compile(r"\[\s*[\"\d\[{].*\]|\{\s*\".*\}", re.DOTALL)
"""a list of texts, numbers or objects, or an object"""
LOST = "\ufffd"
"""what programs write for a letter that they could not convert"""


def read(path: Path, most: int = MAX_BYTES) -> str:
    """Return a text file's content without its byte-order mark; ends of lines are as they are.

    most: bytes. Raises `EdgeclipError` where it is missing, cannot be read, has more bytes, or is
    in no encoding named above.
    """
    try:
        content = _bytes(path, most)
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except (OSError, ValueError) as e:  # ValueError: a path with a NUL in it
        what = f"cannot be read ({getattr(e, 'strerror', None) or e})"
        raise EdgeclipError(path, what, "give a text file") from None
    return decode(content, path)


def _bytes(path: Path, most: int) -> bytes:
    """Return what a file holds. Raises `EdgeclipError` for more, of a file without an end too."""
    content = bytearray()
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        while length <= most and (block := file.read(1 << 20)):
            content += block
            length = max(length, len(content))
    if length > most:
        raise EdgeclipError(path, f"has more than {most:,} bytes", "give a smaller file")
    return bytes(content)


def decode(content: bytes, where: object) -> str:
    """Return the text of a file's bytes. Raises `EdgeclipError` as `read`; where: the file."""
    encoding = "utf-8"
    for mark, name in MARKS:
        if content.startswith(mark):
            encoding = name
            break
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as e:
        if encoding.startswith("utf-8"):
            raise _not_utf8(content, e.start, where) from None
        what = f"is {encoding.upper()} by its byte-order mark, and broken at byte {e.start}"
        raise EdgeclipError(where, what, "save it as UTF-8") from None

    if "\0" in text:
        raise _nul(content, where)
    return text


def _not_utf8(content: bytes, start: int, where: object) -> EdgeclipError:
    if b"\0" in content:
        return _nul(content, where)
    line = len(lines(content[:start].decode("latin-1") + "."))
    return EdgeclipError(
        f"{where}: line {line}",
        f"byte 0x{content[start]:02x} is not UTF-8",
        "convert it from what it was saved as (LATIN1, CP1252, SHIFT_JIS, ...), such as: "
        + _convert("LATIN1", where),
    )


def _nul(content: bytes, where: object) -> EdgeclipError:
    # The high byte of a Latin letter, of a space and of an end of line is 0.
    order = "UTF-16BE"
    if content[1::2].count(0) > content[::2].count(0):
        order = "UTF-16LE"
    text = content.decode(order, errors="replace").rstrip(LOST)
    same_lines = text.count("\n") == content.count(b"\n") and content.count(0) > 1
    if same_lines and all(c.isprintable() or c.isspace() for c in text):
        what = "has NUL bytes, as UTF-16 has, and no byte-order mark"
        return EdgeclipError(where, what, f"convert it: {_convert(order, where)}")
    line = len(lines(content[: content.index(0)].decode("latin-1") + "."))
    return EdgeclipError(f"{where}: line {line}", "has a NUL byte", "give a text file without any")


def _convert(encoding: str, where: object) -> str:
    file = str(where)
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(file)} > {shlex.quote(file + '.utf8')}"


def lines(text: str) -> list[str]:
    """Return the lines of a text without their ends; the end of the last one may be missing."""
    found = END.split(text)
    if not found[-1]:
        found.pop()
    return found


def names(path: Path, what: str) -> list[str]:
    """Return a list whose lines are positions, such as class names: one a line, stripped.

    what: what a line holds. Empty lines at the end are passed over. Raises `EdgeclipError` as
    `read`, for an empty line before that (each name after it would move up), for a control
    character, for JSON, YAML and tables, and where no line is left.
    """
    found = _stripped(path, what)
    for i, line in enumerate(found, 1):
        if not line:
            raise EdgeclipError(
                f"{path}: line {i}",
                f"is empty, and a {what} is known by its place",
                f"remove the line, or write the {what} that is missing",
            )
    return found


def texts(path: Path, what: str) -> list[str]:
    """Return a list whose order means nothing, such as templates: the lines that are not empty.

    what: what a line holds. Raises `EdgeclipError` as `names`, but for empty lines.
    """
    return [line for line in _stripped(path, what) if line]


def _stripped(path: Path, what: str) -> list[str]:
    """Return the lines without white space around them, and without empty ones at the end."""
    found = []
    for line in lines(read(path)):
        # Files that were put together leave a byte-order mark at a line's start.
        found.append(line.strip().lstrip("\ufeff").strip())
    while found and not found[-1]:
        found.pop()
    if not found:
        raise EdgeclipError(path, "is empty", f"write one {what} per line into it")

    for i, line in enumerate(found, 1):
        refuse_unprintable(line, f"{path}: line {i}", what)
    _refuse_structure(found, path, what)
    return found


def _refuse_structure(found: list[str], path: Path, what: str) -> None:
    """Refuse what was written for a program: each line of it would become one name."""
    file, new = shlex.quote(str(path)), shlex.quote(f"{path}.txt")
    suffix = path.suffix.lower()
    if JSON.fullmatch("\n".join(found)):
        do = f"write one {what} a line, such as: jq -r '.[]' {file} > {new}"
        raise EdgeclipError(path, "is JSON and no list of lines", do)
    if suffix in (".yaml", ".yml"):
        raise EdgeclipError(path, "is YAML and no list of lines", f"write one {what} a line")
    columns = _columns(found, suffix)
    if columns > 1:
        cut = "cut -f2" if suffix == ".tsv" else "cut -d, -f2"
        do = f"keep the column of each {what}, such as: {cut} {file} > {new}"
        raise EdgeclipError(path, f"is a table of {columns} columns, and no list", do)
    quoted = [line.rstrip(",") for line in found if line[:1] in QUOTES]
    if len(quoted) == len(found) and all(q[:1] == q[-1:] and len(q) > 2 for q in quoted):
        do = "remove the quotes and commas: a line is one " + what
        raise EdgeclipError(path, "has every line in quotes, as a program's list", do)


def _columns(found: list[str], suffix: str) -> int:
    if suffix not in TABLES:
        return 1
    try:
        return max(len(row) for row in csv.reader(found, delimiter=TABLES[suffix]))
    except csv.Error:
        return 1


def refuse_unprintable(line: str, where: str, what: str) -> None:
    """Raise `EdgeclipError` for a control character, and for what stands for a lost letter."""
    if LOST in line:
        raise EdgeclipError(
            where, "has U+FFFD, which stands for a letter that was lost", f"write the {what} again"
        )
    for character in line:
        if unicodedata.category(character) == "Cc":
            raise EdgeclipError(
                where,
                f"has a control character (U+{ord(character):04X})",
                f"remove it: a line is one {what} and nothing else",
            )
