"""The README's quickstart, measured: the five commands of `make demo`, their time and memory, and
what came out.

Each command runs in a process of its own, in a folder that is new, so that the teacher cache and
the rasterized images are made as on a first day. Time is the whole process, memory the peak of its
largest process (the kernel's count). What came out is read from the run: top-1 accuracy, and the
parity and bench reports of each target on `host-cpu`.

    python benchmarks/quickstart.py --json results/quickstart.json
    python benchmarks/quickstart.py --reuse runs/quickstart --json results/quickstart.json

--reuse collects from a run that is there, with its five commands done; then their time and memory
are those of distilling alone, which the run has kept. --folder names the new folder and keeps it,
report.html included; without it a temporary one is used. --quick exports two targets in place of
five.

Nothing is required here: benchmarks/quickstart_seeds.py, latency.py and parity.py judge these
figures.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import toy

from edgeclip.device.records import to_json
from edgeclip.reports import targets as reported
from edgeclip.reports.results import EvaluationResults, read_results

TARGETS = {
    "whole": ("onnx-fp32", "onnx-int8", "onnx-int8-arm", "openvino-int8", "tensorrt-int8"),
    "quick": ("onnx-fp32", "onnx-int8"),
    "smoke": ("onnx-fp32",),
}
GATED = (0, 3, 4)
"""exit codes of validate and bench: they measured, whatever the gates say"""


def timed(arguments: list[str], folder: Path, expected: tuple[int, ...]) -> dict[str, Any]:
    """Run an edgeclip command in `folder`; return its seconds, peak memory and exit code.

    Exits where the code is none of `expected`.
    """
    print(f"edgeclip {' '.join(arguments)}", file=sys.stderr, flush=True)
    before = time.perf_counter()
    command = [sys.executable, "-m", "edgeclip", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - before
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in expected:
        sys.exit(f"edgeclip {arguments[0]} ended with exit code {process.returncode}")
    return {
        "seconds": seconds,
        "peak_memory_mib": usage.ru_maxrss / 1024,
        "exit_code": process.returncode,
    }


def five_commands(folder: Path, recipe: str, form: str) -> tuple[Path, dict[str, Any]]:
    """Run the five commands in `folder`; return the run's folder and what each command took."""
    run = folder / "runs" / "quickstart"
    chosen = ["--run", str(run), "--device", "host-cpu"]
    exported = ["--run", str(run)]
    for target in TARGETS[form]:
        exported += ["--target", target]
    commands = {
        "distill": timed(["distill", recipe, "--out", str(run)], folder, (0,)),
        "export": timed(["export", *exported], folder, (0,)),
        "validate": timed(["validate", *chosen], folder, GATED),
        "bench": timed(["bench", *chosen], folder, GATED),
        "report": timed(["report", str(run)], folder, (0,)),
    }
    return run, commands


def kept(run: Path) -> dict[str, Any]:
    """Return the time and memory that a run has kept of its own distilling."""
    results = read_results(run)
    seconds = sum(results.seconds.values())
    return {"distill": {"seconds": seconds, "peak_memory_mib": float(results.peak_memory_mib)}}


def target_row(target: reported.Target) -> dict[str, Any]:
    """Return what is known of one bundle on one device; null: not measured."""
    row = {
        "target": target.name,
        "device": target.device,
        "verdict": target.verdict,
        "image_encoder_mib": target.bytes / 2**20,
        "parity": None,
        "bench": None,
    }
    if target.parity is not None:
        row["parity"] = {
            "verdict": target.parity.verdict,
            "images": target.parity.images,
            "accuracy": to_json(target.parity.accuracy),
            "cosine": to_json(target.parity.cosine),
            "top1_agreement": target.parity.top1_agreement,
        }
    if target.bench is not None:
        row["bench"] = {
            "single_stream": to_json(target.bench.single_stream),
            "whole_image": to_json(target.bench.whole_image),
            "others_busy": target.bench.others_busy,
            "bundle_bytes": target.bench.bundle_bytes,
            "offline": to_json(target.bench.offline),
            "cold_start": to_json(target.bench.cold_start),
            "peak_memory_mib": target.bench.peak_memory_mib,
        }
    return row


def measure(
    run: Path, commands: dict[str, Any], here: dict[str, Any], options: argparse.Namespace
) -> None:
    """Read what the run reached; print it, and write the JSON."""
    results = read_results(run)
    rows = [target_row(target) for target in reported.collect(run)]
    _print(results, commands, rows)
    sets = to_json(results.sets)
    figures = {
        "benchmark": "quickstart",
        "commands": commands,
        "sets": sets,
        "models": to_json(results.models),
        "laps_s": results.seconds,
        "targets": rows,
    }
    common.finish(figures, [], here, options)


def _print(
    results: EvaluationResults, commands: dict[str, Any], targets: list[dict[str, Any]]
) -> None:
    rows = []
    for name, of in commands.items():
        rows.append([name, f"{of['seconds']:.0f}", f"{of['peak_memory_mib']:.0f}"])
    common.table(rows, ["command", "s", "peak MiB"])
    rows = []
    for one in results.sets:
        teacher = None
        if one.teacher is not None:
            teacher = f"{one.teacher.top1:.3f}"
        rows.append([one.name, one.images, teacher, f"{one.student.top1:.3f}"])
    common.table(rows, ["data set", "images", "teacher top-1", "student top-1"])
    rows = []
    for target in targets:
        rows.append([target["target"], f"{target['image_encoder_mib']:.1f}", target["verdict"]])
    common.table(rows, ["target", "image encoder MiB", "verdict"])


@contextlib.contextmanager
def new_folder(path: Path | None) -> Iterator[Path]:
    """Yield a folder that is new: `path`, which stays, or a temporary one. Exits where it is
    there.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="edgeclip-quickstart-") as temporary:
            yield Path(temporary)
        return
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"{path}: exists already; name a new folder, or collect with --reuse RUN")
    yield path.resolve()


def main() -> None:
    parser = common.arguments(__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--reuse", type=Path, metavar="RUN", help="collect from this finished run")
    where.add_argument("--folder", type=Path, help="a new folder to run in, which stays")
    options = parser.parse_args()
    here = common.this_machine()
    if options.reuse:
        measure(options.reuse, kept(options.reuse), here, options)
        return
    with new_folder(options.folder) as folder:
        recipe = "quickstart"
        if options.form == common.SMOKE:
            recipe = str(toy.write_recipe(folder, toy.RECIPE))
        run, commands = five_commands(folder, recipe, options.form)
        measure(run, commands, here, options)


if __name__ == "__main__":
    main()
