"""Which training images int8 takes its ranges from, and which others its candidates are judged on.

Both are drawn by the target's seed from the training part, never overlap, and are named with their sha256 in the
bundle. What would quietly spoil the result is refused before anything is written: fewer images than asked for,
images that are all alike (their ranges say nothing of others), and images that the student is evaluated on.
"""

from typing import NamedTuple

import numpy as np

from edgeclip.device.images import ImageRef, digest, read, stream
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.device.target import Calibration
from edgeclip.errors import EdgeclipError
from edgeclip.host.export.source import Source

ALIKE = 0.02
"""mean over pixels of the standard deviation across images, in normalized units; real photos have about 1"""


class CalibrationImages(NamedTuple):
    ranges: np.ndarray
    """float32 [n, 3, H, W]: what calibration runs"""
    judged: np.ndarray
    """float32 [m, 3, H, W]: what candidates are compared on"""
    used: list[dict[str, str]]
    """key, sha256 and use ('ranges' or 'judged') of each, as the bundle lists them"""
    labels: np.ndarray
    """int [m]: class index of each judged image, -1 where it has none that training may know"""


def draw(source: Source, spec: Calibration) -> CalibrationImages:
    """Raises `EdgeclipError` for too few, unreadable, uniform or held-out images."""
    pool = source.calibration()
    wanted = spec.images + spec.judged_on
    if len(pool) < wanted:
        raise EdgeclipError(
            "calibration",
            f"the target asks for {spec.images} training images and {spec.judged_on} to judge on, and there are {len(pool)}",
            "give more with --images DIR, or lower both in a target of your own",
        )
    order = np.random.default_rng(spec.seed).permutation(len(pool))
    parts = {
        "ranges": sorted(order[: spec.images]),
        "judged": sorted(order[spec.images : wanted]),
    }
    chosen = {name: [pool[i] for i in part] for name, part in parts.items()}
    used = [
        {"key": p.key, "sha256": digest(p), "use": name}
        for name, part in chosen.items()
        for p in part
    ]
    held_out = source.evaluation_hashes()
    if leaked := [u["key"] for u in used if u["sha256"] in held_out]:
        raise EdgeclipError(
            "calibration",
            f"{len(leaked)} of its images are evaluation images (first: {leaked[0]})",
            "take them out of the training part, or of --images",
        )
    ranges = _load(chosen["ranges"], source.preprocess)
    if ranges.std(axis=0).mean() < ALIKE:
        raise EdgeclipError(
            "calibration",
            f"its {len(ranges)} images are all alike, so their ranges say nothing",
            "give images as different as the real ones",
        )
    judged = _load(chosen["judged"], source.preprocess) if chosen["judged"] else ranges
    return CalibrationImages(
        ranges, judged, used, np.array([p.label for p in chosen["judged"] or chosen["ranges"]])
    )


def _load(images: list[ImageRef], preprocess: Preprocess) -> np.ndarray:
    skipped: list[str] = []
    rows = [
        normalize(pixels, preprocess)
        for _, pixels in stream(
            range(len(images)),
            lambda i: to_pixels(open_image(read(images[i]), images[i].key), preprocess),
            32,
            skipped,
        )
    ]
    if skipped:  # the bundle lists them, so each must be one
        raise EdgeclipError(
            "calibration",
            f"{len(skipped)} of {len(images)} images are unreadable (first: {skipped[0]})",
            "repair or remove them",
        )
    return np.concatenate(rows)
