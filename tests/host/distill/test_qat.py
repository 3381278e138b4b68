"""What is rounded in training is what is deployed: same layers, same scales, same answers."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from edgeclip import disk
from edgeclip.device.metrics import cosine
from edgeclip.errors import EdgeclipError
from edgeclip.host.distill import qat as quantized
from edgeclip.host.distill.step import Step
from edgeclip.host.graph import learned, policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.qdq import quantize
from edgeclip.host.towers.fold import fold
from tests.support.command import mistake
from tests.support.command import run as cli
from tests.support.files import REPO, write
from tests.support.images import toy_image, truncated_jpeg
from tests.support.tiny_recipe import RECIPE
from tests.support.toy_bundle import torch_student, toy_input, toy_target


@pytest.fixture(scope="module")
def images():
    return np.stack([toy_input(i) for i in range(48)])


def run(model, x):
    options = ort.SessionOptions()
    # As edgeclip.device.runtime does: an x86 without VNNI would saturate.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {model.graph.input[0].name: x})[0]


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("/tower/blocks/blocks.1/blocks.1.0/conv_dw/Conv", "tower.blocks.1.0.conv_dw"),
        ("/tower/blocks/blocks.11/mlp/fc1/MatMul", "tower.blocks.11.mlp.fc1"),
        ("/projector/projector.3/Gemm", "projector.3"),
        ("/tower/conv_stem/Conv", "tower.conv_stem"),
    ],
)
def test_a_node_is_traced_back_to_its_module(node, module):
    assert quantized.module_name(node) == module


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_onnxs_and_its_gradient_passes(symmetric):
    rounding = quantized.FakeQuantize(-1.0, 3.0, symmetric)
    x = torch.linspace(-5, 5, 101, requires_grad=True)
    y = rounding(x)
    scale = rounding.log_scale.exp().item()
    expected = (
        torch.clamp(torch.round(x / scale) + rounding.zero_point, rounding.bottom, rounding.top)
        - rounding.zero_point
    ) * scale
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    low, high = ((q - rounding.zero_point) * scale for q in (rounding.bottom, rounding.top))
    inside = (x > low + scale) & (x < high - scale)
    assert (x.grad[inside] == 1).all() and (
        x.grad[(x < low - scale) | (x > high + scale)] == 0
    ).all()
    assert rounding.log_scale.grad != 0


@pytest.mark.parametrize("name", ["onnx-int8", "onnx-int8-arm", "tensorrt-int8"])
def test_the_rounding_student_is_the_exported_graph(images, tmp_path, name):
    student, target = torch_student(), toy_target(name)
    trained = {}

    def train(folded: nn.Module):
        optimizer = torch.optim.SGD(folded.parameters(), 1e-2)
        x = torch.from_numpy(images)
        with torch.inference_mode():
            wanted = student(x)
        wanted = wanted.clone()
        for _ in range(5):
            loss = (folded.train()(x) - wanted).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            trained["features"] = folded.eval()(x).numpy()
        return [{"loss": loss.item()}]

    path = tmp_path / "t.yaml"
    path.write_text(_yaml(name))
    log = quantized.fine_tune(
        student, images, str(path), tmp_path / "quantized", train, {"student": "x"}
    )
    found = learned.load(tmp_path / "quantized", torch_student(), target, images)
    assert found is not None
    assert found.float_layers == {}
    assert len(found.nodes) == 5
    model = quantize(
        found.calibrated,
        found.nodes,
        activations="uint8" if name == "onnx-int8" else "int8",
        for_tensorrt=name == "tensorrt-int8",
        reduce_range=found.reduce_range,
    )
    assert cosine(run(model, images), trained["features"]).centered_p1 > 0.99
    record = disk.read_json(tmp_path / "quantized" / "quantized.json")
    assert record["log"] == log
    scales = graph.initializers(model)
    for tensor, (low, high) in record["ranges"].items():  # the learned scale is the exported one
        assert scales[f"{tensor}_scale"] == pytest.approx(
            (high - low) / (254 if name == "tensorrt-int8" else 255), rel=1e-5
        )


def _yaml(name):
    limits = "tolerance: {centered_cosine_p1: 0.5, top1_agreement: 0.5, accuracy_drop_pp: 1}"
    spec = "calibration: {images: 32, methods: [minmax], smoothing: [null], probe_layers: 0}"
    kind = {
        "onnx-int8": "runtime: onnxruntime\nactivations: uint8\nreduce_range: as_host",
        "onnx-int8-arm": "runtime: onnxruntime\nactivations: int8",
        "tensorrt-int8": "runtime: tensorrt\nopset: 19\ntext: fp16",
    }[name]
    return f"{kind}\nprecision: int8\n{spec}\n{limits}\n"


def test_learned_scales_are_of_one_target_only(images, tmp_path):
    (tmp_path / "t.yaml").write_text(_yaml("onnx-int8"))
    quantized.fine_tune(
        torch_student(), images, str(tmp_path / "t.yaml"), tmp_path / "q", lambda m: [], {}
    )
    assert (
        learned.load(tmp_path / "q", torch_student(), toy_target("onnx-int8-arm"), images) is None
    )
    assert (
        learned.load(tmp_path / "nothing", torch_student(), toy_target("onnx-int8"), images) is None
    )
    for name in ("openvino-int8", "onnx-fp32"):
        with pytest.raises(EdgeclipError, match="takes no learned scales"):
            quantized.check(name, toy_target(name), 32)
    with pytest.raises(
        EdgeclipError, match="onnx-int8: asks for 32 training images, and there are 31"
    ):
        quantized.check("onnx-int8", toy_target("onnx-int8"), 31)


def test_fine_tuning_gains_where_a_range_was_spoilt(images, tmp_path):
    """FakeQuantize to a twentieth of the steps costs; sixty steps towards the float features win
    some of it back.
    """
    student = torch_student()
    x = torch.from_numpy(images)
    with torch.inference_mode():
        wanted = student(x).clone()
    folded = fold(student, x[:1]).requires_grad_(True)
    model = graph.to_onnx(folded, x[:1], "pixels", "image_features", 18)
    target = toy_target("onnx-int8")
    chosen = policy.choose(
        model,
        images,
        policy.Candidate("minmax", None, "all", None),
        {},
        target.calibration,
        own_bias=False,
    )
    roundings = quantized.attach(folded, chosen, target)
    with torch.no_grad():
        for r in roundings.values():
            r.log_scale.add_(3.0)
    before = (folded(x) - wanted).square().sum().item()
    optimizer = torch.optim.Adam(folded.parameters(), 5e-4)
    for _ in range(60):
        loss = (folded(x) - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * before


READABLE = 116
"""of 70 photos a class and a broken one, in the training part"""
PACKED = """{kind: open_clip, model: own, weights: random, config: {embed_dim: 8,
  vision_cfg: {image_size: 32, layers: 3, width: 16, head_width: 8, patch_size: 16},
  text_cfg: {context_length: 12, vocab_size: 49408, width: 8, heads: 2, layers: 1}}}"""


def ask(here, each, images=32):
    """q.yaml: a student for t.yaml's rounding, of `each` photos a class."""
    for label in ("apple", "pear"):
        (here / "photos" / label).mkdir(parents=True)
        for i in range(each):
            toy_image(i + 1000 * (label == "pear"), 40, 40).save(
                here / "photos" / label / f"{i}.png"
            )
    text = (
        _yaml("onnx-int8")
        .replace(
            "probe_layers: 0", "probe_layers: 0, judged_on: 8, min_int8_share: 0, min_speedup: 0"
        )
        .replace("0.5", "0.0")
    )
    (here / "t.yaml").write_text(text.replace("images: 32", f"images: {images}"))
    (here / "q.yaml").write_text(
        RECIPE.replace("ROOT", "photos") + "qat: {target: t.yaml, epochs: 2, lr: 1e-5}\n"
    )


def test_a_stop_while_it_learns_costs_nothing_of_stage_2(here, monkeypatch):
    """Nor does an image that cannot be read: stage 2 had done without it."""
    ask(here, 70, images=READABLE)
    write(here, (here / "q.yaml").read_text().replace("batch_size: 4", "batch_size: 16"), "q.yaml")
    truncated_jpeg(here / "photos/apple/x.jpg")
    assert cli("distill", "q.yaml", "--out", "runs/whole").exit_code == 0

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantized, "fine_tune", stopped)
        assert cli("distill", "q.yaml").exit_code == 130
    steps, step = [], Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *a: steps.append(1) or step(*a))
    result = cli("distill", "q.yaml", "--json")
    assert result.exit_code == 0, result.output
    whole, again = (
        disk.read_manifest(here / "runs" / name / "quantized", "quantized student")["files"]
        for name in ("whole", "q")
    )
    assert whole == again and len(json.loads(result.stdout)["skipped"]) == 1
    assert len(steps) == 2 * (READABLE // 16)


KILLED = """
import os, signal, sys
from edgeclip.cli import main
from edgeclip.host.distill import qat
from edgeclip.host.distill.step import Step
left, step, fine_tune = int(sys.argv.pop(1)), Step.__call__, qat.fine_tune
def killed(self, *arguments):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return step(self, *arguments)
def watched(*arguments):
    Step.__call__ = killed
    return fine_tune(*arguments)
qat.fine_tune = watched
main()
"""


def killed(here, steps):
    """Run `distill q.yaml`, killed after so many steps with rounding; return what it said."""
    command = [sys.executable, "-c", KILLED, str(steps), "distill", "q.yaml"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stderr


@pytest.mark.slow
def test_killed_while_it_learns_and_gone_on_it_ends_with_the_same_bits(here):
    """Its checkpoints are a step older than the kill, in the first epoch and in the second."""
    ask(here, 40)
    asked = (here / "q.yaml").read_text()
    write(
        here,
        asked.replace("batch_size: 4", "batch_size: 16, threads: 1, checkpoint_every: 2"),
        "q.yaml",
    )
    assert killed(here, 3).count("going on after step") == 0
    assert killed(here, 3).count("checkpoint_quantized: going on after step 2") == 1
    assert killed(here, 3).count("checkpoint_quantized: going on after step 4") == 1
    result = cli("distill", "q.yaml")
    assert result.exit_code == 0, result.output
    assert "checkpoint_quantized: going on after step 6" in result.stderr
    assert cli("distill", "q.yaml", "--out", "runs/whole").exit_code == 0
    for part, kind in (("quantized", "quantized student"), ("student", "student")):
        files = [
            disk.read_manifest(here / "runs" / name / part, kind)["files"]
            for name in ("q", "whole")
        ]
        assert files[0] == files[1]
    log = disk.read_json(here / "runs/q/quantized" / learned.RECORD)["log"]
    assert len(log) == 2
    assert {p.name for p in (here / "runs/q").iterdir()} == {
        p.name for p in (here / "runs/whole").iterdir()
    }


def test_a_student_that_cannot_round_is_refused_before_it_is_trained(here):
    ask(here, 40)
    asked = (here / "q.yaml").read_text()
    write(
        here,
        asked.replace(
            "{kind: timm, model: mobilenetv4_conv_small_035, weights: random, image_size: 32}",
            PACKED,
        ),
        "packed.yaml",
    )
    mistake(
        "distill",
        "packed.yaml",
        says="is no Conv2d or Linear of the student's own",
        only_line=False,
    )
    assert not (here / "runs").exists() and not list(here.glob("cache/*/img_emb"))
    write(here, (here / "t.yaml").read_text().replace("images: 32", "images: 320"), "t.yaml")
    mistake(
        "distill", "q.yaml", says="asks for 320 training images, and there are", only_line=False
    )


def test_from_recipe_to_graph_the_learned_scales_ship(here):
    """The real commands: a recipe with qat, then export to that target, whose graph has the scales
    that training learned.
    """
    import onnx

    ask(here, 40)
    result = cli("distill", "q.yaml")
    assert result.exit_code == 0, result.output
    record = disk.read_json(here / "runs/q/quantized/quantized.json")
    assert len(record["log"]) == 2 and len(record["nodes"]) > 20

    result = cli("export", "--run", "runs/q", "--target", "t.yaml", "--json")
    assert result.exit_code == 0, result.output
    bundle = here / "runs/q/bundles/t"
    manifest = disk.read_manifest(bundle, "bundle")
    assert (
        manifest["quantization"]["learned"] is True
        and len(manifest["quantization"]["frontier"]) == 1
    )
    assert manifest["parents"]["quantized"] == disk.sha256(
        here / "runs/q/quantized" / disk.MANIFEST
    )
    scales = graph.initializers(onnx.load(bundle / "image_encoder.onnx"))
    found = {
        tensor: scales[f"{tensor}_scale"]
        for tensor in record["ranges"]
        if f"{tensor}_scale" in scales
    }
    assert found.keys() == record["ranges"].keys()
    for tensor, (low, high) in record["ranges"].items():
        assert found[tensor] == pytest.approx((high - low) / 255, rel=1e-5)

    # Another target calibrates the float student, whose scales are others.
    (here / "u.yaml").write_text((here / "t.yaml").read_text().replace("as_host", "always"))
    assert cli("export", "--run", "runs/q", "--target", "u.yaml").exit_code == 0
    assert (
        disk.read_manifest(here / "runs/q/bundles/u", "bundle")["quantization"]["learned"] is False
    )
