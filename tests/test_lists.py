"""A list is lines: what was written for a program is refused, and the advice gives the list."""

import csv
import io
import json
import shlex
import shutil
import subprocess

import pytest
import yaml

from edgeclip import text_file
from edgeclip.errors import EdgeclipError

NAMES = ["apple pie", "crème brûlée", "salt, pepper", "it's 5\" long"]


def table(delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([("id", "name"), *enumerate(NAMES)])
    return out.getvalue()


PROGRAMS = {
    "list.json": json.dumps(NAMES),
    "lines.json": json.dumps(NAMES, indent=1, ensure_ascii=False),
    "ids.json": json.dumps(dict(enumerate(NAMES)), indent=2),
    "json.txt": json.dumps(NAMES),
    "data.yaml": yaml.safe_dump({"nc": 4, "names": dict(enumerate(NAMES))}),
    "list.yml": yaml.safe_dump(NAMES),
    "table.csv": table(","),
    "table.tsv": table("\t"),
    "python.txt": "".join(f"{name!r},\n" for name in NAMES),
    "quoted.txt": "\n".join(f'"{name}"' for name in NAMES[:3]),
}


@pytest.mark.parametrize("read", [text_file.names, text_file.texts])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_program_reads_is_no_list(tmp_path, name, read):
    (tmp_path / name).write_text(PROGRAMS[name], encoding="utf-8")
    with pytest.raises(EdgeclipError) as error:
        read(tmp_path / name, "label")
    line = str(error.value)
    assert "\n" not in line and "label" in line.rpartition("; ")[2]


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n.endswith(".json")])
def test_the_command_that_is_given_makes_the_list(tmp_path, name):
    if shutil.which("jq") is None:
        pytest.skip("jq is missing; apt-get install jq")
    path = tmp_path / f"my {name}"
    path.write_text(PROGRAMS[name], encoding="utf-8")
    with pytest.raises(EdgeclipError) as error:
        text_file.names(path, "label")
    command = str(error.value).partition("such as: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert text_file.names(tmp_path / shlex.split(command)[-1], "label") == NAMES


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("l.csv", ["cat", "dog"]),
        ("l.tsv", ["cat, big", "dog"]),
        ("l.txt", ["[a] cat", "{b} dog"]),
        ("l.txt", ["{c} in the wild", "a {c}"]),
        ("l.txt", ["'cat'", "a dog"]),
        ("l.txt", ["'tis the season", "it's 5\""]),
        ("l.txt", ['5" pipe', '"', "''"]),
        ("l.txt", ["cat, big", "names: dog", "- a dash"]),
        ("l.json", ["cat", "dog"]),
        ("l.txt", ["[" * 5000]),
    ],
)
def test_names_that_only_look_like_it_are_names(tmp_path, name, lines):
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    assert text_file.names(tmp_path / name, "label") == lines
