"""Compare several boards, or several bundles of one: which of them no other beats.

A row is on the Pareto front when no other row is at least as good on every axis and better on one.
An axis counts only where every row was measured on it, on the same terms: accuracy on as many
images, energy of the same scope (a chip, a module, all that a meter sees). An axis that is left out
is named with the reason: not measured is neither good nor bad.
"""

from collections.abc import Sequence

import msgspec

from edgeclip.device.bench_report import BenchReport
from edgeclip.device.records import (
    ParityReport,
    Record,
)

AXES = {"accuracy": 1, "latency_ms_p90": -1, "energy_mj_per_image": -1, "image_encoder_bytes": -1}
"""field of a row, and whether more (1) or less (-1) of it is better"""
TERMS = {"accuracy": "images", "energy_mj_per_image": "energy_scope"}
"""axis, and the field that must agree before it compares like with like"""
DOT_PRODUCT = {"aarch64": ("asimddp",), "x86_64": ("avx512_vnni", "avx_vnni", "amx_int8")}
"""instruction sets that make int8 fast"""


class Row(Record, kw_only=True):
    """One bundle on one device. None: not measured."""

    device: str | None = None
    target: str
    accuracy: float | None = None
    """top-1, 0..1, from the parity report of the same bundle and device"""
    latency_ms_p90: float | None = None
    """single_stream"""
    images_per_second: float | None = None
    """offline"""
    images: int | None = None
    """that the accuracy is of"""
    energy_mj_per_image: float | None = None
    energy_scope: str | None = None
    """what the power reading covers"""
    energy_mj_per_correct: float | None = None
    """energy per right answer"""
    image_encoder_bytes: int
    peak_memory_mib: int | None = None
    axes: list[str] = []
    """those on which the rows were compared"""
    left_out: dict[str, str] = {}
    """the other axes, with the reason"""
    on_front: bool | None = None
    """None: no latency was measured"""


def rows(benches: Sequence[BenchReport], parities: Sequence[ParityReport | None]) -> list[Row]:
    """Return a row per bench report, compared with each other.

    parities: the parity report of each; one of another bundle does not count.
    """
    table = []
    for bench, parity in zip(benches, parities, strict=True):
        if parity is not None and parity.bundle != bench.bundle:
            parity = None
        table.append(_row(bench, parity))
    return pareto(table)


def _row(bench: BenchReport, parity: ParityReport | None) -> Row:
    top1 = images = None
    if parity is not None and parity.accuracy is not None:
        top1 = parity.accuracy.bundle_top1
        images = parity.images

    energy = bench.energy_mj_per_image
    covered = per_correct = None
    if energy is not None and bench.energy is not None:
        covered = scope(bench.energy.source)
    if energy is not None and top1:
        per_correct = energy / top1

    return Row(
        device=bench.device,
        target=bench.target,
        accuracy=top1,
        latency_ms_p90=getattr(bench.single_stream, "latency_ms_p90", None),
        images_per_second=getattr(bench.offline, "images_per_second", None),
        images=images,
        energy_mj_per_image=energy,
        energy_scope=covered,
        energy_mj_per_correct=per_correct,
        image_encoder_bytes=bench.image_encoder_bytes,
        peak_memory_mib=bench.peak_memory_mib,
    )


def scope(source: str) -> str:
    """Return what a power reading covers. source: a power source's name, or "meter: FILE"."""
    kind = source.partition(":")[0]
    if kind == "RAPL":
        return "the chip by RAPL"
    if kind == "meter":
        return "all that the meter sees"
    return f"the rails {source.partition(': ')[2]}"


def pareto(table: Sequence[Row]) -> list[Row]:
    """Return the rows with `on_front`, `axes` and `left_out` filled in."""
    timed = [row for row in table if row.latency_ms_p90 is not None]
    left_out = {}
    for axis in AXES:
        why = _why_left_out(axis, timed)
        if why is not None:
            left_out[axis] = why
    axes = [axis for axis in AXES if axis not in left_out]

    compared = []
    for row in table:
        on_front = None
        if row.latency_ms_p90 is not None:
            on_front = not any(_beats(other, row, axes) for other in timed)
        new = msgspec.structs.replace(row, axes=axes, left_out=left_out, on_front=on_front)
        compared.append(new)
    return compared


def _why_left_out(axis: str, timed: Sequence[Row]) -> str | None:
    """Why an axis cannot be compared; None: it can."""
    if not timed or any(getattr(row, axis) is None for row in timed):
        return "not measured on every row"
    if axis not in TERMS:
        return None
    terms = {str(getattr(row, TERMS[axis])) for row in timed}
    if len(terms) == 1:
        return None
    return f"{TERMS[axis].replace('_', ' ')} differ: {', '.join(sorted(terms))}"


def _beats(one: Row, other: Row, axes: Sequence[str]) -> bool:
    better = False
    for axis in axes:
        gain = AXES[axis] * (getattr(one, axis) - getattr(other, axis))
        if gain < 0:
            return False
        if gain > 0:
            better = True
    return better


# --- what int8 gains


def int8_gain(benches: Sequence[BenchReport]) -> list[str]:
    """Return a line for each int8 bundle of ONNX Runtime, with its speed beside fp32's there.

    It is compared with the fp32 bundle of the same device; without one there is no line.
    """
    timed = [b for b in benches if b.single_stream and b.ran.runtime == "onnxruntime"]
    lines = []
    for bench in timed:
        base = _fp32_beside(bench, timed)
        if base is not None and bench.ran.precision == "int8":
            lines.append(_gain(bench, base))
    return lines


def _fp32_beside(bench: BenchReport, timed: Sequence[BenchReport]) -> BenchReport | None:
    for other in timed:
        if other.device == bench.device and other.ran.precision == "fp32":
            return other
    return None


def _gain(bench: BenchReport, base: BenchReport) -> str:
    assert bench.single_stream is not None
    assert base.single_stream is not None
    times = base.single_stream.latency_ms_p50 / bench.single_stream.latency_ms_p50
    faster = f"{times:.2f} times as fast as"
    if times < 1:
        faster = f"slower than ({faster})"
    return f"{bench.device}: {bench.target} is {faster} {base.target}; {_dot_product(bench)}"


def _dot_product(bench: BenchReport) -> str:
    known = DOT_PRODUCT.get(bench.machine.arch)
    if known is None or bench.machine.isa is None:
        return "unknown whether this core has dot-product"
    if set(known) & set(bench.machine.isa):
        return "this core has dot-product"
    return "this core has no dot-product"
