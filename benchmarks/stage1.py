"""Settings of stage 1 that folds choose among, and which one a fold has chosen."""

from pathlib import Path
from typing import Any

import choose_table
import methods_table
from msgspec.structs import replace

from edgeclip.host import recipe as R

CHOICES = Path(__file__).parent.parent / "results" / "choices.jsonl"
STAGE_1: dict[str, dict[str, Any]] = {
    "labels alone": {},
    "no pull": {"toward_unadapted": 0.0},
    "pull .1": {"toward_unadapted": 0.1},
    "pull 1": {"toward_unadapted": 1.0},
    "pull 3": {"toward_unadapted": 3.0},
    "margin 2": {"margin": 2.0},
    "margin 2, pull .1": {"margin": 2.0, "toward_unadapted": 0.1},
    "others 1": {"others": 1.0},
    "balanced": {},
    "balanced, pull 1": {"toward_unadapted": 1.0},
    "balanced, pull 3": {"toward_unadapted": 3.0},
    "balanced, others 1": {"others": 1.0},
    "balanced, others 1, pull 1": {"others": 1.0, "toward_unadapted": 1.0},
}
"""beside labels alone at a pull of .3"""


RECIPES = "as in the recipe"


def chosen(name: str, fold: int, log: Path = CHOICES) -> str | None:
    """The candidate that a fold of a set prefers by its own labels; None: it was not asked."""
    return choose_table.preferred(methods_table.read(log), "stage1").get(name, {}).get(fold)


def settings(base: R.ResidualHead, name: str) -> R.ResidualHead:
    """The candidate's settings; the rest is the set's own."""
    own = R.SelfTraining(start=min(100, base.steps // 2)) if "balanced" in name else None
    plain = replace(base, toward_unadapted=0.3, margin=None, others=0.0, self_training=own)
    return replace(plain, **STAGE_1[name])
