"""`edgeclip report`: one self-contained HTML page: what was lost at each step, ship or not.

Everything on it is read from the run's JSON; nothing is measured here. A figure that nobody
measured is printed as "not measured". The page needs no network: plots are inline SVG.
"""

from pathlib import Path
from typing import Any

from edgeclip import __version__, disk
from edgeclip.device.machine import processor
from edgeclip.device.target import Floor
from edgeclip.reports.models import MODELS
from edgeclip.reports.results import ProtocolRecord, read_protocols, read_results
from edgeclip.reports.targets import collect, form, waterfall

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
        asked_floor=any(target.floor != Floor() for target in targets),
        waterfall=steps,
        plots=plots(results, targets, steps),
    )
    disk.write_text(run / "report.html", page)
    return run / "report.html", {target.row: target.verdict for target in targets}


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = {"number": _number, "millions": _millions, "form": form, "processor": processor}
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
