"""Which tar shards a recipe means: a glob, a brace range, or commands whose output is a tar.

    train/*.tar
    {00000..00099}.tar
    {a,b}-{0..9}.tar
    pipe:aws s3 cp s3://bucket/{00000..00099}.tar -

Two shards of one name are refused, in different folders too: an image's key is <shard>/<name>.
Commands run only where the recipe says `pipe: true`. Their output is kept below `cache/shards`,
because an image is read again in every epoch.
"""

import itertools
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgeclip import disk
from edgeclip.errors import EdgeclipError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
MAX_SHARDS = 1_000_000
DIGITS = 18
"""of a number in a range"""


def expand(pattern: str) -> list[str]:
    """Return every string that the braces of `pattern` stand for.

    A range keeps its leading zeros. Raises `EdgeclipError` for a range that runs backwards, and for
    more than `MAX_SHARDS`.
    """
    parts = BRACES.split(pattern)  # text, inside of braces, text, ...
    choices: list[Sequence[str]] = []
    for i, part in enumerate(parts):
        if i % 2:
            choices.append(_alternatives(part, pattern))
        else:
            choices.append([part])
        if math.prod(map(len, choices)) > MAX_SHARDS:
            raise _too_many(pattern)
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    """Return what one pair of braces stands for: a range of numbers, or a list of words."""
    match = RANGE.fullmatch(inside)
    if match is None:
        return inside.split(",")

    first, last = match.groups()
    if len(last) > DIGITS or len(first) > DIGITS or int(last) - int(first) >= MAX_SHARDS:
        raise _too_many(pattern)
    if int(first) > int(last):
        raise EdgeclipError(
            pattern, f"the range {{{inside}}} runs backwards", "write the smaller number first"
        )
    return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]


def _too_many(pattern: str) -> EdgeclipError:
    what = f"its braces stand for more than {MAX_SHARDS:,} shards"
    return EdgeclipError(pattern[:200], what, "name the shards by a glob, such as *.tar")


def find(root: Path, pattern: str, pipe: bool, cache: Path) -> list[Path]:
    """Return the shards that `pattern` means, in order. pipe: whether commands may run.

    Raises `EdgeclipError` when nothing matches, one of a range is missing, or a command fails.
    """
    shards: list[Path] = []
    if not pattern.startswith("pipe:"):
        for glob in expand(pattern):
            shards += matching(root, glob)
        return shards

    if not pipe:
        raise EdgeclipError(
            pattern,
            "is a command, and the recipe does not allow commands",
            "set pipe: true in its data, if you trust the command",
        )
    for command in expand(pattern.removeprefix("pipe:")):
        shards.append(_piped(command, cache))
    return shards


def matching(root: Path, glob: str) -> list[Path]:
    """Return the shards below `root` that a glob finds, 2.tar before 10.tar.

    Raises `EdgeclipError` where it finds none, or is no glob.
    """
    try:
        found = sorted(root.glob(glob), key=lambda p: (len(p.name), p.name))
    except (NotImplementedError, ValueError) as e:  # an absolute pattern; one such as **.tar
        raise EdgeclipError(
            glob, f"is no glob below {root} ({e})", "write it relative to that folder"
        ) from None
    if not found:
        raise EdgeclipError(root / glob, "no shard matches", "check the glob and the folder")
    return found


def _piped(command: str, cache: Path) -> Path:
    """Return the file below `cache` that holds a command's output, and run it where there is none.

    Raises `EdgeclipError` where it fails.
    """
    path = cache / "shards" / f"{disk.fingerprint(command)[:16]}.tar"
    if path.exists():
        return path

    with disk.new_file(path) as temporary, temporary.open("wb") as file:
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            shutil.copyfileobj(process.stdout, file, 1 << 20)
        if process.returncode:
            raise EdgeclipError(
                f"pipe:{command}",
                f"failed with exit code {process.returncode}",
                "read its message above, and run it by hand",
            )
    return path
