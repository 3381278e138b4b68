"""How well copies of training images are found, and how often another photo is taken for one.

On the photo sets, and on OpenMoji's drawings where these are installed, with the hashes that
`distill` keeps (edgeclip/host/evaluation/overlap.py):

    found      copies of images, re-encoded or resized, that are taken for copies: at least 95 %
    false      pairs of different images of the set that are taken for copies, for each image: at most 1 %

Photos that the set itself holds twice (equal bytes) are no pair of different images.

    python benchmarks/overlap.py --data clothing=DIR --data grocery=DIR --check
"""

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import compare
import numpy as np
from PIL import Image, ImageOps

from edgeclip.device.images import ImageRef, read
from edgeclip.device.preprocess import open_image
from edgeclip.host import data, recipe
from edgeclip.host.evaluation import overlap

COUNT = {"whole": 1000, "quick": 100, "smoke": 8}
FOUND, FALSE = 0.95, 0.01


def jpeg(quality: int, scale: float = 1.0) -> Callable[[Image.Image], bytes]:
    def encode(image: Image.Image) -> bytes:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        out = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality)
        return out.getvalue()

    return encode


def webp(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80)
    return out.getvalue()


COPIES = {
    "JPEG 95": jpeg(95),
    "JPEG 80": jpeg(80),
    "JPEG 60": jpeg(60),
    "half the size": jpeg(90, 0.5),
    "WebP 80": webp,
}


def images_of(name: str, root: str) -> list[ImageRef]:
    """All images of a set's training and test parts."""
    asked = recipe.load(Path(__file__).parent.parent / f"recipes/{name}.yaml", (f"{name}={root}",))
    loaded = data.load(asked.data, Path(tempfile.gettempdir()) / "overlap-index")
    return [*loaded.train, *(image for s in loaded.evaluation for image in s.images)]


def drawn(count: int, folder: Path) -> list[ImageRef]:
    """Generated shapes, where no photos are given: for the smoke form."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((96, 96))
        path = folder / f"{i}.png"
        pixels.save(path)
        found.append(ImageRef(path.name, str(path)))
    return found


def measured(images: list[ImageRef], count: int, folder: Path) -> dict[str, float]:
    """Share of the copies that are found, by kind, and of images with a false match."""
    rng = np.random.default_rng(0)
    places, known = overlap.hash_images(images, "hashes")
    chosen = rng.permutation(len(places))[:count]
    found: dict[str, float] = {}
    for kind, encode in COPIES.items():
        hits = 0
        for i in chosen:
            upright = ImageOps.exif_transpose(open_image(read(images[places[i]]))).convert("RGB")
            path = folder / "copy"
            path.write_bytes(encode(upright))
            own = overlap.Hashes(*(column[i : i + 1] for column in known))
            hits += bool(overlap.compare([ImageRef("copy", str(path))], own, "copy").places)
        found[kind] = hits / len(chosen)
    found["false"] = float(np.mean([_false(known, int(i)) for i in chosen]))
    return found


def _false(known: overlap.Hashes, i: int) -> bool:
    """Whether an image is taken for a copy of one with other bytes."""
    others = known.content != known.content[i]
    rest = overlap.Hashes(*(column[others] for column in known))
    return overlap.looks_like_any(known.perceptual[i], known.thumbnail[i], rest)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", action="append", default=[], help="NAME=DIR")
    options = parser.parse_args()
    here = common.this_machine()
    count = COUNT[options.form]
    required, rows = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sets = {n: images_of(n, r) for n, _, r in (d.partition("=") for d in options.data)}
        if not sets and options.form != common.SMOKE:
            sys.exit("give --data NAME=DIR")
        for name, images in (sets or {"shapes": drawn(count, folder)}).items():
            rows[name] = shares = measured(images, count, folder)
            n = min(count, len(images))
            for kind in COPIES:
                what = f"{name}, {kind}: copies found"
                required.append(compare.exact(what, shares[kind], n=n, at_least=FOUND))
            what = f"{name}: images taken for a copy of another"
            required.append(compare.exact(what, shares["false"], n=n, at_most=FALSE))
    common.finish({"benchmark": "overlap", "shares": rows}, required, here, options)


if __name__ == "__main__":
    main()
