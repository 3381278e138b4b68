"""The images that a bundle lost or won, small enough for the page."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from edgeclip.device.evaluation import images_tar
from edgeclip.device.images import index_tar, read
from edgeclip.device.preprocess import open_image
from edgeclip.device.records import ChangedImage, ParityReport

SIDE = 96
"""px, of the longer side"""
QUALITY = 70
"""of the JPEG"""


class Shown(NamedTuple):
    """One changed image."""

    of: ChangedImage
    lost: bool
    """right before; else it was won"""
    uri: str
    """data: of a JPEG"""


def changed(run: Path, parity: ParityReport | None) -> list[Shown]:
    """Return the changed images of a parity report with their thumbnails.

    [] where there is no report, or the run's evaluation images are gone.
    """
    tar = images_tar(run / "evaluation")
    if parity is None or not parity.changed or not tar.exists():
        return []
    images = index_tar(tar)
    found = []
    for one in parity.changed:
        if 0 <= one.image < len(images):
            image = images[one.image]
            uri = _thumbnail(open_image(read(image), image.key))
            found.append(Shown(one, one.before == one.label, uri))
    return found


def _thumbnail(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
