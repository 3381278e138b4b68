"""What is measured over all labels is what the bundle answers: one head, through the whole
chain.
"""

import json

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.images import index_tar, read
from edgeclip.device.metrics import harmonic_mean
from edgeclip.device.zero_shot import offsets
from edgeclip.host.data import shapes
from edgeclip.host.distill import calibration
from edgeclip.reports.results import read_results
from tests.support.command import mistake, run

RECIPE = """
data: {kind: webdataset, name: shapes, root: shapes, protocol: base_to_novel}
teacher:
  kind: open_clip
  model: tiny
  weights: random
  config:
    embed_dim: 32
    vision_cfg: {image_size: 32, layers: 1, width: 32, head_width: 16, patch_size: 16}
    text_cfg: {context_length: 16, vocab_size: 49408, width: 16, heads: 2, layers: 1}
views: {count: 1}
student:
  tower: {kind: timm, model: test_efficientnet, weights: random, image_size: 32}
  projector_hidden: null
losses: {cross_entropy: {}, kl: {}, edu_attention: {keep: true}}
train: {warmup_steps: 0, epochs: 2, batch_size: 32, lr: 3e-3, device: cpu, threads: 1}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shapes.write(folder / "shapes")
        (folder / "r.yaml").write_text(RECIPE)
        done = run("distill", "r.yaml", "--json")
        assert done.exit_code == 0, done.output
        assert run("export", "--run", "runs/r", "--target", "onnx-fp32").exit_code == 0
        yield folder


@pytest.fixture(scope="module")
def results(workplace):
    return read_results(workplace / "runs/r")


@pytest.fixture(scope="module")
def bundle(workplace):
    return Bundle.load(workplace / "runs/r/bundles/onnx-fp32")


def images_of(folder, name):
    """The evaluation images of one set, encoded, with their labels."""
    evaluation = disk.read_json(folder / "runs/r/evaluation/evaluation.json")
    every = index_tar(folder / "runs/r/evaluation/images.tar")
    (rows,) = (s["rows"] for s in evaluation["sets"] if s["name"] == name)
    names = evaluation["class_names"]
    return [(read(every[i]), names[evaluation["labels"][i]]) for i in rows]


@pytest.mark.parametrize("name", ["base", "novel"])
@pytest.mark.parametrize("offset", [True, False])
def test_classify_is_right_as_often_as_the_table_says(workplace, results, bundle, name, offset):
    (row,) = (s for s in results.sets if s.name == name)
    scored = row.student if offset else row.student_without_offset
    images = images_of(workplace, name)
    ranked = [bundle.classify(image, top=5, offset=offset) for image, _ in images]
    truth = [label for _, label in images]
    first = [one[0]["label"] == label for one, label in zip(ranked, truth, strict=True)]
    among = [label in [r["label"] for r in one] for one, label in zip(ranked, truth, strict=True)]
    assert row.labels == len(bundle.labels)
    assert scored.top1 == pytest.approx(np.mean(first))
    assert scored.top5 == pytest.approx(np.mean(among))


def test_the_offset_that_was_fitted_ships(results, bundle):
    record = bundle.manifest.class_offset
    assert record == results.class_offset and record.rule in ("midway", "labeled images")
    assert record.labels == bundle.labels[: len(bundle.labels) // 2]
    assert results.teachers_class_offset is not None
    assert results.teachers_class_offset.labels == record.labels


def test_classes_without_labels_are_named_more_often_with_it(results):
    record = results.class_offset
    assert record.labeled_named <= record.labeled_named_without
    assert record.others_named >= record.others_named_without


def test_the_harmonic_mean_is_of_the_shipped_answers(results):
    base, novel = results.sets
    assert results.halves == ("base", "novel")
    expected = harmonic_mean(base.student.top1, novel.student.top1)
    assert results.harmonic_mean.student == pytest.approx(expected)
    own = harmonic_mean(base.student.own_list_top1, novel.student.own_list_top1)
    assert results.own_list_harmonic_mean.student == pytest.approx(own)


def test_the_trade_passes_through_what_ships(results):
    base, novel = results.sets
    curve = results.trade.curve
    ahead = [p for p in curve if p.offset <= results.class_offset.offset]
    assert ahead and ahead[-1].labeled >= base.student.top1 - 0.05
    assert 0.0 <= results.trade.area <= 1.0
    assert curve[0].unlabeled == 0.0 and curve[-1].labeled == 0.0
    assert novel.student.top1 <= max(p.unlabeled for p in curve) + 0.05


def test_validate_judges_the_shipped_answers(workplace, results):
    done = run("validate", "--bundle", "runs/r/bundles/onnx-fp32", "--json")
    (report,) = json.loads(done.stdout)
    for row in results.sets:
        (found,) = (s for s in report["sets"] if s["name"] == row.name)
        assert found["bundle_top1"] == pytest.approx(row.student.top1, abs=0.02)
        assert found["bundle_own_list_top1"] == pytest.approx(row.student.own_list_top1, abs=0.02)


def test_a_relabeled_bundle_says_which_labels_keep_their_offset(workplace, bundle):
    kept = bundle.manifest.class_offset.labels[0]
    (workplace / "words.txt").write_text(f"{kept}\na word of mine\n")
    command = ("labels", "runs/r/bundles/onnx-fp32", "words.txt", "--out")
    done = run(*command, "relabeled")
    assert "2 labels, 1 of which keep the class offset" in done.output
    other = Bundle.load(workplace / "relabeled")
    offset = bundle.manifest.class_offset.offset
    assert offsets(other.manifest.class_offset, other.labels).tolist() == pytest.approx([offset, 0])
    done = run(*command, "plain", "--no-offset")
    assert done.exit_code == 0
    assert Bundle.load(workplace / "plain").manifest.class_offset is None


def test_the_report_draws_the_trade_and_says_the_offset(workplace, results):
    assert run("report", "runs/r").exit_code in (0, 3)
    page = (workplace / "runs/r/report.html").read_text()
    assert f"Class offset: {results.class_offset.offset:.4f}" in page
    assert f"(AUSUC): {results.trade.area:.3f}" in page
    assert "What an offset gives to classes without labels" in page
    assert "student without class offset" in page and "top-1 in own list" in page


def test_words_of_one_side_alone_are_ranked_as_without_an_offset(workplace, bundle):
    (image, _), *_ = images_of(workplace, "base")
    words = bundle.manifest.class_offset.labels[:3]
    ranked = bundle.classify(image, words)
    plain = bundle.classify(image, words, offset=False)
    assert [r["label"] for r in ranked] == [r["label"] for r in plain]
    for one, other in zip(ranked, plain, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)


def test_captions_that_name_a_novel_class_are_refused(workplace):
    losses = "losses: {cross_entropy: {}, kl: {}, edu_attention: {keep: true}}"
    telling = RECIPE.replace(losses, "losses: {kl: {}, contrastive: {}}")
    (workplace / "telling.yaml").write_text(telling)
    mistake("distill", "telling.yaml", says="name the class that is to be novel", only_line=False)
    assert not (workplace / "runs/telling").exists()
    told = telling.replace("contrastive: {}", "contrastive: {}, captions: classes")
    (workplace / "told.yaml").write_text(told)
    assert run("distill", "told.yaml").exit_code == 0


def test_too_few_labels_to_meet_one_leave_the_offset_out(workplace, monkeypatch):
    """Where hardly an image has a label, the sample that is looked at may hold none."""
    monkeypatch.setattr(calibration, "IMAGES", 1)
    (workplace / "few.yaml").write_text(RECIPE)
    done = run("distill", "few.yaml")
    assert done.exit_code == 0 and "class offset: left out" in done.stderr
    assert read_results(workplace / "runs/few").class_offset is None


def test_it_can_be_switched_off_in_the_recipe(workplace):
    (workplace / "off.yaml").write_text(RECIPE + "calibration: null\n")
    assert run("distill", "off.yaml").exit_code == 0
    found = read_results(workplace / "runs/off")
    assert found.class_offset is None and found.teachers_class_offset is None
    assert all(s.student_without_offset is None for s in found.sets)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("calibration: null\n", ""), "losses.kl.offset: needs the offset of calibration"),
        (("", ", protocol: base_to_novel"), "losses.kl.offset: there is no class to set back"),
    ],
)
def test_a_target_that_nothing_sets_back_is_refused(workplace, change, says):
    end, gone = change
    asked = RECIPE.replace("kl: {}", "kl: {offset: true}").replace(gone, "") + end
    (workplace / "refused.yaml").write_text(asked)
    mistake("distill", "refused.yaml", says=says, only_line=False)


def test_a_target_that_is_set_back_teaches_another_student(workplace, results):
    asked = RECIPE.replace("kl: {}", "kl: {offset: true}")
    (workplace / "target.yaml").write_text(asked)
    assert run("distill", "target.yaml").exit_code == 0
    found = read_results(workplace / "runs/target")
    assert found.class_offset.offset != results.class_offset.offset
    assert found.teachers_class_offset == results.teachers_class_offset
