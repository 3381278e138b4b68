"""edgeclip's training against open_clip's own trainer with --distill-model: same student, teacher,
shards, batch and loss.

Each trains one epoch in a process of its own, in turn: open_clip_train.main unchanged, which runs
the teacher beside the student, and `edgeclip.host.distill.train`, which reads the teacher's cache.
Student: an open_clip model, image and text tower. Loss: InfoNCE plus cross-entropy to the teacher's
image-text similarities. Weights are random, which does for timing.

    images/s     from the end of step 3 to the end of the last, so that neither start-up nor first-step set-up counts
    MiB            proportional set size of the process and its children (open_clip's data workers), sampled ten times a second:
                   during the steps, and at the peak, which for edgeclip is when it loads the
                   teacher to know its cache again
    cache s        what edgeclip paid once before; break-even: the epoch after which it has been the faster one, that included

What bounds edgeclip: the student's forward and backward on the cores there are. Nothing is required
of the figures; they stand for the claim that an epoch costs what the student alone costs.

    python benchmarks/trainer.py                     # ViT-L-14 to ViT-S-32-alt, some minutes
    python benchmarks/trainer.py --quick             # ViT-B-32 as the teacher

open_clip_train 3.3 needs webdataset up to 0.2.86: give it an environment with webdataset==0.2.86
beside open_clip_torch by --open-clip-python.
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
from typing import Any, NamedTuple

import common
import compare
import numpy as np
import toy

BATCHES = {"whole": 16, "quick": 16, "smoke": 4}
TEACHERS = {"whole": "ViT-L-14", "quick": "ViT-B-32", "smoke": "tiny"}
STUDENTS = {"whole": "ViT-S-32-alt", "quick": "ViT-S-32-alt", "smoke": "tiny"}
ROUNDS = {"whole": 3, "quick": 1, "smoke": 1}
STEPS = {"whole": 9, "quick": 9, "smoke": 5}
SKIP, SHARDS, SIDE = 3, 2, 256


class Job(NamedTuple):
    """What each trainer is to do."""

    student: str
    """an open_clip model, or "tiny": toy.CONFIG"""
    teacher: str
    """the same"""
    folder: str
    """of shards/ and teacher.safetensors"""
    batch: int
    images: int
    """of an epoch"""
    device: str = "cpu"
    """cpu or cuda"""


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


def know_tiny(folder: Path) -> None:
    """Tell this process's open_clip of the model "tiny"."""
    import open_clip

    path = folder / "tiny.json"
    path.write_text(json.dumps(toy.CONFIG), encoding="utf-8")
    open_clip.add_model_config(path)


def config_of(model: str) -> dict[str, Any] | None:
    """Return the configuration of a model that open_clip does not list; None: it does."""
    if model == "tiny":
        return toy.CONFIG
    return None


def write_teacher(job: Job) -> dict[str, Any]:
    """Write a random teacher's weights where the trainers look for them."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = Path(job.folder)
    know_tiny(folder)
    torch.manual_seed(0)
    teacher = open_clip.create_model(job.teacher, pretrained=None)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    return {}


# --- the two trainers, each in a process of its own


def with_open_clip(job: Job) -> dict[str, Any]:
    from open_clip_train.main import main as train

    ends: list[float] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Train Epoch"):
                ends.append(time.perf_counter())

    # open_clip_train replaces the root logger's handlers when it starts; a filter on its level
    # stays.
    setup = logging.Logger.addHandler

    def added(self: logging.Logger, handler: logging.Handler) -> None:
        setup(self, handler)
        if self is logging.getLogger() and not any(isinstance(h, Watch) for h in self.handlers):
            setup(self, Watch())

    logging.Logger.addHandler = added  # type: ignore[method-assign]  # the peer has no hook
    know_tiny(Path(job.folder))
    shards = f"{job.folder}/shards/{{0..{SHARDS - 1}}}.tar"
    train(
        f"--model {job.student} --distill-model {job.teacher} --distill-pretrained {job.folder}/teacher.safetensors --dataset-type webdataset --train-data {shards} "
        f"--train-num-samples {job.images} --batch-size {job.batch} --workers 2 --epochs 1 --precision fp32 --device {job.device} --warmup 2 "
        f"--log-every-n-steps 1 --logs {tempfile.mkdtemp(dir=job.folder)}".split()
    )
    return {"ends": ends}


def with_edgeclip(job: Job, only_cache: bool = False) -> dict[str, Any]:
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
    folder = Path(job.folder)
    tower = {
        "kind": "open_clip",
        "model": job.student,
        "weights": "random",
        "config": config_of(job.student),
    }
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
                "model": job.teacher,
                "config": config_of(job.teacher),
                "weights": str(folder / "teacher.safetensors"),
                "like": "default",
            },
            "student": {
                "tower": tower,
                "text": tower,
                "text_weight": 0.0,
                "projector_hidden": None,
            },
            "losses": {"contrastive": {}, "affinity": {}},
            "views": {"count": 1},
            "train": {"epochs": 1, "batch_size": job.batch, "device": job.device, "threads": 2},
        },
        R.Recipe,
        "benchmarks/trainer.py",
    )
    device = torch.device(job.device)
    dataset = data.load(asked.data, folder)
    teacher = teachers.load(asked.teacher)
    start = time.perf_counter()
    tower = teachers.folded(teacher)
    ingredients = cache.Ingredients(teacher, tower, dataset, asked.views, 0, True, device, 2)
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
    train(learner, Lesson(dataset, [Taught(teacher, cached)]), asked, device)
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


def measured(who: str, job: Job, python: str = sys.executable) -> dict[str, Any]:
    """Run a trainer; return its answer, images a second and peak MiB."""
    command = [python, __file__, "--worker", who, "--job", json.dumps(job)]
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
        # One clock for all processes (Linux's monotonic one), so the samples can be laid beside the
        # steps. Of steps that are over between two samples the nearest one counts.
        away = [max(ends[0] - when, when - ends[-1], 0.0) for when, _ in seen]
        during = max(mib for (_, mib), far in zip(seen, away, strict=True) if far == min(away))
        answer |= {
            "images_per_second": job.batch * (len(ends) - SKIP) / (ends[-1] - ends[SKIP - 1]),
            "steps": len(ends),
            "steps_mib": during,
        }
    return answer | {"peak_mib": max(mib for _, mib in seen)}


WORKERS = {
    "teacher": write_teacher,
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
    parser.add_argument("--worker", choices=list(WORKERS), help="internal: be one process")
    parser.add_argument("--job", help="internal: what the worker is to do")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](Job(*json.loads(options.job)))))
        return
    if options.open_clip_python == sys.executable:
        common.require("pip install 'webdataset<0.2.87'", module="webdataset")
    here = common.this_machine()
    batch = BATCHES[options.form]
    images = batch * STEPS[options.form]
    with tempfile.TemporaryDirectory() as temporary:
        write_shards(Path(temporary) / "shards", images)
        teacher = options.teacher or TEACHERS[options.form]
        job = Job(STUDENTS[options.form], teacher, temporary, batch, images)
        # In a process of its own: this one must stay small.
        measured("teacher", job)
        built = measured("cache", job)
        pythons = {"open_clip": options.open_clip_python, "edgeclip": sys.executable}
        peers = {who: partial(measured, who, job, python) for who, python in pythons.items()}
        rounds = compare.interleave(peers, ROUNDS[options.form])
    figures: dict[str, Any] = {
        "benchmark": "trainer",
        "student": job.student,
        "teacher": job.teacher,
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
    common.table(
        rows, [f"{job.teacher} to {job.student}", "images/s", "MiB in its steps", "MiB at its peak"]
    )
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
