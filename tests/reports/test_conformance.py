"""The report scores by kind what differs from the reference, in levels, ids and answers."""

import json
import shutil

import numpy as np
import pytest

from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import answer, read_answers, without_padding
from edgeclip.device.records import to_json
from edgeclip.disk import read_record
from edgeclip.errors import EdgeclipError
from edgeclip.reports.conformance import By, judge, write
from edgeclip.reports.conformance_report import ConformanceReport
from tests.support.conformance import toy_pack
from tests.support.images import toy_image
from tests.support.toy_bundle import SIZE

BY = By(device="toy")


@pytest.fixture
def bundle(shipped_bundle):
    return Bundle.load(shipped_bundle("onnx-fp32"))


@pytest.fixture
def pack(bundle, tmp_path):
    return toy_pack(tmp_path / "pack", bundle)


def kinds(rows):
    return {row.kind: row for row in rows}


def test_equal_answers_hold_in_every_kind(bundle, pack):
    report = judge(bundle, pack, answer(bundle, pack), BY)
    rgb = kinds(report.images)["rgb"]
    assert (rgb.count, rgb.equal, rgb.refused, rgb.required) == (2, 2, 0, True)
    assert (rgb.largest_difference, rgb.pixels_changed, rgb.answers_changed_pp) == (0, 0, 0)
    assert kinds(report.images)["alpha"].required
    assert not kinds(report.texts)["slang"].required
    assert [row.equal for row in report.texts] == [1, 1, 1]
    assert (report.differences, report.failures, report.no_answers) == ([], [], None)


def test_a_difference_is_told_in_levels_and_in_pixels_of_uint8_and_of_float(bundle, pack):
    reference = read_answers(pack.folder / "reference", pack)
    pixels = np.clip(reference.images["rgb-0"], 0, 200)
    changed = pixels.copy()
    changed[:4, :, 1] += 40
    share = float((changed != reference.images["rgb-0"]).any(axis=2).mean())
    given = answer(bundle, pack)
    given.images["rgb-0"] = changed
    (of_bytes,) = [d for d in judge(bundle, pack, given, BY).differences]
    row = kinds(judge(bundle, pack, given, BY).images)["rgb"]
    expected = np.abs(changed.astype(int) - reference.images["rgb-0"]).max()
    assert row.largest_difference == pytest.approx(expected, abs=1e-3)
    assert row.pixels_changed == pytest.approx(share / 2)
    assert row.equal == 1

    spec = bundle.preprocess
    as_float = (changed / 255 - np.array(spec.mean)) / np.array(spec.std)
    given.images["rgb-0"] = as_float.astype(np.float32).transpose(2, 0, 1)
    report = judge(bundle, pack, given, BY)
    assert report.differences[0].what == of_bytes.what
    assert report.failures == [f"rgb: rgb-0: {of_bytes.what}"]


def test_rounding_in_float32_holds_and_is_told_and_that_of_float16_fails(bundle, pack):
    given = answer(bundle, pack)
    exact = given.images["rgb-0"]
    given.images["rgb-0"] = np.nextafter(exact, np.float32(9))
    report = judge(bundle, pack, given, BY)
    assert report.failures == []
    assert "rounding" in report.differences[0].what and kinds(report.images)["rgb"].equal == 1
    given.images["rgb-0"] = exact.astype(np.float16).astype(np.float32)
    assert judge(bundle, pack, given, BY).failures != []


def test_kinds_that_need_not_be_equal_are_listed_and_do_not_fail(bundle, pack):
    given = answer(bundle, pack)
    given.ids["slang-text"] = [2]
    report = judge(bundle, pack, given, BY)
    assert report.failures == []
    assert [d.name for d in report.differences] == ["slang-text"]


def test_what_is_not_finite_fails_in_every_kind(bundle, pack):
    given = answer(bundle, pack)
    given.images["alpha-3"][0, 0, 0] = np.nan
    report = judge(bundle, pack, given, BY)
    assert report.failures == ["alpha: alpha-3: values that are not finite"]
    row = kinds(report.images)["alpha"]
    assert (row.largest_difference, row.pixels_changed, row.answers_changed_pp) == (None, None, 100)
    assert json.loads(json.dumps(to_json(report), allow_nan=False))


def test_the_answers_that_change_are_those_of_the_bundle(bundle, pack):
    given = answer(bundle, pack)
    reference = read_answers(pack.folder / "reference", pack)
    tried = np.stack([np.asarray(toy_image(100 + i, SIZE, SIZE)) for i in range(64)])
    first = bundle.scores(bundle.encode_pixels(reference.images["rgb-0"][None])).argmax()
    alike = bundle.scores(bundle.encode_pixels(tried)).argmax(axis=1) == first
    for pixels, changed in ((tried[alike][0], 0), (tried[~alike][0], 50)):
        given.images["rgb-0"] = pixels
        row = kinds(judge(bundle, pack, given, BY).images)["rgb"]
        assert row.answers_changed_pp == changed and row.equal == 1

    for text, changed in (("cat cat", 0), ("dog", 100)):
        given.ids["plain-text"] = without_padding(bundle.token_ids([text])[0].tolist())
        row = kinds(judge(bundle, pack, given, BY).texts)["plain"]
        assert row.answers_changed_pp == changed and row.equal == 0


def test_a_refused_image_or_string_is_counted_and_named(bundle, tmp_path):
    pack = toy_pack(tmp_path / "broken", bundle, broken=True)
    report = judge(bundle, pack, answer(bundle, pack), BY)
    images, texts = kinds(report.images)["broken"], kinds(report.texts)["over-long"]
    assert images.refused == texts.refused == 1
    assert images.answers_changed_pp == texts.answers_changed_pp == 100
    assert images.largest_difference is None
    assert all("refused: " in d.what for d in report.differences) and report.failures == []


def test_an_id_beyond_the_vocabulary_is_a_mistake(bundle, pack):
    given = answer(bundle, pack)
    given.ids["plain-text"] = [10**6]
    with pytest.raises(EdgeclipError, match=r"'plain-text' has the id 1000000"):
        judge(bundle, pack, given, BY)


def test_where_no_encoder_opens_answers_are_not_measured(shipped_bundle, bundle, pack):
    other = Bundle.load(shipped_bundle("tensorrt-fp16"))
    given = answer(bundle, pack)
    given.images["rgb-0"] = np.zeros((SIZE, SIZE, 3), np.uint8)
    report = judge(other, pack, given, By(answers="there"))
    assert "cannot be opened on this machine" in report.no_answers
    assert {row.answers_changed_pp for row in [*report.images, *report.texts]} == {None}
    assert report.failures


def test_the_report_lies_with_the_run_and_is_bound_to_bundle_and_pack(shipped_bundle, tmp_path):
    folder = tmp_path / "run" / "bundles" / "mine"
    shutil.copytree(shipped_bundle("onnx-fp32"), folder)
    bundle = Bundle.load(folder)
    pack = toy_pack(tmp_path / "pack", bundle)
    for by, name in ((BY, "mine.toy"), (By(answers="x/from-cpp"), "mine.answers-from-cpp")):
        report = judge(bundle, pack, answer(bundle, pack), by)
        path = write(report, tmp_path / "run", bundle)
        assert path == tmp_path / "run" / "reports" / f"{name}.conformance.json"
        assert read_record(path, ConformanceReport) == report
        assert len({report.bundle, report.pack}) == 2 and len(report.pack) == 64
