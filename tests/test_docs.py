"""README.md and docs/ say what the code does: generated pages, names, command lines, paths, links,
figures.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgeclip import config
from edgeclip.cli import main
from edgeclip.cli.group import HELP
from tests.support.files import REPO

WRITTEN = (
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "docs" / "design").glob("*.md")),
)
"""pages that people write"""
PAGES = (*WRITTEN, *sorted((REPO / "docs" / "reference").glob("*.md")))
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(
    r"`((?:edgeclip|docs|tests|benchmarks|recipes|export|devices|results|\.ci)/[\w./*-]*)`"
)
PLACEHOLDER = re.compile(r"\b[A-Z]{4,}\b")
"""NAME in export/NAME.yaml"""
SEPARATORS = ("&&", "||", ";", "|", ">", "&", "do", "done")


def generate():
    """Return docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", REPO / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name(page: Path) -> str:
    return str(page.relative_to(REPO))


def whole() -> str:
    """Return all that people wrote, as one text."""
    return "\n".join(page.read_text(encoding="utf-8") for page in WRITTEN)


# --- generated pages and figures


def test_generated_pages_are_what_the_code_gives():
    assert generate().stale() == [], "run `make docs`"


def test_a_page_that_the_code_does_not_give_is_named(tmp_path):
    module = generate()
    docs = tmp_path / "docs"
    for path, text in module.pages().items():
        copy = docs / path.relative_to(module.DOCS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    assert module.stale(docs) == []
    (docs / "reference" / "cli.md").write_text("other", encoding="utf-8")
    (docs / "schemas" / "Old.json").write_text("{}", encoding="utf-8")
    (docs / "schemas" / "BenchReport.json").unlink()
    assert sorted(module.stale(docs)) == [
        "docs/reference/cli.md: is not what the code gives",
        "docs/schemas/BenchReport.json: is not what the code gives",
        "docs/schemas/Old.json: nothing generates it",
    ]


def test_every_field_of_a_recipe_is_in_the_reference_with_its_docstring():
    page = (REPO / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
    assert "| `toward_unadapted` |" in page
    assert "pixels a side that the SVGs are rasterized to, once" in page


def test_figures_are_those_of_their_json():
    command = [sys.executable, str(REPO / "benchmarks" / "figures.py"), "--check"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- names


def commands(group: click.Group, before: str) -> Iterator[str]:
    """Yield every command's words, those of groups included."""
    for word, command in group.commands.items():
        yield f"{before} {word}"
        if isinstance(command, click.Group):
            yield from commands(command, f"{before} {word}")


@pytest.mark.parametrize("words", list(commands(main, "edgeclip")))
def test_a_command_is_named(words):
    assert words in whole()


@pytest.mark.parametrize("kind", ["recipe", "target", "device"])
def test_each_shipped_file_is_named(kind):
    text = whole()
    missing = [name for name in config.shipped(kind) if not re.search(rf"\b{name}\b", text)]
    assert missing == []


# --- command lines


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words after `edgeclip` of every call in the page's fenced code blocks."""
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if "edgeclip " in line and "import" not in line:
                yield from calls(line)


def calls(line: str) -> Iterator[list[str]]:
    """Yield the words after `edgeclip` of each call in one line of a shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if token not in SEPARATORS:
            words.append(token)
            continue
        if words and words[0].rpartition("/")[2] == "edgeclip":
            yield words[1:]
        elif "-m" in words and words[words.index("-m") + 1] == "edgeclip":
            yield words[words.index("-m") + 2 :]
        words = []


def parse(words: list[str]) -> None:
    """Parse a command line as click does, groups included, without running it."""
    context = main.make_context("edgeclip", list(words), **HELP)
    command: click.Command = main
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        _, below, rest = command.resolve_command(context, rest)
        command = below
        context = command.make_context(command.name, rest, parent=context)


def test_calls_are_found_in_a_line_of_a_shell():
    line = (
        "for s in a; do .venv/bin/edgeclip distill x --data d/$s && torchrun -m edgeclip list; done"
    )
    assert list(calls(line)) == [["distill", "x", "--data", "d/$s"], ["list"]]
    assert list(calls("pip install 'edgeclip[ssh]'   # for edgeclip doctor")) == []


def test_a_line_with_an_unknown_option_or_command_does_not_parse():
    for words in (["list", "--no-such"], ["no-such"], ["export", "--layout", "zip"]):
        with pytest.raises(click.UsageError):
            parse(words)


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_each_command_line_parses(page):
    for words in command_lines(page):
        try:
            parse(words)
        except click.UsageError as e:
            pytest.fail(f"edgeclip {' '.join(words)}: {e.format_message()}")


def test_the_readme_has_command_lines():
    assert len(list(command_lines(REPO / "README.md"))) >= 10


# --- links and paths


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_lead_somewhere(page):
    broken = []
    text = COMMENT.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in LINK.findall(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page):
    missing = []
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        if not PLACEHOLDER.search(path) and not list(REPO.glob(path.rstrip("/"))):
            missing.append(path)
    assert missing == []


def test_the_readme_is_read_in_five_minutes():
    lines = (REPO / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 100] == []
