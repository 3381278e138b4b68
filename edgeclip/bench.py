"""`edgeclip bench`: latency percentiles, throughput, stages, cold start and memory of a bundle on this device.

The load generator below knows no model, no data and no accuracy (MLPerf LoadGen's scope): it takes a callable and
prepared samples. `single_stream` sends one query after another and its result is the p90 latency; `offline` sends
batches and its result is pictures a second. A run ends when its minimum duration *and* its minimum count are reached;
loading and preprocessing happen before the clock starts. A percentile is quoted only where enough samples carry it:
p99 from 1,000 on, otherwise it is null.

What bounds it: the model. `benchmarks/harness.py` runs the null runtime through the same path and shows what the
harness itself costs (under 50 microseconds a query).

Cold start and peak memory are those of a fresh process that opens the bundle and answers one query, since this one
has long since loaded its libraries.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip import disk, machine
from edgeclip.bundle import Bundle
from edgeclip.device import Device, Minimum
from edgeclip.errors import EdgeclipError
from edgeclip.pictures import index_tar, read
from edgeclip.preprocess import normalise, open_picture
from edgeclip.progress import say
from edgeclip.zero_shot import class_scores

WARM_UP = 10
STAGE_QUERIES = 50
SAMPLES = 32
SCENARIOS = ("single_stream", "offline")


def run_scenario(query: Callable[[Any], Any], samples: list[Any], min_duration_s: float, min_query_count: int) -> list[float]:
    """Latencies in seconds of one query after another, cycling through `samples`, after WARM_UP untimed ones."""
    for i in range(WARM_UP):
        query(samples[i % len(samples)])
    latencies: list[float] = []
    clock = time.perf_counter
    start = clock()
    while len(latencies) < min_query_count or clock() - start < min_duration_s:
        sample = samples[len(latencies) % len(samples)]
        before = clock()
        query(sample)
        latencies.append(clock() - before)
    return latencies


def summary(latencies: list[float]) -> dict[str, float | int | None]:
    """Milliseconds: min, mean, p50, p90, p95, and p99 from 1,000 samples on."""
    ms = np.array(latencies) * 1e3
    p50, p90, p95, p99 = (float(v) for v in np.percentile(ms, [50, 90, 95, 99]))
    return {
        "queries": len(ms),
        "seconds": round(float(ms.sum()) / 1e3, 2),
        "latency_ms_min": float(ms.min()),
        "latency_ms_mean": float(ms.mean()),
        "latency_ms_p50": p50,
        "latency_ms_p90": p90,
        "latency_ms_p95": p95,
        "latency_ms_p99": p99 if len(ms) >= 1000 else None,
    }


def bench(
    bundle: Bundle, device: Device, here: dict[str, Any], evaluation: Path | None, minimum: Minimum, scenarios: tuple[str, ...] = SCENARIOS
) -> dict[str, Any]:
    """The bench report, JSON-able. `evaluation`: a run's evaluation folder, for pictures; None: the golden ones."""
    name = bundle.manifest["target"]["name"]
    sources = _pictures(bundle, evaluation)
    pixels = [bundle.pixels(open_picture(s)) for s in sources]
    inputs = [normalise(p[None], bundle.preprocess) for p in pixels]
    session = bundle.image_encoder
    report: dict[str, Any] = {
        "kind": "bench",
        "target": name,
        "bundle": disk.sha256(bundle.folder / disk.MANIFEST),
        "machine": here,
        "ran": session.facts,
        "warm_up": WARM_UP,
        "min_duration_s": minimum.min_duration_s,
        "min_query_count": minimum.min_query_count,
        "short_run": minimum.min_duration_s < Minimum().min_duration_s or minimum.min_query_count < Minimum().min_query_count,
        "single_stream": None,
        "offline": None,
        "image_encoder_bytes": bundle.manifest["image_encoder_bytes"],
        "energy_mj_per_image": None,
    }
    if "single_stream" in scenarios:
        say(f"bench {name}: single_stream, at least {minimum.min_duration_s:g} s and {minimum.min_query_count} queries")
        report["single_stream"] = {**summary(run_scenario(session.run, inputs, minimum.min_duration_s, minimum.min_query_count)), "batch": 1}
    if "offline" in scenarios:
        say(f"bench {name}: offline, batches of {device.offline_batch}")
        batch = np.concatenate([inputs[i % len(inputs)] for i in range(device.offline_batch)])
        result = summary(run_scenario(session.run, [batch], minimum.min_duration_s, -(-minimum.min_query_count // device.offline_batch)))
        report["offline"] = {**result, "batch": device.offline_batch, "pictures_per_second": 1e3 * device.offline_batch / float(result["latency_ms_mean"] or 1)}
    report["stages"] = _stages(bundle, sources)
    report["cold_start"] = cold_start(bundle.folder, bundle.threads)
    report["peak_memory_mib"] = report["cold_start"]["peak_memory_mib"]
    report["temperature_end_c"] = machine.temperature_c()
    report["failures"] = _over_budget(report, device)
    return report


def incomplete(bundle: Bundle, here: dict[str, Any], reason: str) -> dict[str, Any]:
    """The report of a benchmark that broke off: no figure of it counts."""
    what = {"target": bundle.manifest["target"]["name"], "bundle": disk.sha256(bundle.folder / disk.MANIFEST), "machine": here}
    return {"kind": "bench", **what, "incomplete": reason, "single_stream": None, "offline": None, "failures": [f"incomplete: {reason}"]}


def _pictures(bundle: Bundle, evaluation: Path | None) -> list[bytes]:
    if evaluation is not None:
        return [read(p) for p in index_tar(evaluation / "pictures.tar")[:SAMPLES]]
    found = [(bundle.folder / p).read_bytes() for p in bundle.manifest["golden"]["pictures"]]
    if not found:
        raise EdgeclipError(bundle.folder, "has no golden pictures to measure with", "export it with --images DIR")
    return found


def _stages(bundle: Bundle, sources: list[bytes]) -> dict[str, float]:
    """Median milliseconds of each stage of one `classify`, measured apart."""
    laps: dict[str, list[float]] = {s: [] for s in ("decode", "preprocess", "model", "head")}
    for i in range(STAGE_QUERIES):
        times = [time.perf_counter()]
        image = open_picture(sources[i % len(sources)])
        times.append(time.perf_counter())
        x = normalise(bundle.pixels(image)[None], bundle.preprocess)
        times.append(time.perf_counter())
        features = bundle.image_encoder.run(x)
        times.append(time.perf_counter())
        if bundle.labels:
            class_scores(features, bundle.class_features, bundle.head)
        times.append(time.perf_counter())
        for stage, a, b in zip(laps, times, times[1:], strict=False):
            laps[stage].append(1e3 * (b - a))
    return {f"{stage}_ms": float(np.median(values)) for stage, values in laps.items()}


def cold_start(bundle: Path, threads: int, runs: int = 3) -> dict[str, float | int]:
    """Of fresh processes: start to first answer, opening the bundle, first inference (medians), peak resident memory."""
    code = (
        "import time; t0=time.perf_counter()\n"
        "import json, re, sys\n"
        "import numpy as np\n"
        "from edgeclip.bundle import Bundle\n"
        "b=Bundle.load(sys.argv[1], threads=int(sys.argv[2])); b.image_encoder; t1=time.perf_counter()\n"
        "s=b.preprocess.size; b.encode_pixels(np.zeros((1,s,s,3),np.uint8)); t2=time.perf_counter()\n"
        # not getrusage: its peak survives fork and exec, so a child inherits a large parent's
        "print(json.dumps([t1-t0, t2-t1, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/1024]))\n"
    )
    rows = []
    for _ in range(runs):
        before = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, str(bundle.resolve()), str(threads)], capture_output=True, text=True, check=True)
        rows.append([time.perf_counter() - before, *json.loads(done.stdout)])
    wall, load, first, memory = (float(v) for v in np.median(rows, axis=0))
    return {"runs": runs, "process_ms": 1e3 * wall, "load_ms": 1e3 * load, "first_inference_ms": 1e3 * first, "peak_memory_mib": round(memory)}


def _over_budget(report: dict[str, Any], device: Device) -> list[str]:
    found = {"latency_ms_p90": (report["single_stream"] or {}).get("latency_ms_p90"), "peak_memory_mib": report["peak_memory_mib"]}
    limits = {k: getattr(device.budget, k) for k in found}
    return [f"{k} {found[k]:.1f}, budget {limits[k]}" for k in found if limits[k] is not None and found[k] is not None and found[k] > limits[k]]
