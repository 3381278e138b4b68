"""Every benchmark runs end to end: in its form of seconds, which judges no figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.files import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import figures

pytestmark = pytest.mark.slow

MAIN = 'if __name__ == "__main__":'
WRITER = "figures.py"
"""measures nothing: it writes what the others measured into the pages"""
UNAVAILABLE = 77


def scripts() -> list[str]:
    """Return the names of the files in benchmarks/ that run by themselves; the others are their
    helpers.
    """
    found = []
    for path in sorted((REPO / "benchmarks").glob("*.py")):
        if MAIN in path.read_text(encoding="utf-8") and path.name != WRITER:
            found.append(path.name)
    return found


def smoke(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark's smoke form in `folder`, with one thread, so that benchmarks side by side
    do not spin.
    """
    command = [sys.executable, str(REPO / "benchmarks" / name), "--smoke", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", scripts())
def test_its_smoke_form_ends_well_and_its_last_line_is_its_json(name, tmp_path):
    done = smoke(name, tmp_path, "--json", "figures.json")
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["form"] == "smoke" and last["benchmark"] == name.removesuffix(".py")
    assert all(required["verdict"] == "not judged" for required in last["required"])
    assert json.loads((tmp_path / "figures.json").read_text()) == last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
    figures.required(last)
    if last["benchmark"] in figures.OF_BENCHMARKS:
        figures.OF_BENCHMARKS[last["benchmark"]](last)
