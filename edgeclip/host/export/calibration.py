"""Which training images int8 takes its ranges from, and on which others its candidates are judged.

Both are drawn by the target's seed from the training part, never overlap, and are named with their
sha256 in the bundle. What would quietly spoil the result is refused before anything is written:
fewer images than asked for, images that are all alike (their ranges say nothing of others), and
images that the student is evaluated on.
"""

from typing import Literal, NamedTuple

import numpy as np

from edgeclip.device.images import ImageRef, digest, load_first
from edgeclip.device.manifest import CalibrationImage
from edgeclip.device.preprocess import normalize
from edgeclip.device.target import Calibration
from edgeclip.errors import EdgeclipError
from edgeclip.host.export.source import Source

ALIKE = 0.02
"""mean over pixels of the standard deviation across images, in normalized units; photos have 1"""


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

    An image that cannot be read gives its place to the next. Raises `EdgeclipError` for too few,
    uniform or held-out images, and where more than 1 % cannot be read.
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
    places, pixels = load_first(pool, order.tolist(), wanted, source.preprocess)
    if len(places) < wanted:
        raise EdgeclipError(
            "calibration",
            f"the target asks for {wanted} images, and {len(places)} of {len(pool)} can be read",
            "give more with --images DIR",
        )
    pixels_of = dict(zip(places, pixels, strict=True))
    for_ranges = sorted(places[: spec.images])
    for_judging = sorted(places[spec.images :])
    used = [_listed(pool[i], "ranges") for i in for_ranges]
    used += [_listed(pool[i], "judged") for i in for_judging]
    _refuse_held_out(used, source.evaluation_hashes())

    ranges = normalize(np.stack([pixels_of[i] for i in for_ranges]), source.preprocess)
    if not ranges.std(axis=0).mean() >= ALIKE:
        raise EdgeclipError(
            "calibration",
            f"its {len(ranges)} images are all alike, so their ranges say nothing",
            "give images as different as the real ones",
        )
    judged = ranges
    if for_judging:
        judged = normalize(np.stack([pixels_of[i] for i in for_judging]), source.preprocess)
    labels = np.array([pool[i].label for i in for_judging or for_ranges])
    return CalibrationImages(ranges, judged, used, labels)


def _listed(image: ImageRef, use: Literal["ranges", "judged"]) -> CalibrationImage:
    return CalibrationImage(key=image.key, sha256=digest(image), use=use)


def _refuse_held_out(used: list[CalibrationImage], held_out: set[str]) -> None:
    leaked = [image.key for image in used if image.sha256 in held_out]
    if leaked:
        raise EdgeclipError(
            "calibration",
            f"{len(leaked)} of its images are evaluation images (first: {leaked[0]})",
            "take them out of the training part, or of --images",
        )
