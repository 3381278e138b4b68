"""What `edgeclip export` does between parsing and printing. It imports the host layer."""

from pathlib import Path
from typing import NamedTuple

from edgeclip import disk, text_file
from edgeclip.cli import words
from edgeclip.cli.request import Request
from edgeclip.device.manifest import LintRecord, read_manifest
from edgeclip.device.target import Target
from edgeclip.device.target import load as load_target
from edgeclip.host.export import export as write_bundle
from edgeclip.host.export import open_clip, optimum
from edgeclip.host.export.source import Source, from_model, from_run, with_vocabulary
from edgeclip.progress import say
from edgeclip.reports.store import latest_run


class Exported(NamedTuple):
    """What became of one target."""

    target: str
    image_encoder_mib: float
    path: str
    """the bundle, or the folder of another layout"""
    lint: LintRecord | None
    """what TensorRT's checks said; None: not a TensorRT target"""

    def as_json(self, layout: str) -> dict[str, object]:
        return {
            "target": self.target,
            "image_encoder_mib": self.image_encoder_mib,
            layout: self.path,
            "lint": self.lint,
        }


def write_open_clip(request: Request) -> Path:
    """Write the run's student as a folder that open_clip loads, and return it."""
    run = latest_run(request.run)
    folder = request.out or run / "open_clip"
    disk.refuse_foreign(folder / run.name, "open_clip")  # before the work, not after it
    with disk.shared(run):
        source = from_run(run)
        _say_options(source, request.layout)
        return open_clip.write(run, source, folder / run.name)


def write(request: Request) -> list[Exported]:
    """Export to every target. Raises `EdgeclipError` and `Refused` as `host.export` does."""
    targets = [load_target(name) for name in request.targets]
    _check_places(request, targets)
    if request.model is not None:
        return _write(request, targets)
    with disk.shared(latest_run(request.run)):
        return _write(request, targets)


def _write(request: Request, targets: list[tuple[str, Target]]) -> list[Exported]:
    source, home = _source(request)
    if request.layout == "optimum":
        _check_optimum(request, source, targets)
        _say_options(source, request.layout)
    return [_write_one(request, source, home, name, target) for name, target in targets]


def _check_places(request: Request, targets: list[tuple[str, Target]]) -> None:
    """Refuse folders that cannot be written, before a model is loaded."""
    home = Path()
    if request.model is None:
        home = latest_run(request.run)
    for name, _ in targets:
        disk.refuse_foreign(_bundles(request, home) / name, "bundle")
        if request.layout == "optimum":
            disk.refuse_foreign(_optimum(request, home) / name, "optimum")


def _say_options(source: Source, layout: str) -> None:
    """Say what a layout's readers cannot be told of the preprocess."""
    options = source.preprocess.options()
    if options:
        names = " and ".join(f"preprocess.{name}" for name in options)
        say(f"{layout}: its readers know no {names}; give them images that are prepared so")


def _source(request: Request) -> tuple[Source, Path]:
    """Return (what is exported, the folder that holds a folder for each layout)."""
    if request.model and request.weights:
        labels: list[str] = []
        if request.labels is not None:
            labels = words.labels(request.labels)
        text = not request.image_only
        source = from_model(
            request.model,
            request.weights,
            labels,
            request.images,
            text=text,
            resize_pos_embed=request.resize_pos_embed,
            like=request.like,
        )
        home = Path()
    else:
        home = latest_run(request.run)
        source = from_run(home)

    if request.vocabulary:
        source = with_vocabulary(source, text_file.texts(request.vocabulary, "text"))
    return source, home


def _check_optimum(request: Request, source: Source, targets: list[tuple[str, Target]]) -> None:
    """Refuse a target that this layout cannot hold, before anything is written."""
    head = source.head
    if request.no_head:
        head = None
    for name, target in targets:
        optimum.check(target.runtime, source.load_text is not None, head, name)


def _write_one(request: Request, source: Source, home: Path, name: str, target: Target) -> Exported:
    path = write_bundle(source, name, target, _bundles(request, home) / name)
    manifest = read_manifest(path)
    if request.layout == "optimum":
        path = optimum.write(path, _optimum(request, home) / name, head=not request.no_head)
    mib = manifest.image_encoder_bytes / 2**20
    return Exported(name, mib, str(path), manifest.lint)


def _bundles(request: Request, home: Path) -> Path:
    if request.out and request.layout == "bundle":
        return request.out
    return _folder(request, home, "bundles")


def _optimum(request: Request, home: Path) -> Path:
    return request.out or _folder(request, home, "optimum")


def _folder(request: Request, home: Path, kind: str) -> Path:
    """RUN/bundles of a run; bundles/MODEL of a model."""
    if request.model is None:
        return home / kind
    return home / kind / request.model.removesuffix(".json").replace("/", "_")
