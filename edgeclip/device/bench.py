"""`edgeclip bench`: latency, throughput, stages, cold start and memory of a bundle on this device.

MLPerf's scenarios time the image encoder alone: `single_stream` sends one query after another and
its result is the p90 latency; `multi_stream` sends queries of eight images and its result is the
p99; `offline` sends batches and its result is images a second. `whole_image` is what a user waits
for: one `classify` after another, from an encoded image's bytes to its label, and from a camera's
buffer to it, with the stages between. How a run is timed: load.py.

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
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edgeclip import disk
from edgeclip.device import energy, machine, power
from edgeclip.device.bench_report import (
    BenchReport,
    ColdStart,
    Energy,
    EnergyMarks,
    Scenario,
    Stages,
    WholeImage,
)
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import images_tar
from edgeclip.device.images import index_tar, read
from edgeclip.device.load import WARM_UP, OtherWork, run_scenario, summary, sustained
from edgeclip.device.preprocess import normalize, open_image
from edgeclip.device.profile import Device, Minimum
from edgeclip.device.records import (
    Ran,
    to_json,
)
from edgeclip.device.rules import judged
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

SAMPLES = 32
MLPERF = ("single_stream", "multi_stream", "offline")
"""scenarios that time the image encoder alone"""
SCENARIOS = (*MLPERF, "whole_image")
STREAMS = 8
"""images of one multi_stream query: MLPerf's samples_per_query"""
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
        return judged(blank, device, [REFUSED])

    name = bundle.manifest.target.name
    sources = images_of(bundle, evaluation)
    inputs = [normalize(bundle.pixels(open_image(s))[None], bundle.preprocess) for s in sources]
    found: dict[str, Any] = {}
    others = OtherWork()
    for scenario in MLPERF:
        if scenario in plan.scenarios:
            found[scenario] = _scenario(bundle, device, scenario, inputs, plan.minimum)
    if "whole_image" in plan.scenarios:
        found |= _whole_image(bundle, sources, plan.minimum)
    found["others_busy"] = others.processors()
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
        cold_start=cold,
        peak_memory_mib=cold.peak_memory_mib,
        temperature_end_c=machine.temperature_c(),
    )
    return judged(report, device, unread)


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
    own = bundle.manifest.session_options.get(bundle.manifest.image_encoder, {})
    entries = {"session.qdqisint8allowed": "1", **own}  # an older manifest names none
    config = " ".join(f"{key}|{value}" for key, value in entries.items())
    how = f"-x {threads} -y 1 -C '{config}' -e {provider}"
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
    return msgspec.structs.replace(blank, incomplete=reason, failures=failures, verdict="fails")


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
        bundle_bytes=bundle.size_bytes,
        check_with=check_with(bundle, minimum),
    )


def images_of(bundle: Bundle, evaluation: Path | None) -> list[bytes]:
    """Return encoded images to measure with."""
    if evaluation is not None:
        return [read(image) for image in index_tar(images_tar(evaluation))[:SAMPLES]]
    found = [bundle.file(name).read_bytes() for name in bundle.manifest.golden.images]
    if not found:
        raise EdgeclipError(
            bundle.folder, "has no golden images to measure with", "export it with --images DIR"
        )
    return found


def _whole_image(bundle: Bundle, sources: list[bytes], minimum: Minimum) -> dict[str, Any]:
    """Time one `classify` after another; return the report's fields `whole_image` and `stages`."""
    least = f"at least {minimum.min_duration_s:g} s and {minimum.min_query_count} queries"
    say(f"bench {bundle.manifest.target.name}: whole_image, {least}")

    laps: list[np.ndarray] = []

    def classify(source: bytes) -> None:
        laps.append(stage_seconds(bundle, source))

    run_scenario(classify, sources, minimum.min_duration_s, minimum.min_query_count)
    seconds = np.array(laps[WARM_UP:])
    decode, preprocess, model, head = (float(ms) for ms in 1e3 * np.median(seconds, axis=0))
    return {
        "whole_image": WholeImage(
            from_file=summary(list(seconds.sum(axis=1))),
            from_frame=summary(list(seconds[:, 1:].sum(axis=1))),
        ),
        "stages": Stages(decode, preprocess, model, head if bundle.labels else None),
    }


def stage_seconds(bundle: Bundle, source: bytes) -> np.ndarray:
    """Return [4] the seconds of each stage of one `classify`: decode, preprocess, model, head."""
    times = [time.perf_counter()]
    image = open_image(source)
    times.append(time.perf_counter())
    x = normalize(bundle.pixels(image)[None], bundle.preprocess)
    times.append(time.perf_counter())
    features = bundle.image_encoder.run(x)
    times.append(time.perf_counter())
    if bundle.labels:
        bundle.scores(features)
    times.append(time.perf_counter())
    return np.diff(times)


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
