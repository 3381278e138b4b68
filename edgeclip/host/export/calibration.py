"""Which training images int8 takes its ranges from, and on which others its candidates are judged.

Both are drawn by the target's seed from the training part, never overlap, and are named with their
sha256 in the bundle. What would quietly spoil the result is refused before anything is written:
fewer images than asked for, images that are all alike (their ranges say nothing of others), and
images that the student is evaluated on.
"""

from typing import NamedTuple

import numpy as np

from edgeclip.device.images import ImageRef, digest, load_pixels, stream
from edgeclip.device.manifest import CalibrationImage
from edgeclip.device.preprocess import Preprocess, normalize
from edgeclip.device.target import Calibration
from edgeclip.errors import EdgeclipError
from edgeclip.host.export.source import Source

ALIKE = 0.02
"""mean over pixels of the standard deviation across images, in normalized units; photos have 1"""
BATCH = 32


class CalibrationImages(NamedTuple):
    """What int8 is made with."""

    ranges: np.ndarray
    """float32 [n, 3, H, W]: what calibration runs"""
    judged: np.ndarray
    """float32 [m, 3, H, W]: what candidates are compared on"""
    used: list[CalibrationImage]
    """each of them, as the bundle lists it"""
    labels: np.ndarray
    """int [m]: class index of each judged image, -1 where it has none that training may know"""


def draw(source: Source, spec: Calibration) -> CalibrationImages:
    """Return the images that `spec` asks for, `judged` being `ranges` where it asks for none.

    Raises `EdgeclipError` for too few, unreadable, uniform or held-out images.
    """
    pool = source.calibration()
    wanted = spec.images + spec.judged_on
    if len(pool) < wanted:
        raise EdgeclipError(
            "calibration",
            f"the target asks for {spec.images} training images and {spec.judged_on} to judge on, "
            f"and there are {len(pool)}",
            "give more with --images DIR, or lower both in a target of your own",
        )
    order = np.random.default_rng(spec.seed).permutation(len(pool))
    for_ranges = [pool[i] for i in sorted(order[: spec.images])]
    for_judging = [pool[i] for i in sorted(order[spec.images : wanted])]
    used = [CalibrationImage(key=p.key, sha256=digest(p), use="ranges") for p in for_ranges]
    used += [CalibrationImage(key=p.key, sha256=digest(p), use="judged") for p in for_judging]
    _refuse_held_out(used, source.evaluation_hashes())

    ranges = _load(for_ranges, source.preprocess)
    if ranges.std(axis=0).mean() < ALIKE:
        raise EdgeclipError(
            "calibration",
            f"its {len(ranges)} images are all alike, so their ranges say nothing",
            "give images as different as the real ones",
        )
    judged = ranges
    if for_judging:
        judged = _load(for_judging, source.preprocess)
    labels = np.array([p.label for p in for_judging or for_ranges])
    return CalibrationImages(ranges, judged, used, labels)


def _refuse_held_out(used: list[CalibrationImage], held_out: set[str]) -> None:
    leaked = [image.key for image in used if image.sha256 in held_out]
    if leaked:
        raise EdgeclipError(
            "calibration",
            f"{len(leaked)} of its images are evaluation images (first: {leaked[0]})",
            "take them out of the training part, or of --images",
        )


def _load(images: list[ImageRef], preprocess: Preprocess) -> np.ndarray:
    """float32 [n, 3, H, W]."""

    def pixels_of(i: int) -> np.ndarray:
        return load_pixels(images[i], preprocess)

    skipped: list[str] = []
    rows = []
    for _, pixels in stream(range(len(images)), pixels_of, BATCH, skipped):
        rows.append(normalize(pixels, preprocess))
    if skipped:  # the bundle lists them, so each must be one
        raise EdgeclipError(
            "calibration",
            f"{len(skipped)} of {len(images)} images are unreadable (first: {skipped[0]})",
            "repair or remove them",
        )
    return np.concatenate(rows)
