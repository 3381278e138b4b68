"""Slices that the data itself names: the images of one camera, one site, one folder below a class.

A field of a sample's .json member makes the slices "camera: front", "camera: rear"; the folder
between a class's own and the photo makes "folder: night". An image without that field, or directly
in its class's folder, is in no slice.
"""

import collections
from collections.abc import Sequence
from pathlib import Path

from edgeclip import disk
from edgeclip.device import tar_file
from edgeclip.device.images import ImageRef, Skipped, samples
from edgeclip.device.tar_file import Member
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.progress import say_once
from edgeclip.text_file.parser import parse_json

MOST_BYTES = 2**20
"""of a sample's .json member"""
MOST_FIELDS = 30
"""that a message names"""
MOST_NAME = 1000
"""characters of a value"""


def of_path(below: Path) -> tuple[str, ...]:
    """Return the slices of a photo by its path below its class's folder."""
    if len(below.parts) < 2:
        return ()
    return (f"folder: {below.parts[0]}",)


def of_shards(
    images: list[ImageRef], shards: Sequence[Path], fields: Sequence[str]
) -> list[ImageRef]:
    """Return the images of shards with their slices, one for each of the fields that they have.

    Raises `EdgeclipError` for a field that no image has, for a value that is no word (a text, a
    whole number, true or false), and for a .json member that is no JSON object.
    """
    if not fields:
        return images
    found: dict[str, disk.Json] = {}
    for shard in shards:
        found |= _metadata(shard)
    named = [image._replace(slices=_slices(image, found, fields)) for image in images]
    for field in fields:
        _refuse_missing(named, found, field)
    return named


def _metadata(shard: Path) -> dict[str, disk.Json]:
    """Return the object in each sample's .json member by the image's key."""
    skipped: Skipped = collections.Counter()
    found = {}
    with tar_file.open_file(shard) as file:
        for key, members in samples(shard, skipped).items():
            member = members.get(".json")
            if member is None:
                continue
            where = f"{shard} ({member.name})"
            _refuse_large(member, where)
            file.seek(member.offset)
            value = parse_json(file.read(member.size), where, "write a JSON object, or remove it")
            if not isinstance(value, dict):
                raise EdgeclipError(where, "is no JSON object", "write a JSON object, or remove it")
            found[f"{shard.stem}/{key}"] = value
    return found


def _refuse_large(member: Member, where: str) -> None:
    if not member.is_file or member.size > MOST_BYTES:
        what = f"is a link, a device, a sparse file or more than {MOST_BYTES:,} bytes"
        raise EdgeclipError(where, what, "write a JSON object of few fields")


def _slices(image: ImageRef, found: dict[str, disk.Json], fields: Sequence[str]) -> tuple[str, ...]:
    own = found.get(image.key, {})
    named = []
    for field in fields:
        word = _word(own.get(field), f"{image.path} ({image.key}.json): {field}")
        if word:
            named.append(f"{field}: {word}")
    return tuple(named)


def _word(value: object, where: str) -> str:
    """Return a value as a word; empty: it names nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int)) and len(str(value)) <= MOST_NAME:
        return str(value).strip()
    what = f"is no text of at most {MOST_NAME:,} characters, whole number, true or false"
    raise EdgeclipError(where, what, "name a field of few values in data.slices")


def _refuse_missing(images: list[ImageRef], found: dict[str, disk.Json], field: str) -> None:
    """Refuse a field that no image has; say how many have none."""
    having = 0
    for image in images:
        having += any(name.startswith(f"{field}: ") for name in image.slices)
    if not having:
        known = sorted({name for own in found.values() for name in own})[:MOST_FIELDS]
        do = "give test samples a .json member with it"
        if known:
            do = did_you_mean(field, known)
        raise EdgeclipError(f"data.slices: {field}", "no test image has this field", do)
    if having < len(images):
        lacking = len(images) - having
        say_once(f"data.slices: {field}: {lacking:,} of {len(images):,} test images have none")
