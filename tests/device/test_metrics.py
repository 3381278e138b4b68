"""Metrics against hand computation and brute force."""

import math

import numpy as np
import pytest

from edgeclip.device.metrics import (
    accuracy_drop,
    chance_recall,
    cosine,
    harmonic_mean,
    hits,
    l2_normalize,
    median_interval,
    paired_drop,
    recall_both_ways,
)
from edgeclip.device.records import to_json


def test_normalized_rows_have_length_one_and_zero_stays_zero():
    x = l2_normalize(np.array([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]]))
    np.testing.assert_allclose(x, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
    assert x.dtype == np.float32


def test_hits_by_hand():
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.2, 0.3, 0.4]])
    assert hits(scores, np.array([1, 1, 0])).tolist() == [True, False, False]
    assert hits(scores, np.array([1, 1, 0]), 2).tolist() == [True, True, False]
    assert hits(scores, np.array([1, 1, 0]), 3).tolist() == [True, True, True]


def test_ties_count_against():
    assert not hits(np.zeros((4, 3)), np.arange(4) % 3).any()
    assert hits(np.array([[1.0, 1.0, 0.0]]), np.array([0]), 2).all()


def test_hits_equal_a_sort_where_no_tie_is():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 11)), rng.integers(0, 11, 200)
    order = np.argsort(-scores, axis=1)
    for k in (1, 5):
        assert hits(scores, labels, k).tolist() == [
            label in row for label, row in zip(labels, order[:, :k], strict=True)
        ]


def test_the_harmonic_mean():
    assert harmonic_mean(0.5, 0.5) == 0.5
    assert harmonic_mean(1.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert math.isclose(harmonic_mean(0.6, 0.3), 0.4)


def test_recall_of_a_permutation_is_one_both_ways():
    order = np.random.default_rng(0).permutation(20)
    recall = recall_both_ways(np.eye(20), np.eye(20)[order], np.arange(20), order)
    for way in recall.values():
        assert way["r1"] == way["r5"] == way["r10"] == 1.0
        assert math.isclose(way["chance_r1"], 1 / 20)
        assert math.isclose(way["chance_r10"], 0.5)


def test_recall_by_hand_with_texts_of_several_images():
    # images 0 and 1 share text 0; scores [3 images, 2 texts]
    images, texts = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]), np.eye(2)
    recall = recall_both_ways(images, texts, np.array([0, 0, 1]), np.array([0, 1]), ks=(1, 2))
    assert recall["image_to_text"] == pytest.approx(
        {"r1": 2 / 3, "r2": 1.0, "chance_r1": 1 / 2, "chance_r2": 1.0}
    )
    # text 0: its image 0 is first; text 1: image 2 (.7) comes after image 1 (.8)
    # chance: 2 of 3 and 1 of 3 at k = 1; 1 and 2/3 at k = 2
    assert recall["text_to_image"] == pytest.approx(
        {"r1": 1 / 2, "r2": 1.0, "chance_r1": 1 / 2, "chance_r2": 5 / 6}
    )


def test_ties_count_against_in_retrieval_but_not_among_ones_own():
    recall = recall_both_ways(
        np.ones((4, 2)), np.ones((2, 2)), np.array([0, 0, 1, 1]), np.array([0, 1]), ks=(1, 2, 3)
    )
    assert (recall["image_to_text"]["r1"], recall["image_to_text"]["r2"]) == (0.0, 1.0)
    assert (recall["text_to_image"]["r2"], recall["text_to_image"]["r3"]) == (
        0.0,
        1.0,
    )  # two strangers tie; its own two are one hit


def test_recall_equals_a_sort_where_no_tie_is():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(700, 6)), rng.normal(size=(40, 6))
    groups = rng.permutation(np.arange(700) % 40)
    recall = recall_both_ways(images, texts, groups, np.arange(40))
    scores = images @ texts.T
    for k in (1, 5, 10):
        assert recall["image_to_text"][f"r{k}"] == np.mean(
            [g in row for g, row in zip(groups, np.argsort(-scores, axis=1)[:, :k], strict=True)]
        )
        assert recall["text_to_image"][f"r{k}"] == np.mean(
            [g in groups[row] for g, row in enumerate(np.argsort(-scores.T, axis=1)[:, :k])]
        )


def test_chance_recall_is_what_random_orders_reach():
    rng = np.random.default_rng(0)
    found = np.mean([(rng.permutation(12)[:5] < 3).any() for _ in range(4000)])
    assert abs(chance_recall(np.array([3]), 12, 5)[0] - found) < 0.02
    assert (
        chance_recall(np.array([1, 12]), 12, 12).tolist() == [1.0, 1.0]
        and chance_recall(np.array([2]), 4, 10)[0] == 1.0
    )


def test_cosine_of_equal_sets_is_one():
    x = l2_normalize(np.random.default_rng(0).normal(size=(50, 8)))
    assert all(math.isclose(v, 1.0, abs_tol=1e-6) for v in to_json(cosine(x, x)).values())


def test_a_large_shared_mean_flatters_the_raw_cosine_only():
    rng = np.random.default_rng(1)
    a, b = (l2_normalize(20.0 + rng.normal(size=(500, 32))) for _ in range(2))
    c = cosine(a, b)
    assert c.raw_min > 0.99
    assert abs(c.centered_p5) < 0.6
    assert c.centered_min < 0


def test_cosine_by_hand():
    a, b = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    assert math.isclose(cosine(a, b).raw_min, 0.0, abs_tol=1e-7) and math.isclose(
        cosine(a, b).raw_p5, 0.05, rel_tol=1e-5
    )
    one = cosine(a[:1], b[:1])
    assert one.centered_min == one.raw_min == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_the_accuracy_drop_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random(300) < 0.7, rng.random(300) < 0.65
    drop = accuracy_drop(a, b)
    assert math.isclose(drop.drop_pp, 100 * (a.mean() - b.mean()), abs_tol=1e-9)
    assert (drop.lost, drop.won, drop.images) == (
        sum(x and not y for x, y in zip(a, b, strict=True)),
        sum(y and not x for x, y in zip(a, b, strict=True)),
        300,
    )


def test_counts_of_several_sets_pool_to_the_drop_of_their_images_together():
    rng = np.random.default_rng(0)
    sets = [(rng.random(n) < 0.8, rng.random(n) < 0.75) for n in (40, 400)]
    drops = [accuracy_drop(a, b) for a, b in sets]
    lost, won, n = (int(sum(getattr(d, k) for d in drops)) for k in ("lost", "won", "images"))
    together = accuracy_drop(*(np.concatenate(side) for side in zip(*sets, strict=True)))
    assert paired_drop(lost, won, n) == together
    right = sum(
        int(a.sum()) for a, _ in sets
    )  # where the first is right, only a lost one is answered otherwise
    assert 1 - lost / right == np.mean([y for a, b in sets for x, y in zip(a, b, strict=True) if x])


@pytest.mark.parametrize(("lost", "won", "n"), [(6, 2, 100), (1, 0, 40), (0, 3, 60), (40, 25, 900)])
def test_the_upper_limit_is_where_tangos_score_is_just_not_rejected(lost, won, n):
    """The share of won images under the limit is searched for, not taken from its closed form."""
    limit = paired_drop(lost, won, n).upper_pp / 100

    def likelihood(share):
        return (
            lost * math.log(share + limit)
            + won * math.log(share)
            + (n - lost - won) * math.log(1 - 2 * share - limit)
        )

    low, high = max(1e-12, 1e-12 - limit), (1 - limit) / 2 - 1e-12
    for _ in range(200):  # the likelihood has one top
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if likelihood(a) < likelihood(b) else (low, b)
    score = (lost - won - n * limit) / math.sqrt(n * (2 * low + limit * (1 - limit)))
    assert score == pytest.approx(-1.6448536, abs=1e-3)


@pytest.mark.parametrize("n", [20, 400, 10_000])
def test_no_discordant_pair_is_no_certainty(n):
    z2 = 1.6448536269514722**2
    assert paired_drop(0, 0, n).upper_pp == pytest.approx(100 * z2 / (n + z2), abs=1e-6)


@pytest.mark.parametrize("lose", [0.002, 0.005, 0.01])
def test_the_limit_holds_with_few_discordant_pairs(lose):
    """Of all that 400 images may show of a true drop, no more than 7 % of the mass excludes it."""
    n, missed = 400, 0.0
    for lost in range(16):
        mass = math.comb(n, lost) * lose**lost * (1 - lose) ** (n - lost)
        missed += mass * (paired_drop(lost, 0, n).upper_pp < 100 * lose)
    assert missed <= 0.07


def test_every_image_lost_or_won_is_within_its_bounds():
    assert paired_drop(30, 0, 30).upper_pp == pytest.approx(100)
    assert -100 <= paired_drop(0, 30, 30).upper_pp < 0


def test_agreement_on_few_images_is_no_certainty():
    same = np.ones(10, bool)
    assert accuracy_drop(same, same).drop_pp == 0 and accuracy_drop(same, same).upper_pp > 10
    many = np.ones(10_000, bool)
    assert accuracy_drop(many, many).upper_pp < 0.03


def test_the_upper_limit_covers_the_true_drop_in_about_95_of_100():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        u = rng.random(200)  # true: lost with .06, won with .03
        lost, won = u < 0.06, (u >= 0.06) & (u < 0.09)
        rest = rng.random(200) < 0.7
        covered += (
            accuracy_drop(
                np.where(won, False, lost | rest), np.where(lost, False, won | rest)
            ).upper_pp
            >= 3.0
        )
    assert 0.93 <= covered / 2000 <= 0.98


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_own_score_that_is_not_finite_is_no_hit_whatever_k_is(bad):
    scores = np.array([[bad, 0.5, 0.1], [0.9, 0.5, 0.1]])
    for k in (1, 2, 3):
        assert hits(scores, np.array([0, 0]), k).tolist() == [False, True]


def test_features_that_are_no_numbers_hit_nothing():
    assert not hits(np.full((4, 3), np.nan), np.arange(4) % 3, 3).any()
    recall = recall_both_ways(
        np.full((4, 2), np.nan), np.eye(2), np.array([0, 0, 1, 1]), np.array([0, 1]), ks=(1, 10)
    )
    assert {way[k] for way in recall.values() for k in ("r1", "r10")} == {0.0}


def test_anothers_score_that_is_no_number_counts_against():
    scores = np.array([[0.9, np.nan, 0.1]])
    assert not hits(scores, np.array([0]), 1).any() and hits(scores, np.array([0]), 2).all()
    images = np.array([[1.0, 0.0], [np.nan, 0.0]])
    recall = recall_both_ways(images, np.eye(2)[:1], np.array([0, 1]), np.array([0]), ks=(1, 2))[
        "text_to_image"
    ]
    assert (recall["r1"], recall["r2"]) == (0.0, 1.0)


def test_the_interval_of_a_median_is_two_of_its_values_and_holds_the_true_one():
    assert median_interval(np.arange(31.0)[::-1]) == (
        15.0,
        7.0,
        23.0,
    )  # of 31 tosses 7 heads or fewer come in 0.17 %, 8 in 0.53 %
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (
        2.0,
        1.0,
        3.0,
    )  # too few for the confidence: all of them
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        _, low, high = median_interval(rng.lognormal(size=31), 0.95)
        inside += low <= 1.0 <= high
    assert 0.94 <= inside / 2000 <= 0.985
