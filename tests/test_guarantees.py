"""What edgeclip promises is refused by an exception, never by an `assert`: `python -O` takes
asserts away, and promises stay.

Every test here runs under `python -O -m pytest -m guarantee` too, so none of them states anything
by `assert`.
"""

import copy
import dataclasses
import os
import re
import subprocess
import sys
import types

import msgspec
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from edgeclip.device import power
from edgeclip.device.bundle import Bundle
from edgeclip.device.profile import Device, Recognize
from edgeclip.device.selftest import selftest
from edgeclip.errors import EdgeclipError
from edgeclip.host.export import export
from edgeclip.host.graph.trace import fold_constants
from edgeclip.host.towers.fold import fold
from tests.support.command import run
from tests.support.damage import damage, resign
from tests.support.files import REPO
from tests.support.toy_bundle import toy_target

REFUSED = (EdgeclipError, RuntimeError)
"""An `AssertionError` is neither."""


def must(claim, said):
    if not claim:
        pytest.fail(str(said))


class OtherInBatches(nn.Module):
    """A trace holds what was done for the example alone, and this does something else for more
    than that.
    """

    def __init__(self, module, size):
        super().__init__()
        self.module, self.size = module, size

    def forward(self, x):
        features = self.module(x)
        if len(x) > self.size:
            return features.flip(dims=(1,))
        return features


class OtherAfterNorm(nn.Module):
    """A convolution that is also read before its batch norm: to fold the two would change the
    sum.
    """

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        features = self.conv(x)
        return features + self.norm(features)


class OfTheLargestId(nn.Module):
    """A text tower that feels the ids themselves, which a smaller vocabulary numbers anew."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, input_ids):
        return self.module(input_ids) + input_ids.amax(dim=1, keepdim=True)


def float_export(source, tmp_path):
    return export(source, "onnx-fp32", toy_target("onnx-fp32"), tmp_path / "bundle")


def must_be_refused(source, tmp_path, match):
    with pytest.raises(REFUSED, match=match):
        float_export(source, tmp_path)
    must(not (tmp_path / "bundle").exists(), "a wrong bundle was written")


def other_text(source, change):
    text = source.load_text()
    return source._replace(load_text=lambda: dataclasses.replace(text, module=change(text.module)))


def statuses(report):
    steps = msgspec.to_builtins(report)["steps"]
    return {step["step"].split(" (")[0]: step["status"] for step in steps}


def status(folder, step, device=None):
    device = device or Device(runtimes=["onnxruntime"])
    return statuses(selftest(Bundle.load(folder), device))[step]


@pytest.mark.guarantee
def test_a_sound_source_is_exported(source, tmp_path):
    must((float_export(source, tmp_path) / "manifest.json").exists(), "no bundle")


@pytest.mark.guarantee
def test_a_wrong_trace_of_the_image_encoder_is_refused(source, tmp_path):
    wrong = OtherInBatches(copy.deepcopy(source.image_encoder), size=1)
    must_be_refused(source._replace(image_encoder=wrong), tmp_path, "differs from torch")


@pytest.mark.guarantee
def test_a_wrong_trace_of_the_text_encoder_is_refused(source, tmp_path):
    wrong = other_text(source, lambda module: OtherInBatches(module, size=2))
    must_be_refused(wrong, tmp_path, "differs from torch")


@pytest.mark.guarantee
def test_a_smaller_vocabulary_that_changes_kept_texts_is_refused(source, tmp_path):
    wrong = other_text(source, OfTheLargestId)._replace(vocabulary=["a photo"])
    must_be_refused(wrong, tmp_path, "vocabulary")


@pytest.mark.guarantee
def test_a_fold_that_changes_the_output_is_refused():
    torch.manual_seed(0)
    module = OtherAfterNorm()
    module.norm.running_mean.fill_(0.5)
    with pytest.raises(REFUSED, match="folding changed the output"):
        fold(module, torch.randn(2, 3, 8, 8))


@pytest.mark.guarantee
def test_an_operator_that_is_not_of_onnx_itself_is_refused():
    node = helper.make_node("Gelu", ["x"], ["y"], name="gelu", domain="com.microsoft")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:])
    with pytest.raises(REFUSED, match=r"com\.microsoft"):
        fold_constants(helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.guarantee
def test_the_selftest_passes_a_sound_bundle(own_bundle):
    found = statuses(
        selftest(Bundle.load(own_bundle("onnx-fp32")), Device(runtimes=["onnxruntime"]))
    )
    must("fail" not in found.values(), found)


@pytest.mark.guarantee
def test_the_selftest_fails_on_a_wrong_bundle(own_bundle, here):
    folder = damage(own_bundle("onnx-fp32"), 5.0)
    must(status(folder, "golden images and texts") == "fail", "wrong answers passed")
    result = run("selftest", "--bundle", folder, "--device", "host-cpu")
    must(result.exit_code == 3, result.output)


@pytest.mark.guarantee
def test_the_selftest_fails_where_an_image_answers_otherwise_in_a_batch(own_bundle):
    folder = own_bundle("onnx-fp32")
    model = onnx.load(folder / "image_encoder.onnx")
    features = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["alone" if name == features else name for name in node.output]
    axis = onnx.numpy_helper.from_array(torch.zeros(1, dtype=torch.int64).numpy(), "axis of images")
    model.graph.initializer.append(axis)
    mean = helper.make_node("ReduceMean", ["alone"], ["mean"], name="mean")
    if model.opset_import[0].version >= 18:
        mean.input.append(axis.name)
    else:
        mean.attribute.append(helper.make_attribute("axes", [0]))
    model.graph.node.extend(
        [mean, helper.make_node("Mul", ["alone", "mean"], [features], name="of the batch")]
    )
    onnx.save(model, folder / "image_encoder.onnx")
    resign(folder)
    must(status(folder, "one image in batches of 1, 3, 8 and 11") == "fail", "a batch passed")


@pytest.mark.guarantee
def test_the_selftest_fails_on_another_device(own_bundle):
    device = Device(runtimes=["onnxruntime"], recognize=Recognize(device_tree_model="Orin"))
    found = status(own_bundle("onnx-fp32"), "this is the device", device)
    must(found == "fail", "another device passed")


@pytest.mark.guarantee
def test_the_selftest_fails_where_a_second_opening_is_another(own_bundle, monkeypatch):
    bundle = Bundle.load(own_bundle("onnx-fp32"))
    must(bundle.image_encoder.facts, "the first opening says nothing of itself")
    other = types.SimpleNamespace(facts={"version": "another"})
    monkeypatch.setattr(Bundle, "open_image_encoder", lambda self: other)
    found = statuses(selftest(bundle, Device(runtimes=["onnxruntime"])))
    must(found["open it again"] == "fail", found)


@pytest.mark.guarantee
def test_the_selftest_fails_on_rails_that_give_nothing(own_bundle, monkeypatch):
    monkeypatch.setattr(power, "find", lambda *_: power.Source("dead", lambda: None))
    must(status(own_bundle("onnx-fp32"), "power rails") == "fail", "dead rails passed")


@pytest.mark.slow
def test_every_guarantee_holds_without_asserts():
    command = [sys.executable, "-O", "-m", "pytest", "-m", "guarantee", "-p", "no:cacheprovider"]
    # pytest warns that its own asserts are gone, which is what is meant here
    quiet = ["-W", "ignore::pytest.PytestConfigWarning"]
    done = subprocess.run(
        [*command, *quiet, "tests/test_guarantees.py"],
        cwd=REPO,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    marked = sum(hasattr(f, "pytestmark") for n, f in globals().items() if n.startswith("test_"))
    assert re.search(rf"^{marked - 1} passed", done.stdout, re.MULTILINE), done.stdout[-3000:]
