"""The tests keep their own layout: their folders are the package's, and what several need lies in
tests/support/.
"""

import ast

import pytest

from tests.support.files import REPO

TESTS = REPO / "tests"
FILES = sorted(TESTS.rglob("*.py"))
OWN = {"support", "golden", "benchmarks"}
"""Folders that mirror none of the package: helpers, curves, and the tests of the scripts in
benchmarks/.
"""


def imported(tree):
    """Every module that the tree names in an import, wherever it stands; a name that is imported
    from one counts too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_test(module):
    return module.rpartition(".")[2].startswith("test_") or module.rpartition(".")[2] == "conftest"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_no_file_imports_a_test_file_or_a_conftest(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [
        m
        for m in imported(tree)
        if m.startswith(("test_", "tests.", ".", "conftest")) and is_test(m)
    ] == []


def test_every_folder_is_one_of_the_package():
    folders = {p.parent.relative_to(TESTS) for p in TESTS.rglob("test_*.py")}
    unknown = [f for f in folders if f.parts and f.parts[0] not in OWN]
    assert [str(f) for f in unknown if not (REPO / "edgeclip" / f / "__init__.py").exists()] == []


def test_a_conftest_holds_fixtures_and_hooks_only():
    """A function that a test must import belongs in tests/support/."""
    for path in TESTS.rglob("conftest.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("pytest_"):
                assert any("fixture" in ast.unparse(d) for d in node.decorator_list), (
                    f"{path}: {node.name}"
                )
