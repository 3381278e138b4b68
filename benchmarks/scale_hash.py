"""What hashing a cache costs, by itself: beside decoding, and by hash and size of block (scale.py)."""

import hashlib
import os
import statistics
import time
from pathlib import Path

import data

HASHED = 10**6
"""images; all blocks of a cache up to this size are hashed"""
HASHES = ("sha256", "blake2b", "blake2s", "sha1")
BLOCKS = (2**12, 2**14, 2**16, 2**18, 2**20)
TURNS, DECODED = 5, 256


def beside_decoding(folder: Path, n: int) -> dict[str, float | None]:
    """Return the microseconds an image that hashing takes, and decoding, in turns: the medians."""
    if n > HASHED:
        return {"hash_us": None, "decode_us": None}
    found: dict[str, list[float]] = {"hash_us": [], "decode_us": []}
    for _ in range(TURNS):
        found["hash_us"].append(1e6 * hash_all(folder) / n)
        found["decode_us"].append(decode_us(DECODED))
    return {name: statistics.median(times) for name, times in found.items()}


def hash_all(folder: Path) -> float:
    """Return the seconds that a process needs to compare every block of a cache once."""
    from edgeclip.host.cache import checked

    manifest = checked.read_manifest(folder)
    digests = checked.Digests(folder, manifest)
    start = time.perf_counter()
    for what in ("img_emb", "more_views", "records"):
        for shard in range(len(manifest["shards"])):
            digests.of(what).look_at_all(shard)
    return time.perf_counter() - start


def decode_us(count: int) -> float:
    """Return the microseconds that decoding one JPEG of 224 px to its view takes on one core."""
    import random

    import torch

    from edgeclip.device.preprocess import Preprocess
    from edgeclip.host.cache import decode_view, draw_views
    from edgeclip.host.recipe import Views

    torch.set_num_threads(1)
    spec = Preprocess(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    files = data.images((224, 224))
    views = draw_views(224, 224, Views(count=2), random.Random(0))
    for content in files:
        decode_view(content, views[1], spec, "")
    start = time.perf_counter()
    for i in range(count):
        decode_view(files[i % len(files)], views[1], spec, "")
    return 1e6 * (time.perf_counter() - start) / count


def hash_rates() -> dict[str, dict[str, float]]:
    """Return GB/s of each hash by bytes of a block, of 64 MiB that the processor's caches do not
    hold."""
    content = memoryview(os.urandom(2**26))
    rates: dict[str, dict[str, float]] = {}
    for name in HASHES:
        make = getattr(hashlib, name)
        rates[name] = {}
        for size in BLOCKS:
            start = time.perf_counter()
            for at in range(0, len(content), size):
                make(content[at : at + size]).digest()
            rates[name][str(size)] = len(content) / (time.perf_counter() - start) / 1e9
    return rates
