"""The load generator counts right, stops right and costs next to nothing."""

import collections
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgeclip.device.load import WARM_UP, OtherWork, run_scenario, summary, sustained
from edgeclip.device.runtime import open_session


def calls_of(work):
    """What Python and C functions are called while `work` runs, by name."""
    called = collections.Counter()

    def count(frame, event, argument):
        if event == "call":
            called[frame.f_code.co_name] += 1
        elif event == "c_call":
            called[argument.__name__] += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


def test_the_harness_calls_the_query_and_the_clock_and_next_to_nothing_else():
    """`benchmarks/harness.py --check` holds the microseconds; what is called is the same on every
    machine.
    """
    samples = [np.zeros((1, 3, 32, 32), np.float32)] * 4

    def query(_):
        pass

    def calls(count):
        return calls_of(lambda: run_scenario(query, samples, 0.0, count))

    each = {name: count / 1000 for name, count in (calls(3000) - calls(2000)).items()}
    assert each.pop("query") == 1
    assert each.pop("perf_counter") <= 3
    assert set(each) <= {"len", "append"}
    assert sum(each.values()) <= 5


def test_the_null_runtime_answers_without_work():
    session = open_session("null", Path("none"), 1)
    x = np.zeros((1, 3, 32, 32), np.float32)
    assert sum(calls_of(lambda: session.run(x)).values()) <= 5


def test_a_run_stops_at_its_count_where_no_duration_is_asked():
    assert len(run_scenario(lambda x: x, [0], 0.0, 123)) == 123


def test_a_run_goes_on_until_its_duration_is_reached_too():
    start = time.perf_counter()
    latencies = run_scenario(lambda x: time.sleep(0.001), [0], 0.15, 3)
    assert time.perf_counter() - start >= 0.15 and len(latencies) > 3


def test_a_run_goes_on_until_its_count_is_reached_too():
    assert len(run_scenario(lambda x: time.sleep(0.002), [0], 0.001, 20)) == 20


def test_samples_are_cycled_and_warm_up_queries_are_not_counted():
    seen = []
    latencies = run_scenario(seen.append, ["a", "b", "c"], 0.0, 7)
    assert len(latencies) == 7
    assert seen[WARM_UP:] == list("abcabca")
    assert len(seen) == WARM_UP + 7


def test_a_summary_by_hand():
    s = summary([i / 1000 for i in range(1, 101)])
    assert s.queries == 100
    assert s.latency_ms_min == pytest.approx(1)
    assert s.latency_ms_mean == pytest.approx(50.5)
    assert s.latency_ms_p50 == pytest.approx(50.5)
    assert s.latency_ms_p90 == pytest.approx(90.1)
    assert s.latency_ms_p95 == pytest.approx(95.05)


def test_p99_is_quoted_from_a_thousand_samples_on():
    assert summary([0.001] * 999).latency_ms_p99 is None
    assert summary([0.001] * 1000).latency_ms_p99 == pytest.approx(1)


def test_the_drift_is_the_last_tenths_p90_over_the_firsts(monkeypatch):
    runs = iter([[0.002] * 20] * 9 + [[0.006] * 20])
    monkeypatch.setattr("edgeclip.device.load.run_scenario", lambda *_: next(runs))
    assert sustained(lambda x: x, [0], 1.0).p90_drift == pytest.approx(3.0)


def test_a_load_that_throttled_in_its_middle_says_so(monkeypatch):
    """A Raspberry Pi that was throttled some time before, and is again in the fourth tenth only."""
    readings = iter([0x50000] * 4 + [0x50004] + [0x50000] * 6)
    monkeypatch.setattr(
        "edgeclip.device.machine.throttled", lambda: {"get_throttled": next(readings)}
    )
    found = sustained(lambda x: x, [0], 0.01)
    assert [w.throttled for w in found.windows] == [[]] * 3 + [["get_throttled"]] + [[]] * 6
    assert found.throttled == ["get_throttled"] and found.throttled_before is True
    monkeypatch.setattr("edgeclip.device.machine.throttled", lambda: None)
    assert sustained(lambda x: x, [0], 0.01).throttled is None


def test_other_work_is_told_from_ones_own():
    spin = "import time; end = time.time() + 1.2\nwhile time.time() < end: pass"
    others = OtherWork()
    own = time.process_time()
    while time.process_time() - own < 0.4:
        pass
    alone = others.processors()
    with subprocess.Popen([sys.executable, "-c", spin]):
        others = OtherWork()
        time.sleep(0.8)
        beside = others.processors()
    assert beside > 0.3
    assert alone is not None


def test_other_work_is_unknown_where_the_kernel_does_not_say(tmp_path):
    assert OtherWork(tmp_path).processors() is None
