"""`edgeclip report`: one self-contained HTML page: ship or not, and why.

Everything on it is read from the run's JSON; nothing is measured here. A figure that nobody
measured is printed as "not measured". The page needs no network and runs no script: plots are
inline SVG, images data URIs.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from edgeclip import __version__, disk
from edgeclip.device import rules
from edgeclip.device.intervals import Limits, harmonic_mean_limits
from edgeclip.device.machine import processor
from edgeclip.device.per_class import shown
from edgeclip.device.records import to_json
from edgeclip.device.target import Floor
from edgeclip.reports import earlier, tables, worth
from edgeclip.reports.answers import between
from edgeclip.reports.headline import headline
from edgeclip.reports.models import MODELS
from edgeclip.reports.provenance import provenance
from edgeclip.reports.results import (
    EvaluationResults,
    ProtocolRecord,
    read_protocols,
    read_results,
)
from edgeclip.reports.tables import Table
from edgeclip.reports.targets import Target, collect
from edgeclip.reports.thumbnails import Shown, changed

TEMPLATES = Path(__file__).parent
GLOSSARY = {
    "top-1": "share of images whose first answer over all labels of the bundle is right",
    "fp32": "the float32 student in torch, before export",
    "lost pp": "top-1 lost from one system to another on the same images, in percentage points; "
    "negative: it gained",
    "unseen": "images that took no part in training, calibration or the search: "
    "they were compared with the training images, by bytes and by looks",
    "95 % limits": "each is one-sided: the truth lies beyond it in at most 5 of 100 such samples",
    "worst": "of several sets the one whose upper limit is highest, at a level that all keep",
    "centered cosine": "closeness of features after their common mean is taken away; 1 is equal",
    "p90": "nine of ten queries take at most so long",
    "floor": "the least accuracy that a recipe or target asks of a bundle by itself",
    "own list": "answers among the classes of one set alone, as papers do",
    "slice": "unseen images that share something: a field of the data, a folder, or their size",
    "all slices at once": "each limit is so much stricter that all of them are right together "
    "in at least 95 of 100 such samples (Bonferroni)",
    "McNemar": "how likely so one-sided a change is by chance, if the two are equally good: "
    "exact, two-sided",
    "would take": "so many images would settle it, if they answer as these did",
}


class Detail(NamedTuple):
    """What the page says of one bundle on one device."""

    target: Target
    asked: Table
    failures: list[str]
    """of another kind than a rule"""
    dumbbells: Any
    steps: Table | None
    changed: list[Shown]
    classes: Table | None
    slices: Table | None
    earlier: Table | None
    against: str
    """a sentence on the report before; empty: there is none"""
    sets: Table | None
    spread: Any
    load: Any
    times: str
    history: Table | None
    candidates: Table | None


def report(run: Path) -> tuple[Path, dict[str, str]]:
    """Write RUN/report.html; return its path, and the verdict on each target that has a bundle."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk.shared(run))
        for bundle in disk.finished_in(run / "bundles"):
            stack.enter_context(disk.reading(bundle))
        return _report(run)


def _report(run: Path) -> tuple[Path, dict[str, str]]:
    from edgeclip.reports.plots import plots

    manifest = disk.read_manifest(run, "run")
    results = read_results(run)
    targets = collect(run)
    name = f"runs/{run.name}"
    besides = worth.read(run)
    head = headline(name, targets, besides)
    details = [_detail(run, target) for target in targets]
    if head is not None:
        details.sort(key=lambda d: d.target is not head.target)
    parity = head.target.parity if head else None
    page = _template("report.html.j2").render(
        run=run.name,
        path=name,
        version=__version__,
        head=head,
        steps=parity.waterfall if parity else None,
        times=tables.times(head.target) if head else "",
        details=details,
        worth=[(b.device, worth.answer(b), worth.table(b)) for b in besides],
        targets=targets,
        every_target=tables.every_target(targets),
        asked_floor=any(target.floor != Floor() for target in targets),
        results=results,
        networks=tables.networks(results),
        models=MODELS,
        mean_limits=_mean_limits(results),
        protocols=_protocols(run, manifest.get("student")),
        plots=plots(results, targets),
        glossary=GLOSSARY.items(),
        **provenance(run, name, targets)._asdict(),
    )
    disk.write_text(run / "report.html", page)
    return run / "report.html", {target.row: target.verdict for target in targets}


def side_by_side(runs: list[Path]) -> Path:
    """Write one page of several runs beside the first one's folder; return its path."""
    heads = []
    pairs = between(runs)
    rows: list[list[str]] = []
    trained: list[list[str]] = []
    for run in runs:
        targets = collect(run)
        heads.append((run.name, headline(f"runs/{run.name}", targets, worth.read(run))))
        for target in targets:
            row = tables.of_target(target)
            rows.append([f"{run.name}: {row[0]}", *row[1:]])
        trained.append(tables.trained(run.name, read_results(run)))
    page = _template("several.html.j2").render(
        names=[run.name for run in runs],
        heads=heads,
        every_target=tables.filled(Table(tables.TARGET_HEADERS, rows)),
        trained=Table(tables.TRAINED_HEADERS, trained),
        pairs=tables.pairs(pairs) if pairs else None,
        sentences=[f"{pair.name}: {earlier.sentence(pair.found)}" for pair in pairs],
        figures=json.dumps(to_json(pairs), indent=1, sort_keys=True, ensure_ascii=False),
        glossary=GLOSSARY.items(),
        version=__version__,
    )
    path = runs[0].parent / f"report-{'-'.join(run.name for run in runs)}.html"
    disk.write_text(path, page)
    return path


def _detail(run: Path, target: Target) -> Detail:
    from edgeclip.reports import plots

    parity, bench = target.parity, target.bench
    ruled = [rule for r in (parity, bench) if r is not None for rule in r.rules]
    lines = {rules.line(rule) for rule in ruled}
    failures = [f for r in (parity, bench) if r is not None for f in r.failures if f not in lines]
    return Detail(
        target=target,
        asked=tables.asked(target),
        failures=failures,
        dumbbells=plots.dumbbells(parity) if parity else None,
        steps=tables.steps(parity) if parity and parity.waterfall else None,
        changed=changed(run, parity),
        classes=tables.worst_classes(parity) if parity and parity.classes else None,
        slices=tables.slices(parity) if parity and parity.slices else None,
        earlier=tables.filled(tables.earlier(parity.earlier))
        if parity and parity.earlier
        else None,
        against=earlier.sentence(parity.earlier) if parity and parity.earlier else "",
        sets=tables.sets(parity) if parity and parity.sets else None,
        spread=plots.spread(bench) if bench else None,
        load=plots.load_curve(bench.sustained) if bench and bench.sustained else None,
        times=tables.times(target),
        history=tables.history(target) if len(target.history) > 1 else None,
        candidates=tables.candidates(target) if target.quantization else None,
    )


def _mean_limits(results: EvaluationResults) -> Limits | None:
    """Return the limits of the student's harmonic mean over all labels; None: there is none."""
    if results.halves is None:
        return None
    counts = []
    for s in results.sets:
        if s.name in results.halves and s.student.top1 is not None:
            counts.append((round(s.student.top1 * s.images), s.images))
    if len(counts) != len(results.halves):
        return None
    first, second = counts
    return harmonic_mean_limits(first, second)


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "shown": shown,
        "number": tables.number,
        "linked": _linked,
        "processor": processor,
    }
    environment.filters.update(filters)
    return environment.get_template(name)


def _linked(header: str) -> Any:
    """Return a header that links to the first word of the glossary in it.

    A line does not end within "top-1".
    """
    import markupsafe

    whole = header.replace("top-1", "top\N{NON-BREAKING HYPHEN}1")

    for word in GLOSSARY:
        if word in header:
            place = word.replace(" ", "-")
            return markupsafe.Markup('<a href="#{}">{}</a>').format(place, whole)
    return whole


def _protocols(run: Path, student: str | None) -> list[ProtocolRecord]:
    """Return the records of `edgeclip evaluate` that are of this very student."""
    return [record for record in read_protocols(run) if record.student == student]
