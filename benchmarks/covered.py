"""Which lines and branches of edgeclip do its own tests reach?

    make coverage

runs every test under coverage.py, with all processes that a test starts, and then this. Lines that
only absent hardware runs are marked `# hardware: WHAT` in the code; they are left out of the shares
and listed. A share is that of coverage.py: lines and branches reached, of all lines and branches.

Required are 90 % of the device layer and 85 % of everything.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import compare
from coverage import Coverage

ROOT = Path(__file__).parent.parent
SMALL = "tests/device/test_intervals.py"
"""the tests of the smoke form"""
LEAST = {"device layer": 90.0, "everything": 85.0}
HARDWARE = re.compile(r"# hardware: (.+)$")
LAYERS = {
    "device layer": "edgeclip/device/",
    "boards": "edgeclip/boards/",
    "reports": "edgeclip/reports/",
    "command line": "edgeclip/cli/",
    "host layer": "edgeclip/host/",
    "everything": "edgeclip/",
}


def run_small(data: Path) -> None:
    """Measure a few tests into the file `data`."""
    command = [sys.executable, "-m", "coverage", "run", "--data-file", str(data)]
    command += ["-m", "pytest", "-q", "-p", "no:cacheprovider", SMALL]
    own = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
    subprocess.run(command, cwd=ROOT, env=own, check=True, stdout=sys.stderr)
    measured = opened(data)
    measured.combine()
    measured.save()


def opened(data: Path) -> Coverage:
    return Coverage(data_file=str(data), config_file=str(ROOT / "pyproject.toml"))


def read(data: Path) -> dict[str, dict[str, int]]:
    """Return {file: counts} of what was measured, from coverage.py's own report."""
    measured = opened(data)
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        measured.json_report(outfile=str(path))
        found = json.loads(path.read_text())["files"]
    files = {}
    for name, row in found.items():
        summary = row["summary"]
        files[name] = {
            "lines": summary["num_statements"],
            "lines_reached": summary["covered_lines"],
            "branches": summary["num_branches"],
            "branches_reached": summary["covered_branches"],
        }
    return files


def layer(files: dict[str, dict[str, int]], below: str) -> dict[str, Any]:
    """Return the counts and shares, in percent, of the files below a folder."""
    chosen = [counts for name, counts in files.items() if name.startswith(below)]
    total = {key: sum(counts[key] for counts in chosen) for key in chosen[0]}
    reached = total["lines_reached"] + total["branches_reached"]
    return {
        "files": len(chosen),
        **total,
        "percent": 100 * reached / (total["lines"] + total["branches"]),
    }


def hardware() -> list[dict[str, Any]]:
    """Return what is marked as needing hardware: file, first line, what it begins, which."""
    found = []
    for path in sorted((ROOT / "edgeclip").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if needs := HARDWARE.search(line):
                begins = line[: needs.start()].strip().rstrip(":")
                name = path.relative_to(ROOT).as_posix()
                found.append({"file": name, "line": number, "what": begins, "needs": needs[1]})
    return found


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--data", type=common.absolute, default=ROOT / ".coverage", help="coverage.py's file"
    )
    options = parser.parse_args()
    here = common.this_machine()
    with tempfile.TemporaryDirectory() as folder:
        if options.form == common.SMOKE:
            options.data = Path(folder) / "data"
            run_small(options.data)
        os.chdir(ROOT)  # coverage.py names files from where it is
        files = read(options.data)
    layers = {name: layer(files, below) for name, below in LAYERS.items()}
    required = []
    for name, least in LEAST.items():
        row = layers[name]
        count = row["lines"] + row["branches"]
        what = f"{name}: lines and branches reached, %"
        required.append(compare.exact(what, round(row["percent"], 2), n=count, at_least=least))
    worst = sorted(files, key=lambda name: files[name]["lines_reached"] - files[name]["lines"])
    common.table(
        [[name, files[name]["lines"] - files[name]["lines_reached"]] for name in worst[:40]],
        ["file", "lines missed"],
    )
    found = {"benchmark": "covered", "layers": layers, "hardware": hardware()}
    common.finish(found, required, here, options)


if __name__ == "__main__":
    main()
