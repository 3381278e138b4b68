"""Data sets of images with captions and no classes: open_clip's CSV."""

import csv
import io
import unicodedata
from pathlib import Path

from edgeclip import text_file
from edgeclip.device.images import ImageRef
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.data.dataset import Dataset
from edgeclip.host.data.files import data_root
from edgeclip.host.recipe import Csv

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def load_csv(spec: Csv, cache: Path) -> Dataset:
    """Return the images that a CSV file lists, one per line: its path and its caption.

    Raises `EdgeclipError` where the file, a column or an image is missing, for a line with more or
    fewer fields than the header, and for an image that is listed twice.
    """
    root = data_root(spec.root, spec.name)
    path = root / spec.file
    text = text_file.read(path)
    try:
        images = _read_rows(text, path, root, spec)
    except csv.Error as e:
        raise EdgeclipError(path, f"cannot be read as CSV ({e})", "correct that line") from None

    _refuse_twice_or_missing(images, path, root)
    return Dataset(spec.name, spec.license, [], (), [], images, [], [])


def _read_rows(text: str, path: Path, root: Path, spec: Csv) -> list[ImageRef]:
    lines = io.StringIO(text, newline="").readlines()
    rows = csv.DictReader(lines, delimiter=spec.separator)
    columns = rows.fieldnames or []
    for column in (spec.image, spec.caption):
        if column not in columns:
            do = _other_separator("".join(lines[:1]), spec) or did_you_mean(column, columns)
            if not columns:
                do = "write the columns' names into its first line"
            raise EdgeclipError(path, f"has no column '{column}'", do)
        if columns.count(column) > 1:
            raise EdgeclipError(path, f"has two columns '{column}'", "rename one of them")

    images = []
    last = rows.line_num
    for row in rows:
        if rows.line_num == len(lines):
            _refuse_open_quote(lines[last:], f"{path}: line {last + 1}", spec.separator)
        last = rows.line_num
        where = f"{path}: line {last}"
        name = row[spec.image]
        if not name:
            raise EdgeclipError(
                where, f"column '{spec.image}' is empty", "complete the line or remove it"
            )
        if None in row or row[spec.caption] is None:
            raise EdgeclipError(
                where,
                f"has not the header's {len(columns)} fields",
                f"put a field that holds {spec.separator!r} into double quotes",
            )
        images.append(ImageRef(name, str(root / name), caption=row[spec.caption].strip()))
    return images


def _other_separator(header: str, spec: Csv) -> str | None:
    """Return the advice where another separator gives the columns that are asked for."""
    for separator, name in SEPARATORS.items():
        columns = next(csv.reader([header.strip("\r\n")], delimiter=separator))
        if separator != spec.separator and {spec.image, spec.caption} <= set(columns):
            return f"its columns are separated by {name}: set data.separator: {separator!r}"
    return None


def _refuse_open_quote(lines: list[str], where: str, separator: str) -> None:
    """Refuse a quote that nothing closes: all that follows it would be one caption."""
    try:
        list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as e:
        if "unexpected end of data" in str(e):
            raise EdgeclipError(where, "has a quote that is not closed", "close it") from None


def _refuse_twice_or_missing(images: list[ImageRef], path: Path, root: Path) -> None:
    seen: set[str] = set()
    for image in images:
        if image.key in seen:
            raise EdgeclipError(path, f"lists '{image.key}' twice", "keep one line per image")
        seen.add(image.key)

        if not Path(image.path).is_file():
            raise EdgeclipError(
                path,
                f"lists '{image.key}', but there is no such file below {root}",
                _near(image.key, root) or "remove the line, or check data.root",
            )


def _near(name: str, root: Path) -> str | None:
    """Return the advice where a file lies there under another spelling of its path."""
    slashes = name.replace("\\", "/")
    if slashes != name and (root / slashes).is_file():
        return f"write / in its paths: {slashes}"
    for form in ("NFC", "NFD"):
        if (root / unicodedata.normalize(form, name)).is_file():
            return f"the file's name is the same in another Unicode form ({form}): rename one"
    return None
