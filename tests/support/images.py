"""What tests look at: made-up images, whole and broken."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def toy_image(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """Smooth random color: neighboring pixels agree, as in a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def truncated_jpeg(path: Path) -> Path:
    content = encoded(toy_image(1, 200, 160), "JPEG")
    path.write_bytes(content[: len(content) // 2])
    return path


def photos(folder: Path, count: int = 12) -> Path:
    """A folder of toy photos of two classes."""
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(encoded(toy_image(i)))
    return folder
