"""Damage every file of a run, a bundle and a cache, and ask every command that may read it.

Three damages: half of the file, a page of zeros in its middle, one flipped byte. Required is that
no command gives another number with exit code 0: it refuses the file by name, in one line; or its
answer and what it writes are those of the whole file, because it does not read it, makes it again
or reads what tells it apart. A traceback is a fault too.

    python benchmarks/damage.py --check
    python benchmarks/damage.py --only classify validate
"""

import collections
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import compare
import crash_points
import crash_stages
from crash_stages import BUNDLE, OF_BUNDLE, RUN

PAGE = 4096
OF_RUN = f"{RUN}/bundles/onnx-fp32"


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zeroed(content: bytes) -> bytes:
    """Of a file of less than two pages its middle third."""
    size = min(PAGE, max(1, len(content) // 3))
    start = (len(content) - size) // 2
    return content[:start] + bytes(size) + content[start + size :]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {"half": half, "zeroed": zeroed, "flipped": flipped}


class Reader(NamedTuple):
    name: str
    command: list[str]
    boxes: tuple[str, ...]
    """folders of which it may read every file"""


READERS = (
    Reader("classify", ["classify", "photo.png", "--bundle", OF_RUN, "--json"], (OF_RUN,)),
    Reader("classify, new words", ["classify", "photo.png", "--bundle", BUNDLE, "--labels", "a pear, a plum", "--json"], (BUNDLE,)),
    Reader("labels", ["labels", BUNDLE, "a pear, a plum", "--out", "new", "--json"], (BUNDLE,)),
    Reader("embed", ["embed", "photo.png", "--bundle", OF_RUN, "--out", "f.npy", "--json"], (OF_RUN,)),
    Reader("validate", ["validate", *OF_BUNDLE, "--json"], (RUN,)),
    Reader("evaluate", ["evaluate", RUN, "--protocol", "zero_shot", "--json"], (RUN, "shapes")),
    Reader("export", ["export", "--run", RUN, "--target", "onnx-fp32", "--out", "other"], (RUN,)),
    Reader("report", ["report", RUN, "--json"], (RUN,)),
    Reader("distill, finished", ["distill", "toy.yaml", "--json"], (RUN,)),
    # Not the class list and the prompts: of a new run they are the question itself.
    Reader("distill, cached", ["distill", "toy.yaml", "--out", "runs/again", "--json"], ("cache", "shapes/train", "shapes/test")),
)  # fmt: skip


class Outcome(NamedTuple):
    code: int
    answer: Any
    left: dict[str, str]
    """what the command wrote: path, to its digest without times"""


def outcome(reader: Reader, work: Path, before: dict[str, str]) -> tuple[Outcome, str]:
    """Run a command; return what came of it, and what it said."""
    done = crash_points.run(reader.command, work)
    answer: Any = done.answer
    if done.code == 0 and "--json" in reader.command:
        answer = crash_stages.without_measured(json.loads(done.answer))
    stage = crash_stages.Stage(reader.name, reader.command, "report")
    after = crash_stages.tree(work, stage)
    left = {name: digest for name, digest in after.items() if before.get(name) != digest}
    return Outcome(done.code, answer, left), done.said


def judge(found: Outcome, said: str, whole: Outcome, name: str) -> str:
    """Return 'refused', 'without effect', or what is wrong."""
    if found.code == 1 and "Error: " in said and "Traceback" not in said:
        return "refused"
    if Path(name).name in str(found.answer) and Path(name).name not in str(whole.answer):
        return "refused"  # a report goes on, and tells of that bundle why it may not ship
    if "Traceback" in said or found.code not in (0, 3, 4):
        return "traceback"
    left = {k: v for k, v in found.left.items() if k != name}
    expected = {k: v for k, v in whole.left.items() if k != name}
    if (found.code, found.answer, left) == (whole.code, whole.answer, expected):
        return "without effect"
    return "wrong"


def of_reader(reader: Reader, home: Path, every: int) -> dict[str, Any]:
    """Return how a command took each damage of each file; every: of how many files one."""
    work, start = home / "work", home / "report"
    crash_points.copy(start, work)
    stage = crash_stages.Stage(reader.name, reader.command, "report")
    before = crash_stages.tree(start, stage)
    whole, said = outcome(reader, work, before)
    if whole.code not in (0, 3, 4):
        raise RuntimeError(f"{reader.name}: exit code {whole.code}: {said[-2000:]}")
    counts: collections.Counter[str] = collections.Counter()
    faults = []
    files = [p for box in reader.boxes for p in sorted((start / box).rglob("*")) if p.is_file()]
    for path in files[::every]:
        name = path.relative_to(start).as_posix()
        content = path.read_bytes()
        for damage, change in DAMAGES.items():
            if not content:
                continue
            crash_points.copy(start, work)
            (work / name).write_bytes(change(content))
            found, said = outcome(reader, work, before)
            verdict = judge(found, said, whole, name)
            counts[verdict] += 1
            if verdict in ("wrong", "traceback"):
                faults.append(f"{verdict}: {damage} {name}: {said[-300:]}")
    names = ("refused", "without effect", "wrong", "traceback")
    return {"command": reader.name, "files": len(files), **{n: counts[n] for n in names}, "faults": faults}  # fmt: skip


def main() -> None:
    parser = common.arguments(__doc__)
    names = [reader.name for reader in READERS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    here = common.this_machine()
    only = ("embed",) if options.form == common.SMOKE else options.only
    every = {common.WHOLE: 1, common.QUICK: 5, common.SMOKE: 4}[options.form]
    crash_points.prepare()
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgeclip-damage-") as name:
        home = Path(name)
        crash_stages.make_starts(home)
        for reader in READERS:
            if reader.name in only:
                rows.append(of_reader(reader, home, every))
                print(*rows[-1].values(), flush=True)
    columns = ("command", "files", "refused", "without effect", "wrong", "traceback")
    common.table([[row[c] for c in columns] for row in rows], list(columns))
    required = []
    for row in rows:
        for fault in ("wrong", "traceback"):
            what = f"{row['command']}: {fault}"
            asked = sum(row[n] for n in columns[2:])
            required.append(compare.exact(what, row[fault], n=asked, at_most=0))
    common.finish({"benchmark": "damage", "commands": rows}, required, here, options)


if __name__ == "__main__":
    main()
