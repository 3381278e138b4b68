"""The board's side of a link: reads a JSON request on standard input, answers on standard output.

The answer is one line of JSON, and raw bytes behind it. This text is sent ahead of each request and
run by the board's own python3, so it needs nothing but the standard library, and an old Python must
at least be able to say how old it is. All it writes lies below one folder:

    store/<sha256>        files by their content; <sha256>.part while one is on its way: a copy goes
                          on where it broke off
    trees/<name>/         a bundle or an evaluation folder, hard-linked from the store
    runner/<key>/         unpacked wheels for PYTHONPATH
    engines/              what was built there (edgeclip/device/runtime/engine.py)

A run ends when the link does: its standard input closes, and the process group is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from typing import Any, Dict  # noqa: UP035  (as below)

MARK = b"edgeclip-reply "  # what a login shell prints before it is not the answer
OURS = ".edgeclip-board"  # only in a folder with this file is anything ever written or removed
LEFT = ("store", "trees", "runner", "engines", ".copy", ".run", OURS)
BLOCK = 1 << 18
Message = Dict[str, Any]  # noqa: UP006  (a request, or an answer; an old Python evaluates it)
STDIN: Any = sys.stdin.buffer


def reply(request: Message, answer: Message) -> None:
    """Write one marked line, which is found among whatever else is printed.

    It repeats the request's id: an answer to another question is none.
    """
    line = json.dumps(dict(answer, id=request["id"], bytes=0)).encode()
    # the first end of line ends a banner that has none
    sys.stdout.buffer.write(b"\n" + MARK + line + b"\n")
    sys.stdout.buffer.flush()


def home(request: Message) -> str:
    """Return the folder, made if need be.

    Somebody else's, with files in it, is refused, since --clean could not tell them apart.
    """
    folder = os.path.abspath(os.path.expanduser(request["folder"]))
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder) and not os.path.exists(os.path.join(folder, OURS)):
        raise ValueError(
            folder + " holds files that are not edgeclip's; "
            "name an empty or a new folder in the profile's reach.folder"
        )
    open(os.path.join(folder, OURS), "a").close()
    os.makedirs(os.path.join(folder, "store"), exist_ok=True)
    return folder


def lock(folder: str, name: str, wait: bool) -> Any:
    """Lock until the returned file is closed: one copy at a time, and one measurement."""
    f = open(os.path.join(folder, name), "a")  # noqa: SIM115  (the caller closes it)
    how = fcntl.LOCK_EX
    if not wait:
        how |= fcntl.LOCK_NB
    try:
        fcntl.flock(f, how)
    except OSError:
        raise ValueError("another edgeclip is at work there; wait until it has ended") from None
    return f


def inside(folder: str, name: str) -> str:
    """Return a path below `folder`, whatever a manifest says."""
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(folder + os.sep):
        raise ValueError(name + " lies outside " + folder)
    return path


def look(request: Message) -> Message:
    """Run the host's machine.py in the Python that the runner will have; its facts and state."""
    folder = os.path.abspath(os.path.expanduser(request["folder"]))
    source = (
        request["source"]
        + "\nimport json, sys\nprint(json.dumps([vars(facts()), vars(state(sys.argv[1]))]))\n"
    )
    done = subprocess.run(
        [*request["python"], "-", folder], input=source.encode(), capture_output=True
    )
    if done.returncode:
        raise ValueError(
            "its Python cannot say what it is: "
            + " ".join(done.stderr.decode(errors="replace").split())[-300:]
        )
    facts, state = json.loads(done.stdout.splitlines()[-1])
    return {"folder": folder, "facts": facts, "state": state}


def clock(request: Message) -> Message:
    """Return the board's time, seconds since 1970."""
    return {"time": time.time()}


def missing(request: Message) -> Message:
    """Return which of files {sha256: size} are not whole here, their bytes here, and the room."""
    folder = home(request)
    have = {}
    for digest, size in request["files"].items():
        path = inside(folder, "store/" + digest)
        if os.path.exists(path):
            continue
        have[digest] = 0
        if os.path.exists(path + ".part"):
            have[digest] = min(os.path.getsize(path + ".part"), size)
    disk = os.statvfs(folder)
    return {"have": have, "free_bytes": disk.f_bavail * disk.f_frsize}


def put(request: Message) -> Message:
    """Keep files [[sha256, size, offset], ...].

    Their bytes from `offset` on follow the request one after another.
    """
    folder = home(request)
    held = lock(folder, ".copy", True)
    for digest, size, offset in request["files"]:
        path = inside(folder, "store/" + digest)
        part = path + ".part"
        try:
            _receive(part, size, offset)
        except OSError:
            if os.path.exists(part):  # a full disk must not stay full
                os.remove(part)
            raise
        if _sha256(part) != digest:
            os.remove(part)
            raise ValueError("what arrived is not what was sent; send it again")
        os.replace(part, path)
    held.close()
    return {}


def _receive(part: str, size: int, offset: int) -> None:
    mode = "wb"
    if offset:
        mode = "r+b"
    with open(part, mode) as f:
        f.seek(offset)
        f.truncate()
        left = size - offset
        while left:
            block = STDIN.read1(min(BLOCK, left))
            if not block:
                raise EOFError("the link closed in the middle of a file")
            f.write(block)
            left -= len(block)
        f.flush()
        os.fsync(f.fileno())


def _sha256(path: str) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(BLOCK), b""):
            found.update(block)
    return found.hexdigest()


def build(request: Message) -> Message:
    """Make a folder of links to files {name: sha256}, the wheels of `unpack` unzipped in it."""
    folder = home(request)
    path = inside(folder, request["name"])
    if not os.path.exists(path):
        temporary = path + ".new"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _fill(folder, temporary, request.get("files", {}), request.get("unpack", []))
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk must not stay full
        for digest in request.get("unpack", []):
            os.remove(inside(folder, "store/" + digest))  # its content is what counts from here on
    return {"path": path}


def _fill(folder: str, temporary: str, files: dict[str, str], unpack: list[str]) -> None:
    os.makedirs(temporary)
    for name, digest in files.items():
        target = inside(temporary, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.link(inside(folder, "store/" + digest), target)
        except OSError:  # a file system without hard links
            shutil.copyfile(inside(folder, "store/" + digest), target)
    for digest in unpack:
        with zipfile.ZipFile(inside(folder, "store/" + digest)) as wheel:
            wheel.extractall(temporary)


def exists(request: Message) -> Message:
    """Return whether there is such a file or folder."""
    folder = os.path.abspath(os.path.expanduser(request["folder"]))
    return {"exists": os.path.exists(inside(folder, request["name"]))}


def run(request: Message) -> None:
    """Start the runner, with the work on its standard input; the runner itself answers."""
    folder = home(request)
    held = lock(folder, ".run", False)
    environment = dict(
        os.environ,
        PYTHONPATH=inside(folder, request["runner"]),
        PYTHONDONTWRITEBYTECODE="1",
        EDGECLIP_ENGINES=inside(folder, "engines"),
    )
    work = dict(request["work"], folder=folder, python=request["python"], id=request["id"])
    command = [*request["python"], "-m", "edgeclip.device"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, cwd=folder, start_new_session=True
    )
    assert child.stdin
    child.stdin.write(json.dumps(work).encode())
    child.stdin.close()

    def watch() -> None:
        while STDIN.read1(BLOCK):
            pass
        os.killpg(child.pid, 9)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    held.close()
    if code:
        what = f"the runner on the board ended with code {code}; its own messages are above"
        reply(request, {"error": what})
    sys.stdout.flush()
    os._exit(0)  # the watcher is still reading


def clean(request: Message) -> Message:
    """Remove everything edgeclip left, and only that; the folder too when nothing else is in it."""
    folder = os.path.abspath(os.path.expanduser(request["folder"]))
    if not os.path.exists(os.path.join(folder, OURS)):
        return {"removed": False}
    # not from under somebody's measurement
    held = [lock(folder, ".run", False), lock(folder, ".copy", True)]
    for path in (os.path.join(folder, name) for name in LEFT):
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.remove(path)
    if not os.listdir(folder):
        os.rmdir(folder)
    for f in held:
        f.close()
    return {"removed": True}


ANSWERS = (look, clock, missing, put, build, exists, clean)


def main() -> None:
    request = json.loads(STDIN.readline())
    answers = {op.__name__: op for op in ANSWERS}
    try:
        if request["op"] == "run":
            run(request)
        reply(request, answers[request["op"]](request))
    except EOFError:
        sys.exit(1)
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        reply(request, {"error": str(e)})


if __name__ == "__main__":  # as it is where `python3 -c` runs it
    main()
