"""An sshd of edgeclip's own on 127.0.0.1 for the length of a call, and an aarch64 board behind it.

It has keys of its own. `loopback` shows that the way to a board changes nothing. `arm64-emulated`
runs aarch64 code on an x86 machine: a Debian root unpacked by debootstrap (its first stage and
dpkg-deb, so no root rights and no binfmt are needed) under qemu-user. Its arithmetic is that of the
instruction set, so parity can be judged; its time is that of a translator.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from edgeclip import disk
from edgeclip.boards.link import SshOptions
from edgeclip.device.profile import Reach
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
SSHD = shutil.which("sshd", path=PATH)
QEMU = "qemu-aarch64-static"
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
START_S = 20
"""seconds that sshd may take to start"""


@contextlib.asynccontextmanager
async def sshd(name: str, extra: str = "") -> AsyncIterator[SshOptions]:
    """Start an sshd; yield asyncssh's options that reach it and trust its key; end it.

    name: the device's, for messages. extra: lines that come first in its configuration. Raises
    `EdgeclipError` when there is no sshd, or it does not start.
    """
    if SSHD is None:
        raise EdgeclipError(name, "needs sshd, which is missing", "apt install openssh-server")

    with tempfile.TemporaryDirectory(prefix="edgeclip-sshd-") as temporary:
        folder = Path(temporary)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        _write_keys(folder, port)
        _write_config(folder, port, extra)
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, started by root, locks itself in
        process = subprocess.Popen(
            [SSHD, "-D", "-E", str(folder / "log"), "-f", str(folder / "config")]
        )
        try:
            await _started(name, process, port, folder / "log")
            yield {
                "host": "127.0.0.1",
                "port": port,
                "client_keys": [str(folder / "user_key")],
                "known_hosts": str(folder / "known_hosts"),
                "config": None,
                "agent_path": None,
            }
        finally:
            process.terminate()
            process.wait()


def _write_keys(folder: Path, port: int) -> None:
    """Return the host's key and the user's, and the files that make each trust the other."""
    import asyncssh

    host = asyncssh.generate_private_key("ssh-ed25519")
    user = asyncssh.generate_private_key("ssh-ed25519")
    for name, key in (("host_key", host), ("user_key", user)):
        key.write_private_key(str(folder / name))
        (folder / name).chmod(0o600)
    user.write_public_key(str(folder / "authorized_keys"))
    known = f"[127.0.0.1]:{port} {host.export_public_key().decode()}"
    (folder / "known_hosts").write_text(known)


def _write_config(folder: Path, port: int, extra: str) -> None:
    lines = [
        f"ListenAddress 127.0.0.1:{port}",
        f"HostKey {folder}/host_key",
        f"AuthorizedKeysFile {folder}/authorized_keys",
        "PidFile none",
        "UsePAM no",
        "StrictModes no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PermitRootLogin prohibit-password",
    ]
    (folder / "config").write_text(extra + "\n".join(lines) + "\n")


async def _started(name: str, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until the sshd takes connections; at most START_S seconds."""
    for _ in range(START_S * 20):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            reason = " ".join(log.read_text(errors="replace").split())
            what = f"its sshd did not start ({reason[:200]})"
            raise EdgeclipError(name, what, f"see {SSHD} -T")
        await asyncio.sleep(0.05)


def emulated_python(name: str, reach: Reach, cache: Path | None = None) -> tuple[str, ...]:
    """Return the command that starts the emulated aarch64 Python.

    The first call makes its Debian root, below `cache`. Raises `EdgeclipError` when a tool is
    missing, or Debian's packages cannot be fetched.
    """
    tools = {QEMU: "qemu-user-static", "debootstrap": "debootstrap", "dpkg-deb": "dpkg"}
    for tool, package in tools.items():
        if shutil.which(tool, path=PATH) is None:
            raise EdgeclipError(name, f"needs {tool}, which is missing", f"apt install {package}")

    root = (cache or disk.cache_folder()) / f"arm64-{SUITE}"
    if not root.exists():
        say(f"{name}: fetching an aarch64 Debian {SUITE} (about 400 MB in {root}, a minute)")
        # not disk.new_folder: it would follow the root's links out of it
        temporary = root.with_name(f".{root.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            _debootstrap(name, temporary)
            os.sync()
            temporary.rename(root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return (QEMU, "-cpu", str(reach.emulate), "-L", str(root), str(root / "usr/bin/python3"))


def _debootstrap(name: str, root: Path) -> None:
    """Unpack Debian's packages below `root`.

    None of them is configured, so no aarch64 program has to run for that.
    """
    command = ["debootstrap", "--foreign", "--arch=arm64", "--variant=minbase"]
    command += ["--include=python3,libstdc++6", SUITE, str(root), MIRROR]
    environment = {**os.environ, "PATH": PATH}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    packages = sorted((root / "var/cache/apt/archives").glob("*.deb"))
    if done.returncode or not packages:
        reason = " ".join((done.stdout + done.stderr).split())[-200:]
        do = f"it needs root rights and {MIRROR}: try it by hand: {' '.join(command)}"
        raise EdgeclipError(name, f"debootstrap failed ({reason})", do)
    for package in packages:
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
        package.unlink()
