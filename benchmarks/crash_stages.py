"""What crash.py kills: every command that writes, on a toy of seconds, and what it must leave."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import crash_points
import toy

from edgeclip import disk

RECIPE = toy.RECIPE.replace("epochs: 1", "epochs: 1, checkpoint_every: 2")
CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
BUNDLE = "clip/onnx-fp32"
RUN = "runs/toy"
MEASURED = (
    "seal",
    "seconds",
    "_s",
    "_ms",
    "when",
    "load_average",
    "temperature_c",
    "memory",
    "mib",
    "busy",
)
"""ends of keys whose values a clock or a meter gives: they differ from run to run"""


class Stage(NamedTuple):
    name: str
    command: list[str]
    start: str
    """the folder it starts from: data, run, bundles, report"""
    whole: Callable[[Path], bool] = lambda folder: True
    """whether what was finished before is still whole, old or new"""
    names_alone: bool = False
    """what it writes holds times, so only the files' names are compared"""
    processes: int = 1
    board: str | None = None
    """whose side is killed where it needs a board: host, board"""


def _bundle_is_whole(folder: Path) -> bool:
    manifest = disk.read_manifest(folder / BUNDLE, "bundle")
    disk.verify(folder / BUNDLE, manifest)
    return True


EXPORT = ["export", "--run", RUN, "--target", "onnx-fp32"]
OF_BUNDLE = ["--bundle", f"{RUN}/bundles/onnx-fp32", "--device", "host-cpu"]
ON_BOARD = ["validate", "--bundle", f"{RUN}/bundles/onnx-fp32", "--device", "board.yaml"]
STAGES = (
    Stage("init", ["init", "photos", "--out", "mine.yaml"], "data"),
    Stage("cache build", ["cache", "build", "toy.yaml"], "data"),
    Stage("distill", ["distill", "toy.yaml"], "data"),
    Stage("distill, 2 processes", ["distill", "toy.yaml"], "data", processes=2),
    Stage("distill --fresh", ["distill", "toy.yaml", "--fresh"], "run"),
    Stage("export", EXPORT, "run"),
    Stage(
        "labels --in-place",
        ["labels", BUNDLE, "a pear, a plum", "--in-place"],
        "bundles",
        _bundle_is_whole,
    ),
    Stage("labels --out", ["labels", BUNDLE, "a pear, a plum", "--out", "new"], "bundles"),
    Stage("embed", ["embed", "photo.png", "--bundle", BUNDLE, "--out", "f.npy"], "bundles"),
    Stage("conformance", ["conformance", BUNDLE, "--pack", "pack", "--keep", "kept"], "bundles"),
    Stage("validate", ["validate", *OF_BUNDLE], "bundles", names_alone=True),
    Stage(
        "bench", ["bench", *OF_BUNDLE, "--scenario", "single_stream"], "bundles", names_alone=True
    ),
    Stage("validate on a board", ON_BOARD, "report", names_alone=True, board="host"),
    Stage("validate on a board, there", ON_BOARD, "report", names_alone=True, board="board"),
    Stage("evaluate", ["evaluate", RUN, "--protocol", "zero_shot"], "run"),
    Stage("report", ["report", RUN], "report", names_alone=True),
)


def make_starts(home: Path) -> None:
    """Write the folders that stages start from, each with all that comes before it."""
    work = home / "work"
    work.mkdir()
    toy.write_shards(work / "shapes")
    text = RECIPE.replace("ROOT", "shapes").replace("CONFIG", json.dumps(toy.CONFIG))
    (work / "toy.yaml").write_text(text)
    disk.write_json(work / "clip.json", CLIP)
    _photos(work)
    crash_points.copy(work, home / "data")
    _must(["distill", "toy.yaml"], work)
    crash_points.copy(work, home / "run")
    _must(EXPORT, work)
    words = ["--labels", "an apple, a pear", "--out", "clip"]
    model = ["--model", "clip.json", "--weights", "random", "--target", "onnx-fp32"]
    _must(["export", *model, *words], work)
    crash_points.copy(work, home / "bundles")
    _must(["validate", *OF_BUNDLE], work)
    crash_points.copy(work, home / "report")


def _photos(work: Path) -> None:
    import random

    from edgeclip.host.data import shapes

    rng = random.Random(0)
    shapes.draw(0, rng).save(work / "photo.png")
    for label in range(2):
        folder = work / "photos" / shapes.CLASSES[label]
        folder.mkdir(parents=True)
        for i in range(20):
            shapes.draw(label, rng).save(folder / f"{i}.png")


def _must(command: list[str], work: Path) -> None:
    done = crash_points.run(command, work)
    if done.code not in (0, 3, 4):
        raise RuntimeError(f"{' '.join(command)}: exit code {done.code}: {done.said[-2000:]}")


def tree(folder: Path, stage: Stage) -> dict[str, str]:
    """Return {relative path: digest} of what lies below a folder, hidden names included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = "" if stage.names_alone else _digest(path)
    return found


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):  # a damaged one is compared by its bytes
            content = json.dumps(without_measured(json.loads(content))).encode()
    return hashlib.sha256(content).hexdigest()


def without_measured(value: Any) -> Any:
    """Return JSON without what a clock gives, and without the hashes of files that hold such."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith(MEASURED)}
        return {k: without_measured(v) for k, v in kept.items() if k != "files"}
    if isinstance(value, list):
        return [without_measured(v) for v in value]
    return value
