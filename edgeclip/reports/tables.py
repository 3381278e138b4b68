"""The tables of the report's page: headers and cells, ready to be laid out."""

from collections.abc import Sequence
from typing import NamedTuple

from edgeclip.device import rules
from edgeclip.device.per_class import shown
from edgeclip.device.records import Earlier, ParityReport, Rule, WaterfallStep
from edgeclip.reports.answers import Pair
from edgeclip.reports.results import EvaluationResults
from edgeclip.reports.targets import Target, form

NOT_MEASURED = "not measured"
ANSWERS = {"holds": "holds", "fails": "FAILS", "cannot tell": "unknown"}


class Table(NamedTuple):
    """A table whose first column names its rows."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float | int | None, digits: int = 2) -> str:
    """Return a figure as the page prints it."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def asked(target: Target) -> Table:
    """Return every rule of a bundle: the gate's, then the device's budget, then what is missing."""
    parity = target.parity.rules if target.parity else []
    bench = target.bench.rules if target.bench else []
    headers = ("rule", "answer", "measured", "95 % limits", "allowed", "n", "would take", "because")
    rows = [_rule(rule) for rule in (*parity, *bench)]
    for what, report, verb in (
        ("parity with the float student", target.parity, "validated"),
        ("speed on its device", target.bench, "benchmarked"),
    ):
        if report is None:
            rows.append([what, "unknown", NOT_MEASURED, "", "", "", "", f"not {verb}"])
    return filled(Table(headers, rows))


def filled(table: Table) -> Table:
    """Return a table without the columns in which nothing stands, or nothing was measured."""
    kept = [0]
    for i in range(1, len(table.headers)):
        cells = {row[i] for row in table.rows}
        if cells - {"", NOT_MEASURED}:
            kept.append(i)
    rows = []
    for row in table.rows:
        rows.append([row[i] for i in kept])
    return Table([table.headers[i] for i in kept], rows)


def _rule(rule: Rule) -> list[str]:
    limits = NOT_MEASURED
    if rule.low is not None and rule.high is not None:
        limits = f"{rule.low:.2f} to {rule.high:.2f}"
    measured = NOT_MEASURED if rule.found is None else f"{rule.found:.2f} {rule.unit}"
    needed = "" if rule.needed is None else f"{rule.needed:,}"
    allowed = f"{rule.allowed:g} {rule.unit}"
    answer = ANSWERS[rule.answer]
    return [
        rule.rule, answer, measured, limits, allowed, f"{rule.images:,}", needed, rule.why or ""
    ]  # fmt: skip


def steps(parity: ParityReport) -> Table:
    """Return what each step lost on the same unseen images."""
    found = parity.waterfall
    assert found is not None
    headers = ("step", "top-1 after it", "lost", "won", "lost pp", "95 % limits", "cosine p1")
    rows = [[found.start, number(found.start_top1, 4), "", "", "", "", ""]]
    rows += [_step(step) for step in found.steps]
    rows.append(_step(found.whole))
    if found.typed_words is not None:
        rows.append(["beside it: " + found.typed_words.name, *_step(found.typed_words)[1:]])
    return Table(headers, rows)


def _step(step: WaterfallStep) -> list[str]:
    cosine = "" if step.centered_cosine_p1 is None else number(step.centered_cosine_p1, 4)
    limits = f"{step.lower_pp:.2f} to {step.upper_pp:.2f}"
    counts = [str(step.lost), str(step.won)]
    return [step.name, number(step.top1, 4), *counts, number(step.drop_pp), limits, cosine]


def sets(parity: ParityReport) -> Table:
    """Return each evaluation set: what training had of it, and what the bundle lost there."""
    headers = (
        "set", "training had", "images", "top-1 fp32", "top-1", "lost", "won", "lost pp",
        "at most pp", "in own list fp32", "in own list",
    )  # fmt: skip
    rows = []
    for s in parity.sets:
        role = s.role or "not known"
        if s.at_floor:
            role += ", hardly any is right: not judged"
        tops = [number(s.reference_top1, 3), number(s.bundle_top1, 3)]
        lost = [str(s.lost), str(s.won), number(s.drop_pp), number(s.upper_pp)]
        own = [number(s.reference_own_list_top1, 3), number(s.bundle_own_list_top1, 3)]
        rows.append([s.name, role, str(s.images), *tops, *lost, *own])
    return Table(headers, rows)


def worst_classes(parity: ParityReport) -> Table:
    """Return the classes that are worst off, with what their images are taken for."""
    headers = (
        "class", "images", "top-1 fp32", "top-1", "lost", "won", "lost pp",
        "95 % limits, all classes at once", "most often taken for",
    )  # fmt: skip
    rows = []
    for c in parity.classes:
        confused = ""
        if c.confused_with is not None:
            confused = f"{shown(c.confused_with)} ({c.confused})"
        tops = [number(c.reference_top1, 3), number(c.bundle_top1, 3)]
        limits = f"{c.lower_pp:.2f} to {c.upper_pp:.2f}"
        lost = [str(c.lost), str(c.won), number(c.drop_pp), limits]
        rows.append([shown(c.name), str(c.images), *tops, *lost, confused])
    return Table(headers, rows)


def slices(parity: ParityReport) -> Table:
    """Return the images that share something: what the bundle lost of them."""
    headers = (
        "slice", "images", "top-1 fp32", "top-1", "lost", "won", "lost pp",
        "95 % limits, all slices at once", "what they show",
    )  # fmt: skip
    rows = []
    for s in parity.slices:
        if s.drop_pp is None or s.lower_pp is None or s.upper_pp is None:
            rows.append([shown(s.name), f"{s.images:,}", *[""] * 6, ANSWERS["cannot tell"]])
            continue
        tops = [number(s.reference_top1, 3), number(s.bundle_top1, 3)]
        limits = f"{s.lower_pp:.2f} to {s.upper_pp:.2f}"
        lost = [str(s.lost), str(s.won), number(s.drop_pp), limits]
        rows.append([shown(s.name), f"{s.images:,}", *tops, *lost, moved(s.lower_pp, s.upper_pp)])
    return Table(headers, rows)


def moved(lower_pp: float, upper_pp: float) -> str:
    """Return what an interval of lost accuracy shows."""
    if lower_pp > 0:
        return "a loss"
    return "a gain" if upper_pp < 0 else "cannot tell"


EARLIER_HEADERS = (
    "report", "bundle", "runtime", "system", "images of both", "top-1 then", "top-1", "lost", "won",
    "lost pp", "95 % limits", "exact McNemar p",
)  # fmt: skip


def earlier(found: Earlier) -> Table:
    """Return the paired difference to an earlier report; without figures where there is none."""
    cells = [shown(found.when), found.bundle[:8], shown(found.runtime), shown(found.system)]
    if found.p is None or found.lower_pp is None or found.upper_pp is None:
        return Table(EARLIER_HEADERS, [[*cells, *[""] * 8]])
    tops = [f"{found.images:,}", number(found.top1_then, 4), number(found.top1_now, 4)]
    limits = f"{found.lower_pp:.2f} to {found.upper_pp:.2f}"
    lost = [str(found.lost), str(found.won), number(found.drop_pp), limits]
    return Table(EARLIER_HEADERS, [[*cells, *tops, *lost, f"{found.p:.4f}"]])


def pairs(found: Sequence[Pair]) -> Table:
    """Return a row for each bundle that two runs have on one device."""
    named = EARLIER_HEADERS.index("images of both")  # the date and so on stand in its sentence
    rows = [[pair.name, *earlier(pair.found).rows[0][named:]] for pair in found]
    return Table(("run and bundle", *EARLIER_HEADERS[named:]), rows)


TARGET_HEADERS = (
    "bundle",
    "answer",
    "top-1",
    "lost pp",
    "centered cosine p1",
    "same answer",
    "image to label p90 ms",
    "camera to label p90 ms",
    "model p90 ms",
    "model p99 ms",
    "offline /s",
    "cold start ms",
    "energy mJ",
    "peak MiB",
    "image encoder MiB",
    "bundle MiB",
    "times",
)


def every_target(targets: Sequence[Target]) -> Table:
    """Return a row per bundle and device."""
    return filled(Table(TARGET_HEADERS, [of_target(target) for target in targets]))


def of_target(t: Target) -> list[str]:
    """Return a bundle's row under `TARGET_HEADERS`."""
    accuracy = t.parity.accuracy if t.parity else None
    cosine = t.parity.cosine if t.parity else None
    bench = t.bench
    single = bench.single_stream if bench else None
    whole = bench.whole_image if bench else None
    p99 = number(single.latency_ms_p99 if single else None)
    if single is not None and single.latency_ms_p99 is None:
        p99 = f"too few: {single.queries:,} of 1,000"
    bundle = bench.bundle_bytes if bench else None
    return [
        t.row,
        t.verdict.partition(": ")[0],
        number(accuracy.bundle_top1 if accuracy else None, 3),
        number(accuracy.drop_pp if accuracy else None),
        number(cosine.centered_p1 if cosine else None, 4),
        number(t.parity.top1_agreement if t.parity else None, 4),
        number(whole.from_file.latency_ms_p90 if whole else None),
        number(whole.from_frame.latency_ms_p90 if whole else None),
        number(single.latency_ms_p90 if single else None),
        p99,
        number(bench.offline.images_per_second if bench and bench.offline else None, 0),
        number(bench.cold_start.process_ms if bench and bench.cold_start else None, 0),
        number(bench.energy_mj_per_image if bench else None),
        number(bench.peak_memory_mib if bench else None, 0),
        number(t.bytes / 2**20, 1),
        number(bundle / 2**20 if bundle else None, 1),
        times(t),
    ]


def times(target: Target) -> str:
    """Return what to know of a bundle's times."""
    bench = target.bench
    if bench is None or bench.single_stream is None:
        return NOT_MEASURED
    words = ["SHORT RUN"] if bench.short_run else []
    if rules.loaded(bench):
        words.append(f"UNDER LOAD: others had {bench.others_busy:.1f} processors")
    return ", ".join(words) or "full length, quiet"


def history(target: Target) -> Table:
    """Return every report of a bundle on its device, the newest first, beside the one before."""
    headers = (
        "when", "what", "bundle", "answer", "runtime", "system", "images", "top-1", "lost pp",
        "against the one before, pp", "centered cosine p1", "image to label p90 ms",
        "model p90 ms", "other work, processors",
    )  # fmt: skip
    rows = []
    before: float | None = None
    for h in target.history:
        parity = h.kind == "parity"
        against = ""
        if parity and h.drop_pp is not None:
            against = "" if before is None else f"{h.drop_pp - before:+.2f}"
            before = h.drop_pp
        accuracy = [number(h.top1, 4), number(h.drop_pp), against, number(h.centered_p1, 4)]
        timed = [number(h.from_file_ms_p90), number(h.model_ms_p90), number(h.others_busy)]
        images = "" if h.images is None else str(h.images)
        cells = [h.when, h.kind, h.bundle[:8], h.verdict or NOT_MEASURED, h.runtime, h.system]
        cells += [images, *(accuracy if parity else [""] * 4), *([""] * 3 if parity else timed)]
        rows.append(cells)
    return filled(Table(headers, rows[::-1]))


def candidates(target: Target) -> Table:
    """Return the int8 forms that the search tried."""
    headers = (
        "candidate", "int8 share", "centered cosine p1", "same answer", "where fp32 is right",
        "ms", "MiB", "verdict",
    )  # fmt: skip
    assert target.quantization is not None
    rows = []
    for c in target.quantization.frontier:
        close = [number(c.centered_cosine_p1, 4), number(c.top1_agreement, 4)]
        cells = [form(c), number(c.int8_share_of_macs, 3), *close]
        cells += [number(c.agreement_where_right, 4), number(c.latency_ms)]
        rows.append([*cells, number(c.bytes / 2**20, 1), c.verdict])
    return Table(headers, rows)


def networks(results: EvaluationResults) -> Table:
    """Return teacher and student."""
    rows = []
    for role in ("teacher", "student"):
        m = getattr(results.models, role)
        size = [
            f"{v / 1e6:.{d}f} M" if v else NOT_MEASURED for v, d in ((m.parameters, 1), (m.macs, 0))
        ]
        rows.append([role, m.name, *size, f"{m.input} px"])
    return Table(("model", "is", "parameters", "MACs", "input"), rows)


TRAINED_HEADERS = ("run", "data", "student", "over all labels", "its teacher", "recipe's halves")


def trained(name: str, results: EvaluationResults) -> list[str]:
    """Return a run's row among several: the harmonic mean of its halves, else its first set."""
    student = results.models.student.name
    if results.halves is not None and results.harmonic_mean is not None:
        of, what = results.harmonic_mean, "harmonic mean of " + " and ".join(results.halves)
        figures = [number(of.student, 3), number(of.teacher, 3)]
    elif results.sets:
        s = results.sets[0]
        figures = [number(s.student.top1, 3), number(s.teacher.top1 if s.teacher else None, 3)]
        what = s.name
    else:
        figures, what = [NOT_MEASURED, NOT_MEASURED], ""
    return [name, results.data, student, *figures, what]
