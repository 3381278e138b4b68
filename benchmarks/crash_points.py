"""Run edgeclip in a forked child that may be killed at its n-th step of writing.

A step is what changes the disk: a file opened for writing, a rename, an exchange of names, a sync,
a removal, a new folder. They are seen by Python's own audit events and by two wrappers; what
libraries write natively (safetensors, parquet) lies between two steps. A fork each, so that torch
is imported once for hundreds of kills.
"""

import contextlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate")
TIMEOUT_S = 180


class Step(NamedTuple):
    """Where in edgeclip the disk is about to be changed."""

    kind: str
    site: str
    """file:line of the innermost of edgeclip's own frames"""


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


def run(arguments: list[str], folder: Path, kill_at: int | None = None) -> Done:
    """Run a command line in `folder`, killed before its step number `kill_at`, from 0."""
    return _forked(arguments, folder, lambda step, n: _kill() if n == kill_at else None)


def steps(arguments: list[str], folder: Path) -> tuple[Done, list[Step]]:
    """Run a command line to its end; return every step in its order."""
    noted = folder.parent / "steps"
    with noted.open("w") as file:
        done = _forked(
            arguments, folder, lambda step, _: print(*step, sep="\t", file=file, flush=True)
        )
    found = [Step(*line.split("\t")) for line in noted.read_text().splitlines()]
    noted.unlink()
    return done, found


def choose(found: list[Step]) -> list[int]:
    """Return the numbers of the first, middle and last step of every site."""
    of_site: dict[Step, list[int]] = {}
    for i, step in enumerate(found):
        of_site.setdefault(step, []).append(i)
    chosen = set()
    for numbers in of_site.values():
        chosen |= {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
    return sorted(chosen)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _forked(arguments: list[str], folder: Path, at_step: Callable[[Step, int], Any]) -> Done:
    said = folder.parent / "stderr"
    answered = folder.parent / "stdout"
    child = os.fork()
    if child == 0:
        code = 99
        with contextlib.suppress(BaseException):
            code = _child(arguments, folder, (answered, said), at_step)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    texts = []
    for path in (said, answered):
        texts.append(path.read_text(errors="replace"))
        path.unlink()
    if os.WIFSIGNALED(status):
        return Done(-os.WTERMSIG(status), *texts)
    return Done(os.WEXITSTATUS(status), *texts)


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
            at_step(Step(kind, site), count)
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
