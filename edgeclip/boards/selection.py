"""Which bundles a command measures, and where; they stay as they are until it ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgeclip import disk
from edgeclip.device import profile as D
from edgeclip.device.bundle import Bundle
from edgeclip.device.profile import Device
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say
from edgeclip.reports import store


class Selection(NamedTuple):
    """What the user chose to measure, and where."""

    device: str
    """a name among the device profiles, or a YAML file"""
    run: Path | None = None
    """every bundle of this run; None: of the latest run"""
    bundle: Path | None = None
    """this bundle alone"""
    clean: bool = False
    """remove afterwards what edgeclip left on the board"""


class Chosen(NamedTuple):
    """A selection, loaded."""

    name: str
    """the device's name"""
    device: Device
    bundles: list[Bundle]
    """those that the device can run"""
    run: Path | None
    """the run that they belong to; None: a bundle without a run"""


@contextlib.contextmanager
def choose(selection: Selection) -> Iterator[Chosen]:
    """Load a selection, and name the bundles that the device cannot run.

    Nobody replaces them, or starts their run over, meanwhile. Raises `EdgeclipError` when there is
    no bundle, or none that the device can run.
    """
    name, device = D.load(selection.device)
    with contextlib.ExitStack() as stack:
        run = _run(selection)
        if run is not None:
            stack.enter_context(disk.shared(run))
        bundles = []
        for folder in _folders(selection, run):
            stack.enter_context(disk.reading(folder))
            loaded = Bundle.load(
                folder, threads=device.threads, check=True, providers=device.providers
            )
            runtime = loaded.manifest.runtime
            if runtime in device.runtimes:
                bundles.append(loaded)
            else:
                say(f"{folder.name}: skipped, {name} has no {runtime}")
        if not bundles:
            what = f"can run none of these bundles (it has {', '.join(device.runtimes)})"
            raise EdgeclipError(name, what, "choose another --device or --bundle")
        yield Chosen(name, device, bundles, run)


def _run(selection: Selection) -> Path | None:
    """Return the run of the selected bundles; None: of a bundle without one."""
    if selection.bundle is not None:
        return run_of(selection.bundle)
    return store.latest_run(selection.run)


def _folders(selection: Selection, run: Path | None) -> list[Path]:
    if selection.bundle is not None:
        return [selection.bundle]

    assert run is not None
    found = disk.finished_in(run / "bundles")
    if not found:
        do = "make one with: edgeclip export --target onnx-int8"
        raise EdgeclipError(run, "has no bundle", do)
    return found


def run_of(bundle: Path) -> Path | None:
    """Return the run that a bundle's folder lies in; None where it lies in none."""
    for parent in bundle.resolve().parents:
        if (parent / "evaluation" / disk.MANIFEST).exists():
            return parent
    return None
