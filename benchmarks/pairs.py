"""Start every two commands on one run, cache or bundle at once: does each end as if it were alone?

Of every pair both are started together, and each when the other is about to make the middle one of
its steps of writing (crash_points.py). Each ends well, or with one
line that names who holds what it needs; then it is run again. Required is that

    wrong      what lies there has the bytes of one of the two orders, one after the other, times
               aside, and no command ends otherwise than it does in one of them
    left       nothing lies there besides
    traceback  no command ends with one
    stuck      no command waits for ever, and one that was refused ends well when it is run again

are all 0.

    python benchmarks/pairs.py --check
    python benchmarks/pairs.py --only run
"""

import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import compare
import crash_points
import crash_stages
from crash_points import Done
from crash_stages import BUNDLE, EXPORT, OF_BUNDLE, RUN

WELL = (0, 3, 4)
"""exit codes: done; a gate failed; a gate cannot be told"""
FAULTS = ("wrong", "left", "traceback", "stuck")
HOW = {
    common.WHOLE: ("together", "middle"),
    common.QUICK: ("middle",),
    common.SMOKE: ("middle",),
}
"""when the second is started: with the first one, or at a step of it"""
PAUSE_S = 0.3
"""for which the first waits at that step, so that the second is at work"""
MEASURED = re.compile(r"\.(parity|bench|history|engines|beside)\b|/report\.html$")
"""files that hold times: only their names are compared"""
LESSER = re.compile(r"\.bench-(short|under-load)\.json$")
"""where a benchmark goes that other work disturbed"""
CLIP = ["--bundle", BUNDLE, "--device", "host-cpu"]
NEW = ["--target", "onnx-fp32", "--labels", "a fig, a pear", "--out", "clip"]
COMMANDS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "recipe": ("data", {"init": ["init", "photos", "--out", "mine.yaml"]}),
    "cache": (
        "data",
        {
            "cache build": ["cache", "build", "toy.yaml"],
            "distill": ["distill", "toy.yaml"],
            "distill --fresh": ["distill", "toy.yaml", "--fresh"],
        },
    ),
    "run": (
        "report",
        {
            "distill": ["distill", "toy.yaml"],
            "distill --fresh": ["distill", "toy.yaml", "--fresh"],
            "export": [*EXPORT[:-1], "onnx-fp32.yaml"],
            "evaluate": ["evaluate", RUN, "--protocol", "zero_shot"],
            "validate": ["validate", *OF_BUNDLE],
            "bench": ["bench", *OF_BUNDLE, "--scenario", "single_stream"],
            "report": ["report", RUN],
        },
    ),
    "bundle": (
        "bundles",
        {
            "export": ["export", "--model", "clip.json", "--weights", "random", *NEW],
            "labels --in-place": ["labels", BUNDLE, "a pear, a plum", "--in-place"],
            "labels --out": ["labels", BUNDLE, "a pear, a plum", "--out", "new"],
            "embed": ["embed", "photo.png", "--bundle", BUNDLE, "--out", "f.npy"],
            "conformance": ["conformance", BUNDLE, "--pack", "pack", "--keep", "kept"],
            "validate": ["validate", *CLIP],
        },
    ),
}
"""what they share, to (the folder that they start from, the commands that touch it)"""


class Pair(NamedTuple):
    shared: str
    first: str
    second: str

    @property
    def commands(self) -> tuple[list[str], list[str]]:
        of = COMMANDS[self.shared][1]
        return of[self.first], of[self.second]


class Order(NamedTuple):
    """What comes of two commands, one after the other."""

    codes: tuple[int, int]
    """of the pair's first and of its second"""
    tree: dict[str, str]


def pairs(shared: str) -> list[Pair]:
    """Return every ordered pair of the commands that share it, each with itself too."""
    names = COMMANDS[shared][1]
    return [Pair(shared, a, b) for a in names for b in names]


def tree(work: Path) -> dict[str, str]:
    """Return {relative path: digest} of what lies in a folder, as the orders are compared."""
    stage = crash_stages.Stage("", [], "")
    found = {}
    for name, digest in crash_stages.tree(work, stage).items():
        measured = MEASURED.search(name)
        found[LESSER.sub(".bench.json", name)] = "" if measured else digest
    return found


class Starts:
    """Where the commands start from, and what each does alone and after another; run once each."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.work = home / "work"
        self.steps: dict[tuple[str, str], int] = {}
        self.orders: dict[Pair, Order] = {}

    def copy(self, pair: Pair) -> None:
        """Let the working folder be as it is before both."""
        crash_points.copy(self.home / COMMANDS[pair.shared][0], self.work)

    def steps_of_first(self, pair: Pair) -> int:
        """Return in how many steps the first one writes."""
        key = (pair.shared, pair.first)
        if key not in self.steps:
            self.copy(pair)
            self.steps[key] = len(crash_points.steps(pair.commands[0], self.work)[1])
        return self.steps[key]

    def in_order(self, pair: Pair) -> Order:
        """Return what comes of both, one after the other."""
        if pair not in self.orders:
            self.copy(pair)
            codes = []
            for command in pair.commands:
                done = crash_points.run(command, self.work)
                if "Traceback" in done.said:
                    raise RuntimeError(f"{' '.join(command)}: {done.said[-2000:]}")
                codes.append(done.code)
            if codes[0] not in WELL:
                raise RuntimeError(f"{pair.first}: alone it ends with exit code {codes[0]}")
            self.orders[pair] = Order((codes[0], codes[1]), tree(self.work))
        return self.orders[pair]


def at_once(pair: Pair, work: Path, at: int | None) -> tuple[Done, Done]:
    """Run both at once; at: the first's step at which the second starts, None: with it."""
    first, second = pair.commands
    if at is None:
        a = crash_points.begin(first, work, name="first")
        b = crash_points.begin(second, work, name="second")
        return crash_points.end(a), crash_points.end(b)

    reader, writer = os.pipe()

    def reached(step: crash_points.Step, number: int) -> None:
        if number == at:
            os.write(writer, b".")
            time.sleep(PAUSE_S)

    a = crash_points.begin(first, work, reached, "first")
    os.close(writer)
    os.read(reader, 1)  # nothing, where the first ended without that step
    os.close(reader)
    b = crash_points.begin(second, work, name="second")
    return crash_points.end(a), crash_points.end(b)


def ended(done: Done, codes: set[int]) -> str:
    """Return 'well', 'refused' or the fault. codes: that it ends with when it runs alone."""
    last = (done.said.strip().splitlines() or [""])[-1]
    if done.code < 0:
        return "stuck"
    if "Traceback" in done.said:
        return "traceback"
    if done.code == 1 and "is in use by edgeclip" in last and last.startswith("Error: "):
        return "refused"
    if done.code in WELL or done.code in codes:
        return "well"
    return "wrong"


def trial(pair: Pair, work: Path, at: int | None, orders: tuple[Order, Order]) -> Iterator[Any]:
    """Run a pair at once; yield 'refused' for each that was, and (fault, why) for each fault."""
    for i, done in enumerate(at_once(pair, work, at)):
        codes = {orders[0].codes[i], orders[1].codes[1 - i]}
        end = ended(done, codes)
        if end in FAULTS:
            yield end, f"{pair[1 + i]}: {done.code}: {done.said[-300:]}"
        if end == "refused":
            yield end
            again = crash_points.run(pair.commands[i], work)
            if ended(again, codes) != "well":
                yield "stuck", f"{pair[1 + i]}, run again: {again.code}: {again.said[-300:]}"
    after = tree(work)
    if after in [order.tree for order in orders]:
        return
    known = orders[0].tree.keys() | orders[1].tree.keys()
    if extra := sorted(after.keys() - known):
        yield "left", ", ".join(extra)
    differences = []
    for order in orders:
        differ = [n for n in order.tree if after.get(n) != order.tree[n]]
        differences.append(", ".join(differ) or "nothing")
    if "nothing" not in differences:
        yield "wrong", " | ".join(differences)


def of_pair(pair: Pair, starts: Starts, how: tuple[str, ...]) -> dict[str, Any]:
    """Return the counts of one pair; `faults` names each."""
    steps = starts.steps_of_first(pair)
    places = {"together": None, "middle": steps // 2}
    swapped = Pair(pair.shared, pair.second, pair.first)
    orders = (starts.in_order(pair), starts.in_order(swapped))
    counts = dict.fromkeys(("runs", "refused", *FAULTS), 0)
    faults = []
    for when in how:
        if when == "together" and pair.first > pair.second:
            continue  # it is the other pair's too
        if when != "together" and not steps:
            continue
        starts.copy(pair)
        counts["runs"] += 1
        for found in trial(pair, starts.work, places[when], orders):
            if found == "refused":
                counts[found] += 1
                continue
            fault, why = found
            counts[fault] += 1
            faults.append(f"{fault}, {when}: {why}"[:600])
    return {**pair._asdict(), **counts, "faults": faults}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    what = "only pairs of these commands"
    parser.add_argument("--commands", nargs="+", metavar="COMMAND", help=what)
    options = parser.parse_args()
    here = common.this_machine()
    chosen = [pair for shared in options.only for pair in pairs(shared)]
    if options.commands:
        chosen = [p for p in chosen if {p.first, p.second} <= set(options.commands)]
    if options.form == common.SMOKE:
        chosen = [Pair("bundle", "labels --in-place", "embed")]
    crash_points.prepare()
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgeclip-pairs-") as name:
        home = Path(name)
        crash_stages.make_starts(home)
        starts = Starts(home)
        target = (Path(__file__).parent.parent / "export/onnx-fp32.yaml").read_text()
        again = target.replace("opset: 18", "opset: 17")
        (home / "report" / "onnx-fp32.yaml").write_text(again)  # else it would be up to date
        for pair in chosen:
            rows.append(of_pair(pair, starts, HOW[options.form]))
            print(*rows[-1].values(), flush=True)
    columns = ("shared", "first", "second", "runs", "refused", *FAULTS)
    common.table([[row[c] for c in columns] for row in rows], list(columns))
    required = []
    runs = sum(row["runs"] for row in rows)
    for fault in FAULTS:
        found = sum(row[fault] for row in rows)
        required.append(compare.exact(fault, found, n=runs, at_most=0))
    common.finish({"benchmark": "pairs", "pairs": rows}, required, here, options)


if __name__ == "__main__":
    main()
