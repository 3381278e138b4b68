"""The fuzzer finds what it is there to find, and seconds of it find nothing in what is shipped."""

import json
import random
import subprocess
import sys

import pytest

from tests.support.files import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import fuzz
import fuzz_targets
from fuzz_targets import TARGETS, mutated

from edgeclip.errors import EdgeclipError


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_seconds_of_a_target_find_nothing(name, tmp_path):
    """In a process of its own, as the campaign runs it: a decoder may end it."""
    command = [sys.executable, str(REPO / "benchmarks" / "fuzz.py"), "--check", "--seconds", "2"]
    command += ["--target", name, "--corpus", str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = list((tmp_path / "corpus" / "findings").glob("*.txt"))
    why = "\n".join(path.read_text(encoding="utf-8")[-2000:] for path in found)
    assert done.returncode == 0, why or done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])["targets"][name]
    assert figures["executions"] > figures["refused"] > 0


@pytest.mark.parametrize("name", TARGETS)
def test_its_seeds_are_files_that_are_taken(name, tmp_path):
    """A corpus of refused files would never come past the first check."""
    feed = TARGETS[name].make(tmp_path)
    taken = 0
    for seed in TARGETS[name].seeds():
        assert seed
        try:
            feed(seed)
            taken += 1
        except EdgeclipError:
            continue
    assert taken


def broken(content):
    if b"!" in content:
        raise KeyError(content)
    if b"?" in content:
        error = EdgeclipError("x", "two lines", "do")
        error.args = ("x: two\nlines; do",)  # as it would be if it were not made printable
        raise error
    raise EdgeclipError("x", "is refused", "do")


def test_an_error_of_another_type_is_a_finding_that_is_kept_once(tmp_path, monkeypatch):
    target = fuzz_targets.Target(lambda folder: broken, lambda: [b"a"])
    monkeypatch.setitem(TARGETS, "broken", target)
    watched = fuzz.Watched("broken", tmp_path)
    for content in (b"a", b"b!", b"c!", b"d?"):
        watched(content)
    watched.write()
    assert json.loads((tmp_path / "broken.json").read_text()) == {"executions": 4, "refused": 2}
    paths = [p for p in tmp_path.iterdir() if p.suffix not in (".txt", ".json")]
    found = {p.name: p.read_bytes() for p in paths}
    assert set(found.values()) == {b"b!", b"d?"}
    (of_type,) = [name for name in found if name.startswith("broken-KeyError-test_fuzz")]
    assert "KeyError" in (tmp_path / f"{of_type}.txt").read_text()


def test_mutations_are_of_every_kind_and_the_same_by_one_seed():
    seed = bytes(range(256)) * 4
    made = [mutated(seed, random.Random(i), [seed]) for i in range(300)]
    assert made == [mutated(seed, random.Random(i), [seed]) for i in range(300)]
    assert len(set(made)) > 290
    assert min(map(len, made)) < len(seed) < max(map(len, made))
