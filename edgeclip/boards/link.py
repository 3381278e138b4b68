"""How a request gets to a board: through ssh, or through a command that leads there (`docker exec -i board`).

The user's ssh setup does everything that ssh itself would do by it: host alias, user, port, keys, agent, jump hosts,
known_hosts. Only keys are tried, since a question for a password would wait for an answer that nobody gives, and a host key
that is not known is refused, since accepting it would be guessing.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from edgeclip.device.profile import Reach
from edgeclip.errors import EdgeclipError, LinkLost
from edgeclip.progress import say

AGENT = (Path(__file__).parent / "agent.py").read_bytes()
COMMAND = 'exec python3 -u -c \'import sys; b = sys.stdin.buffer; exec(compile(b.read(int(b.readline())), "agent.py", "exec"))\''
MARK = b"edgeclip-reply "
LINE = 1 << 24
NO_COMMAND = 127
"""a shell's exit code"""
CONNECT_S = 30
AGAIN = "run the command again: what has arrived is kept"

Start = Callable[[], Awaitable[Any]]
"""starts COMMAND on the board: a process with stdin, stdout and stderr streams"""


class Link(NamedTuple):
    name: str
    """of the device, for messages"""
    start: Start
    broken: tuple[type[BaseException], ...] = (OSError, EOFError)
    """what a broken link raises"""

    async def ask(
        self, op: str, payload: Iterable[bytes] = (), **request: Any
    ) -> tuple[dict[str, Any], bytes]:
        """The board's answer and the bytes behind it. What it prints on stderr is passed on as it comes.

        Raises `LinkLost` when the link breaks, `EdgeclipError` with the board's own reason when it cannot do it.
        """
        process = None
        try:
            process = await self.start()
            talk = asyncio.ensure_future(self._pass_on(process.stderr))
            with contextlib.suppress(
                *self.broken
            ):  # the board may answer before it has heard everything: its disk is full
                process.stdin.write(
                    b"%d\n" % len(AGENT)
                    + AGENT
                    + json.dumps({"op": op, **request}).encode()
                    + b"\n"
                )
                for block in payload:
                    process.stdin.write(block)
                    await process.stdin.drain()
                await process.stdin.drain()
            while (line := await process.stdout.readline()) and not line.startswith(MARK):
                pass
            if not line.endswith(b"\n"):
                await asyncio.wait([talk], timeout=2)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), 5)
                if process.returncode == NO_COMMAND:
                    raise EdgeclipError(
                        self.name,
                        "has no python3 on the PATH that ssh gives it",
                        "install Python 3.10 or newer there",
                    )
                raise EOFError("no answer came")
            answer = json.loads(line[len(MARK) :])
            rest = await process.stdout.readexactly(answer.pop("bytes"))
            await asyncio.wait([talk], timeout=2)
        except self.broken as e:
            raise LinkLost(
                self.name, f"the link broke off during '{op}' ({_reason(e)})", AGAIN
            ) from None
        finally:
            if process is not None:
                with contextlib.suppress(Exception):
                    process.stdin.close()
                    await asyncio.wait_for(process.wait(), 5)
        if "error" in answer:
            raise EdgeclipError(
                self.name,
                answer["error"],
                f"see docs/devices.md, or look at it with: edgeclip doctor --device {self.name}",
            )
        return answer, rest

    async def _pass_on(self, stderr: Any) -> None:
        with contextlib.suppress(*self.broken):
            while line := await stderr.readline():
                say(f"{self.name}: {line.decode(errors='replace').rstrip()}")


def _reason(e: BaseException) -> str:
    return (
        "connection refused"
        if isinstance(e, ConnectionRefusedError)
        else " ".join(str(e).split()) or type(e).__name__
    )


@contextlib.asynccontextmanager
async def connect(
    name: str, reach: Reach, options: dict[str, Any] | None = None
) -> AsyncIterator[Link]:
    """A link to the board. options: asyncssh's, instead of the user's ssh setup (own_sshd)."""
    if reach.command:

        async def spawn() -> Any:
            pipe = asyncio.subprocess.PIPE
            command = [*reach.command, "sh", "-c", COMMAND]
            return await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE
            )

        yield Link(name, spawn)
        return
    try:
        import asyncssh
    except ImportError as e:
        raise EdgeclipError(
            name,
            f"is reached over ssh, and {e.name} is not installed",
            "pip install 'edgeclip[ssh]'",
        ) from None
    host = (options or {}).get("host") or reach.ssh
    ways: dict[str, Any] = {
        "preferred_auth": "publickey",
        "connect_timeout": CONNECT_S,
        "login_timeout": CONNECT_S,
        "keepalive_interval": 10,
    }
    try:
        # ProxyCommand and jump hosts come before asyncssh's own timeouts begin.
        connection = await asyncio.wait_for(
            asyncssh.connect(**{"host": host, **ways, **(options or {})}), 2 * CONNECT_S
        )
    except asyncssh.HostKeyNotVerifiable as e:
        do = f"compare its fingerprint and log in once with: ssh {host}"
        raise EdgeclipError(
            name, f"its host key is not the known one, so it was not trusted ({_reason(e)})", do
        ) from None
    except asyncssh.PermissionDenied as e:
        do = f"let your key in with: ssh-copy-id {host} (a password is never asked for; a key with a passphrase must be in the ssh agent)"
        raise EdgeclipError(name, f"no key of yours was accepted ({_reason(e)})", do) from None
    except (asyncssh.Error, OSError, ValueError, asyncio.TimeoutError) as e:
        do = f"is it on, and does this work: ssh -o BatchMode=yes {host} true"
        raise EdgeclipError(
            name, f"cannot be reached over ssh as '{host}' ({_reason(e)})", do
        ) from None

    async def start() -> Any:
        return await connection.create_process(COMMAND, encoding=None)

    try:
        yield Link(name, start, (OSError, EOFError, asyncssh.Error))
    finally:
        connection.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(connection.wait_closed(), 5)
