"""Where a run's reports lie, and which one of them counts.

    RUN/reports/<bundle folder>.<device>.parity.json    `edgeclip validate`
    RUN/reports/<bundle folder>.<device>.bench.json     `edgeclip bench`
    RUN/reports/<bundle folder>.<device>.engines.json   TensorRT engines seen there (engines.py)

A report counts for the bundle that it was made with, by the hash of the bundle's manifest: after
a new export it has to be made again.
"""

import datetime
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeclip import disk
from edgeclip.device.bench import SCENARIOS, over_budget
from edgeclip.device.bundle import Bundle
from edgeclip.device.profile import Device
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say
from edgeclip.reports import engines

DEFAULT_RUN = Path("runs/latest")
GATE_FAILED = 3
"""exit code: a gate failed"""
TOO_FEW = 4
"""exit code: no gate failed, but there are too few images to tell"""


# --- which run, which bundle


def latest_run(run: Path | None) -> Path:
    """Return the run's folder, resolved; None means the latest.

    Raises `EdgeclipError` when there is no such run.
    """
    run = run or DEFAULT_RUN
    if not run.exists():
        do = "name one with --run, or make one with: edgeclip distill RECIPE"
        raise EdgeclipError(run, "there is no such run", do)
    if run.is_symlink():
        say(f"run: {run.resolve()}")
    return run.resolve()


def one_bundle(bundle: Path | None) -> Path:
    """Return the bundle's folder; None means the latest run's best one for this machine's CPU.

    int8 of this processor comes before fp32, ONNX Runtime before OpenVINO. Raises `EdgeclipError`
    when the latest run has none of them.
    """
    if bundle is not None:
        return bundle

    run = latest_run(None)
    int8 = "onnx-int8"
    if platform.machine() == "aarch64":
        int8 = "onnx-int8-arm"
    for name in (int8, "onnx-fp32", "openvino-int8"):
        folder = run / "bundles" / name
        if folder.is_dir():
            say(f"bundle: {folder}")
            return folder
    do = "name one with --bundle, or make one with: edgeclip export --target onnx-int8"
    raise EdgeclipError(run, "has no bundle that classifies on this machine", do)


# --- read and write


def path(run: Path, bundle: Bundle, device: str, kind: str) -> Path:
    """Return where a report lies: by the bundle's folder, since two bundles may share a target."""
    return run / "reports" / f"{bundle.folder.resolve().name}.{device}.{kind}.json"


def read(run: Path | None, bundle: Bundle, device: str, kind: str) -> dict[str, Any] | None:
    """Return the report that counts for this bundle; None where there is none.

    kind: "parity" or "bench".
    """
    if run is None:
        return None
    file = path(run, bundle, device, kind)
    if not file.exists():
        return None
    report: dict[str, Any] = disk.read_json(file)
    if report["bundle"] != disk.sha256(bundle.folder / disk.MANIFEST):
        return None
    return report


def write(report: dict[str, Any], device: str, run: Path | None, bundle: Bundle) -> dict[str, Any]:
    """Write a report of `device` beside its run, and return it with the device's name in it.

    A bundle without a run (run=None) has no place for reports: then nothing is written. A parity
    report also enters the history of engines.
    """
    report = {"device": device, **report}
    if run is None:
        return report
    if report["kind"] == "parity":
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        line = engines.remember(path(run, bundle, device, "engines"), report, now)
        if line:
            say(line)
    disk.write_json(path(run, bundle, device, report["kind"]), report)
    return report


# --- what a report says


def joined(report: dict[str, Any], earlier: dict[str, Any], device: Device) -> dict[str, Any]:
    """Return `report` with what it did not measure and an earlier one did; `kept` names that.

    Only of the same bundle, machine, runtime and minimum; otherwise `report` is returned as it is.
    """
    if _conditions(report) != _conditions(earlier):
        return report

    kept = []
    for key in (*SCENARIOS, "sustained", "energy"):
        if report[key] is None and earlier.get(key) is not None:
            kept.append(key)
    whole = {**report, **{key: earlier[key] for key in kept}, "kept": kept}
    whole["energy_mj_per_image"] = (whole["energy"] or {}).get("mj_per_image")

    own_budget = over_budget(report, device)
    others = [f for f in report["failures"] if f not in own_budget]
    whole["failures"] = others + over_budget(whole, device)
    return whole


def _conditions(report: dict[str, Any]) -> list[Any]:
    machine = {k: v for k, v in report["machine"].items() if k != "temperature_c"}
    keys = ("bundle", "ran", "min_duration_s", "min_query_count")
    return [machine, *(report[key] for key in keys)]


def exit_code(reports: Iterable[dict[str, Any]]) -> int:
    """Return the exit code of a gate: 0 all passed, 3 one failed, 4 too few images to tell.

    Reads parity, bench and self-test reports. A failure outranks "too few images".
    """
    code = 0
    for report in reports:
        if _failed(report):
            return GATE_FAILED
        if report.get("verdict") == "too few images":
            code = TOO_FEW
    return code


def _failed(report: dict[str, Any]) -> bool:
    if report["kind"] == "selftest":
        return any(step["status"] == "fail" for step in report["steps"])
    return bool(report["failures"]) or report.get("verdict") == "fail"
