"""Data sets of images with captions and no classes: open_clip's CSV."""

import csv
from pathlib import Path
from typing import TextIO

from edgeclip.device.images import ImageRef
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.data.dataset import Dataset
from edgeclip.host.data.files import data_root
from edgeclip.host.recipe import Csv


def load_csv(spec: Csv, cache: Path) -> Dataset:
    """Return the images that a CSV file lists, one per line: its path and its caption.

    Raises `EdgeclipError` where the file, a column or an image is missing, and for an image that is
    listed twice.
    """
    root = data_root(spec.root, spec.name)
    path = root / spec.file
    try:
        with path.open(encoding="utf-8", newline="") as file:
            images = _read_rows(file, path, root, spec)
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise EdgeclipError(path, f"cannot be read as CSV ({e})", "save it as UTF-8 text") from None

    _refuse_twice_or_missing(images, path, root)
    return Dataset(spec.name, spec.license, [], (), [], images, [], [])


def _read_rows(file: TextIO, path: Path, root: Path, spec: Csv) -> list[ImageRef]:
    rows = csv.DictReader(file, delimiter=spec.separator)
    columns = rows.fieldnames or []
    for column in (spec.image, spec.caption):
        if column not in columns:
            raise EdgeclipError(path, f"has no column '{column}'", did_you_mean(column, columns))

    images = []
    for row in rows:
        name = row[spec.image]
        if not name:
            raise EdgeclipError(
                f"{path}: line {rows.line_num}",
                f"column '{spec.image}' is empty",
                "complete the line or remove it",
            )
        caption = (row[spec.caption] or "").strip()
        images.append(ImageRef(name, str(root / name), caption=caption))
    return images


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
