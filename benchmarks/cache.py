"""What a cached teacher saves: the same student on the same images with a live teacher, with the
cache, with no teacher.

    (a) live     teacher forward on the image's view, student forward, backward, step
    (b) cache    the teacher's row from disk instead
    (c) none     student forward, backward, step on tensors that were loaded before: the limit

Student ViT-Ti/16, teachers ViT-B/32, B/16 and L/14 of open_clip with random weights (timing does
not care), at 224 px, on JPEGs of 256 px. (a) and (b) read, decode and normalize the images with the
training's own stream of two threads; torch has one thread. Each way is a process of its own; they
take turns, a round being one batch of each (a), two of (b) and of (c).

    s/1000       wall time of 1,000 images                    CPU          user + system seconds of 1,000 images
    memory       highest anonymous memory while it trains       beyond (c)   less that of (c), which imports the same
    cache        seconds to build it, for 1,000 images of two views: the teacher's own time
    break-even   epochs after which building the cache has paid: cache / ((a) - (b))

What bounds (b): decoding. What bounds (a): the teacher.

Required, with L/14: (a)/(b) at least 8 in wall time; memory beyond (c) at least 9 times smaller in
(b) than in (a); CPU of (b) at most 1.08 of (c).

    python benchmarks/cache.py --check            # --quick has ViT-B/32 alone
"""

import argparse
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import compare
import toy

TEACHERS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
LARGEST = TEACHERS[-1]
MODELS = {"whole": TEACHERS, "quick": TEACHERS[:1], "smoke": ("tiny",)}
SIDE = {"whole": 224, "quick": 224, "smoke": 32}
ROUNDS = {"whole": 31, "quick": 31, "smoke": 2}
IMAGES = 32
BATCH = 8
VIEWS = 2
STEPS = {"live": 1, "cache": 2, "none": 2}


def write_images(folder: Path) -> None:
    from data import images

    for i in range(IMAGES // 4):
        for j, content in enumerate(images((256, 256))):
            (folder / f"{i:02d}-{j}.jpg").write_bytes(content)


def load_teacher(model: str) -> Any:
    from edgeclip.host import recipe as R
    from edgeclip.host import teachers

    return teachers.load(
        R.OpenClip(model=model, weights="random", config=toy.CONFIG if model == "tiny" else None)
    )


def build(folder: Path, model: str) -> Any:
    """The cache of (b), by the smallest teacher; a row's width is all that another teacher would
    change.
    """
    import torch

    from edgeclip.device.images import index_folder
    from edgeclip.host import cache, teachers
    from edgeclip.host.data import Dataset
    from edgeclip.host.recipe import Views

    teacher = load_teacher(model)
    data = Dataset("made", "", [], (), [], index_folder(folder / "images"), [], [])
    views = Views(count=VIEWS)
    tower = teachers.folded(teacher)
    cpu = torch.device("cpu")
    ingredients = cache.Ingredients(teacher, tower, data, views, 0, False, cpu, 2)
    return cache.build(folder / "cache", ingredients)


def worker(way: str, model: str, folder: Path, side: int) -> None:
    import numpy as np
    import torch
    from torch.nn import functional as F

    from edgeclip.device.images import index_folder, read, stream
    from edgeclip.device.preprocess import normalize
    from edgeclip.host import recipe as R
    from edgeclip.host import student as students
    from edgeclip.host import teachers
    from edgeclip.host.cache import decode_view, open_folder

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = index_folder(folder / "images")
    cached = open_folder(next(p for p in (folder / "cache").iterdir() if len(p.name) == 16), images)
    tower = None
    width = cached.rows.shape[2]
    if way == "live":
        teacher = load_teacher(model)
        width, tower = teacher.embed_dim, teachers.folded(teacher).eval()
        del teacher
    student, preprocess = students.build(
        R.Student(tower=R.Timm(model="vit_tiny_patch16_224", weights="random", image_size=side)),
        width,
    )
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    order = np.random.default_rng(0)
    preloaded = torch.randn(BATCH, 3, side, side), F.normalize(torch.randn(BATCH, width), dim=-1)
    spent = {"teacher": 0.0}

    def batches(steps: int) -> Iterator[tuple[Any, Any]]:
        if way == "none":
            for _ in range(steps):
                yield preloaded
            return
        index, view = (
            order.integers(len(images), size=steps * BATCH),
            order.integers(VIEWS, size=steps * BATCH),
        )

        def make(at: int) -> Any:
            i = int(index[at])
            return decode_view(read(cached.images[i]), cached.views[i, view[at]], preprocess, i)

        for at, pixels in stream(range(steps * BATCH), make, BATCH, [], 2):
            x = torch.from_numpy(normalize(pixels, preprocess))
            if tower is None:
                target = torch.from_numpy(cached.rows[index[at], view[at]])
            else:
                start = time.perf_counter()
                with torch.inference_mode():
                    target = tower(x)
                target = target.clone()
                spent["teacher"] += time.perf_counter() - start
            yield x, F.normalize(target, dim=-1)

    highest = [0.0]

    def watch() -> None:
        while True:
            highest[0] = max(highest[0], common.anonymous_mib())
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        steps = request["steps"]
        spent["teacher"] = 0.0
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for x, target in batches(steps):
            loss = (1 - (F.normalize(student(x), dim=-1) * target).sum(dim=-1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        per_thousand = 1000 / (steps * BATCH)
        return {
            "wall": wall * per_thousand,
            "cpu": cpu * per_thousand,
            "teacher": spent["teacher"] * per_thousand,
            "memory": highest[0],
        }

    compare.serve(answer)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--teacher",
        action="append",
        default=[],
        choices=(*TEACHERS, "tiny"),
        help="only this one; may be repeated  [default: all three]",
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        way, model, folder, side = options.worker
        worker(way, model, Path(folder), int(side))
        return
    here = common.this_machine()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    models = tuple(options.teacher) or MODELS[options.form]
    side = str(SIDE[options.form])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        write_images(folder / "images")
        build(folder, MODELS[options.form][0])
        commands = {f"live {m}": ["live", m] for m in models} | {
            "cache": ["cache", "-"],
            "none": ["none", "-"],
        }
        with compare.workers(
            {n: [sys.executable, __file__, "--worker", *c, name, side] for n, c in commands.items()}
        ) as ask:
            for n, c in commands.items():
                ask[n](steps=STEPS[c[0]])  # warm
            rounds = compare.interleave(
                {n: lambda n=n, c=c: ask[n](steps=STEPS[c[0]]) for n, c in commands.items()},
                ROUNDS[options.form],
            )
    report(rounds, models, here, options)


def report(
    rounds: list[dict[str, Any]],
    models: tuple[str, ...],
    here: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    memory = {n: rounds[-1][n]["memory"] for n in rounds[0]}
    rows, figures = [], {}
    for n in rounds[0]:
        wall, cpu = (compare.interval(compare.column(rounds, n, f)) for f in ("wall", "cpu"))
        beyond = memory[n] - memory["none"]
        row = {
            "wall_s": wall._asdict(),
            "cpu_s": cpu._asdict(),
            "memory_mib": memory[n],
            "beyond_none_mib": beyond,
        }
        shown = [n, str(wall), str(cpu), f"{memory[n]:.0f}", f"{beyond:.0f}", "", "", ""]
        if n.startswith("live"):
            cost = compare.interval(
                [VIEWS * t for t in compare.column(rounds, n, "teacher")]
            ).median
            even = cost / (
                wall.median - compare.interval(compare.column(rounds, "cache", "wall")).median
            )
            ratio = compare.interval(compare.ratios(rounds, n, "cache", "wall"))
            row |= {"cache_s": cost, "break_even_epochs": even, "over_cache": ratio._asdict()}
            shown[5:] = [str(ratio), f"{cost:.0f}", f"{even:.1f}"]
        rows.append(shown)
        figures[n] = row
    common.table(
        rows,
        [
            "way",
            "s/1000",
            "CPU s/1000",
            "memory MiB",
            "beyond (c)",
            "/ (b), wall",
            "cache, s/1000",
            "break-even",
        ],
    )
    over = compare.interval(compare.ratios(rounds, "cache", "none", "wall"))
    print(f"(b)/(c) in wall time: {over}")
    required = [
        compare.judge(
            "(b)/(c), CPU seconds", compare.ratios(rounds, "cache", "none", "cpu"), at_most=1.08
        )
    ]
    if (large := f"live {LARGEST}") in memory:
        b = max(memory["cache"] - memory["none"], 1.0)
        required += [
            compare.judge(
                f"(a)/(b), wall time, {LARGEST}",
                compare.ratios(rounds, large, "cache", "wall"),
                at_least=8,
            ),
            compare.exact(
                f"memory beyond (c), (a)/(b), {LARGEST}",
                (memory[large] - memory["none"]) / b,
                at_least=9,
            ),
        ]
    common.finish(
        {"benchmark": "cache", "ways": figures, "cache_over_none_wall": over._asdict()},
        required,
        here,
        options,
    )


if __name__ == "__main__":
    main()
