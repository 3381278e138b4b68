"""Run steps one after another, each in a process of its own, within one budget of time.

What a step does to its process (a crash, an error of the GPU that stays, a lack of memory, no end)
costs that step alone: it is `failed` with its reason, and the next one starts in a new process. The
results are handed on after every step, so that a cut loses what was running and no more.

A step has a limit of its own. It gets at most that, and at most twice its share of the time left
where the limits of all that follow do not fit: so steps that hang one after another still leave
some to the last.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_job import DONE, FAILED, NO_TIME, NOT_INSTALLED, Job, NotInstalled

from edgeclip import disk

CHILD = "import sys; import gpu_runner; gpu_runner.be_step(*sys.argv[1:])"
LAST_LINES = 12
"""of what a failed step printed, which are kept"""
LOOK_S = 0.05
"""between two looks at a running step"""
LEAST = 0.1
"""share of its limit below which a step is not started"""
Result = dict[str, Any]


class Step(NamedTuple):
    name: str
    call: str
    """module:function, called with the job and `given`; returns figures that JSON can hold"""
    limit_s: float
    given: dict[str, Any] = {}


def allowed_s(step: Step, rest: list[Step], left: float) -> float:
    """Return the seconds that a step may take.

    rest: the steps behind it. left: of the budget, seconds.
    """
    wanted = step.limit_s + sum(s.limit_s for s in rest)
    share = left * step.limit_s / wanted
    return min(step.limit_s, 2 * share, left)


def run_all(
    steps: list[Step], job: Job, budget_s: float, note: Callable[[list[Result]], None]
) -> list[Result]:
    """Run the steps in their order in the working folder; return a result of each.

    note: gets the results so far after every step.
    """
    end = time.monotonic() + budget_s
    results: list[Result] = []
    for i, step in enumerate(steps):
        seconds = allowed_s(step, steps[i + 1 :], max(0.0, end - time.monotonic()))
        if seconds < LEAST * step.limit_s:
            result: Result = {"status": NO_TIME, "limit_s": round(seconds, 1)}
        else:
            result = run_one(step, job, seconds)
        results.append({"name": step.name, **result})
        note(results)
    return results


def run_one(step: Step, job: Job, seconds: float) -> Result:
    """Run a step in a process of its own, at most so many seconds; return its status and what goes
    with it.
    """
    answer = Path(f"{step.name.replace('/', '-').replace(':', '')}.answer.json")
    printed = answer.with_suffix(".txt")
    given = (step.call, json.dumps(job), json.dumps(step.given), str(answer.resolve()))
    command = [sys.executable, "-c", CHILD, *given]
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep)}
    start = time.monotonic()
    with (
        printed.open("wb") as out,
        subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        ) as process,
    ):
        in_time = False
        try:
            in_time = _wait(process.pid, start + seconds)
        finally:
            # Its process is not waited for yet, so its id is still its own, and so is its group.
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    result: Result = {"status": FAILED}
    if not in_time:
        result["reason"] = f"took longer than its limit of {seconds:.0f} s"
    elif answer.exists():
        result = disk.read_json(answer)
    elif code < 0:
        result["reason"] = f"its process was ended by {signal.Signals(-code).name}"
    else:
        result["reason"] = f"its process ended with code {code} and no answer"
    if result["status"] == FAILED:
        lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
        result["printed"] = lines[-LAST_LINES:]
    times = {"seconds": round(time.monotonic() - start, 1), "limit_s": round(seconds, 1)}
    return result | times


def _wait(pid: int, end: float) -> bool:
    """Return True when the process is over, False when its time is; it is not reaped."""
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(LOOK_S)
    return False


def be_step(call: str, job: str, given: str, answer: str) -> None:
    """Be the process of one step: call the function, write its answer."""
    module, _, function = call.partition(":")
    try:
        run = getattr(importlib.import_module(module), function)
        figures = run(Job(*json.loads(job)), **json.loads(given))
        disk.write_json(Path(answer), {"status": DONE, "figures": figures})
    except NotInstalled as e:
        disk.write_json(Path(answer), {"status": NOT_INSTALLED, "reason": str(e)})
    except (Exception, SystemExit) as e:
        traceback.print_exc()
        first = next(iter(str(e).splitlines()), "")
        reason = f"{type(e).__name__}: {first}"
        disk.write_json(Path(answer), {"status": FAILED, "reason": reason})
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(0)  # what a library does at its end (CUDA's, a thread that stays) is not the step's
