"""A shuffled order that nobody holds: a permutation, of the seed alone, and as good as numpy's."""

import numpy as np
import pytest

from edgeclip.host.data.order import Shuffled


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 1000, 4096, 4097, 70_000])
def test_it_is_a_permutation(n):
    assert (np.sort(Shuffled(n, 3)[np.arange(n)]) == np.arange(n)).all()


def test_it_depends_on_the_seed_and_on_nothing_else():
    every = np.arange(5000)
    order = Shuffled(5000, 7)[every]
    assert (Shuffled(5000, 7)[every[::-1]] == order[::-1]).all()
    assert Shuffled(5000, 7)[np.array([4321])] == order[4321]
    assert (Shuffled(5000, 8)[every] != order).mean() > 0.99


def test_the_order_is_that_of_0_1():
    assert Shuffled(1000, 7)[np.arange(6)].tolist() == [962, 5, 580, 421, 723, 314]
    ends = np.array([0, 10**9 - 1])
    assert Shuffled(10**9, 7)[ends].tolist() == [186289153, 95403994]


def test_places_are_uniform_and_neighbors_are_torn_apart():
    """Over seeds, where position 0 and the distance of two neighbors go: chi-squared over ten bins,
    at most 27.9 in 999 of 1000."""
    n, seeds = 1000, 3000
    found = np.array([Shuffled(n, s)[np.array([0, 1])] for s in range(seeds)])
    for values in (found[:, 0], (found[:, 1] - found[:, 0]) % n):
        counts = np.bincount(values * 10 // n, minlength=10)
        assert ((counts - seeds / 10) ** 2 / (seeds / 10)).sum() < 27.9


def test_a_billion_cost_no_memory_and_no_time():
    order = Shuffled(10**9, 0)
    values = order[np.arange(10**9 - 1000, 10**9)]
    assert len(np.unique(values)) == 1000
    assert values.min() >= 0
    assert values.max() < 10**9
