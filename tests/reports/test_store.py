"""Where reports lie, which one counts, what is kept of an earlier one, and the exit code of a
gate.
"""

import dataclasses

import pytest
from msgspec.structs import replace

from edgeclip import disk
from edgeclip.device.bench_report import BenchReport
from edgeclip.device.bundle import Bundle
from edgeclip.device.profile import Budget, Device
from edgeclip.device.records import ParityReport
from edgeclip.device.rules import judged
from edgeclip.reports import history
from edgeclip.reports.store import (
    CANNOT_TELL,
    GATE_FAILED,
    exit_code,
    joined,
    one_bundle,
    path,
    read,
    write,
)
from tests.support.reports import bench_report, parity_report, scenario, selftest_report


def test_what_was_not_measured_again_is_kept_from_the_report_before():
    measured = bench_report(multi_stream=scenario(batch=8), offline=scenario(batch=9))
    again = scenario(batch=1, queries=1)
    device = Device(runtimes=["onnxruntime"], budget=Budget(latency_ms_p90=1e3))
    new = replace(measured, single_stream=None, multi_stream=None, offline=again)
    new = judged(new, device, ["another"])
    assert new.rules[0].why == "not measured"
    cool = dataclasses.replace(measured.machine, temperature_c=1.0)
    whole = joined(new, replace(measured, machine=cool), device)
    assert whole.single_stream == measured.single_stream
    assert whole.offline == again
    assert whole.kept == ["single_stream", "multi_stream"]
    assert whole.failures == ["another"]
    assert [rule.answer for rule in whole.rules] == ["holds"]
    for change in (
        {"bundle": "another"},
        {"min_query_count": 31},
        {"others_busy": 2.0},
        {"ran": replace(measured.ran, threads=2)},
        {"machine": dataclasses.replace(measured.machine, cpu="c")},
    ):
        assert joined(new, replace(measured, **change), device) == new


def parity(verdict, failures=()):
    return parity_report(verdict=verdict, failures=list(failures))


PASS, FEW = parity("holds"), parity("cannot tell")
FAIL = parity("fails", ["accuracy drop 3.00 pp, above 1.0"])
FAST = bench_report()
SLOW = bench_report(failures=["p90 of the model alone: fails"], verdict="fails")
BUSY = bench_report(verdict="cannot tell")
WELL = selftest_report("pass", "not possible here")
ILL = selftest_report("pass", "fail")


@pytest.mark.parametrize(
    ("reports", "code"),
    [
        ([], 0),
        ([PASS, FEW], CANNOT_TELL),
        ([FEW, FAIL], GATE_FAILED),
        ([FAIL, FEW], GATE_FAILED),
        ([FAST], 0),
        ([FAST, SLOW], GATE_FAILED),
        ([FAST, BUSY], CANNOT_TELL),
        ([BUSY, SLOW], GATE_FAILED),
        ([WELL], 0),
        ([WELL, ILL], GATE_FAILED),
    ],
)
def test_the_exit_code_of_a_gate(reports, code):
    assert exit_code(reports) == code


def test_the_codes_are_those_of_the_docs():
    assert GATE_FAILED == 3
    assert CANNOT_TELL == 4


def test_the_bundle_that_is_meant_is_of_this_processor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("onnx-int8", "onnx-int8-arm", "onnx-fp32"):
        (tmp_path / "runs/latest/bundles" / name).mkdir(parents=True)
    for arch, name in (("x86_64", "onnx-int8"), ("aarch64", "onnx-int8-arm")):
        monkeypatch.setattr("platform.machine", lambda arch=arch: arch)
        assert one_bundle(None).name == name


def test_a_quick_look_does_not_replace_the_verdict_of_more_images(own_bundle, tmp_path, capsys):
    bundle = Bundle.load(own_bundle("onnx-fp32"))
    digest = disk.sha256(bundle.folder / disk.MANIFEST)
    whole = parity_report(bundle=digest, images=400)
    quick = parity_report(bundle=digest, images=40, verdict="cannot tell")
    write(whole, "host-cpu", tmp_path, bundle)
    assert write(quick, "host-cpu", tmp_path, bundle).verdict == "cannot tell"
    assert read(tmp_path, bundle, "host-cpu", ParityReport).images == 400
    assert "which counts" in capsys.readouterr().err
    (aside,) = (tmp_path / "reports").glob("*.parity-40-images.json")
    assert disk.read_record(aside, ParityReport).images == 40
    # Another runtime is another question.
    other = replace(quick, ran=replace(quick.ran, version="2"))
    write(other, "host-cpu", tmp_path, bundle)
    assert read(tmp_path, bundle, "host-cpu", ParityReport).images == 40


def test_every_report_is_remembered_the_lesser_ones_too(own_bundle, tmp_path):
    bundle = Bundle.load(own_bundle("onnx-fp32"))
    digest = disk.sha256(bundle.folder / disk.MANIFEST)
    write(parity_report(bundle=digest, images=400), "host-cpu", tmp_path, bundle)
    write(parity_report(bundle=digest, images=40), "host-cpu", tmp_path, bundle)
    write(bench_report(bundle=digest), "host-cpu", tmp_path, bundle)
    entries = history.read(path(tmp_path, bundle, "host-cpu", "history"))
    assert [(e.kind, e.images, e.model_ms_p90) for e in entries] == [
        ("parity", 400, None),
        ("parity", 40, None),
        ("bench", None, 2.0),
    ]
    assert {e.bundle for e in entries} == {digest}


@pytest.mark.parametrize(
    ("worse", "word"),
    [
        ({"others_busy": 1.5}, "under-load"),
        ({"short_run": True}, "short"),
        ({"others_busy": 1.5, "short_run": True}, "under-load"),
    ],
)
def test_worse_times_do_not_replace_better_ones(own_bundle, tmp_path, worse, word):
    bundle = Bundle.load(own_bundle("onnx-fp32"))
    good = bench_report(
        bundle=disk.sha256(bundle.folder / disk.MANIFEST), others_busy=0.0, short_run=False
    )
    write(good, "host-cpu", tmp_path, bundle)
    write(replace(good, **worse, warm_up=11), "host-cpu", tmp_path, bundle)
    assert read(tmp_path, bundle, "host-cpu", BenchReport).warm_up == 10
    (aside,) = (tmp_path / "reports").glob(f"*.bench-{word}.json")
    assert disk.read_record(aside, BenchReport).warm_up == 11
    write(replace(good, warm_up=12), "host-cpu", tmp_path, bundle)  # as good and newer
    assert read(tmp_path, bundle, "host-cpu", BenchReport).warm_up == 12


def test_a_quiet_short_run_replaces_a_loaded_long_one(own_bundle, tmp_path):
    bundle = Bundle.load(own_bundle("onnx-fp32"))
    digest = disk.sha256(bundle.folder / disk.MANIFEST)
    loaded = bench_report(bundle=digest, others_busy=1.0, short_run=False)
    write(loaded, "host-cpu", tmp_path, bundle)
    write(replace(loaded, others_busy=0.1, short_run=True), "host-cpu", tmp_path, bundle)
    assert read(tmp_path, bundle, "host-cpu", BenchReport).others_busy == 0.1
