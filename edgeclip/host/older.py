"""Read what edgeclip 0.1 wrote, in today's words; one function each.

What 0.1 wrote has no `format` number, or 1, and other names for some fields (`config.RENAMED`). A
bundle's manifest and the reports are read by edgeclip.device.
"""

from edgeclip import config
from edgeclip.disk import Json

MOVED = {"distill": ("qat", "quantize", "target"), "train": ("train", "first", "pretrain")}
"""block of a 0.1 recipe, to its name today, and one of its fields before and today"""


def recipe_description(value: Json) -> Json:
    """Return a run's recipe.json in today's words."""
    new: Json = {}
    for name, block in config.renamed(value).items():
        today, field, field_today = MOVED.get(name, (name, "", ""))
        if isinstance(block, dict) and field in block:
            block = {field_today if k == field else k: v for k, v in block.items()}
        new[today] = block
    return new


def student_description(value: Json) -> Json:
    """Return a student.json in today's words."""
    renamed: Json = config.renamed(value)
    return renamed
