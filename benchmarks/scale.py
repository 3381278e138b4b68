"""What a teacher cache costs before a row is used: opening, a shuffled epoch's bookkeeping, memory;
and what a row costs.

For 10^4, 10^6 and 10^8 images of two views (sparse files: they have the size and the shards of real
ones, and no content), each in a process of its own:

    open         `open_folder`: one manifest, and a look at each file's size
    first        milliseconds a batch of 1,024 random rows with their views' parameters, whose blocks nobody read before: they
                 are compared with their digests (holes of a sparse file: no disk)
    shuffled     the same batches again: nothing is hashed
    epoch        the order of all images and the choice of a view for each, batch by batch, nothing read
    memory       highest anonymous memory above the level after imports

Then what hashing costs, by itself: every block of the cache of 10^6 images once, as the first epoch of a process does, beside
decoding as many JPEGs of 224 px on one core, which is the least that an epoch costs; and the rates of hashes by size of block.

What bounds it: opening is one `stat` a file; the order is arithmetic (no list of it is held). Then,
on 10^6 written rows of width 768 that the page cache holds: random batches of 1,024 rows from the
cache against `numpy.take` from an array in memory.

Required: opening under 1 s and memory under 200 MiB at every size; hashing at most 1 % of an epoch, were the epoch one of
decoding alone; take's time at least half of the cache's.

    python benchmarks/scale.py --check            # --quick leaves out 10^8
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import common
import compare
from scale_hash import BLOCKS, beside_decoding, hash_rates

if TYPE_CHECKING:
    import numpy as np

SIZES = {"whole": (10**4, 10**6, 10**8), "quick": (10**4, 10**6), "smoke": (10**3, 10**4)}
WARM_ROWS = {"whole": 10**6, "quick": 10**5, "smoke": 2_000}
WIDTH, VIEWS, BATCH, SHARD = 768, 2, 1024, 65_536
ROUNDS = {"whole": 40, "quick": 40, "smoke": 2}
WARM_UPS = {"whole": 150, "quick": 150, "smoke": 2}
BATCHES = 20
COLUMNS = ("open_s", "first_batch_ms", "batch_ms", "epoch_s", "anonymous_mib")


def sparse(folder: Path, n: int, views: int = VIEWS, width: int = WIDTH) -> None:
    """A cache folder as `build` would have left it, without content."""
    import numpy as np

    from edgeclip import disk
    from edgeclip.host.blocks import BLOCK
    from edgeclip.host.cache import checked
    from edgeclip.host.cache.arrays import FORMAT, record
    from edgeclip.host.cache.checked import CLASS_FEATURES, KIND, name
    from edgeclip.host.cache.live import METADATA_BYTES

    counts = [min(SHARD, n - at) for at in range(0, n, SHARD)]
    shards = []
    hashes = {}
    for i, rows in enumerate(counts):
        sizes = {}
        digests = []
        kinds = {"img_emb": ("<f2", (rows, width)), "records": (record(views, 5), (rows,))} | (
            {"more_views": ("<f2", (rows, views - 1, width))} if views > 1 else {}
        )
        for what, (dtype, shape) in kinds.items():
            path = folder / name(what, i, len(counts))
            path.parent.mkdir(parents=True, exist_ok=True)
            dtype = np.dtype(dtype)
            with open(path, "wb") as f:
                np.lib.format.write_array_header_1_0(
                    f,
                    {
                        "descr": np.lib.format.dtype_to_descr(dtype),
                        "fortran_order": False,
                        "shape": shape,
                    },
                )
                f.truncate(f.tell() + int(np.prod(shape)) * dtype.itemsize)
            sizes[name(what, i, len(counts))] = path.stat().st_size
            digests.append(of_zeros(path))
        path = folder / name("metadata", i, len(counts))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as f:
            f.truncate(METADATA_BYTES * rows)
        sizes[name("metadata", i, len(counts))] = METADATA_BYTES * rows
        digests.append(of_zeros(path))
        own = name("digests", i, len(counts))
        disk.write_array(folder / own, np.concatenate(digests))
        sizes[own] = (folder / own).stat().st_size
        hashes |= {file: "0" * 64 for file in sizes} | {own: disk.sha256(folder / own)}
        shards.append({"rows": rows, "bytes": sizes})
    disk.write_array(folder / CLASS_FEATURES, np.zeros((0, width), np.float32))
    hashes[CLASS_FEATURES] = disk.sha256(folder / CLASS_FEATURES)
    checked.write_manifest(
        folder,
        {
            "kind": KIND,
            "format": FORMAT,
            "views": views,
            "captions": 0,
            "block_bytes": BLOCK,
            "shards": shards,
            "files": hashes,
        },
    )


def of_zeros(path: Path) -> "np.ndarray":
    """Return the digests of a sparse file's blocks, [n, SIZE]: all but the first are zeros."""
    import numpy as np

    from edgeclip.host import blocks
    from edgeclip.host.blocks import BLOCK

    size = path.stat().st_size
    of = [blocks.digest(bytes(BLOCK))] * blocks.count(size)
    of[-1] = blocks.digest(bytes(size - BLOCK * (len(of) - 1)))
    with path.open("rb") as file:
        of[0] = blocks.digest(file.read(BLOCK))
    return np.frombuffer(b"".join(of), np.uint8).reshape(-1, blocks.SIZE)


def one_size(folder: Path, n: int) -> dict[str, object]:
    import numpy as np

    from edgeclip.host.cache import open_folder
    from edgeclip.host.data.order import Shuffled

    base = common.anonymous_mib()
    start = time.perf_counter()
    cache = open_folder(folder, range(n))  # type: ignore[arg-type]  # as many images as rows; none is looked at
    opened = time.perf_counter() - start
    highest = common.anonymous_mib()
    order, rng = Shuffled(n, 0), np.random.default_rng(0)
    draws = []
    for b in range(50):
        index = order[np.arange(b * BATCH, (b + 1) * BATCH) % n]
        draws.append((index, rng.integers(VIEWS, size=BATCH)))
    batches = []
    for _ in range(2):  # the first time blocks are compared
        start = time.perf_counter()
        for index, view in draws:
            assert cache.rows[index, view].shape == (BATCH, WIDTH)
            assert cache.views[index, view].shape == (BATCH, 5)
            highest = max(highest, common.anonymous_mib())
        batches.append((time.perf_counter() - start) / len(draws))
    first, shuffled = batches
    start, seen = time.perf_counter(), 0
    for at in range(0, n, BATCH):
        index = order[np.arange(at, min(at + BATCH, n))]
        seen += len(index) + 0 * int(rng.integers(VIEWS, size=len(index))[0])
        if at % (1000 * BATCH) == 0:
            highest = max(highest, common.anonymous_mib())
    epoch = time.perf_counter() - start
    assert seen == n
    files = sum(len(s["bytes"]) for s in cache.manifest["shards"])
    return {
        "images": n,
        "files": files,
        "digest_bytes": sum(p.stat().st_size for p in (folder / "digests").iterdir()),
        "open_s": opened,
        "first_batch_ms": 1e3 * first,
        "batch_ms": 1e3 * shuffled,
        "epoch_s": epoch,
        "anonymous_mib": max(0.0, highest - base),
        **beside_decoding(folder, n),
    }


def sign(folder: Path) -> None:
    """Write the digests of a cache's files as they are now."""
    from edgeclip.host.cache import checked

    manifest = checked.read_manifest(folder)
    shards = manifest["shards"]
    for i, shard in enumerate(shards):
        own = checked.name("digests", i, len(shards))
        files = [file for file in shard["bytes"] if file != own]
        manifest["files"] |= checked.write_digests(folder, i, len(shards), files)
    checked.write_manifest(folder, manifest)


def warm_rows(folder: Path, form: str) -> list[float]:
    """Time of numpy's take over that of the cache, pair by pair."""
    import numpy as np

    from edgeclip.host.allocator import keep_freed_memory
    from edgeclip.host.cache import open_folder

    n = WARM_ROWS[form]
    keep_freed_memory()  # as `distill` does: the pages of a batch are the next batch's
    sparse(folder, n, views=1)
    rng = np.random.default_rng(0)
    block = rng.normal(size=(min(SHARD, n), WIDTH)).astype(np.float16)
    for file in sorted((folder / "img_emb").iterdir()):
        rows = np.load(file, mmap_mode="r+")
        rows[:] = block[: len(rows)]
        del rows
    sign(folder)
    cache = open_folder(folder, range(n))  # type: ignore[arg-type]  # as many images as rows; none is looked at
    memory = np.empty((n, WIDTH), np.float16)
    for at in range(0, n, SHARD):
        memory[at : at + SHARD] = cache.rows.first[np.arange(at, min(at + SHARD, n))]
    zero = np.zeros(BATCH, np.int64)

    def timed(read: Callable[[np.ndarray], object]) -> float:
        batches = [rng.integers(n, size=BATCH) for _ in range(BATCHES)]
        start = time.perf_counter()
        for index in batches:
            read(index)
        return time.perf_counter() - start

    def take(index: np.ndarray) -> object:
        return np.take(memory, index, axis=0)

    def mapped(index: np.ndarray) -> object:
        return cache.rows.unit(index, zero)

    for _ in range(WARM_UPS[form]):  # every page of both has been used
        timed(take)
        timed(mapped)
    rounds = compare.interleave(
        {"take": lambda: timed(take), "cache": lambda: timed(mapped)}, ROUNDS[form]
    )
    print(
        "take",
        compare.interval([1e3 * t / BATCHES for t in compare.column(rounds, "take")]),
        "ms a batch; cache",
        file=sys.stderr,
        end=" ",
    )
    print(
        compare.interval([1e3 * t / BATCHES for t in compare.column(rounds, "cache")]),
        "ms",
        file=sys.stderr,
    )
    return compare.ratios(rounds, "take", "cache")


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the files go, and are deleted  [default: a temporary folder]",
    )
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size:
        print(json.dumps(one_size(options.folder, options.size)))
        return
    here = common.this_machine()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )  # the usual one
    try:
        found = []
        for n in SIZES[options.form]:
            sparse(folder / str(n), n)
            command = [sys.executable, __file__, "--size", str(n), "--folder", str(folder / str(n))]

            found.append(
                json.loads(
                    subprocess.run(
                        command, check=True, stdout=subprocess.PIPE, text=True
                    ).stdout.splitlines()[-1]
                )
            )
            shutil.rmtree(folder / str(n))
        ratios = warm_rows(folder / "warm", options.form)
        rates = hash_rates()
    finally:
        shutil.rmtree(folder)
    n_warm = WARM_ROWS[options.form]
    rows = [
        [
            f"{f['images']:,}",
            f["files"],
            *(f"{f[k]:.3g}" for k in COLUMNS),
        ]
        for f in found
    ]
    common.table(
        rows,
        [
            "images x 2 views",
            "files",
            "open, s",
            f"shuffled batch of {BATCH:,}, first time, ms",
            "again, ms",
            "epoch's order, s",
            "anonymous memory, MiB",
        ],
    )
    hashed = [f for f in found if f["hash_us"] is not None][-1]
    hashing, decoding = hashed["hash_us"], hashed["decode_us"]
    rows = [[name, *(f"{rate:.2f}" for rate in of.values())] for name, of in rates.items()]
    common.table(rows, ["GB/s by bytes of a block", *(f"{size:,}" for size in BLOCKS)])
    print(f"hashing {hashing:.2f} us an image, decoding {decoding:.0f} us")
    required = [
        compare.exact(f"seconds to open {f['images']:,}", f["open_s"], at_most=1.0) for f in found
    ]
    required += [
        compare.exact(f"MiB above imports at {f['images']:,}", f["anonymous_mib"], at_most=200.0)
        for f in found
    ]
    required.append(
        compare.exact("hashing / decoding of an epoch", hashing / decoding, at_most=0.01)
    )
    required.append(
        compare.judge(f"numpy take / cache, time, {n_warm:,} warm rows", ratios, at_least=0.5)
    )
    common.finish(
        {
            "benchmark": "scale",
            "sizes": found,
            "hash_us": hashing,
            "decode_us": decoding,
            "hash_gb_per_s": rates,
            "take_over_cache": compare.interval(ratios)._asdict(),
        },
        required,
        here,
        options,
    )


if __name__ == "__main__":
    main()
