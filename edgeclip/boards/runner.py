"""What runs on a board: the device layer, and the few wheels that it needs there.

The host fetches the wheels with pip for the board's platform and Python, so the board needs neither
pip nor a network. The board's own python3 starts it all, so what came with its system (JetPack's
TensorRT) is found. A runner is named by its wheels and by the text of the device layer: it is
copied once, and a new version lies beside the old one.
"""

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

from edgeclip import disk
from edgeclip.device.machine import Facts
from edgeclip.errors import EdgeclipError

PACKAGE = Path(__file__).parent.parent
NEEDS = ("ftfy", "msgspec", "numpy", "pillow", "pyyaml", "tokenizers", "wcwidth")
"""what validate and bench import; their own requirements are for parts that are not used"""
GROUND = ("__init__.py", "errors.py", "config.py", "progress.py")
FOLDERS = ("device", "disk", "text_file")
"""what edgeclip/device/ stands on, and the folders that go whole"""
OLDEST = (3, 10)
"""the oldest Python that runs the device layer"""


def wheels(
    name: str, facts: Facts, packages: tuple[str, ...], cache: Path | None = None
) -> list[Path]:
    """Return the wheels for a machine with these facts, fetched once.

    name: the device's. packages: pip requirements of its runtimes. Raises `EdgeclipError` when
    there are none for it.
    """
    version = _python(name, facts)
    platforms = _platforms(name, facts)
    names = sorted({*NEEDS, *packages})
    wanted = {"packages": names, "python": version, "platforms": platforms}
    folder = (cache or disk.cache_folder()) / "wheels" / disk.fingerprint(wanted)[:16]
    if (folder / disk.MANIFEST).exists():
        disk.verify(folder, disk.read_manifest(folder, "wheels"))
    else:
        with disk.new_folder(folder) as temporary:
            command = [*_pip_download(version, platforms), "--dest", str(temporary), *names]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                board = f"{facts.arch}, Python {facts.python}, glibc {facts.glibc}"
                what = f"no wheels for {board} ({_reason(done.stderr)})"
                raise EdgeclipError(name, what, "check the profile's packages and pip's index")
            disk.write_manifest(temporary, "wheels", wanted)
    return sorted(folder.glob("*.whl"))


def _python(name: str, facts: Facts) -> tuple[int, ...]:
    version = tuple(int(part) for part in facts.python.split(".")[:2])
    if version < OLDEST:
        what = f"its python3 is {facts.python}, and 3.10 is the oldest that will do"
        raise EdgeclipError(name, what, "name a newer one in the profile's reach.python")
    return version


def _platforms(name: str, facts: Facts) -> list[str]:
    """pip's names of the platforms whose wheels run there, newest first."""
    if not facts.glibc:
        what = "its C library is not glibc, and there are no wheels for it"
        raise EdgeclipError(name, what, "use a system with glibc (Debian, Ubuntu, JetPack)")
    newest = int(facts.glibc.split(".")[1])
    platforms = [f"manylinux_2_{minor}_{facts.arch}" for minor in range(newest, 16, -1)]
    platforms.append(f"manylinux2014_{facts.arch}")
    return platforms


def _pip_download(version: tuple[int, ...], platforms: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:"]
    for platform in platforms:
        command += ["--platform", platform]
    command += ["--implementation", "cp", "--python-version", ".".join(map(str, version))]
    for abi in (f"cp{version[0]}{version[1]}", "abi3", "none"):
        command += ["--abi", abi]
    return command


def _reason(stderr: str) -> str:
    """pip's first error, or the end of what it said, on one line."""
    for line in stderr.splitlines():
        if line.startswith("ERROR"):
            return " ".join(line.split())
    return " ".join(stderr[-200:].split())


def device_layer() -> bytes:
    """Return a zip of the device layer's own modules: equal sources, equal bytes."""
    paths = [PACKAGE / name for name in GROUND]
    for folder in FOLDERS:
        paths += (PACKAGE / folder).rglob("*.py")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for path in sorted(paths):
            name = f"edgeclip/{path.relative_to(PACKAGE).as_posix()}"
            z.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def unpacked(files: dict[str, Path]) -> int:
    """Return the bytes in the wheels {sha256: path}, once they are unpacked."""
    size = 0
    for path in files.values():
        with zipfile.ZipFile(path) as z:
            size += sum(info.file_size for info in z.infolist())
    return size


def key(files: dict[str, Path]) -> str:
    """Return the name of a runner made of these files {sha256: path}."""
    return hashlib.sha256(" ".join(sorted(files)).encode()).hexdigest()[:16]
