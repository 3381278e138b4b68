"""An epoch's means are of all of its steps, whose losses are kept as numbers and not as tensors."""

import gc
import weakref

import numpy as np
import pytest
import torch

from edgeclip.host.distill.log import BLOCK, Averages

NAMES = ("loss", "kl")


def steps(count, seed=0):
    values = np.random.default_rng(seed).normal(size=(count, len(NAMES))).astype(np.float32)
    return [dict(zip(NAMES, map(torch.tensor, row), strict=True)) for row in values]


def added(so_far, rows):
    averages = Averages(so_far)
    for row in rows:
        averages.add(row)
    return averages


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_a_row_is_the_mean_of_every_step(count):
    rows = steps(count)
    row = added({}, rows).row(3, None)
    for name in NAMES:
        assert row[name] == float(torch.stack([step[name] for step in rows]).mean())
    assert row.keys() == {"epoch", *NAMES} and row["epoch"] == 3


@pytest.mark.parametrize("cut", [1, BLOCK, BLOCK + 3])
def test_an_epoch_that_was_cut_has_the_row_of_a_whole_one(cut):
    rows = steps(2 * BLOCK + 5)
    first = added({}, rows[:cut]).tensors()
    assert all(values.shape == (cut,) for values in first.values())
    assert added(first, rows[cut:]).row(1, None) == added({}, rows).row(1, None)


def test_no_steps_have_no_values():
    assert Averages({}).tensors() == {}


def test_the_tensors_of_a_step_are_let_go_of_within_the_epoch():
    rows = steps(BLOCK)
    first = weakref.ref(rows[0]["loss"])
    averages = added({}, rows)
    del rows
    gc.collect()
    assert first() is None and averages.tensors()["loss"].shape == (BLOCK,)
