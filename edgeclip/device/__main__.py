"""`python -m edgeclip.device`: what runs on the board for a verb of the host.

One JSON request comes on standard input; the answer, one marked line of JSON and the arrays as .npz
behind it, goes to standard output. Whatever a library prints goes to standard error, which the host
shows.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeclip.device import machine
from edgeclip.device.bundle import Bundle
from edgeclip.device.profile import Device, Minimum, pinned
from edgeclip.device.records import Record, to_json
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.text_file.parser import parse_json

MARK = b"edgeclip-reply "
Answer = tuple[Json, dict[str, np.ndarray]]


class Work(Record):
    """A request of the host."""

    verb: str
    """one of VERBS"""
    id: str
    """the answer repeats it: an answer to another question is none"""
    device: Device
    bundle: str
    """its folder on the board"""
    python: tuple[str, ...]
    """what starts a fresh process on the board"""
    evaluation: str | None = None
    """the run's evaluation folder on the board"""
    images: int | None = None
    """of validate: how many of the evaluation images; null: all"""
    minimum: Minimum = Minimum()
    """of bench; so below"""
    scenarios: tuple[str, ...] = ()
    minutes: float = 0.0
    metered: bool = False
    beside: tuple[str, ...] = ()
    """of beside: the other bundles' folders on the board"""
    pack: str | None = None
    """of conformance: the pack's folder on the board"""


def validate(work: Work, bundle: Bundle) -> Answer:
    """Run the bundle; the host judges."""
    from edgeclip.device.evaluation import load_evaluation
    from edgeclip.device.validate import observe, to_answer

    evaluation = None
    if work.evaluation is not None:
        evaluation = load_evaluation(Path(work.evaluation), work.images)
    observed = observe(bundle, evaluation)
    return to_answer(observed), observed.arrays


def bench(work: Work, bundle: Bundle) -> Answer:
    """Measure the bundle."""
    from edgeclip.device.bench import Plan
    from edgeclip.device.bench import bench as measure

    images = None
    if work.evaluation is not None:
        images = Path(work.evaluation)
    plan = Plan(
        work.minimum, work.scenarios, work.minutes, metered=work.metered, python=work.python
    )
    return to_json(measure(bundle, work.device, machine.facts(), images, plan)), {}


def beside(work: Work, bundle: Bundle) -> Answer:
    """Time the bundles turn by turn."""
    from edgeclip.device.beside import beside as measure

    device = work.device
    others = [
        Bundle.load(folder, threads=device.threads, check=True, providers=device.providers)
        for folder in work.beside
    ]
    images = None if work.evaluation is None else Path(work.evaluation)
    return to_json(measure([bundle, *others], images)), {}


def selftest(work: Work, bundle: Bundle) -> Answer:
    """Try the machine."""
    from edgeclip.device.selftest import selftest as examine

    return to_json(examine(bundle, work.device)), {}


def conformance(work: Work, bundle: Bundle) -> Answer:
    """Answer the golden images and strings; the host compares."""
    from edgeclip.device.conformance import answer, load_pack, to_link

    assert work.pack is not None  # the host names it with this verb
    answers = answer(bundle, load_pack(Path(work.pack), answered=False))
    return to_link(answers), answers.images


VERBS = {
    "validate": validate,
    "bench": bench,
    "beside": beside,
    "selftest": selftest,
    "conformance": conformance,
}


def main() -> None:
    """Answer the one request on standard input."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    payload = io.BytesIO()
    arrays: dict[str, Any]
    asked = ""
    try:
        work = msgspec.convert(parse_json(sys.stdin.buffer.read(), "the request"), Work)
        asked = work.id
        device = work.device
        with pinned(device):
            bundle = Bundle.load(
                work.bundle, threads=device.threads, check=True, providers=device.providers
            )
            answer, arrays = VERBS[work.verb](work, bundle)
        if arrays:
            np.savez(payload, allow_pickle=False, **arrays)
    except EdgeclipError as e:
        answer = {"error": str(e)}
    body = payload.getvalue()
    line = json.dumps({**answer, "id": asked, "bytes": len(body)}).encode()
    out.write(b"\n" + MARK + line + b"\n" + body)
    out.flush()


if __name__ == "__main__":
    main()
