"""A bench report says what ran, what it cost, and whether the device's budget allows it."""

import dataclasses

import msgspec
import pytest

from edgeclip.cli.tables import measured as tables
from edgeclip.device import machine
from edgeclip.device.bench import Plan, _whole_image, bench, check_with, cold_start, images_of
from edgeclip.device.bench_report import Scenario
from edgeclip.device.bundle import Bundle
from edgeclip.device.load import summary
from edgeclip.device.profile import Budget, Device, Minimum
from edgeclip.device.records import to_json
from edgeclip.device.rules import budgets, judged
from edgeclip.errors import EdgeclipError


@pytest.fixture(scope="module")
def measured(shipped_bundle):
    device = Device(
        runtimes=["onnxruntime"],
        offline_batch=4,
        budget=Budget(latency_ms_p90=1e-6, peak_memory_mib=1e9),
    )
    return bench(
        Bundle.load(shipped_bundle("onnx-fp32")),
        device,
        machine.facts(),
        None,
        Plan(Minimum(min_duration_s=0.05, min_query_count=30)),
    )


def test_a_report_says_what_ran_and_where(measured, shipped_bundle):
    assert measured.kind == "bench"
    assert measured.target == "onnx-fp32"
    assert measured.ran.threads == 1
    assert measured.short_run
    assert (
        measured.machine.arch
        and measured.image_encoder_bytes
        == Bundle.load(shipped_bundle("onnx-fp32")).manifest.image_encoder_bytes
    )


def test_every_scenario_reaches_its_minimum(measured):
    single, multi, offline = (
        measured.single_stream,
        measured.multi_stream,
        measured.offline,
    )
    assert multi.batch == 8
    assert multi.queries >= 30
    assert (multi.latency_ms_p99 is None) == (multi.queries < 1000)
    assert measured.sustained is None
    assert single.batch == 1
    assert single.queries >= 30
    assert offline.batch == 4
    assert 4 * offline.queries >= 30
    assert offline.images_per_second == pytest.approx(4e3 / offline.latency_ms_mean)


def test_percentiles_are_in_order(measured):
    s = measured.single_stream
    assert 0 < s.latency_ms_min <= s.latency_ms_p50 <= s.latency_ms_p90 <= s.latency_ms_p95
    assert (s.latency_ms_p99 is None) == (s.queries < 1000)


def test_stages_and_cold_start_are_measured_apart(measured):
    assert all(v > 0 for v in to_json(measured.stages).values())
    cold = measured.cold_start
    assert (
        cold.process_ms > cold.load_ms > 0 and measured.peak_memory_mib == cold.peak_memory_mib > 10
    )


def test_a_fresh_process_runs_where_the_bundle_does(shipped_bundle):
    bundle = Bundle.load(shipped_bundle("onnx-fp32"), providers=("CUDAExecutionProvider",))
    with pytest.raises(
        EdgeclipError, match=r"a fresh process cannot answer with it .*has no CUDAExecutionProvider"
    ):
        cold_start(bundle, runs=1)


def test_what_was_not_measured_is_null(measured, shipped_bundle):
    assert measured.energy_mj_per_image is None
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    bundle.labels = []  # one that only embeds
    found = _whole_image(bundle, images_of(bundle, None), Minimum(0.0, 5))
    assert found["stages"].head_ms is None


def test_a_meter_that_cannot_be_read_costs_the_energy_alone(shipped_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeclip.device.energy.IDLE_S", 0.0)
    r = bench(
        Bundle.load(shipped_bundle("onnx-fp32")),
        Device(runtimes=["onnxruntime"]),
        machine.facts(),
        None,
        Plan(Minimum(0.0, 5), ("single_stream",), meter_csv=tmp_path / "gone.csv"),
    )
    assert r.single_stream.queries >= 5 and r.energy is None
    assert len(r.failures) == 1
    assert r.failures[0].startswith("energy not measured: ")
    assert "there is no such file" in r.failures[0]


@pytest.mark.parametrize(
    ("isa", "says"),
    [
        (None, "ISA unknown"),
        ([], "ISA none that matters here"),
        (["asimddp", "i8mm"], "ISA asimddp, i8mm"),
    ],
)
def test_what_a_core_has_not_is_not_unknown(measured, capsys, isa, says):
    model = "Raspberry Pi 4 Model B"
    board = dataclasses.replace(measured.machine, isa=isa, cpu=None, device_tree_model=model)
    tables.bench([msgspec.structs.replace(measured, device="pi", machine=board)])
    assert f"pi: Raspberry Pi 4 Model B, {says}, 1 thread(s)" in capsys.readouterr().out


def test_only_the_exceeded_budget_is_a_failure(measured):
    quiet = msgspec.structs.replace(measured, others_busy=0.0)
    budget = Budget(latency_ms_p90=1e-6, peak_memory_mib=1e9)
    told = judged(quiet, Device(runtimes=["onnxruntime"], budget=budget))
    (failure,) = told.failures
    assert failure.startswith("p90 of the model alone: fails, ")
    assert [r.answer for r in told.rules] == ["fails", "holds"]
    assert told.verdict == "fails"


def test_a_scenario_that_was_not_asked_for_is_null(shipped_bundle):
    r = bench(
        Bundle.load(shipped_bundle("onnx-fp32")),
        Device(runtimes=["onnxruntime"]),
        machine.facts(),
        None,
        Plan(Minimum(0.0, 5), ("offline",)),
    )
    assert r.single_stream is None
    assert r.offline.queries >= 1
    assert r.failures == []


def test_sustained_load_is_told_in_tenths(shipped_bundle):
    device = Device(runtimes=["onnxruntime"])
    r = bench(
        Bundle.load(shipped_bundle("onnx-fp32")),
        device,
        machine.facts(),
        None,
        Plan(Minimum(0.0, 5), ("single_stream",), minutes=0.01),
    ).sustained
    assert len(r.windows) == 10
    assert r.minutes == pytest.approx(0.01)
    assert all(w.queries >= 1 for w in r.windows)
    assert r.p90_drift == pytest.approx(r.windows[-1].latency_ms_p90 / r.windows[0].latency_ms_p90)


def test_the_times_of_an_emulated_processor_are_refused(shipped_bundle):
    bundle, device = Bundle.load(shipped_bundle("onnx-fp32")), Device(runtimes=["onnxruntime"])
    here = dataclasses.replace(machine.facts(), emulated=True)
    r = bench(bundle, device, here, None, Plan(Minimum(0.0, 5), minutes=1.0))
    assert [
        getattr(r, k)
        for k in (
            "single_stream",
            "multi_stream",
            "offline",
            "stages",
            "cold_start",
            "sustained",
            "peak_memory_mib",
        )
    ] == [None] * 7
    assert (
        r.failures[0].startswith("timings refused: the processor is emulated")
        and r.ran.runtime == "onnxruntime"
    )


def asked(report, **budget):
    device = Device(runtimes=["onnxruntime"], budget=Budget(**budget))
    (rule,) = budgets(report, device)
    return rule


def test_a_budget_on_what_was_not_measured_cannot_be_told(measured):
    rule = asked(measured, energy_mj_per_image=5.0)
    assert (rule.answer, rule.found, rule.why) == ("cannot tell", None, "not measured")
    few = msgspec.structs.replace(
        measured,
        energy_mj_per_image=0.94,
        single_stream=Scenario(batch=1, images_per_second=1e3, **to_json(summary([1e-3] * 999))),
        others_busy=0.0,
    )
    assert asked(few, energy_mj_per_image=0.9).answer == "fails"
    rule = asked(few, latency_ms_p99=1e6)
    assert (rule.answer, rule.found) == ("cannot tell", None)


def test_every_budget_is_asked_of_a_figure(measured):
    many = msgspec.structs.replace(
        measured.single_stream, latency_ms_p99=1.0, latency_ms_p99_low=1.0
    )
    many = msgspec.structs.replace(many, latency_ms_p99_high=1.0)
    whole = msgspec.structs.replace(measured.whole_image, from_file=many, from_frame=many)
    report = msgspec.structs.replace(
        measured, energy_mj_per_image=1.0, single_stream=many, whole_image=whole, others_busy=0.0
    )
    for name in Budget.__struct_fields__:
        assert asked(report, **{name: 1e-9}).answer == "fails", name
        assert asked(report, **{name: 1e9}).answer == "holds", name


def test_an_interval_around_the_budget_cannot_tell(measured):
    single = msgspec.structs.replace(
        measured.single_stream, latency_ms_p90=2.0, latency_ms_p90_low=1.5, latency_ms_p90_high=2.5
    )
    report = msgspec.structs.replace(measured, single_stream=single, others_busy=0.0)
    answers = [asked(report, latency_ms_p90=ms).answer for ms in (1.4, 2.2, 2.6)]
    assert answers == ["fails", "cannot tell", "holds"]


def test_times_under_load_tell_nothing_and_sizes_still_do(measured):
    busy = msgspec.structs.replace(measured, others_busy=1.3)
    rule = asked(busy, latency_ms_p90=1e6)
    assert rule.answer == "cannot tell" and "1.3 processors" in rule.why
    assert asked(busy, bundle_mib=1e6).answer == "holds"
    lost = msgspec.structs.replace(measured, others_busy=float("nan"))
    assert asked(lost, latency_ms_p90=1e6).answer == "cannot tell"


def test_a_whole_image_is_more_than_its_model(measured):
    whole = measured.whole_image
    assert whole.from_file.queries >= 30
    assert whole.from_file.latency_ms_p50 > whole.from_frame.latency_ms_p50 > 0
    parts = sum(to_json(measured.stages).values())
    assert whole.from_file.latency_ms_min < parts < 2 * whole.from_file.latency_ms_mean
    assert measured.bundle_bytes > measured.image_encoder_bytes


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("onnx-fp32", "onnxruntime_perf_test"),
        ("openvino-int8", "benchmark_app"),
        ("tensorrt-int8", "trtexec"),
    ],
)
def test_a_sceptic_gets_the_runtimes_own_command_line(shipped_bundle, name, tool):
    line = check_with(Bundle.load(shipped_bundle(name), threads=3), Minimum())
    assert ("qdqisint8allowed|1'" in line) == name.startswith(
        "onnx"
    )  # as runtime/onnxruntime.py opens it
    assert f"{tool} " in line
    assert str(shipped_bundle(name)) in line
    assert "1024" in line
    assert tool == "trtexec" or " 3" in line


def test_a_provider_that_is_not_there_is_an_error_not_a_cpu(shipped_bundle):
    with pytest.raises(EdgeclipError, match="has no CUDAExecutionProvider"):
        _ = Bundle.load(
            shipped_bundle("onnx-fp32"), providers=("CUDAExecutionProvider", "CPUExecutionProvider")
        ).image_encoder
    assert Bundle.load(
        shipped_bundle("onnx-fp32"), providers=("CPUExecutionProvider",)
    ).image_encoder.facts.providers == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [("onnx-fp16", "fp16 stored, fp32 computed"), ("onnx-fp32", "fp32"), ("onnx-int8", "int8")],
)
def test_a_cpu_says_that_it_computes_fp16_in_fp32(shipped_bundle, monkeypatch, name, precision):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert Bundle.load(shipped_bundle(name)).precision == precision
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert Bundle.load(shipped_bundle(name)).precision == precision.replace(
        ", fp32", ", fp16 or fp32"
    )
