"""Engines: built by the one builder, kept under all that they depend on, executed by calls in the
documented order.

TensorRT-RTX builds without a GPU up to the serialized engine. Execution has only met the fake
below, which proves the order of calls and nothing else: no figure of parity or time may come from
it.
"""

import sys
import types

import msgspec
import numpy as np
import pytest

from edgeclip import disk
from edgeclip.device.records import EngineConditions, Ran, to_json
from edgeclip.device.runtime import engine, open_session, tensorrt
from edgeclip.errors import EdgeclipError
from tests.support.machine_files import JETSON, fake
from tests.support.optional import require
from tests.support.reports import MACHINE

OPTIONS = {"batch": [1, 4, 8]}
RAN = Ran(runtime="tensorrt", version="10.3.0", threads=1, engine="k")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGECLIP_ENGINES", str(tmp_path / "engines"))


@pytest.fixture
def model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"a graph")
    return tmp_path / "m.onnx"


def make(plan=b"plan", timings=b"times", seen=None):
    def build(folder):
        cache = folder / "timing.cache"
        if seen is not None:
            seen.append(cache.read_bytes() if cache.exists() else None)
        (folder / "engine.plan").write_bytes(plan)
        cache.write_bytes(timings)
        return {"layers": [{"name": "conv", "kind": "conv", "precision": "int8"}]}

    return build


# --- the builder is tensorrt_build.py (tests/test_lint.py); here it fills the cache


@pytest.mark.parametrize("target", ["tensorrt-fp16", "tensorrt-int8"])
def test_a_shipped_bundles_engine_is_built_kept_and_taken_again(shipped_bundle, target):
    trt = require("tensorrt_rtx", "pip install 'edgeclip[lint]'")
    model = shipped_bundle(target) / "image_encoder.onnx"
    conditions = engine.conditions(model, trt.__version__, "8.9", tensorrt.OPTIONS)
    kept, built = engine.engine(conditions, lambda folder: tensorrt.make(trt, model, folder))
    assert (kept / "engine.plan").stat().st_size == built["engine_bytes"] > 1000 and built[
        "version"
    ] == trt.__version__
    assert engine.engine(conditions, lambda _: pytest.fail("built again")) == (kept, built)


def test_what_is_no_graph_is_one_line_and_leaves_no_engine(tmp_path):
    trt = require("tensorrt_rtx", "pip install 'edgeclip[lint]'")
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(EdgeclipError, match=r"m\.onnx: .*; "):
        engine.engine(CONDITIONS, lambda folder: tensorrt.make(trt, tmp_path / "m.onnx", folder))
    assert not list((tmp_path / "engines").rglob("*.plan"))


def test_cudas_library_is_found_where_pip_puts_it(tmp_path, monkeypatch):
    library = tmp_path / "nvidia" / "cu99" / "lib" / "libcudart.so.99"
    library.parent.mkdir(parents=True)
    library.touch()
    before = tensorrt._of_pip()
    monkeypatch.syspath_prepend(tmp_path)
    assert set(tensorrt._of_pip()) == {library, *before}


def test_where_there_is_no_tensorrt_there_is_an_install_line_and_no_other_runtime(
    model, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EdgeclipError, match="tensorrt: is not installed"):
        open_session("tensorrt", model, 1)


def test_where_there_is_no_cuda_the_reason_is_cudas(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="10.3.0"))
    with pytest.raises(EdgeclipError, match="CUDA: "):
        open_session("tensorrt", model, 1)


# --- what is kept


def test_conditions_are_read_from_the_board(model, tmp_path):
    c = engine.conditions(model, "10.3.0", "8.7", OPTIONS, fake(tmp_path / "root", JETSON))
    assert c == EngineConditions(
        onnx=disk.sha256(model),
        tensorrt="10.3.0",
        sm="8.7",
        jetpack="6.2+b77",
        l4t="36.4.3",
        power_mode="MAXN_SUPER",
        options=OPTIONS,
    )


CONDITIONS = EngineConditions(
    onnx="a" * 64,
    tensorrt="10.3.0",
    sm="8.7",
    jetpack="6.2",
    l4t="36.4.3",
    power_mode="15W",
    options=OPTIONS,
)


def changed(**fields):
    return msgspec.structs.replace(CONDITIONS, **fields)


def test_an_engine_is_built_once_under_the_same_conditions():
    first, built = engine.engine(CONDITIONS, make())
    assert (first / "engine.plan").read_bytes() == b"plan"
    assert disk.read_manifest(first, "engine")["conditions"] == to_json(CONDITIONS)
    assert engine.engine(changed(), lambda _: pytest.fail("built again")) == (first, built)


@pytest.mark.parametrize("field", EngineConditions.__struct_fields__)
def test_every_condition_that_changes_makes_another_engine(field):
    first, _ = engine.engine(CONDITIONS, make())
    second, _ = engine.engine(
        changed(**{field: {"other": 1} if field == "options" else "b" * 64}), make(b"another")
    )
    assert second != first
    assert (second / "engine.plan").read_bytes() == b"another"
    assert (first / "engine.plan").read_bytes() == b"plan"


def test_timings_are_taken_over_from_the_same_gpu_and_version_only():
    seen = []
    engine.engine(CONDITIONS, make(seen=seen))
    engine.engine(changed(power_mode="25W"), make(seen=seen))
    engine.engine(changed(tensorrt="10.7.0"), make(seen=seen))
    assert seen == [None, b"times", None]


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(tmp_path):
    def fails(_):
        raise EdgeclipError("m.onnx", "refused", "no")

    with pytest.raises(EdgeclipError, match="refused"):
        engine.engine(CONDITIONS, fails)
    assert (
        not list((tmp_path / "engines").rglob("*.plan"))
        and engine.engine(CONDITIONS, make())[0].exists()
    )


def test_a_changed_plan_is_not_run():
    kept, _ = engine.engine(CONDITIONS, make())
    (kept / "engine.plan").write_bytes(b"other")
    with pytest.raises(EdgeclipError, match=r"engine\.plan was changed"):
        engine.engine(CONDITIONS, make())


def test_old_engines_go_when_there_are_too_many():
    for i in range(engine.KEEP + 2):
        last, _ = engine.engine(changed(power_mode=f"{i} W"), make())
    assert len(list(last.parent.iterdir())) == engine.KEEP and last.exists()


# --- the order of calls


class Fake:
    """The documented API of runtime, engine, context and CUDA, writing down what is called. It
    computes nothing, and has no call that is not named here."""

    ANSWERS = types.MappingProxyType({"set_input_shape": True, "execute_async_v3": True})
    SILENT = frozenset(("set_tensor_address", "copy", "wait", "free"))

    def __init__(self):
        self.calls, self.shape = [], (1, 3, 8, 8)
        self.trt = types.SimpleNamespace(
            TensorIOMode=types.SimpleNamespace(INPUT="in", OUTPUT="out"), nptype=lambda t: t
        )

    def __getattr__(self, name):
        if name not in self.ANSWERS and name not in self.SILENT:
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, *arguments))
            return self.ANSWERS.get(name)

        return call

    def create_execution_context(self):
        return self

    def stream(self):
        self.calls.append(("stream",))
        return len(self.calls)

    def allocate(self, count):
        self.calls.append(("allocate", count))
        return len(self.calls)

    num_io_tensors = 2

    def get_tensor_name(self, i):
        return ("pixels", "image_features")[i]

    def get_tensor_mode(self, name):
        return {"pixels": "in", "image_features": "out"}[name]

    def get_tensor_dtype(self, name):
        return np.float32

    def get_tensor_shape(self, name):
        shaped = [c for c in self.calls if c[0] == "set_input_shape"]
        batch = shaped[-1][2][0] if shaped else -1
        return (batch, 3, 8, 8) if name == "pixels" else (batch, 16)


def test_the_calls_of_an_execution_are_in_the_documented_order():
    f = Fake()
    s = tensorrt.session(f.trt, f, object(), f, RAN)
    assert s.input == ("pixels", [None, 3, 8, 8], "float32") and s.output == (
        "image_features",
        [None, 16],
        "float32",
    )
    assert s.facts.engine == "k"
    f.calls.clear()
    assert s.run(np.zeros((2, 3, 8, 8))).shape == (2, 16)
    names = [c[0] for c in f.calls]
    assert names == [
        "set_input_shape",
        "allocate",
        "set_tensor_address",
        "copy",
        "allocate",
        "set_tensor_address",
        "execute_async_v3",
        "copy",
        "wait",
    ]
    copies = [c for c in f.calls if c[0] == "copy"]
    assert (copies[0][4], copies[1][4]) == (tensorrt.TO_DEVICE, tensorrt.TO_HOST)
    assert copies[0][3] == 2 * 3 * 8 * 8 * 4
    assert copies[1][3] == 2 * 16 * 4
    f.calls.clear()
    s.run(np.zeros((1, 3, 8, 8)))  # smaller: the buffers are large enough
    assert [c[0] for c in f.calls] == [
        "set_input_shape",
        "copy",
        "execute_async_v3",
        "copy",
        "wait",
    ]
    f.calls.clear()
    s.run(np.zeros((4, 3, 8, 8)))  # larger: freed before it is allocated anew
    assert [c[0] for c in f.calls][:4] == [
        "set_input_shape",
        "free",
        "allocate",
        "set_tensor_address",
    ]


def test_a_batch_beyond_the_profile_goes_in_parts():
    f = Fake()
    s = tensorrt.session(f.trt, f, object(), f, RAN)
    assert s.run(np.zeros((19, 3, 8, 8))).shape == (19, 16)
    assert [c[2][0] for c in f.calls if c[0] == "set_input_shape"] == [8, 8, 3]


def test_a_call_that_fails_is_an_error_never_another_runtime():
    f = Fake()
    f.execute_async_v3 = lambda stream: False
    s = tensorrt.session(f.trt, f, object(), f, RAN)
    with pytest.raises(EdgeclipError, match="execution failed"):
        s.run(np.zeros((1, 3, 8, 8)))


def test_an_engine_without_a_layer_of_its_precision_does_not_pass(shipped_bundle):
    from edgeclip.device.bundle import Bundle
    from edgeclip.device.validate import judge, observe

    bundle = Bundle.load(shipped_bundle("onnx-int8"))
    observed = observe(bundle, None)

    def failures(**layers):
        ran = msgspec.structs.replace(observed.ran, layers=layers)
        return judge(bundle, None, observed._replace(ran=ran), MACHINE).failures

    assert any("no layer takes int8" in f for f in failures(fp32=12))
    assert not any("no layer takes int8" in f for f in failures(fp32=2, int8=10))
