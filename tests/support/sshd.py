"""A user's ~/.ssh that knows a real sshd as `board`, a link that can be cut, and what is left
behind on the board.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest


class Proxy:
    """Passes bytes on to a port of 127.0.0.1, until it has passed `limit` of them upwards or is
    cut.
    """

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
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True
    )
    if done.returncode:
        pytest.skip("a small disk cannot be mounted here: run as root")
