"""What the commands print: tables for people, from the same records that `--json` prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgeclip.cli.options import say
from edgeclip.device.machine import processor
from edgeclip.device.records import BenchReport, ParityReport, SelftestReport
from edgeclip.reports.models import MODELS

NOT_MEASURED = "not measured"
INERT = 0.01
"""below this alpha EduAttention moves a unit feature by less than a hundredth of its length"""


def table(rows: Sequence[Sequence[Any]], headers: list[str]) -> None:
    from tabulate import tabulate

    click.echo(
        tabulate(
            [[NOT_MEASURED if c is None else c for c in row] for row in rows],
            headers,
            disable_numparse=True,
        )
    )


def _sets(results: dict[str, Any]) -> None:
    rows = []
    for s in results["sets"]:
        always = ("student", "student_teacher_text", "student_own_text")
        shown = [
            "teacher",
            *(
                m
                for m in MODELS
                if s.get(m) and m != "teacher" and (m in always or results["edu_attention"])
            ),
        ]
        for model in shown:
            top1, top5 = (
                (f"{s[model][k]:.3f}" for k in ("top1", "top5")) if s[model] else (None, None)
            )
            rows.append(
                [
                    s["name"],
                    MODELS[model],
                    top1,
                    top5,
                    f"{s['chance_top1']:.4f}",
                    s["images"],
                    s["classes"],
                ]
            )
    table(rows, ["set", "model", "R@1", "R@5", "chance", "images", "classes"])
    for field, what in (
        ("harmonic_mean", "harmonic mean of base and novel"),
        ("average", "average R@1"),
    ):
        for model, value in results.get(field, {}).items():
            if model in ("teacher", "student") or results["edu_attention"]:
                click.echo(f"{what}, {MODELS[model]}: {value:.3f}")
    if results["edu_attention"]:
        alpha = results["edu_attention"]["alpha"]
        gains = []
        for s in results["sets"]:
            with_it = (
                s["student"]
                if results["edu_attention"]["kept"]
                else s.get("student_with_edu_attention")
            )
            gain = (
                f"{100 * (with_it['top1'] - s['student_without_edu_attention']['top1']):+.1f} pp"
                if with_it
                else NOT_MEASURED
            )
            gains.append(f"{gain} on {s['name']}")
        inert = "; it stayed inert" if abs(alpha) < INERT else ""
        click.echo(
            f"edu attention: alpha {alpha:+.3f} at the end{inert}; R@1 with it minus without: {', '.join(gains)}"
        )
    for s in results["sets"]:
        click.echo(f"{s['name']}: {s['note']}")


def protocol(results: dict[str, Any]) -> None:
    if results["protocol"] == "retrieval":
        rows = []
        for s in results["sets"]:
            for model in ("teacher", "student"):
                for way in ("image_to_text", "text_to_image"):
                    value = s[model][way] if s[model] else {}
                    chance = "/".join(
                        f"{s['student'][way][f'chance_r{k}']:.3f}" for k in (1, 5, 10)
                    )
                    of_model = [f"{value[f'r{k}']:.3f}" if value else None for k in (1, 5, 10)]
                    rows.append(
                        [
                            s["name"],
                            MODELS[model],
                            way.replace("_", " "),
                            *of_model,
                            chance,
                            s["images"],
                            s["texts"],
                        ]
                    )
        table(rows, ["set", "model", "way", "R@1", "R@5", "R@10", "chance", "images", "texts"])
        for s in results["sets"]:
            click.echo(f"{s['name']}: {s['note']}")
    else:
        _sets(results)
    click.echo(f"text side: {results['text_side']}")
    click.echo(f"teacher: {results['teacher'] or 'not at hand: ' + results['teacher_missing']}")
    click.echo(f"report: {results['report']}")


def accuracy(results: dict[str, Any]) -> None:
    teacher, student = (results["models"][k] for k in ("teacher", "student"))
    _sets(results)
    if teacher["parameters"] is None:
        size, share = "no tower at hand", ""
    else:
        size = f"{teacher['parameters'] / 1e6:.1f} M parameters, {teacher['macs'] / 1e6:.0f} M MACs at {teacher['input']} px"
        share = f" ({student['macs'] / teacher['macs']:.3f} of the teacher's)"
    click.echo(f"teacher: {teacher['name']}, {size}")
    click.echo(
        f"student: {student['name']}, {student['parameters'] / 1e6:.1f} M parameters, {student['macs'] / 1e6:.0f} M MACs at {student['input']} px{share}"
    )
    for line in results["skipped"]:
        click.echo(f"skipped: {line}")
    whole = sum(results["seconds"].values())
    table(
        [
            [name, f"{seconds:.1f}", f"{seconds / max(whole, 1e-9):.0%}"]
            for name, seconds in results["seconds"].items()
        ],
        ["where the time went", "s", "share"],
    )
    click.echo(f"time: {whole:.0f} s; peak memory {results['peak_memory_mib']} MiB")
    click.echo(f"run: {results['run']}")


def bundles(rows: Sequence[Any], layout: str) -> None:
    """Print what `export` wrote, a row per target."""
    cells = [[row.target, f"{row.image_encoder_mib:.1f}", row.path] for row in rows]
    table(cells, ["target", "image encoder MiB", layout])
    for row in rows:
        if row.lint:
            checked = row.lint.checked_by or "not checked with TensorRT-RTX"
            parses = f"parses {row.lint.parses}, builds {row.lint.builds}"
            click.echo(
                f"{row.target}: {checked}: {parses}; the engine itself is built on the board"
            )


def open_clip(path: Path, as_json: bool) -> None:
    """Print how to load the folder that `export --layout open_clip` wrote."""
    text = f'open_clip.create_model_and_transforms("local-dir:{path}")'
    say(as_json, {"open_clip": str(path)}, text)


def lint(file: Path, verdict: Any) -> None:
    """Print what TensorRT would refuse in an ONNX file."""
    for error in verdict["errors"]:
        click.echo(error)
    if not verdict["errors"]:
        click.echo(f"{file}: accepted; validate and bench it on the board")
    by = verdict["checked_by"]
    if by is None:
        by = "edgeclip's rules alone; for TensorRT's own parser: pip install 'edgeclip[lint]'"
    click.echo(f"checked by {by}")


def purposes(rows: Sequence[Any]) -> None:
    """Print what ships, a line each."""
    table([[row.kind, row.name, row.purpose] for row in rows], ["kind", "name", "purpose"])


def parity(reports: list[ParityReport]) -> None:
    rows = []
    for r in reports:
        numbers: list[str | None] = [None] * 8
        if r.accuracy:
            a, c = r.accuracy, r.cosine
            values = (
                c.centered_p1,
                c.raw_p1,
                r.top1_agreement,
                r.agreement_where_right,
                a.reference_top1,
                a.bundle_top1,
            )
            numbers = [
                *(None if v is None else f"{v:.4f}" for v in values),
                f"{a.drop_pp:.2f}",
                f"{a.upper_pp:.2f}",
            ]
        rows.append([r.target, r.images, *numbers, r.verdict])
    table(
        rows,
        [
            "target",
            "images",
            "cosine p1 centered",
            "raw",
            "top-1 agreement",
            "where fp32 is right",
            "R@1 fp32",
            "R@1",
            "drop pp",
            "at most pp",
            "verdict",
        ],
    )
    for r in reports:
        for failure in r.failures:
            click.echo(f"{r.target}: {failure}")
        if r.verdict == "golden images only":
            click.echo(
                f"{r.target}: {r.not_compared}: only its golden images were compared (cosine {r.golden.cosine_min or 0:.4f})"
            )
        if r.verdict == "too few images":
            click.echo(
                f"{r.target}: {r.images} images cannot exclude a drop of {r.accuracy.upper_pp:.2f} pp"
            )


def bench(reports: list[BenchReport]) -> None:
    rows = []
    for r in reports:
        single, stages = r.single_stream, r.stages
        of_stages = ("decode_ms", "preprocess_ms", "model_ms", "head_ms")
        numbers = [
            *(getattr(single, f"latency_ms_{k}", None) for k in ("p50", "p90", "p99")),
            getattr(r.multi_stream, "latency_ms_p99", None),
            getattr(r.offline, "images_per_second", None),
            *(getattr(stages, k, None) for k in of_stages),
            getattr(r.cold_start, "process_ms", None),
            r.energy_mj_per_image,
        ]
        rows.append(
            [
                r.target,
                *(None if v is None else f"{v:.2f}" for v in numbers),
                r.peak_memory_mib,
                f"{r.image_encoder_bytes / 2**20:.1f}",
            ]
        )
    latency = ["target", "p50 ms", "p90 ms", "p99 ms", "multi p99 ms", "offline /s"]
    table(
        rows,
        [
            *latency,
            "decode ms",
            "preprocess ms",
            "model ms",
            "head ms",
            "cold start ms",
            "mJ",
            "peak MiB",
            "encoder MiB",
        ],
    )
    r = reports[0]
    isa = (
        "unknown" if r.machine.isa is None else ", ".join(r.machine.isa) or "none that matters here"
    )
    click.echo(
        f"{r.device}: {processor(r.machine)}, ISA {isa}, {r.ran.threads} thread(s), warm-up {r.warm_up} queries"
    )
    if any(x.short_run for x in reports):
        click.echo(
            f"short run: at least {r.min_duration_s:g} s and {r.min_query_count} queries, where MLPerf asks for 60 s and 1,024"
        )
    for x in reports:
        if "stored" in (x.ran.precision or ""):
            click.echo(f"{x.target}: {x.ran.precision}")
        if e := x.energy:
            rate = (
                "too few samples"
                if e.rate_hz is None
                else f"{e.rate_hz:.1f} Hz, idle {e.idle_w:.2f} W, load {e.load_w:.2f} W"
            )
            half = (
                ""
                if e.mj_per_image is None
                else f", {e.mj_per_image:.2f} +- {e.mj_per_image_half_width:.2f} mJ (scatter only)"
            )
            steady = {True: "steady", False: "still warming up", None: "temperature unknown"}[
                e.steady
            ]
            click.echo(f"{x.target}: energy by {e.source}: {rate}{half}, {steady}")
        if t := x.sustained:
            slowed = (
                "unknown whether throttled"
                if t.throttled is None
                else f"throttled: {', '.join(t.throttled) or 'no'}"
            )
            slowed += " (and since the board was started already)" if t.throttled_before else ""
            first, last = (t.windows[i].temperature_c for i in (0, -1))
            hot = (
                f"temperature {NOT_MEASURED}"
                if first is None or last is None
                else f"{first:.0f} to {last:.0f} degrees C"
            )
            click.echo(
                f"{x.target}: {t.minutes:g} minutes: p90 of the last tenth {t.p90_drift:.2f} times the first's; {hot}; {slowed}"
            )
        if x.kept:
            click.echo(
                f"{x.target}: not measured anew, kept from the report before: {', '.join(x.kept)}"
            )
        for failure in x.failures:
            click.echo(f"{x.target}: {'over budget: ' if 'budget' in failure else ''}{failure}")
    for x in reports:
        click.echo(f"check {x.target} with: {x.check_with}")


def caches(found: list[dict[str, Any]]) -> None:
    for c in found:
        norm = c["norm"]
        rows = [
            ["folder", c["folder"]],
            ["teacher", c["teacher"]],
            ["data", c["data"]],
            [
                "images x views",
                f"{c['images']:,} x {c['views']} ({len(c['skipped'])} images skipped)",
            ],
            [
                "row",
                f"{c['width']} wide, unit within {c['unit_error']:.1g}, "
                + (f"norm {norm['min']:.3g} to {norm['max']:.3g}" if norm else "norms not known"),
            ],
            ["captions an image", c["captions"]],
            ["classes", c["classes"]],
            ["shards", f"{c['shards']:,}, {c['bytes'] / 2**20:,.1f} MiB"],
            [
                "replayed",
                f"{c['replay']['views']} views, cosine {c['replay']['cosine_min']:.4f} or more"
                if c["replay"]
                else None,
            ],
        ]
        table(rows, ["teacher cache", ""])


def comparison(rows: list[dict[str, Any]], lines: list[str]) -> None:
    def number(v: float | None, digits: int) -> str | None:
        return None if v is None else f"{v:.{digits}f}"

    table(
        [
            [r["device"], r["target"], number(r["accuracy"], 4), number(r["latency_ms_p90"], 2), number(r["images_per_second"], 1), number(r["energy_mj_per_image"], 2),
             number(r["energy_mj_per_correct"], 2), f"{r['image_encoder_bytes'] / 2**20:.1f}", {True: "*", False: "", None: None}[r["on_front"]]]
            for r in rows
        ],
        ["device", "target", "R@1", "p90 ms", "offline /s", "mJ", "mJ a right answer", "encoder MiB", "front"],
    )  # fmt: skip
    if rows:
        click.echo(
            f"*: not beaten on {', '.join(rows[0]['axes']) or 'anything, since nothing was measured'}"
        )
        for axis, why in rows[0]["left_out"].items():
            click.echo(f"{axis} takes no part: {why}")
    for line in lines:
        click.echo(line)


def selftest(reports: list[SelftestReport], paths: list[str]) -> None:
    for r, path in zip(reports, paths, strict=True):
        rows = [
            [
                s.step,
                s.status,
                f"{s.seconds:.1f}",
                " ".join(str(s.detail or "").split())[:100],
            ]
            for s in r.steps
        ]
        table(rows, [r.target.name, "", "s", ""])
        click.echo(f"report, to attach to an issue: {path}")


def ranking(results: dict[str, list[dict[str, Any]]]) -> None:
    # Plain lines: importing a table library would be a tenth of the cold start.
    for image, rows in results.items():
        click.echo(f"{image}\n  probability  cosine  label")
        for r in rows:
            click.echo(f"  {r['probability']:11.3f}  {r['score']:6.3f}  {r['label']}")


def doctor(found: dict[str, Any]) -> None:
    table(
        [
            [k, ", ".join(v) if isinstance(v, list) else "unknown" if v is None else v]
            for k, v in found["machine"].items()
        ],
        ["machine", ""],
    )
    click.echo()
    table(
        [[p["part"], p["version"] or "missing", p["install"] or ""] for p in found["parts"]],
        ["part", "version", "install with"],
    )
    click.echo()
    for kind in ("targets", "devices", "recipes"):
        click.echo(f"{kind}: {', '.join(found[kind])}")


def preflight(device: str, rows: Sequence[Any]) -> None:
    """Print the checks of a device."""
    cells = [[row.check, row.status, row.found, row.need] for row in rows]
    table(cells, [device, "", "found", "should be"])
