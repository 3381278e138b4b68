"""Where reports lie, which one counts, what is kept of an earlier one, and the exit code of a gate."""

import pytest

from edgeclip.device.profile import Budget, Device
from edgeclip.reports.store import GATE_FAILED, TOO_FEW, exit_code, joined, one_bundle

LATENCY = {"latency_ms_p90": 2.0}


@pytest.fixture
def measured():
    """A whole bench report, as far as `joined` reads it."""
    return {
        "kind": "bench",
        "bundle": "a",
        "machine": {"cpu": "x", "temperature_c": 50.0},
        "ran": {"runtime": "onnxruntime", "threads": 1},
        "min_duration_s": 0.05,
        "min_query_count": 30,
        "single_stream": LATENCY,
        "multi_stream": LATENCY,
        "offline": {"queries": 9},
        "sustained": None,
        "energy": None,
        "energy_mj_per_image": None,
        "peak_memory_mib": 9,
        "failures": [],
    }


def test_what_was_not_measured_again_is_kept_from_the_report_before(measured):
    new = {
        **measured,
        "single_stream": None,
        "multi_stream": None,
        "offline": {"queries": 1},
        "failures": ["latency_ms_p90 not measured, budget 1000.0", "another"],
    }
    device = Device(runtimes=["onnxruntime"], budget=Budget(latency_ms_p90=1e3))
    cool = {**measured, "machine": {**measured["machine"], "temperature_c": 1.0}}
    whole = joined(new, cool, device)
    assert whole["single_stream"] == measured["single_stream"]
    assert whole["offline"] == {"queries": 1}
    assert whole["kept"] == ["single_stream", "multi_stream"]
    assert whole["failures"] == ["another"]
    for change in (
        {"bundle": "b"},
        {"min_query_count": 31},
        {"ran": {**measured["ran"], "threads": 2}},
        {"machine": {**measured["machine"], "cpu": "c"}},
    ):
        assert joined(new, {**measured, **change}, device) == new


def parity(verdict, failures=()):
    return {"kind": "parity", "verdict": verdict, "failures": list(failures)}


PASS, FEW, GOLDEN = parity("pass"), parity("too few images"), parity("golden images only")
FAIL = parity("fail", ["accuracy drop 3.00 pp, above 1.0"])
FAST, SLOW = ({"kind": "bench", "failures": f} for f in ([], ["latency_ms_p90 9.00, budget 5.0"]))
WELL, ILL = (
    {"kind": "selftest", "steps": [{"status": "pass"}, {"status": s}]}
    for s in ("not possible here", "fail")
)


@pytest.mark.parametrize(
    ("reports", "code"),
    [
        ([], 0),
        ([PASS, GOLDEN], 0),
        ([PASS, FEW], TOO_FEW),
        ([FEW, FAIL], GATE_FAILED),
        ([FAIL, FEW], GATE_FAILED),
        ([FAST], 0),
        ([FAST, SLOW], GATE_FAILED),
        ([WELL], 0),
        ([WELL, ILL], GATE_FAILED),
    ],
)
def test_the_exit_code_of_a_gate(reports, code):
    assert exit_code(reports) == code


def test_the_codes_are_those_of_the_docs():
    assert GATE_FAILED == 3
    assert TOO_FEW == 4


def test_the_bundle_that_is_meant_is_of_this_processor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("onnx-int8", "onnx-int8-arm", "onnx-fp32"):
        (tmp_path / "runs/latest/bundles" / name).mkdir(parents=True)
    for arch, name in (("x86_64", "onnx-int8"), ("aarch64", "onnx-int8-arm")):
        monkeypatch.setattr("platform.machine", lambda arch=arch: arch)
        assert one_bundle(None).name == name
