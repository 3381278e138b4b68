"""Bundles are timed turn by turn, and what is slower in each turn is slower in the ratio."""

import time

import msgspec
import numpy as np
import pytest

from edgeclip.device import beside as B
from edgeclip.device.bench_report import Beside
from edgeclip.device.bundle import Bundle
from edgeclip.device.records import from_json, to_json


@pytest.fixture
def bundles(shipped_bundle):
    return [Bundle.load(shipped_bundle(name)) for name in ("onnx-int8", "onnx-fp32")]


def test_the_first_is_held_to_itself_and_a_slower_one_is_slower(bundles, monkeypatch):
    slow, quick = bundles
    own = Bundle.scores

    def scores(self, features):
        if self is slow:
            time.sleep(0.02)
        return own(self, features)

    monkeypatch.setattr(Bundle, "scores", scores)
    monkeypatch.setattr(B, "ROUNDS", 5)
    found = B.beside([quick, slow], None)
    first, second = found.rows
    assert first.whole == first.model == msgspec.structs.replace(first.whole, median=1.0, low=1.0, high=1.0)  # fmt: skip
    assert second.whole.high < 1.0
    assert second.whole_ms > 20 > first.whole_ms
    assert second.whole.low <= second.whole.median <= second.whole.high
    assert second.model_ms < 20  # what was slow is not the model
    assert [row.name for row in found.rows] == [quick.folder.name, slow.folder.name]
    assert from_json(to_json(found), Beside, "here") == found


def test_a_float_bundle_of_the_same_student_comes_first(bundles):
    int8, fp32 = bundles
    assert B.of_one_student([int8, fp32]) == [fp32, int8]
    other = Bundle.load(fp32.folder)
    other.manifest = msgspec.structs.replace(other.manifest, parents={"student": "another"})
    assert B.of_one_student([int8, other]) == [int8]
    other.manifest = msgspec.structs.replace(other.manifest, parents={})
    assert B.of_one_student([other, int8]) == []


def test_the_interval_is_that_of_the_median_of_ratios():
    ratios = np.random.default_rng(1).normal(2.0, 0.1, 41)
    found = B._ratio(ratios)
    assert found.median == pytest.approx(np.median(ratios))
    assert found.low < found.median < found.high
    assert found.high - found.low < 0.15
    same = B._ratio(np.full(9, 1.5))
    assert (same.low, same.median, same.high) == (1.5, 1.5, 1.5)
