"""A runtime says what really runs, and does what was asked or fails."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from onnx import helper

from edgeclip.device.records import Ran
from edgeclip.device.runtime import INSTALL, RUNTIMES, Session, open_session
from edgeclip.device.runtime.onnxruntime import UNSAFE_IN_HALF, disabled_optimizers
from edgeclip.errors import EdgeclipError
from edgeclip.host.graph import trace as graph
from tests.support.optional import require


@pytest.fixture(scope="module")
def model(tmp_path_factory, student):
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    onnx.save(
        graph.to_onnx(student, torch.zeros(1, 3, 32, 32), "pixels", "image_features", 18), path
    )
    return path


def x(batch=2):
    return np.random.default_rng(0).normal(size=(batch, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("name", [b"batch", b"pixels", b"image_features"])
def test_a_name_that_is_no_utf8_is_one_line(model, tmp_path, name):
    broken = tmp_path / "m.onnx"
    broken.write_bytes(model.read_bytes().replace(name, b"\xee" + name[1:]))
    with pytest.raises(EdgeclipError, match=r"UTF-8|utf-8|cannot load it"):
        open_session("onnxruntime", broken, 1)


@pytest.mark.parametrize("optimization", ["all", "basic"])
def test_onnxruntime_answers_as_torch_and_says_what_it_is(model, student, optimization):
    import onnxruntime as ort

    session = open_session("onnxruntime", model, 1, optimization)
    with torch.inference_mode():
        np.testing.assert_allclose(
            session.run(x()), student(torch.from_numpy(x())).numpy(), atol=1e-5
        )
    assert session.input == ("pixels", [None, 3, 32, 32], "float32")
    assert session.output.name == "image_features"
    assert session.output.shape[0] is None
    assert session.output.dtype == "float32"
    assert session.facts == Ran(
        runtime="onnxruntime",
        version=ort.__version__,
        threads=1,
        providers=["CPUExecutionProvider"],
        optimization=optimization,
    )


def test_openvino_answers_as_torch_in_float32(model, student):
    openvino = require("openvino", "pip install 'edgeclip[openvino]'")
    session = open_session("openvino", model, 1)
    first = session.run(x())
    with torch.inference_mode():
        np.testing.assert_allclose(first, student(torch.from_numpy(x())).numpy(), atol=1e-4)
    read_only = x()
    read_only.setflags(write=False)
    for copied in (read_only, np.asfortranarray(x()), x().astype(np.float64)):
        assert (session.run(copied) == first).all()
    kept = first.copy()
    session.run(x() + 1)  # the answer is the caller's own, not the request's buffer
    assert (first == kept).all()
    assert session.input == (
        "pixels",
        [None, 3, 32, 32],
        "float32",
    ) and session.facts.providers == ["CPU"]
    assert openvino.__version__.startswith(session.facts.version)


LET_GO_ELSEWHERE = """
import signal, sys, threading
from pathlib import Path
from edgeclip.device.runtime import open_session
sessions = [open_session("openvino", Path(sys.argv[1]), 1)]
elsewhere = threading.Thread(target=sessions.clear)
elsewhere.start()
elsewhere.join()
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""


def test_a_signal_is_survived_after_an_openvino_session_went_in_another_thread(model):
    require("openvino", "pip install 'edgeclip[openvino]'")
    done = subprocess.run(
        [sys.executable, "-c", LET_GO_ELSEWHERE, model], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "handled\n", "")


def test_the_null_runtime_answers_the_same_to_anything():
    session = open_session("null", Path("none"), 1)
    assert isinstance(session, Session)
    assert session.run(x()) is session.run(x(5))
    assert session.facts.providers == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("content", [b"", b"no model at all"])
def test_a_broken_model_file_is_a_users_error(tmp_path, runtime, content):
    require(runtime, INSTALL[runtime])
    path = tmp_path / ("m.onnx" if runtime == "onnxruntime" else "m.xml")
    path.write_bytes(content)
    with pytest.raises(EdgeclipError, match=r"m\.(onnx|xml): .*cannot load it"):
        open_session(runtime, path, 1)


def test_a_graph_without_one_input_and_one_output_is_a_users_error(tmp_path):
    value = onnx.numpy_helper.from_array(np.ones(2, np.float32))
    node = helper.make_node("Constant", [], ["y"], value=value)
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    made = helper.make_model(
        helper.make_graph([node], "g", [], [out]), opset_imports=[helper.make_opsetid("", 17)]
    )
    made.ir_version = 8
    onnx.save(made, tmp_path / "x.onnx")
    with pytest.raises(
        EdgeclipError, match=r"x\.onnx: has 0 inputs and 1 outputs, not one of each"
    ):
        open_session("onnxruntime", tmp_path / "x.onnx", 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_for_float16_ends_in_any_bytes(seed):
    """A number where a length should be once sent it beyond the file's end, where it stayed."""
    rng = random.Random(seed)
    assert disabled_optimizers(bytes.fromhex("3808080808")) == []
    assert disabled_optimizers(b"\xff" * 100_000) == []
    for _ in range(300):
        head = bytes(rng.choice([0x38, 0x3A, 0x3D, 0x2A, 0x28, 0x10, 0x12, 0xFF]) for _ in range(6))
        content = head + rng.randbytes(rng.randrange(20))
        assert disabled_optimizers(content) in ([], list(UNSAFE_IN_HALF))


def test_an_unknown_runtime_offers_the_nearest():
    with pytest.raises(EdgeclipError, match="did you mean 'onnxruntime'"):
        open_session("onnxruntme", Path("none"), 1)


def test_every_runtime_but_the_null_one_has_an_install_line():
    assert set(RUNTIMES) <= set(INSTALL)


def test_threads_are_those_asked_for(model):
    assert open_session("onnxruntime", model, 2).facts.threads == 2
    require("openvino", "pip install 'edgeclip[openvino]'")
    assert open_session("openvino", model, 1).facts.threads == 1
    with pytest.raises(EdgeclipError, match=r"runs on \d+ thread\(s\), not on 10000"):
        open_session("openvino", model, 10_000)


def test_s8s8_is_integer_arithmetic_here_as_on_arm(tmp_path):
    """The scales make 1 / 128, so that one sum in 128 lies on a rounding boundary: sums of floats
    fall on either side of it.
    """
    rng = np.random.default_rng(0)
    x, w = (
        rng.integers(-100, 100, shape, dtype=np.int8) for shape in ((1, 8, 16, 16), (8, 8, 1, 1))
    )
    scale = {k: np.float32(v) for k, v in {"x": 0.1, "w": 0.3, "y": 0.06 * 64}.items()}
    nodes = [
        *(
            helper.make_node("DequantizeLinear", [k, f"{k}_scale", "zero"], [f"{k}_float"])
            for k in "xw"
        ),
        helper.make_node("Conv", ["x_float", "w_float"], ["y_float"]),
        helper.make_node("QuantizeLinear", ["y_float", "y_scale", "zero"], ["y_int"]),
        helper.make_node("DequantizeLinear", ["y_int", "y_scale", "zero"], ["y"]),
    ]
    constants = {"w": w, "zero": np.int8(0), **{f"{k}_scale": v for k, v in scale.items()}}
    ends = [
        helper.make_tensor_value_info(name, kind, x.shape)
        for name, kind in (("x", onnx.TensorProto.INT8), ("y", onnx.TensorProto.FLOAT))
    ]
    g = helper.make_graph(
        nodes,
        "g",
        ends[:1],
        ends[1:],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    onnx.save(
        helper.make_model(g, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "m.onnx",
    )
    sums = np.einsum("oi,bihw->bohw", w[:, :, 0, 0].astype(np.int64), x.astype(np.int64))
    expected = (
        np.rint(sums.astype(np.float32) * (scale["x"] * scale["w"] / scale["y"])).clip(-128, 127)
        * scale["y"]
    )
    found = open_session("onnxruntime", tmp_path / "m.onnx", 1).run(x)
    assert (found == expected).all() and np.unique(expected).size > 100
