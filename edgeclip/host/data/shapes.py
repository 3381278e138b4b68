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
PARTS = {"train": 192, "test": 384}


def draw(label: int, rng: random.Random, size: int = 72) -> Image.Image:
    color, shape = CLASSES[label].split()
    image = Image.new("RGB", (size, size), (rng.randint(180, 255),) * 3)
    side = rng.randint(size // 3, size // 2)
    x, y = rng.randint(4, size - side - 4), rng.randint(4, size - side - 4)
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
    """CLIP_benchmark's layout below `folder`: train/0.tar, test/0.tar, classnames.txt,
    zeroshot_classification_templates.txt."""
    rng = random.Random(seed)
    for part, count in PARTS.items():
        with (
            disk.new_file(folder / part / "0.tar") as temporary,
            tarfile.open(temporary, "w") as tar,
        ):
            for i in range(count):
                label = i % len(CLASSES)
                jpeg = io.BytesIO()
                draw(label, rng).save(jpeg, "JPEG", quality=92)
                for suffix, content in (
                    (".jpg", jpeg.getvalue()),
                    (".cls", str(label).encode()),
                    (".txt", f"a {CLASSES[label]}".encode()),
                ):
                    member = tarfile.TarInfo(f"{i:05d}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    disk.write_text(folder / "classnames.txt", "\n".join(CLASSES) + "\n")
    disk.write_text(folder / "zeroshot_classification_templates.txt", "a {c}\na photo of a {c}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m edgeclip.host.data.shapes FOLDER")
    write(Path(sys.argv[1]))
