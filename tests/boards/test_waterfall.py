"""Every loss is named by the step that made it, and the steps sum to the whole way exactly."""

import dataclasses
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgeclip import disk
from edgeclip.boards.judging import Judge
from edgeclip.boards.waterfall import Stage, summary
from edgeclip.device import machine, profile
from edgeclip.device import validate as V
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import load_evaluation
from edgeclip.host.export import export
from edgeclip.host.export.source import from_model
from tests.support.optional import require
from tests.support.toy_bundle import (
    LABELS,
    export_tiny_clip,
    toy_target,
    toy_text,
    write_evaluation,
)

IMAGES = 300
HERE = profile.load("host-cpu")[1]


@pytest.fixture(scope="module")
def made(source, shipped_bundle, tmp_path_factory) -> Path:
    """A run whose images are larger than the encoder's input; read only."""
    run = tmp_path_factory.mktemp("run")
    write_evaluation(run / "evaluation", source, IMAGES, 48)
    for target in ("onnx-fp32", "onnx-int8"):
        shutil.copytree(shipped_bundle(target), run / "bundles" / target)
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    """The same, to be broken."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def steps_of(run: Path, target: str, observe=V.observe, device=HERE):
    evaluation = load_evaluation(run / "evaluation")
    bundle = Bundle.load(run / "bundles" / target)
    judge = Judge(run, device, evaluation)
    report = judge.judged(bundle, observe(bundle, evaluation), machine.facts()).report
    found = report.waterfall
    assert sum(s.lost - s.won for s in found.steps) == found.whole.lost - found.whole.won
    return found


def tamper(bundle: Path, change) -> None:
    """Change the image encoder's graph as an export that went wrong would have written it."""
    path = bundle / "image_encoder.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    rewrite(bundle, {})


def rewrite(bundle: Path, changes: dict) -> None:
    manifest = disk.read_json(bundle / disk.MANIFEST) | changes
    known = {k: v for k, v in manifest.items() if k not in ("kind", "files")}
    disk.write_manifest(bundle, "bundle", known)


def lost(found) -> dict[str, int]:
    return {step.name: step.lost - step.won for step in found.steps}


@pytest.mark.parametrize("target", ["onnx-fp32", "onnx-int8"])
def test_a_faithful_bundle_loses_nothing_before_the_rounding(made, target):
    found = steps_of(made, target)
    names = [step.name for step in found.steps]
    assert names == ["student", "export", "preprocess", target.removeprefix("onnx-")]
    assert found.start == "teacher"
    changed = lost(found)
    changed.pop("int8", None)
    assert set(changed.values()) == {0}
    for step in found.steps[1:3]:
        assert step.centered_cosine_p1 == pytest.approx(1.0, abs=1e-5)
    assert found.typed_words.centered_cosine_p1 > 0.99


def test_another_resize_filter_is_named_as_preprocess(run):
    for target in ("onnx-fp32", "onnx-int8"):
        preprocess = disk.read_json(run / "bundles" / target / disk.MANIFEST)["preprocess"]
        rewrite(run / "bundles" / target, {"preprocess": preprocess | {"resize": "shortest"}})
    assert lost(steps_of(run, "onnx-int8"))["preprocess"] == 0
    other = preprocess | {"interpolation": "bilinear"}
    rewrite(run / "bundles" / "onnx-int8", {"preprocess": other})
    found = steps_of(run, "onnx-int8")
    by_name = {step.name: step for step in found.steps}
    assert by_name["preprocess"].centered_cosine_p1 < 0.9999
    assert by_name["export"].centered_cosine_p1 == pytest.approx(1.0, abs=1e-5)


@pytest.fixture
def swapped(monkeypatch):
    """What a device observes that hands over blue, green, red."""

    def observe(bundle, evaluation):
        with monkeypatch.context() as patch:
            own = Bundle.pixels
            patch.setattr(Bundle, "pixels", lambda self, image: own(self, image)[..., ::-1])
            return V.observe(bundle, evaluation)

    return observe


def test_swapped_channels_on_the_device_are_named_as_preprocess(made, swapped):
    found = steps_of(made, "onnx-int8", swapped)
    assert lost(found)["preprocess"] > 20
    assert "most was lost by preprocess" in found.most
    assert lost(found)["export"] == 0


def test_a_corrupted_weight_is_named_as_export(run):
    def corrupt(model):
        for stored in model.graph.initializer:
            value = numpy_helper.to_array(stored)
            if value.ndim == 4:
                noise = np.random.default_rng(0).normal(size=value.shape) * value.std()
                stored.CopyFrom(
                    numpy_helper.from_array((value + noise).astype(np.float32), stored.name)
                )
                return

    tamper(run / "bundles" / "onnx-fp32", corrupt)
    found = steps_of(run, "onnx-fp32")
    assert lost(found)["export"] > 20
    assert lost(found)["preprocess"] == lost(found)["fp32"] == 0
    assert "most was lost by export" in found.most


def test_a_bad_rounding_is_named_by_its_precision(run):
    """Steps that are sixteen times too coarse, as where a residual sum is rounded with an
    outlier's range.
    """

    def coarse(model):
        quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
        scales = {n.input[1] for n in quantizers}
        for stored in model.graph.initializer:
            if stored.name in scales:
                value = numpy_helper.to_array(stored) * 16
                stored.CopyFrom(numpy_helper.from_array(value, stored.name))

    tamper(run / "bundles" / "onnx-int8", coarse)
    found = steps_of(run, "onnx-int8")
    assert "most was lost by int8" in found.most
    assert lost(found)["export"] == lost(found)["preprocess"] == 0


def test_a_lost_mask_of_the_text_encoder_is_named_by_typed_words(run, source):
    text = toy_text()

    class Maskless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = text.module

        def forward(self, input_ids):
            mean = self.own.table(input_ids).mean(dim=1)
            return torch.nn.functional.normalize(self.own.out(mean), dim=-1)

    broken = dataclasses.replace(text, module=Maskless().eval())
    shutil.rmtree(run / "bundles" / "onnx-int8")
    wrong = source._replace(load_text=lambda: broken)
    export(wrong, "onnx-int8", toy_target("onnx-int8"), run / "bundles" / "onnx-int8")
    found = steps_of(run, "onnx-int8")
    assert found.typed_words.centered_cosine_p1 < 0.9
    assert found.typed_words.lower_pp > 0
    assert "typed words" in found.most
    assert abs(lost(found)["int8"]) < 20


def test_a_lost_causal_mask_of_clip_is_named_by_typed_words(tmp_path):
    require("open_clip", "pip install 'edgeclip[train]'")
    export_tiny_clip(tmp_path / "run" / "bundles" / "onnx-fp32")
    source = from_model(
        str(tmp_path / "run" / "bundles" / "tiny-clip.json"), "random", LABELS, None
    )
    text = source.load_text()
    write_evaluation(tmp_path / "run" / "evaluation", source, IMAGES)
    sound = steps_of(tmp_path / "run", "onnx-fp32").typed_words
    assert sound.lost == sound.won == 0
    for module in text.module.modules():
        if getattr(module, "attn_mask", None) is not None:
            module.attn_mask = None
    shutil.rmtree(tmp_path / "run" / "bundles" / "onnx-fp32")
    wrong = source._replace(load_text=lambda: text)
    export(wrong, "onnx-fp32", toy_target("onnx-fp32"), tmp_path / "run" / "bundles" / "onnx-fp32")
    found = steps_of(tmp_path / "run", "onnx-fp32")
    assert found.typed_words.centered_cosine_p1 < sound.centered_cosine_p1 - 0.01
    assert set(lost(found).values()) == {0}


def test_a_device_that_computes_otherwise_is_named_as_device(made):
    far = msgspec.structs.replace(profile.load("loopback")[1])

    def noisy(bundle, evaluation):
        observed = V.observe(bundle, evaluation)
        features = observed.arrays["features_all"]
        noise = np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
        observed.arrays["features_all"] = features + noise * features.std()
        return observed

    found = steps_of(made, "onnx-int8", noisy, far)
    assert [s.name for s in found.steps][-2:] == ["int8", "device"]
    assert "most was lost by device" in found.most


def test_pixels_that_are_too_many_to_send_leave_preprocess_to_what_follows(
    made, swapped, monkeypatch
):
    monkeypatch.setattr(V, "MOST_PIXELS", 1000)

    found = steps_of(made, "onnx-int8", swapped)
    assert [s.name for s in found.steps] == ["student", "export", "int8"]


def test_a_run_of_an_older_edgeclip_has_no_steps(run):
    path = run / "evaluation" / "evaluation.json"
    record = disk.read_json(path)
    for field in ("preprocess", "pixels", "teacher"):
        del record[field]
    disk.write_json(path, record)
    disk.write_manifest(run / "evaluation", "evaluation", {})
    evaluation = load_evaluation(run / "evaluation")
    bundle = Bundle.load(run / "bundles" / "onnx-int8")
    judge = Judge(run, HERE, evaluation)
    judged = judge.judged(bundle, V.observe(bundle, evaluation), machine.facts())
    assert judged.report.waterfall is None


def test_steps_of_counts_are_those_of_the_whole_way():
    rng = np.random.default_rng(0)
    stages = [Stage(name, rng.random(500) < 0.7, None) for name in ("student", "export", "int8")]
    found = summary(stages, None)
    assert found.start_top1 - found.whole.top1 == pytest.approx(found.whole.drop_pp / 100)
    total = sum(step.drop_pp for step in found.steps)
    assert total == pytest.approx(found.whole.drop_pp, abs=1e-12)
    for step in found.steps:
        assert step.lower_pp <= step.drop_pp <= step.upper_pp


def test_a_student_that_beats_its_teacher_gained():
    teacher = Stage("teacher", np.arange(400) % 2 == 0, None)
    student = Stage("student", np.arange(400) % 4 != 3, None)
    assert summary([teacher, student], None).most.startswith("distillation gained 25.00 pp (")
    assert summary([student, teacher._replace(name="student")], None).most.startswith(
        "distillation cost 25.00 pp ("
    )
