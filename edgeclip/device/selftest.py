"""`edgeclip selftest`: everything that a machine without a GPU or a board could not try, tried on yours, in one file.

Each step stands alone: it passes, fails with its reason, or cannot be tried here. The report is made to be attached to an
issue: what the machine is, versions, every step's outcome; no image, no path outside the bundle, no name of a user.
"""

import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip import __version__, disk
from edgeclip.device import energy, machine
from edgeclip.device.bench import run_scenario, summary
from edgeclip.device.bundle import Bundle
from edgeclip.device.preprocess import normalize
from edgeclip.device.profile import Device, differences
from edgeclip.device.records import to_json
from edgeclip.device.validate import judge, observe
from edgeclip.errors import EdgeclipError

QUERIES = 200
ALIKE = 0.999
"""cosine of one image's features in batches of different sizes"""


def selftest(bundle: Bundle, device: Device) -> dict[str, Any]:
    """JSON-able: {"edgeclip", "machine", "state", "bundle", "steps": [{"step", "status", "detail", "seconds"}]}."""
    steps: list[dict[str, Any]] = []

    def step(name: str, work: Callable[[], Any]) -> Any:
        start, detail = time.perf_counter(), None
        try:
            detail, status = work(), "pass"
        except (EdgeclipError, AssertionError) as e:
            detail, status = str(e), "fail"
        except Exception as e:  # a defect of ours is what this is meant to find
            detail, status = (
                "".join(traceback.format_exception_only(e)).strip() + traceback.format_exc()[-800:],
                "fail",
            )
        if status == "fail":
            detail = without_paths(str(detail), bundle.folder)
        steps.append(
            {
                "step": name,
                "status": status if detail is not None else "not possible here",
                "detail": detail,
                "seconds": time.perf_counter() - start,
            }
        )
        return detail

    facts = machine.facts()
    step("this is the device", lambda: _is(device, facts))
    opened = step(
        "open the image encoder (TensorRT: build the engine)", lambda: bundle.image_encoder.facts
    )
    if steps[-1]["status"] == "pass":
        step("open it again (TensorRT: take the kept engine)", lambda: _again(bundle, opened))
        step("golden images and texts", lambda: _golden(bundle, facts))
        step("one image in batches of 1, 3, 8 and 11", lambda: _batches(bundle))
        step(
            f"{QUERIES} queries",
            lambda: summary(
                run_scenario(bundle.image_encoder.run, [_golden_input(bundle)[:1]], 0.0, QUERIES)
            ),
        )
    step("power rails", lambda: _power(device))
    step("temperature", machine.temperature_c)
    step("throttling counters", machine.throttled)
    manifest = {
        "target": to_json(bundle.manifest.target),
        "bundle": disk.sha256(bundle.folder / disk.MANIFEST),
    }
    return {
        "kind": "selftest",
        "edgeclip": __version__,
        "machine": facts,
        "state": machine.state(str(bundle.folder)),
        **manifest,
        "steps": steps,
    }


def without_paths(text: str, bundle: Path) -> str:
    """The names of files stay, the folders that they lie in go."""
    for folder in sorted(
        {str(bundle), str(bundle.resolve()), str(Path.home())}, key=len, reverse=True
    ):
        text = text.replace(folder, "~" if folder == str(Path.home()) else bundle.name)
    return re.sub(r"(?<![\w.:/])[~/](?:[^\s/'\",;()]*/)+", "", text)


def _is(device: Device, facts: dict[str, Any]) -> str:
    assert not (wrong := differences(device, facts)), "; ".join(wrong)
    return facts["device_tree_model"] or facts["cpu"] or facts["arch"]


def _again(bundle: Bundle, opened: dict[str, Any]) -> str:
    again = bundle.open_image_encoder().facts
    assert again == opened, f"{again} instead of {opened}"
    return "equal facts"


def _golden(bundle: Bundle, facts: dict[str, Any]) -> dict[str, Any]:
    report = judge(bundle, None, observe(bundle, None), facts)
    assert not report["failures"], "; ".join(report["failures"])
    return report["golden"]


def _golden_input(bundle: Bundle) -> np.ndarray:
    return normalize(np.load(bundle.folder / "golden" / "pixels.npy"), bundle.preprocess)


def _batches(bundle: Bundle) -> dict[str, float]:
    x = _golden_input(bundle)
    alone = np.concatenate([bundle.image_encoder.run(row[None]) for row in x])
    found = {}
    for size in (1, 3, 8, 11):
        index = np.arange(size) % len(x)
        found[str(size)] = float(
            (bundle.image_encoder.run(x[index]) * alone[index]).sum(axis=1).min()
        )
    assert min(found.values()) > ALIKE, str(found)
    return found


def _power(device: Device) -> str | None:
    source = energy.find(device.rails)
    if source is None:
        return None
    with energy.Sampler(source) as sampler:
        time.sleep(1)
    known = [s.watts for s in sampler.samples]
    assert known, f"{source.name}: nothing could be read"
    return f"{source.name}: {min(known):.2f} to {max(known):.2f} W over a second"


def write(report: dict[str, Any], device: str, folder: Path) -> Path:
    path = folder / f"selftest-{device}-{report['target']['name']}.json"
    disk.write_json(path, {"device": device, **report})
    return path
