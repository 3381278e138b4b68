"""The board of crash.py: a real sshd on 127.0.0.1, and its agent killed at its n-th step.

The agent is a Python of its own for every request. Each counts on where the last one stopped, in a
file, by a `sitecustomize` that sshd puts before it; the host's side is killed by crash_points.py.
"""

import asyncio
import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import crash_points
from crash_points import Done, Kill, Step

from edgeclip.boards import loopback

HOOK = """
import os, signal, sys
place, board = os.environ["EDGECLIP_CRASH"], os.environ["EDGECLIP_CRASH_BOARD"]
changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
counting = False
def line():
    frame = sys._getframe(3)
    while frame is not None and frame.f_code.co_filename != "agent.py":
        frame = frame.f_back
    return frame and frame.f_lineno
def step(kind):
    global counting
    at = line()
    if counting or at is None:
        return
    counting = True
    with open(place + "/steps", "a+") as file:
        file.seek(0)
        number = len(file.readlines())
        file.write(f"{kind}\\tboards/agent.py:{at}\\n")
    if os.path.exists(place + "/wanted") and int(open(place + "/wanted").read()) == number:
        open(place + "/killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    counting = False
def heard(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & writing
    if (writes or event in changes) and str(arguments[0]).startswith(board):
        step(event.removeprefix("os."))
sync = os.fsync
os.fsync = lambda fd: (step("fsync"), sync(fd))[1]
sys.addaudithook(heard)
"""


def missing() -> str | None:
    """Return what is not installed that a board needs; None: nothing."""
    if loopback.SSHD is None:
        return "sshd is not installed"
    if importlib.util.find_spec("asyncssh") is None:
        return "asyncssh is not installed"
    return None


@contextlib.contextmanager
def started(home: Path, start: Path) -> Iterator[None]:
    """Let `--device board.yaml` in a copy of `start`, which lies at `home`/work, reach a board."""
    place, board = home / "hook", home / "work" / "board"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(HOOK)
    extra = f"SetEnv PYTHONPATH={place} EDGECLIP_CRASH={place} EDGECLIP_CRASH_BOARD={board}\n"
    reach = f"reach: {{ssh: board, folder: {board}}}"
    more = "runtimes: [onnxruntime]\npackages: [onnxruntime]\n"
    (start / "board.yaml").write_text(f"{reach}\n{more}")
    loop = asyncio.new_event_loop()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    environment = {"HOME": str(home / "user"), "XDG_CACHE_HOME": cache}
    sshd = loopback.sshd("crash", extra)
    options = loop.run_until_complete(sshd.__aenter__())
    try:
        with mock.patch.dict(os.environ, environment):
            os.environ.pop("SSH_AUTH_SOCK", None)
            _write_ssh_config(home / "user" / ".ssh", options)
            yield
    finally:
        loop.run_until_complete(sshd.__aexit__(None, None, None))
        loop.close()


def _write_ssh_config(folder: Path, options: loopback.SshOptions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(options["client_keys"][0], folder / "key")
    shutil.copy(options["known_hosts"], folder / "known_hosts")
    lines = ["Host board", "HostName 127.0.0.1", f"Port {options['port']}"]
    lines.append(f"IdentityFile {folder}/key")
    (folder / "config").write_text("\n".join(lines) + "\n")


def run(arguments: list[str], folder: Path, kill: Kill | None = None, processes: int = 1) -> Done:
    """Run a command line in `folder`, its board's side killed where `kill` says."""
    place = folder.parent / "hook"
    for name in ("steps", "wanted", "killed"):
        (place / name).unlink(missing_ok=True)
    if kill is not None:
        (place / "wanted").write_text(str(kill.number))
    done = crash_points.run(arguments, folder, processes=processes)
    if (place / "killed").exists():
        return done._replace(code=-9)
    return done


def steps(arguments: list[str], folder: Path, processes: int = 1) -> tuple[Done, list[Step]]:
    """Run a command line to its end; return every step of its board's side."""
    done = run(arguments, folder, processes=processes)
    lines = (folder.parent / "hook" / "steps").read_text().splitlines()
    return done, [Step(*line.split("\t")) for line in lines]
