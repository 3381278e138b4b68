"""What a board must hold and bear: the runner's wheels for aarch64 and x86-64, and one
classification with it in a fresh process.

The wheels are those that `--device` brings (pip, for the platform and Python named); unpacked is
what lies on the board. Import and classification run here, on x86-64, with the loopback's runner
and a Python that sees nothing else: `edgeclip.device.bundle` is imported, a golden image of an int8
bundle is ranked among its labels. Time is the whole process; memory is VmHWM at its end.

What bounds it: numpy's and ONNX Runtime's own libraries. Nothing is required; docs/devices.md
quotes it.

    python benchmarks/footprint.py --run runs/quickstart
"""

import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import common
import compare

from edgeclip.boards import runner
from edgeclip.boards.board import Board
from edgeclip.device import profile as D
from edgeclip.device.bundle import Bundle
from edgeclip.device.machine import Facts

RUNS = {"whole": 7, "quick": 7, "smoke": 1}
PLATFORMS = {
    "Debian 12 aarch64 (Raspberry Pi OS)": Facts("aarch64", "3.11.2", "Debian", glibc="2.36"),
    "JetPack 6 aarch64": Facts("aarch64", "3.10.12", "Ubuntu", glibc="2.35"),
    "Debian 12 x86-64": Facts("x86_64", "3.11.2", "Debian", glibc="2.36"),
}
HERE = "Debian 12 x86-64"
CODE = {
    "import": "import edgeclip.device.bundle",
    "one classification": "import sys; from edgeclip.device.bundle import Bundle; b = Bundle.load(sys.argv[1]); b.classify(b.folder / b.manifest.golden.images[0])",
}
PEAK = "\nimport re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"


def measure(run: Path, options: Any) -> None:
    here = common.this_machine()
    figures: dict[str, Any] = {}
    rows = []
    platforms = PLATFORMS
    if options.form == common.SMOKE:
        platforms = {HERE: PLATFORMS[HERE]}
    for name, facts in platforms.items():
        wheels = runner.wheels(name, facts, ("onnxruntime",))
        unpacked = sum(i.file_size for w in wheels for i in zipfile.ZipFile(w).infolist())
        figures[name] = {
            "wheels": [w.name for w in wheels],
            "mib": sum(w.stat().st_size for w in wheels) / 2**20,
            "unpacked_mib": unpacked / 2**20,
        }
        rows.append(
            [
                name,
                len(wheels),
                f"{figures[name]['mib']:.1f}",
                f"{figures[name]['unpacked_mib']:.1f}",
                ", ".join("-".join(w.name.split("-")[:2]) for w in wheels),
            ]
        )
    common.table(rows, ["platform", "wheels", "MiB", "unpacked MiB", ""])
    own = runner.device_layer()
    print(f"the device layer itself: {len(own) / 1024:.0f} KiB\n")
    folder = next(
        p
        for n in ("onnx-int8", "onnx-int8-arm", "onnx-fp32")
        if (p := run / "bundles" / n).is_dir()
    )
    name, device = D.load("loopback")
    with Board(name, device) as board:
        board.prepare([Bundle.load(folder)], None)
        path = f"{board.folder}/{board.runner}"
    rows = []
    for what, code in CODE.items():
        laps, peaks = [], []
        for _ in range(RUNS[options.form]):
            before = time.perf_counter()
            command = ["python3", "-c", code + PEAK, str(folder.resolve())]
            done = subprocess.run(
                command,
                env={
                    "PYTHONPATH": path,
                    "PATH": "/usr/bin:/bin:/usr/local/bin",
                    "OMP_NUM_THREADS": "1",
                },
                capture_output=True,
                text=True,
                check=True,
            )
            laps.append(time.perf_counter() - before)
            peaks.append(int(done.stdout) / 1024)
        figures[what] = {
            "seconds": compare.interval(laps)._asdict(),
            "peak_mib": compare.interval(peaks)._asdict(),
        }
        rows.append([what, str(compare.interval(laps)), f"{compare.interval(peaks).median:.0f}"])
    common.table(
        rows,
        [f"fresh process, {folder.name}", f"s, median of {RUNS[options.form]} (95 %)", "peak MiB"],
    )
    figures |= {"benchmark": "footprint", "device_layer_bytes": len(own)}
    common.finish(figures, [], here, options)


def main() -> None:
    parser = common.arguments(__doc__)
    common.run_argument(parser)
    options = parser.parse_args()
    common.require_board()
    with common.measured_run(options, ("onnx-int8",)) as run:
        measure(run, options)


if __name__ == "__main__":
    main()
