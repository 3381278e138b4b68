"""How a request gets to a board: through ssh, or a command that leads there (docker exec).

The user's ssh setup does everything that ssh itself would do by it: host alias, user, port, keys,
agent, jump hosts, known_hosts. Only keys are tried, since a question for a password would wait for
an answer that nobody gives. A host key that is not known is refused: accepting it would be a
guess.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from edgeclip.boards.hearing import DO, Ear, Heard, Patience, in_time
from edgeclip.device.__main__ import MARK
from edgeclip.device.profile import Reach
from edgeclip.errors import EdgeclipError, LinkLost, printable
from edgeclip.progress import say
from edgeclip.text_file.parser import parse_json

AGENT = (Path(__file__).parent / "agent.py").read_bytes()
COMMAND = (
    "exec python3 -u -c 'import sys; b = sys.stdin.buffer; "
    'exec(compile(b.read(int(b.readline())), "agent.py", "exec"))\''
)
LINE = 1 << 24
"""bytes of the longest answer"""
SHORT_LINE = 1 << 20
"""of one that is no report"""
TALK = 1 << 20
"""bytes that a board may say beside its answer"""
LINES = 10_000
"""a day of progress is a third of it"""
REASON = 1_000
"""characters of what a board says that are shown at once"""
QUESTIONS = ("look", "clock", "missing", "exists")
"""what a board answers at once"""
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
    reach: Reach = Reach()
    """how long the board is waited for"""

    async def ask(
        self,
        op: str,
        payload: Iterable[bytes] = (),
        most: int = 0,
        minutes: float = 0.0,
        **request: Any,
    ) -> tuple[Message, bytes]:
        """Return the board's answer and the bytes behind it; pass on what it prints on stderr.

        most: bytes behind the answer; minutes: how long the work itself takes on top. Raises
        `LinkLost` when the link breaks, or the board is silent for too long, and `EdgeclipError`
        with the board's own reason when it cannot do it, or for an answer that is none.
        """
        asked = {"op": op, "id": secrets.token_hex(8), **request}
        heard = Heard()
        work = self._exchange(asked, payload, most, heard)
        silent = self.reach.answer_s if op in QUESTIONS else self.reach.work_s
        patience = Patience(silent, self.reach.longest_s + 60 * minutes)
        try:
            answer, rest = await in_time(self.name, op, work, heard, patience)
        except self.broken as e:
            what = f"the link broke off during '{op}' ({_reason(e)})"
            raise LinkLost(self.name, what, AGAIN) from None
        if "error" in answer:
            do = f"see docs/devices.md, or: edgeclip doctor --device {self.name}"
            raise EdgeclipError(self.name, printable(str(answer["error"]), REASON), do)
        if answer.pop("id", None) != asked["id"]:
            raise EdgeclipError(self.name, "answered another question", f"{DO} {self.name}")
        return answer, rest

    async def _exchange(
        self, asked: Message, payload: Iterable[bytes], most: int, heard: Heard
    ) -> tuple[Message, bytes]:
        """Start the agent, tell it what is asked, and hear it to its end."""
        process = await self.start()
        talk = asyncio.ensure_future(self._pass_on(Ear(self.name, process.stderr, heard)))
        work = asyncio.ensure_future(self._talk(process, talk, asked, payload, most, heard))
        try:
            await asyncio.wait({talk, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                talk.result()  # it may be of a board that does not stop talking
            found = await work
            await asyncio.wait([talk], timeout=TALK_S)
            return found
        finally:
            for task in (talk, work):
                task.cancel()
            await asyncio.wait([talk, work])
            await _end(process)

    async def _talk(
        self,
        process: Any,
        talk: "asyncio.Future[None]",
        asked: Message,
        payload: Iterable[bytes],
        most: int,
        heard: Heard,
    ) -> tuple[Message, bytes]:
        # the board may answer before it has heard everything: its disk is full
        with contextlib.suppress(*self.broken):
            await _send(process, asked, payload, heard)
        longest = LINE if asked["op"] == "run" else SHORT_LINE
        return await self._answer(
            process, talk, Ear(self.name, process.stdout, heard), longest, most
        )

    async def _answer(
        self, process: Any, talk: "asyncio.Future[None]", ear: Ear, longest: int, most: int
    ) -> tuple[Message, bytes]:
        """Return the marked line among what a login shell prints, and the bytes behind it."""
        before = lines = 0
        while (line := await ear.line(longest)) and not line.startswith(MARK):
            before += len(line)
            lines += 1
            if before > TALK or lines > LINES:
                raise ear.too_much(f"more than {TALK:,} bytes or {LINES:,} lines, and no answer")
        if not line.endswith(b"\n"):
            await asyncio.wait([talk], timeout=TALK_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_closed(process), CLOSE_S)
            if process.returncode == NO_COMMAND:
                what = "has no python3 on the PATH that ssh gives it"
                raise EdgeclipError(self.name, what, "install Python 3.10 or newer there")
            raise EOFError("no answer came")

        answer = parse_json(line[len(MARK) :], f"{self.name}: its answer", f"{DO} {self.name}")
        size = None
        if isinstance(answer, dict):
            size = answer.pop("bytes", 0)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= most:
            what = f"answered with {printable(str(size), 40)} bytes, and {most:,} is the most"
            raise EdgeclipError(self.name, what, f"{DO} {self.name}")
        return answer, await ear.exactly(size)

    async def _pass_on(self, ear: Ear) -> None:
        """Print what the board says. Raises `EdgeclipError` for one that does not stop."""
        said = lines = 0
        with contextlib.suppress(*self.broken):
            while line := await ear.line(TALK):
                say(f"{self.name}: {printable(line.decode(errors='replace').rstrip(), REASON)}")
                said += len(line)
                lines += 1
                if said > TALK or lines > LINES:
                    raise ear.too_much(f"more than {TALK:,} bytes or {LINES:,} lines of messages")


async def _send(process: Any, request: Message, payload: Iterable[bytes], heard: Heard) -> None:
    """Send the agent's text, the request, and what belongs to it."""
    head = b"%d\n" % len(AGENT) + AGENT
    process.stdin.write(head + json.dumps(request).encode() + b"\n")
    for block in payload:
        process.stdin.write(block)
        await process.stdin.drain()
        heard.now()
    await process.stdin.drain()


async def _closed(process: Any) -> None:
    """Wait for its end. asyncssh's own `wait` would collect all that an endless one still says."""
    await getattr(process, "wait_closed", process.wait)()


async def _end(process: Any) -> None:
    """Let a process end by itself, which it does when nobody speaks to it; else end it."""
    with contextlib.suppress(Exception):
        process.stdin.close()
        await asyncio.wait_for(_closed(process), CLOSE_S)
    if process.returncode is None:
        with contextlib.suppress(Exception):
            process.kill()
            getattr(process, "close", bool)()


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
        yield Link(name, _by_command(reach.command), reach=reach)
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
        yield Link(name, start, (OSError, EOFError, asyncssh.Error), reach)
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
