"""The whole chain through the command line, on recipes/smoke.yaml: real parts at tiny size."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgeclip import disk
from edgeclip.cli import main
from edgeclip.device.bundle import Bundle
from edgeclip.host.data import shapes
from tests.support.damage import shuffle
from tests.support.files import REPO


def call(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(args), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def small_targets(folder: Path) -> None:
    """The shipped int8 targets for a set of 192 images and a tower too small for int8 to pay: a
    working folder may bring its own.
    """
    folder.mkdir()
    for name in ("onnx-int8", "openvino-int8", "tensorrt-int8"):
        text = (REPO / "export" / f"{name}.yaml").read_text()
        text = (
            text.replace("images: 256", "images: 96")
            .replace("judged_on: 256", "judged_on: 64")
            .replace("[minmax, mean]", "[minmax]")
        )
        (folder / f"{name}.yaml").write_text(
            text.replace("methods:", "min_speedup: 0\n  min_int8_share: 0.3\n  methods:")
        )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("smoke")
    shapes.write(folder / ".data" / "shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_targets(folder / "export")
        results = json.loads(call("distill", str(REPO / "recipes" / "smoke.yaml"), "--json"))
        call(
            "export", "--target", "onnx-fp32", "--target", "onnx-int8", "--target", "openvino-int8"
        )
        yield folder, results


def test_every_set_is_scored_for_teacher_and_student_with_its_chance_level(workplace):
    _, results = workplace
    (row,) = results["sets"]
    assert row["images"] == shapes.PARTS["test"] and row["classes"] == len(shapes.CLASSES)
    assert row["chance_top1"] == pytest.approx(1 / 12)
    assert {"top1", "top5", "own_list_top1", "own_list_top5"} <= row["teacher"].keys() & row[
        "student"
    ].keys()


def test_the_log_has_every_loss_of_the_recipe_and_alpha(workplace):
    _, results = workplace
    assert [r["epoch"] for r in results["log"]] == [0, 1, 2]
    assert {"kl", "if_align", "feature", "affinity", "alpha"} <= results["log"][-1].keys()
    assert results["log"][-1]["loss"] < results["log"][0]["loss"]


def test_the_same_line_again_resumes_and_a_changed_recipe_is_refused(workplace):
    folder, results = workplace
    before = (folder / "runs/smoke/student/student.safetensors").stat().st_mtime_ns
    assert json.loads(call("distill", str(REPO / "recipes" / "smoke.yaml"), "--json")) == results
    assert (folder / "runs/smoke/student/student.safetensors").stat().st_mtime_ns == before
    other = folder / "other.yaml"
    other.write_text(
        (REPO / "recipes" / "smoke.yaml").read_text().replace("epochs: 2", "epochs: 3")
    )
    result = CliRunner().invoke(main, ["distill", str(other), "--out", "runs/smoke"])
    assert result.exit_code == 1 and "train.epochs was 2, now 3" in result.stderr


def test_the_float_bundle_is_the_student(workplace):
    (report,) = json.loads(call("validate", "--bundle", "runs/smoke/bundles/onnx-fp32", "--json"))
    assert report["verdict"] == "holds" and report["images"] == shapes.PARTS["test"]
    assert report["cosine"]["centered_min"] > 0.9999 and report["top1_agreement"] == 1.0
    assert report["accuracy"]["drop_pp"] == 0


def test_validate_tells_how_near_each_bundle_is_to_the_student(workplace):
    """The float one passes; int8 keeps nearly all answers, on a processor that saturates too,
    and a bundle that fails by a little fails the command."""
    result = CliRunner().invoke(main, ["validate", "--json"])
    reports = {r["target"]: r for r in json.loads(result.stdout)}
    assert set(reports) == {"onnx-fp32", "onnx-int8", "openvino-int8"}
    assert reports.pop("onnx-fp32")["verdict"] == "holds"
    for report in reports.values():
        assert report["cosine"]["centered_p1"] > 0.95
        assert report["top1_agreement"] > 0.9
        failing = [rule["rule"] for rule in report["rules"] if rule["answer"] == "fails"]
        assert len(report["failures"]) == len(failing)
    verdicts = {report["verdict"] for report in reports.values()}
    assert verdicts <= {"holds", "cannot tell", "fails"}
    assert (result.exit_code == 3) == ("fails" in verdicts)


def test_validate_fails_an_int8_bundle_that_is_not_the_student(workplace):
    folder, _ = workplace
    shutil.copytree(folder / "runs/smoke/evaluation", folder / "other/evaluation")
    broken = shuffle(
        Path(shutil.copytree(folder / "runs/smoke/bundles/onnx-int8", folder / "other/bundle"))
    )
    result = CliRunner().invoke(main, ["validate", "--bundle", str(broken), "--json"])
    (report,) = json.loads(result.stdout)
    assert report["verdict"] == "fails"
    assert any(f.startswith("images below a centered cosine") for f in report["failures"])
    assert result.exit_code == 3


def test_bench_and_report_give_a_page_that_needs_no_network(workplace):
    folder, _ = workplace
    CliRunner().invoke(main, ["validate"])
    rows = json.loads(call("bench", "--json"))
    for r in rows:
        assert r["single_stream"]["queries"] >= 20
        assert r["short_run"]
        assert r["energy_mj_per_image"] is None
        assert (r["single_stream"]["latency_ms_p99"] is None) == (
            r["single_stream"]["queries"] < 1000
        )
        assert r["cold_start"]["peak_memory_mib"] > 10
    out = call("report")
    # Other tests are other work: then the times, and nothing else, are unknown.
    assert re.search("onnx-fp32 on host-cpu: (ship: |cannot say: times unknown: [^;]*$)", out, re.M)
    page = (folder / "runs/smoke/report.html").read_text()
    assert not re.search('src="(?!data:)', page)
    assert "<link" not in page
    assert "not measured" in page


def test_classify_takes_baked_and_new_labels(workplace):
    folder, _ = workplace
    import random

    shapes.draw(0, random.Random(1)).save(folder / "one.png")
    baked = json.loads(
        call("classify", "one.png", "--bundle", "runs/smoke/bundles/onnx-int8", "--json")
    )["one.png"]
    assert len(baked) == 5 and baked[0]["label"] in shapes.CLASSES
    new = json.loads(
        call(
            "classify",
            "one.png",
            "--bundle",
            "runs/smoke/bundles/onnx-fp32",
            "--labels",
            "a cat, a red circle",
            "--json",
        )
    )["one.png"]
    assert {r["label"] for r in new} == {"a cat", "a red circle"}
    assert sum(r["probability"] for r in new) == pytest.approx(1)


def test_labels_bakes_words_and_embed_writes_unit_rows(workplace):
    folder, _ = workplace
    (folder / "words.txt").write_text("a cat\na dog\n")
    call("labels", "runs/smoke/bundles/onnx-fp32", "words.txt", "--out", "cats")
    bundle = Bundle.load("cats")
    assert bundle.labels == ["a cat", "a dog"]
    np.testing.assert_allclose(
        bundle.class_features,
        Bundle.load("runs/smoke/bundles/onnx-fp32").bake(["a cat", "a dog"]),
        atol=1e-6,
    )
    call("embed", "one.png", "one.png", "--out", "features.npy", "--bundle", "cats")
    features = np.load("features.npy")
    assert features.shape == (2, 64)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_no_held_back_image_is_among_the_calibration_images(workplace):
    manifest = Bundle.load("runs/smoke/bundles/onnx-int8").manifest
    from edgeclip.device.images import index_tar, read

    evaluation = {
        hashlib.sha256(read(p)).hexdigest()
        for p in index_tar(Path("runs/smoke/evaluation/images.tar"))
    }
    assert manifest.calibration
    assert not evaluation & {c.sha256 for c in manifest.calibration}


def test_tensorrt_int8_is_exported_to_the_end_and_validate_names_it_as_not_run_here(workplace):
    (row,) = json.loads(call("export", "--target", "tensorrt-int8", "--json"))
    folder = Path("runs/smoke/bundles/tensorrt-int8")
    made = disk.read_manifest(folder, "bundle")
    disk.verify(folder, made)
    assert (
        made["quantization"]["int8_share_of_macs"] >= 0.3
        and made["quantization"]["latency_ms_float"] is None
    )
    result = CliRunner().invoke(main, ["validate", "--json"])
    assert "tensorrt-int8: skipped, host-cpu has no tensorrt" in result.stderr
    assert "tensorrt-int8" not in {
        r["target"] for r in json.loads(result.stdout)
    } and result.exit_code in (0, 3, 4)
    pytest.importorskip("tensorrt_rtx", reason="pip install 'edgeclip[lint]'")
    assert row["lint"]["parses"] and row["lint"]["builds"]
