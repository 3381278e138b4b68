"""The trial's statistics on runs whose answer is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import methods_table as M


def run(base, novel, **fields):
    """A run with these hits."""
    hits = {name: np.array(h, np.uint8) for name, h in (("base", base), ("novel", novel))}
    a, b = (h.mean() for h in hits.values())
    return {
        "test": {"base": a, "novel": b, "harmonic mean": 2 * a * b / (a + b)},
        "hits": {name: np.packbits(h).tobytes().hex() for name, h in hits.items()},
        "images": {name: len(h) for name, h in hits.items()},
        **fields,
    }


def runs(seed, p, seeds=5, n=200, **fields):
    rng = np.random.default_rng(seed)
    return {s: run(rng.random(n) < p, rng.random(n) < p, **fields) for s in range(seeds)}


def test_a_run_against_itself_has_no_difference_and_no_interval():
    d = M.difference(runs(0, 0.7), runs(0, 0.7))
    assert d["mean"] == 0
    assert d["t"] == (0, 0)
    assert d["bootstrap"] == (0, 0)
    assert d["n"] == 5


def test_the_t_interval_is_scipys():
    from scipy import stats

    a, b = runs(0, 0.8), runs(1, 0.7)
    d = [M.figure(a[s]) - M.figure(b[s]) for s in range(5)]
    assert M.difference(a, b)["t"] == pytest.approx(
        stats.ttest_1samp(d, 0).confidence_interval(0.95)
    )


def test_the_bootstrap_holds_the_true_difference_and_photos_widen_it(monkeypatch):
    monkeypatch.setattr(M, "BOOTSTRAPS", 2000)
    few, many = (
        M.difference(runs(2, 0.8, n=n), runs(3, 0.7, n=n))["bootstrap"] for n in (50, 2000)
    )
    assert few[0] < 0.1 < few[1] and many[0] < 0.1 < many[1]
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])


def test_only_runs_of_the_same_teacher_data_and_schedule_are_paired():
    a, b = runs(0, 0.8, shared="x"), runs(1, 0.7, shared="x")
    b[4]["shared"] = "y"
    assert M.difference(a, b)["n"] == 4
    assert M.difference({0: a[0]}, b) is None


def test_a_torn_line_of_the_log_is_no_run(tmp_path):
    log = tmp_path / "l.jsonl"
    log.write_text(
        json.dumps({"set": "a"}) + "\n" + '{"set": "b", "me\n' + json.dumps({"set": "c"}) + "\n"
    )
    assert [line["set"] for line in M.read(log)] == ["a", "c"]
