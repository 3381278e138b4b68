"""open_clip's CSV of images and captions: read as it was written, whoever wrote it, or refused with
what to do.
"""

import csv
import unicodedata
from pathlib import Path

import pytest

from edgeclip.errors import EdgeclipError
from edgeclip.host import data
from edgeclip.host import recipe as R
from tests.support.images import encoded, toy_image

NAMES = ["0.jpg", "sub/1.jpg", "café.jpg"]
NO_NUMBER = ["None", "null", "NA", "nan", "N/A", "1", "true", ""]


def spec(root, **more):
    return R.Csv(name="x", root=str(root), **more)


def written(root, rows, separator="\t"):
    with (root / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("filepath", "title"), *rows])
    for name, _ in rows:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(encoded(toy_image(0)))
    return root


def refused(given):
    with pytest.raises(EdgeclipError) as error:
        data.load(given, Path("unused"))
    return str(error.value)


def test_a_caption_is_text_whatever_it_looks_like(tmp_path):
    rows = [(f"{i}.jpg", caption) for i, caption in enumerate(NO_NUMBER)]
    found = data.load(spec(written(tmp_path, rows)), Path("unused"))
    assert [image.caption for image in found.train] == NO_NUMBER


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_the_separator_that_the_file_has_is_named_and_reads_it(tmp_path, separator):
    written(tmp_path, [(name, "a cat") for name in NAMES], separator)
    other = "," if separator == "\t" else "\t"
    line = refused(spec(tmp_path, separator=other))
    assert line.endswith(f"set data.separator: {separator!r}")
    found = data.load(spec(tmp_path, separator=separator), Path("unused"))
    assert [image.key for image in found.train] == NAMES


def test_columns_of_other_names_are_named(tmp_path):
    written(tmp_path, [("0.jpg", "a cat")])
    assert "known: filepath, title" in refused(spec(tmp_path, image="picture"))


@pytest.mark.parametrize(
    ("listed", "lies", "says"),
    [
        ("sub\\1.jpg", "sub/1.jpg", "write / in its paths: sub/1.jpg"),
        (unicodedata.normalize("NFC", "é.jpg"), unicodedata.normalize("NFD", "é.jpg"), "(NFD)"),
        (unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "é.jpg"), "(NFC)"),
        ("1.jpg", "2.jpg", "remove the line, or check data.root"),
    ],
)
def test_a_path_of_another_spelling_is_named(tmp_path, listed, lies, says):
    written(tmp_path, [(listed, "a cat")])
    (tmp_path / listed).unlink()
    (tmp_path / lies).parent.mkdir(exist_ok=True)
    (tmp_path / lies).write_bytes(encoded(toy_image(0)))
    assert says in refused(spec(tmp_path)).rpartition("; ")[2]
