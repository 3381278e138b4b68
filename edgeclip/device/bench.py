"""`edgeclip bench`: latency, throughput, stages, cold start and memory of a bundle on this device.

The load generator below knows no model, no data and no accuracy (MLPerf LoadGen's scope): it takes
a callable and prepared samples. `single_stream` sends one query after another and its result is the
p90 latency; `multi_stream` sends queries of eight images and its result is the p99; `offline` sends
batches and its result is images a second. A run ends when its minimum duration *and* its minimum
count are reached; loading and preprocessing happen before the clock starts. A percentile is quoted
only where enough samples carry it: p99 from 1,000 on, otherwise it is null.

`sustained` goes on for minutes and says what the load does to the board: p90, temperature and
throttling of each tenth (what throttles at its end, or has counted in it), and the drift of p90
from the first to the last. An emulated processor's times are refused: no figure, and the reason.

What bounds it: the model. benchmarks/harness.py shows what the harness itself costs (under 50
microseconds a query). Cold start and peak memory are those of a fresh process that opens the bundle
and answers one query, since this one has long since loaded its libraries.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edgeclip import disk
from edgeclip.device import energy, machine, power
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import images_tar
from edgeclip.device.images import index_tar, read
from edgeclip.device.preprocess import normalize, open_image
from edgeclip.device.profile import Device, Minimum
from edgeclip.device.records import (
    BenchReport,
    ColdStart,
    Energy,
    EnergyMarks,
    Latency,
    Ran,
    Scenario,
    Stages,
    Sustained,
    Window,
    to_json,
)
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

WARM_UP = 10
STAGE_QUERIES = 50
SAMPLES = 32
SCENARIOS = ("single_stream", "multi_stream", "offline")
STREAMS = 8
"""images of one multi_stream query: MLPerf's samples_per_query"""
WINDOWS = 10
REFUSED = "timings refused: the processor is emulated, which says nothing about a board"


class Plan(NamedTuple):
    """What to measure."""

    minimum: Minimum
    scenarios: tuple[str, ...] = SCENARIOS
    minutes: float = 0.0
    """of sustained load besides"""
    meter_csv: Path | None = None
    """what a power meter writes here meanwhile; None: the device's own rails are read"""
    metered: bool = False
    """the meter is the host's, which reads it afterwards (`energy.by_the_hosts_meter`)"""
    python: tuple[str, ...] = (sys.executable,)
    """what starts a fresh process here"""


# --- the load generator


def run_scenario(
    query: Callable[[Any], Any], samples: list[Any], min_duration_s: float, min_query_count: int
) -> list[float]:
    """Return latencies in seconds of one query after another, after WARM_UP untimed ones.

    `samples` are cycled through until both minima are reached.
    """
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


def summary(latencies: list[float]) -> Latency:
    """Return percentiles in milliseconds of latencies in seconds; p99 from 1,000 samples on."""
    ms = np.array(latencies) * 1e3
    p50, p90, p95 = (float(v) for v in np.percentile(ms, [50, 90, 95]))
    p99 = None
    if len(ms) >= 1000:
        p99 = float(np.percentile(ms, 99))
    return Latency(
        queries=len(ms),
        seconds=round(float(ms.sum()) / 1e3, 2),
        latency_ms_min=float(ms.min()),
        latency_ms_mean=float(ms.mean()),
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
    )


def sustained(query: Callable[[Any], Any], samples: list[Any], seconds: float) -> Sustained:
    """Send one query after another for so long, and return what became of each tenth."""
    readings = [machine.throttled()]
    windows = []
    for _ in range(WINDOWS):
        latency = summary(run_scenario(query, samples, seconds / WINDOWS, 1))
        readings.append(machine.throttled())
        windows.append(
            Window(
                queries=latency.queries,
                latency_ms_p50=latency.latency_ms_p50,
                latency_ms_p90=latency.latency_ms_p90,
                temperature_c=machine.temperature_c(),
                throttled=machine.slowed(*readings[-2:]),
            )
        )
    return Sustained(
        minutes=seconds / 60,
        windows=windows,
        p90_drift=windows[-1].latency_ms_p90 / windows[0].latency_ms_p90,
        throttled=_ever_throttled(windows),
        throttled_before=(readings[0] or {}).get("get_throttled", 0) > 0xFFFF,
    )


def _ever_throttled(windows: list[Window]) -> list[str] | None:
    names = set()
    for window in windows:
        if window.throttled is None:
            return None
        names.update(window.throttled)
    return sorted(names)


# --- a bundle


def bench(
    bundle: Bundle, device: Device, here: machine.Facts, evaluation: Path | None, plan: Plan
) -> BenchReport:
    """Measure a bundle on this machine and return the report.

    evaluation: a run's evaluation folder, for images; None: the golden ones. Raises `EdgeclipError`
    where there are no images, or a fresh process cannot answer.
    """
    session = bundle.image_encoder
    ran = msgspec.structs.replace(session.facts, precision=bundle.precision)
    blank = _blank(bundle, here, ran, plan.minimum)
    if here.emulated or device.reach.emulate:
        return msgspec.structs.replace(blank, failures=[REFUSED])

    name = bundle.manifest.target.name
    sources = _images(bundle, evaluation)
    inputs = [normalize(bundle.pixels(open_image(s))[None], bundle.preprocess) for s in sources]
    found: dict[str, Any] = {}
    for scenario in SCENARIOS:
        if scenario in plan.scenarios:
            found[scenario] = _scenario(bundle, device, scenario, inputs, plan.minimum)
    cold = cold_start(bundle, plan.python)
    if plan.minutes:
        say(f"bench {name}: sustained, {plan.minutes:g} minutes")
        found["sustained"] = sustained(session.run, inputs, 60 * plan.minutes)

    unread = []
    try:
        found |= _energy(bundle, device, inputs, plan)
    except EdgeclipError as e:  # the meter's file: hours of timings do not go with it
        unread = [f"energy not measured: {e}"]
    report = msgspec.structs.replace(
        blank,
        **found,
        stages=_stages(bundle, sources),
        cold_start=cold,
        peak_memory_mib=cold.peak_memory_mib,
        temperature_end_c=machine.temperature_c(),
    )
    return msgspec.structs.replace(report, failures=unread + over_budget(report, device))


def _scenario(
    bundle: Bundle, device: Device, scenario: str, inputs: list[np.ndarray], minimum: Minimum
) -> Scenario:
    batch = {"single_stream": 1, "multi_stream": STREAMS, "offline": device.offline_batch}[scenario]
    samples = inputs
    if batch > 1:
        samples = [np.concatenate([inputs[i % len(inputs)] for i in range(batch)])]
    count = -(-minimum.min_query_count // batch)
    if scenario == "multi_stream":  # a p99 needs its queries
        count = minimum.min_query_count
    least = f"at least {minimum.min_duration_s:g} s and {count} queries of {batch}"
    say(f"bench {bundle.manifest.target.name}: {scenario}, {least}")

    query = bundle.image_encoder.run
    latency = summary(run_scenario(query, samples, minimum.min_duration_s, count))
    rate = 1e3 * batch / latency.latency_ms_mean
    return Scenario(batch=batch, images_per_second=rate, **to_json(latency))


def _energy(
    bundle: Bundle, device: Device, inputs: list[np.ndarray], plan: Plan
) -> dict[str, Energy | EnergyMarks | float | None]:
    """Return the report's fields of energy; none where nothing can be read.

    Raises `EdgeclipError` for a meter's file that cannot be read.
    """
    outside = plan.meter_csv is not None or plan.metered
    source = None if outside else power.find(device.rails)
    if "single_stream" not in plan.scenarios or not (source or outside):
        return {}
    seconds = plan.minimum.min_duration_s
    how_long = f"{energy.idle_s(seconds):g} s idle and {seconds:g} s under load"
    say(f"bench {bundle.manifest.target.name}: energy, {how_long}")
    load = energy.Load(bundle.image_encoder.run, inputs, seconds)
    if plan.metered:
        return {"marks": energy.run_load(load, power.Source("", lambda: 0.0))}
    if plan.meter_csv is not None:
        measured = energy.measure_by_meter(load, plan.meter_csv)
    else:
        assert source is not None
        measured = energy.measure(load, source)
    return {"energy": measured, "energy_mj_per_image": measured.mj_per_image}


def check_with(bundle: Bundle, minimum: Minimum) -> str:
    """Return the command line of the runtime's own tool that measures the same as single_stream."""
    model = bundle.folder / bundle.manifest.image_encoder
    size = bundle.preprocess.size
    threads = bundle.threads
    count = minimum.min_query_count
    if bundle.manifest.runtime == "openvino":  # its -nthreads excludes -hint
        limit = f"""echo '{{"CPU": {{"INFERENCE_NUM_THREADS": {threads}}}}}' > threads.json"""
        how = "-hint latency -api sync -nireq 1 -infer_precision f32 -load_config threads.json"
        what = f"-data_shape '[1,3,{size},{size}]' -niter {count}"
        return f"{limit}; benchmark_app -m {model} -d CPU {how} {what}"
    if bundle.manifest.runtime == "tensorrt":
        shapes = f"--shapes=pixels:1x3x{size}x{size}"
        how = f"{shapes} --iterations={count} --percentile=90"
        return f"trtexec --onnx={model} --stronglyTyped {how}"
    tools_name = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "tensorrt"}
    provider = "cpu"
    if bundle.providers:
        provider = tools_name.get(bundle.providers[0], "cpu")
    how = f"-x {threads} -y 1 -C 'session.qdqisint8allowed|1' -e {provider}"
    return f"onnxruntime_perf_test -I -f batch:1 -m times -r {count} {how} {model}"


def incomplete(bundle: Bundle, here: machine.Facts, minimum: Minimum, reason: str) -> BenchReport:
    """Return the report of a benchmark that broke off: no figure of it counts."""
    ran = Ran(
        runtime=bundle.manifest.runtime,
        version=None,
        threads=bundle.threads,
        precision=bundle.manifest.target.precision,
    )
    blank = _blank(bundle, here, ran, minimum)
    failures = [f"incomplete: {reason}"]
    return msgspec.structs.replace(blank, incomplete=reason, failures=failures)


def _blank(bundle: Bundle, here: machine.Facts, ran: Ran, minimum: Minimum) -> BenchReport:
    """Return a report with nothing measured."""
    mlperf = Minimum()
    short_time = minimum.min_duration_s < mlperf.min_duration_s
    few_queries = minimum.min_query_count < mlperf.min_query_count
    return BenchReport(
        target=bundle.manifest.target.name,
        bundle=disk.sha256(bundle.folder / disk.MANIFEST),
        machine=here,
        ran=ran,
        warm_up=WARM_UP,
        min_duration_s=minimum.min_duration_s,
        min_query_count=minimum.min_query_count,
        short_run=short_time or few_queries,
        image_encoder_bytes=bundle.manifest.image_encoder_bytes,
        check_with=check_with(bundle, minimum),
    )


def _images(bundle: Bundle, evaluation: Path | None) -> list[bytes]:
    """Return encoded images to measure with."""
    if evaluation is not None:
        return [read(image) for image in index_tar(images_tar(evaluation))[:SAMPLES]]
    found = [(bundle.folder / name).read_bytes() for name in bundle.manifest.golden.images]
    if not found:
        raise EdgeclipError(
            bundle.folder, "has no golden images to measure with", "export it with --images DIR"
        )
    return found


def _stages(bundle: Bundle, sources: list[bytes]) -> Stages:
    """Return median milliseconds of each stage of one `classify`, measured apart."""
    laps = []
    for i in range(STAGE_QUERIES):
        times = [time.perf_counter()]
        image = open_image(sources[i % len(sources)])
        times.append(time.perf_counter())
        x = normalize(bundle.pixels(image)[None], bundle.preprocess)
        times.append(time.perf_counter())
        features = bundle.image_encoder.run(x)
        times.append(time.perf_counter())
        if bundle.labels:
            bundle.scores(features)
        times.append(time.perf_counter())
        laps.append(np.diff(times))
    decode, preprocess, model, head = (float(ms) for ms in 1e3 * np.median(laps, axis=0))
    if not bundle.labels:
        return Stages(decode, preprocess, model, None)
    return Stages(decode, preprocess, model, head)


COLD_START = r"""
import time; t0 = time.perf_counter()
import json, re, sys
import numpy as np
from edgeclip.device.bundle import Bundle
threads, providers = json.loads(sys.argv[2])
b = Bundle.load(sys.argv[1], threads=threads, providers=providers and tuple(providers))
b.image_encoder; t1 = time.perf_counter()
s = b.preprocess.size; b.encode_pixels(np.zeros((1, s, s, 3), np.uint8)); t2 = time.perf_counter()
# not getrusage: its peak survives fork and exec, so a child inherits a large parent's
peak = int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]) / 1024
print(json.dumps([t1 - t0, t2 - t1, peak]))
"""


def cold_start(
    bundle: Bundle, python: tuple[str, ...] = (sys.executable,), runs: int = 3
) -> ColdStart:
    """Return medians over fresh processes that open the bundle and answer one query.

    They use the bundle's threads and providers. Raises `EdgeclipError` with the last line of a
    process that fails.
    """
    how = json.dumps([bundle.threads, bundle.providers])
    command = [*python, "-c", COLD_START, str(bundle.folder.resolve()), how]
    rows = []
    for _ in range(runs):
        before = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
            raise EdgeclipError(
                bundle.folder,
                f"a fresh process cannot answer with it ({reason})",
                "see what it needs with: edgeclip doctor",
            )
        rows.append([time.perf_counter() - before, *json.loads(done.stdout)])
    wall, load, first, memory = (float(v) for v in np.median(rows, axis=0))
    return ColdStart(
        runs=runs,
        process_ms=1e3 * wall,
        load_ms=1e3 * load,
        first_inference_ms=1e3 * first,
        peak_memory_mib=round(memory),
    )


def over_budget(report: BenchReport, device: Device) -> list[str]:
    """Return what exceeds the device's budget, a line each.

    A budget whose quantity was not measured is reported as such, not as exceeded.
    """
    budget = device.budget
    p90 = report.single_stream.latency_ms_p90 if report.single_stream else None
    measured = (
        ("latency_ms_p90", p90, budget.latency_ms_p90),
        ("peak_memory_mib", report.peak_memory_mib, budget.peak_memory_mib),
        ("energy_mj_per_image", report.energy_mj_per_image, budget.energy_mj_per_image),
    )
    lines = []
    for name, value, limit in measured:
        if limit is None:
            continue
        if value is None:
            lines.append(f"{name} not measured, budget {limit}")
        elif not value <= limit:
            lines.append(f"{name} {value:.2f}, budget {limit}")
    return lines
