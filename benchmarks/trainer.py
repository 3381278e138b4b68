"""edgeclip's training against open_clip's own trainer with --distill-model: same student, teacher, shards, batch and loss.

Each trains one epoch in a process of its own, in turn: open_clip_train.main unchanged, which runs the teacher beside the
student, and `edgeclip.host.distill.train`, which reads the teacher's cache. Student: an open_clip model, image and text tower.
Loss: InfoNCE plus cross-entropy to the teacher's image-text similarities. Weights are random, which does for timing.

    images/s     from the end of step 3 to the end of the last, so that neither start-up nor first-step set-up counts
    MiB            proportional set size of the process and its children (open_clip's data workers), sampled ten times a second:
                   during the steps, and at the peak, which for edgeclip is when it loads the teacher to know its cache again
    cache s        what edgeclip paid once before; break-even: the epoch after which it has been the faster one, that included

What bounds edgeclip: the student's forward and backward on the cores there are. Nothing is required of the figures; they
stand for the claim that an epoch costs what the student alone costs.

    python benchmarks/trainer.py                     # ViT-L-14 to ViT-S-32-alt, some minutes
    python benchmarks/trainer.py --quick             # ViT-B-32 as the teacher

open_clip_train 3.3 needs webdataset up to 0.2.86: give it an environment with webdataset==0.2.86 beside
open_clip_torch by --open-clip-python.
"""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
import compare
import numpy as np
import toy

BATCHES = {"whole": 16, "quick": 16, "smoke": 4}
TEACHERS = {"whole": "ViT-L-14", "quick": "ViT-B-32", "smoke": "ViT-S-32-alt"}
ROUNDS = {"whole": 3, "quick": 1, "smoke": 1}
STEPS = {"whole": 9, "quick": 9, "smoke": 5}
SKIP, SHARDS, SIDE = 3, 2, 256
STUDENT = "ViT-S-32-alt"


def write_shards(folder: Path, images: int) -> None:
    """JPEGs with captions. Noise of falling amplitude: it takes a decoder as long as a photo."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(images // SHARDS):
                pixels = sum(
                    np.kron(rng.normal(0, 3 * s, (SIDE // s, SIDE // s, 3)), np.ones((s, s, 1)))
                    for s in (1, 4, 16)
                )
                buffer = io.BytesIO()
                Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(
                    buffer, "JPEG", quality=90
                )
                for suffix, content in (
                    (".jpg", buffer.getvalue()),
                    (".txt", f"a photo of thing number {shard} {i}".encode()),
                ):
                    toy.add_member(tar, f"{shard}-{i:04d}{suffix}", content)


def write_teacher(model: str, path: Path) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(open_clip.create_model(model, pretrained=None).state_dict(), path)


# --- the two trainers, each in a process of its own


def with_open_clip(model: str, folder: Path, batch: int, images: int) -> dict[str, Any]:
    from open_clip_train.main import main as train

    ends: list[float] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Train Epoch"):
                ends.append(time.perf_counter())

    # open_clip_train replaces the root logger's handlers when it starts; a filter on its level stays.
    setup = logging.Logger.addHandler

    def added(self: logging.Logger, handler: logging.Handler) -> None:
        setup(self, handler)
        if self is logging.getLogger() and not any(isinstance(h, Watch) for h in self.handlers):
            setup(self, Watch())

    logging.Logger.addHandler = added  # type: ignore[method-assign]  # the peer has no hook
    shards = f"{folder}/shards/{{0..{SHARDS - 1}}}.tar"
    train(
        f"--model {STUDENT} --distill-model {model} --distill-pretrained {folder}/teacher.safetensors --dataset-type webdataset --train-data {shards} "
        f"--train-num-samples {images} --batch-size {batch} --workers 2 --epochs 1 --precision fp32 --device cpu --warmup 2 "
        f"--log-every-n-steps 1 --logs {tempfile.mkdtemp(dir=folder)}".split()
    )
    return {"ends": ends}


def with_edgeclip(
    model: str, folder: Path, batch: int, images: int, only_cache: bool = False
) -> dict[str, Any]:
    import torch

    from edgeclip.config import convert
    from edgeclip.host import cache, data, teachers
    from edgeclip.host import recipe as R
    from edgeclip.host import student as students
    from edgeclip.host.allocator import give_back_freed_memory, keep_freed_memory
    from edgeclip.host.distill.step import Step
    from edgeclip.host.distill.targets import Lesson, Taught
    from edgeclip.host.distill.text import texts
    from edgeclip.host.distill.train import train
    from edgeclip.host.distill.training import Learner

    keep_freed_memory()
    tower = {"kind": "open_clip", "model": STUDENT, "weights": "random"}
    asked = convert(
        {
            "data": {
                "kind": "webdataset",
                "name": "shards",
                "root": str(folder / "shards"),
                "train": "*.tar",
                "test": None,
                "classes": None,
                "license": "none",
            },
            "teacher": {
                "kind": "open_clip",
                "model": model,
                "weights": str(folder / "teacher.safetensors"),
            },
            "student": {
                "tower": tower,
                "text": tower,
                "text_weight": 0.0,
                "projector_hidden": None,
            },
            "losses": {"contrastive": {}, "affinity": {}},
            "views": {"count": 1},
            "train": {"epochs": 1, "batch_size": batch, "device": "cpu", "threads": 2},
        },
        R.Recipe,
        "benchmarks/trainer.py",
    )
    cpu = torch.device("cpu")
    dataset = data.load(asked.data, folder)
    teacher = teachers.load(asked.teacher)
    start = time.perf_counter()
    tower = teachers.folded(teacher)
    ingredients = cache.Ingredients(teacher, tower, dataset, asked.views, 0, True, cpu, 2)
    cached = cache.build(folder / "cache", ingredients)
    building = time.perf_counter() - start
    if only_cache:
        return {"seconds": building}
    torch.manual_seed(0)
    student, preprocess = students.build(asked.student, teacher.embed_dim)
    assert asked.student.text
    text = students.build_text(asked.student.text, teacher.embed_dim)
    learned = texts(text, teacher, cached, [], ("{c}",))
    teacher = teachers.without_towers(teacher)
    give_back_freed_memory()
    ends: list[float] = []
    step = Step.__call__

    def timed(self: Step, *arguments: Any) -> Any:
        said = step(self, *arguments)
        ends.append(time.perf_counter())
        return said

    Step.__call__ = timed  # type: ignore[method-assign]  # the loop has no hook to time steps by
    learner = Learner(student, None, preprocess, learned)
    train(learner, Lesson(dataset, [Taught(teacher, cached)]), asked, cpu)
    return {"ends": ends}


# --- the measuring process


def tree_mib(process: int) -> float:
    """Proportional set size of a process and its descendants."""
    total = 0.0
    for pid in [
        process,
        *(p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if _descends(p, process)),
    ]:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += (
                next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
                / 1024
            )
    return total


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            return False
        if pid == ancestor:
            return True
    return False


def measured(
    who: str, model: str, folder: Path, size: tuple[int, int], python: str = sys.executable
) -> dict[str, Any]:
    """One run of a trainer on `size` (images of a batch, of an epoch): its answer, images a second, peak MiB."""
    command = [
        python,
        __file__,
        "--worker",
        who,
        "--teacher",
        model,
        "--folder",
        str(folder),
        "--size",
        *map(str, size),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    seen: list[tuple[float, float]] = []

    def watch() -> None:
        while process.poll() is None:
            seen.append((time.perf_counter(), tree_mib(process.pid)))
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    assert process.stdout
    lines = process.stdout.read().splitlines()
    thread.join()
    if process.returncode:
        sys.exit(f"{who}: its process ended with code {process.returncode}; its message is above")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "ends" in answer:
        ends = answer.pop("ends")
        # One clock for all processes (Linux's monotonic one), so the samples can be laid beside the steps.
        during = max(mib for when, mib in seen if ends[0] <= when <= ends[-1])
        answer |= {
            "images_per_second": size[0] * (len(ends) - SKIP) / (ends[-1] - ends[SKIP - 1]),
            "steps": len(ends),
            "steps_mib": during,
        }
    return answer | {"peak_mib": max(mib for _, mib in seen)}


WORKERS = {
    "open_clip": with_open_clip,
    "edgeclip": with_edgeclip,
    "cache": partial(with_edgeclip, only_cache=True),
}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--teacher", help="an open_clip model  [default: ViT-L-14; ViT-B-32 with --quick]"
    )
    parser.add_argument(
        "--open-clip-python",
        default=sys.executable,
        help="the interpreter of an environment that open_clip_train runs in",
    )
    parser.add_argument("--worker", choices=list(WORKERS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--size", nargs=2, type=int)
    options = parser.parse_args()
    model = options.teacher or TEACHERS[options.form]
    if options.worker:
        print(json.dumps(WORKERS[options.worker](model, options.folder, *options.size)))
        return
    if options.open_clip_python == sys.executable:
        common.require("pip install 'webdataset<0.2.87'", module="webdataset")
    here = common.this_machine()
    batch = BATCHES[options.form]
    images = batch * STEPS[options.form]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder / "shards", images)
        # In a process of its own: this one must stay small.
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import trainer; from pathlib import Path; trainer.write_teacher({model!r}, Path({str(folder / 'teacher.safetensors')!r}))",
            ],
            check=True,
            cwd=Path(__file__).parent,
        )
        built = measured("cache", model, folder, (batch, images))
        pythons = {"open_clip": options.open_clip_python, "edgeclip": sys.executable}
        peers = {
            who: partial(measured, who, model, folder, (batch, images), python)
            for who, python in pythons.items()
        }
        rounds = compare.interleave(peers, ROUNDS[options.form])
    figures: dict[str, Any] = {
        "benchmark": "trainer",
        "student": STUDENT,
        "teacher": model,
        "batch": batch,
        "images": images,
        "cache": built,
    }
    rows = []
    for who in ("open_clip", "edgeclip"):
        found = {
            f: compare.interval(compare.column(rounds, who, f))
            for f in ("images_per_second", "steps_mib", "peak_mib")
        }
        figures[who] = {f: value._asdict() for f, value in found.items()}
        rows.append(
            [
                who,
                f"{found['images_per_second'].median:.2f}",
                *(f"{found[f].median:.0f}" for f in ("steps_mib", "peak_mib")),
            ]
        )
    common.table(rows, [f"{model} to {STUDENT}", "images/s", "MiB in its steps", "MiB at its peak"])
    faster = compare.interval(
        compare.ratios(rounds, "edgeclip", "open_clip", "images_per_second")
    ).median
    smaller = compare.interval(compare.ratios(rounds, "open_clip", "edgeclip", "steps_mib")).median
    slow, fast = (
        images / figures[who]["images_per_second"]["median"] for who in ("open_clip", "edgeclip")
    )
    even = built["seconds"] / (slow - fast) if slow > fast else None
    figures |= {"times_as_fast": faster, "times_less_memory": smaller, "break_even_epochs": even}
    print(
        f"edgeclip: {faster:.2f} times as fast, {smaller:.2f} times less memory in its steps; its cache took {built['seconds']:.0f} s and {built['peak_mib']:.0f} MiB, made good after {even and round(even, 2)} epochs"
    )
    common.finish(figures, [], here, options)


if __name__ == "__main__":
    main()
