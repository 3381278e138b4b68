"""What a run's reports say of each bundle on each device, and whether it ships."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgeclip import disk
from edgeclip.device import rules
from edgeclip.device.bench_report import BenchReport
from edgeclip.device.intervals import Answer
from edgeclip.device.manifest import (
    BundleManifest,
    CandidateRow,
    LintRecord,
    SearchRecord,
    read_manifest,
)
from edgeclip.device.records import ParityReport
from edgeclip.device.target import Floor
from edgeclip.errors import EdgeclipError
from edgeclip.reports.history import Entry, read


class Target(NamedTuple):
    """One bundle on one device."""

    name: str
    """the bundle's folder"""
    device: str | None
    """None: no report of this bundle yet"""
    parity: ParityReport | None
    bench: BenchReport | None
    bytes: int
    """of the image encoder"""
    quantization: SearchRecord | None
    lint: LintRecord | None
    digest: str = ""
    """sha256 of the bundle's manifest"""
    floor: Floor = Floor()
    """what the bundle must reach by itself"""
    history: Sequence[Entry] = ()
    """every report of it there, the oldest first"""
    damage: str | None = None
    """which of its files are not those that its manifest lists; None: all are"""

    @property
    def row(self) -> str:
        """What a table calls it."""
        if self.device is None:
            return self.name
        return f"{self.name} on {self.device}"

    @property
    def verdict(self) -> str:
        """Ship, do not ship, or cannot say, and why."""
        if self.damage is not None:
            return f"do not ship: {self.damage}"
        return verdict(self.parity, self.bench)

    @property
    def answer(self) -> Answer:
        """Whether everything that was asked holds, and the files are those it was asked of."""
        if self.damage is not None:
            return "fails"
        return answer(self.parity, self.bench)


def collect(run: Path) -> list[Target]:
    """Return an entry per bundle and device, by name.

    A report counts only for the bundle that it was made with: after a new export it has to be made
    again. Every file of a bundle is compared with its manifest: what was measured is not what lies
    there otherwise. Raises `EdgeclipError` for a manifest or a report that cannot be read.
    """
    targets = []
    for folder in disk.finished_in(run / "bundles"):
        targets += _targets(run, folder)
    return targets


def _targets(run: Path, folder: Path) -> list[Target]:
    manifest = read_manifest(folder)
    parities = _reports(run, folder, "parity", ParityReport)
    benches = _reports(run, folder, "bench", BenchReport)
    devices: list[Any] = sorted(parities.keys() | benches.keys()) or [None]
    damage = _damage(folder, manifest)
    targets = []
    for device in devices:
        target = Target(
            name=folder.name,
            device=device,
            parity=parities.get(device),
            bench=benches.get(device),
            bytes=manifest.image_encoder_bytes,
            quantization=manifest.quantization,
            lint=manifest.lint,
            digest=disk.sha256(folder / disk.MANIFEST),
            floor=manifest.target.floor,
            history=read(run / "reports" / f"{folder.name}.{device}.history.json"),
            damage=damage,
        )
        targets.append(target)
    return targets


def _damage(folder: Path, manifest: BundleManifest) -> str | None:
    try:
        disk.verify_files(folder, manifest.files, "bundle")
    except EdgeclipError as e:
        return str(e)
    return None


def _reports(run: Path, folder: Path, word: str, kind: type[Any]) -> dict[str | None, Any]:
    """Return the reports of this very bundle, by device."""
    digest = disk.sha256(folder / disk.MANIFEST)
    found = {}
    for path in sorted((run / "reports").glob(f"{folder.name}.*.{word}.json")):
        content = disk.read_record(path, kind)
        if content.bundle == digest:
            found[content.device] = content
    return found


def verdict(parity: ParityReport | None, bench: BenchReport | None) -> str:
    """Return one line: ship, do not ship, or cannot say; and why."""
    against = _failures(parity, bench)
    if against:
        return f"do not ship: {'; '.join(against)}"
    unknown = _unknown(parity, bench)
    if unknown:
        return f"cannot say: {'; '.join(unknown)}"
    assert parity is not None
    assert bench is not None
    assert bench.single_stream is not None
    latency = _latency(bench)
    lost = parity.accuracy
    if lost is None:  # held by proof, without an unseen image
        return f"ship: no answer can change, {latency}"
    accuracy = f"accuracy drop {lost.drop_pp:.2f} pp (at most {lost.upper_pp:.2f})"
    return f"ship: {accuracy} on {lost.images} unseen images, {latency}"


def _latency(bench: BenchReport) -> str:
    """Return the p90 of a whole image; of the model alone where the whole was not measured."""
    assert bench.single_stream is not None
    model = f"{bench.single_stream.latency_ms_p90:.2f} ms"
    if bench.whole_image is None:
        return f"p90 {model} for the model alone"
    whole = f"{bench.whole_image.from_file.latency_ms_p90:.2f} ms"
    return f"p90 {whole} from image to label, {model} of it the model"


def answer(parity: ParityReport | None, bench: BenchReport | None) -> Answer:
    """Return whether everything that was asked holds; what was not measured cannot be told."""
    if _failures(parity, bench):
        return "fails"
    return "cannot tell" if _unknown(parity, bench) else "holds"


def _failures(parity: ParityReport | None, bench: BenchReport | None) -> list[str]:
    """Return what speaks against the bundle."""
    found = []
    if parity is not None and parity.verdict == "fails":
        found += parity.failures or ["validate failed"]
    return found + (bench.failures if bench is not None else [])


def _unknown(parity: ParityReport | None, bench: BenchReport | None) -> list[str]:
    """Return what is not known of the bundle."""
    found = []
    if parity is None:
        found.append("not validated")
    elif parity.verdict != "holds":
        open_rules = [rules.line(r) for r in parity.rules if r.answer == "cannot tell"]
        found += open_rules or [parity.not_compared or "validated by an older edgeclip"]
    if bench is None:
        return [*found, "not benchmarked"]
    if bench.single_stream is None:
        found.append("single_stream not measured")
    elif rules.loaded(bench):
        found.append(f"times unknown: {rules.under_load(bench)}")
    found += [rules.line(r) for r in bench.rules if r.answer == "cannot tell"]
    return found


def form(candidate: CandidateRow) -> str:
    """Return how one int8 candidate differs from the others, in a few words."""
    words = [candidate.method, f"{candidate.layers} layers"]
    if candidate.smoothing is not None:
        words.append(f"smoothing {candidate.smoothing:g}")
    if candidate.model_type:
        words.append(candidate.model_type)
    if candidate.rounding == "learned":
        words.append("rounding learned")
    words.append(f"{candidate.float_layers} in float")
    return ", ".join(words)
