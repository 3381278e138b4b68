"""Steps of benchmarks/gpu.py that go wrong, each in its own way, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_job


def answers(job, value=1.0):
    """Count itself in the working folder, so that a test sees that later steps came to run."""
    with Path("ran.txt").open("a", encoding="utf-8") as file:
        file.write(f"{value}\n")
    return {"value": value, "form": job.form}


def raises(job):
    print("a line before the end")
    raise RuntimeError("the reason\nand more of it")


def leaves(job):
    sys.exit("it left")


def hangs(job):
    """Start a process of its own too, whose id it writes, and wait for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path("child.txt").write_text(str(child.pid), encoding="utf-8")
    time.sleep(600)


def is_killed(job):
    os.kill(os.getpid(), signal.SIGKILL)


def ends_early(job):
    os._exit(7)


def needs_a_module(job):
    gpu_job.need_module("no_such_module_anywhere", "pip install it")


def needs_a_package(job):
    gpu_job.need_distribution("no-such-distribution-anywhere", "pip install it")


def is_not_finite(job):
    return {"value": float("nan")}


def is_no_json(job):
    return {"value": object()}
