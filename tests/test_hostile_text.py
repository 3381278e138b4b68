"""What a stranger's YAML or JSON can ask for: time, memory, the end of Python's stack, a number that
no field can hold. Each is one line that names the file.
"""

import ast
import json
import math
import random
import re
import subprocess
import sys

import pytest
import yaml

import edgeclip.text_file
from edgeclip import config, disk
from edgeclip.device import target
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe
from edgeclip.text_file.parser import (
    MAX_DEPTH,
    MAX_EVENTS,
    MAX_JSON,
    MAX_KEY,
    MAX_VALUES,
    MAX_YAML,
    compose_yaml,
    parse_json,
    parse_yaml,
)
from tests.support.files import REPO

SHIPPED = [p for name in ("recipes", "export", "devices") for p in (REPO / name).glob("*.yaml")]
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


def refused(parse, text, says):
    with pytest.raises(EdgeclipError, match=says) as e:
        parse(text, "the file")
    assert str(e.value).startswith("the file")
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_what_is_shipped_is_read_as_pyyaml_reads_it(path):
    text = path.read_text(encoding="utf-8")
    theirs = re.sub(r"\b(\d+)e-(\d+)", r"\1.0e-\2", text)  # PyYAML wants a point in a float
    assert parse_yaml(text, path) == yaml.safe_load(theirs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, r"line 2: an alias \(\*\)"),
        ("a: &a [*a]\n", r"line 1: an alias"),
        ("a: " + "[" * 100_000, f"line 1: more than {MAX_DEPTH} levels deep"),
        ("a: " + "{a: " * 100_000, f"more than {MAX_DEPTH} levels deep"),
        ("- " * 100_000, f"more than {MAX_DEPTH} levels deep"),
        ("? " * 100_000, f"more than {MAX_DEPTH} levels deep"),
        ("".join(f"k{i}: 1\n" for i in range(MAX_EVENTS)), f"more than {MAX_EVENTS:,} values"),
        ("".join(f"{i}:\n" for i in range(MAX_EVENTS)), f"more than {MAX_EVENTS:,} values"),
        ("a: [" + "a," * MAX_EVENTS + "]", f"more than {MAX_EVENTS:,} values"),
        ("a: " + "x" * MAX_YAML, f"more than {MAX_YAML:,} characters"),
        ("a: " + "7" * 5000, r"line 1: 7777777777\.\.\. of 5,000 characters is too long"),
        ("\na: " + "1:" * 2000 + "1", r"line 2: 1:1.* is too long"),
        ("a: 0x" + "f" * 17, "does not fit into 64 bits"),
        ("a: 18446744073709551616", "does not fit into 64 bits"),
        ("a: -9223372036854775809", "does not fit into 64 bits"),
        ("a: 0b_", "line 1: invalid literal"),
        ("a: [1, {b: .inf}]", r"the file: a\.1\.b: is inf"),
        ("a: 1e999", r"the file: a: is inf"),
        ("a: -.INF", r"the file: a: is -inf"),
        ("a: .nan", r"the file: a: is nan"),
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' occurs twice"),
        ("a: {b: 1, 'b': 2}", "line 1: the key 'b' occurs twice"),
        ("1: a", "line 1: a key is a word"),
        ("no: a", "line 1: a key is a word"),
        ("~: a", "line 1: a key is a word"),
        ("[a]: a", "line 1: a key is a word"),
        ("{{a: b}: c}", "line 1: a key is a word"),
        ('"\\e[2J": a', "line 1: a key is a word"),
        ('"a\\nb": a', "line 1: a key is a word"),
        (f"? {'k' * (MAX_KEY + 1)}\n: a", "line 1: a key is a word"),
        ("a: !!python/object/apply:os.system [id]", r"line 1: a tag \(!\)"),
        ("a: !!binary aGk=", "a tag"),
        ("a: !!int ''", "a tag"),
        ("a: !!timestamp x", "a tag"),
        ("a: ! b", "a tag"),
        ('a: "\\0"', "line 1: a NUL"),
        ('a: "\\ud800"', "not valid YAML"),
        ("a: b\n---\nc: d\n", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: \a", "not valid YAML"),
    ],
)
def test_yaml_that_costs_or_cannot_be_held_is_one_line(text, says):
    refused(parse_yaml, text, says)


@pytest.mark.parametrize("text", ["[" * 2000, LAUGHS, "a: !!x b", "- " * 2000])
def test_nodes_have_the_same_limits(text):
    refused(compose_yaml, text, "not valid YAML")


def test_a_word_is_what_it_shows():
    text = "day: 2024-01-02\nwhen: 2024-01-02T03:04:05Z\nsame: =\nsmall: 1e-3\n<<: merged\n"
    assert parse_yaml(text, "x") == {
        "day": "2024-01-02",
        "when": "2024-01-02T03:04:05Z",
        "same": "=",
        "small": 0.001,
        "<<": "merged",
    }
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert parse_yaml(f"a: {deep}", "x") == {"a": json.loads(deep)}
    edges = {"a": [2**64 - 1, -(2**63), 0, 16], "b": "ä😀"}
    assert parse_yaml(f"a: [{2**64 - 1}, {-(2**63)}, 0, 0x10]\nb: ä😀", "x") == edges
    assert parse_yaml("", "x") is None


WITHOUT = """
import json, sys
import yaml
del yaml.CSafeLoader
from edgeclip.errors import EdgeclipError
from edgeclip.text_file.parser import parse_yaml
found = []
for text in json.load(sys.stdin):
    try:
        found.append(parse_yaml(text, "x"))
    except EdgeclipError as e:
        found.append(str(e))
print(json.dumps(found))
"""


def test_without_libyaml_the_answers_are_the_same():
    """A system's own PyYAML may have been built without it."""
    texts = [path.read_text(encoding="utf-8") for path in SHIPPED]
    texts += [
        LAUGHS,
        "a: " + "[" * 2000,
        "- " * 2000,
        "a: 1\na: 2",
        "a: 1" + "0" * 4999,
        "a: !!x b",
    ]
    texts += ["day: 2024-01-02\n<<: merged\na: =\n", "a: .inf"]
    expected = []
    for text in texts:
        try:
            expected.append(parse_yaml(text, "x"))
        except EdgeclipError as e:
            expected.append(str(e))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], input=json.dumps(texts), capture_output=True, text=True
    )
    assert json.loads(done.stdout or done.stderr) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, f"more than {MAX_DEPTH} levels deep"),
        ('{"a":' * 100_000, f"more than {MAX_DEPTH} levels deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels deep"),
        ("[" + "[]," * MAX_VALUES + "[]]", f"more than {MAX_VALUES:,} values"),
        ('"' + "x" * MAX_JSON + '"', f"more than {MAX_JSON:,} bytes"),
        ("[" + "7" * 5000 + "]", r"7777777777\.\.\. of 5,000 characters does not fit"),
        ('{"a": 18446744073709551616}', "18446744073709551616 does not fit into 64 bits"),
        ('{"a": -9223372036854775809}', "does not fit into 64 bits"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": -1e' + "9" * 5000 + "}", "is no finite number"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": [Infinity]}', "Infinity is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        ('{"a": {"b\\u0007": 1, "b\\u0007": 2}}', r"the key 'b\\x07' occurs twice"),
        ('{"a": "\\ud800"}', "half of a character"),
        ('{"\\uDFFF": 1}', "half of a character"),
        ('{"a": "\a"}', "not valid JSON"),
        ("", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        (b"\xff\xfe\x00", "the file"),
        (b'{"a": "\xff"}', "line 1: byte 0xff is not UTF-8"),
    ],
)
def test_json_that_costs_or_cannot_be_held_is_one_line(text, says):
    refused(parse_json, text, says)


def test_json_is_read_as_pythons_own():
    values = {"a": [1, -2.5, 1e-300, 2**64 - 1, -(2**63), None, True], "b": {"ä": "😀"}, "c": ""}
    for ascii_only in (True, False):
        text = json.dumps(values, ensure_ascii=ascii_only)
        assert parse_json(text, "x") == values == parse_json(text.encode(), "x")
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, "x") == json.loads(deep)
    for path in [*(REPO / "docs" / "schemas").glob("*.json"), *(REPO / "results").glob("*.json")]:
        assert disk.read_json(path) == json.loads(path.read_text(encoding="utf-8"))


def mutated(text, rng):
    """A text with some of what parsers stumble over put into it, or a part taken out."""
    parts = ["[", "{", "}", "]", ":", ",", "&a ", "*a", "!!int ", "- ", "? ", "\n", "  ", "'", '"']
    parts += ["1e999", ".nan", "0x", "9" * 30, "2024-01-01", "\\ud800", "\0", "ä", "<<", "|", "%"]
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(text) + 1)
        if rng.random() < 0.3:
            text = text[:at] + text[at + rng.randrange(9) :]
        else:
            text = text[:at] + rng.choice(parts) * rng.choice([1, 1, 1, 70]) + text[at:]
    return text


def finite(value):
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return value is None or isinstance(value, (str, bool, int)) or math.isfinite(value)


@pytest.mark.parametrize("seed", range(4))
def test_mutations_are_values_or_one_line(seed):
    rng = random.Random(seed)
    whole = json.dumps({"a": [1, 2.5, {"b": None}], "c": {"d": "e", "f": [[], {}]}})
    texts = [(parse_json, whole), (parse_yaml, whole)]
    texts += [(parse_yaml, p.read_text(encoding="utf-8")[:1500]) for p in rng.sample(SHIPPED, 3)]
    refusals = 0
    for _ in range(150):
        parse, text = rng.choice(texts)
        try:
            value = parse(mutated(text, rng), "the file")
            assert finite(value)
            json.dumps(value, ensure_ascii=False).encode()
        except EdgeclipError as e:
            refusals += 1
            assert "\n" not in str(e)
    assert refusals > 20


@pytest.mark.parametrize("kind", [target.Target, recipe.Recipe])
def test_fields_of_any_type_are_one_line(kind, tmp_path):
    rng = random.Random(0)
    texts = [p.read_text(encoding="utf-8") for p in SHIPPED]
    values = ["[]", "{}", "1", "''", "1.5", "true", "~", "{kind: x}", "[[1]]", str(2**64 - 1)]
    refusals = 0
    for i in range(150):
        value = parse_yaml(rng.choice(texts), "x")
        place = value
        while isinstance(place, dict) and place and rng.random() < 0.6:
            inner = place[rng.choice(list(place))]
            if not isinstance(inner, dict) or not inner:
                break
            place = inner
        place[rng.choice(list(place))] = parse_yaml(rng.choice(values), "x")
        path = tmp_path / f"{i}.yaml"
        path.write_text(json.dumps(value))
        try:
            config.load(path, kind)
        except EdgeclipError as e:
            refusals += 1
            assert str(e).startswith(str(path))
    assert refusals > 50


# --- one parser

ALONE = ("edgeclip/boards/agent.py", "edgeclip/device/runtime/tensorrt_build.py")
"""scripts that run where there is no edgeclip, on what edgeclip wrote"""
OWN = ("edgeclip/device/bench.py",)
"""what it reads was printed by itself, in another process"""
PARSERS = ("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.compose")


def test_every_yaml_and_json_comes_through_one_parser():
    found = set()
    for path in (REPO / "edgeclip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in PARSERS:
                found.add(str(path.relative_to(REPO)))
    assert found - {*ALONE, *OWN} == {"edgeclip/text_file/parser.py"}


def test_a_file_of_any_size_is_read_no_further_than_its_limit(tmp_path):
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as file:
        file.truncate(40 * 2**30)
    for read in (lambda: config.load(huge, recipe.Recipe), lambda: disk.read_json(huge)):
        with pytest.raises(EdgeclipError, match=r"huge\.yaml: has more than .* bytes"):
            read()
    with pytest.raises(EdgeclipError, match="has more than"):
        edgeclip.text_file.read(huge)
