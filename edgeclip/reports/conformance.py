"""The conformance report: an implementation's tensors and ids beside the reference's, by kind.

Three scores, from the nearest to the pixels to the nearest to the user: levels (of 0..255) that a
pixel is off by, ids, and answers. For the last one the bundle's own encoder and head answer twice,
to the reference's tensor and to the implementation's; the share of answers that change bounds the
top-1 accuracy that the difference can cost, in percentage points.

Images of every kind, and plain strings, must be the reference's: what differs there fails the
command. Other kinds are listed, and so is an image that an option of the bundle's preprocess (exif,
background) prepares otherwise than the reference: that difference is asked for.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import (
    LEVELS,
    REFERENCE,
    Answers,
    Pack,
    PackedImage,
    read_answers,
)
from edgeclip.device.machine import Facts
from edgeclip.device.preprocess import open_image, prepared
from edgeclip.errors import EdgeclipError
from edgeclip.reports import store
from edgeclip.reports.conformance_report import (
    ConformanceReport,
    Difference,
    ImageKind,
    KindScore,
)

REQUIRED = (
    *("rgb", "grey", "cmyk", "alpha", "16-bit", "palette", "exif", "animated", "progressive"),
    *("odd size", "1 px", "extreme aspect", "huge"),
    *("plain", "capitals", "white space", "empty", "emoji", "accents", "cjk"),
    *("control characters", "html entities", "typography"),
)
"""kinds that must be equal"""
ROUNDING = 1e-3
"""levels: another order of the normalization's operations in float32 stays far below, half
precision does not"""
BATCH = 16


class By(NamedTuple):
    """Who answered."""

    device: str | None = None
    machine: Facts | None = None
    answers: str | None = None


class Compared(NamedTuple):
    """One image or string beside the reference's."""

    kind: str
    equal: bool
    """bit for bit"""
    holds: bool
    """equal but for rounding"""
    refused: bool
    what: str
    """the difference in words; empty: none"""
    levels: np.ndarray | None = None
    """[S, S], the largest difference of each pixel's channels; None: no finite tensor, or a
    string"""
    changed: bool | None = None
    """whether the bundle's first answer is another; None: not measured"""
    asked_for: str | None = None
    """the option of the preprocess that asks for a difference; None: none does"""


def judge(bundle: Bundle, pack: Pack, answers: Answers, by: By) -> ConformanceReport:
    """Return the report of what an implementation answered to the pack.

    Raises `EdgeclipError` for an id that is beyond the bundle's vocabulary.
    """
    reference = read_answers(pack.folder / REFERENCE, pack)
    images = _images(pack, reference, answers)
    texts = _texts(pack, reference, answers)
    no_answers = _no_answers(bundle)
    if no_answers is None:
        images = _image_answers(bundle, pack, images, reference, answers)
        texts = _text_answers(bundle, pack, texts, reference, answers)

    every = {**images, **texts}
    differences = []
    failures = []
    for name, row in every.items():
        if row.what:
            differences.append(Difference(name, row.kind, row.what, row.asked_for))
        required = row.kind in REQUIRED and row.asked_for is None
        if (required and not row.holds) or row.what == NOT_FINITE:
            failures.append(f"{row.kind}: {name}: {row.what}")
    made_for = pack.manifest.made_for
    return ConformanceReport(
        **by._asdict(),
        target=bundle.manifest.target.name,
        bundle=disk.sha256(bundle.folder / disk.MANIFEST),
        pack=disk.sha256(pack.folder / disk.MANIFEST),
        reference=pack.manifest.versions,
        tokenizer=made_for.tokenizer,
        no_texts=pack.manifest.no_texts,
        left_out=pack.manifest.left_out,
        no_answers=no_answers,
        images=[_image_kind(kind, rows) for kind, rows in _by_kind(images.values())],
        texts=[KindScore(**_kind(kind, rows)) for kind, rows in _by_kind(texts.values())],
        differences=differences,
        failures=failures,
    )


def write(report: ConformanceReport, run: Path, bundle: Bundle) -> Path:
    """Write the report beside the bundle's run; return its path."""
    who = report.device or f"answers-{Path(str(report.answers)).resolve().name}"
    path = store.path(run, bundle, who, report.kind)
    disk.write_record(path, report)
    return path


# --- pixels and ids

NOT_FINITE = "values that are not finite"


def _images(pack: Pack, reference: Answers, answers: Answers) -> dict[str, Compared]:
    levels = disk.read_array(pack.folder / LEVELS)
    std = np.asarray(pack.manifest.made_for.preprocess.std)
    found = {}
    for image in pack.manifest.images:
        if image.name in answers.images:
            row = _image(
                image.kind,
                reference.images[image.name],
                answers.images[image.name],
                levels,
                255 * std[:, None, None],
            )
        else:
            row = _no_answer(image.kind, answers.refused.get(image.name, "no answer"))
        if row.what and not row.refused:
            row = row._replace(asked_for=_asked_for(pack, image))
        found[image.name] = row
    return found


def _asked_for(pack: Pack, image: PackedImage) -> str | None:
    """Return the options that prepare an image otherwise than the reference; None: none does."""
    preprocess = pack.manifest.made_for.preprocess
    if not preprocess.options():
        return None
    stored = open_image(pack.folder / image.file)
    if prepared(stored, preprocess) is stored:
        return None
    return ", ".join(f"preprocess.{name}" for name in preprocess.options())


def _no_answer(kind: str, why: str) -> Compared:
    return Compared(kind, False, False, True, f"refused: {' '.join(why.split())}")


def _image(
    kind: str, reference: np.ndarray, tensor: np.ndarray, levels: np.ndarray, scale: np.ndarray
) -> Compared:
    """Compare a tensor with the reference's uint8 [S, S, 3].

    tensor: of that shape, or float32 [3, S, S]; scale: levels a unit, [3, 1, 1].
    """
    expected = to_input(reference, levels)
    given = to_input(tensor, levels)
    if not np.isfinite(given).all():
        return Compared(kind, False, False, False, NOT_FINITE)
    difference = np.abs(given.astype(np.float64) - expected) * scale
    worst = difference.max(axis=0)
    largest = float(worst.max())
    equal = bool(np.array_equal(given, expected))
    holds = largest <= ROUNDING
    what = ""
    if not holds:
        what = f"up to {largest:.3g} levels, {_share(worst):.1%} of pixels"
    elif not equal:
        what = f"rounding, up to {largest:.1e} levels"
    return Compared(kind, equal, holds, False, what, worst)


def to_input(tensor: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return float32 [3, S, S] as it is, or of uint8 [S, S, 3] through the reference's levels."""
    if tensor.dtype != np.uint8:
        return tensor
    channels = [levels[tensor[..., c], c] for c in range(3)]
    return np.stack(channels)


def _share(worst: np.ndarray) -> float:
    """Share of pixels whose nearest level is another."""
    return float((worst >= 0.5).mean())


def _texts(pack: Pack, reference: Answers, answers: Answers) -> dict[str, Compared]:
    found = {}
    for text in pack.manifest.texts:
        expected = reference.ids[text.name]
        if text.name not in answers.ids:
            row = _no_answer(text.kind, answers.refused.get(text.name, "no answer"))
            # What the reference has cut may be refused, whatever kind it is of.
            cut = (
                text.name in answers.refused
                and len(expected) == pack.manifest.made_for.context_length
            )
            found[text.name] = row._replace(holds=cut)
            continue
        given = answers.ids[text.name]
        equal = given == expected
        what = ""
        if not equal:
            what = _first_difference(given, expected)
        found[text.name] = Compared(text.kind, equal, equal, False, what)
    return found


def _first_difference(given: list[int], expected: list[int]) -> str:
    """Say where the ids begin to differ; they do."""
    pairs = enumerate(zip(given, expected, strict=False))
    for i, (ours, theirs) in pairs:
        if ours != theirs:
            counts = f"{len(given)} ids, the reference has {len(expected)}"
            return f"{counts}; the first that differs is {ours} for {theirs}, at {i}"
    return f"{len(given)} ids, the reference has {len(expected)}"


# --- answers


def _no_answers(bundle: Bundle) -> str | None:
    """Return why the bundle cannot answer here; None: it can."""
    if not bundle.labels:
        return "the bundle has no labels"
    try:
        _ = bundle.image_encoder
    except EdgeclipError as e:  # TensorRT's engine, or a runtime that is not installed here
        return f"its encoder cannot be opened on this machine ({e})"
    return None


def _image_answers(
    bundle: Bundle,
    pack: Pack,
    rows: dict[str, Compared],
    reference: Answers,
    answers: Answers,
) -> dict[str, Compared]:
    levels = disk.read_array(pack.folder / LEVELS)
    names = [name for name, row in rows.items() if row.levels is not None and not row.equal]
    expected = _labels_of(bundle, [to_input(reference.images[n], levels) for n in names])
    given = _labels_of(bundle, [to_input(answers.images[n], levels) for n in names])
    changed = {n: a != b for n, a, b in zip(names, expected, given, strict=True)}
    return {n: row._replace(changed=changed.get(n, not row.equal)) for n, row in rows.items()}


def _labels_of(bundle: Bundle, inputs: list[np.ndarray]) -> list[int]:
    """Return the first answer to each input, float32 [3, S, S]."""
    found: list[int] = []
    for i in range(0, len(inputs), BATCH):
        features = bundle.image_encoder.run(np.stack(inputs[i : i + BATCH]))
        found += bundle.scores(features).argmax(axis=1).tolist()
    return found


def _text_answers(
    bundle: Bundle,
    pack: Pack,
    rows: dict[str, Compared],
    reference: Answers,
    answers: Answers,
) -> dict[str, Compared]:
    """Ask for the label whose class features are nearest to each string: its first answer."""
    found = {}
    for text in pack.manifest.texts:
        row = rows[text.name]
        changed: bool | None = not row.equal
        if not row.equal and not row.refused:
            before = _label_of_ids(bundle, reference.ids[text.name], text.name)
            after = _label_of_ids(bundle, answers.ids[text.name], text.name)
            changed = None if before is None else before != after
        found[text.name] = row._replace(changed=changed)
    return found


def _label_of_ids(bundle: Bundle, ids: list[int], name: str) -> int | None:
    """Return the nearest label; None where the bundle has no answer to these ids."""
    text = bundle.manifest.text
    assert text is not None  # the pack has strings
    known = bundle.words.library.get_vocab_size()
    if max(ids, default=0) >= known:
        what = f"'{name}' has the id {max(ids)}, and the vocabulary has {known} tokens"
        raise EdgeclipError("ids.json", what, "give ids of the bundle's tokenizer.json")
    row = np.full((1, text.context_length), bundle.words.pad, np.int64)
    row[0, : len(ids)] = ids
    try:
        features = bundle.encode_ids(row, [name])
    except EdgeclipError:  # a token that was removed by `export --vocabulary`
        return None
    if not np.isfinite(features).all():
        return None
    return int((features @ bundle.class_features.T).argmax())


# --- by kind


def _by_kind(rows: Iterable[Compared]) -> list[tuple[str, list[Compared]]]:
    """Return the rows of each kind, in the order of the pack."""
    kinds: dict[str, list[Compared]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    return list(kinds.items())


def _kind(kind: str, rows: list[Compared]) -> dict[str, Any]:
    asked = [row.changed for row in rows if row.changed is not None]
    changed = None
    if asked:
        changed = 100 * sum(asked) / len(asked)
    return {
        "kind": kind,
        "required": kind in REQUIRED,
        "count": len(rows),
        "equal": sum(row.equal for row in rows),
        "refused": sum(row.refused for row in rows),
        "answers_changed_pp": changed,
    }


def _image_kind(kind: str, rows: list[Compared]) -> ImageKind:
    levels = [row.levels for row in rows if row.levels is not None]
    largest = share = None
    if levels:
        largest = max(float(worst.max()) for worst in levels)
        share = float(np.mean([_share(worst) for worst in levels]))
    return ImageKind(**_kind(kind, rows), largest_difference=largest, pixels_changed=share)
