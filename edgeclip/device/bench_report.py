"""What `bench` reports: latency, throughput, memory and energy of a bundle on a device."""

from typing import Literal

from edgeclip.device.bounds import Count, Positive
from edgeclip.device.machine import Facts
from edgeclip.device.records import Ran, Rule
from edgeclip.disk import FORMAT as FORMAT
from edgeclip.disk import Record as Record


class Histogram(Record):
    """How latencies are spread."""

    low_ms: Positive
    """the least"""
    high_ms: Positive
    """the 99th percentile; of few queries the largest"""
    counts: list[Count]
    """queries in bins of equal width between the two"""
    beyond: Count
    """queries above"""


class Latency(Record):
    """Latencies of one query after another."""

    queries: Count
    seconds: Positive
    """sum of all latencies"""
    latency_ms_min: Positive
    latency_ms_mean: Positive
    latency_ms_p50: Positive
    latency_ms_p90: Positive
    latency_ms_p95: Positive
    latency_ms_p99: Positive | None
    """null: fewer than 1,000 queries"""
    latency_ms_p90_low: Positive | None = None
    """one-sided 95 % limit by order statistics; null: too few queries; so below"""
    latency_ms_p90_high: Positive | None = None
    latency_ms_p99_low: Positive | None = None
    latency_ms_p99_high: Positive | None = None
    histogram: Histogram | None = None
    """null: a report of an older edgeclip"""


class Scenario(Latency, kw_only=True):
    """One of MLPerf's scenarios."""

    batch: Count
    """images of one query"""
    images_per_second: Positive


class WholeImage(Record):
    """One `classify` after another: what a user waits for, where `Scenario` has the model alone."""

    from_file: Latency
    """from an encoded image's bytes in memory to its label (to its features where the bundle has no
    labels)"""
    from_frame: Latency
    """the same queries without decoding: from the pixels of a camera's buffer"""


class Stages(Record):
    """Median milliseconds of each stage of one `classify`."""

    decode_ms: Positive
    preprocess_ms: Positive
    model_ms: Positive
    head_ms: Positive | None
    """null: the bundle has no labels"""


class ColdStart(Record):
    """Medians over fresh processes that open the bundle and answer one query."""

    runs: Count
    process_ms: Positive
    """from the process's start to its end"""
    load_ms: Positive
    """imports, and opening the bundle"""
    first_inference_ms: Positive
    peak_memory_mib: Count
    """resident"""


class Window(Record):
    """A tenth of the sustained load."""

    queries: int
    latency_ms_p50: float
    latency_ms_p90: float
    temperature_c: float | None
    """at its end, the hottest zone; null: cannot be read"""
    throttled: list[str] | None
    """what held a clock down in it; null: unknown"""


class Sustained(Record):
    minutes: float
    windows: list[Window]
    p90_drift: float
    """p90 of the last window, as a multiple of the first's"""
    throttled: list[str] | None
    """what held a clock down in any window; null: unknown"""
    throttled_before: bool = False
    """a Raspberry Pi has throttled since it was started, and will not say so again"""


class Energy(Record, kw_only=True):
    """Energy an image above idle, in the single-stream scenario."""

    source: str
    """sensor and rails, or the meter's file"""
    samples_idle: int
    samples_load: int
    rate_hz: float | None = None
    """samples a second under load; null: too few samples for any figure"""
    idle_w: float | None = None
    load_w: float | None = None
    steady: bool | None
    """had the temperature come to rest? null: unknown"""
    mj_per_image: float | None = None
    """millijoules"""
    mj_per_image_half_width: float | None = None
    """millijoules: 95 %, from the scatter of the samples"""
    images: int
    """answered in the time that counts"""
    seconds: float
    """the time that counts: from steady to the end of the load"""
    sensor_error: str = "not known: the half-width is that of the samples only"
    clock_offset_s: float | None = None
    """the board's clock less the host's; null: one clock"""
    clock_half_width_s: float | None = None
    """bound of the offset's error"""


class Reading(Record):
    """One moment of a power measurement."""

    time: float
    """seconds since 1970"""
    watts: float
    """over all rails; of a counter the mean since the reading before"""
    celsius: float | None
    """null: cannot be read"""


class EnergyMarks(Record):
    """What a board notes while the host reads the meter: its clock, and its temperatures."""

    times: tuple[float, float, float]
    """idle from, load from, load to; seconds since 1970 by the board's clock"""
    done: list[tuple[float, int]]
    """time and images answered until then"""
    temperatures: list[Reading]


class PreflightRow(Record):
    """One question about the machine's fitness to be measured."""

    check: str
    status: Literal["pass", "warn", "fail"]
    found: str
    need: str


class BenchReport(Record, kw_only=True):
    """`edgeclip bench`: latency, throughput, memory and energy of a bundle on a device."""

    kind: Literal["bench"] = "bench"
    format: int = FORMAT
    device: str | None = None
    """the profile's name"""
    target: str
    """the target's name"""
    bundle: str
    """sha256 of the bundle's manifest"""
    machine: Facts
    ran: Ran
    warm_up: int
    """untimed queries before each scenario"""
    min_duration_s: float
    min_query_count: int
    short_run: bool
    """shorter than MLPerf's 60 s or fewer than its 1,024 queries"""
    single_stream: Scenario | None = None
    """null: not measured; so below"""
    multi_stream: Scenario | None = None
    offline: Scenario | None = None
    whole_image: WholeImage | None = None
    others_busy: float | None = None
    """processors that other work had on average while it was timed; null: cannot be read"""
    sustained: Sustained | None = None
    energy: Energy | None = None
    marks: EnergyMarks | None = None
    """of a board whose meter the host reads; null once it is read"""
    stages: Stages | None = None
    cold_start: ColdStart | None = None
    peak_memory_mib: int | None = None
    """resident, of a fresh process"""
    temperature_end_c: float | None = None
    image_encoder_bytes: int
    """of all files of the image encoder"""
    bundle_bytes: int | None = None
    """of all files of the bundle; null: a report of an older edgeclip"""
    energy_mj_per_image: float | None = None
    """millijoules above idle"""
    kept: list[str] = []
    """fields that an earlier report of the same bundle, machine and minimum measured, and this one
    did not"""
    check_with: str
    """the command line of the runtime's own tool that measures the same"""
    incomplete: str | None = None
    """why the benchmark broke off; null: it did not"""
    preflight: list[PreflightRow] = []
    rules: list[Rule] = []
    """a budget of the device each"""
    failures: list[str] = []
    """budgets exceeded, timings refused, a line each"""
    verdict: Literal["holds", "fails", "cannot tell"] | None = None
    """null: a report of an older edgeclip"""


class Ratio(Record):
    """How many times as fast, with the 95 % interval of the median."""

    median: Positive
    low: Positive
    high: Positive


class BesideRow(Record, kw_only=True):
    """One of several bundles that were timed turn by turn."""

    name: str
    """of the bundle's folder"""
    bundle: str
    """sha256 of the bundle's manifest"""
    precision: str
    whole_ms: Positive
    """median of an image's bytes to its label"""
    model_ms: Positive
    whole: Ratio
    """times as fast as the first row for a whole image"""
    model: Ratio
    """the same for the model alone"""


class Beside(Record, kw_only=True):
    """Bundles of one student on one device, turn by turn; the first row is the reference."""

    kind: Literal["beside"] = "beside"
    format: int = FORMAT
    device: str | None = None
    """the profile's name"""
    machine: Facts
    rounds: int
    others_busy: float | None
    """processors that other work had on average meanwhile; null: cannot be read"""
    rows: list[BesideRow]
