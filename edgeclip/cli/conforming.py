"""The work of `edgeclip conformance`: the host's pack, the device's answers, the report."""

from pathlib import Path
from typing import NamedTuple

from edgeclip import disk
from edgeclip.boards import measure
from edgeclip.boards.selection import Selection, run_of
from edgeclip.device import profile
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import ANSWERS, Answers, Pack, read_answers, write_answers
from edgeclip.host.evaluation.conformance import pack_for
from edgeclip.progress import say
from edgeclip.reports.conformance import By, judge, write
from edgeclip.reports.conformance_report import ConformanceReport


class Request(NamedTuple):
    bundle: Path
    device: str
    """answers, where `answers` is None"""
    pack: Path | None
    """None: in the user's cache"""
    answers: Path | None
    """another implementation's; None: ask the device"""
    keep: Path | None
    """where the device's answers are written; None: nowhere"""
    clean: bool
    """remove afterwards what edgeclip left on the board"""


def run(request: Request) -> ConformanceReport:
    """Return the report, which is also kept with the bundle's run.

    Raises `EdgeclipError` for what is no bundle, a pack for another one, and damaged answers.
    """
    if request.keep is not None:
        disk.refuse_foreign(request.keep, ANSWERS)  # before the work, not after it
    if request.pack is not None:
        disk.refuse_unwritable(request.pack.parent)
    profile.load(request.device)
    with disk.reading(request.bundle):
        return _run(request)


def _run(request: Request) -> ConformanceReport:
    bundle = Bundle.load(request.bundle, check=True)
    pack = pack_for(bundle, request.pack)
    answers, by = _answers(request, pack)
    report = judge(bundle, pack, answers, by)
    beside = run_of(request.bundle)
    if beside is not None:
        say(f"report: {write(report, beside, bundle)}")
    return report


def _answers(request: Request, pack: Pack) -> tuple[Answers, By]:
    if request.answers is not None:
        return read_answers(request.answers, pack), By(answers=str(request.answers))
    selection = Selection(request.device, bundle=request.bundle, clean=request.clean)
    answered = measure.answer(selection, pack)
    if request.keep is not None:
        write_answers(request.keep, answered.answers)
    return answered.answers, By(device=answered.name, machine=answered.machine)
