"""The one parser of YAML and the one of JSON: what a text may cost, and what it may hold.

A kilobyte of YAML can stand for a terabyte, and a line of brackets ends Python's stack. Both
formats have limits here on size, depth and count, which are asked before anything is made; no key
comes twice, and every number is finite and fits into 64 bits. YAML is the part of it that says what
it shows: no aliases, no tags, and a date is the text that it is. Everything that is refused is one
`EdgeclipError` that names the place.
"""

import json
import math
import re
from typing import Any

import yaml

from edgeclip import text_file
from edgeclip.errors import EdgeclipError

MAX_DEPTH = 64
"""lists and mappings in one another"""
MAX_YAML = 2**20
"""bytes; a recipe with ten thousand class names has a fifth"""
MAX_EVENTS = 100_000
"""values, and ends of lists and mappings, of a YAML"""
MAX_KEY = 200
"""characters of a YAML's key"""
MAX_JSON = 2**26
"""bytes; the largest tokenizers have half of it"""
MAX_VALUES = 5_000_000
"""of a JSON, or commas in its texts: they take 400 MiB at most"""
DIGITS = 40
"""characters of a whole number; those that fit into 64 bits have at most 20 digits"""
WHOLE = (-(2**63), 2**64 - 1)
AGAIN = "make it again with the command that wrote it"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""in JSON: half of a character, or the whole of one where its other half follows"""


# --- JSON


def parse_json(text: str | bytes, where: object, do: str = AGAIN) -> Any:
    """Return the value of a JSON text.

    where: what messages call it; do: what its reader can do about it. Raises `EdgeclipError` for
    what is no JSON, is beyond a limit, or has a key twice or a number that no field can hold.
    """
    if len(text) > MAX_JSON:
        raise EdgeclipError(where, f"has more than {MAX_JSON:,} bytes of JSON", do)
    if isinstance(text, bytes):
        text = text_file.decode(text, where)
    if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        raise EdgeclipError(where, f"has more than {MAX_VALUES:,} values", do)
    try:
        value = _JSON.decode(text)
        _refuse_deep(value)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise EdgeclipError(where, "has half of a character (\\ud800 to \\udfff)", do) from None
    except RecursionError:
        raise EdgeclipError(where, f"is more than {MAX_DEPTH} levels deep", do) from None
    except ValueError as e:
        raise EdgeclipError(where, f"not valid JSON ({e})", do) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:40]!r} occurs twice")
            seen.add(key)
    return found


def _whole(digits: str) -> int:
    """Return a whole number. Raises `ValueError` for one that does not fit into 64 bits."""
    if len(digits) <= DIGITS and WHOLE[0] <= int(digits) <= WHOLE[1]:
        return int(digits)
    raise ValueError(f"{_short(digits)} does not fit into 64 bits")


def _real(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"{_short(digits)} is no finite number")
    return float(digits)


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _short(digits: str) -> str:
    if len(digits) <= DIGITS:
        return digits
    return f"{digits[:10]}... of {len(digits):,} characters"


def _refuse_deep(value: Any) -> None:
    """Raise `RecursionError` for lists and mappings that are deeper in one another than allowed."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = below
    if any(isinstance(item, (dict, list)) for item in level):
        raise RecursionError


_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_whole, parse_float=_real, parse_constant=_no_number
)


# --- YAML


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # without libyaml, PyYAML's own
    """Of what YAML 1.1 guesses by a word's form, only what JSON has too."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for node_of_key, _ in node.value:
            key = None
            if isinstance(node_of_key, yaml.ScalarNode):
                key = self.construct_object(node_of_key, deep=deep)
            if not isinstance(key, str) or len(key) > MAX_KEY or not key.isprintable():
                raise _mistake("a key is a word or a name; put it into quotes", node_of_key)
            if key in seen:
                raise _mistake(f"the key '{key}' occurs twice", node_of_key)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def whole(self, node: yaml.ScalarNode) -> int:
        try:
            return _whole(str(self.construct_yaml_int(_refuse_many_digits(node))))
        except ValueError as e:
            raise _mistake(str(e), node) from None

    def real(self, node: yaml.ScalarNode) -> float:
        try:
            return self.construct_yaml_float(_refuse_many_digits(node))
        except ValueError as e:
            raise _mistake(str(e), node) from None


def _mistake(what: str, at: Any) -> yaml.YAMLError:
    """at: a node or an event."""
    return yaml.YAMLError(f"line {at.start_mark.line + 1}: {what}")


def _refuse_many_digits(node: yaml.ScalarNode) -> yaml.ScalarNode:
    if len(node.value) > DIGITS:
        raise ValueError(f"{_short(node.value)} is too long for a number")
    return node


def _kept_resolvers() -> dict[str, list[tuple[str, Any]]]:
    """Return which words are no text, by their first letter: not dates, `<<` and `=`."""
    kept: dict[str, list[tuple[str, Any]]] = {}
    for letter, resolvers in _Loader.yaml_implicit_resolvers.items():
        kept[letter] = [r for r in resolvers if r[0].rpartition(":")[2] not in NO_TEXT]
    return kept


NO_TEXT = ("timestamp", "merge", "value")
_Loader.yaml_implicit_resolvers = _kept_resolvers()
_Loader.add_implicit_resolver(  # YAML 1.2's floats: PyYAML reads 1e-3 as a text, which nobody means
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.real)


def parse_yaml(text: str, where: object) -> Any:
    """Return the value of a YAML text of one document.

    where: what messages call it. Raises `EdgeclipError` for what is no YAML, is beyond a limit, has
    an alias, a tag, a key twice, or a number that is not finite or fits into no field.
    """
    try:
        _refuse_beyond_limits(text)
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        raise _no_yaml(e, where) from None
    refuse_infinite(value, where)
    return value


def compose_yaml(text: str, where: object) -> Any:
    """Return a YAML text's nodes, which know where they stand. Raises as `parse_yaml`, but for
    keys and numbers."""
    try:
        _refuse_beyond_limits(text)
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as e:
        raise _no_yaml(e, where) from None


def _no_yaml(error: yaml.YAMLError, where: object) -> EdgeclipError:
    return EdgeclipError(where, f"not valid YAML ({' '.join(str(error).split())})", "correct it")


def _refuse_beyond_limits(text: str) -> None:
    """Raise `yaml.YAMLError` by the events of the text, before anything is made of them."""
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"more than {MAX_YAML:,} characters")
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if count > MAX_EVENTS:
            raise _mistake(f"more than {MAX_EVENTS:,} values", event)
        if depth > MAX_DEPTH:
            raise _mistake(f"more than {MAX_DEPTH} levels deep", event)
        if isinstance(event, yaml.AliasEvent):
            raise _mistake("an alias (*); write out what it stands for", event)
        if getattr(event, "tag", None) is not None:
            raise _mistake("a tag (!); leave it out, and put a text into quotes", event)
        if isinstance(event, yaml.ScalarEvent) and "\0" in event.value:
            raise _mistake("a NUL character", event)


def refuse_infinite(value: Any, where: object, at: str = "") -> None:
    """Raise `EdgeclipError` for a number that is none or has no end, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        raise EdgeclipError(f"{where}: {at}", f"is {value}", "give a number that is finite")
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        refuse_infinite(item, where, f"{at}.{key}" if at else str(key))
