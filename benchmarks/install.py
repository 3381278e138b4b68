"""What pip brings: megabytes of download and of disk, for a device, for training and for `make
demo`.

Each set of requirements, read from pyproject.toml, is downloaded by `pip download` into a temporary
folder, as wheels for this machine and Python, and counted; nothing is installed. Unpacked is what
lies on the disk before Python compiles it.

What bounds it: the libraries. numpy and the runtime on a device; torch's CUDA build, which pip
takes on Linux, for training. Nothing is required; README.md and docs/devices.md quote it.

    python benchmarks/install.py --json results/install.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import common
import tomllib

REPO = Path(__file__).parent.parent
DEMO = ("train", "openvino", "demo", "ssh", "dev")
"""extras that the Makefile installs, but `lint`: TensorRT-RTX is a source package that fetches
NVIDIA's wheel by itself
"""
DEVICE = {
    "edgeclip": (),
    "edgeclip[onnxruntime]": ("onnxruntime",),
    "edgeclip[onnxruntime,text]": ("onnxruntime", "text"),
}
TRAIN = {"edgeclip[train]": ("train",), "what `make demo` installs, without `lint`": DEMO}
SETS = {"whole": DEVICE | TRAIN, "quick": DEVICE, "smoke": {"edgeclip": ()}}


def requirements(extras: tuple[str, ...]) -> list[str]:
    """Return what pip is asked for: the plain dependencies, and those of the extras."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return wanted


def sizes(extras: tuple[str, ...]) -> dict[str, Any]:
    """Return how many wheels there are, and their MiB as files and unpacked."""
    with tempfile.TemporaryDirectory(prefix="edgeclip-wheels-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
        command += ["--only-binary", ":all:", "--constraint", str(REPO / "constraints.txt")]
        command += ["--disable-pip-version-check", *requirements(extras)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        wheels = sorted(Path(folder).iterdir())
        download = sum(wheel.stat().st_size for wheel in wheels)
        unpacked = 0
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                unpacked += sum(member.file_size for member in archive.infolist())
    return {
        "wheels": len(wheels),
        "download_mib": download / 2**20,
        "unpacked_mib": unpacked / 2**20,
    }


def measure(options: argparse.Namespace) -> None:
    """Download and count each set; print the table and the JSON."""
    here = common.this_machine()
    found = {}
    rows = []
    for name, extras in SETS[options.form].items():
        found[name] = sizes(extras)
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
        of = found[name]
        rows.append([name, of["wheels"], f"{of['download_mib']:.0f}", f"{of['unpacked_mib']:.0f}"])
    common.table(rows, ["pip install", "wheels", "download MiB", "unpacked MiB"])
    common.finish({"benchmark": "install", "sets": found}, [], here, options)


def main() -> None:
    measure(common.arguments(__doc__).parse_args())


if __name__ == "__main__":
    main()
