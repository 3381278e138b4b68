"""Two reports are paired on the images that both have judged, and say why where they cannot be."""

import numpy as np
import pytest
from msgspec.structs import replace

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.intervals import drop_limits, mcnemar
from edgeclip.device.per_class import Answered
from edgeclip.errors import EdgeclipError
from edgeclip.reports import answers, history
from edgeclip.reports.answers import KEPT, MOST, NONE_NOW, NOT_KEPT
from edgeclip.reports.earlier import sentence
from edgeclip.reports.store import path, refuse_unfit, write
from tests.support.finished_run import make_run
from tests.support.reports import parity_report

LABELS = ["cat", "dog", "<b>owl</b>"]


def unseen(names, wrong=(), labels=None):
    """Images that are known by these names; the answers at `wrong` are wrong."""
    n = len(names)
    labels = np.zeros(n, int) if labels is None else np.array(labels)
    after = labels.copy()
    after[list(wrong)] += 1
    scores = np.full(n, 0.5)
    digests = [f"{name:016x}" for name in names]
    return Answered(np.arange(n), labels, labels, after, scores, scores, digests=digests)


def kept(names, wrong=(), labels=None, of=LABELS, **changes):
    report = parity_report(bundle=changes.pop("bundle", "b"))
    made = answers.of(report, unseen(names, wrong, labels), of, "2026-01-01T00:00:00+00:00")
    return replace(made, **changes)


def test_the_difference_is_that_of_the_images_of_both():
    then = kept(range(100), wrong=range(20))  # 0..19 wrong
    now = kept(range(10, 150), wrong=[*range(5), *range(90, 95)])  # 10..14 and 100..104 wrong
    found = answers.paired(then, now)
    assert (found.images, found.judged_then, found.judged_now) == (90, 100, 140)
    assert (found.lost, found.won) == (0, 5)  # 15..19 were wrong and are right
    assert (found.top1_then, found.top1_now) == (pytest.approx(80 / 90), pytest.approx(85 / 90))
    limits = drop_limits(0, 5, 90)
    assert (found.lower_pp, found.upper_pp) == (100 * limits.low, 100 * limits.high)
    assert found.drop_pp == pytest.approx(-100 * 5 / 90) and found.p == mcnemar(0, 5)
    assert found.why is None and found.bundle == "b"


def test_the_other_way_round_what_was_won_is_lost():
    rng = np.random.default_rng(0)
    first, second = (kept(range(200), np.flatnonzero(rng.random(200) < 0.3)) for _ in range(2))
    there, back = answers.paired(first, second), answers.paired(second, first)
    assert (there.lost, there.won) == (back.won, back.lost)
    assert there.drop_pp == -back.drop_pp and there.p == back.p
    assert there.lower_pp == pytest.approx(-back.upper_pp)


def test_the_order_of_the_images_does_not_matter():
    rng = np.random.default_rng(1)
    order = rng.permutation(50)
    then = kept(range(50), wrong=[3, 4])
    now = kept(order, wrong=np.flatnonzero(np.isin(order, [4, 5, 6])))
    found = answers.paired(then, now)
    assert (found.lost, found.won, found.images) == (2, 1, 50)


def test_an_image_whose_label_was_changed_takes_no_part():
    then = kept(range(4), labels=[0, 0, 0, 0])
    now = kept(range(4), labels=[0, 1, 0, 0], wrong=[0])
    found = answers.paired(then, now)
    assert (found.images, found.relabeled, found.lost, found.won) == (3, 1, 1, 0)
    assert "1 left out since their label was changed" in sentence(found)


@pytest.mark.parametrize(
    ("then", "says"),
    [
        (kept(range(9), of=["cat", "dog"]), "its class list is another"),
        (kept(range(100, 109)), "no image was judged by both"),
        (kept(range(9), labels=[1] * 9), "no image was judged by both"),
    ],
)
def test_what_cannot_be_compared_says_why(then, says):
    found = answers.paired(then, kept(range(9)))
    assert says in found.why and found.p is None and found.drop_pp is None
    assert f"not comparable: {found.why}" in sentence(found)


def test_copies_of_an_image_count_once():
    assert kept([5, 5, 6]).images == ["0000000000000005", "0000000000000006"]
    assert answers.of(parity_report(), unseen([]), LABELS, "") is None


def test_of_too_many_images_the_same_ones_are_kept_each_time(monkeypatch):
    monkeypatch.setattr(answers, "MOST", 10)
    first, second = kept(range(100)), kept(range(99, -1, -1))
    assert first.images == second.images and len(first.images) == 10 and first.judged == 100
    assert answers.paired(first, second).images == 10
    assert MOST == 50_000


def test_so_many_reports_are_kept_and_a_repetition_takes_the_place_of_its_own(tmp_path):
    file = tmp_path / "t.answers.json"
    for i in range(KEPT + 2):
        answers.remember(file, kept(range(9), bundle=f"{i}"))
    assert [e.bundle for e in answers.read(file)] == [f"{i}" for i in range(2, KEPT + 2)]
    answers.remember(file, kept(range(9), wrong=[1], bundle="3"))
    assert [e.bundle for e in answers.read(file)] == ["2", "4", "5", "3"]
    answers.remember(file, kept(range(3), bundle="4"))  # a quick look
    assert [e.judged for e in answers.read(file)] == [9] * KEPT
    answers.remember(file, None)
    assert len(answers.read(file)) == KEPT


def test_a_repetition_is_compared_with_the_report_of_another_bundle(tmp_path):
    file = tmp_path / "t.answers.json"
    assert answers.earlier(file, parity_report(), kept(range(9)), []) is None
    answers.remember(file, kept(range(9), wrong=[0], bundle="old"))
    answers.remember(file, kept(range(9), bundle="b"))
    found = answers.earlier(file, parity_report(), kept(range(9)), [])
    assert (found.bundle, found.won) == ("old", 1)
    # An update of the board is another state of the same bundle.
    updated = kept(range(9), system="a newer os")
    assert answers.earlier(file, parity_report(), updated, []).bundle == "b"


@pytest.mark.parametrize(
    ("kind", "verb"),
    [
        ("history", "validate"),
        ("answers", "validate"),
        ("engines", "validate"),
        ("parity", "validate"),
        ("parity", "bench"),
        ("bench", "bench"),
    ],
)
@pytest.mark.parametrize("damage", [lambda s: s[: len(s) // 2], lambda s: s.replace("1", "2")])
def test_a_damaged_past_is_refused_before_anything_is_measured(
    own_bundle, tmp_path, kind, verb, damage
):
    bundle = Bundle.load(own_bundle("onnx-fp32"))
    file = path(tmp_path, bundle, "host-cpu", kind)
    disk.write_sealed(file, {"entries": [1, 11]})
    file.write_text(damage(file.read_text()))
    with pytest.raises(EdgeclipError, match="remove it: what it tells") as e:
        refuse_unfit(tmp_path, [bundle], "host-cpu", verb)
    assert e.value.where == file


@pytest.mark.parametrize(
    "change",
    [
        {"answers": [0]},
        {"images": ["0" * 16] * 9},
        {"labels": []},
    ],
)
def test_answers_that_do_not_fit_their_images_are_refused(tmp_path, change):
    file = tmp_path / "t.answers.json"
    answers.remember(file, replace(kept(range(9)), **change))
    with pytest.raises(EdgeclipError, match="has not as many answers as images"):
        answers.read(file)


def test_a_report_is_paired_with_the_one_before_it(own_bundle, tmp_path):
    bundle = Bundle.load(own_bundle("onnx-fp32"))
    digest = disk.sha256(bundle.folder / disk.MANIFEST)
    report = parity_report(bundle=digest)
    old = replace(report, bundle="0" * 64)
    # As an older edgeclip left it: in the history, without answers.
    history.remember(path(tmp_path, bundle, "host-cpu", "history"), old, "2025-01-01T00:00:00")
    first = write(old, "host-cpu", tmp_path, bundle, unseen(range(40), wrong=[0]))
    assert (first.earlier.when, first.earlier.why) == ("2025-01-01T00:00:00", NOT_KEPT)
    second = write(report, "host-cpu", tmp_path, bundle, unseen(range(40), wrong=[1, 2]))
    assert (second.earlier.lost, second.earlier.won, second.earlier.bundle) == (2, 1, "0" * 64)
    file = path(tmp_path, bundle, "host-cpu", "parity")
    assert disk.read_json(file)["earlier"] == disk.to_json(second.earlier)
    # Foreign labels: nothing was compared.
    third = write(report, "host-cpu", tmp_path, bundle)
    assert third.earlier.why == NONE_NOW and third.earlier.bundle == "0" * 64


def test_the_first_report_has_none_before_it(own_bundle, tmp_path):
    bundle = Bundle.load(own_bundle("onnx-fp32"))
    assert write(parity_report(), "host-cpu", tmp_path, bundle, unseen([1])).earlier is None


def test_runs_are_paired_bundle_by_bundle(tmp_path):
    runs = [make_run(tmp_path / name, reports=False) for name in ("a", "b", "c")]
    digest = disk.sha256(runs[0] / "bundles" / "t" / disk.MANIFEST)
    for i, run in enumerate(runs[:2]):
        file = run / "reports" / "t.host-cpu.answers.json"
        answers.remember(file, kept(range(50), wrong=range(i), bundle=digest))
        answers.remember(file, kept(range(50), wrong=range(9), bundle="another"))
    (pair,) = answers.between(runs)
    assert pair.name == "b: t on host-cpu" and (pair.found.lost, pair.found.won) == (1, 0)


def test_a_hostile_report_of_before_is_one_line():
    found = replace(
        answers.paired(kept(range(3)), kept(range(3))),
        when="\x1b[31m\n" + "x" * 300,
    )
    assert "\x1b" not in sentence(found) and "\n" not in sentence(found)
    assert len(sentence(found)) < 500
