"""A runtime says what really runs, and does what was asked or fails."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import require

from edgeclip.errors import EdgeclipError
from edgeclip.export import graph
from edgeclip.runtime import INSTALL, RUNTIMES, Session, open_session


@pytest.fixture(scope="module")
def model(tmp_path_factory, student):
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    onnx.save(graph.to_onnx(student, torch.zeros(1, 3, 32, 32), "pixels", "image_features", 18), path)
    return path


def x(batch=2):
    return np.random.default_rng(0).normal(size=(batch, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("optimisation", ["all", "basic"])
def test_onnxruntime_answers_as_torch_and_says_what_it_is(model, student, optimisation):
    import onnxruntime as ort

    session = open_session("onnxruntime", model, 1, optimisation)
    with torch.inference_mode():
        np.testing.assert_allclose(session.run(x()), student(torch.from_numpy(x())).numpy(), atol=1e-5)
    assert session.input == ("pixels", [None, 3, 32, 32], "float32")
    assert session.output.name == "image_features" and session.output.shape[0] is None and session.output.dtype == "float32"
    assert session.facts == {
        "runtime": "onnxruntime",
        "version": ort.__version__,
        "providers": ["CPUExecutionProvider"],
        "threads": 1,
        "optimisation": optimisation,
    }


def test_openvino_answers_as_torch_in_float32(model, student):
    openvino = require("openvino", "pip install 'edgeclip[openvino]'")
    session = open_session("openvino", model, 1)
    first = session.run(x())
    with torch.inference_mode():
        np.testing.assert_allclose(first, student(torch.from_numpy(x())).numpy(), atol=1e-4)
    kept = first.copy()
    session.run(x() + 1)  # the answer is the caller's own, not the request's buffer
    assert (first == kept).all()
    assert session.input == ("pixels", [None, 3, 32, 32], "float32") and session.facts["providers"] == ["CPU"]
    assert openvino.__version__.startswith(session.facts["version"])


def test_the_null_runtime_answers_the_same_to_anything():
    session = open_session("null", Path("none"), 1)
    assert isinstance(session, Session) and session.run(x()) is session.run(x(5)) and session.facts["providers"] == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("content", [b"", b"no model at all"])
def test_a_broken_model_file_is_a_users_error(tmp_path, runtime, content):
    require(runtime, INSTALL[runtime])
    path = tmp_path / ("m.onnx" if runtime == "onnxruntime" else "m.xml")
    path.write_bytes(content)
    with pytest.raises(EdgeclipError, match=r"m\.(onnx|xml): .*cannot load it"):
        open_session(runtime, path, 1)


def test_an_unknown_runtime_offers_the_nearest():
    with pytest.raises(EdgeclipError, match="did you mean 'onnxruntime'"):
        open_session("onnxruntme", Path("none"), 1)


def test_every_runtime_but_the_null_one_has_an_install_line():
    assert set(RUNTIMES) - {"null"} <= set(INSTALL)


def test_threads_are_those_asked_for(model):
    assert open_session("onnxruntime", model, 2).facts["threads"] == 2
