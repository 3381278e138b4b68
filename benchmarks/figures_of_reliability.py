"""Render the tables of docs/reliability.md: kills, two at once, damage, fuzzing, long runs."""

from typing import Any

from compare import Interval
from figure_cells import markdown

FAULTS = ("lost", "stuck", "wrong", "left")


def crash(found: dict[str, Any]) -> str:
    """Render benchmarks/crash.py: a row for each command that writes."""
    rows = []
    absent = []
    for row in found["stages"]:
        if "missing" in row:
            absent.append([f"`{row['stage']}`", row["missing"], *[""] * 6])
            continue
        counts = [row[name] for name in ("sites", "points", "killed", *FAULTS)]
        rows.append([f"`{row['stage']}`", *counts])
    total = [sum(row[i] for row in rows) for i in range(1, 8)]
    head = ["command", "places that write", "kills asked", "killed"]
    return markdown(
        [*head, "lost", "stuck", "wrong", "left behind"], [*rows, *absent, ["all", *total]]
    )


def pairs(found: dict[str, Any]) -> str:
    """Render benchmarks/pairs.py: a row for each command, beside every other one that shares."""
    names = ("runs", "refused", "wrong", "left", "traceback", "stuck")
    rows: dict[tuple[str, str], list[Any]] = {}
    for row in found["pairs"]:
        sums = rows.setdefault((row["shared"], row["first"]), [0] * (1 + len(names)))
        for i, count in enumerate([1, *(row[name] for name in names)]):
            sums[i] += count
    total = [sum(row[i] for row in rows.values()) for i in range(1 + len(names))]
    shown = [[shared, f"`{first}`", *row] for (shared, first), row in rows.items()]
    head = ["one", "the first command", "second ones", "times at once", "refused by name"]
    return markdown(
        [*head, "wrong", "left behind", "traceback", "stuck"], [*shown, ["", "all", *total]]
    )


def damage(found: dict[str, Any]) -> str:
    """Render benchmarks/damage.py: a row for each command that reads."""
    names = ("files", "refused", "without effect", "wrong", "traceback")
    rows = [[row["command"], *(row[name] for name in names)] for row in found["commands"]]
    total = [sum(row[i] for row in rows) for i in range(1, 6)]
    return markdown(
        ["command", "files", "refused by name", "without effect", "another number", "traceback"],
        [*rows, ["all", *total]],
    )


def fuzz(found: dict[str, Any]) -> str:
    """Render benchmarks/fuzz.py: a row for each kind of file."""
    rows = []
    for name, row in found["targets"].items():
        executions = f"{row['executions']:,}"
        rows.append([name, executions, len(row["findings"]), round(row["seconds"])])
    return markdown(["file", "executions", "findings", "seconds"], rows)


def leaks(found: dict[str, Any]) -> str:
    """Render benchmarks/leaks.py: a row for each loop, and for each runtime that was missing."""
    rows = []
    for name, row in found["loops"].items():
        memory = [f"{row['mib']:.0f}", f"{row['growth_mib']:.2f}"]
        slope = str(Interval(**row["bytes_a_round"]))
        counts = [row["more_files"], row["more_threads"]]
        rows.append([name, f"{row['rounds']:,}", *memory, slope, *counts])
    for runtime in found["not_installed"]:
        rows.append([f"{runtime}: not installed", *[""] * 6])
    head = ["loop", "rounds", "MiB", "grown by, MiB", "bytes a round (95 %)"]
    return markdown([*head, "more open files", "more threads"], rows)


def covered(found: dict[str, Any]) -> str:
    """Render benchmarks/covered.py: a row for each layer."""
    rows = []
    for name, row in found["layers"].items():
        lines = f"{row['lines_reached']:,} of {row['lines']:,}"
        branches = f"{row['branches_reached']:,} of {row['branches']:,}"
        rows.append([name, row["files"], lines, branches, f"{row['percent']:.1f}"])
    return markdown(["", "files", "lines reached", "branches reached", "%"], rows)


def hardware(found: dict[str, Any]) -> str:
    """Render benchmarks/covered.py: what was left out, for the hardware it needs."""
    rows = [[f"`{r['file']}:{r['line']}`", f"`{r['what']}`", r["needs"]] for r in found["hardware"]]
    return markdown(["where", "what it begins", "needs"], rows)


OF_RELIABILITY = {
    "crash": crash,
    "pairs": pairs,
    "damage": damage,
    "fuzz": fuzz,
    "leaks": leaks,
    "covered": covered,
    "hardware": hardware,
}
