"""Which tar shards a recipe means: a glob, a brace range, or commands whose output is a tar.

    train/*.tar     {00000..00099}.tar     {a,b}-{0..9}.tar     pipe:aws s3 cp s3://bucket/{00000..00099}.tar -

Two shards of one name are refused, in different folders too: an image's key is <shard>/<name>.
Commands run only where the recipe says `pipe: true`. Their output is kept below `cache/shards`,
because an image is read again in every epoch.
"""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

from edgeclip import disk
from edgeclip.errors import EdgeclipError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> list[str]:
    """Every string that the braces of `pattern` stand for; a range keeps its leading zeros."""
    parts = BRACES.split(pattern)
    choices = []
    for text, inside in itertools.zip_longest(parts[::2], parts[1::2]):
        choices.append([text])
        if inside is None:
            continue
        if match := RANGE.fullmatch(inside):
            first, last = match.groups()
            if int(first) > int(last):
                raise EdgeclipError(
                    pattern,
                    f"the range {{{inside}}} runs backwards",
                    "write the smaller number first",
                )
            choices.append([f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)])
        else:
            choices.append(inside.split(","))
    return ["".join(c) for c in itertools.product(*choices)]


def find(root: Path, pattern: str, pipe: bool, cache: Path) -> list[Path]:
    """The shards in order. pipe: whether commands may run.

    Raises `EdgeclipError` when nothing matches, one of a range is missing, or a command fails.
    """
    if pattern.startswith("pipe:"):
        if not pipe:
            raise EdgeclipError(
                pattern,
                "is a command, and the recipe does not allow them",
                "set pipe: true in its data, if you trust it",
            )
        return [_piped(command, cache) for command in expand(pattern.removeprefix("pipe:"))]
    return [path for each in expand(pattern) for path in matching(root, each)]


def matching(root: Path, glob: str) -> list[Path]:
    """The shards below `root` that a glob finds, 2.tar before 10.tar. Raises `EdgeclipError` where
    it finds none, or is no glob."""
    try:
        found = sorted(root.glob(glob), key=lambda p: (len(p.name), p.name))
    except (
        NotImplementedError,
        ValueError,
    ) as e:  # pathlib's, for an absolute pattern and for one such as **.tar
        raise EdgeclipError(
            glob, f"is no glob below {root} ({e})", "write it relative to that folder"
        ) from None
    if not found:
        raise EdgeclipError(root / glob, "no shard matches", "check the glob and the folder")
    return found


def _piped(command: str, cache: Path) -> Path:
    path = cache / "shards" / f"{disk.fingerprint(command)[:16]}.tar"
    if not path.exists():
        with disk.new_file(path) as temporary, open(temporary, "wb") as f:
            done = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
            assert done.stdout is not None
            shutil.copyfileobj(done.stdout, f, 1 << 20)
            if code := done.wait():
                raise EdgeclipError(
                    f"pipe:{command}",
                    f"ended with code {code}",
                    "run it by hand: its message is above",
                )
    return path
