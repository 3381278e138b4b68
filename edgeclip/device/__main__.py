"""`python -m edgeclip.device`: what runs on the board for a verb of the host.

One JSON request comes on standard input; the answer, one marked line of JSON and the arrays as .npz behind it, goes to
standard output. Whatever a library prints goes to standard error, which the host shows.
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
from edgeclip.errors import EdgeclipError

MARK = b"edgeclip-reply "


def validate(work: dict[str, Any], device: Device) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from edgeclip.device.validate import load_evaluation, observe

    evaluation = (
        load_evaluation(Path(work["evaluation"]), work["images"]) if work["evaluation"] else None
    )
    facts, arrays = observe(_bundle(work, device), evaluation)
    return facts, arrays


def bench(work: dict[str, Any], device: Device) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from edgeclip.device.bench import bench as measure

    evaluation = Path(work["evaluation"]) if work["evaluation"] else None
    how = {
        "scenarios": tuple(work["scenarios"]),
        "minutes": work["minutes"],
        "python": tuple(work["python"]),
        "metered": work.get("metered", False),
    }
    return measure(
        _bundle(work, device),
        device,
        machine.facts(),
        evaluation,
        Minimum(**work["minimum"]),
        **how,
    ), {}


def selftest(work: dict[str, Any], device: Device) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from edgeclip.device.selftest import selftest as examine

    return examine(_bundle(work, device), device), {}


VERBS = {"validate": validate, "bench": bench, "selftest": selftest}


def _bundle(work: dict[str, Any], device: Device) -> Bundle:
    return Bundle.load(
        Path(work["bundle"]), threads=device.threads, check=True, providers=device.providers
    )


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work = json.load(sys.stdin)
    payload = io.BytesIO()
    arrays: dict[str, Any]
    try:
        device = msgspec.convert(work["device"], Device)
        with pinned(device):
            answer, arrays = VERBS[work["verb"]](work, device)
        np.savez(payload, allow_pickle=False, **arrays)
    except EdgeclipError as e:
        answer = {"error": str(e)}
    out.write(
        b"\n"
        + MARK
        + json.dumps({**answer, "bytes": len(payload.getvalue())}).encode()
        + b"\n"
        + payload.getvalue()
    )
    out.flush()


if __name__ == "__main__":
    main()
