"""What a teacher cache costs before a row is used: opening, a shuffled epoch's bookkeeping, memory;
and what a row costs.

For 10^4, 10^6 and 10^8 images of two views (sparse files: they have the size and the shards of real
ones, and no content), each in a process of its own:

    open         `open_folder`: one manifest, and a look at each file's size
    shuffled     milliseconds a batch of 1,024 random rows with their views' parameters (holes of a sparse file: no disk)
    epoch        the order of all images and the choice of a view for each, batch by batch, nothing read
    memory       highest anonymous memory above the level after imports

What bounds it: opening is one `stat` a file; the order is arithmetic (no list of it is held). Then,
on 10^6 written rows of width 768 that the page cache holds: random batches of 1,024 rows from the
cache against `numpy.take` from an array in memory.

Required: opening under 1 s and memory under 200 MiB at every size; take's time at least half of the
cache's.

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

import common
import compare

SIZES = {"whole": (10**4, 10**6, 10**8), "quick": (10**4, 10**6), "smoke": (10**3, 10**4)}
WARM_ROWS = {"whole": 10**6, "quick": 10**5, "smoke": 2_000}
WIDTH, VIEWS, BATCH, SHARD = 768, 2, 1024, 65_536
ROUNDS = {"whole": 40, "quick": 40, "smoke": 2}
WARM_UPS = {"whole": 150, "quick": 150, "smoke": 2}
BATCHES = 20


def sparse(folder: Path, n: int, views: int = VIEWS) -> None:
    """A cache folder as `build` would have left it, without content."""
    import numpy as np

    from edgeclip import disk
    from edgeclip.host.cache.arrays import FORMAT, KIND, name, record

    counts = [min(SHARD, n - at) for at in range(0, n, SHARD)]
    shards = []
    for i, rows in enumerate(counts):
        files = {}
        kinds = {"img_emb": ("<f2", (rows, WIDTH)), "records": (record(views, 5), (rows,))} | (
            {"more_views": ("<f2", (rows, views - 1, WIDTH))} if views > 1 else {}
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
            files[name(what, i, len(counts))] = path.stat().st_size
        shards.append({"rows": rows, "bytes": files})
    disk.write_array(folder / "class_features.npy", np.zeros((0, WIDTH), np.float32))
    disk.write_json(
        folder / disk.MANIFEST,
        {
            "kind": KIND,
            "format": FORMAT,
            "views": views,
            "captions": 0,
            "shards": shards,
            "files": {f: "0" * 64 for s in shards for f in s["bytes"]},
        },
    )


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
    start = time.perf_counter()
    for b in range(50):
        index = order[np.arange(b * BATCH, (b + 1) * BATCH) % n]
        view = rng.integers(VIEWS, size=BATCH)
        assert cache.rows[index, view].shape == (BATCH, WIDTH) and cache.views[
            index, view
        ].shape == (BATCH, 5)
        highest = max(highest, common.anonymous_mib())
    shuffled = (time.perf_counter() - start) / 50
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
        "open_s": opened,
        "batch_ms": 1e3 * shuffled,
        "epoch_s": epoch,
        "anonymous_mib": max(0.0, highest - base),
    }


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
    finally:
        shutil.rmtree(folder)
    n_warm = WARM_ROWS[options.form]
    rows = [
        [
            f"{f['images']:,}",
            f["files"],
            *(f"{f[k]:.3g}" for k in ("open_s", "batch_ms", "epoch_s", "anonymous_mib")),
        ]
        for f in found
    ]
    common.table(
        rows,
        [
            "images x 2 views",
            "files",
            "open, s",
            f"shuffled batch of {BATCH:,}, ms",
            "epoch's order, s",
            "anonymous memory, MiB",
        ],
    )
    required = [
        compare.exact(f"seconds to open {f['images']:,}", f["open_s"], at_most=1.0) for f in found
    ]
    required += [
        compare.exact(f"MiB above imports at {f['images']:,}", f["anonymous_mib"], at_most=200.0)
        for f in found
    ]
    required.append(
        compare.judge(f"numpy take / cache, time, {n_warm:,} warm rows", ratios, at_least=0.5)
    )
    common.finish(
        {
            "benchmark": "scale",
            "sizes": found,
            "take_over_cache": compare.interval(ratios)._asdict(),
        },
        required,
        here,
        options,
    )


if __name__ == "__main__":
    main()
