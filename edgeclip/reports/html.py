"""`edgeclip report`: one self-contained HTML page that says what was lost at which step, and ship or do not ship.

Everything on it is read from the run's JSON; nothing is measured here. A number that nobody measured is printed as
"not measured". The page needs no network: plots are inline SVG.
"""

import io
import math
from pathlib import Path
from typing import Any

from edgeclip import __version__, disk
from edgeclip.device import records
from edgeclip.device.machine import processor
from edgeclip.device.manifest import read_manifest
from edgeclip.device.records import BenchReport, ParityReport, to_json
from edgeclip.reports.models import MODELS

TEMPLATE = Path(__file__).parent / "report.html.j2"


def report(run: Path) -> tuple[Path, dict[str, str]]:
    """Writes RUN/report.html; returns its path and the verdict on each target that has a bundle."""
    import jinja2

    manifest = disk.read_manifest(run, "run")
    results = disk.read_json(run / "results.json")
    targets = collect(run)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["form"] = form
    environment.filters["processor"] = processor
    environment.filters["millions"] = lambda value, digits: (
        _number(None if value is None else value / 1e6, digits)
        + (" M" if value is not None else "")
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run.name,
        version=__version__,
        results=results,
        models=MODELS,
        protocols=protocols(run, manifest.get("student")),
        recipe=(run / "recipe.yaml").read_text(encoding="utf-8"),
        targets=targets,
        waterfall=waterfall(results, targets),
        plots=_plots(results, targets),
    )
    disk.write_text(run / "report.html", page)
    return run / "report.html", {t["row"]: t["verdict"] for t in targets}


def collect(run: Path) -> list[dict[str, Any]]:
    """One entry a target and device: its parity and bench reports (or None) and the verdict with its reasons.

    A report counts only for the bundle that it was made with: after a new export it must be made again.
    """
    rows = []
    for folder in sorted(p.parent for p in (run / "bundles").glob(f"*/{disk.MANIFEST}")):
        manifest, digest = read_manifest(folder), disk.sha256(folder / disk.MANIFEST)
        found: dict[str, dict[str, Any]] = {}
        for kind, record in (("parity", ParityReport), ("bench", BenchReport)):
            for path in sorted((run / "reports").glob(f"{folder.name}.*.{kind}.json")):
                content: Any = records.read(path, record)
                if content.bundle == digest:
                    found.setdefault(content.device, {})[kind] = content
        of_devices: list[tuple[str | None, dict[str, Any]]] = [*sorted(found.items())]
        for device, reports in of_devices or [(None, {})]:
            parity, bench = reports.get("parity"), reports.get("bench")
            rows.append(
                {
                    "name": folder.name,
                    "device": device,
                    "row": folder.name if device is None else f"{folder.name} on {device}",
                    "parity": parity,
                    "bench": bench,
                    "bytes": manifest.image_encoder_bytes,
                    "quantization": to_json(manifest.quantization),
                    "lint": to_json(manifest.lint),
                    "verdict": verdict(parity, bench),
                }
            )
    return rows


def protocols(run: Path, student: str | None) -> list[dict[str, Any]]:
    """The records of `edgeclip evaluate` that are of this very student."""
    found = [disk.read_json(path) for path in sorted((run / "reports").glob("evaluate-*.json"))]
    return [record for record in found if record["student"] == student]


def verdict(parity: ParityReport | None, bench: BenchReport | None) -> str:
    """One line: ship, or do not ship and why."""
    reasons = []
    if parity is None:
        reasons.append("not validated")
    elif parity.verdict != "pass":
        reasons += parity.failures or [parity.verdict]
    if bench is None:
        reasons.append("not benchmarked")
    else:
        reasons += [f"over budget: {f}" if "budget" in f else f for f in bench.failures]
        if not (bench.single_stream or bench.failures):
            reasons.append("single_stream not measured")
    if reasons:
        return f"do not ship: {'; '.join(reasons)}"
    assert parity is not None
    assert parity.accuracy is not None
    assert bench is not None
    assert bench.single_stream is not None
    a, latency = parity.accuracy, bench.single_stream.latency_ms_p90
    return f"ship: accuracy drop {a.drop_pp:.2f} pp (at most {a.upper_pp:.2f}) on {parity.images} images, p90 {latency:.2f} ms"


def waterfall(results: dict[str, Any], targets: list[dict[str, Any]]) -> dict[str, Any]:
    """R@1 of each step, and on how many images: {"sets": names, "steps": [(step, [(R@1 or None, images)])]}.

    A bundle is compared on a part of the images, so what it lost stands in its parity report, not between two rows of this.
    """
    names = [s["name"] for s in results["sets"]]
    steps = [
        (model, [((s[model] or {}).get("top1"), s["images"]) for s in results["sets"]])
        for model in ("teacher", "student")
    ]
    for t in targets:
        if t["parity"] and t["parity"].sets:
            of = {s.name: (s.bundle_top1, s.images) for s in t["parity"].sets}
            steps.append((t["row"], [of.get(n, (None, 0)) for n in names]))
    return {"sets": names, "steps": steps}


def form(candidate: dict[str, Any]) -> str:
    """How one int8 candidate differs from the others, in a few words."""
    smoothing = "" if candidate["smoothing"] is None else f", smoothing {candidate['smoothing']:g}"
    model_type = f", {candidate['model_type']}" if candidate["model_type"] else ""
    return f"{candidate['method']}, {candidate['layers']} layers{smoothing}{model_type}, {candidate['float_layers']} in float"


def _number(value: float | int | None, digits: int = 2) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _plots(results: dict[str, Any], targets: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(caption, inline SVG): accuracy a step; accuracy against latency; the losses."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "edgeclip",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib import pyplot as plt

    plots = []
    steps = waterfall(results, targets)
    figure, axes = plt.subplots(figsize=(7, 3))
    width = 0.8 / len(steps["steps"])
    for i, (name, values) in enumerate(steps["steps"]):
        axes.bar(
            [x + i * width for x in range(len(values))],
            [math.nan if v is None else v for v, _ in values],
            width,
            label=name,
        )
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(steps["sets"]))], steps["sets"])
    axes.set_ylabel("R@1")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    plots.append(("Accuracy of each step; a bundle's on a part of the images", _svg(figure)))

    measured = [
        t
        for t in targets
        if t["bench"] and t["bench"].single_stream and t["parity"] and t["parity"].accuracy
    ]
    if measured:
        figure, axes = plt.subplots(figsize=(7, 3))
        for t in measured:
            x, y = (
                t["bench"].single_stream.latency_ms_p90,
                t["parity"].accuracy.bundle_top1,
            )
            axes.scatter(x, y, clip_on=False, s=t["bytes"] / 2**20 * 12 + 20)
            axes.annotate(t["row"], (x, y), textcoords="offset points", xytext=(8, 4), fontsize=8)
        axes.margins(x=0.3, y=0.3)
        axes.set_xlim(left=0)
        axes.set_xlabel("p90 latency, ms (batch 1)")
        axes.set_ylabel("R@1 over all parity images")
        plots.append(
            ("Accuracy against latency; the area grows with the encoder's bytes", _svg(figure))
        )

    for t in targets:
        frontier = (t["quantization"] or {}).get("frontier", [])
        timed = [c for c in frontier if c["latency_ms"] is not None]
        if not timed:
            continue
        figure, axes = plt.subplots(figsize=(7, 2.6))
        for c in timed:
            chosen = c["verdict"] == "chosen"
            axes.scatter(
                c["latency_ms"],
                c["centered_cosine_p1"],
                marker="*" if chosen else "o",
                s=110 if chosen else 30,
                color="C1" if chosen else "C0",
            )
            axes.annotate(
                form(c),
                (c["latency_ms"], c["centered_cosine_p1"]),
                textcoords="offset points",
                xytext=(7, 3),
                fontsize=7,
            )
        axes.axvline(
            t["quantization"]["latency_ms_float"], color="0.6", linestyle=":", label="float32"
        )
        axes.margins(x=0.3, y=0.3)
        axes.set_xlabel("latency on the machine that exported, ms (batch 1, one thread)")
        axes.set_ylabel("centered cosine p1")
        axes.legend(fontsize=7, frameon=False)
        plots.append(
            (
                f"{t['row']}: the int8 forms that held the tolerance in the search; the star was chosen",
                _svg(figure),
            )
        )

    log = results["log"]
    if len(log) > 1:
        figure, axes = plt.subplots(figsize=(7, 2.6))
        for name in sorted(log[-1].keys() - {"epoch", "loss"}):
            axes.plot([r["epoch"] for r in log], [r.get(name) for r in log], marker=".", label=name)
        axes.set_xlabel("epoch (0: projector on the frozen tower)")
        axes.legend(fontsize=7, frameon=False)
        plots.append(("Losses before their weights, and EduAttention's alpha", _svg(figure)))
    return plots


def _svg(figure: Any) -> str:
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
