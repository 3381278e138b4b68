"""Every family of students through every runtime's form: float answers equal, int8 exactly where
the policy has it, legal for TensorRT.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeclip.device import target
from edgeclip.device.metrics import cosine
from edgeclip.device.runtime.onnxruntime import disabled_optimizers
from edgeclip.host.export.lint import lint
from edgeclip.host.graph import policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.float16 import to_fp16
from edgeclip.host.graph.qdq import calibrate, quantize
from edgeclip.host.graph.view import run_model
from edgeclip.host.towers.fold import fold
from tests.support.families import IMAGE, SIZE, TEXT, TEXTS, image_tower, text_tower
from tests.support.optional import require

OLD = "1.23.2"


def run(model, x):
    """The model's one output for its one input, from a session as edgeclip opens it: another one
    saturates on S8S8 where the processor has no VNNI."""
    (output,) = run_model(model, {model.graph.input[0].name: x}).values()
    return output


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where the forms of every family are left, for the older runtime."""
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(8, 3, SIZE, SIZE)).astype(np.float32)


def quantized_by(model):
    """(products whose both operands come out of a DequantizeLinear, {other reader of one: what
    made the tensor that was quantized}).
    """
    makers = {o: n for n in model.graph.node for o in n.output}
    both, others = [], {}
    for n in model.graph.node:
        pairs = [
            m
            for i in n.input
            if (m := makers.get(i)) is not None and m.op_type == "DequantizeLinear"
        ]
        if n.op_type in graph.PRODUCTS and len(pairs) >= 2:
            both.append(n.name)
        elif pairs and n.op_type != "QuantizeLinear":
            others[n.name] = {makers[makers[d.input[0]].input[0]].name for d in pairs}
    return both, others


@pytest.mark.parametrize("name", IMAGE)
def test_an_image_tower(name, images, written):
    tower = image_tower(name)
    x = torch.from_numpy(images)
    model = graph.to_onnx(fold(tower, x[:1]), x[:1], "pixels", "image_features", 19)
    with torch.inference_mode():
        expected = tower(x).numpy()
    for batch in (1, 3):
        assert np.abs(run(model, images[:batch]) - expected[:batch]).max() < 1e-5
    assert model.ir_version <= 10

    calibrated = calibrate(model, images, "minmax")
    products = graph.matrix_products(calibrated.model)
    wanted = [
        n.name
        for n in calibrated.model.graph.node
        if n.op_type in graph.PRODUCTS and n.input[1] in graph.initializers(calibrated.model)
    ]
    assert products == wanted and len(products) >= 8
    forms = {"onnx-fp32": model, "onnx-fp16": to_fp16(model)}
    seven_bits = policy.reduced_range(target.load("onnx-int8")[1])  # as it ships from this machine
    forms["onnx-int8"] = quantize(
        calibrated, products, activations="uint8", reduce_range=seven_bits
    )
    forms["onnx-int8-arm"] = quantize(calibrated, products, activations="int8")
    symmetric = quantize(calibrated, products, activations="int8", for_tensorrt=True)
    both, others = quantized_by(symmetric)
    assert (
        sorted(both) == sorted(products) and others == {}
    )  # TensorRT's form: Q/DQ before the products, and nowhere else
    both, others = quantized_by(forms["onnx-int8"])
    convolutions = {n.name for n in calibrated.model.graph.node if n.op_type == "Conv"}
    assert sorted(both) == sorted(products) and all(
        made <= convolutions for made in others.values()
    )  # whose outputs ONNX Runtime wants quantized
    forms["tensorrt-int8"] = to_fp16(symmetric)
    for form, m in forms.items():
        graph.save(m, written / f"{name}.{form}.onnx")
        assert m.ir_version <= 10
        assert cosine(run(m, images), expected).raw_min > (
            0.999 if form in ("onnx-fp32", "onnx-fp16") else 0.9
        ), form


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_tower(name, written):
    tower = text_tower(name)
    ids = torch.randint(
        1,
        TEXT["vocab_size"],
        (3, TEXT["context_length"]),
        generator=torch.Generator().manual_seed(0),
    )
    model = graph.to_onnx(tower, ids[:2], "input_ids", "text_features", 19)
    with torch.inference_mode():
        expected = tower(ids).numpy()
    for batch in (1, 3):
        assert np.abs(run(model, ids[:batch].numpy()) - expected[:batch]).max() < 1e-5
    half = to_fp16(model)
    assert cosine(run(half, ids.numpy()), expected).raw_min > 0.999 and half.ir_version <= 10
    slug = name.split(",")[0].split(" (")[0].replace(" ", "-")
    graph.save(model, written / f"text-{slug}.fp32.onnx")
    graph.save(half, written / f"text-{slug}.tensorrt-fp16.onnx")


def test_tensorrt_rtx_parses_and_builds_every_form_of_every_family(written):
    require("tensorrt_rtx", "pip install 'edgeclip[lint]'")
    files = sorted(written.glob("*.tensorrt-*.onnx"))
    if not files:
        pytest.skip("data: the families were not exported in this run")
    shipped = target.load("tensorrt-int8")[1]
    refused = {
        f.name: verdict for f in files if not (verdict := lint(f, shipped)).builds or verdict.errors
    }
    assert not refused


@pytest.mark.slow  # it makes an environment
def test_the_runtime_of_jetpack_6_loads_every_form_of_every_family(written, tmp_path):
    folder = Path(
        os.environ.get("EDGECLIP_ORT_OLD", tmp_path / "old")
    )  # an environment that has it already, or one of this test's own
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if subprocess.run(
            [folder / "bin" / "pip", "install", "--quiet", f"onnxruntime=={OLD}", "numpy"]
        ).returncode:
            pytest.skip(
                f"no onnxruntime {OLD}: pip install onnxruntime=={OLD} numpy, in an environment of its own that EDGECLIP_ORT_OLD names"
            )
    files = {str(f): disabled_optimizers(f) for f in sorted(written.glob("*.onnx"))}
    if not files:
        pytest.skip("data: the families were not exported in this run")
    code = (
        "import json, sys, onnxruntime as ort\n"
        "disabled = json.loads(sys.argv[1])\n"
        f"assert ort.__version__ == '{OLD}', ort.__version__\n"
        "bad = {}\n"
        "for f in disabled:\n"
        "    try: ort.InferenceSession(f, providers=['CPUExecutionProvider'], disabled_optimizers=disabled[f])\n"
        "    except Exception as e: bad[f] = str(e)\n"
        "print(json.dumps(bad))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [folder / "bin" / "python", "-c", code, json.dumps(files)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_export_reaches_a_model_by_its_configuration_and_may_leave_the_text_out(tmp_path):
    from tests.support.command import run as cli

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**TEXT, "vocab_size": 49408}}
    (tmp_path / "tinyclip.json").write_text(json.dumps(config))
    same = [
        "export",
        "--model",
        tmp_path / "tinyclip.json",
        "--weights",
        "random",
        "--target",
        "onnx-fp32",
        "--json",
    ]
    for name, extra, text in (("both", [], True), ("image", ["--image-only"], False)):
        result = cli(*same, *extra, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name / "onnx-fp32" / "text_encoder.onnx").exists() is text
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert (
        "labels need the text encoder"
        in cli(
            *same, "--image-only", "--labels", tmp_path / "labels.txt", "--out", tmp_path / "c"
        ).stderr
    )
