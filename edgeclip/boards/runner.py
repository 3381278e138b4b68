"""What runs on a board: the device layer, and the few wheels that it needs there.

The host fetches the wheels with pip for the board's platform and Python, so the board needs neither pip nor a network,
and the board's own python3 starts it all, so that what came with its system (JetPack's TensorRT) is seen. A runner is
named by its wheels and by the text of the device layer: it is copied once, and a new version lies beside the old one.
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
NEEDS = ("msgspec", "numpy", "pillow", "pyyaml", "tokenizers")
"""what validate and bench import; their own requirements are for parts that are not used"""
GROUND = ("__init__.py", "errors.py", "disk.py", "config.py", "progress.py")
"""what edgeclip/device/ stands on"""
OLDEST = (3, 10)


def wheels(
    name: str, facts: Facts, packages: tuple[str, ...], cache: Path | None = None
) -> list[Path]:
    """The wheels for a machine with these facts, fetched once. Raises `EdgeclipError` when there are none for it."""
    version = tuple(int(x) for x in facts.python.split(".")[:2])
    if version < OLDEST:
        raise EdgeclipError(
            name,
            f"its python3 is {facts.python}, and 3.10 is the oldest that will do",
            "name a newer one in the profile's reach.python",
        )
    if not facts.glibc:
        raise EdgeclipError(
            name,
            "its C library is not glibc, and there are no wheels for it",
            "use a system with glibc (Debian, Ubuntu, JetPack)",
        )
    minor = int(facts.glibc.split(".")[1])
    platforms = [f"manylinux_2_{m}_{facts.arch}" for m in range(minor, 16, -1)] + [
        f"manylinux2014_{facts.arch}"
    ]
    names = sorted({*NEEDS, *packages})
    asked = {"packages": names, "python": version, "platforms": platforms}
    folder = (cache or disk.cache_folder()) / "wheels" / disk.fingerprint(asked)[:16]
    if not (folder / disk.MANIFEST).exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
        ]
        command += [x for p in platforms for x in ("--platform", p)]
        command += [
            "--implementation",
            "cp",
            "--python-version",
            ".".join(map(str, version)),
            "--abi",
            f"cp{version[0]}{version[1]}",
            "--abi",
            "abi3",
        ]
        with disk.new_folder(folder) as temporary:
            done = subprocess.run(
                [*command, "--abi", "none", "--dest", str(temporary), *names],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                reason = next(
                    (line for line in done.stderr.splitlines() if line.startswith("ERROR")),
                    done.stderr[-200:],
                )
                what = f"no wheels for {facts.arch}, Python {facts.python}, glibc {facts.glibc} ({' '.join(reason.split())})"
                raise EdgeclipError(
                    name, what, "look at the profile's packages, and at pip's index"
                )
            disk.write_manifest(temporary, "wheels", asked)
    else:
        disk.verify(folder, disk.read_manifest(folder, "wheels"))
    return sorted(folder.glob("*.whl"))


def device_layer() -> bytes:
    """A zip of the device layer's own modules: equal sources, equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for path in sorted([*(PACKAGE / g for g in GROUND), *(PACKAGE / "device").rglob("*.py")]):
            name = path.relative_to(PACKAGE)
            z.writestr(
                zipfile.ZipInfo(f"edgeclip/{name.as_posix()}"),
                path.read_bytes(),
                zipfile.ZIP_DEFLATED,
            )
    return buffer.getvalue()


def unpacked(files: dict[str, Path]) -> int:
    """Bytes in the wheels {sha256: path}, once they are unpacked."""
    return sum(i.file_size for path in files.values() for i in zipfile.ZipFile(path).infolist())


def key(files: dict[str, Path]) -> str:
    """The name of a runner made of these files {sha256: path}."""
    return hashlib.sha256(" ".join(sorted(files)).encode()).hexdigest()[:16]
