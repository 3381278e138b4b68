"""What a call of `edgeclip export` asks for."""

from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """The options of one call."""

    targets: tuple[str, ...]
    run: Path | None
    vocabulary: Path | None
    layout: str
    no_head: bool
    model: str | None
    weights: str | None
    labels: str | None
    """words, or @FILE"""
    images: Path | None
    image_only: bool
    like: str | None
    resize_pos_embed: bool
    out: Path | None
