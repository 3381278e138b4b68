"""Render the tables of docs/reliability.md: kills, damage, fuzzing."""

from typing import Any

from figure_cells import markdown

FAULTS = ("lost", "stuck", "wrong", "left")


def crash(found: dict[str, Any]) -> str:
    """Render benchmarks/crash.py: a row for each command that writes."""
    rows = []
    for row in found["stages"]:
        counts = [row[name] for name in ("sites", "points", "killed", *FAULTS)]
        rows.append([f"`{row['stage']}`", *counts])
    total = [sum(row[i] for row in rows) for i in range(1, 8)]
    head = ["command", "places that write", "kills asked", "killed"]
    return markdown([*head, "lost", "stuck", "wrong", "left behind"], [*rows, ["all", *total]])


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


OF_RELIABILITY = {"crash": crash, "damage": damage, "fuzz": fuzz}
