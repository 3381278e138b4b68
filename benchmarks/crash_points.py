"""Run edgeclip in a forked child that may be killed at its n-th step of writing.

A step is what changes the disk: a file opened for writing, a rename, an exchange of names, a sync,
a removal, a new folder. They are seen by Python's own audit events and by two wrappers; what
libraries write natively (safetensors, parquet) lies between two steps. A fork each, so that torch
is imported once for hundreds of kills.
"""

import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate")
TIMEOUT_S = 180
GRACE_S = 30
"""that torchrun leaves to the others when one of its processes has failed"""


class Step(NamedTuple):
    """Where in edgeclip the disk is about to be changed."""

    kind: str
    site: str
    """file:line of the innermost of edgeclip's own frames"""
    rank: str = "0"
    """of the process that changes it"""


class Kill(NamedTuple):
    """Which process is killed, before its step of that number, from 0."""

    number: int
    rank: int = 0
    all: bool = False
    """the others with it; else they are asked to end, as torchrun does"""


class Done(NamedTuple):
    code: int
    """exit code; -9: killed; -14: not done within TIMEOUT_S"""
    said: str
    """stderr"""
    answer: str = ""
    """stdout"""


def prepare() -> None:
    """Import, before any fork, what the children need."""
    import torch

    torch.set_num_threads(1)
    for name in ("host.distill.run", "host.export.source", "boards.measure", "reports.html"):
        __import__(f"edgeclip.{name}")


class Running(NamedTuple):
    """A command line at work."""

    process: int
    printed: tuple[Path, Path]
    """files of its stdout and its stderr"""


def run(arguments: list[str], folder: Path, kill: Kill | None = None, processes: int = 1) -> Done:
    """Run a command line in `folder`, killed where `kill` says."""

    def at_step(step: Step, number: int) -> None:
        if kill is not None and (number, step.rank) == (kill.number, str(kill.rank)):
            os.kill(os.getpid(), signal.SIGKILL)

    return _launch(arguments, folder, at_step, processes, kill is not None and kill.all)


def steps(arguments: list[str], folder: Path, processes: int = 1) -> tuple[Done, list[Step]]:
    """Run a command line to its end; return every step of each process, in its order."""
    noted = folder.parent / "steps"
    with noted.open("a") as file:

        def at_step(step: Step, _: int) -> None:
            print(*step, sep="\t", file=file, flush=True)

        done = _launch(arguments, folder, at_step, processes)
    found = [Step(*line.split("\t")) for line in noted.read_text().splitlines()]
    noted.unlink()
    return done, sorted(found, key=lambda step: step.rank)


def _launch(
    arguments: list[str],
    folder: Path,
    at_step: Callable[[Step, int], Any],
    processes: int,
    kill_all: bool = False,
) -> Done:
    """Run a command line in so many processes, which find each other as torchrun lets them.

    When one fails the others are ended. kill_all: by SIGKILL at once.
    """
    if processes == 1:
        return end(begin(arguments, folder, at_step))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "crash"}
    running = []
    for rank in range(processes):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(begin(arguments, folder, at_step, f"rank{rank}", environment))
    codes = [_ended_in(one, wait=False) for one in running]
    while not any(codes) and None in codes:
        time.sleep(0.01)
        for i, one in enumerate(running):
            if codes[i] is None:
                codes[i] = _ended_in(one, wait=False)
    first = min([code for code in codes if code], default=0)
    for i, one in enumerate(running):
        if codes[i] is None:
            _stop(one, kill_all)
    said = [_printed(one) for one in running]
    return Done(first, "".join(s for s, _ in said), said[0][1])


def _stop(running: Running, at_once: bool) -> None:
    if not at_once:
        os.kill(running.process, signal.SIGTERM)
        for _ in range(GRACE_S * 100):
            if _ended_in(running, wait=False) is not None:
                return
            time.sleep(0.01)
    os.kill(running.process, signal.SIGKILL)
    _ended_in(running)


def choose(found: list[Step]) -> list[int]:
    """Return the numbers of the first, middle and last step of every site."""
    of_site: dict[Step, list[int]] = {}
    for i, step in enumerate(found):
        of_site.setdefault(step, []).append(i)
    chosen = set()
    for numbers in of_site.values():
        chosen |= {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
    return sorted(chosen)


def begin(
    arguments: list[str],
    folder: Path,
    at_step: Callable[[Step, int], Any] = lambda step, n: None,
    name: str = "one",
    environment: dict[str, str] | None = None,
) -> Running:
    """Start a command line in `folder`; name: another one for each that runs at the same time.

    at_step: called in it before each of its steps, with the step's number. environment: more of it.
    """
    printed = (folder.parent / f"{name}.stdout", folder.parent / f"{name}.stderr")
    for path in printed:  # before it starts: it may be killed before it opens one
        path.touch()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.environ.update(environment or {})
            code = _child(arguments, folder, printed, at_step)
        finally:  # a signal may come at the very end: nothing of the parent's may be run here
            os._exit(code)
    return Running(child, printed)


def end(running: Running) -> Done:
    """Wait for a command line that was started."""
    code = _ended_in(running)
    assert code is not None
    return Done(code, *_printed(running))


def _ended_in(running: Running, wait: bool = True) -> int | None:
    """Return the exit code, or the negative number of the signal; None: it still runs."""
    process, status = os.waitpid(running.process, 0 if wait else os.WNOHANG)
    if process == 0:
        return None
    return os.waitstatus_to_exitcode(status)


def _printed(running: Running) -> tuple[str, str]:
    """Return its stderr and its stdout, and remove their files."""
    texts = []
    for path in running.printed:
        texts.append(path.read_text(errors="replace"))
        path.unlink()
    answer, said = texts
    return said, answer


def _child(
    arguments: list[str],
    folder: Path,
    printed: tuple[Path, Path],
    at_step: Callable[[Step, int], Any],
) -> int:
    from edgeclip.cli import main

    signal.alarm(TIMEOUT_S)
    for number, path in zip((1, 2), printed, strict=True):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(fd, number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.chdir(folder)
    _watch(str(folder), at_step)
    try:
        main(arguments)
    except SystemExit as e:
        return int(e.code or 0)
    except BaseException:
        traceback.print_exc()
        return 98
    return 0


def _watch(folder: str, at_step: Callable[[Step, int], Any]) -> None:
    """Call `at_step` before everything that changes the disk below `folder`."""
    count = 0

    def step(kind: str) -> None:
        nonlocal count
        site = _site()
        if site:
            at_step(Step(kind, site, os.environ.get("RANK", "0")), count)
            count += 1

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            if _below(arguments[0], folder):
                step("open")
        elif event in CHANGES and _below(arguments[0], folder):
            step(event.removeprefix("os."))

    from edgeclip.disk import exchange

    sync, swap = os.fsync, exchange._exchange
    os.fsync = lambda fd: (step("fsync"), sync(fd))[1]
    exchange._exchange = lambda a, b: (step("exchange"), swap(a, b))[1]
    sys.addaudithook(heard)


def _below(path: Any, folder: str) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    name = os.fsdecode(path)
    return not os.path.isabs(name) or name.startswith(folder)


def _site() -> str | None:
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/edgeclip/" in name and "/site-packages/" not in name:
            return f"{name.rpartition('/edgeclip/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def copy(source: Path, target: Path) -> None:
    """Let `target` be a copy of the folder `source`, links as links."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
