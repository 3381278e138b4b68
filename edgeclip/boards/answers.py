"""What a board may answer: each answer is typed, bounded, and to the question that was asked.

A board is a stranger: it may be broken, or somebody else's. Its JSON becomes these records, its
arrays are declared by the host, which knows their shapes, and its reports must be of the bundle
that was sent. What it says of times and temperatures cannot be checked, only bounded.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from edgeclip.boards.hearing import DO
from edgeclip.device.bench_report import BenchReport, Beside, BesideRow
from edgeclip.device.bounds import Bytes, Finite
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import Pack
from edgeclip.device.evaluation import Evaluation
from edgeclip.device.machine import Facts, State
from edgeclip.device.profile import Device
from edgeclip.device.records import Record, SelftestReport
from edgeclip.device.rules import judged, line
from edgeclip.device.validate import MOST_PIXELS, Observed, is_asked
from edgeclip.disk import MANIFEST, Declared, read_declared_arrays, sha256
from edgeclip.errors import EdgeclipError

T = TypeVar("T")
Path = Annotated[str, Meta(min_length=1, max_length=4_096)]
ZIP = 1 << 16
"""bytes of an archive's own, at most, beside each array"""
FORMS = {
    "arch": re.compile(r"[A-Za-z0-9_]{1,32}"),
    "python": re.compile(r"\d{1,3}\.\d{1,3}[\w.+]{0,20}"),
    "glibc": re.compile(r"\d{1,3}\.\d{1,3}"),
}
"""facts that decide which wheels are fetched"""
MOST_FACT = 2_000
"""characters of one fact"""


class Look(Record):
    folder: Path
    facts: Facts
    state: State


class Clock(Record):
    time: Finite
    """seconds since 1970"""


class Missing(Record):
    have: dict[str, Bytes]
    """sha256 of a file that is not whole there, to its bytes that are"""
    free_bytes: Bytes


class Built(Record):
    path: Path


class Exists(Record):
    exists: bool


class Cleaned(Record):
    removed: bool


def typed(name: str, answer: Any, kind: type[T]) -> T:
    """Return a board's answer as `kind`. name: the device's. Raises `EdgeclipError`."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as e:
        raise wrong(name, f"answered what was not asked ({e})") from None


def wrong(name: str, what: str) -> EdgeclipError:
    """Return the error of an answer that is none."""
    return EdgeclipError(name, what, f"{DO} {name}")


def looked(name: str, answer: Any) -> Look:
    """Return what a machine says that it is. Raises `EdgeclipError` for what no machine is."""
    found = typed(name, answer, Look)
    for field, value in [*vars(found.facts).items(), *vars(found.state).items()]:
        if len(str(value)) > MOST_FACT:
            raise wrong(name, f"its {field} has {len(str(value)):,} characters")
    for field, form in FORMS.items():
        value = getattr(found.facts, field)
        if value is not None and not form.fullmatch(value):
            raise wrong(name, f"its {field} is '{value[:40]}'")
    return found


def missing(name: str, answer: Any, sizes: dict[str, int]) -> Missing:
    """Return which of files {sha256: bytes} a board lacks: none that it was not asked for."""
    found = typed(name, answer, Missing)
    for digest, have in found.have.items():
        if digest not in sizes or have > sizes[digest]:
            raise wrong(name, f"answered for a file that was not asked for ({digest[:16]})")
    return found


# --- arrays


def size_of(declared: dict[str, Declared]) -> int:
    """Return how many bytes an archive of these arrays has at most."""
    return ZIP + sum(ZIP + array.largest() for array in declared.values())


def arrays(name: str, payload: bytes, declared: dict[str, Declared]) -> dict[str, np.ndarray]:
    """Return a board's arrays, some of those declared. Raises `EdgeclipError` for any others."""
    return read_declared_arrays(payload, declared, f"{name}: its answer", f"{DO} {name}")


def of_validate(bundle: Bundle, evaluation: Evaluation | None) -> dict[str, Declared]:
    """Return what a board may observe of a bundle, and of a run's images."""
    width = bundle.manifest.embed_dim
    size = bundle.preprocess.size
    golden = len(bundle.golden_features())
    found = {"golden_features": Declared((golden, width))}
    if bundle.manifest.golden.images:
        shape = (len(bundle.manifest.golden.images), size, size, 3)
        found["golden_pixels"] = Declared(shape, ("uint8",))
    if bundle.manifest.text is not None:
        found["text_features"] = Declared((len(bundle.golden_texts()), width))
    if evaluation is None:
        return found
    images = len(evaluation.chosen)
    answers = sum(len(s.rows) for s in evaluation.sets)
    found["features_all"] = Declared((images, width))
    found["features_basic"] = Declared((images, width))
    found["answers"] = Declared((answers,), ("int64",))
    found["pixels_of"] = Declared((None,), ("int64",), most=8 * images)
    found["pixels"] = Declared((None, size, size, 3), ("uint8",), most=MOST_PIXELS)
    return found


def observed(name: str, found: Observed, bundle: Bundle, evaluation: Evaluation | None) -> Observed:
    """Return what a board observed, if it is whole. Raises `EdgeclipError` where it is not."""
    needed = {"golden_features"}
    if bundle.manifest.golden.images:
        needed.add("golden_pixels")
    if is_asked(bundle, evaluation, found.input, found.output):
        needed.add("features_all")
        if bundle.manifest.target.tolerance.optimization_agreement is not None:
            needed.add("features_basic")
        features = found.arrays.get("features_all")
        if features is not None and np.isfinite(features).all():
            needed.add("answers")
    if gone := sorted(needed - found.arrays.keys()):
        raise wrong(name, f"answered without {', '.join(gone)}")

    places = found.arrays.get("pixels_of", np.zeros(0, np.int64)).tolist()
    images = len(evaluation.chosen) if evaluation is not None else 0
    if len(set(places)) < len(places) or not all(0 <= place < images for place in places):
        raise wrong(name, "answered with pixels of images that nobody asked for")
    pixels = found.arrays.get("pixels")
    if pixels is not None and len(pixels) != len(places):
        raise wrong(name, f"answered with pixels of {len(pixels)} images, and named {len(places)}")
    return found


def of_pack(pack: Pack) -> dict[str, Declared]:
    """Return the images that a board may answer of a conformance pack."""
    size = pack.manifest.made_for.preprocess.size
    shape = Declared((3, size, size), finite=True)
    return {image.name: shape for image in pack.manifest.images}


class Said(Record):
    """A board's words of a conformance pack."""

    ids: dict[str, list[Annotated[int, Meta(ge=0, le=2**31)]]]
    refused: dict[str, str]


def said(name: str, answer: Any, pack: Pack) -> Said:
    """Return a board's words of a pack: of its images and strings, and no others."""
    found = typed(name, answer, Said)
    texts = {text.name for text in pack.manifest.texts}
    images = {image.name for image in pack.manifest.images}
    if found.ids.keys() - texts or found.refused.keys() - texts - images:
        raise wrong(name, "answered for strings that nobody asked for")
    length = pack.manifest.made_for.context_length or 0
    if any(len(ids) > length for ids in found.ids.values()):
        raise wrong(name, f"answered with more than {length} ids for a string")
    return found


# --- reports


def of_bundle(name: str, report: BenchReport | SelftestReport | BesideRow, bundle: Bundle) -> None:
    """Raise `EdgeclipError` for a report of another bundle than the one that was sent."""
    if report.bundle != sha256(bundle.folder / MANIFEST):
        raise wrong(name, f"reported of another bundle than {bundle.folder.name}")


def benched(name: str, report: BenchReport, bundle: Bundle, device: Device) -> BenchReport:
    """Return a bench report with the budgets asked by this host, and the bundle's own sizes.

    Raises `EdgeclipError` for a report of another bundle.
    """
    of_bundle(name, report, bundle)
    if report.target != bundle.manifest.target.name:
        raise wrong(name, "reported of another target")
    own = msgspec.structs.replace(
        report,
        device=None,
        image_encoder_bytes=bundle.manifest.image_encoder_bytes,
        bundle_bytes=bundle.size_bytes,
        kept=[],
        preflight=[],
    )
    over = {line(rule) for rule in report.rules}
    return judged(own, device, [failure for failure in report.failures if failure not in over])


def timed(name: str, found: Beside, bundles: list[Bundle]) -> Beside:
    """Return the times of bundles turn by turn. Raises `EdgeclipError` where they are of others."""
    if len(found.rows) != len(bundles):
        raise wrong(name, f"timed {len(found.rows)} bundles of {len(bundles)}")
    rows = []
    for row, bundle in zip(found.rows, bundles, strict=True):
        of_bundle(name, row, bundle)
        rows.append(msgspec.structs.replace(row, name=bundle.folder.name))
    return msgspec.structs.replace(found, device=None, rows=rows)
