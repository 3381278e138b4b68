"""Settings of stage 1 that are chosen among, in the order of their simplicity."""

from typing import Any

from msgspec.structs import replace

from edgeclip.host import recipe as R

STAGE_1: dict[str, dict[str, Any]] = {
    "labels alone": {},
    "no pull": {"toward_unadapted": 0.0},
    "pull .1": {"toward_unadapted": 0.1},
    "pull 1": {"toward_unadapted": 1.0},
    "margin 2": {"margin": 2.0},
    "margin 2, pull .1": {"margin": 2.0, "toward_unadapted": 0.1},
    "balanced": {},
    "balanced, pull 1": {"toward_unadapted": 1.0},
}
"""beside labels alone at a pull of .3"""


def settings(base: R.ResidualHead, name: str) -> R.ResidualHead:
    """The candidate's settings; the rest is the set's own."""
    own = R.SelfTraining(start=min(100, base.steps // 2)) if "balanced" in name else None
    plain = replace(base, toward_unadapted=0.3, margin=None, self_training=own)
    return replace(plain, **STAGE_1[name])
