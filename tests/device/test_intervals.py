"""Limits cover as often as they say, and the number of images that is named settles the
question.
"""

import math

import numpy as np
import pytest

from edgeclip.device.intervals import (
    Limits,
    drop_limits,
    harmonic_mean_limits,
    images_for_drop,
    images_for_share,
    mcnemar,
    percentile_limits,
    share_limits,
    worst,
)


@pytest.mark.parametrize(("count", "images"), [(0, 5), (3, 40), (40, 40), (17, 300), (9, 900)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_a_shares_limits_are_clopper_and_pearsons(count, images, level):
    def at_most(k, p):
        return sum(math.comb(images, i) * p**i * (1 - p) ** (images - i) for i in range(k + 1))

    low, high = share_limits(count, images, level)
    if count:
        assert 1 - at_most(count - 1, low) == pytest.approx(1 - level)
    else:
        assert low == 0.0
    if count < images:
        assert at_most(count, high) == pytest.approx(1 - level)
    else:
        assert high == 1.0


@pytest.mark.parametrize(("lost", "won", "images"), [(0, 0, 50), (3, 1, 200), (10, 30, 1000)])
def test_a_drop_the_other_way_round_has_the_limits_the_other_way_round(lost, won, images):
    low, high = drop_limits(lost, won, images)
    assert drop_limits(won, lost, images) == pytest.approx((-high, -low))
    assert low <= (lost - won) / images <= high


def test_answers():
    assert Limits(0.0, 0.01).answer(0.01) == "holds"
    assert Limits(0.02, 0.05).answer(0.01) == "fails"
    assert Limits(0.01, 0.05).answer(0.01) == "cannot tell"
    for broken in (Limits(math.nan, math.nan), Limits(0.5, math.nan), Limits(math.nan, 0.5)):
        assert broken.answer(0.1) != "holds"
    assert worst(["holds", "cannot tell", "holds"]) == "cannot tell"
    assert worst(["cannot tell", "fails"]) == "fails"
    assert worst([]) == "holds"


def test_no_images_tell_nothing():
    assert share_limits(0, 0).answer(0.5) == "cannot tell"
    assert drop_limits(0, 0, 0).answer(0.5) == "cannot tell"
    assert images_for_share(0, 0, 0.1) is None
    assert images_for_drop(0, 0, 0, 0.1) is None


def drops(rng, images, changed, loss, times):
    """(lost, won) of so many draws."""
    share_lost = (changed + loss) / 2
    drawn = rng.multinomial(images, [share_lost, changed - share_lost, 1 - changed], size=times)
    return drawn[:, :2]


@pytest.mark.parametrize(("changed", "images"), [(0.02, 400), (0.02, 2000), (0.1, 300)])
def test_a_true_loss_of_the_limit_holds_in_one_case_of_twenty(changed, images):
    rng = np.random.default_rng(0)
    loss = 0.01
    held = [
        drop_limits(int(lost), int(won), images).answer(loss) == "holds"
        for lost, won in drops(rng, images, changed, loss, 1500)
    ]
    assert np.mean(held) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1500)


@pytest.mark.parametrize("images", [50, 400, 2000])
def test_no_loss_fails_in_at_most_one_case_of_twenty(images):
    rng = np.random.default_rng(1)
    failed = [
        drop_limits(int(lost), int(won), images).answer(0.0) == "fails"
        for lost, won in drops(rng, images, 0.05, 0.0, 1500)
    ]
    assert np.mean(failed) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1500)


@pytest.mark.parametrize(("lost", "won", "images"), [(1, 1, 50), (4, 4, 400), (0, 0, 30)])
def test_the_images_that_are_named_settle_a_drop(lost, won, images):
    needed = images_for_drop(lost, won, images, 0.01)
    assert images < needed < 20_000
    rng = np.random.default_rng(2)
    changed = (lost + won) / images

    def settled(n):
        found = [
            drop_limits(int(a), int(b), n).answer(0.01) == "holds"
            for a, b in drops(rng, n, changed, 0.0, 600)
        ]
        return np.mean(found)

    assert settled(needed) >= 0.8 - 3 * math.sqrt(0.16 / 600)
    if changed:
        assert settled(int(0.8 * needed)) < settled(int(1.3 * needed))


@pytest.mark.parametrize(("count", "images", "allowed"), [(1, 50, 0.05), (30, 100, 0.2)])
def test_the_images_that_are_named_settle_a_share_either_way(count, images, allowed):
    needed = images_for_share(count, images, allowed)
    assert needed is not None
    rng = np.random.default_rng(3)
    drawn = rng.binomial(needed, count / images, size=1000)
    wanted = "holds" if count / images <= allowed else "fails"
    settled = np.mean([share_limits(int(c), needed).answer(allowed) == wanted for c in drawn])
    assert 0.75 <= settled <= 0.95


def test_a_share_at_its_limit_is_never_settled():
    assert images_for_share(5, 100, 0.05) is None


def test_a_percentiles_limits_keep_their_level():
    """Of 400 samples of an exponential whose 90th percentile is known: each limit misses in at
    most 5 %.
    """
    rng = np.random.default_rng(0)
    truth = math.log(10)
    missed = [0, 0]
    for _ in range(400):
        low, high = percentile_limits(rng.exponential(size=200), 90.0)
        missed[0] += not low <= truth
        missed[1] += not truth <= high
    assert max(missed) <= 400 * 0.05 + 2 * math.sqrt(400 * 0.05 * 0.95)


def test_too_few_values_have_no_limit():
    assert percentile_limits(np.arange(10.0), 90.0)[1] is None
    assert percentile_limits(np.arange(29.0), 90.0)[1] == 28.0  # .9 ** 29 < .05
    assert percentile_limits(np.arange(28.0), 90.0)[1] is None
    assert percentile_limits(np.arange(10.0), 99.0)[0] is not None


def test_a_harmonic_means_limits_cover():
    rng = np.random.default_rng(1)
    truth = 2 * 0.9 * 0.4 / 1.3
    missed = [0, 0]
    for _ in range(300):
        right = rng.binomial((60, 80), (0.9, 0.4))
        low, high = harmonic_mean_limits((int(right[0]), 60), (int(right[1]), 80))
        missed[0] += not low <= truth
        missed[1] += not truth <= high
    assert max(missed) <= 15
    assert harmonic_mean_limits((0, 0), (3, 5)) == (
        0.0,
        pytest.approx(2 * 1.0 * high_of(3, 5) / (1 + high_of(3, 5))),
    )


def high_of(count, images):
    return share_limits(count, images, 0.975).high


@pytest.mark.parametrize(("lost", "won"), [(0, 1), (1, 1), (2, 9), (9, 2), (40, 61), (300, 240)])
def test_mcnemars_test_is_the_sign_test_of_the_changed_images(lost, won):
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail / 2**n))
    assert mcnemar(lost, won) == mcnemar(won, lost)


def test_no_changed_image_shows_no_change():
    assert mcnemar(0, 0) == 1.0
