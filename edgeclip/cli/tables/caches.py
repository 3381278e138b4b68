"""The table of `cache build` and `cache inspect`."""

from collections.abc import Sequence
from typing import Any

from edgeclip.cli.tables.plain import table


def caches(found: Sequence[Any]) -> None:
    """Print what is inside each teacher cache."""
    for cache in found:
        skipped = len(cache["skipped"])
        size = f"{cache['shards']:,}, {cache['bytes'] / 2**20:,.1f} MiB"
        rows = [
            ["folder", cache["folder"]],
            ["teacher", cache["teacher"]],
            ["data", cache["data"]],
            ["images x views", f"{cache['images']:,} x {cache['views']} ({skipped} skipped)"],
            [
                "row",
                f"{cache['width']} wide, unit within {cache['unit_error']:.1g}, {_norm(cache)}",
            ],
            ["captions per image", cache["captions"]],
            ["classes", cache["classes"]],
            ["shards", size],
            ["replayed", _replay(cache)],
        ]
        table(rows, ["teacher cache", ""])


def _norm(cache: Any) -> str:
    norm = cache["norm"]
    if not norm:
        return "norms not known"
    return f"norm {norm['min']:.3g} to {norm['max']:.3g}"


def _replay(cache: Any) -> str | None:
    replay = cache["replay"]
    if not replay:
        return None
    return f"{replay['views']} views, cosine {replay['cosine_min']:.4f} or more"
