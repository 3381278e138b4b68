"""Write what was measured into the pages, from the JSON that each command wrote; nothing is
measured here.

A table of README.md or docs/*.md stands between two marks, and the first one says where it comes
from:

    <!-- figures: results/latency.json table=latency -->
    ...
    <!-- end -->

The file is what a benchmark's --json left, its log (JSON lines), or what a verb of edgeclip prints
with --json. To measure a table anew, run that command with that file, then this script.

    python benchmarks/figures.py             # write the tables
    python benchmarks/figures.py --check     # exit 1 and name each table that is not what its file gives
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import methods_table
from compare import Interval
from figure_cells import markdown, median, short
from figures_of_logs import OF_LOGS
from figures_of_quickstart import (
    quickstart,
    quickstart_scores,
    quickstart_seeds,
    quickstart_targets,
)
from figures_of_reliability import OF_RELIABILITY

from edgeclip import disk

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(?P<start><!-- figures: (?P<file>\S+) table=(?P<table>\S+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)


# --- tables of a benchmark's JSON


def required(found: dict[str, Any]) -> str:
    """Render the required figures of any benchmark."""
    rows = []
    for r in found["required"]:
        limit = (
            f"at most {r['at_most']:.3g}"
            if r["at_least"] is None
            else f"at least {r['at_least']:.3g}"
        )
        interval = Interval(r["found"], r["low"], r["high"], r["n"])
        rows.append([r["what"], str(interval), r["n"], limit, r["verdict"]])
    return markdown(["", "found (95 %)", "n", "required", ""], rows)


def latency(found: dict[str, Any]) -> str:
    """Render benchmarks/latency.py: milliseconds and bytes of each engine."""
    rows = []
    whole = found["engines"]["onnx-fp32"]["image_encoder_bytes"]
    for engine, of in found["engines"].items():
        size = of["image_encoder_bytes"]
        share = "" if size is None else f"{size / whole:.3f}"
        rows.append([engine, median(of["latency_ms"]), median(of["times_as_fast_as_torch"]), share])
    return markdown(
        [
            "engine",
            "ms (95 %)",
            "times as fast as torch fp32 (95 %)",
            "encoder bytes of onnx-fp32's",
        ],
        rows,
    )


def cold_start(found: dict[str, Any]) -> str:
    """Render benchmarks/cold_start.py: seconds to the answer and memory of each side."""
    rows = []
    for side, of in found["cold_start"].items():
        rows.append(
            [side, median(of["seconds"]), f"{of['memory_mib']['median']:.0f}", of["seconds"]["n"]]
        )
    return markdown(["", "s to the answer (95 %)", "peak MiB", "runs"], rows)


def install(found: dict[str, Any]) -> str:
    """Render benchmarks/install.py: what pip brings, a line a set of extras."""
    rows = []
    for name, of in found["sets"].items():
        mib = [f"{of['download_mib']:,.0f}", f"{of['unpacked_mib']:,.0f}"]
        rows.append([name, of["wheels"], *mib])
    return markdown(["`pip install`", "wheels", "download, MiB", "unpacked, MiB"], rows)


def parity(found: dict[str, Any]) -> str:
    """Render benchmarks/parity.py: what a target costs in accuracy."""
    rows = []
    for r in found["rows"]:
        both = f"{short(r['float32_r1'], 4)} / {short(r['target_r1'], 4)}"
        drop = f"{r['drop_pp']:.2f} ({r['upper_pp']:.2f})"
        rows.append([r["target"], r["runs"], f"{r['images']:,}", both, drop, short(r["kept"])])
    headers = ["target", "run", "images", "top-1 float32 / target", "drop pp (95 % limit)"]
    return markdown([*headers, "same answer where float32 is right"], rows)


def clip_benchmark(found: dict[str, Any]) -> str:
    """Render benchmarks/clip_benchmark.py: what both sides count, a line a bundle."""
    rows = []
    for r in found["rows"]:
        both = [f"{r[key]:,} / {r[f'{key}_clip_benchmark']:,}" for key in ("top1", "top5")]
        rows.append([r["run"], r["target"], f"{r['images']:,}", *both, f"{r['least_lead']:.0e}"])
    headers = ["run", "target", "images", "top-1: edgeclip / CLIP_benchmark", "top-5: both"]
    return markdown([*headers, "least lead of a first answer"], rows)


def int8(found: dict[str, Any]) -> str:
    """Render benchmarks/int8.py: each engine of each model beside torch fp32."""
    rows = []
    threads = []
    for model, engines in found["models"].items():
        for engine, of in engines.items():
            threads = [
                key.removeprefix("times_torch_") for key in of if key.startswith("times_torch_")
            ]
            times = [median(of[f"times_torch_{n}"]) for n in threads]
            accuracy = "" if of["accuracy"] is None else short(of["accuracy"])
            mib = f"{of['bytes'] / 2**20:.1f}"
            rows.append([model, engine, *times, mib, short(of["centered_cosine_p1"]), accuracy])
    heads = [f"times as fast as torch fp32, {n} thread(s) (95 %)" for n in threads]
    return markdown(["model", "engine", *heads, "MiB", "centered cosine p1", "top-1"], rows)


def scale(found: dict[str, Any]) -> str:
    """Render benchmarks/scale.py: what a cache costs before a row is used, a line a size."""
    rows = []
    for r in found["sizes"]:
        costs = [f"{r[key]:.2g}" for key in ("open_s", "anonymous_mib", "batch_ms", "epoch_s")]
        rows.append([f"{r['images']:,}", f"{r['files']:,}", *costs])
    headers = ["images", "files", "opening, s", "anonymous memory above imports, MiB"]
    return markdown([*headers, "shuffled batch of 1,024, ms", "order of an epoch, s"], rows)


def cache(found: dict[str, Any]) -> str:
    """Render benchmarks/cache.py: a live teacher, the cache and no teacher."""
    rows = []
    for way, of in found["ways"].items():
        row = [way, median(of["wall_s"]), median(of["cpu_s"]), f"{of['beyond_none_mib']:.0f}"]
        if "over_cache" in of:
            row += [
                median(of["over_cache"]),
                f"{of['cache_s']:.0f}",
                f"{of['break_even_epochs']:.1f}",
            ]
        else:
            row += ["", "", ""]
        rows.append(row)
    headers = ["way", "s / 1,000 (95 %)", "CPU s / 1,000 (95 %)", "MiB beyond no teacher"]
    return markdown(
        [*headers, "time over the cache's (95 %)", "building, s / 1,000", "paid after, epochs"],
        rows,
    )


def data(found: dict[str, Any]) -> str:
    """Render benchmarks/data.py: images a second and core of each pipeline."""
    rows = []
    for size in found["bits_per_pixel"]:
        for label, of in found.items():
            if label.startswith(f"{size}, "):
                rows.append([size, label.removeprefix(f"{size}, "), median(of)])
    return markdown(["JPEG", "pipeline", "images a second and core (95 %)"], rows)


def footprint(found: dict[str, Any]) -> str:
    """Render benchmarks/footprint.py: the runner's wheels, a line a platform."""
    rows = []
    for platform, of in found.items():
        if isinstance(of, dict) and "wheels" in of:
            names = ", ".join(" ".join(w.split("-")[:2]) for w in of["wheels"])
            rows.append(
                [
                    platform,
                    f"{len(of['wheels'])}: {names}",
                    f"{of['mib']:.1f}",
                    f"{of['unpacked_mib']:.0f}",
                ]
            )
    return markdown(["platform", "wheels", "MiB", "unpacked MiB"], rows)


def emulated(found: dict[str, Any]) -> str:
    """Render benchmarks/emulated.py: aarch64 against x86-64, a line a bundle."""
    rows = []
    for bundle, of in found["bundles"].items():
        equal = f"{of['identical_photos']} of {of['photos']}"
        rows.append(
            [bundle, of["cosine_min"], f"{of['largest_difference']:.1e}", equal, of["other_answer"]]
        )
    headers = ["bundle", "smallest cosine", "largest difference of a feature"]
    return markdown([*headers, "bit for bit equal", "other first answer"], rows)


def trainer(found: dict[str, Any]) -> str:
    """Render benchmarks/trainer.py: open_clip's trainer and edgeclip's."""
    rows = []
    for who in ("open_clip", "edgeclip"):
        of = found[who]
        memory = [f"{of[key]['median']:,.0f}" for key in ("steps_mib", "peak_mib")]
        rows.append([who, median(of["images_per_second"]), *memory])
    return markdown(
        ["trainer", "images a second (95 %)", "MiB in its steps", "MiB at its peak"], rows
    )


# --- tables of what the verbs print with --json


def accuracy(found: dict[str, Any]) -> str:
    """Render RUN/results.json, or `edgeclip distill --json`: teacher and student on every set."""
    rows = []
    for s in found["sets"]:
        for model in ("teacher", "student", "student_without_edu_attention"):
            score = s.get(model)
            if score is not None:
                name = model.replace("_", " ").replace("edu attention", "EduAttention")
                both = [short(score["top1"]), short(score["top5"])]
                rows.append(
                    [s["name"], name, *both, short(s["chance_top1"], 4), f"{s['images']:,}"]
                )
    return markdown(["set", "model", "top-1", "top-5", "chance", "images"], rows)


def validate(reports: list[dict[str, Any]]) -> str:
    """Render `edgeclip validate --json`: what each bundle keeps of the fp32 student."""
    rows = []
    for r in reports:
        shares = [r["cosine"]["centered_p1"], r["top1_agreement"], r["agreement_where_right"]]
        cells = [None if share is None else short(share, 4) for share in shares]
        rows.append(
            [r["target"], f"{r['images']:,}", *cells, *_accuracy_cells(r["accuracy"]), r["verdict"]]
        )
    headers = ["target", "images", "centered cosine p1", "top-1 agreement", "where fp32 is right"]
    return markdown([*headers, "top-1 fp32 / bundle", "drop pp (95 % limit)", "verdict"], rows)


def _accuracy_cells(of: dict[str, Any] | None) -> list[str | None]:
    if of is None:
        return [None, None]
    both = f"{short(of['reference_top1'], 4)} / {short(of['bundle_top1'], 4)}"
    return [both, f"{of['drop_pp']:.2f} ({of['upper_pp']:.2f})"]


def bench(reports: list[dict[str, Any]]) -> str:
    """Render `edgeclip bench --json` of one device: latency, throughput, cold start and memory."""
    rows = []
    for r in reports:
        single, offline, stages = (r[key] or {} for key in ("single_stream", "offline", "stages"))
        found = [single.get(f"latency_ms_{p}") for p in ("p50", "p90", "p99")]
        found += [offline.get("images_per_second")]
        found += [stages.get("decode_ms"), stages.get("preprocess_ms")]
        found += [r["cold_start"]["load_ms"] if r["cold_start"] else None, r["peak_memory_mib"]]
        rows.append([r["target"], *(None if value is None else f"{value:.3g}" for value in found)])
    headers = ["target", "p50 ms", "p90 ms", "p99 ms", "offline /s", "decode ms", "preprocess ms"]
    return markdown([*headers, "load ms", "peak MiB"], rows)


def conformance_images(reports: list[dict[str, Any]]) -> str:
    """Render `edgeclip conformance --json`, a line a bundle: the images of the first one, by
    kind.
    """
    rows = []
    for r in reports[0]["images"]:
        share = None if r["pixels_changed"] is None else f"{100 * r['pixels_changed']:.0f}"
        largest = r["largest_difference"]
        levels = None if largest is None else f"{largest:.0f}"
        must = "yes" if r["required"] else ""
        changed = r["answers_changed_pp"]
        points = None if changed is None else f"{changed:.0f}"
        rows.append([r["kind"], must, f"{r['equal']} of {r['count']}", levels, share, points])
    headers = ["images", "must be equal", "equal bit for bit", "largest difference, levels"]
    return markdown([*headers, "pixels changed, %", "answers changed, pp"], rows)


def conformance_texts(reports: list[dict[str, Any]]) -> str:
    """Render `edgeclip conformance --json`, a line a bundle: the strings of each, by kind."""
    rows = []
    for kinds in zip(*(r["texts"] for r in reports), strict=True):
        cells = []
        for of in kinds:
            refused = f", {of['refused']} refused" if of["refused"] else ""
            cells.append(f"{of['equal']} of {of['count']}{refused}")
        rows.append([kinds[0]["kind"], "yes" if kinds[0]["required"] else "", *cells])
    names = [f"ids equal: {r['tokenizer']}" for r in reports]
    return markdown(["strings", "must be equal", *names], rows)


OF_BENCHMARKS: dict[str, Callable[[Any], str]] = {
    "cache": cache,
    "clip_benchmark": clip_benchmark,
    "cold_start": cold_start,
    "data": data,
    "emulated": emulated,
    "footprint": footprint,
    "install": install,
    "int8": int8,
    "latency": latency,
    "parity": parity,
    "quickstart": quickstart,
    "quickstart_seeds": quickstart_seeds,
    "scale": scale,
    "trainer": trainer,
}
"""by the benchmark's name"""
OF_VERBS: dict[str, Callable[[Any], str]] = {
    "accuracy": accuracy,
    "bench": bench,
    "conformance_images": conformance_images,
    "conformance_texts": conformance_texts,
    "validate": validate,
}
OF_QUICKSTART: dict[str, Callable[[Any], str]] = {
    "quickstart_scores": quickstart_scores,
    "quickstart_targets": quickstart_targets,
}
"""further tables of benchmarks/quickstart.py"""
TABLES = (
    OF_LOGS | OF_BENCHMARKS | OF_VERBS | OF_QUICKSTART | OF_RELIABILITY | {"required": required}
)


# --- pages


def read(path: Path) -> Any:
    """Return a benchmark's JSON, or the lines of its log. Exits where there is no such file."""
    if not path.exists():
        sys.exit(f"{path}: there is no such file; write it with the benchmark's --json")
    if path.suffix == ".jsonl":
        return methods_table.read(path)
    return json.loads(path.read_text(encoding="utf-8"))


def rendered(page: str, root: Path = ROOT) -> str:
    """Return the page's text with every marked table as its file gives it. Exits for a table that
    is unknown.
    """

    def block(found: re.Match[str]) -> str:
        if found["table"] not in TABLES:
            sys.exit(f"table={found['table']}: unknown; known are {', '.join(TABLES)}")
        body = TABLES[found["table"]](read(root / found["file"]))
        return f"{found['start']}{body}{found['end']}"

    return BLOCK.sub(block, page)


def pages(root: Path = ROOT) -> list[Path]:
    """Return README.md and every page of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a page differs"
    )
    options = parser.parse_args()
    stale = []
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            stale.append(path)
            if not options.check:
                disk.write_text(path, after)
    for path in stale:
        print(
            f"{path.relative_to(ROOT)}: {'differs from its figures' if options.check else 'written'}"
        )
    if options.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
