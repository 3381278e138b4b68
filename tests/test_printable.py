"""Text from outside reaches a terminal as one line without escapes, at every door that prints."""

import ast
import json
import re
import shutil

import pytest

from edgeclip import disk
from edgeclip.cli.tables import plain
from edgeclip.device.bundle import Bundle
from edgeclip.errors import EdgeclipError, printable
from edgeclip.progress import say, track
from tests.support.command import run
from tests.support.damage import resign
from tests.support.files import REPO

HOSTILE = {
    "\x1b[31mred\x1b[0m": "red",
    "\x1b[2J\x1b[1;1Hgone": "gone",
    "\x1b]0;a title\x07shell": "shell",
    "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\": "link",
    "\x1b]52;c;cm0gLXJm\x07clipboard": "clipboard",
    "\x1bPdevice\x1b\\control": "control",
    "\x1b]without an end": "",
    "\x9b2Jgone": "gone",
    "\x1bc reset": " reset",
    "\x1b": "",
    "one\nError: two": "one Error: two",
    "one\r\n\ttwo": "one two",
    "one\x85two\u2028three": "one two three",
    "back\x08\x08\x7fspace": "backspace",
    "nul\x00": "nul",
    "\u202eelbissop\u202c": "elbissop",
    "\ufeffmark": "mark",
}
"""what a name may hold, and what is left of it"""
HONEST = [
    "a cat",
    "naïve café",
    "日本語",
    "العربية",
    "नमस्ते",
    "👩‍👩‍👧 family",
    "می‌خواهم",
    "a b",
    "5 µm",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_escapes_and_ends_of_lines_are_lost(text):
    assert printable(text) == HOSTILE[text]
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize("text", HONEST)
def test_words_of_any_script_stay_as_they_are(text):
    assert printable(text) == text


def test_no_character_of_unicode_moves_the_cursor():
    for code in range(0x110000):
        if 0xD800 <= code < 0xE000:
            continue
        left = printable(f"a{chr(code)}b")
        assert len(left.splitlines()) == 1, hex(code)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", left), hex(code)


def test_what_is_too_long_is_cut():
    assert printable("a" * 99, 10) == "a" * 9 + "…"
    told = str(EdgeclipError("w" * 10, "\x1b[2J" + "x" * 10_000, "do\nit"))
    assert len(told) < 3_000
    assert told.endswith("; do it")


@pytest.mark.parametrize("text", HOSTILE)
def test_every_door_to_the_terminal_uses_it(text, capsys):
    say(f"a {text} b")
    for _ in track([1], text, 1):
        pass
    plain.line(text)
    plain.table([[text, text]], ["a", "b"])
    found = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", found.out + found.err)
    assert len(found.err.splitlines()) == 2
    assert len(found.out.splitlines()) == 4


def test_no_table_prints_by_another_door():
    for path in sorted((REPO / "edgeclip" / "cli" / "tables").glob("*.py")):
        if path.name == "plain.py":
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {ast.unparse(call.func) for call in calls}
        assert not names & {"print", "click.echo", "sys.stdout.write"}, path


def test_labels_and_names_of_a_bundle_are_printed_without_them(cat, shipped_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(shipped_bundle("onnx-fp32"), bundle)
    labels = [f"{label}\x1b[31m\nError: {i}" for i, label in enumerate(Bundle.load(bundle).labels)]
    (bundle / "labels.json").write_text(json.dumps(labels))
    resign(bundle, licenses={"data": "\x1b[31mmine"})
    result = run("classify", cat, "--bundle", bundle)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert len(result.stdout.splitlines()) == 2 + 5
    told = json.loads(run("classify", cat, "--bundle", bundle, "--json").stdout)
    assert {row["label"] for row in told[str(cat)]} <= set(labels)  # data is as it was

    resign(bundle, image_encoder="\x1b[2Jx.onnx")
    result = run("classify", cat, "--bundle", bundle)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "\x1b" not in result.output
    assert (bundle / disk.MANIFEST).exists()
