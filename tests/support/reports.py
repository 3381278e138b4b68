"""Reports as the verbs make them, for tests that measure nothing."""

from typing import Any

import msgspec

from edgeclip.device import bench_report as B
from edgeclip.device import records as R
from edgeclip.device.machine import Facts
from edgeclip.device.target import Tolerance

MACHINE = Facts(arch="x86_64", python="3.11.2", os="an os", cpu="a cpu", isa=[])
RAN = R.Ran(runtime="onnxruntime", version="1", threads=1, precision="fp32")
CLOSE = R.Closeness(
    raw_p1=0.99, raw_p5=0.99, raw_min=0.99, centered_p1=0.98, centered_p5=0.98, centered_min=0.98
)
TOLERANCE = Tolerance(centered_cosine_p1=0.9, top1_agreement=0.9, accuracy_drop_pp=1.0)


def accuracy(top1: float = 0.8, drop_pp: float = 0.0, upper_pp: float = 0.5) -> R.Accuracy:
    return R.Accuracy(
        drop_pp=drop_pp,
        upper_pp=upper_pp,
        lost=0,
        won=0,
        images=400,
        reference_top1=top1 + drop_pp / 100,
        bundle_top1=top1,
    )


def parity_report(**changes: Any) -> R.ParityReport:
    """Return a parity report that passes."""
    report = R.ParityReport(
        target="t",
        bundle="b",
        machine=MACHINE,
        ran=RAN,
        tolerance=TOLERANCE,
        golden=R.GoldenAnswers(images=8, cosine_min=0.99),
        not_compared=None,
        images=400,
        cosine=CLOSE,
        top1_agreement=0.99,
        agreement_where_right=0.999,
        accuracy=accuracy(),
        verdict="holds",
    )
    return msgspec.structs.replace(report, **changes)


def scenario(p50: float = 1.0, p90: float = 2.0, batch: int = 1, queries: int = 2000) -> B.Scenario:
    return B.Scenario(
        queries=queries,
        seconds=1.0,
        latency_ms_min=p50,
        latency_ms_mean=p50,
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p95=p90,
        latency_ms_p99=p90,
        latency_ms_p90_low=p90,
        latency_ms_p90_high=p90,
        latency_ms_p99_low=p90,
        latency_ms_p99_high=p90,
        batch=batch,
        images_per_second=1e3 * batch / p50,
    )


def energy(source: str = "RAPL: package", mj: float = 3.0) -> B.Energy:
    return B.Energy(
        source=source,
        samples_idle=100,
        samples_load=600,
        rate_hz=10.0,
        idle_w=4.0,
        load_w=9.0,
        steady=True,
        mj_per_image=mj,
        mj_per_image_half_width=0.1,
        images=600,
        seconds=60.0,
    )


def bench_report(**changes: Any) -> B.BenchReport:
    """Return a bench report of the single stream alone, within its budget."""
    report = B.BenchReport(
        target="t",
        bundle="b",
        machine=MACHINE,
        ran=RAN,
        warm_up=10,
        min_duration_s=60.0,
        min_query_count=1024,
        short_run=False,
        single_stream=scenario(),
        stages=B.Stages(1.0, 1.0, 1.0, 1.0),
        cold_start=B.ColdStart(3, 500.0, 400.0, 10.0, 90),
        peak_memory_mib=90,
        image_encoder_bytes=3 << 20,
        check_with="a tool",
        verdict="holds",
    )
    return msgspec.structs.replace(report, **changes)


NOVEL = R.SetAccuracy(
    name="novel",
    note="",
    classes=4,
    reference_top1=0.44,
    bundle_top1=0.4321,
    drop_pp=0.79,
    upper_pp=2.0,
    lost=1,
    won=0,
    images=17,
)


def host_parity(**changes: Any) -> R.ParityReport:
    """Return a parity report of host-cpu that passes, with one set."""
    fields = {
        "device": "host-cpu",
        "accuracy": accuracy(0.4975, drop_pp=0.25, upper_pp=0.75),
        "sets": [NOVEL],
    }
    return parity_report(**fields | changes)


def host_bench(**changes: Any) -> B.BenchReport:
    """Return a bench report of host-cpu without a p99."""
    single = msgspec.structs.replace(scenario(p50=1.5, p90=2.25), latency_ms_p99=None)
    return bench_report(**{"device": "host-cpu", "single_stream": single} | changes)


def selftest_report(*statuses: str) -> R.SelftestReport:
    """Return a self-test's report with steps of these statuses."""
    from edgeclip.device.machine import State
    from edgeclip.device.target import NamedTarget

    target = NamedTarget(name="t", runtime="onnxruntime", precision="fp32", tolerance=TOLERANCE)
    steps = []
    for i, status in enumerate(statuses):
        steps.append(R.SelftestStep(step=f"step {i}", status=status, seconds=0.1))
    return R.SelftestReport(
        edgeclip="0.2.0",
        machine=MACHINE,
        state=State(time=0.0, free_disk_mib=9000),
        target=target,
        bundle="b",
        steps=steps,
    )
