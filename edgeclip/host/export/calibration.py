"""Which training pictures int8 takes its ranges from, and which others its candidates are judged on.

Both are drawn by the target's seed from the training part, never overlap, and are named with their sha256 in the
bundle. What would quietly spoil the result is refused before anything is written: fewer pictures than asked for,
pictures that are all alike (their ranges say nothing of others), and pictures that the student is evaluated on.
"""

from typing import NamedTuple

import numpy as np

from edgeclip.device.pictures import Picture, digest, read, stream
from edgeclip.device.preprocess import Preprocess, normalise, open_picture, to_pixels
from edgeclip.device.target import Calibration
from edgeclip.errors import EdgeclipError
from edgeclip.host.export.source import Source

ALIKE = 0.02
"""mean over pixels of the standard deviation across pictures, in normalised units; real photos have about 1"""


class Pictures(NamedTuple):
    ranges: np.ndarray
    """float32 [n, 3, H, W]: what calibration runs"""
    judged: np.ndarray
    """float32 [m, 3, H, W]: what candidates are compared on"""
    used: list[dict[str, str]]
    """key, sha256 and use ('ranges' or 'judged') of each, as the bundle lists them"""
    labels: np.ndarray
    """int [m]: class index of each judged picture, -1 where it has none that training may know"""


def draw(source: Source, spec: Calibration) -> Pictures:
    """Raises `EdgeclipError` for too few, unreadable, uniform or held-out pictures."""
    pool = source.calibration()
    wanted = spec.pictures + spec.judged_on
    if len(pool) < wanted:
        raise EdgeclipError(
            "calibration",
            f"the target asks for {spec.pictures} training pictures and {spec.judged_on} to judge on, and there are {len(pool)}",
            "give more with --images DIR, or lower both in a target of your own",
        )
    order = np.random.default_rng(spec.seed).permutation(len(pool))
    parts = {
        "ranges": sorted(order[: spec.pictures]),
        "judged": sorted(order[spec.pictures : wanted]),
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
            f"{len(leaked)} of its pictures are evaluation pictures (first: {leaked[0]})",
            "take them out of the training part, or of --images",
        )
    ranges = _load(chosen["ranges"], source.preprocess)
    if ranges.std(axis=0).mean() < ALIKE:
        raise EdgeclipError(
            "calibration",
            f"its {len(ranges)} pictures are all alike, so their ranges say nothing",
            "give pictures as different as the real ones",
        )
    judged = _load(chosen["judged"], source.preprocess) if chosen["judged"] else ranges
    return Pictures(
        ranges, judged, used, np.array([p.label for p in chosen["judged"] or chosen["ranges"]])
    )


def _load(pictures: list[Picture], preprocess: Preprocess) -> np.ndarray:
    skipped: list[str] = []
    rows = [
        normalise(pixels, preprocess)
        for _, pixels in stream(
            range(len(pictures)),
            lambda i: to_pixels(open_picture(read(pictures[i]), pictures[i].key), preprocess),
            32,
            skipped,
        )
    ]
    if skipped:  # the bundle lists them, so each must be one
        raise EdgeclipError(
            "calibration",
            f"{len(skipped)} of {len(pictures)} pictures are unreadable (first: {skipped[0]})",
            "repair or remove them",
        )
    return np.concatenate(rows)
