"""Photos that are stored turned, as phones store them: nobody sees it, and accuracy falls."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgeclip.device.image_file import opened
from edgeclip.device.images import ImageRef, read
from edgeclip.device.preprocess import TURNS, orientation
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

LOOKED_AT = 500
"""images of each set whose headers are read before the work"""


def say_turned(sets: Iterable[Sequence[ImageRef]], exif: bool) -> None:
    """Say once how many photos are stored turned, as phones store them, where none is turned back.

    exif: the preprocess's own; true: nothing is said. Reads headers, of at most `LOOKED_AT` images
    of each set, spread over it; decodes none.
    """
    if exif:
        return
    looked = 0
    turned = 0
    for images in sets:
        for image in images[:: math.ceil(len(images) / LOOKED_AT) or 1]:
            try:
                turned += _orientation(image) in TURNS
            except EdgeclipError:  # whoever decodes it counts it
                continue
            looked += 1
    if turned:
        say(
            f"{turned} of {looked} images looked at are stored turned (EXIF orientation), and are "
            "taken as they are stored, as open_clip takes them; to have them turned, train with "
            "preprocess: {exif: true} in the recipe"
        )


def _orientation(image: ImageRef) -> int:
    """Return an image's EXIF orientation, 1 to 8. Raises `EdgeclipError` for an unreadable one."""
    file: Path | bytes = Path(image.path)  # PIL reads a file's header alone
    if image.size >= 0:
        file = read(image)
    with opened(file, image.key) as header:
        return orientation(header)
