"""What may be said of a difference over folds: Holm's correction, and when two methods are
level.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import folds_compare
from folds_compare import Difference, differences, holm, verdict


def test_holm_is_bonferroni_for_the_smallest_and_nothing_for_the_largest():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.9]) == pytest.approx([0.4, 0.9])
    assert holm([0.8, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.05, 0.06, 0.05, 0.06, 0.05], "better"),
        ([-0.05, -0.06, -0.05, -0.06, -0.05], "worse"),
        ([0.004, -0.004, 0.003, -0.003, 0.001], "level within 2 pp"),
        ([0.06, -0.06, 0.05, -0.05, 0.01], "not told apart"),
        ([0.0, 0.0, 0.0], "level within 2 pp"),
    ],
)
def test_verdicts(values, expected):
    difference = Difference("ComKD", np.array(values))
    assert verdict(difference, difference.p()) == expected


def test_a_difference_that_the_number_of_rows_explains_is_no_verdict():
    difference = Difference("ComKD", np.array([0.08, 0.02, 0.05, 0.01, 0.06]))
    p = difference.p()
    assert 0.025 < p < 0.05
    assert verdict(difference, p) == "better"
    assert verdict(difference, holm([p, 0.9])[0]) == "not told apart"


def line(model, fold, mean, stage_1="labels"):
    own = {"set": "s", "regime": "full", "stage_1": stage_1, "model": model, "fold": fold}
    return own | {"rules": {"shipped": {"mean": mean}}}


def test_only_folds_that_both_have_at_the_newest_stage_1_are_paired():
    log = [line("ComKD", 0, 0.9, "old"), line("PromptKD", 0, 0.1, "old")]
    log += [line("PromptKD", k, 0.5) for k in range(3)]
    log += [line("ComKD", k, 0.6) for k in range(1, 4)]
    (found,) = differences(log, "s", "full")
    assert found.model == "ComKD"
    assert found.values == pytest.approx([0.1, 0.1])
    (row,) = folds_compare.rows(log)
    assert row[:3] == ["s, every weight", "ComKD", 2]
