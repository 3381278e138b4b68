"""The class offset is what its closed forms say, and knows no label of an unlabeled class."""

import msgspec
import numpy as np
import pytest

from edgeclip import config
from edgeclip.device.images import ImageRef
from edgeclip.device.zero_shot import class_scores, offsets
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.adapt.class_offset import choices, fit, midway, of_share, trade
from edgeclip.host.data import Dataset

LABELED = [0, 2]


def rows(seed: int = 0, n: int = 400):
    return np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)


@pytest.mark.parametrize("offset", [-0.7, 0.0, 0.3, 5.0])
def test_choices_answer_as_the_scores_less_the_offset(offset):
    scores = rows()
    truth = np.random.default_rng(1).integers(5, size=len(scores))
    set_back = offset * np.isin(np.arange(5), LABELED)
    expected = ((scores - set_back).argmax(axis=1) == truth).mean()
    assert choices(scores, LABELED, truth).top1(np.array([offset])) == pytest.approx(expected)


def test_the_area_is_that_of_the_curve_of_every_offset():
    truth = np.random.default_rng(4).integers(5, size=400)
    every = choices(rows(4), LABELED, truth)
    labeled = type(every)(*(field[np.isin(truth, LABELED)] for field in every))
    others = type(every)(*(field[~np.isin(truth, LABELED)] for field in every))
    found = trade(labeled, others)
    steps = np.linspace(-8, 8, 20001)
    x = labeled.top1(steps)
    y = others.top1(steps)
    area = ((y[1:] + y[:-1]) / 2 * -np.diff(x)).sum()
    assert found.area == pytest.approx(area, abs=1e-3)
    ends = found.curve[0], found.curve[-1]
    assert (ends[0].unlabeled, ends[1].labeled) == (0.0, 0.0)
    assert [p.offset for p in found.curve] == sorted(p.offset for p in found.curve)


@pytest.fixture
def parted():
    classes = ["cat", "dog", "car", "tree", "fern"]
    labeled = [ImageRef("a", "a.jpg", label=0), ImageRef("b", "b.jpg", label=2)]
    return Dataset("toy", "", classes, ("a {c}",), labeled, [], [], [], None, True)


PLAIN = R.Calibration()


def fitted(data, spec=PLAIN):
    labeled = data.labeled_classes
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(600, len(data.classes)))
    has_label = np.arange(600) < 300
    scores[:, labeled] += np.where(has_label[:, None], 3.0, 1.5)
    return fit(scores, data, has_label, spec), scores, has_label


def test_the_record_says_what_the_offset_does(parted):
    record, scores, has_label = fitted(parted)
    assert record.rule in ("midway", "labeled images") and record.images == 600
    assert record.labels == [parted.classes[c] for c in parted.labeled_classes]
    named = (scores - offsets(record, parted.classes)).argmax(axis=1)
    on_labeled = np.isin(named, parted.labeled_classes)
    assert record.labeled_named == pytest.approx(on_labeled[has_label].mean())
    assert record.others_named == pytest.approx(1 - on_labeled[~has_label].mean())
    assert record.others_named > record.others_named_without
    assert msgspec.convert(msgspec.to_builtins(record), type(record)) == record


def test_halves_of_one_spread_are_named_alike(parted):
    record, *_ = fitted(parted)
    assert record.labeled_named == pytest.approx(record.others_named, abs=0.03)
    assert record.labeled_named_without > record.others_named_without + 0.2


def test_it_is_the_smaller_of_midway_and_as_many_as_have_a_label(parted):
    _, scores, has_label = fitted(parted)
    many = np.concatenate([np.repeat(scores[has_label], 9, axis=0), scores[~has_label]])
    few = np.concatenate([scores[has_label], np.repeat(scores[~has_label], 9, axis=0)])
    for rows, count, rule in ((many, 2700, "labeled images"), (few, 300, "midway")):
        labels = np.arange(len(rows)) < count
        record = fit(rows, parted, labels, PLAIN)
        lead = choices(rows, parted.labeled_classes, np.full(len(rows), -1)).lead
        shares, half = of_share(lead, labels.mean()), midway(lead, labels)
        assert record.rule == rule
        assert record.offset == pytest.approx(min(shares, half))
        assert abs(shares - half) > 0.1


def test_between_halves_that_are_apart_it_is_in_the_middle(parted):
    scores = np.zeros((4, 5))
    scores[:2, 0] = 0.4, 0.6
    scores[2:, 1] = 0.2, 0.4
    record = fit(scores, parted, np.array([True, True, False, False]), PLAIN)
    assert record.offset == pytest.approx((0.5 - 0.3) / 2)
    assert (record.labeled_named, record.others_named) == (1.0, 1.0)


def test_scores_that_are_not_finite_have_no_offset(parted):
    scores = np.full((4, len(parted.classes)), np.nan)
    with pytest.raises(EdgeclipError, match="is not finite"):
        fit(scores, parted, np.array([True, True, False, False]), PLAIN)


def share_that_names_labeled(record, has_label):
    of_labeled = has_label.mean() * record.labeled_named
    return of_labeled + (~has_label).mean() * (1 - record.others_named)


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_a_weight_keeps_the_offset_farther_from_the_images_with_a_label(parted, weight):
    _, scores, has_label = fitted(parted)
    lead = choices(scores, parted.labeled_classes, np.full(600, -1)).lead
    labeled, others = lead[has_label].mean(), lead[~has_label].mean()
    found = midway(lead, has_label, weight)
    assert labeled - found == pytest.approx(weight * (found - others))
    offsets = [
        fit(scores, parted, has_label, R.Calibration(labeled_weight=w)).offset
        for w in (1.0, weight)
    ]
    assert (offsets[1] < offsets[0]) == (weight > 1)


@pytest.mark.parametrize(("weight", "share"), [(0.5, 1 / 3), (3.0, 0.75)])
def test_a_weight_is_a_factor_of_a_priors_odds(parted, weight, share):
    spec = R.Calibration(labeled_weight=weight, prior=0.5)
    record, _, has_label = fitted(parted, spec)
    assert share_that_names_labeled(record, has_label) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("prior", [0.3, 0.5, 0.8])
def test_a_prior_is_the_share_that_names_a_labeled_class(parted, prior):
    record, _, has_label = fitted(parted, R.Calibration(prior=prior))
    assert record.rule == "prior"
    assert share_that_names_labeled(record, has_label) == pytest.approx(prior, abs=0.01)


def test_where_images_without_a_label_may_be_of_any_class_a_class_is_as_frequent_as_another(parted):
    record, _, has_label = fitted(parted._replace(parted=False))
    expected = len(parted.labeled_classes) / len(parted.classes)
    assert record.rule == "balanced classes"
    assert share_that_names_labeled(record, has_label) == pytest.approx(expected, abs=0.01)


def test_a_label_that_is_new_is_set_back_by_nothing(parted):
    record, *_ = fitted(parted)
    words = [parted.classes[parted.labeled_classes[0]], "a word that was typed"]
    assert offsets(record, words).tolist() == pytest.approx([record.offset, 0.0])
    assert offsets(None, words) == 0.0


def test_an_offset_within_one_side_moves_no_answer(parted):
    record, *_ = fitted(parted)
    rng = np.random.default_rng(6)
    u, w = rng.normal(size=(20, 4)), rng.normal(size=(3, 4))
    labels = [parted.classes[c] for c in parted.labeled_classes[:1]] * 3
    plain = class_scores(u, w)
    set_back = class_scores(u, w, offsets=offsets(record, labels))
    assert (plain.argmax(axis=1) == set_back.argmax(axis=1)).all()


@pytest.mark.parametrize("prior", ["0", "1", "1.5", "-0.1", ".nan"])
def test_a_prior_outside_0_and_1_is_refused_in_one_line(tmp_path, prior):
    path = tmp_path / "r.yaml"
    text = "data: {kind: openmoji}\nteacher: {kind: conse, classifier: a, weights: random, image_size: 64, text: b}\n"
    text += "student: {tower: {kind: timm, model: a, weights: random, image_size: 32}}\nlosses: {kl: {}}\n"
    path.write_text(text + f"calibration: {{prior: {prior}}}\n")
    with pytest.raises(EdgeclipError, match=r"calibration\.prior") as e:
        config.load(path, R.Recipe)
    assert "\n" not in str(e.value)
