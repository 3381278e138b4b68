"""Generated images with captions, in WebDataset shards: enough data to run every joint of the chain
in seconds.

    python -m edgeclip.host.data.shapes .data/shapes

An image is one shape in one color ("a red circle") at a random place and size; its class is the
color and shape.
"""

import io
import random
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw

from edgeclip import disk

COLORS = ("red", "green", "blue", "black")
SHAPES = ("circle", "square", "triangle")
CLASSES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
PARTS = {"train": 192, "test": 600}


def draw(label: int, rng: random.Random, size: int = 72) -> Image.Image:
    """Return an image of class `label`, `size` pixels a side, with draws from `rng`."""
    color, shape = CLASSES[label].split()
    image = Image.new("RGB", (size, size), (rng.randint(180, 255),) * 3)
    side = rng.randint(size // 3, size // 2)
    x = rng.randint(4, size - side - 4)
    y = rng.randint(4, size - side - 4)

    box = (x, y, x + side, y + side)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon([(x, y + side), (x + side // 2, y), (x + side, y + side)], fill=color)
    return image


def write(folder: Path, seed: int = 0) -> None:
    """Write the shards and lists of CLIP_benchmark's layout below `folder`.

    They are train/0.tar, test/0.tar, classnames.txt and zeroshot_classification_templates.txt.
    """
    rng = random.Random(seed)
    for part, count in PARTS.items():
        _write_shard(folder / part / "0.tar", count, rng)
    disk.write_text(folder / "classnames.txt", "\n".join(CLASSES) + "\n")
    disk.write_text(folder / "zeroshot_classification_templates.txt", "a {c}\na photo of a {c}\n")


def _write_shard(path: Path, count: int, rng: random.Random) -> None:
    with disk.new_file(path) as temporary, tarfile.open(temporary, "w") as tar:
        for i in range(count):
            label = i % len(CLASSES)
            jpeg = io.BytesIO()
            draw(label, rng).save(jpeg, "JPEG", quality=92)
            _add(tar, f"{i:05d}.jpg", jpeg.getvalue())
            _add(tar, f"{i:05d}.cls", str(label).encode())
            _add(tar, f"{i:05d}.txt", f"a {CLASSES[label]}".encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m edgeclip.host.data.shapes FOLDER")
    write(Path(sys.argv[1]))
