"""Are bench's figures the runtime's own? The harness alone, beside a bare loop, beside OpenVINO's
tool, and through ssh.

    the harness      `edgeclip.device.load.run_scenario` drives a runtime that answers at once: what a query costs, all in, and what
                     the harness adds to every latency that it reports
    bare loop        onnxruntime's session.run in a loop of ten lines that imports nothing of edgeclip, beside bench's own path
    benchmark_app    OpenVINO's tool with -hint latency -nireq 1, beside bench's own path
    through ssh      `edgeclip bench --device loopback` beside `--device host-cpu`, each a fresh process

What bounds it: a Python call, two readings of the clock and a list append, under a microsecond; the
runtimes' own scatter is far larger. benchmark_app and bench are fresh processes each time, and
memory lies differently in each.

Required: a query all in under 50 microseconds; p50 within 3 % of the bare loop, 5 % of
benchmark_app and, through loopback, 5 % of local, each judged by the median of the pairs and its 95
% interval. --quick has too few fresh processes to judge the last.

    python benchmarks/harness.py --run runs/quickstart --check       # bundles onnx-fp32 and openvino-fp16 or openvino-int8
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import compare
import numpy as np

from edgeclip.device.bundle import Bundle
from edgeclip.device.load import WARM_UP, run_scenario
from edgeclip.device.preprocess import normalize
from edgeclip.device.runtime import open_session
from edgeclip.errors import EdgeclipError

INPUT = (1, 3, 256, 256)
SAMPLES = 32
RUNS = {"whole": 30, "quick": 30, "smoke": 2}
NULL_QUERIES = {"whole": 50_000, "quick": 2_000, "smoke": 100}
QUERIES = {"whole": 100, "quick": 40, "smoke": 2}
PAIRS = (
    ("bench, onnxruntime", "bare loop", 0.03, {"whole": 150, "quick": 60, "smoke": 2}),
    ("bench, openvino", "benchmark_app", 0.05, {"whole": 60, "quick": 30, "smoke": 1}),
    (
        "edgeclip bench, loopback",
        "edgeclip bench, host-cpu",
        0.05,
        {"whole": 60, "quick": 10, "smoke": 1},
    ),
)
"""(bench's own path, what it is held against, the share that they may differ by, rounds): a call of
microseconds goes more often than a fresh process of seconds"""
BARE = """
import json, sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x, name = np.load(sys.argv[2]), session.get_inputs()[0].name
for line in sys.stdin:
    laps = []
    for i in range(10 + json.loads(line)["queries"]):
        start = time.perf_counter()
        session.run(None, {name: x})
        laps.append(time.perf_counter() - start)
    print(json.dumps({"ms": 1e3 * float(np.median(laps[10:]))}), flush=True)
"""


def harness_alone(options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    queries, runs = NULL_QUERIES[options.form], RUNS[options.form]
    session = open_session("null", Path("null"), threads=1)
    samples = [np.zeros(INPUT, np.float32) for _ in range(SAMPLES)]
    all_in, seen = [], []
    for _ in range(runs):
        before = time.perf_counter()
        latencies = run_scenario(session.run, samples, min_duration_s=0, min_query_count=queries)
        all_in.append(1e6 * (time.perf_counter() - before) / (len(latencies) + WARM_UP))
        seen.append(1e6 * float(np.median(latencies)))
    figures = {"query_us": compare.interval(all_in), "latency_us": compare.interval(seen)}
    common.table(
        [
            ["a query, all in", str(figures["query_us"])],
            ["seen as latency", str(figures["latency_us"])],
        ],
        ["harness", f"microseconds, median of {runs} runs of {queries:,} queries (95 %)"],
    )
    return {k: v._asdict() for k, v in figures.items()}, [
        compare.judge("microseconds a query", all_in, at_most=50)
    ]


def golden_input(bundle: Bundle) -> np.ndarray:
    return normalize(np.load(bundle.folder / "golden" / "pixels.npy")[:1], bundle.preprocess)


def worker(folder: Path) -> None:
    """A process of bench's own path: `{"queries": n}` is answered with the p50 of n queries in
    milliseconds.
    """
    bundle = Bundle.load(folder, threads=1)
    x, session = golden_input(bundle), bundle.image_encoder
    compare.serve(
        lambda request: {
            "ms": 1e3 * float(np.median(run_scenario(session.run, [x], 0.0, request["queries"])))
        }
    )


def benchmark_app(bundle: Bundle, queries: int) -> float:
    """p50 in milliseconds of OpenVINO's own tool."""
    size = bundle.preprocess.size
    tool = [
        str(Path(sys.executable).with_name("benchmark_app")),
        "-m",
        str((bundle.folder / bundle.manifest.image_encoder).resolve()),
        "-d",
        "CPU",
    ]
    how = [
        "-hint",
        "latency",
        "-api",
        "sync",
        "-nireq",
        "1",
        "-infer_precision",
        "f32",
        "-niter",
        str(queries),
        "-load_config",
        "threads.json",
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "threads.json").write_text(
            '{"CPU": {"INFERENCE_NUM_THREADS": 1}}'
        )  # its -nthreads excludes -hint
        done = subprocess.run(
            [*tool, *how, "-data_shape", f"[1,3,{size},{size}]"],
            capture_output=True,
            text=True,
            cwd=folder,
        )
    found = re.search(
        r"Median:\s+([\d.]+) (ms|us)", done.stdout
    )  # microseconds for a model under one millisecond
    if found is None:
        sys.exit(f"benchmark_app gave no median:\n{(done.stdout + done.stderr)[-1000:]}")
    return float(found[1]) / (1 if found[2] == "ms" else 1000)


def cli_bench(bundle: Bundle, device: Path) -> float:
    """p50 in milliseconds of a fresh `edgeclip bench`."""
    command = [
        sys.executable,
        "-m",
        "edgeclip",
        "bench",
        "--bundle",
        str(bundle.folder),
        "--device",
        str(device),
        "--scenario",
        "single_stream",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-1000:])
    return float(json.loads(done.stdout)[0]["single_stream"]["latency_ms_p50"])


def within(what: str, ratios: list[float], share: float) -> list[dict[str, Any]]:
    return [
        compare.judge(f"{what}, at most", ratios, at_most=1 + share),
        compare.judge(f"{what}, at least", ratios, at_least=1 - share),
    ]


def measure(run: Path, options: Any) -> None:
    here = common.this_machine()
    figures, required = harness_alone(options)
    queries = QUERIES[options.form]
    names = [
        "onnx-fp32",
        next(n for n in ("openvino-fp16", "openvino-int8") if (run / "bundles" / n).is_dir()),
    ]
    ort, vino = (Bundle.load(run / "bundles" / n, threads=1, check=True) for n in names)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.save(folder / "x.npy", golden_input(ort))
        (folder / "bare.py").write_text(BARE)
        # A copy without a run around it: the golden images are the samples on both sides.
        for b in (ort, vino):
            subprocess.run(["cp", "-r", str(b.folder), str(folder)], check=True)
        ort, vino = (Bundle.load(folder / n, threads=1) for n in names)
        minimum = (
            f"bench: {{min_duration_s: 0.0, min_query_count: {queries}}}\nruntimes: [onnxruntime]\n"
        )
        (folder / "near.yaml").write_text(minimum)
        import onnxruntime

        (folder / "far.yaml").write_text(
            f"{minimum}reach: {{sshd: true}}\npackages: [onnxruntime=={onnxruntime.__version__}]\n"
        )
        commands = {n: [sys.executable, __file__, "--worker", str(folder / n)] for n in names}
        bare = [
            sys.executable,
            str(folder / "bare.py"),
            str(ort.folder / ort.manifest.image_encoder),
            str(folder / "x.npy"),
        ]
        with compare.workers({**commands, "bare loop": bare}) as ask:
            sides = {
                "bench, onnxruntime": lambda: float(ask["onnx-fp32"](queries=queries)["ms"]),
                "bare loop": lambda: float(ask["bare loop"](queries=queries)["ms"]),
                "bench, openvino": lambda: float(ask[names[1]](queries=queries)["ms"]),
                "benchmark_app": lambda: benchmark_app(vino, queries),
                "edgeclip bench, host-cpu": lambda: cli_bench(ort, folder / "near.yaml"),
                "edgeclip bench, loopback": lambda: cli_bench(ort, folder / "far.yaml"),
            }
            sides["edgeclip bench, loopback"]()  # the runner is copied once
            # Pair by pair, so that the two of a round are neighbors in time.
            measured = []
            for ours, theirs, _, rounds in PAIRS:
                pair = {ours: sides[ours], theirs: sides[theirs]}
                measured.append(compare.interleave(pair, rounds[options.form]))
    rows = []
    for (ours, theirs, share, _), rounds in zip(PAIRS, measured, strict=True):
        ratios = compare.ratios(rounds, ours, theirs)
        ms = [compare.interval(compare.column(rounds, side)) for side in (ours, theirs)]
        rows.append([ours, theirs, str(ms[0]), str(ms[1]), str(compare.interval(ratios))])
        figures[f"{ours} / {theirs}"] = compare.interval(ratios)._asdict()
        required += within(f"{ours} / {theirs}", ratios, share)
    common.table(
        rows,
        ["bench", "beside", "p50 ms (95 %)", "its p50 ms (95 %)", "ratio within a round (95 %)"],
    )
    common.finish({"benchmark": "harness", "queries": queries, **figures}, required, here, options)


def main() -> None:
    parser = common.arguments(__doc__)
    common.run_argument(parser)
    parser.add_argument(
        "--worker", type=Path, metavar="BUNDLE", help="internal: be the process of one bundle"
    )
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
    else:
        common.require_board()
        common.require("pip install 'edgeclip[openvino]'", module="openvino")
        try:
            with common.measured_run(options, ("onnx-fp32", "openvino-fp16")) as run:
                measure(run, options)
        except EdgeclipError as e:
            sys.exit(f"Error: {e}")


if __name__ == "__main__":
    main()
