"""What each TensorRT engine of a bundle was worth, kept beside the reports.

After a JetPack upgrade the history shows whether accuracy moved. SigLIP's has: 71.6 to 68.4 with
the same graph (TensorRT issue 3908).
"""

from pathlib import Path
from typing import Any

from edgeclip import disk


def remember(path: Path, parity: dict[str, Any], when: str) -> str | None:
    """Add a parity report's engine to the history at `path`.

    when: the host's time, ISO 8601. Returns a line when the engine differs from the last one;
    None when it does not, or when the report is not of an engine (nothing is written then).
    """
    ran = parity["ran"]
    if "engine" not in ran:
        return None

    history = []
    if path.exists():
        history = disk.read_json(path)

    entry = {
        "when": when,
        "engine": ran["engine"],
        "conditions": ran["conditions"],
        "layers": ran["layers"],
        "verdict": parity["verdict"],
        "top1": (parity["accuracy"] or {}).get("bundle_top1"),
        "centered_p1": (parity["cosine"] or {}).get("centered_p1"),
    }
    disk.write_json(path, [*history, entry])

    if not history or history[-1]["engine"] == entry["engine"]:
        return None
    return f"{parity['target']}: {_difference(history[-1], entry)}"


def _difference(last: dict[str, Any], new: dict[str, Any]) -> str:
    before = last["conditions"]
    changed = []
    for name, value in new["conditions"].items():
        if before.get(name) != value:
            changed.append(f"{name} {before.get(name)} -> {value}")

    if new["top1"] is None or last["top1"] is None:
        moved = "accuracy not measured"
    else:
        points = 100 * (new["top1"] - last["top1"])
        moved = f"top-1 {last['top1']:.4f} -> {new['top1']:.4f} ({points:+.2f} pp)"
    verdicts = f"{last['verdict']} -> {new['verdict']}"
    return f"a new engine ({', '.join(changed)}): {moved}, {verdicts}"


def validated(parity: dict[str, Any] | None, bench: dict[str, Any]) -> bool:
    """Return whether the parity report is of the engine and bundle that the benchmark ran."""
    if parity is None:
        return False
    same_bundle = parity["bundle"] == bench["bundle"]
    return same_bundle and parity["ran"].get("engine") == bench["ran"].get("engine")
