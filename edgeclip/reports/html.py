"""`edgeclip report`: one self-contained HTML page: what was lost at each step, ship or not.

Everything on it is read from the run's JSON; nothing is measured here. A figure that nobody
measured is printed as "not measured". The page needs no network: plots are inline SVG.
"""

from pathlib import Path
from typing import Any

from edgeclip import __version__, disk
from edgeclip.device.intervals import Limits, harmonic_mean_limits
from edgeclip.device.machine import processor
from edgeclip.device.per_class import shown
from edgeclip.device.target import Floor
from edgeclip.reports.models import MODELS
from edgeclip.reports.results import (
    EvaluationResults,
    ProtocolRecord,
    read_protocols,
    read_results,
)
from edgeclip.reports.targets import collect, form, waterfall
from edgeclip.reports.thumbnails import changed

TEMPLATE = Path(__file__).parent / "report.html.j2"


def report(run: Path) -> tuple[Path, dict[str, str]]:
    """Write RUN/report.html; return its path, and the verdict on each target that has a bundle."""
    from edgeclip.reports.plots import plots

    manifest = disk.read_manifest(run, "run")
    results = read_results(run)
    targets = collect(run)
    steps = waterfall(results, targets)
    page = _template().render(
        run=run.name,
        version=__version__,
        results=results,
        models=MODELS,
        protocols=_protocols(run, manifest.get("student")),
        recipe=(run / "recipe.yaml").read_text(encoding="utf-8"),
        targets=targets,
        changed={target.row: changed(run, target.parity) for target in targets},
        mean_limits=_mean_limits(results),
        asked_floor=any(target.floor != Floor() for target in targets),
        waterfall=steps,
        plots=plots(results, targets, steps),
    )
    disk.write_text(run / "report.html", page)
    return run / "report.html", {target.row: target.verdict for target in targets}


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


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = {
        "shown": shown,
        "number": _number,
        "millions": _millions,
        "form": form,
        "processor": processor,
    }
    environment.filters.update(filters)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _number(value: float | int | None, digits: int = 2) -> str:
    if value is None:
        return "not measured"
    return f"{value:.{digits}f}"


def _millions(value: float | int | None, digits: int) -> str:
    if value is None:
        return _number(None)
    return f"{value / 1e6:.{digits}f} M"


def _protocols(run: Path, student: str | None) -> list[ProtocolRecord]:
    """Return the records of `edgeclip evaluate` that are of this very student."""
    return [record for record in read_protocols(run) if record.student == student]
