"""What leaks.py repeats: training steps, epochs, inferences, openings and changes of labels.

Each loop runs in a process of its own and calls `done` after every round. `plain` loops are the
runtime's own interface, called as its documentation does, on the same file: what grows there is not
edgeclip's.
"""

import functools
import importlib.util
import io
import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import crash_points
import crash_stages

if TYPE_CHECKING:
    import numpy as np

RUNTIMES = {
    "onnxruntime": "onnx-fp32",
    "openvino": "openvino-fp16",
    "tensorrt": "tensorrt-fp16",
}
"""and the target whose bundle each opens"""
LABELS = ("an apple", "a pear", "a plum")
BATCH = 2
WIDTH = 16
STEPS_OF_EPOCH = 5
FRAME = (48, 64)
"""rows and columns of the camera's"""
Done = Callable[[], None]


class Loop(NamedTuple):
    run: Callable[[Path, int, Done], None]
    """home, rounds, what is called after each"""
    unit: str
    rounds: int
    """of the whole form"""
    runtime: str | None = None
    """that it needs"""
    alone: bool = False
    """it is the runtime's own, without edgeclip"""
    beside: str | None = None
    """the loop of the runtime alone"""
    kept: int = 0
    """bytes a round that are meant to be kept for as long as the loop runs"""


def make_home(home: Path, runtimes: set[str | None]) -> list[str]:
    """Write a bundle for each of the runtimes, and what is trained on; return those that are not
    installed.
    """
    from edgeclip import disk
    from edgeclip.host.data import shapes

    disk.write_json(home / "clip.json", crash_stages.CLIP)
    model = ["--model", "clip.json", "--weights", "random", "--labels", ", ".join(LABELS)]
    missing = []
    for runtime, target in RUNTIMES.items():
        if runtime not in runtimes:
            continue
        if importlib.util.find_spec(runtime) is None:
            missing.append(runtime)
            continue
        command = [sys.executable, "-m", "edgeclip", "export", *model]
        command += ["--target", target, "--out", "bundles"]
        subprocess.run(command, cwd=home, check=True, stdout=sys.stderr)
    (home / "images").mkdir()
    shapes.draw(0, random.Random(0)).resize((24, 24)).save(home / "images" / "0.jpg")
    return missing


def copy(home: Path) -> Path:
    """Return a copy of the folder, in which one loop may write."""
    work = home.with_name("work")
    crash_points.copy(home, work)
    return work


# --- training


class Toy(NamedTuple):
    learner: Any
    lesson: Any
    recipe: Any


def toy(home: Path, images: int, epochs: int) -> Toy:
    """Return what `train` takes: a tower of one convolution, a cache of so many rows, all losses of
    the paper.

    The cache's files are sparse (scale.py); it is opened, checked and read as any other.
    """
    import numpy as np
    import scale
    import torch
    from torch import nn

    from edgeclip.config import convert
    from edgeclip.device.images import index_folder
    from edgeclip.device.preprocess import Preprocess
    from edgeclip.host import recipe as R
    from edgeclip.host.cache import open_folder
    from edgeclip.host.data import Dataset
    from edgeclip.host.distill.targets import Lesson, Taught
    from edgeclip.host.distill.training import Learner
    from edgeclip.host.student import EduAttentionHead, Student
    from edgeclip.host.teachers import Teacher

    scale.sparse(home / "cache", images, width=WIDTH)
    refs = index_folder(home / "images") * images
    rows = np.random.default_rng(0).normal(size=(len(LABELS), WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cache = open_folder(home / "cache", refs)._replace(class_features=rows)
    classes = list(range(len(LABELS)))
    data = Dataset("toy", "generated", list(LABELS), ("{c}",), [], refs, classes, [])
    preprocess = Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher = Teacher(
        name="toy",
        license="generated",
        identity={},
        preprocess=preprocess,
        logit_scale=10.0,
        embed_dim=WIDTH,
        tower=nn.Identity(),
        features=lambda rows: rows,
        encode_text=lambda texts: torch.zeros(len(texts), WIDTH),
    )
    schedule = {"warmup_steps": 0, "epochs": epochs, "batch_size": BATCH, "lr": 1e-5}
    recipe = R.Recipe(
        data=R.OpenMoji(),
        teacher=R.Conse(),
        student=R.Student(tower=R.Timm(model="none", weights="random", image_size=16)),
        losses=convert({"kl": {}, "if_align": {}, "edu_attention": {}}, R.Losses, "losses"),
        train=convert(schedule | {"device": "cpu", "threads": 1}, R.Train, "train"),
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tower = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    edu = recipe.losses.edu_attention
    assert edu is not None
    head = EduAttentionHead(WIDTH, edu, torch.Generator().manual_seed(0))
    student = Student(tower, 8, WIDTH, WIDTH)
    learner = Learner(student, head, preprocess)
    return Toy(learner, Lesson(data, [Taught(teacher, cache)]), recipe)


def steps(home: Path, count: int, done: Done) -> None:
    """Train for one epoch of `count` steps: what an epoch holds until its end would show."""
    import torch

    from edgeclip.host.allocator import keep_freed_memory
    from edgeclip.host.distill.train import train
    from edgeclip.progress import Clock

    class Counting(Clock):
        """The loop's own clock says when a step is over."""

        def lap(self, name: str) -> None:
            super().lap(name)
            if name == "rest of stage 2":
                done()

    keep_freed_memory()  # as `distill` does
    made = toy(home, count * BATCH, epochs=1)
    train(*made, torch.device("cpu"), Counting())


def epochs(home: Path, count: int, done: Done) -> None:
    """Train for `count` epochs of a few steps, each with its checkpoint."""
    import torch

    from edgeclip.host.allocator import keep_freed_memory
    from edgeclip.host.distill.train import train
    from edgeclip.host.distill.training import Output

    keep_freed_memory()
    made = toy(home, STEPS_OF_EPOCH * BATCH, epochs=count)
    output = Output(keep=lambda log: done(), checkpoints=home / "checkpoint")
    train(*made, torch.device("cpu"), output=output)


# --- inferences


def camera() -> Iterator["np.ndarray"]:
    """Yield frames for ever: uint8 [H, W, 3] in one buffer that the camera fills again."""
    import numpy as np

    kept = np.random.default_rng(0).integers(0, 256, (16, *FRAME, 3), dtype=np.uint8)
    buffer = np.empty((*FRAME, 3), np.uint8)
    for frame in itertools.cycle(kept):
        buffer[:] = frame
        yield buffer


def inferences(runtime: str, home: Path, count: int, done: Done) -> None:
    """Classify a camera's buffers, every other one as the JPEG that a camera over a network
    sends.
    """
    from PIL import Image

    from edgeclip.bundle import Bundle

    bundle = Bundle.load(_bundle(home, runtime))
    for i, frame in zip(range(count), camera(), strict=False):
        image = Image.fromarray(frame)
        if i % 2:
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG")
            bundle.classify(jpeg.getvalue())
        else:
            bundle.classify(image)
        done()


def plain_inferences(runtime: str, home: Path, count: int, done: Done) -> None:
    """Infer with the runtime alone, on one array."""
    run = PLAIN[runtime](_graph(home, runtime))
    pixels = _input()
    for _ in range(count):
        run(pixels)
        done()


def _bundle(home: Path, runtime: str) -> Path:
    return home / "bundles" / RUNTIMES[runtime]


def _graph(home: Path, runtime: str) -> Path:
    from edgeclip.device.manifest import read_manifest

    folder = _bundle(home, runtime)
    return folder / read_manifest(folder).image_encoder


def _input() -> "np.ndarray":
    import numpy as np

    size = crash_stages.CLIP["vision_cfg"]["image_size"]
    return np.zeros((1, 3, size, size), np.float32)


# --- openings


def openings(runtime: str, home: Path, count: int, done: Done) -> None:
    """Open a bundle, every file compared with its hash, classify an image, and let go of it."""
    from PIL import Image

    from edgeclip.bundle import Bundle

    frames = camera()
    for _ in range(count):
        bundle = Bundle.load(_bundle(home, runtime), check=True)
        bundle.classify(Image.fromarray(next(frames)))
        del bundle
        done()


def plain_openings(runtime: str, home: Path, count: int, done: Done) -> None:
    """Open the graph with the runtime alone, infer once, and let go of it."""
    graph = _graph(home, runtime)
    pixels = _input()
    for _ in range(count):
        run = PLAIN[runtime](graph)
        run(pixels)
        del run
        done()


Run = Callable[["np.ndarray"], Any]


def plain_onnxruntime(graph: Path) -> Run:
    """Open a graph as ONNX Runtime's documentation does, on one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


@functools.cache
def _core() -> Any:
    import openvino as ov

    return ov.Core()


def plain_openvino(graph: Path) -> Run:
    """Open a graph as OpenVINO's documentation does, with one core a process, on one thread."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
    request = _core().compile_model(graph, "CPU", options).create_infer_request()
    return lambda x: request.infer({0: x})[0].copy()


PLAIN: dict[str, Callable[[Path], Run]] = {
    "onnxruntime": plain_onnxruntime,
    "openvino": plain_openvino,
}


# --- labels


def labels(runtime: str, home: Path, count: int, done: Done) -> None:
    """Give a bundle other labels in its place, turn by turn."""
    from edgeclip.bundle import bake_labels

    lists = (list(LABELS), list(LABELS[:2]))
    for i in range(count):
        bake_labels(_bundle(home, runtime), lists[1 - i % 2], _bundle(home, runtime))
        done()


def _of_runtime(runtime: str) -> dict[str, Loop]:
    """Return the loops of a runtime; behind each the plain one, where there is one."""
    found = {}
    for unit, ours, plain, rounds in (
        ("inference", inferences, plain_inferences, 100_000),
        ("opening", openings, plain_openings, 1_000),
    ):
        beside = f"{unit}, {runtime} alone" if runtime in PLAIN else None
        run = functools.partial(ours, runtime)
        found[f"{unit}, {runtime}"] = Loop(run, unit, rounds, runtime, beside=beside)
        if beside:
            run = functools.partial(plain, runtime)
            found[beside] = Loop(run, unit, rounds, runtime, alone=True)
    run = functools.partial(labels, runtime)
    found[f"labels, {runtime}"] = Loop(run, "change of labels", 200, runtime)
    return found


LOOPS: dict[str, Loop] = {}
"""by name, in the order of the table"""
for _name in RUNTIMES:
    LOOPS |= _of_runtime(_name)
LOOPS |= {
    # A row of the log, and its text in the checkpoint.
    "epoch, checkpoint": Loop(epochs, "epoch", 500, kept=1024),
    # Three losses and their sum: an epoch's mean is of all of its steps, 4 bytes each.
    "training step": Loop(steps, "step", 100_000, kept=16),
}
