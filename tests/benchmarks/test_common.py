"""The options that every benchmark has: forms, --check, --json, and what is missing."""

import json
import subprocess
import sys

import pytest

from tests.support.files import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import common
import compare

HERE = {
    "cpu": "a CPU",
    "cores": 2,
    "isa": None,
    "os": "an OS",
    "python": "3.11",
    "load_average": 0.1,
}
MISSED = compare.exact("speed", 1.0, at_least=2.0)


def parsed(*arguments):
    """The options of a benchmark called with these arguments."""
    return common.arguments("A benchmark.").parse_args(arguments)


def test_a_missed_figure_ends_a_check_with_3_and_nothing_else_does():
    common.finish({}, [MISSED], HERE, parsed())
    common.finish({}, [compare.exact("speed", 2.0, at_least=2.0)], HERE, parsed("--check"))
    with pytest.raises(SystemExit) as ended:
        common.finish({}, [MISSED], HERE, parsed("--quick", "--check"))
    assert ended.value.code == 3


def test_the_smoke_form_judges_nothing(capsys):
    common.finish({}, [MISSED], HERE, parsed("--smoke", "--check"))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["verdict"] for r in last["required"]] == ["not judged"] and last["form"] == "smoke"


def test_the_forms_exclude_each_other():
    with pytest.raises(SystemExit):
        parsed("--quick", "--smoke")


def test_the_file_is_written_before_a_check_ends_and_equals_the_last_line(tmp_path, capsys):
    path = tmp_path / "results" / "speed.json"
    with pytest.raises(SystemExit):
        common.finish(
            {"benchmark": "speed", "ms": 2.5},
            [MISSED],
            HERE,
            parsed("--check", "--json", str(path)),
        )
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(path.read_text()) == last and last["ms"] == 2.5
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_no_result(value, tmp_path):
    path = tmp_path / "speed.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.finish({"ms": value}, [], HERE, parsed("--json", str(path)))
    assert not path.exists()


def test_what_is_not_installed_ends_with_77_and_how_to_get_it(capsys):
    common.require("nothing to do", module="json")
    with pytest.raises(SystemExit) as ended:
        common.require("pip install it", module="no_such_module")
    assert ended.value.code == common.EXIT_UNAVAILABLE == 77
    assert capsys.readouterr().err == "no_such_module is not installed: pip install it\n"
    with pytest.raises(SystemExit):
        common.require("apt install it", program="no-such-program")


def test_a_large_parent_does_not_count_as_this_program_s_own_peak():
    """Linux hands the peak of whoever starts a process on to it: 200 MiB here, of which the child
    holds none.
    """
    ballast = bytearray(200 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "import common; print(common.this_process_mib())"
    folder = REPO / "benchmarks"
    seen = subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True)
    assert len(ballast) and 10 < float(seen) < 150
