"""`edgeclip selftest`: try on your machine what a machine without a GPU or a board could not try.

Each step stands alone: it passes, fails with its reason, or cannot be tried here. The report is
made to be attached to an issue: what the machine is, versions, every step's outcome; no image, no
path outside the bundle, no name of a user.
"""

import os
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeclip import __version__, disk
from edgeclip.device import machine, power
from edgeclip.device import records as R
from edgeclip.device.bench_report import Latency
from edgeclip.device.bundle import Bundle
from edgeclip.device.load import run_scenario, summary
from edgeclip.device.preprocess import normalize
from edgeclip.device.profile import Device, differences
from edgeclip.device.validate import judge, observe
from edgeclip.errors import EdgeclipError

QUERIES = 200
BATCHES = (1, 3, 8, 11)
ALIKE = 0.999
"""cosine of one image's features in batches of different sizes"""


class StepFailed(Exception):
    """What a step found is not as it should be."""


def selftest(bundle: Bundle, device: Device) -> R.SelftestReport:
    """Try everything that this machine has, and return the report."""
    facts = machine.facts()
    steps: list[R.SelftestStep] = []

    def step(name: str, work: Callable[[], Any]) -> None:
        steps.append(_try(name, work, bundle.folder))

    step("this is the device", lambda: _device(device, facts))
    step("open the image encoder (TensorRT: build the engine)", lambda: bundle.image_encoder.facts)
    if steps[-1].status == "pass":
        step("open it again (TensorRT: take the kept engine)", lambda: _open_again(bundle))
        step("golden images and texts", lambda: _golden(bundle, facts))
        step("one image in batches of 1, 3, 8 and 11", lambda: _batches(bundle))
        step(f"{QUERIES} queries", lambda: _queries(bundle))
    step("power rails", lambda: _power(device))
    step("temperature", machine.temperature_c)
    step("throttling counters", machine.throttled)
    return R.SelftestReport(
        edgeclip=__version__,
        machine=facts,
        state=machine.state(str(bundle.folder)),
        target=bundle.manifest.target,
        bundle=disk.sha256(bundle.folder / disk.MANIFEST),
        steps=steps,
    )


def _try(name: str, work: Callable[[], Any], folder: Path) -> R.SelftestStep:
    """Run one step. What it returns is its detail; None: it is not possible here."""
    start = time.perf_counter()
    try:
        detail = R.to_json(work())
    except (EdgeclipError, StepFailed) as e:
        return _failed(name, str(e), folder, start)
    except Exception as e:  # a defect of ours is what this is meant to find
        what = "".join(traceback.format_exception_only(e)).strip()
        return _failed(name, what + traceback.format_exc()[-800:], folder, start)
    seconds = time.perf_counter() - start
    if detail is None:
        return R.SelftestStep(step=name, status="not possible here", seconds=seconds)
    return R.SelftestStep(step=name, status="pass", detail=detail, seconds=seconds)


def _failed(name: str, reason: str, folder: Path, start: float) -> R.SelftestStep:
    seconds = time.perf_counter() - start
    detail = without_paths(reason, folder)
    return R.SelftestStep(step=name, status="fail", detail=detail, seconds=seconds)


def without_paths(text: str, bundle: Path) -> str:
    """Return the text with the names of files, but not of the folders that they lie in."""
    home = os.environ.get("HOME", "~")
    folders = {str(bundle), str(bundle.resolve()), home}
    for folder in sorted(folders, key=len, reverse=True):
        name = "~" if folder == home else bundle.name
        text = text.replace(folder, name)
    return re.sub(r"(?<![\w.:/])[~/](?:[^\s/'\",;()]*/)+", "", text)


# --- the steps


def _device(device: Device, facts: machine.Facts) -> str:
    wrong = differences(device, facts)
    if wrong:
        raise StepFailed("; ".join(wrong))
    return facts.device_tree_model or facts.cpu or facts.arch


def _open_again(bundle: Bundle) -> str:
    opened = bundle.image_encoder.facts
    again = bundle.open_image_encoder().facts
    if again != opened:
        raise StepFailed(f"{again} instead of {opened}")
    return "equal facts"


def _golden(bundle: Bundle, facts: machine.Facts) -> R.GoldenAnswers:
    report = judge(bundle, None, observe(bundle, None), facts)
    if report.failures:
        raise StepFailed("; ".join(report.failures))
    return report.golden


def _golden_input(bundle: Bundle) -> np.ndarray:
    """Return the golden images as the encoder's input, float32 [G, 3, H, W]."""
    return normalize(bundle.golden_pixels(), bundle.preprocess)


def _batches(bundle: Bundle) -> dict[str, float]:
    """Return for each batch size the lowest cosine with the same image encoded alone."""
    x = _golden_input(bundle)
    encode = bundle.image_encoder.run
    alone = np.concatenate([encode(row[None]) for row in x])
    lowest = {}
    for size in BATCHES:
        index = np.arange(size) % len(x)
        similarity = (encode(x[index]) * alone[index]).sum(axis=1)
        lowest[str(size)] = float(similarity.min())
    if not all(value >= ALIKE for value in lowest.values()):
        raise StepFailed(f"one image has other features in another batch: cosine {lowest}")
    return lowest


def _queries(bundle: Bundle) -> Latency:
    samples = [_golden_input(bundle)[:1]]
    return summary(run_scenario(bundle.image_encoder.run, samples, 0.0, QUERIES))


def _power(device: Device) -> str | None:
    source = power.find(device.rails)
    if source is None:
        return None
    with power.Sampler(source) as sampler:
        time.sleep(1)
    watts = [sample.watts for sample in sampler.samples]
    if not watts:
        raise StepFailed(f"{source.name}: nothing could be read")
    return f"{source.name}: {min(watts):.2f} to {max(watts):.2f} W over a second"


def write(report: R.SelftestReport, device: str, folder: Path) -> Path:
    """Write the report of a device into `folder`; return its path."""
    path = folder / f"selftest-{device}-{report.target.name}.json"
    disk.write_record(path, msgspec.structs.replace(report, device=device))
    return path
