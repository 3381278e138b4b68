"""`edgeclip bench`: latency percentiles, throughput, stages, cold start and memory of a bundle on this device.

The load generator below knows no model, no data and no accuracy (MLPerf LoadGen's scope): it takes a callable and
prepared samples. `single_stream` sends one query after another and its result is the p90 latency; `multi_stream` sends
queries of eight images and its result is the p99; `offline` sends batches and its result is images a second. A run
ends when its minimum duration *and* its minimum count are reached; loading and preprocessing happen before the clock
starts. A percentile is quoted only where enough samples carry it: p99 from 1,000 on, otherwise it is null.

`sustained` goes on for minutes and says what the load does to the board: p90, temperature and throttling of each tenth
(what throttles at its end, or has counted in it), and the drift of p90 from the first to the last. An emulated processor's
times are refused: no figure, and the reason.

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

from edgeclip import disk
from edgeclip.device import energy, machine
from edgeclip.device.bundle import Bundle
from edgeclip.device.images import index_tar, read
from edgeclip.device.preprocess import normalize, open_image
from edgeclip.device.profile import Device, Minimum
from edgeclip.device.zero_shot import class_scores
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

WARM_UP = 10
STAGE_QUERIES = 50
SAMPLES = 32
SCENARIOS = ("single_stream", "multi_stream", "offline")
STREAMS = 8
"""images of one multi_stream query: MLPerf's samples_per_query"""
WINDOWS = 10


def run_scenario(
    query: Callable[[Any], Any], samples: list[Any], min_duration_s: float, min_query_count: int
) -> list[float]:
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
    bundle: Bundle,
    device: Device,
    here: dict[str, Any],
    evaluation: Path | None,
    minimum: Minimum,
    scenarios: tuple[str, ...] = SCENARIOS,
    minutes: float = 0.0,
    meter_csv: Path | None = None,
    metered: bool = False,
    python: tuple[str, ...] = (sys.executable,),
) -> dict[str, Any]:
    """The bench report, JSON-able. `evaluation`: a run's evaluation folder, for images; None: the golden ones.

    minutes: of sustained load. meter_csv: what an external power meter writes meanwhile; the device's own rails are read
    without it. metered: such a meter is the host's, which will read it (`energy.by_the_hosts_meter`). python: what starts a
    fresh process here.
    """
    name = bundle.manifest.target.name
    session = bundle.image_encoder
    report = _blank(bundle, here, {**session.facts, "precision": bundle.precision}, minimum)
    if here["emulated"] or device.reach.emulate:
        report["failures"] = [
            "timings refused: the processor is emulated, and an emulator's times say nothing about a board"
        ]
        return report
    sources = _images(bundle, evaluation)
    inputs = [normalize(bundle.pixels(open_image(s))[None], bundle.preprocess) for s in sources]
    for scenario, batch in (
        ("single_stream", 1),
        ("multi_stream", STREAMS),
        ("offline", device.offline_batch),
    ):
        if scenario in scenarios:
            batches = (
                inputs
                if batch == 1
                else [np.concatenate([inputs[i % len(inputs)] for i in range(batch)])]
            )
            count = (
                minimum.min_query_count
                if scenario == "multi_stream"
                else -(-minimum.min_query_count // batch)
            )  # a p99 needs its queries
            say(
                f"bench {name}: {scenario}, at least {minimum.min_duration_s:g} s and {count} queries of {batch}"
            )
            result = summary(run_scenario(session.run, batches, minimum.min_duration_s, count))
            report[scenario] = {
                **result,
                "batch": batch,
                "images_per_second": 1e3 * batch / float(result["latency_ms_mean"] or 1),
            }
    report["stages"] = _stages(bundle, sources)
    report["cold_start"] = cold_start(bundle, python)
    report["peak_memory_mib"] = report["cold_start"]["peak_memory_mib"]
    if minutes:
        say(f"bench {name}: sustained, {minutes:g} minutes")
        report["sustained"] = sustained(session.run, inputs, 60 * minutes)
    unread: list[str] = []
    source = None if meter_csv or metered else energy.find(device.rails)
    if "single_stream" in scenarios and (source or meter_csv or metered):
        say(
            f"bench {name}: energy, {energy.idle_s(minimum.min_duration_s):g} s idle and {minimum.min_duration_s:g} s under load"
        )
        try:
            report["energy"] = energy.measure(
                session.run, inputs, minimum.min_duration_s, source, meter_csv, metered
            )
        except EdgeclipError as e:  # the meter's file: hours of timings do not go with it
            unread = [f"energy not measured: {e}"]
        report["energy_mj_per_image"] = (report["energy"] or {}).get("mj_per_image")
    report["temperature_end_c"] = machine.temperature_c()
    report["failures"] = unread + over_budget(report, device)
    return report


def sustained(query: Callable[[Any], Any], samples: list[Any], seconds: float) -> dict[str, Any]:
    """One query after another for so long, in tenths. p90_drift: of the last tenth, as a multiple of the first's.

    throttled: what did in any of them. throttled_before: a Raspberry Pi has since it was started, and will not say so again.
    """
    readings = [machine.throttled()]
    rows: list[dict[str, Any]] = []
    for _ in range(WINDOWS):
        s = summary(run_scenario(query, samples, seconds / WINDOWS, 1))
        readings.append(machine.throttled())
        rows.append({k: s[k] for k in ("queries", "latency_ms_p50", "latency_ms_p90")})
        rows[-1] |= {
            "temperature_c": machine.temperature_c(),
            "throttled": machine.slowed(*readings[-2:]),
        }
    return {
        "minutes": seconds / 60,
        "windows": rows,
        "p90_drift": float(rows[-1]["latency_ms_p90"] or 0) / float(rows[0]["latency_ms_p90"] or 1),
        "throttled": None
        if None in readings
        else sorted({name for r in rows for name in r["throttled"]}),
        "throttled_before": (readings[0] or {}).get("get_throttled", 0) > 0xFFFF,
    }


def check_with(bundle: Bundle, minimum: Minimum) -> str:
    """The command line of the runtime's own tool by which a sceptic can check single_stream, where the bundle lies."""
    model, size, threads = (
        bundle.folder / bundle.manifest.image_encoder,
        bundle.preprocess.size,
        bundle.threads,
    )
    shape, count = f"1x3x{size}x{size}", minimum.min_query_count
    if bundle.manifest.runtime == "openvino":  # its -nthreads excludes -hint
        limit = f"""echo '{{"CPU": {{"INFERENCE_NUM_THREADS": {threads}}}}}' > threads.json"""
        how = f"-hint latency -api sync -nireq 1 -infer_precision f32 -load_config threads.json -data_shape '[1,3,{size},{size}]' -niter {count}"
        return f"{limit}; benchmark_app -m {model} -d CPU {how}"
    if bundle.manifest.runtime == "tensorrt":
        return f"trtexec --onnx={model} --stronglyTyped --shapes=pixels:{shape} --iterations={count} --percentile=90"
    providers = "".join(
        {"CUDAExecutionProvider": " -e cuda", "TensorrtExecutionProvider": " -e tensorrt"}.get(
            p, ""
        )
        for p in (bundle.providers or ())[:1]
    )
    return f"onnxruntime_perf_test -I -f batch:1 -m times -r {count} -x {threads} -y 1 -C 'session.qdqisint8allowed|1'{providers or ' -e cpu'} {model}"


def incomplete(
    bundle: Bundle, here: dict[str, Any], minimum: Minimum, reason: str
) -> dict[str, Any]:
    """The report of a benchmark that broke off: no figure of it counts."""
    ran = {
        "runtime": bundle.manifest.runtime,
        "version": None,
        "threads": bundle.threads,
        "precision": bundle.manifest.target.precision,
    }
    return {
        **_blank(bundle, here, ran, minimum),
        "incomplete": reason,
        "failures": [f"incomplete: {reason}"],
    }


def _blank(
    bundle: Bundle, here: dict[str, Any], ran: dict[str, Any], minimum: Minimum
) -> dict[str, Any]:
    """A report with nothing measured."""
    return {
        "kind": "bench",
        "target": bundle.manifest.target.name,
        "bundle": disk.sha256(bundle.folder / disk.MANIFEST),
        "machine": here,
        "ran": ran,
        "warm_up": WARM_UP,
        "min_duration_s": minimum.min_duration_s,
        "min_query_count": minimum.min_query_count,
        "short_run": minimum.min_duration_s < Minimum().min_duration_s
        or minimum.min_query_count < Minimum().min_query_count,
        **dict.fromkeys(
            (
                *SCENARIOS,
                "sustained",
                "energy",
                "stages",
                "cold_start",
                "peak_memory_mib",
                "temperature_end_c",
            )
        ),
        "image_encoder_bytes": bundle.manifest.image_encoder_bytes,
        "energy_mj_per_image": None,
        "kept": [],
        "check_with": check_with(bundle, minimum),
    }


def _images(bundle: Bundle, evaluation: Path | None) -> list[bytes]:
    if evaluation is not None:
        return [read(p) for p in index_tar(evaluation / "images.tar")[:SAMPLES]]
    found = [(bundle.folder / p).read_bytes() for p in bundle.manifest.golden.images]
    if not found:
        raise EdgeclipError(
            bundle.folder, "has no golden images to measure with", "export it with --images DIR"
        )
    return found


def _stages(bundle: Bundle, sources: list[bytes]) -> dict[str, float | None]:
    """Median milliseconds of each stage of one `classify`, measured apart; head_ms is None where there are no labels."""
    laps: dict[str, list[float]] = {s: [] for s in ("decode", "preprocess", "model", "head")}
    for i in range(STAGE_QUERIES):
        times = [time.perf_counter()]
        image = open_image(sources[i % len(sources)])
        times.append(time.perf_counter())
        x = normalize(bundle.pixels(image)[None], bundle.preprocess)
        times.append(time.perf_counter())
        features = bundle.image_encoder.run(x)
        times.append(time.perf_counter())
        if bundle.labels:
            class_scores(features, bundle.class_features, bundle.head)
        times.append(time.perf_counter())
        for stage, a, b in zip(laps, times, times[1:], strict=False):
            laps[stage].append(1e3 * (b - a))
    return {
        f"{stage}_ms": float(np.median(values)) if stage != "head" or bundle.labels else None
        for stage, values in laps.items()
    }


def cold_start(
    bundle: Bundle, python: tuple[str, ...] = (sys.executable,), runs: int = 3
) -> dict[str, float | int]:
    """Of fresh processes with the bundle's threads and providers: start to first answer, opening it, first inference (medians), peak
    resident memory. Raises `EdgeclipError` with the last line of a process that fails.
    """
    code = (
        "import time; t0=time.perf_counter()\n"
        "import json, re, sys\n"
        "import numpy as np\n"
        "from edgeclip.device.bundle import Bundle\n"
        "threads, providers = json.loads(sys.argv[2])\n"
        "b=Bundle.load(sys.argv[1], threads=threads, providers=providers and tuple(providers)); b.image_encoder; t1=time.perf_counter()\n"
        "s=b.preprocess.size; b.encode_pixels(np.zeros((1,s,s,3),np.uint8)); t2=time.perf_counter()\n"
        # not getrusage: its peak survives fork and exec, so a child inherits a large parent's
        "print(json.dumps([t1-t0, t2-t1, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/1024]))\n"
    )
    rows = []
    for _ in range(runs):
        before = time.perf_counter()
        how = json.dumps([bundle.threads, bundle.providers])
        done = subprocess.run(
            [*python, "-c", code, str(bundle.folder.resolve()), how], capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
            raise EdgeclipError(
                bundle.folder,
                f"a fresh process cannot answer with it ({reason})",
                "see what it needs with: edgeclip doctor",
            )
        rows.append([time.perf_counter() - before, *json.loads(done.stdout)])
    wall, load, first, memory = (float(v) for v in np.median(rows, axis=0))
    return {
        "runs": runs,
        "process_ms": 1e3 * wall,
        "load_ms": 1e3 * load,
        "first_inference_ms": 1e3 * first,
        "peak_memory_mib": round(memory),
    }


def over_budget(report: dict[str, Any], device: Device) -> list[str]:
    """What exceeds the device's budget; a limit on what was not measured is exceeded by nothing, and is named too."""
    found = {
        "latency_ms_p90": (report["single_stream"] or {}).get("latency_ms_p90"),
        "peak_memory_mib": report["peak_memory_mib"],
        "energy_mj_per_image": report["energy_mj_per_image"],
    }
    limits = {k: getattr(device.budget, k) for k in found if getattr(device.budget, k) is not None}
    return [
        f"{k} {'not measured' if found[k] is None else f'{found[k]:.2f}'}, budget {v}"
        for k, v in limits.items()
        if found[k] is None or not found[k] <= v
    ]
