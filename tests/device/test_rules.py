"""Which images a question is asked of, and what its answer says."""

import numpy as np
import pytest

from edgeclip.device import rules
from edgeclip.device.rules import Part, line
from edgeclip.device.target import Tolerance

TOLERANCE = Tolerance(
    centered_cosine_p1=0.9, top1_agreement=0.9, accuracy_drop_pp=1.0, worst_set_drop_pp=3.0
)


def part(name="a", images=1000, right=800, lost=0, won=0, unseen=True):
    before = np.arange(images) < right
    after = before.copy()
    after[:lost] = False
    after[right : right + won] = True
    return Part(name, unseen, before, after)


def test_all_unseen_images_are_asked_together():
    lost, worst = rules.accuracy(TOLERANCE, [part("a", lost=4), part("b", won=2)])
    assert (lost.rule, lost.images, lost.found) == (rules.LOST, 2000, pytest.approx(0.1))
    assert lost.answer == "holds"
    assert worst.rule == f"{rules.WORST}: a"


def test_one_set_that_loses_much_fails_what_all_of_them_hide():
    parts = [part("large", images=20_000, right=16_000), part("small", images=300, lost=30)]
    lost, worst = rules.accuracy(TOLERANCE, [*parts])
    assert lost.answer == "holds"
    assert worst.rule.endswith(": small") and worst.answer == "fails"


def test_each_set_is_asked_at_a_level_that_all_of_them_keep():
    (_, one) = rules.accuracy(TOLERANCE, [part("a", lost=9, won=9), part("b")])
    (_, of_four) = rules.accuracy(TOLERANCE, [part("a", lost=9, won=9), *map(part, "bcd")])
    assert one.rule == of_four.rule
    assert of_four.high > one.high


def test_training_images_and_sets_at_their_floor_are_not_judged():
    seen, floor = part("seen", lost=300, unseen=False), part("floor", right=20, lost=20)
    assert floor.at_floor and not seen.judged
    (lost,) = rules.accuracy(TOLERANCE, [part("a"), seen, floor])
    assert (lost.images, lost.answer) == (1000, "holds")
    for parts, why in (([seen], rules.NOTHING_UNSEEN), ([floor], rules.AT_FLOOR), ([], None)):
        (lost,) = rules.accuracy(TOLERANCE, parts)
        assert lost.answer == "cannot tell" and lost.found is None and lost.needed is None
        assert why is None or lost.why == why


def test_a_cosine_that_is_not_a_number_lies_below():
    rule = rules.closeness(TOLERANCE, np.full(500, np.nan))
    assert rule.answer == "fails" and rule.found == 100.0
    assert rules.closeness(TOLERANCE, np.full(500, 0.95)).answer == "holds"
    assert rules.closeness(TOLERANCE, np.full(100, 0.95)).answer == "cannot tell"


@pytest.mark.parametrize(
    ("difference", "lead", "proven"),
    [(0.1, 0.3, True), (0.1, 0.2, False), (np.nan, 1.0, False), (0.1, np.nan, False)],
)
def test_a_proof_needs_a_lead_of_more_than_twice_the_difference(difference, lead, proven):
    (lost,) = rules.accuracy(TOLERANCE, [part(images=20, right=16)])
    leads, moved = np.full(20, 0.9), np.full(20, 1e-9)
    leads[3], moved[3] = lead, difference
    (found,) = rules.proven([lost], leads, moved, np.ones(20, bool))
    assert found.answer == ("holds" if proven else "cannot tell")
    # A tie among images that the rule is not about says nothing of it.
    (found,) = rules.proven([lost], leads, moved, np.arange(20) != 3)
    assert found.answer == "holds"
    # Nor does a large move of an image whose lead is larger.
    moved[5] = 0.4
    (found,) = rules.proven([lost], leads, moved, np.arange(20) != 3)
    assert found.answer == "holds"


def test_what_fails_is_not_proven_away():
    rule = rules.closeness(TOLERANCE, np.full(500, 0.5))
    everything = np.ones(500, bool)
    assert rules.proven([rule], np.ones(500), np.zeros(500), everything) == [rule]
    none = rules.closeness(TOLERANCE, np.zeros(0))
    assert rules.proven([none], np.zeros(0), np.zeros(0), everything[:0]) == [none]


def test_a_line_says_what_was_found_allowed_and_needed():
    (lost,) = rules.accuracy(TOLERANCE, [part(images=100, right=80, lost=1, won=1)])
    assert line(lost).startswith(f"{rules.LOST}: cannot tell, 0.00 pp (")
    assert "of 100, allowed 1; about" in line(lost)
    assert line(lost).endswith("images would tell")
