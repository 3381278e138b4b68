"""What `validate` compares a bundle with: images, and the float student's features of them.

evaluation/images.tar          the images' own bytes, in order (pictures.tar in runs of 0.1)
           image_features.npy  [n, D] float32, the student's unit features of them
           evaluation.json     labels, each set's name, note, classes and rows, sha256 of every
                               image that was held out
"""

import io
import random
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgeclip import disk
from edgeclip.device.images import ImageRef, digest, read
from edgeclip.host.data import Dataset, EvaluationSet

SEED = 0
"""of the choice among more images than are kept"""


class ParityImage(NamedTuple):
    """An image that was scored."""

    of: EvaluationSet
    image: ImageRef
    features: np.ndarray
    """[D], the float student's"""


def write_parity_set(
    folder: Path, images: list[ParityImage], data: Dataset, max_images: int
) -> None:
    """Write the evaluation folder; of more than `max_images`, always the same choice is kept."""
    held_out = set()
    for scored in images:
        if not scored.of.seen:
            held_out.add(digest(scored.image))
    if len(images) > max_images:
        places = random.Random(SEED).sample(range(len(images)), max_images)
        images = [images[i] for i in sorted(places)]
    sets = []
    for s in data.evaluation:
        rows = [i for i, p in enumerate(images) if p.of is s]
        sets.append(
            {"name": s.name, "note": s.note, "rows": rows, "classes": s.classes, "role": s.role}
        )
    record = {
        "labels": [p.image.label for p in images],
        "class_names": data.classes,
        "sets": sets,
        "held_out": sorted(held_out),
    }
    with disk.new_folder(folder) as temporary:
        _write_tar(temporary / "images.tar", images)
        features = np.stack([p.features for p in images])
        disk.write_array(temporary / "image_features.npy", features)
        disk.write_json(temporary / "evaluation.json", record)
        facts = {"license": data.license, "images": len(images)}
        disk.write_manifest(temporary, "evaluation", facts)


def _write_tar(path: Path, images: list[ParityImage]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, (_, image, _) in enumerate(images):
            content = read(image)
            suffix = Path(image.key).suffix or ".jpg"
            member = tarfile.TarInfo(f"{i:06d}{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
