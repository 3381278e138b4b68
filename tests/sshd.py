"""A real sshd for tests, a user's ~/.ssh that knows it as `board`, and a link that can be cut."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

INSTALL = "apt install openssh-server"


@pytest.fixture
def sshd():
    """start(extra configuration) -> asyncssh's options; each is stopped at the end."""
    from conftest import require  # conftest takes these fixtures from here

    require("asyncssh", "pip install 'edgeclip[ssh]'")
    from edgeclip.remote import own_sshd

    if own_sshd.SSHD is None:
        pytest.skip(f"sshd is not installed: {INSTALL}")
    loop, stack = asyncio.new_event_loop(), contextlib.AsyncExitStack()

    def start(extra=""):
        return loop.run_until_complete(stack.enter_async_context(own_sshd.sshd("test", extra)))

    yield start
    loop.run_until_complete(stack.aclose())
    loop.close()


class Proxy:
    """Passes bytes on to a port of 127.0.0.1, until it has passed `limit` of them upwards or is cut."""

    def __init__(self, target, limit=None):
        self.target, self.limit, self.passed, self.ends = target, limit, 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self.ends += [near, far]
                for a, b, up in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=(a, b, up), daemon=True).start()

    def _pump(self, a, b, up):
        with contextlib.suppress(OSError):
            while block := a.recv(1 << 14):
                if up:
                    self.passed += len(block)
                    if self.limit is not None and self.passed > self.limit:
                        self.cut()
                b.sendall(block)

    def cut(self):
        for s in self.ends:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        self.ends.clear()

    def close(self):
        self.listener.close()
        self.cut()


@pytest.fixture
def proxy():
    made = []

    def start(target, limit=None):
        made.append(Proxy(target, limit))
        return made[-1]

    yield start
    for p in made:
        p.close()


def write_ssh_config(home, options, port=None, host_key=None, more=""):
    """~/.ssh of a user who reaches the sshd of `options` as `board`, and `far` through `board`."""
    ssh = Path(home) / ".ssh"
    ssh.mkdir(parents=True, exist_ok=True)
    port = port or options["port"]
    key = host_key or Path(options["known_hosts"]).read_text().split(" ", 1)[1]
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}[127.0.0.1]:{options['port']} {key}")
    shutil.copy(options["client_keys"][0], ssh / "key")
    (ssh / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {ssh}/key\n{more}\n"
        f"Host far\n  HostName 127.0.0.1\n  Port {options['port']}\n  IdentityFile {ssh}/key\n  ProxyJump board\n"
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Another home folder; what was fetched once is kept where it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def profile(folder, host="board", more="", bench="{min_duration_s: 0.1, min_query_count: 20}"):
    """A profile `toy.yaml` of a board that leaves its files below `folder`."""
    path = Path(folder) / "toy.yaml"
    path.write_text(
        f"reach: {{ssh: {host}, folder: {folder}/on-board}}\nruntimes: [onnxruntime]\npackages: [onnxruntime]\noffline_batch: 4\nbench: {bench}\n{more}"
    )
    return path


def working_below(folder):
    """Processes whose working folder lies there."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if os.readlink(cwd).startswith(str(folder)):
                found.append(int(cwd.parent.name))
    return found


def mount_tmpfs(path, size):
    """A small disk of its own; needs root."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("a small disk cannot be mounted here: run as root")
