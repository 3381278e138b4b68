"""What every benchmark shares: its options, its table, and its figures as JSON on the last line and
in a file.

    (nothing)   the whole benchmark: the figures that the pages quote
    --quick     minutes; still judged, and "not resolved" where it has too few rounds
    --smoke     seconds, on tiny data and models: shows that the script runs end to end, and judges nothing

Exit codes: 0; 3 with --check, where a required figure is missed; 77 where something that the
benchmark needs is not installed, with a line that says how to get it.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare
import toy
from tabulate import tabulate

from edgeclip import disk
from edgeclip.device import machine

EXIT_MISSED = 3
EXIT_UNAVAILABLE = 77
WHOLE, QUICK, SMOKE = FORMS = ("whole", "quick", "smoke")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has; `form` is one of FORMS."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--quick",
        action="store_const",
        dest="form",
        const=QUICK,
        help="a short form of the same work: minutes",
    )
    form.add_argument(
        "--smoke",
        action="store_const",
        dest="form",
        const=SMOKE,
        help="seconds: shows that it runs, judges nothing",
    )
    parser.set_defaults(form=WHOLE)
    parser.add_argument(
        "--check", action="store_true", help="exit 3 when a required figure is missed"
    )
    parser.add_argument("--json", type=absolute, metavar="FILE", help="write the figures there too")
    return parser


def absolute(path: str) -> Path:
    """Return the path as seen from here, wherever the working folder is later."""
    return Path(path).resolve()


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Yield a new working folder that is gone afterwards, with the cache that was made in it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="edgeclip-toy-") as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def run_argument(parser: argparse.ArgumentParser) -> None:
    """Add --run: the finished run that is measured; the smoke form makes a toy one where it is not
    given.
    """
    what = "a finished run with its bundles  [default: runs/latest; with --smoke a toy run]"
    parser.add_argument("--run", type=Path, help=what)


@contextlib.contextmanager
def measured_run(
    options: argparse.Namespace, targets: tuple[str, ...], *, validated: bool = False
) -> Iterator[Path]:
    """Yield the folder of the run that is measured: --run, the newest one, or a toy run exported to
    `targets`.

    validated: the toy run is to have its parity reports.
    """
    if options.run or options.form != SMOKE:
        yield (options.run or Path("runs/latest")).resolve()
        return
    with workplace() as folder:
        yield toy.run(folder, targets, validated=validated)


def require(install: str, *, module: str | None = None, program: str | None = None) -> None:
    """Leave with EXIT_UNAVAILABLE where the optional module or program is not installed; `install`
    says how to get it.
    """
    missing = None
    if module and importlib.util.find_spec(module) is None:
        missing = module
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if program and shutil.which(program, path=path) is None:
        missing = program
    if missing:
        print(f"{missing} is not installed: {install}", file=sys.stderr)
        sys.exit(EXIT_UNAVAILABLE)


def require_board() -> None:
    """Leave with EXIT_UNAVAILABLE where a board of edgeclip's own (loopback) cannot be had."""
    require("apt install openssh-server", program="sshd")
    require("pip install 'edgeclip[ssh]'", module="asyncssh")


def this_machine() -> dict[str, Any]:
    """Return what is stated with every figure; the load is that before the work began, other
    people's jobs included.
    """
    here = machine.facts()
    facts = {k: getattr(here, k) for k in ("cpu", "cores", "isa", "os", "python")}
    return facts | {"load_average": round(os.getloadavg()[0], 2)}


def this_process_mib() -> float:
    """Return the peak memory of this program, MiB: no child of it can be seen to take less.

    Not getrusage's, which after an exec still holds the peak of the program that made this process.
    """
    return _status_mib("VmHWM")


def anonymous_mib() -> float:
    """Return this process's anonymous memory now, MiB: what it holds itself, mapped files left
    out.
    """
    return _status_mib("RssAnon")


def threads() -> int:
    """Return how many threads this process has, those of libraries included."""
    return _status("Threads")


def open_files() -> int:
    """Return how many file descriptors this process has open, the one that counts left out."""
    return len(os.listdir("/proc/self/fd")) - 1


def _status_mib(field: str) -> float:
    return _status(field) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}; this needs Linux")


def table(rows: list[list[Any]], headers: list[str]) -> None:
    """Print a table; None reads "not measured"."""
    shown = [["not measured" if cell is None else cell for cell in row] for row in rows]
    print(tabulate(shown, headers, disable_numparse=True), end="\n\n")


def finish(
    figures: dict[str, Any],
    required: list[dict[str, Any]],
    here: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    """Print the required figures and, as the last line, everything as one JSON object; write it to
    --json's file.

    Exits 3 where --check asks for it and a required figure is missed. Raises ValueError for a
    figure that is not finite.
    """
    if options.form == SMOKE:
        required = [r | {"verdict": "not judged"} for r in required]
    _print_required(required)
    isa = ", ".join(here["isa"] or ["unknown"])
    print(
        f"{here['cpu']}, {here['cores']} cores, ISA {isa}; load average before {here['load_average']}"
    )
    if here["load_average"] > 0.5:
        print(
            "other work was running on this machine: absolute times are too long, ratios are what counts"
        )
    if options.form != WHOLE:
        print(f"short form (--{options.form})")
    everything = {**figures, "required": required, "machine": here, "form": options.form}
    last_line = json.dumps(everything, allow_nan=False)
    if options.json:
        disk.write_json(options.json, everything)
    print(last_line)
    if options.check and any(r["verdict"] == "missed" for r in required):
        sys.exit(EXIT_MISSED)


def _print_required(required: list[dict[str, Any]]) -> None:
    rows = []
    for r in required:
        limit = (
            f"at most {r['at_most']:.3g}"
            if r["at_least"] is None
            else f"at least {r['at_least']:.3g}"
        )
        found = compare.Interval(r["found"], r["low"], r["high"], r["n"])
        rows.append([r["what"], str(found), r["n"], limit, r["verdict"]])
    table(rows, ["required", "found (95 % interval)", "n", "limit", "verdict"])
