"""Slices say what their own images say, at limits that all of them keep, and nothing of a few."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.device.evaluation import (
    Evaluation,
    Look,
    images_tar,
    load_evaluation,
    looked_at,
)
from edgeclip.device.images import index_tar, read
from edgeclip.device.intervals import drop_limits
from edgeclip.device.per_class import FEW, LISTED, Answered
from edgeclip.device.slices import per_slice, slices_of
from edgeclip.errors import EdgeclipError


def answered(slices, lost=(), won=()):
    """Images of one class; those at `lost` are right before only, those at `won` after only."""
    n = len(slices)
    before, after = np.zeros(n, int), np.zeros(n, int)
    after[list(lost)] = 1
    before[list(won)] = 1
    scores = np.full(n, 0.5)
    return Answered(np.arange(n), np.zeros(n, int), before, after, scores, scores, slices=slices)


def test_a_slice_has_the_counts_and_the_limits_of_its_own_images():
    images = answered([["a"]] * 100 + [["b"]] * 60, lost=[0, 1, 2, 120], won=[3, 130])
    found = per_slice(images)
    rows = {row.name: row for row in found.rows}
    assert found.judged == 2 and found.left_out == 0
    for name, lost, won, n in (("a", 3, 1, 100), ("b", 1, 1, 60)):
        row = rows[name]
        assert (row.lost, row.won, row.images) == (lost, won, n)
        limits = drop_limits(lost, won, n, 1 - 0.05 / 2)
        assert row.drop_pp == pytest.approx(100 * (lost - won) / n)
        assert (row.lower_pp, row.upper_pp) == (100 * limits.low, 100 * limits.high)
        assert row.reference_top1 - row.bundle_top1 == pytest.approx(row.drop_pp / 100)


def test_limits_widen_with_the_number_of_slices():
    two = per_slice(answered([["a"]] * 50 + [["b"]] * 50, lost=[0]))
    ten = per_slice(answered([[f"{i // 50}"] for i in range(500)], lost=[0]))
    width = {len(f.rows): f.rows[0].upper_pp - f.rows[0].lower_pp for f in (two, ten)}
    assert width[10] > width[2]


def test_few_images_are_named_and_nothing_is_said_of_them():
    found = per_slice(answered([["few"]] * (FEW - 1) + [["enough"]] * FEW))
    few = found.rows[-1]
    assert (few.name, few.images, few.drop_pp, few.bundle_top1) == ("few", FEW - 1, None, None)
    assert found.judged == 1  # the few take no part in the correction


def test_what_all_images_share_is_no_slice():
    found = per_slice(answered([["all", "a"]] * 40 + [["all"]] * 40))
    assert [row.name for row in found.rows] == ["a"]
    alone = per_slice(answered([["all"]] * 40))
    assert (list(alone.rows), alone.judged, alone.left_out) == ([], 0, 0)


def test_an_image_that_is_named_twice_counts_once():
    (row, *_) = per_slice(answered([["a", "a"]] * 40 + [[]] * 10)).rows
    assert row.images == 40


def test_of_many_slices_the_worst_are_listed_and_the_others_counted():
    slices = [[f"{i // 30:03d}"] for i in range(30 * 50)] + [[f"few {i}"] for i in range(25)]
    lost = [0, 30 * 7]
    found = per_slice(answered(slices, lost=lost))
    known = [row for row in found.rows if row.drop_pp is not None]
    assert {"000", "007"} <= {row.name for row in known}
    assert len(known) <= 2 * LISTED and len(found.rows) - len(known) == LISTED
    assert found.judged == 50 and found.left_out == 75 - len(found.rows)


def test_all_slices_together_are_wrong_in_at_most_one_case_of_twenty():
    """Nothing is lost in truth; one-sided, as stated: a limit of some slice excludes zero."""
    rng = np.random.default_rng(0)
    names = [[f"{i % 8}"] for i in range(800)]
    false = 0
    for _ in range(300):
        changed = np.flatnonzero(rng.random(800) < 0.06)
        side = rng.random(len(changed)) < 0.5
        found = per_slice(answered(names, lost=changed[side], won=changed[~side]))
        false += any(row.lower_pp > 0 for row in found.rows)
    assert false / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_an_image_below_the_encoders_input_is_in_another_slice_than_one_of_its_size():
    looks = [Look("0" * 16, side) for side in (31, 32, 33)]
    given = [["camera: a"], [], ["camera: b"]]
    of = Evaluation(Path(), np.zeros((3, 2)), np.zeros(3, int), [], [0, 1, 2], None, None)
    both = of._replace(slices=given, looks=looks)
    below, at_least = "short side below 32 px", "short side at least 32 px"
    every = np.arange(3)
    found = slices_of(both, every, 32)
    assert found == [["camera: a", below], [at_least], ["camera: b", at_least]]
    assert slices_of(of._replace(slices=given), every, 32) == given
    assert slices_of(of, every, 32) == [[], [], []]  # a run that knows neither
    assert given == [["camera: a"], [], ["camera: b"]]


def test_slices_of_another_number_of_images_are_one_line(evaluation, tmp_path):
    folder = Path(shutil.copytree(evaluation, tmp_path / "evaluation"))
    path = folder / "evaluation.json"
    for slices, says in (([["a"]], "slices of 1 images, and labels of 600"), (["a"], "slices")):
        disk.write_json(path, disk.read_json(path) | {"slices": slices})
        disk.write_manifest(folder, "evaluation", {"license": "made up", "images": 600})
        with pytest.raises(EdgeclipError, match=says) as e:
            load_evaluation(folder)
        assert "\n" not in str(e.value)


def test_an_image_is_known_by_its_bytes_and_its_short_side(evaluation):
    found = looked_at(load_evaluation(evaluation, 5))
    assert len(found.looks) == 5 and {look.short_side for look in found.looks} == {32}
    for i, look in zip(found.chosen, found.looks, strict=True):
        image = index_tar(images_tar(evaluation))[i]
        assert look.digest == hashlib.sha256(read(image)).hexdigest()[:16]
