"""A real sshd, a link to it that can be cut, and a home folder of its own."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from tests.support.optional import require
from tests.support.sshd import Proxy

INSTALL = "apt install openssh-server"


@pytest.fixture
def sshd():
    """start(extra configuration) -> asyncssh's options; each is stopped at the end."""
    require("asyncssh", "pip install 'edgeclip[ssh]'")
    from edgeclip.boards import loopback

    if loopback.SSHD is None:
        pytest.skip(f"sshd is not installed: {INSTALL}")
    loop, stack = asyncio.new_event_loop(), contextlib.AsyncExitStack()

    def start(extra=""):
        return loop.run_until_complete(stack.enter_async_context(loopback.sshd("test", extra)))

    yield start
    loop.run_until_complete(stack.aclose())
    loop.close()


@pytest.fixture
def proxy():
    made = []

    def start(target, limit=None):
        made.append(Proxy(target, limit))
        return made[-1]

    yield start
    for p in made:
        p.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Another home folder; what was fetched once is kept where it was."""
    monkeypatch.setenv(
        "XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"
