"""A text file reads as it was written, whatever saved it, or is refused at its line: at every door.

A mark or a letter that is read wrongly is no error that anybody sees: it is another class.
"""

import codecs
import json
import os
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from edgeclip import config, disk, text_file
from edgeclip.cli import words as given
from edgeclip.device import power
from edgeclip.errors import EdgeclipError
from edgeclip.host import data
from edgeclip.host import recipe as R
from tests.support.command import run
from tests.support.images import encoded, toy_image
from tests.support.webdataset import webdataset

NAMES = ["apple pie", "crème brûlée", "ラーメン", "🍣 sushi"]


def class_list(folder, content):
    webdataset(folder)
    (folder / "classnames.txt").write_bytes(content)
    return data.load(R.WebDataset(name="w", root=str(folder)), folder / "cache").classes


def label_file(path):
    return given.labels(f"@{path}")


def labels(folder, content):
    (folder / "labels.txt").write_bytes(content)
    return label_file(folder / "labels.txt")


def vocabulary(folder, content):
    (folder / "words.txt").write_bytes(content)
    return text_file.texts(folder / "words.txt", "text")


LISTS = [class_list, labels, vocabulary]
ENDS = ["\n", "\r\n", "\r"]
MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("door", LISTS)
def test_a_list_is_read_in_every_encoding_that_says_which_it_is(tmp_path, door, encoding, end):
    whole = end.join(NAMES)
    for text in (whole, whole + end, whole + end + "  " + end + end):
        assert door(tmp_path, text.encode(encoding)) == NAMES


@pytest.mark.parametrize(("mark", "encoding"), [
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
])  # fmt: skip
def test_both_orders_of_bytes(tmp_path, mark, encoding):
    assert labels(tmp_path, mark + "\n".join(NAMES).encode(encoding)) == NAMES


def test_a_template_has_no_mark(tmp_path):
    (webdataset(tmp_path) / "zeroshot_classification_templates.txt").write_bytes(
        "a {c}\r\n\r\nthe {c}".encode("utf-8-sig")
    )
    found = data.load(R.WebDataset(name="w", root=str(tmp_path)), tmp_path)
    assert found.templates == ("a {c}", "the {c}")


# What is not UTF-8 ------------------------------------------------------------------------------

UNMARKED = ["latin-1", "cp1252", "shift_jis", "gbk", "koi8-r", "utf-16-le", "utf-16-be"]
WORDS = {"shift_jis": "ラーメン", "gbk": "拉面", "koi8-r": "борщ"}


@pytest.mark.parametrize("encoding", UNMARKED)
@pytest.mark.parametrize("door", LISTS)
def test_what_is_not_utf8_is_refused_and_the_advice_really_converts(tmp_path, door, encoding):
    wanted = ["pie", "rice", WORDS.get(encoding, "crème brûlée")]
    with pytest.raises(EdgeclipError) as e:
        door(tmp_path, ("\n".join(wanted) + "\n").encode(encoding))
    says = str(e.value)
    assert "\n" not in says
    assert "line 3: byte 0x" in says or "UTF-16" in says
    assert "iconv -f " in says
    if encoding not in ("latin-1", "cp1252", "utf-16-le", "utf-16-be"):
        return  # the command is an example there: nobody can know what it was saved as

    if shutil.which("iconv") is None:
        pytest.skip("iconv is missing; apt-get install libc-bin")
    command = says[says.index("iconv") :]
    subprocess.run(command, shell=True, check=True)
    new = Path(shlex.split(command)[-1])
    assert text_file.names(new, "label") == wanted


def test_a_path_with_spaces_is_quoted_in_the_command(tmp_path):
    (tmp_path / "my labels.txt").write_bytes(b"th\xe9\n")
    with pytest.raises(EdgeclipError) as e:
        label_file(tmp_path / "my labels.txt")
    words = shlex.split(str(e.value).partition("such as: ")[2])
    assert words[:6] == ["iconv", "-f", "LATIN1", "-t", "UTF-8", str(tmp_path / "my labels.txt")]


@pytest.mark.parametrize("line", [1, 2, 7])
@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_the_line_of_a_wrong_byte_is_named(tmp_path, line, end):
    rows = [b"cat"] * 8
    rows[line - 1] = b"th\xe9"
    (tmp_path / "l.txt").write_bytes(end.encode().join(rows))
    with pytest.raises(EdgeclipError, match=rf"l\.txt: line {line}: byte 0xe9 is not UTF-8; "):
        label_file(tmp_path / "l.txt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"cat\ndo\0g\n", "line 2: has a NUL byte"),
        (bytes(300), "line 1: has a NUL byte"),
        (encoded(toy_image(0)), "line 3: has a NUL byte; give a text file"),
        (codecs.BOM_UTF16_LE + "cat\n".encode("utf-16-le") + b"\x00", "UTF-16 .* broken at byte"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8c\x00", "UTF-16 .* broken at byte 2"),
        (codecs.BOM_UTF32_LE + b"\xff\xff\xff\xff", "UTF-32 .* broken at byte"),
        (b"", "is empty; write one label per line"),
        (codecs.BOM_UTF8, "is empty; write one label per line"),
        (b"\n \n\t\n", "is empty; write one label per line"),
        ("a\u0000b".encode("utf-16"), "NUL"),
    ],
)
def test_what_is_no_text_is_refused_in_a_line(tmp_path, content, says):
    (tmp_path / "l.txt").write_bytes(content)
    with pytest.raises(EdgeclipError, match=says) as e:
        label_file(tmp_path / "l.txt")
    assert "\n" not in str(e.value)


# What a line is ----------------------------------------------------------------------------------

SPLITS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
"""where `str.splitlines` ends a line and no editor does"""


@pytest.mark.parametrize("character", SPLITS, ids=lambda c: f"U+{ord(c):04X}")
@pytest.mark.parametrize("door", LISTS)
def test_nothing_else_makes_two_classes_of_one(tmp_path, door, character):
    content = f"cat\nhot{character}dog\n".encode()
    if character in "\u2028\u2029":
        assert door(tmp_path, content + b"car\n") == ["cat", f"hot{character}dog", "car"]
        return
    with pytest.raises(EdgeclipError, match="line 2: has a control character"):
        door(tmp_path, content)


@pytest.mark.parametrize("blank", ["", "  ", "\t", "\u00a0", "\u3000", "\ufeff"], ids=ascii)
@pytest.mark.parametrize("door", [class_list, labels])
def test_an_empty_line_among_positions_is_refused_at_its_line(tmp_path, door, blank):
    with pytest.raises(EdgeclipError, match=r"line 3: is empty, and a .* is known by its place"):
        door(tmp_path, f"cat\ndog\n{blank}\ncar\n".encode())
    with pytest.raises(EdgeclipError, match="line 1: is empty"):
        door(tmp_path, f"{blank}\ncat\n".encode())


def test_an_empty_line_among_texts_is_passed_over(tmp_path):
    assert vocabulary(tmp_path, b"\ncat\n\n\ndog\n") == ["cat", "dog"]


@pytest.mark.parametrize("space", [" ", "\t", "\u00a0", "\u3000", "\u2003", "\ufeff"], ids=ascii)
@pytest.mark.parametrize("door", LISTS)
def test_white_space_around_a_name_is_no_part_of_it(tmp_path, door, space):
    after = space.replace("\ufeff", "")
    assert door(tmp_path, f"{space}cat{after}\n{space}hot\u00a0dog\ncar".encode()) == [
        "cat",
        "hot\u00a0dog",
        "car",
    ]


@pytest.mark.parametrize("character", ["\x01", "\x07", "\x1b", "\x7f", "\x9b", "\t", "\ufffd"])
@pytest.mark.parametrize("door", LISTS)
def test_what_no_name_can_hold_is_refused_at_its_line(tmp_path, door, character):
    with pytest.raises(EdgeclipError, match=r"line 2: has (a control character|U\+FFFD)"):
        door(tmp_path, f"cat\nhot{character}dog\ncar\n".encode())


def test_joiners_and_marks_of_other_scripts_stay(tmp_path):
    words = ["می\u200cخواهم", "👩\u200d🍳", "क्\u200dष", "e\u0301clair"]
    assert labels(tmp_path, "\n".join(words).encode()) == words


# What a path is ----------------------------------------------------------------------------------


def test_folders_missing_files_and_pipes(tmp_path):
    with pytest.raises(EdgeclipError, match=r"cannot be read \(Is a directory\)"):
        label_file(tmp_path)
    with pytest.raises(EdgeclipError, match="there is no such file"):
        label_file(tmp_path / "nothing.txt")
    (tmp_path / "f").write_text("x")
    with pytest.raises(EdgeclipError, match=r"cannot be read \(Not a directory\)"):
        label_file(tmp_path / "f" / "l.txt")
    with pytest.raises(EdgeclipError, match=r"cannot be read \(File name too long\)"):
        label_file(tmp_path / ("x" * 300))

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=("\n".join(NAMES).encode(),)).start()
    assert label_file(pipe) == NAMES


# The other doors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("encoding", MARKED)
def test_captions(tmp_path, encoding, end):
    (tmp_path / "é.png").write_bytes(encoded(toy_image(0)))
    (tmp_path / "b.png").write_bytes(encoded(toy_image(1)))
    rows = ["title\tfilepath", '"hot\u2028dog, \x0c 🍣"\té.png', '"two\nlines"\tb.png', ""]
    (tmp_path / "train.csv").write_bytes(end.join(rows).encode(encoding))
    found = data.load(R.Csv(name="c", root=str(tmp_path)), tmp_path)
    assert [(p.key, p.caption) for p in found.train] == [
        ("é.png", "hot\u2028dog, \x0c 🍣"),
        ("b.png", "two\nlines"),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("title,filepath\né,a.png\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
        (b"title,filepath\nx,a.png\na cat, sitting,b.png\n", "line 3: .*fields"),
        (b"filepath,title\na.png\n", "line 2: has not the header's 2 fields"),
        (b'filepath,title\na.png,x\nb.png,"open\n', "line 3: has a quote that is not closed"),
        (b'filepath,title\na.png,"open\nb.png,x\n', "line 2: has a quote that is not closed"),
        (b"filepath,title,title\na.png,x,y\n", "has two columns 'title'"),
        (b"", "has no column 'filepath'"),
    ],
)
def test_captions_that_would_be_read_wrongly_are_refused(tmp_path, content, says):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(encoded(toy_image(0)))
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(EdgeclipError, match=says):
        data.load(R.Csv(name="c", root=str(tmp_path), separator=","), tmp_path)


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("encoding", MARKED)
def test_yaml_and_json(tmp_path, encoding, end):
    rows = ["data:", "  kind: csv", "  name: é🍣", "  root: .", ""]
    (tmp_path / "d.yaml").write_bytes(end.join(rows).encode(encoding))
    assert config.load(tmp_path / "d.yaml", R.DataFile).data.name == "é🍣"
    (tmp_path / "m.json").write_bytes(json.dumps({"é": 1}, ensure_ascii=False).encode(encoding))
    assert disk.read_json(tmp_path / "m.json") == {"é": 1}


def test_yaml_that_is_not_utf8_is_refused_at_its_line(tmp_path):
    (tmp_path / "d.yaml").write_bytes("data:\n  name: é\n".encode("latin-1"))
    with pytest.raises(EdgeclipError, match=r"d\.yaml: line 2: byte 0xe9 is not UTF-8"):
        config.load(tmp_path / "d.yaml", R.DataFile)
    done = run("distill", tmp_path / "d.yaml")
    assert done.exit_code == 1 and "byte 0xe9 is not UTF-8" in done.output


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=repr)
@pytest.mark.parametrize("encoding", MARKED[:3])
def test_the_csv_of_a_power_meter(tmp_path, encoding, end):
    rows = ["timestamp,watts", "1,2.5", "2,3.5", "3,"]  # its last line is still being written
    (tmp_path / "m.csv").write_bytes(end.join(rows).encode(encoding))
    assert [(r.time, r.watts) for r in power.meter(tmp_path / "m.csv")] == [(1.0, 2.5), (2.0, 3.5)]
