"""validate passes what is the same model, and names everything that is not."""

import shutil
import tarfile

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.device import rules
from edgeclip.device.bundle import Bundle, bake_labels
from edgeclip.device.evaluation import load_evaluation
from edgeclip.device.validate import validate
from edgeclip.errors import EdgeclipError
from tests.support.damage import damage, resign
from tests.support.images import add_member, encoded, toy_image
from tests.support.optional import require
from tests.support.reports import MACHINE
from tests.support.toy_bundle import LABELS, write_evaluation

TOLERANCES = (
    "images below a centered cosine",
    "images with another first answer",
    "accuracy lost on unseen images",
)


def report(folder, evaluation):
    return validate(
        Bundle.load(folder), load_evaluation(evaluation) if evaluation else None, MACHINE
    )


def test_a_float_bundle_passes_against_its_own_student(shipped_bundle, evaluation):
    r = report(shipped_bundle("onnx-fp32"), evaluation)
    assert (r.verdict, r.failures, r.images) == ("holds", [], 600)
    assert r.cosine.centered_min > 0.9999
    assert r.top1_agreement == 1.0
    assert r.accuracy.drop_pp == 0
    assert r.accuracy.reference_top1 == r.accuracy.bundle_top1 == pytest.approx(0.8)
    assert r.golden.largest_pixel_difference == 0
    assert r.golden.cosine_min > 0.9999
    assert r.golden.text_cosine_min > 0.9999
    assert r.optimization.top1_agreement == 1.0 and r.ran.runtime == "onnxruntime"
    assert r.bundle == disk.sha256(shipped_bundle("onnx-fp32") / disk.MANIFEST)


def test_agreement_where_right_is_what_is_left_of_the_right_answers(own_bundle, evaluation):
    folder = own_bundle("onnx-fp32")
    r = report(damage(folder, 0.05), evaluation)
    a, right = r.accuracy, 480  # of 600: every fifth label is wrong
    assert (
        r.agreement_where_right == pytest.approx(1 - a.lost / right)
        and 0.9 < r.agreement_where_right < 1
    )
    (rule,) = (x for x in r.rules if x.rule == rules.RIGHT_CHANGED)
    assert rule.images == right and rule.found == pytest.approx(100 * a.lost / right)
    without = {
        k: v
        for k, v in disk.read_manifest(folder, "bundle")["target"]["tolerance"].items()
        if k != "agreement_where_right"
    }
    resign(folder, target={**disk.read_manifest(folder, "bundle")["target"], "tolerance": without})
    asked = [rule.rule for rule in report(folder, evaluation).rules]
    assert rules.RIGHT_CHANGED not in asked


@pytest.mark.parametrize("name", ["onnx-int8", "openvino-int8"])
def test_an_int8_bundle_is_measured_not_taken_for_the_student(shipped_bundle, evaluation, name):
    r = report(shipped_bundle(name), evaluation)
    assert r.failures == [rules.line(rule) for rule in r.rules if rule.answer == "fails"]
    assert (0.85 if name == "openvino-int8" else 0.95) < r.cosine.centered_p5 < 0.99999
    assert r.cosine.raw_p1 >= r.cosine.centered_p1
    assert (r.optimization is None) == (name == "openvino-int8")


def test_moderate_damage_lists_each_failed_tolerance(own_bundle, evaluation):
    folder = own_bundle("onnx-fp32")
    resign(folder, target=disk.read_manifest(folder, "bundle")["target"])
    r = report(damage(folder, 0.12), evaluation)
    assert r.golden.cosine_min >= 0.9, "meant to be too little to see on the golden images"
    assert r.verdict == "fails" and {
        t for t in TOLERANCES for f in r.failures if f.startswith(t)
    } == set(TOLERANCES)


def test_shuffled_weights_list_each_failed_tolerance(own_bundle, evaluation):
    r = report(damage(own_bundle("onnx-fp32"), 5.0), evaluation)
    assert r.verdict == "fails" and any(f.startswith("golden images: cosine") for f in r.failures)
    assert {t for t in TOLERANCES for f in r.failures if f.startswith(t)} == set(TOLERANCES)


def test_another_resize_is_seen_on_the_golden_pixels(own_bundle, evaluation):
    folder = own_bundle("onnx-fp32")
    resign(
        folder,
        preprocess=disk.read_manifest(folder, "bundle")["preprocess"]
        | {"interpolation": "bilinear"},
    )
    r = report(folder, evaluation)
    assert r.verdict == "fails" and any(
        f.startswith("preprocess: golden images differ") for f in r.failures
    )


def test_another_normalization_fails(own_bundle, evaluation):
    folder = own_bundle("onnx-fp32")
    resign(
        folder,
        preprocess=disk.read_manifest(folder, "bundle")["preprocess"]
        | {"mean": [0.1, 0.2, 0.9], "std": [1.0, 0.5, 0.1]},
    )
    r = report(folder, evaluation)
    assert r.verdict == "fails" and {
        t for t in TOLERANCES for f in r.failures if f.startswith(t)
    } == set(TOLERANCES)


def test_another_interface_is_named(own_bundle, evaluation):
    onnx = require("onnx", "pip install 'edgeclip[train]'")
    folder = own_bundle("onnx-fp32")
    model = onnx.load(folder / "image_encoder.onnx")
    for node in model.graph.node:
        node.output[:] = ["features" if o == "image_features" else o for o in node.output]
    model.graph.output[0].name = "features"
    onnx.save(model, folder / "image_encoder.onnx")
    resign(folder)
    assert any(
        "interface" in f and "image_features" in f for f in report(folder, evaluation).failures
    )


def rule_of(r, name):
    (rule,) = (rule for rule in r.rules if rule.rule == name)
    return rule


def test_few_images_cannot_tell_and_say_how_many_would(own_bundle, source, tmp_path):
    few = write_evaluation(tmp_path / "evaluation", source, 20)
    r = report(damage(own_bundle("onnx-fp32"), 0.001), few)
    assert r.failures == [] and r.verdict == "cannot tell"
    rule = rule_of(r, rules.LOST)
    assert rule.answer == "cannot tell" and rule.found <= rule.allowed < rule.high
    assert rule.needed > 20
    assert f"about {rule.needed:,} images would tell" in rules.line(rule)


def test_few_images_hold_by_proof_where_no_answer_can_change(shipped_bundle, source, tmp_path):
    few = write_evaluation(tmp_path / "evaluation", source, 20)
    r = report(shipped_bundle("onnx-fp32"), few)
    rule = rule_of(r, rules.LOST)
    assert rule.answer == "holds" and rule.why.startswith("no answer can change")
    assert r.verdict == "holds"


def with_roles(folder, *roles):
    """The evaluation images in as many sets of equal size, of these roles."""
    description = disk.read_json(folder / "evaluation.json")
    (whole,) = description["sets"]
    parts = np.array_split(whole["rows"], len(roles))
    sets = []
    for i, (role, rows) in enumerate(zip(roles, parts, strict=True)):
        sets.append(whole | {"name": f"set {i}", "role": role, "rows": rows.tolist()})
    disk.write_json(folder / "evaluation.json", description | {"sets": sets})
    disk.write_manifest(folder, "evaluation", {"license": "made up", "images": len(whole["rows"])})
    return folder


def test_accuracy_is_asked_of_images_that_training_never_saw(own_bundle, evaluation, tmp_path):
    folder = shutil.copytree(evaluation, tmp_path / "evaluation")
    with_roles(folder, "trained with names", "unseen", "seen without names", "unseen")
    r = report(damage(own_bundle("onnx-fp32"), 0.05), folder)
    assert rule_of(r, rules.LOST).images == 300 and r.accuracy.images == 300
    assert rule_of(r, rules.CHANGED).images == 600
    assert [s.role for s in r.sets][:2] == ["trained with names", "unseen"]
    unseen = [s for s in r.sets if s.role == "unseen"]
    assert r.accuracy.lost == sum(s.lost for s in unseen)


def test_without_an_unseen_image_accuracy_cannot_be_told(own_bundle, evaluation, tmp_path):
    folder = shutil.copytree(evaluation, tmp_path / "evaluation")
    with_roles(folder, "trained with names", "seen without names")
    r = report(damage(own_bundle("onnx-fp32"), 0.02), folder)
    rule = rule_of(r, rules.LOST)
    assert rule.answer == "cannot tell" and rule.why == rules.NOTHING_UNSEEN
    assert (rule.found, rule.images, r.accuracy) == (None, 0, None)
    assert r.verdict in ("cannot tell", "fails")


def test_without_an_evaluation_folder_only_the_golden_images_speak(shipped_bundle):
    r = report(shipped_bundle("onnx-fp32"), None)
    assert r.verdict == "cannot tell"
    assert r.images == 0
    assert r.accuracy is None
    assert r.failures == []


@pytest.mark.parametrize("labels", [["apple", "cat"], LABELS[::-1]])
@pytest.mark.parametrize("old", [False, True])
def test_other_labels_are_not_judged_by_the_runs_numbers(
    own_bundle, evaluation, tmp_path, labels, old
):
    if old:  # a run from before class names were kept
        evaluation = shutil.copytree(evaluation, tmp_path / "evaluation")
        disk.write_json(
            evaluation / "evaluation.json",
            {
                k: v
                for k, v in disk.read_json(evaluation / "evaluation.json").items()
                if k != "class_names"
            },
        )
        disk.write_manifest(evaluation, "evaluation", {"license": "", "images": 600})
        assert report(own_bundle("onnx-fp32"), evaluation).verdict == "holds"
        shutil.rmtree(tmp_path / "bundle")
    folder = own_bundle("onnx-fp32")
    r = report(bake_labels(folder, labels, folder), evaluation)
    assert (r.verdict, r.images, r.accuracy, r.failures) == (
        "cannot tell",
        0,
        None,
        [],
    )
    assert r.not_compared == "its labels are not the run's classes"


def test_a_set_is_scored_over_all_labels_and_within_its_own_list(
    shipped_bundle, source, evaluation, tmp_path
):
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluation, folder)
    description = disk.read_json(folder / "evaluation.json")
    labels = description["labels"]
    parts = {"low": [0, 1, 2], "high": [3, 4, 5]}
    description["sets"] = [
        {"name": n, "note": "", "classes": c, "rows": [i for i, y in enumerate(labels) if y in c]}
        for n, c in parts.items()
    ]
    disk.write_json(folder / "evaluation.json", description)
    disk.write_manifest(folder, "evaluation", {"license": "", "images": 600})
    r = report(shipped_bundle("onnx-fp32"), folder)
    features = np.load(folder / "image_features.npy")
    from edgeclip.device.metrics import hits
    from edgeclip.device.zero_shot import class_scores

    for row, (name, classes) in zip(r.sets, parts.items(), strict=True):
        rows = [i for i, y in enumerate(labels) if y in classes]
        own = class_scores(features[rows], source.class_features[classes], source.head)
        own_labels = np.array([classes.index(labels[i]) for i in rows])
        every = class_scores(features[rows], source.class_features, source.head)
        every_label = np.array([labels[i] for i in rows])
        assert row.name == name
        assert row.classes == 3
        assert row.reference_top1 == pytest.approx(hits(every, every_label).mean())
        assert row.reference_own_list_top1 == pytest.approx(hits(own, own_labels).mean())
        assert row.bundle_own_list_top1 == pytest.approx(row.reference_own_list_top1, abs=0.02)
        assert row.images == len(rows)


def test_a_changed_evaluation_image_is_refused(evaluation, tmp_path):
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluation, folder)
    content = bytearray((folder / "images.tar").read_bytes())
    content[700] ^= 1
    (folder / "images.tar").write_bytes(content)
    with pytest.raises(EdgeclipError, match=r"images\.tar was changed"):
        load_evaluation(folder)


def test_one_unreadable_image_of_the_runs_own_is_told_as_one(shipped_bundle, source, tmp_path):
    folder = write_evaluation(tmp_path / "evaluation", source, 20)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i in range(20):
            add_member(tar, f"{i:06d}.png", b"no image" if i == 7 else encoded(toy_image(i)))
    disk.write_manifest(folder, "evaluation", {"license": "", "images": 20})
    with pytest.raises(EdgeclipError, match=r"1 of 20 images are unreadable .*000007"):
        report(shipped_bundle("onnx-fp32"), folder)


def test_pixels_of_the_toy_are_read_as_they_were_made(shipped_bundle):
    assert (
        Bundle.load(shipped_bundle("onnx-fp32")).pixels(toy_image(0, 32, 32))
        == np.asarray(toy_image(0, 32, 32))
    ).all()
