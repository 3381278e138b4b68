"""Tables of `validate` and `bench`: what a device does to a bundle."""

from collections.abc import Sequence
from typing import Any

from edgeclip.cli.tables import plain
from edgeclip.cli.tables.plain import NOT_MEASURED, mebibytes, number, table
from edgeclip.device import rules
from edgeclip.device.bench_report import BenchReport, Beside, Energy, Latency, Sustained
from edgeclip.device.load import P99_QUERIES
from edgeclip.device.machine import processor
from edgeclip.device.per_class import shown
from edgeclip.device.records import ParityReport
from edgeclip.reports import earlier, worth
from edgeclip.reports.comparison import Row

PARITY = (
    "target",
    "images",
    "cosine p1 centered",
    "raw",
    "top-1 agreement",
    "where fp32 is right",
    "unseen images",
    "top-1 fp32",
    "top-1",
    "top-1 lost pp",
    "at most pp",
    "verdict",
)
BENCH = (
    "target",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "multi p99 ms",
    "offline /s",
    "image to label p90 ms",
    "camera to label p90 ms",
    "decode ms",
    "preprocess ms",
    "model ms",
    "head ms",
    "cold start ms",
    "mJ",
    "peak MiB",
    "image encoder MiB",
    "bundle MiB",
    "verdict",
)
COMPARISON = (
    "device",
    "target",
    "top-1",
    "p90 ms",
    "offline /s",
    "mJ",
    "mJ per right answer",
    "image encoder MiB",
    "front",
)
STEADY = {True: "steady", False: "still warming up", None: "temperature unknown"}


# --- validate


def parity(reports: Sequence[ParityReport]) -> None:
    """Print how close each bundle is to the fp32 student."""
    table([_parity_row(report) for report in reports], PARITY)
    for report in reports:
        for line in _parity_lines(report):
            plain.line(f"{report.target}: {line}")


def _parity_row(report: ParityReport) -> list[Any]:
    cells: list[str | int | None] = [None] * 9
    accuracy = report.accuracy
    cosine = report.cosine
    if cosine is not None:
        cells[:4] = [
            number(cosine.centered_p1, 4),
            number(cosine.raw_p1, 4),
            number(report.top1_agreement, 4),
            number(report.agreement_where_right, 4),
        ]
    if accuracy is not None:
        cells[4:] = [
            accuracy.images,
            number(accuracy.reference_top1, 4),
            number(accuracy.bundle_top1, 4),
            number(accuracy.drop_pp, 2),
            number(accuracy.upper_pp, 2),
        ]
    return [report.target, report.images, *cells, report.verdict]


def _parity_lines(report: ParityReport) -> list[str]:
    lines = [rules.line(rule) for rule in report.rules]
    lines += [failure for failure in report.failures if failure not in lines]
    if report.waterfall is not None:
        lines.append(f"steps: {report.waterfall.most}")
    if report.slices:
        lines.append(f"slices: {_slices(report)}")
    if report.earlier is not None:
        lines.append(earlier.sentence(report.earlier))
    if report.not_compared is not None:
        cosine = number(report.golden.cosine_min, 4) or "not finite"
        why = f"only its golden images were compared (cosine {cosine})"
        lines.append(f"{report.not_compared}: {why}")
    return lines


def _slices(report: ParityReport) -> str:
    """Return the slice that lost most, and how many are unknown."""
    known = [s for s in report.slices if s.drop_pp is not None]
    few = len(report.slices) - len(known) + report.slices_left_out
    words = []
    if known:
        worst = max(known, key=lambda s: s.drop_pp or 0.0)
        limits = f"{worst.lower_pp:.2f} to {worst.upper_pp:.2f}, of {worst.images:,}"
        lost = f"{worst.drop_pp:.2f} pp lost on {shown(worst.name)} ({limits})"
        words.append(f"{lost}, the most of {report.slices_judged} slices")
    if few:
        words.append(f"{few} unknown or not listed")
    return ", ".join(words)


# --- bench


def bench(reports: Sequence[BenchReport], besides: Sequence[Beside] = ()) -> None:
    """Print what each bundle costs on one device; besides: how they compare turn by turn."""
    table([_bench_row(report) for report in reports], BENCH)
    first = reports[0]
    plain.line(_machine(first))
    if any(report.short_run for report in reports):
        least = f"at least {first.min_duration_s:g} s and {first.min_query_count} queries"
        plain.line(f"short run: {least}, where MLPerf asks for 60 s and 1,024")
    for report in reports:
        for line in _bench_lines(report):
            plain.line(f"{report.target}: {line}")
    for beside in besides:
        for line in worth.lines(beside):
            plain.line(line)
    for report in reports:
        plain.line(f"check {report.target} with: {report.check_with}")


def _bench_row(report: BenchReport) -> list[Any]:
    single = report.single_stream
    stages = report.stages
    whole = report.whole_image
    values = [
        getattr(single, "latency_ms_p50", None),
        getattr(single, "latency_ms_p90", None),
        _p99(single),
        _p99(report.multi_stream),
        getattr(report.offline, "images_per_second", None),
        getattr(whole and whole.from_file, "latency_ms_p90", None),
        getattr(whole and whole.from_frame, "latency_ms_p90", None),
        getattr(stages, "decode_ms", None),
        getattr(stages, "preprocess_ms", None),
        getattr(stages, "model_ms", None),
        getattr(stages, "head_ms", None),
        getattr(report.cold_start, "process_ms", None),
        report.energy_mj_per_image,
    ]
    cells = [v if isinstance(v, str) else number(v, 2) for v in values]
    size = mebibytes(report.image_encoder_bytes)
    whole_size = None
    if report.bundle_bytes is not None:
        whole_size = mebibytes(report.bundle_bytes)
    return [report.target, *cells, report.peak_memory_mib, size, whole_size, report.verdict]


def _p99(latency: Latency | None) -> float | str | None:
    """Return a p99, or why it was withheld."""
    if latency is None:
        return None
    if latency.latency_ms_p99 is None:
        return f"too few: {latency.queries:,} of {P99_QUERIES:,}"
    return latency.latency_ms_p99


def _machine(report: BenchReport) -> str:
    isa = "unknown"
    if report.machine.isa is not None:
        isa = ", ".join(report.machine.isa) or "none that matters here"
    how = f"{report.ran.threads} thread(s), warm-up {report.warm_up} queries"
    return f"{report.device}: {processor(report.machine)}, ISA {isa}, {how}"


def _bench_lines(report: BenchReport) -> list[str]:
    lines = []
    precision = report.ran.precision or ""
    if "stored" in precision:
        lines.append(precision)
    if report.energy is not None:
        lines.append(_energy(report.energy))
    if report.sustained is not None:
        lines.append(_sustained(report.sustained))
    if report.kept:
        lines.append(f"kept from the last report, not measured now: {', '.join(report.kept)}")
    if rules.loaded(report):
        lines.append(f"times unknown: {rules.under_load(report)}")
    told = [rules.line(rule) for rule in report.rules]
    return lines + told + [failure for failure in report.failures if failure not in told]


def _energy(energy: Energy) -> str:
    rate = "too few samples"
    if energy.rate_hz is not None:
        watts = f"idle {energy.idle_w:.2f} W, load {energy.load_w:.2f} W"
        rate = f"{energy.rate_hz:.1f} Hz, {watts}"
    image = ""
    if energy.mj_per_image is not None:
        half = energy.mj_per_image_half_width
        image = f", {energy.mj_per_image:.2f} +- {half:.2f} mJ per image (scatter only)"
    return f"energy by {energy.source}: {rate}{image}, {STEADY[energy.steady]}"


def _sustained(load: Sustained) -> str:
    throttled = "throttling unknown"
    if load.throttled is not None:
        throttled = f"throttled: {', '.join(load.throttled) or 'no'}"
    if load.throttled_before:
        throttled += " (and before, since the board was started)"
    first = load.windows[0].temperature_c
    last = load.windows[-1].temperature_c
    hot = f"temperature {NOT_MEASURED}"
    if first is not None and last is not None:
        hot = f"{first:.0f} to {last:.0f} degrees C"
    drift = f"p90 of the last tenth is {load.p90_drift:.2f} times the first's"
    return f"{load.minutes:g} minutes of load: {drift}; {hot}; {throttled}"


# --- several devices


def comparison(rows: Sequence[Row], lines: Sequence[str]) -> None:
    """Print several devices or bundles in one table, and what int8 gains."""
    table([_comparison_row(row) for row in rows], COMPARISON)
    if rows:
        axes = ", ".join(rows[0].axes) or "anything, since nothing was measured"
        plain.line(f"*: not beaten on {axes}")
        for axis, why in rows[0].left_out.items():
            plain.line(f"{axis} is left out: {why}")
    for line in lines:
        plain.line(line)


def _comparison_row(row: Row) -> list[Any]:
    front = {True: "*", False: "", None: None}[row.on_front]
    return [
        row.device,
        row.target,
        number(row.accuracy, 4),
        number(row.latency_ms_p90, 2),
        number(row.images_per_second, 1),
        number(row.energy_mj_per_image, 2),
        number(row.energy_mj_per_correct, 2),
        mebibytes(row.image_encoder_bytes),
        front,
    ]
