"""Several boards, or several bundles of one, in one table: what each costs, and which of them nothing else beats.

A row is on the Pareto front when no other row is at least as good on every axis and better on one. An axis takes part only where
every row has been measured on it, on the same terms: accuracy on as many images, energy of the same scope (a chip, a module, all
that a meter sees). What takes no part is named with the reason: not measured is neither good nor bad.
"""

from typing import Any

from edgeclip.device.records import BenchReport, ParityReport

AXES = {"accuracy": 1, "latency_ms_p90": -1, "energy_mj_per_image": -1, "image_encoder_bytes": -1}
"""what counts, and whether more (1) or less (-1) of it is better"""
TERMS = {"accuracy": "images", "energy_mj_per_image": "energy_scope"}
"""what must agree before an axis compares like with like"""
DOT_PRODUCT = {"aarch64": ("asimddp",), "x86_64": ("avx512_vnni", "avx_vnni", "amx_int8")}


def rows(benches: list[BenchReport], parities: list[ParityReport | None]) -> list[dict[str, Any]]:
    """One a bench report; a parity report counts when it is of the same bundle and device."""
    out = []
    for b, p in zip(benches, parities, strict=True):
        top1 = None
        images = None
        if p is not None and p.bundle == b.bundle and p.accuracy is not None:
            top1 = p.accuracy.bundle_top1
            images = p.images
        energy = b.energy_mj_per_image
        out.append(
            {
                "device": b.device,
                "target": b.target,
                "accuracy": top1,
                "latency_ms_p90": b.single_stream.latency_ms_p90 if b.single_stream else None,
                "images_per_second": b.offline.images_per_second if b.offline else None,
                "images": images,
                "energy_mj_per_image": energy,
                "energy_scope": scope(b.energy.source) if b.energy and energy is not None else None,
                "energy_mj_per_correct": None if energy is None or not top1 else energy / top1,
                "image_encoder_bytes": b.image_encoder_bytes,
                "peak_memory_mib": b.peak_memory_mib,
            }
        )
    return pareto(out)


def scope(source: str) -> str:
    """What a power reading of `power.find` or of a meter covers."""
    return {"RAPL": "the chip by RAPL", "meter": "all that the meter sees"}.get(
        source.partition(":")[0], f"the rails {source.partition(': ')[2]}"
    )


def pareto(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `on_front` (None where a row has no latency), `axes` and `left_out` (axis to reason) added."""
    timed = [r for r in table if r["latency_ms_p90"] is not None]
    left_out = {}
    for a in AXES:
        terms = {str(r.get(TERMS.get(a, ""))) for r in timed}
        if not timed or any(r[a] is None for r in timed):
            left_out[a] = "not measured on every row"
        elif len(terms) > 1:
            left_out[a] = f"{TERMS[a].replace('_', ' ')} differ: {', '.join(sorted(terms))}"
    axes = [a for a in AXES if a not in left_out]

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        differences = [AXES[x] * (a[x] - b[x]) for x in axes]
        return all(d >= 0 for d in differences) and any(d > 0 for d in differences)

    return [
        {
            **r,
            "axes": axes,
            "left_out": left_out,
            "on_front": not any(beats(o, r) for o in timed) if r in timed else None,
        }
        for r in table
    ]


def int8_gain(benches: list[BenchReport]) -> list[str]:
    """For each int8 bundle of ONNX Runtime beside the fp32 one of the same device: is it faster there, and could it be?"""
    lines = []
    timed = [b for b in benches if b.single_stream and b.ran.runtime == "onnxruntime"]
    for b in timed:
        base = next(
            (f for f in timed if f.device == b.device and f.ran.precision == "fp32"),
            None,
        )
        if base is None or b.ran.precision != "int8":
            continue
        times = base.single_stream.latency_ms_p50 / b.single_stream.latency_ms_p50
        known = DOT_PRODUCT.get(b.machine.arch)
        there = (
            None
            if known is None or b.machine.isa is None
            else bool(set(known) & set(b.machine.isa))
        )
        dot = (
            "unknown whether this core has dot-product"
            if there is None
            else f"this core has {'' if there else 'no '}dot-product"
        )
        faster = (
            f"{times:.2f} times as fast as"
            if times >= 1
            else f"slower than ({times:.2f} times as fast as)"
        )
        lines.append(f"{b.device}: {b.target} is {faster} {base.target}; {dot}")
    return lines
