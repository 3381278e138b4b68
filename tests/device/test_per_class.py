"""Floors ask the bundle itself, and classes and changed images are told as they are."""

import numpy as np
import pytest

from edgeclip.device.per_class import (
    FEW,
    LISTED,
    SHOWN,
    WRONG,
    WRONG_IN_CLASS,
    Answered,
    changed,
    floors,
    per_class,
    shown,
)
from edgeclip.device.target import Floor

NAMES = ["cat", "dog", "<b>bird</b>", "x" * 300]


def answered(counts, wrong_before=(), wrong_after=()):
    """So many images of each class; wrong answers name the next class, the first ones of a class
    are wrong.
    """
    labels = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(n) for n in counts])

    def answers(wrong):
        few = np.zeros(len(counts), int)
        few[: len(wrong)] = wrong
        return np.where(within < few[labels], (labels + 1) % len(NAMES), labels)

    scores = np.linspace(0.1, 0.9, len(labels))
    return Answered(
        np.arange(len(labels)), labels, answers(wrong_before), answers(wrong_after), scores, scores
    )


def test_a_floor_holds_fails_or_cannot_be_told():
    images = answered([1000], wrong_after=[200])
    for floor, answer in ((0.7, "holds"), (0.8, "cannot tell"), (0.9, "fails")):
        (rule,) = floors(Floor(top1=floor), images, NAMES)
        assert (rule.rule, rule.answer, rule.images) == (WRONG, answer, 1000)
        assert rule.found == pytest.approx(20.0)
    assert floors(Floor(), images, NAMES) == []


def test_a_class_that_fails_is_not_hidden_by_the_others():
    images = answered([2000, 100], wrong_after=[0, 60])
    floor = Floor(top1=0.9, worst_class_top1=0.8)
    whole, worst = floors(floor, images, NAMES)
    assert whole.answer == "holds"
    assert worst.rule == f"{WRONG_IN_CLASS}: dog" and worst.answer == "fails"


def test_each_class_is_asked_at_a_level_that_all_keep():
    (alone,) = floors(Floor(worst_class_top1=0.5), answered([100], wrong_after=[20]), NAMES)
    (beside,) = floors(
        Floor(worst_class_top1=0.5), answered([100] * 3, wrong_after=[20] * 3), NAMES
    )
    assert beside.high > alone.high


def test_without_an_image_a_floor_cannot_be_told():
    nothing = answered([0])
    for rule in floors(Floor(top1=0.5, worst_class_top1=0.5), nothing, NAMES):
        assert rule.answer == "cannot tell" and rule.found is None
    assert per_class(nothing, NAMES) == ([], 0)
    assert changed(nothing, NAMES) == []


def test_classes_of_few_images_are_counted_and_not_listed():
    images = answered([FEW, FEW - 1, FEW + 5], wrong_before=[2], wrong_after=[5, 9, 0])
    rows, few = per_class(images, NAMES)
    assert few == 1
    assert [row.name for row in rows] == ["cat", "<b>bird</b>"]  # the least right first
    cat = rows[0]
    assert (cat.lost, cat.won, cat.images) == (3, 0, FEW)
    assert cat.drop_pp == pytest.approx(10.0)
    assert cat.lower_pp < cat.drop_pp < cat.upper_pp
    assert (cat.confused_with, cat.confused) == ("dog", 5)
    assert rows[1].confused_with is None


def test_a_class_that_lost_most_is_listed_though_many_are_right_less_often():
    names = [f"class {i}" for i in range(30)]
    labels = np.repeat(np.arange(30), 40)
    within = np.tile(np.arange(40), 30)
    before = np.where((labels < 29) & (within < 20), (labels + 1) % 30, labels)
    after = np.where((labels == 29) & (within < 10), 0, before)
    rows, few = per_class(
        Answered(labels, labels, before, after, labels * 1.0, labels * 1.0), names
    )
    assert few == 0 and len(rows) <= 2 * LISTED
    assert "class 29" in [row.name for row in rows]


def test_lost_images_come_first_and_the_surest_answers_of_them():
    images = answered([100, 100], wrong_before=[0, 40], wrong_after=[60, 0])
    rows = changed(images, NAMES)
    lost = [r for r in rows if r.before == r.label]
    assert len(lost) == SHOWN and rows[:SHOWN] == lost
    assert len(rows) == 2 * SHOWN
    scores = [r.after_score for r in lost]
    assert scores == sorted(scores, reverse=True)
    assert all(r.after != r.label for r in lost)


def test_a_label_in_a_line_is_one_line():
    assert shown("a\nb\x1b[31mc") == "a b [31mc"
    assert len(shown(NAMES[3])) == 60 and shown(NAMES[3]).endswith("...")
    (rule,) = floors(Floor(worst_class_top1=0.9), answered([0, 0, 0, 50], [], [0, 0, 0, 50]), NAMES)
    assert len(rule.rule) < 100
