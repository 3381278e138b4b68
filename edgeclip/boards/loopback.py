"""An sshd of edgeclip's own on 127.0.0.1, with keys of its own, for the length of a call; and an aarch64 board behind it.

`loopback` shows that the way to a board changes nothing. `arm64-emulated` runs aarch64 code on an x86 machine: a Debian
root unpacked by debootstrap (its first stage and dpkg-deb, so no root rights and no binfmt are needed) under
qemu-user. Its arithmetic is that of the instruction set, so parity can be judged; its time is that of a translator.
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
from typing import Any

from edgeclip import disk
from edgeclip.device.profile import Reach
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
QEMU = "qemu-aarch64-static"
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
START_S = 20


@contextlib.asynccontextmanager
async def sshd(name: str, extra: str = "") -> AsyncIterator[dict[str, Any]]:
    """Starts it, yields asyncssh's options that reach it and trust its key, ends it. extra: lines that come first in its configuration."""
    if SSHD is None:
        raise EdgeclipError(name, "needs sshd, and there is none", "apt install openssh-server")
    import asyncssh

    with tempfile.TemporaryDirectory(prefix="edgeclip-sshd-") as temporary:
        folder = Path(temporary)
        host, user = (
            asyncssh.generate_private_key("ssh-ed25519"),
            asyncssh.generate_private_key("ssh-ed25519"),
        )
        for path, key in (("host_key", host), ("user_key", user)):
            key.write_private_key(str(folder / path))
            (folder / path).chmod(0o600)
        user.write_public_key(str(folder / "authorized_keys"))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        (folder / "known_hosts").write_text(
            f"[127.0.0.1]:{port} {host.export_public_key().decode()}"
        )
        (folder / "config").write_text(
            f"{extra}ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
            f"UsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, started by root, locks itself in
        process = subprocess.Popen(
            [SSHD, "-D", "-E", str(folder / "log"), "-f", str(folder / "config")]
        )
        try:
            for _ in range(START_S * 20):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None:
                    reason = " ".join((folder / "log").read_text(errors="replace").split())
                    raise EdgeclipError(
                        name, f"its sshd did not start ({reason[:200]})", f"see {SSHD} -T"
                    )
                await asyncio.sleep(0.05)
            yield {
                "host": "127.0.0.1", "port": port, "client_keys": [str(folder / "user_key")], "known_hosts": str(folder / "known_hosts"),
                "config": None, "agent_path": None,
            }  # fmt: skip
        finally:
            process.terminate()
            process.wait()


def emulated_python(name: str, reach: Reach, cache: Path | None = None) -> tuple[str, ...]:
    """The command that starts the emulated aarch64 Python; makes its Debian root at the first call."""
    for tool, package in (
        (QEMU, "qemu-user-static"),
        ("debootstrap", "debootstrap"),
        ("dpkg-deb", "dpkg"),
    ):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            raise EdgeclipError(name, f"needs {tool}, and there is none", f"apt install {package}")
    root = (cache or disk.cache_folder()) / f"arm64-{SUITE}"
    if not root.exists():
        say(f"{name}: fetching an aarch64 Debian {SUITE} (about 400 MB in {root}, a minute)")
        temporary = root.with_name(
            f".{root.name}.{os.getpid()}.tmp"
        )  # disk.new_folder would follow its links out of it
        temporary.mkdir(parents=True)
        try:
            _debootstrap(name, temporary)
            os.sync()
            temporary.rename(root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return (QEMU, "-cpu", str(reach.emulate), "-L", str(root), str(root / "usr/bin/python3"))


def _debootstrap(name: str, root: Path) -> None:
    """Unpacks Debian's packages below root; none of them is configured, and no aarch64 program has to run for that."""
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    command = [
        "debootstrap",
        "--foreign",
        "--arch=arm64",
        "--variant=minbase",
        "--include=python3,libstdc++6",
        SUITE,
        str(root),
        MIRROR,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    packages = sorted((root / "var/cache/apt/archives").glob("*.deb"))
    if done.returncode or not packages:
        reason = " ".join((done.stdout + done.stderr).split())[-200:]
        raise EdgeclipError(
            name,
            f"debootstrap failed ({reason})",
            f"it needs root rights and {MIRROR}: try it by hand: {' '.join(command)}",
        )
    for package in packages:
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
        package.unlink()
