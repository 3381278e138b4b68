"""What an implementation makes of the golden images and strings, in a layout that any language can
write. docs/conformance.md describes both folders.

    PACK/manifest.json          images and strings by kind, and what the pack was made for
    PACK/images/                the golden images' own files
    PACK/reference/             answers of the reference; a board does not get them
    PACK/reference/levels.npy   float32 [256, 3], what the reference makes of each level

    ANSWERS/images/NAME.npy     the image encoder's input: float32 [3, S, S], or uint8 [S, S, 3]
    ANSWERS/ids.json            {NAME: [ids]}, padded with 0 or not
    ANSWERS/refused.json        {NAME: why}, where the implementation refused some; else absent

`answer` is this project's own implementation, `read_answers` reads anyone's, and the reference's
answers have the very same layout.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.preprocess import Preprocess, normalize
from edgeclip.device.records import FORMAT, Record, from_json, to_json
from edgeclip.errors import EdgeclipError

KIND = "conformance pack"
REFERENCE = "reference"
LEVELS = f"{REFERENCE}/levels.npy"
ANSWERS = "conformance answers"
AGAIN = "write it again, as docs/conformance.md says"
Refusals = dict[str, str]
"""name of an image or a string, to why an implementation refused it"""


class PackedImage(Record):
    name: str
    kind: str
    file: str
    """relative path in the pack"""


class PackedText(Record):
    name: str
    kind: str
    text: str


class MadeFor(Record):
    """What of a bundle decides the reference's answers: another value is another pack."""

    preprocess: Preprocess
    tokenizer: str | None
    """whose ids are the reference; null: no strings are compared"""
    context_length: int | None
    """tokens; null: no strings are compared"""


class PackManifest(Record, kw_only=True):
    """manifest.json of a conformance pack."""

    kind: Literal["conformance pack"] = "conformance pack"
    format: int = FORMAT
    made_for: MadeFor
    no_texts: str | None = None
    """why no strings are compared; null: they are"""
    versions: dict[str, str]
    """of the libraries that gave the reference's answers"""
    images: list[PackedImage]
    left_out: dict[str, str] = {}
    """golden images that the reference itself refuses, to why"""
    texts: list[PackedText]
    files: dict[str, str] = {}
    """relative path to sha256"""


class Pack(NamedTuple):
    folder: Path
    manifest: PackManifest

    @property
    def questions(self) -> dict[str, str]:
        """The files without the reference's answers: what an implementation has to see."""
        files = self.manifest.files
        return {name: digest for name, digest in files.items() if name.startswith("images/")}


class Answers(NamedTuple):
    images: dict[str, np.ndarray]
    """name to the encoder's input: float32 [3, S, S] normalized, or uint8 [S, S, 3]"""
    ids: dict[str, list[int]]
    """name to token ids, without the padding"""
    refused: Refusals


def load_pack(folder: Path, answered: bool = True) -> Pack:
    """Return the pack at `folder`. answered: with the reference's answers, which no board has.

    Raises `EdgeclipError` for another folder, and for one whose files were changed.
    """
    manifest = from_json(disk.read_manifest(folder, KIND), PackManifest, folder)
    pack = Pack(folder, manifest)
    files = manifest.files if answered else pack.questions
    disk.verify_files(folder, files, KIND)
    return pack


def answer(bundle: Bundle, pack: Pack) -> Answers:
    """Return what the bundle's own preprocess and tokenizer make of the pack on this machine.

    These are the calls that `classify` makes; no encoder is opened.
    """
    found = Answers({}, {}, {})
    for image in pack.manifest.images:
        try:
            pixels = bundle.pixels(pack.folder / image.file)
        except EdgeclipError as e:
            found.refused[image.name] = str(e)
            continue
        found.images[image.name] = normalize(pixels[None], bundle.preprocess)[0]

    for text in pack.manifest.texts:
        try:
            ids = bundle.token_ids([text.text])[0]
        except EdgeclipError as e:
            found.refused[text.name] = str(e)
            continue
        found.ids[text.name] = without_padding(ids.tolist())
    return found


def without_padding(ids: list[int]) -> list[int]:
    """Return ids up to the last one that is not 0."""
    end = len(ids)
    while end and ids[end - 1] == 0:
        end -= 1
    return ids[:end]


# --- over a link


def to_link(answers: Answers) -> disk.Json:
    """Return what goes over the link beside the images."""
    return {"ids": answers.ids, "refused": answers.refused}


def from_link(answer: disk.Json, images: dict[str, np.ndarray]) -> Answers:
    """Return what a board answered, from what came over the link."""
    return Answers(images, answer["ids"], answer["refused"])


# --- on disk


def write_answers(folder: Path, answers: Answers) -> None:
    """Write answers to a new folder. Raises `EdgeclipError` where something else lies there."""
    with disk.new_folder(folder) as temporary:
        put_answers(temporary, answers)
        disk.write_manifest(temporary, ANSWERS, {"format": FORMAT})


def put_answers(folder: Path, answers: Answers) -> None:
    """Write the files of answers into a folder that is there."""
    for name, array in answers.images.items():
        disk.write_array(folder / "images" / f"{name}.npy", array)
    disk.write_json(folder / "ids.json", answers.ids)
    if answers.refused:
        disk.write_json(folder / "refused.json", answers.refused)


def read_answers(folder: Path, pack: Pack) -> Answers:
    """Return the answers in a folder, which another implementation may have written.

    Raises `EdgeclipError` for one that is missing, of another shape, or not finite, by its name.
    """
    if not folder.is_dir():
        raise EdgeclipError(folder, "there is no such folder", "check the path")
    found = Answers({}, {}, _refusals(folder / "refused.json"))
    missing = []
    for image in pack.manifest.images:
        file = folder / "images" / f"{image.name}.npy"
        if file.exists():
            found.images[image.name] = _tensor(file, pack.manifest.made_for.preprocess.size)
        elif image.name not in found.refused:
            missing.append(f"images/{image.name}.npy")

    ids = {}
    texts = pack.manifest.texts
    if texts and (folder / "ids.json").exists():
        ids = _ids(folder / "ids.json")
    elif texts:
        missing.append("ids.json")
        texts = []
    for text in texts:
        if text.name in ids:
            found.ids[text.name] = _row(folder / "ids.json", text.name, ids[text.name], pack)
        elif text.name not in found.refused:
            missing.append(f"'{text.name}' in ids.json")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EdgeclipError(folder, f"has no {missing[0]}{more}", f"{AGAIN}, or in refused.json")
    return found


def _refusals(file: Path) -> Refusals:
    if not file.exists():
        return {}
    return _convert(file, disk.read_json(file), Refusals, "a mapping of names to reasons")


def _ids(file: Path) -> dict[str, list[int]]:
    return _convert(file, disk.read_json(file), dict[str, list[int]], "a mapping of names to ids")


def _convert(file: Path, value: Any, kind: Any, called: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise EdgeclipError(file, f"is not {called} ({e})", AGAIN) from None


def _row(file: Path, name: str, ids: list[int], pack: Pack) -> list[int]:
    length = pack.manifest.made_for.context_length
    assert length is not None  # the pack has strings
    if len(ids) > length:
        what = f"'{name}' has {len(ids)} ids, the text encoder takes {length}"
        raise EdgeclipError(file, what, AGAIN)
    if min(ids, default=0) < 0:
        raise EdgeclipError(file, f"'{name}' has a negative id", AGAIN)
    return without_padding(ids)


def _tensor(file: Path, size: int) -> np.ndarray:
    """Return float32 [3, S, S] or uint8 [S, S, 3]."""
    try:
        array = disk.read_array(file)
    except (OSError, ValueError, EOFError) as e:
        raise EdgeclipError(file, f"not a readable .npy file ({e})", AGAIN) from None
    wanted = {"float32": (3, size, size), "uint8": (size, size, 3)}
    if wanted.get(array.dtype.name) != array.shape:
        what = f"is {array.dtype} {list(array.shape)}, not float32 [3, {size}, {size}]"
        raise EdgeclipError(file, f"{what} or uint8 [{size}, {size}, 3]", AGAIN)
    if not np.isfinite(array).all():
        raise EdgeclipError(file, "has values that are not finite", AGAIN)
    return array


def describe(manifest: PackManifest) -> disk.Json:
    """Return the manifest as `disk.write_manifest` takes it."""
    content: disk.Json = to_json(manifest)
    del content["kind"], content["files"]
    return content
