"""Measure bundles on a device: this machine or a board, with the same verbs.

    with open_measurer(name, device) as measurer:
        measurer.prepare(bundles, evaluation, "bench")
        report = measurer.bench(bundle, load)

`validate`, `bench`, `selftest` and `preflight` below do the whole of a command: they choose the
bundles that the device can run, measure each, and keep the reports with the run (reports/store.py).
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

from edgeclip import disk
from edgeclip.boards import preflight as P
from edgeclip.boards.board import Board, Load
from edgeclip.boards.judging import Judge
from edgeclip.boards.selection import Chosen, Selection, choose
from edgeclip.device import machine, power
from edgeclip.device import profile as D
from edgeclip.device.bench import REFUSED, SCENARIOS, Plan, incomplete
from edgeclip.device.bench import bench as bench_here
from edgeclip.device.bench_report import BenchReport, Beside, PreflightRow
from edgeclip.device.beside import beside as beside_here
from edgeclip.device.beside import of_one_student
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import Answers, Pack
from edgeclip.device.conformance import answer as answer_here
from edgeclip.device.evaluation import Evaluation, load_evaluation
from edgeclip.device.machine import Facts
from edgeclip.device.profile import Device, Minimum
from edgeclip.device.records import (
    ParityReport,
    SelftestReport,
)
from edgeclip.device.runtime import engine
from edgeclip.device.selftest import selftest as selftest_here
from edgeclip.device.validate import Observed
from edgeclip.device.validate import observe as observe_here
from edgeclip.errors import EdgeclipError, LinkLost
from edgeclip.reports import store
from edgeclip.reports.engines import validated


@runtime_checkable
class Measurer(Protocol):
    """A device that is ready to be measured: `Here`, or a `Board`."""

    facts: Facts
    """what the device is"""

    def preflight(self, bundles: list[Bundle], evaluation: Evaluation | None) -> list[PreflightRow]:
        """Return the checks of the device's state as of now."""

    def prepare(
        self, bundles: list[Bundle], evaluation: Evaluation | None, verb: str
    ) -> list[PreflightRow]:
        """Make ready for `verb`; raise `EdgeclipError` when the device is not fit for it.

        verb: "validate", "bench", "selftest" or "conformance". Returns the preflight's rows; []
        where none ran.
        """

    def observe(self, bundle: Bundle, evaluation: Evaluation | None) -> Observed:
        """Return the device's features and answers, which the host judges."""

    def bench(self, bundle: Bundle, load: Load) -> BenchReport:
        """Return the bench report."""

    def beside(self, bundles: list[Bundle]) -> Beside:
        """Return the times of several bundles turn by turn, against the first one's."""

    def selftest(self, bundle: Bundle) -> SelftestReport:
        """Return the self-test's report."""

    def answer(self, bundle: Bundle, pack: Pack) -> Answers:
        """Return what the device makes of a conformance pack."""


class Here:
    """This machine, measured as `device`."""

    def __init__(self, name: str, device: Device):
        self.name = name
        self.device = device
        self.facts = machine.facts()
        self.evaluation: Evaluation | None = None

    def preflight(self, bundles: list[Bundle], evaluation: Evaluation | None) -> list[PreflightRow]:
        self.facts = machine.facts()
        names = engine.names(b.manifest for b in bundles)
        kept = engine.folder()
        needs = P.Needs(
            mib=0.0,
            engines=bool(names),
            builds=not all((kept / n).exists() for n in names),
        )
        state = machine.state(str(Path.cwd()))
        return P.preflight(self.device, self.facts, state, needs, time.time())

    def prepare(
        self, bundles: list[Bundle], evaluation: Evaluation | None, verb: str
    ) -> list[PreflightRow]:
        """Check this machine; nothing has to be copied.

        A self-test judges the machine itself, and parity does not depend on clocks or load, so
        only `bench` runs the preflight.
        """
        self.evaluation = evaluation
        if verb == "selftest":
            return []
        self.facts = D.require_here(self.name, self.device)
        if verb != "bench":
            return []
        rows = self.preflight(bundles, evaluation)
        P.require(self.name, rows)
        return rows

    def observe(self, bundle: Bundle, evaluation: Evaluation | None) -> Observed:
        return observe_here(bundle, evaluation)

    def bench(self, bundle: Bundle, load: Load) -> BenchReport:
        return bench_here(bundle, self.device, self.facts, self._images(), Plan(*load))

    def beside(self, bundles: list[Bundle]) -> Beside:
        return beside_here(bundles, self._images())

    def _images(self) -> Path | None:
        return None if self.evaluation is None else self.evaluation.folder

    def selftest(self, bundle: Bundle) -> SelftestReport:
        return selftest_here(bundle, self.device)

    def answer(self, bundle: Bundle, pack: Pack) -> Answers:
        return answer_here(bundle, pack)


@contextlib.contextmanager
def open_measurer(name: str, device: Device, clean: bool = False) -> Iterator[Measurer]:
    """Yield a measurer of the device: `Here`, pinned to its processors, or an open `Board`.

    clean: at the end everything that edgeclip left on the board is removed, after a failure too.
    """
    if not D.is_remote(device):
        with D.pinned(device):
            yield Here(name, device)
        return

    with Board(name, device) as board:
        try:
            yield board
        except Exception:
            if clean:
                with contextlib.suppress(EdgeclipError):  # the first failure is what the user sees
                    board.clean()
            raise
        if clean:
            board.clean()


# --- what is measured


def _evaluation(run: Path | None, images: int | None = None) -> Evaluation | None:
    if run is None:
        return None
    return load_evaluation(run / "evaluation", images)


def _minimum(chosen: Chosen) -> Minimum:
    """Return the recipe's shorter run, where the run has one; else the device profile's."""
    if chosen.run is None or not (chosen.run / "recipe.json").exists():
        return chosen.device.bench
    short = disk.read_json(chosen.run / "recipe.json").get("bench")
    if short is None:
        return chosen.device.bench
    return Minimum(**short)


# --- the commands


def validate(selection: Selection, images: int | None = None) -> list[ParityReport]:
    """Return the parity report of each bundle, and keep it with the run.

    images: validate on a fixed random subset of so many; None: on all.
    """
    with choose(selection) as chosen:
        return _validate(chosen, selection.clean, images)


def _validate(chosen: Chosen, clean: bool, images: int | None) -> list[ParityReport]:
    store.refuse_unfit(chosen.run, chosen.bundles, chosen.name, "validate")
    evaluation = _evaluation(chosen.run, images)
    reports = []
    with open_measurer(chosen.name, chosen.device, clean) as measurer:
        measurer.prepare(chosen.bundles, evaluation, "validate")
        judge = Judge(chosen.run, chosen.device, evaluation)
        for bundle in chosen.bundles:
            found = judge.judged(bundle, measurer.observe(bundle, evaluation), measurer.facts)
            reports.append(store.write(found.report, chosen.name, chosen.run, bundle, found.unseen))
    return reports


class Benched(NamedTuple):
    """The reports of one device, in the order of its bundles."""

    reports: list[BenchReport]
    parities: list[ParityReport | None]
    """the parity report that counts for each; None: not validated there"""
    beside: list[Beside]
    """the bundles turn by turn, one; none: fewer than two of one student, or not asked"""


def bench(
    selection: Selection,
    scenarios: tuple[str, ...] = SCENARIOS,
    minutes: float = 0.0,
    meter_csv: Path | None = None,
) -> Benched:
    """Benchmark each bundle, and keep its report with the run.

    minutes: of sustained load besides. meter_csv: a power meter's file, in place of the rails.
    """
    if meter_csv is not None:
        power.meter(meter_csv)  # is it readable? before hours of measurement
    with choose(selection) as chosen:
        load = Load(_minimum(chosen), scenarios, minutes, meter_csv)
        return _bench(chosen, selection.clean, load)


def _bench(chosen: Chosen, clean: bool, load: Load) -> Benched:
    store.refuse_unfit(chosen.run, chosen.bundles, chosen.name, "bench")
    evaluation = _evaluation(chosen.run)
    out = Benched([], [], [])
    with open_measurer(chosen.name, chosen.device, clean) as measurer:
        rows = measurer.prepare(chosen.bundles, evaluation, "bench")
        for bundle in chosen.bundles:
            report = _bench_one(measurer, chosen, bundle, load)
            report = msgspec.structs.replace(report, preflight=rows)
            parity = _parity(measurer, chosen, bundle, evaluation, report)
            if report.ran.engine is not None and parity is not None and parity.verdict == "fails":
                of_engine = [f"parity of this engine: {f}" for f in parity.failures]
                failures = [*report.failures, *of_engine]
                report = msgspec.structs.replace(report, failures=failures, verdict="fails")
            out.reports.append(store.write(report, chosen.name, chosen.run, bundle))
            out.parities.append(parity)
        together = of_one_student(chosen.bundles)
        timed = all(REFUSED not in report.failures for report in out.reports)
        if len(together) > 1 and timed and "whole_image" in load.scenarios:
            found = measurer.beside(together)
            out.beside.append(store.write_beside(found, chosen.name, chosen.run))
    return out


def _bench_one(measurer: Measurer, chosen: Chosen, bundle: Bundle, load: Load) -> BenchReport:
    """One bundle's bench report, joined with what an earlier one of it measured.

    When the link breaks, a report that says so is kept, unless there is a whole one already.
    """
    earlier = store.read(chosen.run, bundle, chosen.name, BenchReport)
    try:
        report = measurer.bench(bundle, load)
    except LinkLost as e:
        if earlier is None or earlier.incomplete is not None:
            broken = incomplete(bundle, measurer.facts, load.minimum, str(e))
            store.write(broken, chosen.name, chosen.run, bundle)
        raise
    if earlier is None:
        return report
    return store.joined(report, earlier, chosen.device)


def _parity(
    measurer: Measurer,
    chosen: Chosen,
    bundle: Bundle,
    evaluation: Evaluation | None,
    report: BenchReport,
) -> ParityReport | None:
    """Return the parity report that counts for a benchmark.

    An engine is built on the device, so its benchmark counts only once it is known to answer right:
    where the very engine that ran was not validated yet, it is validated now.
    """
    parity = store.read(chosen.run, bundle, chosen.name, ParityReport)
    if report.ran.engine is None or validated(parity, report):
        return parity
    observed = measurer.observe(bundle, evaluation)
    judge = Judge(chosen.run, chosen.device, evaluation)
    fresh = judge.judged(bundle, observed, measurer.facts)
    return store.write(fresh.report, chosen.name, chosen.run, bundle, fresh.unseen)


def selftest(selection: Selection) -> list[SelftestReport]:
    """Return the self-test's report of each bundle."""
    with (
        choose(selection) as chosen,
        open_measurer(chosen.name, chosen.device, selection.clean) as measurer,
    ):
        measurer.prepare(chosen.bundles, None, "selftest")
        return [measurer.selftest(bundle) for bundle in chosen.bundles]


class Answered(NamedTuple):
    """What a device made of a conformance pack."""

    name: str
    """the device's"""
    machine: Facts
    answers: Answers


def answer(selection: Selection, pack: Pack) -> Answered:
    """Return what the selected bundle's preprocess and tokenizer make of a pack on a device."""
    with (
        choose(selection) as chosen,
        open_measurer(chosen.name, chosen.device, selection.clean) as measurer,
    ):
        (bundle,) = chosen.bundles
        measurer.prepare(chosen.bundles, None, "conformance")
        return Answered(chosen.name, measurer.facts, measurer.answer(bundle, pack))


class Preflight(NamedTuple):
    """The state of a device, without any bundle."""

    name: str
    remote: bool
    facts: Facts
    rows: list[PreflightRow]


def preflight(name: str, clean: bool = False) -> Preflight:
    """Look whether a device is reached, is the one of the profile, and is fit to be measured."""
    name, device = D.load(name)
    with open_measurer(name, device, clean) as measurer:
        rows = measurer.preflight([], None)
        return Preflight(name, D.is_remote(device), measurer.facts, rows)
