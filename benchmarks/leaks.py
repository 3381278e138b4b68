"""What does a long run leave in memory, in open files and in threads? Slopes, with intervals.

    training step       10^5 steps of milliseconds in one epoch, through `train`: towers, all losses of the paper, the
                        cache read and checked, images decoded
    epoch, checkpoint   500 epochs of a few steps, each with its checkpoint
    inference           10^5 times from a camera's buffer, or its JPEG, to labels: `Bundle.classify`
    opening             10^3 times `Bundle.load`, all files compared with their hashes, an image classified, let go of
    labels              200 times `bake_labels` in place
    ... alone           the same graph through the runtime's own interface: what grows there is not edgeclip's

Each is a process of its own, with the allocator as a user has it: no arena is limited. Every 200th
part of it, anonymous memory (RssAnon), file descriptors and threads are looked at, once Python has
collected its garbage: the standard library's writer of JSON leaves a cycle for each file, which goes
when Python next collects of itself. The first fifth is warm-up: pools, caches and arenas grow to what a round
needs. Of the rest the slope is Theil and Sen's, the median over all pairs of points, with its 95 %
interval; memory moves in steps and points beside each other are alike, so that the interval is too
narrow rather than too wide.

Required: the slope, less that of the runtime alone, at most what makes `BOUND_MIB` of all rounds
together, which no machine that runs an edgeclip for a year would notice, and what is meant to be
kept (an epoch's losses, 4 bytes each; a row of the log); no more open files and threads at the end
than after the warm-up. A runtime that is not installed is left out, and said so.

    python benchmarks/leaks.py --check                # half an hour; --quick is a tenth of it
    python benchmarks/leaks.py --only "opening, openvino" "opening, openvino alone"
"""

import argparse
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import compare
import leak_loops
from leak_loops import LOOPS

if TYPE_CHECKING:
    import numpy as np

POINTS = 200
WARM_UP = 0.2
"""of all points"""
BOUND_MIB = 1.0
"""of all rounds of the whole form"""
LESS = {common.WHOLE: 1, common.QUICK: 10, common.SMOKE: 2_000}
"""the part of the rounds of the whole form"""
LEAST = 10
SMALL = ("training step", "inference, onnxruntime", "opening, onnxruntime", "labels, onnxruntime")
"""loops of the smoke form"""
LIBRARIES = ("torch", "numpy", "onnxruntime", "openvino", "tensorrt")


class Watch:
    """Counts rounds, and looks at this process at evenly spaced ones."""

    def __init__(self, rounds: int):
        import numpy as np

        self.every = max(1, rounds // POINTS)
        self.rounds = 0
        self.taken = 0
        # All at once: a list that grows would be seen.
        self.samples = np.zeros((rounds // self.every, 4), np.int64)

    def __call__(self) -> None:
        self.rounds += 1
        if self.rounds % self.every == 0 and self.taken < len(self.samples):
            gc.collect()
            memory = round(2**20 * common.anonymous_mib())
            now = (self.rounds, memory, common.open_files(), common.threads())
            self.samples[self.taken] = now
            self.taken += 1


def one(name: str, rounds: int, home: Path) -> None:
    """Run a loop in this process; print what was seen: rounds, bytes, open files, threads."""
    watch = Watch(rounds)
    LOOPS[name].run(home, rounds, watch)
    seen = watch.samples[: watch.taken].tolist()
    print(json.dumps({"seen": seen, "cpu_s": round(time.process_time(), 1)}))


def run(name: str, rounds: int, home: Path) -> dict[str, Any]:
    """Return the figures of a loop, run in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--rounds", str(rounds)]
    done = subprocess.run([*command, "--home", str(home)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: exit code {done.returncode}: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return {"rounds": rounds, "cpu_s": answer["cpu_s"], **of_samples(answer["seen"])}


def of_samples(seen: list[list[int]]) -> dict[str, Any]:
    """Return slope and growth behind the warm-up of points: rounds, bytes, open files, threads."""
    import numpy as np
    from scipy import stats

    rest = np.array(seen[int(WARM_UP * len(seen)) :])
    done, memory = rest[:, 0], rest[:, 1]
    slope = stats.theilslopes(memory, done)
    found = (float(slope.slope), float(slope.low_slope), float(slope.high_slope))
    shown = seen[:: max(1, len(seen) // 20)]
    return {
        "bytes_a_round": compare.Interval(*found, n=len(rest))._asdict(),
        "mib": round(float(memory[0]) / 2**20, 2),
        "growth_mib": round(float(memory[-1] - memory[0]) / 2**20, 3),
        "more_files": growth(rest[:, 2]),
        "more_threads": growth(rest[:, 3]),
        "mib_at": [[rounds, round(size / 2**20, 2)] for rounds, size, *_ in shown],
    }


def growth(counts: "np.ndarray") -> int:
    """Return how many more there are in the last fifth than in the first, at their highest.

    A reader's thread is there at one point and not at the next.
    """
    part = max(1, len(counts) // 5)
    return int(counts[-part:].max() - counts[:part].max())


def judged(name: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the required figures of a loop of ours."""
    loop = LOOPS[name]
    of = figures[name]
    slope = compare.Interval(**of["bytes_a_round"])
    what = f"{name}: bytes a round"
    if loop.beside in figures:
        what += " more than alone"
        slope = less(slope, compare.Interval(**figures[loop.beside]["bytes_a_round"]))
    bound = BOUND_MIB * 2**20 / loop.rounds + loop.kept
    return [
        compare.within(what, slope, at_most=bound),
        compare.exact(f"{name}: more open files", of["more_files"], at_most=0),
        compare.exact(f"{name}: more threads", of["more_threads"], at_most=0),
    ]


def less(a: compare.Interval, b: compare.Interval) -> compare.Interval:
    """Return a - b, as wide as both together."""
    assert a.low is not None and a.high is not None
    assert b.low is not None and b.high is not None
    return compare.Interval(a.median - b.median, a.low - b.high, a.high - b.low, min(a.n, b.n))


def version(library: str) -> str | None:
    """Return a library's version; None: not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(options: argparse.Namespace) -> None:
    here = common.this_machine()
    only = SMALL if options.form == common.SMOKE else options.only
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="edgeclip-leaks-") as folder:
        starts = Path(folder) / "start"
        asked = {LOOPS[name].runtime for name in only}
        missing = leak_loops.make_home(starts, asked)
        for name in only:
            loop = LOOPS[name]
            if loop.runtime not in missing:
                home = leak_loops.copy(starts)
                rounds = max(LEAST, loop.rounds // LESS[options.form])
                figures[name] = {"unit": loop.unit, "alone": loop.alone, **run(name, rounds, home)}
                print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
    report(figures, missing, here, options)


def report(
    figures: dict[str, Any], missing: list[str], here: dict[str, Any], options: argparse.Namespace
) -> None:
    rows = []
    required = []
    for name, of in figures.items():
        slope = str(compare.Interval(**of["bytes_a_round"]))
        memory = [f"{of['mib']:.1f}", f"{of['growth_mib']:.2f}", slope]
        counts = [of["more_files"], of["more_threads"], f"{of['cpu_s']:.0f}"]
        rows.append([name, f"{of['rounds']:,}", *memory, *counts])
        if not of["alone"]:
            required += judged(name, figures)
    head = ["loop", "rounds", "MiB", "grown by, MiB", "bytes a round (95 %)"]
    common.table(rows, [*head, "more files", "more threads", "CPU s"])
    for runtime in missing:
        print(f"{runtime}: not installed")
    versions = {library: version(library) for library in LIBRARIES}
    found = {"benchmark": "leaks", "loops": figures, "versions": versions, "not_installed": missing}
    common.finish(found, required, here, options)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--one", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.rounds, options.home)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measure(options)


if __name__ == "__main__":
    main()
