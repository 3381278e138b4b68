"""A board reached from the host: preflight, validate, bench, selftest, clean.

    with Board(name, device) as board:
        board.prepare(bundles, evaluation)
        report = judge(bundle, evaluation, board.observe(bundle, evaluation), board.facts)

What travels there, by content: the runner (once per version), the bundle's files and, for parity,
the run's evaluation folder (images and the fp32 student's features). What comes back: features and
answers, or a report.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import msgspec

from edgeclip import disk
from edgeclip.boards import answers, loopback, runner
from edgeclip.boards import preflight as P
from edgeclip.boards.link import AGAIN, Link, Message, SshOptions, connect
from edgeclip.device import energy
from edgeclip.device.bench_report import (
    BenchReport,
    Beside,
    EnergyMarks,
    PreflightRow,
)
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import Answers, Pack, from_link
from edgeclip.device.evaluation import Evaluation
from edgeclip.device.profile import Device, Minimum, Reach
from edgeclip.device.records import (
    SelftestReport,
    from_json,
    to_json,
)
from edgeclip.device.rules import judged
from edgeclip.device.runtime import engine
from edgeclip.device.validate import Observed, from_answer
from edgeclip.errors import EdgeclipError, LinkLost
from edgeclip.progress import say

T = TypeVar("T")
MACHINE = Path(__file__).parent.parent / "device" / "machine.py"
ROOM = 1.2
"""times the files' own size, packed and unpacked: whole blocks, and a copy on its way"""
BLOCK = 1 << 18
"""bytes sent at once"""
TRIPS = 5
"""round trips that the board's clock is read in"""


class Load(NamedTuple):
    """What a benchmark measures."""

    minimum: Minimum
    scenarios: tuple[str, ...]
    minutes: float = 0.0
    """of sustained load besides"""
    meter_csv: Path | None = None
    """a power meter's file, written on the host meanwhile; None: the device's own rails"""


class Part(NamedTuple):
    """A file that is not whole on the board yet."""

    digest: str
    """sha256"""
    path: Path
    size: int
    """bytes"""
    have: int
    """bytes that are there already"""


class Board:
    """An open link to one device. Not safe to share between threads."""

    def __init__(
        self,
        name: str,
        device: Device,
        cache: Path | None = None,
        options: SshOptions | None = None,
    ):
        """Describe the board; entering the context opens the link.

        cache: where wheels and the emulated root are kept. options: asyncssh's, in place of the
        user's ssh setup.
        """
        self.name = name
        self.device = device
        self.cache = cache
        self.options = options
        self.folder = device.reach.folder
        self.python = device.reach.python
        self.loop = asyncio.new_event_loop()
        self.exits = contextlib.AsyncExitStack()

    def __enter__(self) -> "Board":
        try:
            self._wait(self._open())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = asyncio.all_tasks(self.loop)  # of a request that was interrupted
        for task in left:
            task.cancel()
        if left:
            self._wait(_ended(left))
        self._wait(self.exits.aclose())
        self.loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def _open(self) -> None:
        reach = self.device.reach
        if reach.sshd:
            await self._open_loopback(reach)
        self.link: Link = await self.exits.enter_async_context(
            connect(self.name, reach, self.options)
        )
        await self._look()

    async def _open_loopback(self, reach: Reach) -> None:
        """Start edgeclip's own sshd, and the emulated processor where the profile has one."""
        if reach.emulate:
            self.python = loopback.emulated_python(self.name, reach, self.cache)
        if self.folder == Reach().folder:
            # it is the user's own machine: two such devices must not share a folder
            self.folder = str((self.cache or disk.cache_folder()) / self.name)
        if self.options is None:
            self.options = await self.exits.enter_async_context(loopback.sshd(self.name))

    def ask(self, op: str, kind: type[T], **request: Any) -> T:
        """Return the agent's answer to one request (agent.py), of type `kind`."""
        answer, _ = self._wait(self.link.ask(op, folder=self.folder, **request))
        return answers.typed(self.name, answer, kind)

    async def _look(self) -> None:
        """Read what the machine is, with the Python that the runner will have."""
        source = MACHINE.read_text(encoding="utf-8")
        answer, _ = await self.link.ask(
            "look", folder=self.folder, source=source, python=list(self.python)
        )
        found = answers.looked(self.name, answer)
        self.folder = found.folder
        self.facts = found.facts
        self.state = found.state
        self.host_time = time.time()

    # --- before

    def preflight(self, bundles: list[Bundle], evaluation: Evaluation | None) -> list[PreflightRow]:
        """Return the checks of the board's state as of now."""
        self._wait(self._look())
        files: list[Path] = []
        for bundle in bundles:
            files += self._files(bundle.folder, bundle.manifest.files).values()
        if evaluation is not None:
            files += self._files(evaluation.folder).values()

        names = engine.names(b.manifest for b in bundles)
        kept = [self.ask("exists", answers.Exists, name=f"engines/{name}").exists for name in names]
        needs = P.Needs(
            mib=ROOM * sum(f.stat().st_size for f in files) / 2**20,
            engines=bool(names),
            builds=not all(kept),
        )
        return P.preflight(self.device, self.facts, self.state, needs, self.host_time)

    def prepare(
        self, bundles: list[Bundle], evaluation: Evaluation | None, verb: str = "bench"
    ) -> list[PreflightRow]:
        """Run the preflight, then copy what is missing on the board, whatever the verb.

        Raises `EdgeclipError` when a check failed.
        """
        rows = self.preflight(bundles, evaluation)
        P.require(self.name, rows)
        self.runner = self._install()
        self.places = {b.folder: self._tree(b.folder, b.manifest.files) for b in bundles}
        self.evaluation = None
        if evaluation is not None:
            self.evaluation = self._tree(evaluation.folder)
        return rows

    def _files(self, folder: Path, listed: dict[str, str] | None = None) -> dict[str, Path]:
        """Name to path of what a folder's manifest lists, and the manifest itself."""
        listed = listed or disk.read_json(folder / disk.MANIFEST)["files"]
        files = {name: folder / name for name in listed}
        files[disk.MANIFEST] = folder / disk.MANIFEST
        return files

    def _tree(self, folder: Path, listed: dict[str, str] | None = None) -> str:
        """Copy a folder to the board; its path there.

        It is named by its manifest, whose hashes name everything in it.
        """
        files = self._files(folder, listed)
        hashes = {name: disk.sha256(path) for name, path in files.items()}
        self.send({hashes[name]: path for name, path in files.items()}, folder.name)
        tree = f"trees/{hashes[disk.MANIFEST][:16]}"
        return self.ask("build", answers.Built, name=tree, files=hashes).path

    def _install(self) -> str:
        """Copy the runner to the board; its name there."""
        wheels = runner.wheels(self.name, self.facts, self.device.packages, self.cache)
        with tempfile.TemporaryDirectory() as temporary:
            own = Path(temporary) / "edgeclip.zip"
            own.write_bytes(runner.device_layer())
            files = {disk.sha256(path): path for path in (*wheels, own)}
            name = f"runner/{runner.key(files)}"
            if not self.ask("exists", answers.Exists, name=name).exists:
                self.send(files, "runner", runner.unpacked(files))
                self.ask("build", answers.Built, name=name, unpack=sorted(files))
        return name

    def send(self, files: dict[str, Path], what: str, unpacked: int = 0) -> int:
        """Copy files {sha256: path} into the board's store; return how many bytes traveled.

        what: their name in messages. unpacked: bytes that unpacking them adds there. Raises
        `EdgeclipError` when the board has no room for them.
        """
        sizes = {digest: path.stat().st_size for digest, path in files.items()}
        found = answers.missing(self.name, self.ask("missing", Any, files=sizes), sizes)
        parts = []
        for digest, have in found.have.items():
            parts.append(Part(digest, files[digest], sizes[digest], have))

        size = sum(part.size - part.have for part in parts)
        need = ROOM * (size + unpacked)
        if need > found.free_bytes:
            free = f"{found.free_bytes / 2**20:.1f} MiB are free"
            what = f"{what} needs {need / 2**20:.1f} MiB on the board, and {free}"
            do = "make room, or remove what edgeclip left with --clean"
            raise EdgeclipError(self.name, what, do)
        if parts:
            say(f"{self.name}: sending {what}, {size / 2**20:.1f} MiB")
            names = [[part.digest, part.size, part.have] for part in parts]
            self._wait(self.link.ask("put", _blocks(parts), folder=self.folder, files=names))
        return size

    # --- the verbs

    def observe(self, bundle: Bundle, evaluation: Evaluation | None) -> Observed:
        """Return the board's features and answers, which the host judges or compares."""
        images = None
        if evaluation is not None:
            images = len(evaluation.chosen)
        declared = answers.of_validate(bundle, evaluation)
        most = answers.size_of(declared)
        facts, payload = self._run("validate", bundle, most, images=images)
        found = from_answer(facts, answers.arrays(self.name, payload, declared), self.name)
        return answers.observed(self.name, found, bundle, evaluation)

    def bench(self, bundle: Bundle, load: Load) -> BenchReport:
        """Return the bench report; a power meter is read by the host, on the host's clock."""
        meter_csv = load.meter_csv
        before = None
        if meter_csv is not None:
            before = self.clock()
        work = {
            "minimum": msgspec.to_builtins(load.minimum),
            "scenarios": load.scenarios,
            "minutes": load.minutes,
            "metered": meter_csv is not None,
        }
        answer, _ = self._run("bench", bundle, **work)
        report = from_json(answer, BenchReport, self.name)
        report = answers.benched(self.name, report, bundle, self.device)
        if meter_csv is None or before is None or report.marks is None:
            return report
        return self._metered(report, report.marks, meter_csv, before)

    def beside(self, bundles: list[Bundle]) -> Beside:
        """Return the times of several bundles turn by turn."""
        first, *others = bundles
        places = [self.places[bundle.folder] for bundle in others]
        answer, _ = self._run("beside", first, beside=places)
        return answers.timed(self.name, from_json(answer, Beside, self.name), bundles)

    def _metered(
        self, report: BenchReport, marks: EnergyMarks, meter_csv: Path, before: tuple[float, float]
    ) -> BenchReport:
        """Return the report with the energy by the host's meter."""
        after = self.clock()
        measured = per_image = None
        unread = []
        try:
            measured = energy.by_the_hosts_meter(meter_csv, marks, before, after)
            per_image = measured.mj_per_image
        except EdgeclipError as e:
            unread = [f"energy not measured: {e}"]
        report = msgspec.structs.replace(
            report, marks=None, energy=measured, energy_mj_per_image=per_image
        )
        return judged(report, self.device, unread)

    def clock(self) -> tuple[float, float]:
        """Return (the board's clock less the host's, half-width), seconds.

        Read in the middle of the quickest of some round trips. The answer was read somewhere within
        the trip, so half of it bounds the error.
        """
        trips = []
        for _ in range(TRIPS):
            start = time.time()
            there = self.ask("clock", answers.Clock).time
            end = time.time()
            trips.append(((end - start) / 2, there - (start + end) / 2))
        half, offset = min(trips)
        return offset, half

    def selftest(self, bundle: Bundle) -> SelftestReport:
        """Return the self-test's report."""
        answer, _ = self._run("selftest", bundle)
        report = from_json(answer, SelftestReport, self.name)
        answers.of_bundle(self.name, report, bundle)
        return msgspec.structs.replace(report, target=bundle.manifest.target)

    def answer(self, bundle: Bundle, pack: Pack) -> Answers:
        """Return what the board makes of a conformance pack, whose reference stays here."""
        place = self._tree(pack.folder, pack.questions)
        declared = answers.of_pack(pack)
        most = answers.size_of(declared)
        answer, payload = self._run("conformance", bundle, most, pack=place)
        said = answers.said(self.name, answer, pack)
        return from_link(to_json(said), answers.arrays(self.name, payload, declared))

    def _run(self, verb: str, bundle: Bundle, most: int = 0, **more: Any) -> tuple[Message, bytes]:
        """Return the runner's answer, and at most `most` bytes of arrays behind it."""
        self._same_boot(verb)
        work = {
            "verb": verb,
            "bundle": self.places[bundle.folder],
            "evaluation": self.evaluation,
            "device": msgspec.to_builtins(self.device),
            **more,
        }
        return self._wait(
            self.link.ask(
                "run",
                most=most,
                minutes=more.get("minutes", 0.0),
                folder=self.folder,
                runner=self.runner,
                python=list(self.python),
                work=work,
            )
        )

    def _same_boot(self, verb: str) -> None:
        before = self.state.boot_id
        self._wait(self._look())
        if self.state.boot_id != before:
            what = f"the board was restarted before '{verb}': its clocks and power mode may differ"
            raise LinkLost(self.name, what, AGAIN)

    def clean(self) -> bool:
        """Remove everything edgeclip left on the board; return whether there was anything."""
        return self.ask("clean", answers.Cleaned).removed


async def _ended(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _blocks(parts: list[Part]) -> Iterator[bytes]:
    for part in parts:
        with part.path.open("rb") as file:
            file.seek(part.have)
            while block := file.read(BLOCK):
                yield block
