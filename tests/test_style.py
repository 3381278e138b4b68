"""The form that this project asks of its code, measured over `edgeclip/`.

The limits are those at which the code of the anchors in CONTRIBUTING.md reads well: one thought a
line, functions that fit a screen, files that read top to bottom. A density is a count per 1,000
lines of code, blank lines, comments and docstrings left out.
"""

import ast
import functools
import tokenize
from pathlib import Path

import pytest

import edgeclip

PACKAGE = Path(edgeclip.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
COLUMNS, FUNCTION_LINES, FILE_LINES = 100, 60, 400
CONDITIONAL_EXPRESSIONS, COMPREHENSIONS = 15, 30
"""at most so many per 1,000 lines of code"""
UNTYPED = 40
"""at most so many `dict[str, Any]` in all"""
TOP = 12
"""names at the top of the package, dunder files and py.typed not counted"""

COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with tokenize.open(path) as f:
        tokens = [t for t in tokenize.generate_tokens(f.readline) if t.type not in skip]
    held = {n for t in tokens if t.string for n in range(t.start[0], t.end[0] + 1)}
    return len(held - string_lines(path))


def string_lines(path: Path) -> set[int]:
    """Lines of docstrings, those below a constant or a field included."""
    lines: set[int] = set()
    for node in ast.walk(tree(path)):
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def nodes(kinds: tuple[type, ...]) -> list[tuple[Path, ast.AST]]:
    return [
        (path, node) for path in FILES for node in ast.walk(tree(path)) if isinstance(node, kinds)
    ]


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"


def nested(kinds: tuple[type, ...]) -> list[str]:
    """Places where one of `kinds` stands inside another."""
    found = []
    for path, outer in nodes(kinds):
        inner = [n for n in ast.walk(outer) if n is not outer and isinstance(n, kinds)]
        found += [where(path, n) for n in inner]
    return sorted(set(found))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_fits(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [f"{path.name}:{i}" for i, line in enumerate(lines, start=1) if len(line) > COLUMNS]
    assert not wide
    assert len(lines) <= FILE_LINES


def test_a_function_fits_a_screen():
    long = {}
    for path, node in nodes(FUNCTION):
        length = node.end_lineno - node.lineno + 1
        if length > FUNCTION_LINES:
            long[f"{where(path, node)} {node.name}"] = length
    assert not long


def test_one_thought_a_line():
    thousands = sum(code_lines(path) for path in FILES) / 1000
    assert len(nodes((ast.IfExp,))) / thousands <= CONDITIONAL_EXPRESSIONS
    assert len(nodes(COMPREHENSION)) / thousands <= COMPREHENSIONS


def test_no_comprehension_is_nested():
    assert nested(COMPREHENSION) == []


def test_no_conditional_expression_is_nested():
    assert nested((ast.IfExp,)) == []


def test_records_are_typed():
    untyped = [
        where(path, n) for path, n in nodes((ast.Subscript,)) if ast.unparse(n) == "dict[str, Any]"
    ]
    assert len(untyped) <= UNTYPED


def test_few_names_stand_at_the_top():
    names = {
        p.name for p in PACKAGE.iterdir() if not p.name.startswith("__") and p.name != "py.typed"
    }
    assert len(names) <= TOP
