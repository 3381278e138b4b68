"""The tables that are marked as measured are what their files give."""

import json
import subprocess
import sys

import pytest

from tests.support.files import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import figure_cells
import figures

PAGE = """before
<!-- figures: results/a.json table=required -->
stale
<!-- end -->
between, | a | table | by hand |
<!-- figures: results/a.json table=required -->
<!-- end -->
after
"""


def result(**fields):
    """A benchmark's JSON with one required figure."""
    required = {"what": "speed", "found": 2.5, "low": 2.0, "high": 3.0, "n": 30}
    return {"required": [required | {"at_least": 1.3, "at_most": None, "verdict": "met"} | fields]}


def write(root, content):
    """Write results/a.json below `root`."""
    (root / "results").mkdir()
    (root / "results" / "a.json").write_text(json.dumps(content))


def test_every_marked_table_is_what_its_file_gives():
    checked = subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / "figures.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_every_log_of_results_has_a_table_on_a_page():
    marked = {
        found["file"]
        for page in figures.pages()
        for found in figures.BLOCK.finditer(page.read_text())
    }
    kept = {str(path.relative_to(REPO)) for path in (REPO / "results").iterdir()}
    assert kept == marked


def test_what_stands_between_the_marks_is_replaced_and_nothing_else(tmp_path):
    write(tmp_path, result())
    found = figures.rendered(PAGE, tmp_path)
    assert found.count("| speed | 2.5 (2 to 3) | 30 | at least 1.3 | met |") == 2
    assert "stale" not in found and "between, | a | table | by hand |" in found
    assert found.startswith("before\n<!-- figures:") and found.endswith("<!-- end -->\nafter\n")
    assert figures.rendered(found, tmp_path) == found


def test_another_figure_in_the_file_is_another_page(tmp_path):
    write(tmp_path, result())
    before = figures.rendered(PAGE, tmp_path)
    (tmp_path / "results" / "a.json").write_text(json.dumps(result(found=2.6)))
    assert figures.rendered(before, tmp_path) != before


def test_a_table_that_is_unknown_and_a_file_that_is_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match="table=requirde: unknown"):
        figures.rendered(PAGE.replace("table=required", "table=requirde"), tmp_path)
    with pytest.raises(SystemExit, match=r"a\.json: there is no such file"):
        figures.rendered(PAGE, tmp_path)


def test_what_was_not_measured_says_so():
    assert (
        figure_cells.markdown(["a", "b"], [["x", None]]).splitlines()[-1] == "| x | not measured |"
    )
