"""The kit for a GPU, on a machine without one: what a step does to its process costs that step
alone, and the file is whole after each of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.files import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import common
import gpu
import gpu_job
import gpu_runner
from gpu_runner import Step, allowed_s, run_all

STEPS = "tests.support.gpu_steps"
FOREVER = 3600.0
"""a limit that no step here comes near"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    return gpu_job.Job("cpu", common.SMOKE, {}, "random", None, sys.executable)


def step(name, limit_s=FOREVER, **given):
    return Step(name, f"{STEPS}:{name}", limit_s, given)


def ignore(results):
    pass


def is_there(pid):
    """Whether a process is alive; one that ended and waits to be reaped is not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# --- statuses


WRONG = {
    "raises": ("failed", "RuntimeError: the reason"),
    "leaves": ("failed", "SystemExit: it left"),
    "is_killed": ("failed", "its process was ended by SIGKILL"),
    "ends_early": ("failed", "its process ended with code 7 and no answer"),
    "is_not_finite": ("failed", "not finite"),
    "is_no_json": ("failed", "TypeError"),
    "needs_a_module": ("not installed", "no_such_module_anywhere: pip install it"),
    "needs_a_package": ("not installed", "no-such-distribution-anywhere: pip install it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_step_that_goes_wrong_says_how_and_the_next_one_runs(name, job):
    status, reason = WRONG[name]
    wrong, right = run_all([step(name), step("answers")], job, FOREVER, ignore)
    assert (wrong["name"], wrong["status"]) == (name, status)
    assert reason in wrong["reason"] and "\n" not in wrong["reason"]
    assert "figures" not in wrong
    assert (right["status"], right["figures"]) == ("done", {"value": 1.0, "form": "smoke"})


def test_a_failed_step_keeps_the_last_lines_that_it_printed(job):
    (failed,) = run_all([step("raises")], job, FOREVER, ignore)
    assert failed["printed"][-2:] == ["RuntimeError: the reason", "and more of it"]
    assert len(failed["printed"]) <= gpu_runner.LAST_LINES


def test_a_step_beyond_its_limit_is_ended_with_all_that_it_started(job):
    # Long enough for a loaded machine to start Python in; the step itself waits for ever.
    late, right = run_all([step("hangs", 15.0), step("answers")], job, FOREVER, ignore)
    assert late["status"] == "failed"
    assert late["reason"] == "took longer than its limit of 15 s"
    assert not is_there(int(Path("child.txt").read_text()))
    assert right["status"] == "done"


def test_a_name_that_no_step_has_is_a_failure_and_no_crash(job):
    missing = Step("missing", f"{STEPS}:no_such_function", FOREVER)
    (result,) = run_all([missing], job, FOREVER, ignore)
    assert result["status"] == "failed" and "no_such_function" in result["reason"]


def test_without_time_no_step_runs(job):
    results = run_all([step("answers"), step("answers")], job, 0.0, ignore)
    assert [r["status"] for r in results] == ["no time left"] * 2
    assert not Path("ran.txt").exists()


def test_cuda_is_not_installed_where_there_is_none(job):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    planned = [s for s in gpu.steps_of("cuda") if s.name in ("device", "smoke: bf16")]
    results = run_all(planned, job._replace(device="cuda"), FOREVER, ignore)
    for result in results:
        assert result["status"] == "not installed"
        assert result["reason"] == "no CUDA device that torch can use"


# --- time


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_steps_that_all_hang_leave_time_to_the_last_and_keep_the_budget(device):
    steps = gpu.steps_of(device)
    left = gpu.BUDGET_S["whole"]
    for i, one in enumerate(steps):
        seconds = allowed_s(one, steps[i + 1 :], left)
        assert 0 < seconds <= min(left, one.limit_s)
        left -= seconds
    assert left >= 0


def test_a_step_has_its_own_limit_where_the_budget_holds_all():
    steps = [step("answers", 10.0), step("raises", 30.0)]
    assert allowed_s(steps[0], steps[1:], 40.0) == 10.0
    assert allowed_s(steps[1], [], 31.0) == 30.0
    assert allowed_s(steps[1], [], 12.0) == 12.0


def test_all_of_it_fits_nine_minutes():
    assert gpu.BUDGET_S["whole"] < 9 * 60


# --- the file


def test_the_file_is_whole_after_each_step(job, tmp_path):
    path = tmp_path / "figures.json"
    options = gpu_options(path)
    planned = [step("answers"), step("raises"), step("needs_a_module"), step("answers", value=2.0)]
    note = gpu.noting(job, planned, options, common.this_machine())
    seen = []

    def noted(results):
        note(results)
        seen.append(json.loads(path.read_text()))

    run_all(planned, job, FOREVER, noted)
    assert [len(s["steps"]) for s in seen] == [1, 2, 3, 4]
    assert [s["finished"] for s in seen] == [False, False, False, True]
    assert all(s["planned"] == [one.name for one in planned] for s in seen)
    assert [s["counts"]["failed"] for s in seen] == [0, 1, 1, 1]
    assert seen[-1]["counts"] == {
        "done": 2,
        "failed": 1,
        "not installed": 1,
        "no time left": 0,
    }


def gpu_options(path):
    """What `noting` reads of the command's options."""
    parser = common.arguments(None)
    return parser.parse_args(["--smoke", "--json", str(path)])


# --- what is judged


def test_the_difference_of_curves_is_the_largest_and_relative():
    assert gpu.largest_difference([2.0, 1.1, 4.0], [2.0, 1.0, 5.0]) == pytest.approx(0.2)
    assert gpu.largest_difference([3.0, 2.0], [3.0, 2.0]) == 0.0
    same = [1.0] * gpu.COMPARED
    assert gpu.largest_difference([*same, 9.0], [*same, 1.0]) == 0.0
    assert gpu.largest_difference([0.0, 1.0], [0.0, 1.0]) == 0.0


def done(name, **figures):
    return {"name": name, "status": "done", "figures": figures}


def verdicts(results):
    return [r["verdict"] for r in gpu.required_of(results)]


def test_a_curve_is_judged_by_its_precisions_limit_and_only_beside_its_reference():
    limit = gpu.CURVES["bf16"]
    reference = done("smoke: reference", losses=[1.0, 1.0])
    within = done("smoke: bf16", losses=[1.0, 1.0 + 0.9 * limit])
    beyond = done("smoke: bf16", losses=[1.0, 1.0 + 1.1 * limit])
    shorter = done("smoke: bf16", losses=[1.0])
    none = done("smoke: bf16", losses=[])
    assert verdicts([reference, within]) == ["met", "met", "met"]
    assert verdicts([reference, beyond]) == ["met", "missed", "met"]
    assert verdicts([reference, shorter]) == ["missed", "met", "met"]
    assert verdicts([reference, none]) == ["missed", "met"]
    (count,) = gpu.required_of([beyond])
    assert count["what"] == "steps that failed"


def test_a_failed_step_is_a_missed_figure_and_a_missing_package_is_none():
    missing = {"name": "energy", "status": "not installed", "reason": "pynvml"}
    late = {"name": "energy", "status": "no time left"}
    failed = {"name": "energy", "status": "failed", "reason": "it broke"}
    assert verdicts([missing, late]) == ["met"]
    assert verdicts([failed]) == ["missed"]


def test_answers_are_judged_by_the_precision_in_a_steps_name():
    figures = {"cosine_min": 0.95}
    for title, verdict in (("tensorrt: int8", "met"), ("tensorrt: fp16", "missed")):
        assert verdicts([done(title, **figures)])[0] == verdict


def test_every_step_is_a_function_of_the_kit_and_has_its_own_name():
    for device in ("cuda", "cpu"):
        steps = gpu.steps_of(device)
        assert len({s.name for s in steps}) == len(steps)
        for one in steps:
            module, _, function = one.call.partition(":")
            text = (REPO / "benchmarks" / f"{module}.py").read_text(encoding="utf-8")
            assert f"def {function}(job: Job" in text


def test_wrong_arguments_are_one_line(tmp_path):
    for wrong in (["--only", "no such step"], ["--data", "clothing"], ["--data", f"x={tmp_path}"]):
        command = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), "--smoke", *wrong]
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ran.returncode == 1
        assert len(ran.stderr.splitlines()) == 1 and wrong[1] in ran.stderr


# --- all of it
