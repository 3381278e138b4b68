"""A log says how far a step is and what is left; a duration is told as people say it."""

import pytest

from edgeclip import progress
from edgeclip.progress import Pace, duration, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute(clock, capsys):
    for _ in track(range(10), "validate t", 10, lambda: "loss 1"):
        clock[0] += 16.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{'validate t':<28} 2 of 10, 2 min left, loss 1"
    assert [line.split(" of ")[0].split()[-1] for line in lines[:-1]] == ["2", "4", "6", "8", "10"]
    assert lines[-1] == f"{'validate t':<28} 10 in 160.0 s, loss 1"


def test_what_is_quick_is_one_line(clock, capsys):
    assert list(track(range(3), "a", 3)) == [0, 1, 2]
    assert capsys.readouterr().err == f"{'a':<28} 3 in 0.0 s\n"


def test_what_is_left_is_told_at_the_speed_so_far(clock):
    pace = Pace(100)
    assert pace.left(0) == ""
    clock[0] = 60.0
    assert pace.left(10) == "9 min left"
    assert pace.left(100) == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.2, "3 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_a_duration_by_hand(seconds, said):
    assert duration(float(seconds)) == said
