"""What `edgeclip bench` itself costs: the null runtime through the same load generator.

`edgeclip.bench.run_scenario` drives a runtime that answers at once, with inputs of the usual shape. Two figures:

    a query, all in    wall time of a run over its queries (warm-up included): loop, clock, list and call
    seen as latency    what the harness adds to every latency it reports: the call and one reading of the clock

What bounds it: a Python call, two readings of the clock and a list append, under a microsecond on any machine of
these days. So a latency of 0.5 ms is the model's, not the harness's.

Required: a query all in under 50 microseconds.

    python benchmarks/harness.py --check
"""

import time
from pathlib import Path

import compare
import numpy as np

from edgeclip.bench import WARM_UP, run_scenario
from edgeclip.runtime import open_session

INPUT = (1, 3, 256, 256)
SAMPLES = 32
RUNS = 30


def main() -> None:
    options = compare.arguments(__doc__).parse_args()
    here = compare.this_machine()
    queries = 2_000 if options.quick else 50_000
    session = open_session("null", Path("null"), threads=1)
    samples = [np.zeros(INPUT, np.float32) for _ in range(SAMPLES)]
    all_in, seen = [], []
    for _ in range(RUNS):
        before = time.perf_counter()
        latencies = run_scenario(session.run, samples, min_duration_s=0, min_query_count=queries)
        all_in.append(1e6 * (time.perf_counter() - before) / (len(latencies) + WARM_UP))
        seen.append(1e6 * float(np.median(latencies)))
    figures = {"query_us": compare.interval(all_in), "latency_us": compare.interval(seen)}
    compare.table(
        [["a query, all in", str(figures["query_us"])], ["seen as latency", str(figures["latency_us"])]],
        ["harness", f"microseconds, median of {RUNS} runs of {queries:,} queries (95 %)"],
    )
    required = [compare.judge("microseconds a query", all_in, at_most=50)]
    compare.finish({"benchmark": "harness", "queries": queries, **{k: v._asdict() for k, v in figures.items()}}, required, here, options)


if __name__ == "__main__":
    main()
