"""Data sets of images with captions and no classes: open_clip's CSV."""

import csv
import io
from pathlib import Path

from edgeclip import text_file
from edgeclip.device.images import ImageRef
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.data.dataset import Dataset
from edgeclip.host.data.files import data_root
from edgeclip.host.recipe import Csv


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
            raise EdgeclipError(path, f"has no column '{column}'", did_you_mean(column, columns))
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
                "remove the line, or check data.root",
            )
