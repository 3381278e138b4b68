"""What TensorRT refuses is named with its node and its cure; what it takes is built; an engine is
called what it became.
"""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeclip.device import target
from edgeclip.device.runtime import tensorrt_build
from edgeclip.device.runtime.tensorrt_build import BuildError, read_layers
from edgeclip.host.export.lint import lint, rules
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.float16 import to_fp16
from edgeclip.host.graph.qdq import calibrate, quantize
from edgeclip.host.towers.fold import fold
from tests.support.command import mistake
from tests.support.command import run as cli
from tests.support.optional import require
from tests.support.toy_bundle import toy_input


@pytest.fixture(scope="module")
def calibrated(student):
    x = np.stack([toy_input(i) for i in range(16)])
    return calibrate(
        graph.to_onnx(
            fold(student, torch.from_numpy(x[:1])),
            torch.from_numpy(x[:1]),
            "pixels",
            "image_features",
            19,
        ),
        x,
        "minmax",
    )


@pytest.fixture(scope="module")
def nodes(calibrated):
    return graph.matrix_products(calibrated.model)


def found(model):
    return list(rules(model))


def test_the_exported_form_breaks_no_rule(calibrated, nodes):
    assert found(to_fp16(quantize(calibrated, nodes, activations="int8", for_tensorrt=True))) == []


def test_zero_points_uint8_and_int32_biases_are_named_with_node_and_cure(calibrated, nodes):
    asymmetric = found(quantize(calibrated, nodes, activations="uint8"))
    assert any(
        "zero point that is not 0" in what and "symmetrically" in cure
        for _, what, cure in asymmetric
    )
    for_arm = quantize(calibrated, nodes, activations="int8")
    kinds = {what: cure for _, what, cure in found(for_arm)}
    assert set(kinds) == {"an int32 bias behind DequantizeLinear", "a zero point that is not 0"}
    assert "biases in float" in kinds["an int32 bias behind DequantizeLinear"]
    assert {node for node, _, _ in found(for_arm)} <= {n.name for n in for_arm.graph.node}


def one_node(op, inputs=("x",), opset=19, domain="", constants=(), **attributes):
    node = helper.make_node(op, list(inputs), ["y"], "the-node", domain=domain, **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:], list(constants)),
        opset_imports=opsets,
    )


@pytest.mark.parametrize(
    ("model", "node", "what"),
    [
        (
            one_node("MatMulInteger", ("x", "x")),
            "the-node",
            "TensorRT has no operator MatMulInteger",
        ),
        (
            one_node("FusedMatMul", ("x", "x"), domain="com.microsoft"),
            "the-node",
            "com.microsoft.FusedMatMul belongs to another runtime",
        ),
        (
            one_node(
                "Resize",
                ("x", "", "s"),
                constants=[numpy_helper.from_array(np.ones(4, np.float32), "s")],
                antialias=1,
            ),
            "the-node",
            "antialiased Resize",
        ),
        (one_node("Relu", opset=21), "graph", "opset 21"),
        (one_node("Relu", opset=16), "graph", "opset 16"),
    ],
)
def test_each_refusal_names_its_node(model, node, what):
    ((found_node, found_what, cure),) = found(model)
    assert found_node == node
    assert what in found_what
    assert cure


def test_a_product_with_one_quantized_operand_is_named(calibrated, nodes):
    model = quantize(calibrated, nodes, activations="int8", for_tensorrt=True)
    product = next(n for n in model.graph.node if n.name == nodes[1])
    product.input[0] = next(n for n in model.graph.node if n.output[0] == product.input[0]).input[0]
    product.input[0] = next(n for n in model.graph.node if n.output[0] == product.input[0]).input[0]
    assert [(node, what) for node, what, _ in found(model)] == [
        (nodes[1], "Q/DQ on one operand only")
    ]


def test_the_command_exits_3_with_one_line_a_refusal(calibrated, nodes, tmp_path):
    graph.save(quantize(calibrated, nodes, activations="int8"), tmp_path / "bad.onnx")
    graph.save(
        to_fp16(quantize(calibrated, nodes, activations="int8", for_tensorrt=True)),
        tmp_path / "good.onnx",
    )
    bad, good = (
        cli("lint", tmp_path / f"{name}.onnx", "--target", "tensorrt-int8")
        for name in ("bad", "good")
    )
    assert (
        bad.exit_code == 3
        and "an int32 bias behind DequantizeLinear; leave biases in float" in bad.stdout
    )
    assert good.exit_code == 0 and "accepted" in good.stdout
    verdict = json.loads(
        cli("lint", tmp_path / "bad.onnx", "--target", "tensorrt-int8", "--json").stdout
    )
    assert verdict["errors"] and all(line.startswith("node '") for line in verdict["errors"])


def test_what_is_no_onnx_file_or_no_tensorrt_target_is_a_users_error(tmp_path):
    mistake("lint", tmp_path / "no.onnx", "--target", "tensorrt-int8", says="there is no such file")
    (tmp_path / "x.onnx").write_text("no model")
    mistake(
        "lint", tmp_path / "x.onnx", "--target", "tensorrt-int8", says="not a readable ONNX file"
    )
    mistake(
        "lint", tmp_path / "x.onnx", "--target", "onnx-int8", says="lint checks graphs for TensorRT"
    )


def test_the_builder_builds_with_profile_and_workspace_and_writes_the_engine(
    calibrated, nodes, tmp_path
):
    trt = require("tensorrt_rtx", "pip install 'edgeclip[lint]'")
    graph.save(
        to_fp16(quantize(calibrated, nodes, activations="int8", for_tensorrt=True)),
        tmp_path / "m.onnx",
    )
    facts = tensorrt_build.build(
        tmp_path / "m.onnx",
        tmp_path / "m.plan",
        batch=(1, 2, 3),
        workspace_mib=64,
        timing_cache=tmp_path / "t",
        trt=trt,
    )
    assert (tmp_path / "m.plan").stat().st_size == facts["engine_bytes"] > 0
    assert facts["module"] == "tensorrt_rtx"
    assert facts["batch"] == [1, 2, 3]
    assert facts["workspace_mib"] == 64
    graph.save(quantize(calibrated, nodes, activations="int8"), tmp_path / "bad.onnx")
    with pytest.raises(BuildError, match=r"bad\.onnx: node '.*' \(DequantizeLinear\): "):
        tensorrt_build.build(tmp_path / "bad.onnx", tmp_path / "bad.plan", trt=trt)
    assert not (tmp_path / "bad.plan").exists()
    assert lint(tmp_path / "bad.onnx", target.load("tensorrt-int8")[1]).parses is False


def layer(name, kind, kinds):
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Format/Datatype": k} for k in kinds],
        "Outputs": [],
    }


def test_precisions_are_read_from_the_engine_and_fp32_is_not_called_int8():
    engine = {
        "Layers": [
            layer(
                "conv1",
                "CaskConvolution",
                ["Thirty-two wide channel vectorized row major Int8 format"],
            ),
            layer("norm", "kgen", ["Row major linear FP16 format"]),
            layer("head", "gemm", ["Row major linear FP32 format"]),
        ],
        "Bindings": ["pixels"],
    }
    read = read_layers(engine)
    assert [r["precision"] for r in read] == ["int8", "fp16", "fp32"]
    assert tensorrt_build.require("int8", read) == {"int8": 1, "fp16": 1, "fp32": 1}
    with pytest.raises(
        BuildError, match=r"no layer takes int8 \(head in fp32\); do not call it int8"
    ):
        tensorrt_build.require("int8", read[1:])
    moved = read_layers(
        {
            "Layers": [
                layer(k, k, ["Row major Int8 format"])
                for k in ("Reformat", "Dequantize", "QuantizeLinear")
            ]
        }
    )
    with pytest.raises(
        BuildError, match=r"no layer takes int8 \(head in fp32\)"
    ):  # int8 was only carried about
        tensorrt_build.require("int8", [*read[1:], *moved])
    with pytest.raises(BuildError, match="no layer takes fp8"):
        tensorrt_build.require("fp8", read)
    assert read_layers({"Layers": ["opaque"]}) == [
        {"name": "opaque", "kind": "unknown", "precision": "unknown"}
    ]


def test_the_script_in_the_bundle_runs_alone_and_says_that_tensorrt_is_missing(shipped_bundle):
    script = shipped_bundle("tensorrt-int8") / "build_engine.py"
    code = "import runpy, sys; sys.modules['tensorrt'] = None; sys.argv = ['build_engine.py']; runpy.run_path(sys.path.pop(), run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.append({str(script)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: tensorrt: not installed")
    assert "Traceback" not in done.stderr
    assert onnx.load(script.parent / "image_encoder.onnx").opset_import[0].version == 19
