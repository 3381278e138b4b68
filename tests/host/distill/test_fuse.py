"""Several teachers made one by a linear map: it starts as the first, learns what the others know,
and is what the student sees.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.nn import functional as F

from edgeclip.cli import main
from edgeclip.device.images import ImageRef
from edgeclip.device.metrics import hits
from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import teachers
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset, load, shapes
from edgeclip.host.distill import stage2
from edgeclip.host.distill.fuse import Fusion, fuse
from edgeclip.host.distill.targets import Lesson, Targets, Taught, TeacherRows, labels
from edgeclip.host.distill.train import train
from edgeclip.host.evaluation.scores import image_features
from edgeclip.host.teachers import Teacher
from tests.support.files import REPO

N, EACH, VIEWS = 4, 24, 2
CPU = torch.device("cpu")
SPEC = R.Fuse(steps=200, batch_size=64, lr=1e-2, labels=0.0)


def expert(width: int, knows: set[int], seed: int) -> tuple[Teacher, TeacherCache]:
    """A teacher whose features are right for the classes it knows and say nothing of the others."""
    rng = np.random.default_rng(seed)
    w = np.linalg.qr(rng.normal(size=(width, width)))[0][:N].astype(np.float32)
    label = np.arange(N * EACH) % N
    hidden = w.mean(axis=0)  # as near to each class
    clean = np.where(np.isin(label, list(knows))[:, None], w[label], hidden)
    rows = (clean[:, None] + 0.05 * rng.normal(size=(N * EACH, VIEWS, width))).astype(np.float16)
    images = [ImageRef(key=str(i), path="", label=int(c)) for i, c in enumerate(label)]
    cache = TeacherCache(
        Path(f"cache-{seed}"),
        {},
        images,
        rows,
        np.zeros((len(label), VIEWS, 5), np.float32),
        w,
        None,
    )
    preprocess = Preprocess(size=8, mean=(0, 0, 0), std=(1, 1, 1))
    parts = {
        "name": "toy",
        "license": "none",
        "identity": {},
        "preprocess": preprocess,
        "logit_scale": 20.0,
        "embed_dim": width,
    }
    return Teacher(
        **parts,
        tower=torch.nn.Identity(),
        features=lambda r: r,
        encode_text=lambda texts: torch.zeros(len(texts), width),
    ), cache


def experts():
    pairs = [expert(8, {0, 1}, 0), expert(12, {2, 3}, 1)]
    images = pairs[0][1].images
    data = Dataset(
        "toy",
        "none",
        list("abcd"),
        ("{c}",),
        [p for p in images if p.label < 2],
        images,
        list(range(N)),
        [],
    )
    return pairs, data, [TeacherRows(t, c, data.train_classes, CPU) for t, c in pairs]


def accuracy(features: torch.Tensor, rows: TeacherRows) -> float:
    truth = torch.tensor([p.label for p in rows.cache.images])
    return (
        ((F.normalize(features, dim=-1) @ rows.class_features.T).argmax(dim=-1) == truth)
        .float()
        .mean()
        .item()
    )


def units(rows: list[TeacherRows]) -> list[torch.Tensor]:
    index = np.arange(N * EACH)
    return [F.normalize(t.features(index, np.zeros_like(index)), dim=-1) for t in rows]


def test_it_starts_as_the_first_teacher():
    _, _, rows = experts()
    torch.testing.assert_close(Fusion([8, 12])(units(rows)), units(rows)[0], rtol=0, atol=0)


def test_it_learns_without_labels_what_the_other_teacher_knows_and_is_read_back(tmp_path):
    _, data, rows = experts()
    fusion = fuse(rows, labels(rows[0].cache, data), SPEC, 0, tmp_path / "fusion")
    assert accuracy(units(rows)[0], rows[0]) < 0.8 and accuracy(fusion(units(rows)), rows[0]) > 0.95
    again = fuse(
        rows, labels(rows[0].cache, data), SPEC, 1, tmp_path / "fusion"
    )  # another seed: it is read, not learned
    torch.testing.assert_close(again.linear.weight, fusion.linear.weight, rtol=0, atol=0)


def test_labels_are_those_of_the_labeled_images_alone():
    pairs, data, _ = experts()
    own = labels(pairs[0][1], data)
    assert set(own[own >= 0]) == {0, 1} and (own == -1).sum() == 2 * EACH


def test_the_fusion_of_other_teachers_is_refused(tmp_path):
    _, data, rows = experts()
    fuse(rows, labels(rows[0].cache, data), SPEC, 0, tmp_path / "fusion")
    with pytest.raises(EdgeclipError, match="of other teachers"):
        fuse(rows[::-1], labels(rows[0].cache, data), SPEC, 0, tmp_path / "fusion")


def test_the_student_sees_the_fused_teacher_and_no_other():
    pairs, data, rows = experts()
    fusion = Fusion([8, 12]).requires_grad_(False)
    torch.nn.init.normal_(fusion.linear.weight, generator=torch.Generator().manual_seed(0))
    lesson = Lesson(data, [Taught(*pair) for pair in pairs], fusion)
    batch = Targets(lesson, R.Losses(kl=R.KL()), CPU)(np.arange(5), np.zeros(5, int))
    torch.testing.assert_close(
        batch.teacher_features, F.normalize(fusion([u[:5] for u in units(rows)]), dim=-1)
    )
    assert batch.other_teachers == () and batch.class_features.shape == (N, 8)


TARGET = """
runtime: onnxruntime
activations: int8
precision: int8
calibration: {images: 16, methods: [minmax], smoothing: [null], probe_layers: 0}
tolerance: {centered_cosine_p1: 0, top1_agreement: 0, accuracy_drop_pp: 1}
"""


def test_a_fused_run_end_to_end_learns_from_and_scores_the_fused_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.write(tmp_path / ".data" / "shapes")
    recipe = yaml.safe_load((REPO / "recipes" / "smoke.yaml").read_text())
    tower = {
        "kind": "timm",
        "model": "mobilenetv4_conv_small_035",
        "weights": "random",
        "image_size": 32,
    }
    recipe |= {
        "fuse": {"steps": 50, "batch_size": 64, "lr": 1e-2},
        "student": {"tower": tower, "projector_hidden": None},
        "qat": {"target": "t.yaml"},
    }
    recipe["data"]["classes"] = (
        "classnames.txt"  # with labels the map learns colors, which random teachers' features have
    )
    recipe["train"] |= {"epochs": 0, "warmup_steps": 5, "lr": 1e-3}
    Path("fused.yaml").write_text(json.dumps(recipe))
    Path("t.yaml").write_text(TARGET)
    fusions = []
    monkeypatch.setattr(
        stage2,
        "train",
        lambda learner, lesson, *a: fusions.append(lesson.fusion) or train(learner, lesson, *a),
    )
    result = CliRunner().invoke(main, ["distill", "fused.yaml", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (
        len(fusions) == 2 and fusions[0] is fusions[1] is not None
    )  # of stage 2, and of the copy that learns to round
    (row,) = json.loads(result.stdout)["sets"]

    fusion = Fusion([64, 32])
    fusion.load_state_dict(load_file("runs/fused/fusion/fusion.safetensors"))
    asked = R.load(Path("fused.yaml"))
    images = load(asked.evaluation_data, Path("cache")).evaluation[0].images
    units = []
    for teacher in map(teachers.load, (asked.teacher, *asked.other_teachers)):
        kept, features, _ = image_features(
            torch.nn.Sequential(teacher.tower), images, teacher.preprocess, "by hand", CPU
        )
        units.append(F.normalize(teacher.features(torch.from_numpy(features)), dim=-1))
    truth, w = (
        np.array([images[i].label for i in kept]),
        np.load("runs/fused/student/class_features.npy"),
    )

    def r1(features):
        return hits(F.normalize(features, dim=-1).detach().numpy() @ w.T, truth, 1).mean()

    assert (
        row["teacher"]["top1"] == pytest.approx(r1(fusion(units)))
        and r1(fusion(units)) > r1(units[0]) + 0.1
    )
    evaluated = CliRunner().invoke(
        main,
        ["evaluate", "runs/fused", "--protocol", "zero_shot", "--json"],
        catch_exceptions=False,
    )
    assert evaluated.exit_code == 0 and "fused" in json.loads(evaluated.stdout)["teacher_missing"]


def test_fuse_needs_several_teachers(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text((REPO / "recipes" / "clothing.yaml").read_text() + "\nfuse: {}\n")
    with pytest.raises(EdgeclipError, match="fuse: needs several teachers"):
        R.load(path)
