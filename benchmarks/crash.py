"""Kill every command at every place where it writes, then run it again: is anything lost?

A step of writing is a file opened for writing, a rename, an exchange of names, a sync, a removal or
a new folder; the first, the middle and the last one of every line of edgeclip that makes any are
killed (SIGKILL, before the step). Then the same command runs to its end. Required is that

    lost      what was finished before the kill is whole after it, old or new
    stuck     the second run ends as one that was never killed
    wrong     what it leaves has the bytes of a run that was never killed, times aside
    left      and nothing lies there besides

are all 0, for every stage of crash_stages.py. Of two processes one is killed, and the other is ended
as torchrun does, or both are, turn by turn.

    python benchmarks/crash.py --check
    python benchmarks/crash.py --only distill --points 40
"""

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import compare
import crash_board
import crash_points
import crash_stages
from crash_stages import Stage

FAULTS = ("lost", "stuck", "wrong", "left")
POINTS = {common.WHOLE: 10_000, common.QUICK: 12, common.SMOKE: 2}
"""kills a stage at most, spread over its steps"""
SMALL = ("embed", "labels --in-place")
"""stages of the smoke form"""


def of_stage(stage: Stage, home: Path, points: int) -> dict[str, Any]:
    """Return the counts of one stage, or what is missing for it."""
    if stage.board is None:
        return killed_in(stage, home, points)
    if missing := crash_board.missing():
        return {"stage": stage.name, "missing": missing}
    with crash_board.started(home, home / stage.start):
        return killed_in(stage, home, points)


def killed_in(stage: Stage, home: Path, points: int) -> dict[str, Any]:
    """Return the counts of one stage; `faults` names each kill that lost, stuck, was wrong or left."""
    side: ModuleType = crash_points
    if stage.board == "board":
        side = crash_board
    work = home / "work"
    start = home / stage.start
    crash_points.copy(start, work)
    before = crash_stages.tree(start, stage)
    done, steps = side.steps(stage.command, work, stage.processes)
    if done.code not in (0, 3, 4):
        raise RuntimeError(f"{stage.name}: exit code {done.code}: {done.said[-2000:]}")
    whole = crash_stages.tree(work, stage)
    chosen = crash_points.choose(steps)
    chosen = chosen[:: -(-len(chosen) // points)]
    counts = dict.fromkeys(FAULTS, 0)
    faults = []
    killed = 0
    of_first = sum(step.rank == "0" for step in steps)
    for i, number in enumerate(chosen):
        crash_points.copy(start, work)
        rank = int(steps[number].rank)
        kill = crash_points.Kill(number - rank * of_first, rank, all=i % 2 == 1)
        first = side.run(stage.command, work, kill, stage.processes)
        killed += first.code == -9
        for fault, why in _after(stage, work, before, whole, done.code).items():
            counts[fault] += 1
            faults.append(f"{fault} at {' '.join(steps[number])} ({number}): {why}"[:400])
    return {
        "stage": stage.name,
        "sites": len(set(steps)),
        "steps": len(steps),
        "points": len(chosen),
        "killed": killed,
        **counts,
        "faults": faults,
    }


def _after(
    stage: Stage, work: Path, before: dict[str, str], whole: dict[str, str], code: int
) -> dict[str, str]:
    """Return {fault: why} of a kill, once the same command has run again."""
    found = {}
    try:
        stage.whole(work)
    except Exception as e:
        found["lost"] = str(e)
    again = crash_points.run(stage.command, work, processes=stage.processes)
    after = crash_stages.tree(work, stage)
    if again.code != code and after != whole:  # a command may say that it is done already
        found["stuck"] = f"exit code {again.code}: {again.said[-300:]}"
        return found
    if extra := sorted(after.keys() - whole.keys()):
        found["left"] = ", ".join(extra)
    wrong = [name for name in whole if after.get(name) != whole[name]]
    if wrong:
        found["wrong"] = ", ".join(wrong)
    return found


def main() -> None:
    parser = common.arguments(__doc__)
    names = [stage.name for stage in crash_stages.STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--points", type=int, help="kills a stage at most")
    options = parser.parse_args()
    here = common.this_machine()
    only = SMALL if options.form == common.SMOKE else options.only
    points = options.points or POINTS[options.form]
    crash_points.prepare()
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgeclip-crash-") as name:
        home = Path(name)
        crash_stages.make_starts(home)
        for stage in crash_stages.STAGES:
            if stage.name in only:
                rows.append(of_stage(stage, home, points))
                print(*rows[-1].values(), flush=True)
    columns = ("stage", "sites", "points", "killed", *FAULTS)
    common.table([[row.get(c, "not installed") for c in columns] for row in rows], list(columns))
    required = []
    for row in rows:
        if "missing" in row:
            continue
        for fault in FAULTS:
            what = f"{row['stage']}: {fault}"
            required.append(compare.exact(what, row[fault], n=row["killed"], at_most=0))
    common.finish({"benchmark": "crash", "stages": rows}, required, here, options)


if __name__ == "__main__":
    main()
