"""A board-side program that lies: what sshd runs, whatever it is asked to run.

It is honest about every request but the one that its lie is for, so that a lie in the middle of a
command comes after true answers, as it would.
"""

import json
import sys
from pathlib import Path

PROGRAM = r'''#!{python}
import io, json, os, subprocess, sys, threading, time
MARK = b"edgeclip-reply "
OUT, ERR, IN = sys.stdout.buffer, sys.stderr.buffer, sys.stdin.buffer

def forever(stream, block):
    while True:
        stream.write(block)
        stream.flush()

def tell(answer, payload=b"", **more):
    answer = {{**answer, "id": request["id"], "bytes": len(payload), **more}}
    say(json.dumps(answer).encode(), payload)

def say(line, payload=b""):
    OUT.write(b"\n" + MARK + line + b"\n" + payload)
    OUT.flush()

def honest():
    """The true answer, and what is behind it; of a runner that of the first time."""
    kept = {lie!r} + "." + request.get("work", {{}}).get("verb", "")
    if request["op"] == "run" and os.path.exists(kept):
        rest = open(kept, "rb").read()
    else:
        rest = truth()
        open(kept, "wb").write(rest)
    line, _, payload = rest.partition(b"\n")
    return json.loads(line), payload

def truth():
    child = subprocess.Popen(TRUE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(asked)
    child.stdin.flush()  # and not closed: a runner whose host has gone is killed
    return child.stdout.read().partition(MARK)[2]

def arrays(change):
    """The true answer, with other arrays."""
    import numpy as np
    answer, payload = honest()
    found = dict(np.load(io.BytesIO(payload)))
    found = change(found, np) or found
    out = io.BytesIO()
    np.savez_compressed(out, **found)
    tell(answer, out.getvalue())

TRUE = ["sh", "-c", os.environ["SSH_ORIGINAL_COMMAND"]]
head = IN.readline()
agent = IN.read(int(head))
line = IN.readline()
request = json.loads(line)
asked = head + agent + line
lie = json.load(open({lie!r}))
if request["op"] != lie["op"]:
    child = subprocess.Popen(TRUE, stdin=subprocess.PIPE)
    child.stdin.write(asked)
    child.stdin.flush()
    def pump():
        while block := IN.read1(1 << 16):
            child.stdin.write(block)
            child.stdin.flush()
        child.stdin.close()
    threading.Thread(target=pump, daemon=True).start()
    os._exit(child.wait())
exec(lie["code"])
'''


def make(folder: Path) -> str:
    """Write the program into `folder`; return sshd's line that runs it alone."""
    folder.mkdir(exist_ok=True)
    program = folder / "liar"
    program.write_text(PROGRAM.format(python=sys.executable, lie=str(folder / "lie.json")))
    program.chmod(0o755)
    return f"ForceCommand {program}\n"


def about(folder: Path, op: str, code: str) -> None:
    """Let it lie about requests `op` from now on, as `code` says."""
    (folder / "lie.json").write_text(json.dumps({"op": op, "code": code}))
