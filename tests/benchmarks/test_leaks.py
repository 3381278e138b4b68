"""A leak is seen, whatever else memory does; and edgeclip's loops are run to their end."""

import json
import sys

import numpy as np
import pytest

from tests.support.files import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import compare
import figures
import leaks
from leak_loops import LOOPS, RUNTIMES

MIB = 2**20


def seen(memory, files=(), threads=()):
    """Samples of a loop: a point each 10 rounds."""
    count = len(memory)
    return [
        [10 * (i + 1), int(memory[i]), [*files, *[8] * count][i], [*threads, *[2] * count][i]]
        for i in range(count)
    ]


def noisy(slope, count=200, seed=0):
    """Memory that grows by `slope` bytes a round, under steps up and down of pages."""
    steps = 4096 * np.random.default_rng(seed).integers(-3, 4, count)
    return 50 * MIB + slope * 10 * np.arange(count) + steps


@pytest.mark.parametrize("slope", [0, 500, 3000])
def test_the_interval_holds_the_slope(slope):
    found = leaks.of_samples(seen(noisy(slope)))["bytes_a_round"]
    assert found["low"] <= slope <= found["high"] and found["n"] == 160


def test_what_grows_in_the_warm_up_alone_is_no_leak():
    memory = np.full(200, 50 * MIB)
    memory[:40] -= np.arange(40, 0, -1) * MIB
    found = leaks.of_samples(seen(memory))
    assert found["growth_mib"] == 0 and found["bytes_a_round"]["high"] == 0


def test_one_step_in_the_run_is_growth_and_no_slope():
    memory = np.full(200, 50 * MIB)
    memory[190:] += MIB
    found = leaks.of_samples(seen(memory))
    assert found["growth_mib"] == 1 and found["bytes_a_round"]["median"] == 0


def test_files_and_threads_that_stay_are_counted_and_those_that_come_and_go_are_not():
    flat = np.full(200, 50 * MIB)
    grown = leaks.of_samples(seen(flat, files=[8] * 150 + [9] * 50, threads=[2, 3] * 100))
    assert (grown["more_files"], grown["more_threads"]) == (1, 0)


def judged(slope, beside=None):
    name = "opening, onnxruntime"
    found = {name: leaks.of_samples(seen(noisy(slope)))}
    if beside is not None:
        found[LOOPS[name].beside] = leaks.of_samples(seen(noisy(beside, seed=1)))
    return leaks.judged(name, found)[0]


def test_a_loop_is_judged_beside_the_runtime_alone():
    assert judged(0)["verdict"] == judged(5000, 5000)["verdict"] == "met"
    assert judged(5000)["verdict"] == judged(10_000, 5000)["verdict"] == "missed"
    assert judged(5000, 5000)["what"].endswith("more than alone")


def test_the_difference_is_as_wide_as_both():
    a, b = compare.Interval(3.0, 2.0, 5.0, 40), compare.Interval(1.0, 0.5, 2.0, 30)
    assert leaks.less(a, b) == (2.0, 0.0, 4.5, 30)


def test_a_watch_looks_at_evenly_spaced_rounds_and_never_beyond():
    watch = leaks.Watch(1000)
    for _ in range(1002):
        watch()
    assert watch.samples[:, 0].tolist() == list(range(5, 1001, 5))
    assert (watch.samples[:, 1:] > 0).all()


def test_every_runtime_has_its_loops_and_each_plain_one_is_beside_one_of_ours():
    for runtime in RUNTIMES:
        assert {f"{unit}, {runtime}" for unit in ("inference", "opening")} <= LOOPS.keys()
    beside = {loop.beside for loop in LOOPS.values() if loop.beside}
    assert beside == {name for name, loop in LOOPS.items() if loop.alone}


def test_the_table_has_a_row_a_loop_and_says_what_was_not_installed():
    loop = {"rounds": 1000} | leaks.of_samples(seen(noisy(0)))
    found = {"loops": {"opening, x": loop}, "not_installed": ["tensorrt"]}
    table = figures.TABLES["leaks"](json.loads(json.dumps(found)))
    assert "| opening, x | 1,000 | 50 |" in table and "| tensorrt: not installed |" in table
