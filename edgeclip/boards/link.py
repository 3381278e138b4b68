"""How a request gets to a board: through ssh, or a command that leads there (docker exec).

The user's ssh setup does everything that ssh itself would do by it: host alias, user, port, keys,
agent, jump hosts, known_hosts. Only keys are tried, since a question for a password would wait for
an answer that nobody gives. A host key that is not known is refused: accepting it would be a
guess.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from edgeclip.device.__main__ import MARK
from edgeclip.device.profile import Reach
from edgeclip.errors import EdgeclipError, LinkLost
from edgeclip.progress import say
from edgeclip.text_file.parser import parse_json

AGENT = (Path(__file__).parent / "agent.py").read_bytes()
COMMAND = (
    "exec python3 -u -c 'import sys; b = sys.stdin.buffer; "
    'exec(compile(b.read(int(b.readline())), "agent.py", "exec"))\''
)
LINE = 1 << 24
"""bytes of the longest answer"""
NO_COMMAND = 127
"""a shell's exit code"""
CONNECT_S = 30
CLOSE_S = 5
TALK_S = 2
"""seconds that are waited for the rest of what the board prints"""
AGAIN = "run the command again: what has arrived is kept"

Message = dict[str, Any]
"""a request of the agent, or its answer: JSON, its fields are the operation's (agent.py)"""
SshOptions = dict[str, Any]
"""arguments of asyncssh.connect"""
Start = Callable[[], Awaitable[Any]]
"""starts COMMAND on the board: a process with stdin, stdout and stderr streams"""


class Link(NamedTuple):
    """A way to a board; each request is a process of its own there."""

    name: str
    """of the device, for messages"""
    start: Start
    broken: tuple[type[BaseException], ...] = (OSError, EOFError)
    """what a broken link raises"""

    async def ask(
        self, op: str, payload: Iterable[bytes] = (), **request: Any
    ) -> tuple[Message, bytes]:
        """Return the board's answer and the bytes behind it; pass on what it prints on stderr.

        Raises `LinkLost` when the link breaks, and `EdgeclipError` with the board's own reason when
        it cannot do it.
        """
        process = None
        try:
            process = await self.start()
            talk = asyncio.ensure_future(self._pass_on(process.stderr))
            # the board may answer before it has heard everything: its disk is full
            with contextlib.suppress(*self.broken):
                await _send(process, {"op": op, **request}, payload)
            answer, rest = await self._answer(process, talk)
        except self.broken as e:
            what = f"the link broke off during '{op}' ({_reason(e)})"
            raise LinkLost(self.name, what, AGAIN) from None
        finally:
            if process is not None:
                with contextlib.suppress(Exception):
                    process.stdin.close()
                    await asyncio.wait_for(process.wait(), CLOSE_S)

        if "error" in answer:
            do = f"see docs/devices.md, or: edgeclip doctor --device {self.name}"
            raise EdgeclipError(self.name, answer["error"], do)
        return answer, rest

    async def _answer(self, process: Any, talk: "asyncio.Future[None]") -> tuple[Message, bytes]:
        """Return the marked line among what a login shell prints, and the bytes behind it."""
        while (line := await process.stdout.readline()) and not line.startswith(MARK):
            pass
        if not line.endswith(b"\n"):
            await asyncio.wait([talk], timeout=TALK_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), CLOSE_S)
            if process.returncode == NO_COMMAND:
                what = "has no python3 on the PATH that ssh gives it"
                raise EdgeclipError(self.name, what, "install Python 3.10 or newer there")
            raise EOFError("no answer came")

        do = f"see what it printed, and: edgeclip doctor --device {self.name}"
        answer = parse_json(line[len(MARK) :], f"{self.name}: its answer", do)
        rest = await process.stdout.readexactly(answer.pop("bytes"))
        await asyncio.wait([talk], timeout=TALK_S)
        return answer, rest

    async def _pass_on(self, stderr: Any) -> None:
        with contextlib.suppress(*self.broken):
            while line := await stderr.readline():
                say(f"{self.name}: {line.decode(errors='replace').rstrip()}")


async def _send(process: Any, request: Message, payload: Iterable[bytes]) -> None:
    """Return the agent's text, the request, and what belongs to it."""
    head = b"%d\n" % len(AGENT) + AGENT
    process.stdin.write(head + json.dumps(request).encode() + b"\n")
    for block in payload:
        process.stdin.write(block)
        await process.stdin.drain()
    await process.stdin.drain()


def _reason(e: BaseException) -> str:
    if isinstance(e, ConnectionRefusedError):
        return "connection refused"
    return " ".join(str(e).split()) or type(e).__name__


@contextlib.asynccontextmanager
async def connect(
    name: str, reach: Reach, options: SshOptions | None = None
) -> AsyncIterator[Link]:
    """Yield a link to the board.

    options: asyncssh's, in place of the user's ssh setup (loopback.py). Raises `EdgeclipError` when
    the board cannot be reached, with what to do.
    """
    if reach.command:
        yield Link(name, _by_command(reach.command))
        return

    try:
        import asyncssh
    except ImportError as e:
        what = f"is reached over ssh, and {e.name} is not installed"
        raise EdgeclipError(name, what, "pip install 'edgeclip[ssh]'") from None
    connection = await _connection(name, reach, options or {})

    async def start() -> Any:
        return await connection.create_process(COMMAND, encoding=None)

    try:
        yield Link(name, start, (OSError, EOFError, asyncssh.Error))
    finally:
        connection.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(connection.wait_closed(), CLOSE_S)


def _by_command(prefix: tuple[str, ...]) -> Start:
    """Return what starts COMMAND behind a command prefix."""

    async def spawn() -> Any:
        pipe = asyncio.subprocess.PIPE
        command = [*prefix, "sh", "-c", COMMAND]
        return await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE
        )

    return spawn


async def _connection(name: str, reach: Reach, options: SshOptions) -> Any:
    """Return an open ssh connection; each way to fail is one line with what to do."""
    import asyncssh

    host = options.get("host") or reach.ssh
    settings = {
        "host": host,
        "preferred_auth": "publickey",
        "connect_timeout": CONNECT_S,
        "login_timeout": CONNECT_S,
        "keepalive_interval": 10,
        **options,
    }
    try:
        # ProxyCommand and jump hosts come before asyncssh's own timeouts begin.
        return await asyncio.wait_for(asyncssh.connect(**settings), 2 * CONNECT_S)
    except asyncssh.HostKeyNotVerifiable as e:
        what = f"its host key is not the known one, so it was not trusted ({_reason(e)})"
        do = f"compare its fingerprint and log in once with: ssh {host}"
    except asyncssh.PermissionDenied as e:
        what = f"no key of yours was accepted ({_reason(e)})"
        agent = "a password is never asked for; a key with a passphrase must be in the ssh agent"
        do = f"let your key in with: ssh-copy-id {host} ({agent})"
    except (asyncssh.Error, OSError, ValueError, asyncio.TimeoutError) as e:
        what = f"cannot be reached over ssh as '{host}' ({_reason(e)})"
        do = f"is it on, and does this work: ssh -o BatchMode=yes {host} true"
    raise EdgeclipError(name, what, do)
