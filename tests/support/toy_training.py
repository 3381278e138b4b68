"""A whole training run at toy size on real files: images, towers of several kinds, a text tower, a
teacher's cache.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeclip.config import convert
from edgeclip.device.images import index_folder
from edgeclip.device.preprocess import Preprocess
from edgeclip.host import distributed
from edgeclip.host import recipe as R
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset
from edgeclip.host.distill import train as T
from edgeclip.host.distill.step import Step
from edgeclip.host.distill.targets import Lesson, Taught
from edgeclip.host.distill.text import Texts
from edgeclip.host.distill.training import Learner, Output
from edgeclip.host.student import EduAttentionHead, Student, StudentText
from edgeclip.host.teachers import Teacher
from tests.support.images import toy_image

IMAGES, VIEWS, SIDE, D, N, WIDTH = 40, 2, 8, 8, 6, 16


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Words(nn.Module):
    """A text tower: the mean of its words' vectors."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 12)

    def encode_text(self, ids):
        return self.table(ids).mean(dim=1).tanh()


def tower(kind):
    start = [nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 24), nn.Tanh()]
    if kind == "dropout":
        start.append(nn.Dropout(0.3))
    if kind == "batch norm":
        start = [
            nn.Conv2d(3, 24, 3, stride=2, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
    if kind == "vit":
        import timm

        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=SIDE,
            patch_size=4,
            embed_dim=WIDTH,
            depth=2,
            num_heads=2,
            num_classes=0,
        )
    # No bias before the projector's batch norm: it would have no gradient but rounding, which AdamW
    # makes steps of.
    return nn.Sequential(*start, nn.Linear(24, WIDTH, bias=False))


def run(folder, losses, kind="plain", text=False, student=None, **schedule):
    """Trains; returns each step's loss, the weights of everything that learns, and the log.
    schedule: also what `train` takes.
    """
    folder = Path(folder)
    with distributed.rank_zero_first():
        if not (folder / "39.png").exists():
            for i in range(IMAGES):
                toy_image(i, SIDE, SIDE).save(folder / f"{i:02d}.png")
    images = [p._replace(label=i % N) for i, p in enumerate(index_folder(folder))]
    rng = np.random.default_rng(0)
    views = np.tile(np.float32([0, 0, SIDE, SIDE, 0]), (IMAGES, VIEWS, 1))
    views[:, 1, 4] = 1
    rows, captions, classes = (
        unit(rng, IMAGES, VIEWS, D).astype(np.float16),
        unit(rng, IMAGES, 1, D).astype(np.float16),
        unit(rng, N, D),
    )
    cache = TeacherCache(folder, {}, images, rows, views, classes, captions)
    data = Dataset(
        "toy",
        "none",
        list("abcdef"),
        ("{c}",),
        [p for p in images if p.label < 3],
        images,
        list(range(N)),
        [],
    )
    preprocess = Preprocess(size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    teacher = Teacher(
        name="toy",
        license="none",
        identity={},
        preprocess=preprocess,
        logit_scale=10.0,
        embed_dim=D,
        tower=nn.Identity(),
        features=lambda r: r,
        encode_text=lambda texts: torch.zeros(len(texts), D),
    )
    clock = schedule.pop("clock", None)
    options = {k: schedule.pop(k) for k in ("keep", "checkpoints", "board") if k in schedule}
    train = convert(
        {
            "warmup_steps": 4,
            "warmup_batch_size": 12,
            "epochs": 2,
            "batch_size": 16,
            "lr": 2e-3,
            **schedule,
        },
        R.Train,
        "train",
    )
    spec = R.Student(
        tower=R.Timm(model="none", weights="random", image_size=SIDE), **(student or {})
    )
    asked = R.Recipe(
        data=R.OpenMoji(),
        teacher=R.Conse(),
        student=spec,
        losses=convert(losses, R.Losses, "losses"),
        train=train,
    )
    torch.manual_seed(0)
    trained = Student(tower(kind), WIDTH, D, 12)
    edu = asked.losses.edu_attention
    head = EduAttentionHead(D, edu, torch.Generator().manual_seed(0)) if edu else None
    texts = None
    if text:
        words = torch.from_numpy(rng.integers(20, size=(IMAGES + 9, 5)))
        texts = Texts(
            StudentText(Words(), 12, D),
            words[:IMAGES, None],
            words[IMAGES:],
            torch.from_numpy(unit(rng, 9, D)),
        )
    steps, first = [], Step.__call__

    def recorded(self, *arguments):
        said = first(self, *arguments)
        steps.append(said["loss"].item())
        return said

    Step.__call__ = recorded
    try:
        log = T.train(
            Learner(trained, head, preprocess, texts),
            Lesson(data, [Taught(teacher, cache)]),
            asked,
            torch.device("cpu"),
            clock,
            Output(**options),
        )
    finally:
        Step.__call__ = first
    modules = {"student": trained, "head": head, "text": texts.tower if texts else None}
    weights = {
        f"{n}.{k}": v.clone()
        for n, m in modules.items()
        if m is not None
        for k, v in m.state_dict().items()
    }
    return steps, weights, log


def main():
    """Under torchrun: cases as JSON (name to keyword arguments of `run`) to their curves, and the
    weights of both processes.
    """
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    distributed.start(torch.device("cpu"))
    found = {}
    for name, case in cases.items():
        steps, weights, log = run(folder, **case)
        found[name] = {
            "steps": steps,
            "log": log,
            "weights": {k: v.double().flatten().tolist() for k, v in weights.items()},
        }
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main()
