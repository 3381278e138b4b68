"""The training loop on a toy cache: golden 20-step curves of every method, and what must be the
same run.

`python -m tests.host.distill.test_train` writes tests/golden/curves.json anew; a refactoring must
not need it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeclip.config import convert
from edgeclip.device.images import ImageRef
from edgeclip.device.manifest import ClassOffset
from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset
from edgeclip.host.distill import losses as L
from edgeclip.host.distill import train as T
from edgeclip.host.distill import training
from edgeclip.host.distill.step import Step
from edgeclip.host.distill.targets import Lesson, Targets, Taught
from edgeclip.host.student import EduAttentionHead, Student
from edgeclip.host.teachers import Teacher
from tests.support import toy_training as toys
from tests.support.files import REPO

GOLDEN = REPO / "tests" / "golden" / "curves.json"
IMAGES, VIEWS, TOWER, D, N, STEPS = 48, 2, 16, 8, 6, 20
CLIP_KD = {
    "contrastive": {},
    "affinity": {"form": "kl"},
    "feature": {"weight": 7.8},
    "interactive": {},
}
COMKD = {"kl": {}, "if_align": {"weight": 100}, "edu_attention": {}}
METHODS = {name: {name: {}} for name in L.LOSSES} | {
    "if_align": {"if_align": {"weight": 100}},
    "CLIP-KD": CLIP_KD,
    "CLIP-RD": CLIP_KD | {"vrd": {}, "xrd": {}},
    "ComKD": COMKD,
}


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def toy():
    rng = np.random.default_rng(0)
    images = [ImageRef(key=str(i), path="", label=i % N) for i in range(IMAGES)]
    rows = unit(rng, IMAGES, VIEWS, D).astype(np.float16)
    captions = unit(rng, IMAGES, 1, D).astype(np.float16)
    cache = TeacherCache(
        Path("cache"),
        {},
        images,
        rows,
        np.zeros((IMAGES, VIEWS, 5), np.float32),
        unit(rng, N, D),
        captions,
    )
    labeled = [p for p in images if p.label < 3]
    data = Dataset("toy", "none", list("abcdef"), ("{c}",), labeled, images, list(range(N)), [])
    preprocess = Preprocess(size=8, mean=(0, 0, 0), std=(1, 1, 1))
    teacher = Teacher(
        name="toy",
        license="none",
        identity={},
        preprocess=preprocess,
        logit_scale=10.0,
        embed_dim=D,
        tower=torch.nn.Identity(),
        features=lambda r: r,
        encode_text=lambda texts: torch.zeros(len(texts), D),
    )
    return (
        teacher,
        cache,
        data,
        preprocess,
        torch.from_numpy(rng.normal(size=(IMAGES, VIEWS, TOWER)).astype(np.float32)),
    )


def curve(losses, monkeypatch, **schedule):
    """The total loss of each step, the student's weights at the end, and the log."""
    teacher, cache, data, preprocess, features = toy()
    train = R.Train(
        **(
            {"warmup_steps": STEPS, "warmup_batch_size": 16, "warmup_lr": 1e-2, "epochs": 0}
            | schedule
        )
    )
    tower = R.Timm(model="none", weights="random", image_size=8)
    asked = R.Recipe(
        data=R.OpenMoji(),
        teacher=R.Conse(),
        student=R.Student(tower=tower),
        losses=convert(losses, R.Losses, "losses"),
        train=train,
    )
    torch.manual_seed(0)
    student = Student(torch.nn.Identity(), TOWER, D, 12)
    spec = asked.losses.edu_attention
    head = EduAttentionHead(D, spec, torch.Generator().manual_seed(0)) if spec else None
    steps = []

    class Recorded(Step):
        def __call__(self, *arguments):
            said = super().__call__(*arguments)
            steps.append(said["loss"].item())
            return said

    monkeypatch.setattr(training, "Step", Recorded)
    log = T.train(
        training.Learner(student, head, preprocess),
        Lesson(data, [Taught(teacher, cache)]),
        asked,
        torch.device("cpu"),
        tower_features=features,
    )
    return steps, student.state_dict(), log


@pytest.mark.parametrize("method", list(METHODS))
def test_the_curve_is_the_golden_one(method, monkeypatch):
    steps, _, _ = curve(METHODS[method], monkeypatch)
    golden = json.loads(GOLDEN.read_text())[method]
    np.testing.assert_allclose(
        steps, golden, rtol=1e-3, atol=1e-4 * max(golden)
    )  # another CPU rounds otherwise


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("vrd", "xrd", "interactive", "CLIP-RD")]
)
def test_every_method_learns_its_loss(method, monkeypatch):
    steps, _, _ = curve(METHODS[method], monkeypatch, warmup_steps=100)
    assert np.mean(steps[-10:]) < np.mean(steps[:10])


def test_alpha_frozen_at_zero_and_lambda_zero_are_promptkd_bit_for_bit(monkeypatch):
    promptkd, weights, _ = curve({"kl": {}}, monkeypatch)
    both = {"kl": {}, "if_align": {"weight": 0}, "edu_attention": {"learn_alpha": False}}
    comkd, same, _ = curve(both, monkeypatch)
    assert promptkd == comkd and all(torch.equal(weights[k], same[k]) for k in weights)


def test_the_log_has_every_loss_before_its_weight_and_alpha(monkeypatch):
    _, _, log = curve(COMKD, monkeypatch)
    assert set(log[0]) == {"epoch", "loss", "kl", "if_align", "alpha"} and log[0]["alpha"] != 0
    assert log[0]["loss"] == pytest.approx(log[0]["kl"] + 100 * log[0]["if_align"], rel=1e-5)


def test_captions_of_classes_use_no_label_that_is_not_given():
    teacher, cache, data, _, _ = toy()
    spec = R.Losses(contrastive=R.Weighted(), captions="classes")
    index = np.arange(IMAGES)
    lesson = Lesson(data, [Taught(teacher, cache)])
    known = Targets(lesson, spec, torch.device("cpu"))(index, np.zeros_like(index))
    first = (known.teacher_features @ known.class_features.T).argmax(dim=1).numpy()
    labels = np.array([p.label for p in cache.images])
    expected = np.where(labels < 3, labels, first)
    assert torch.equal(known.caption_features, known.class_features[expected])
    assert known.labels.tolist() == np.where(labels < 3, labels, -1).tolist()


def test_captions_of_classes_are_chosen_with_the_classes_with_labels_set_back():
    teacher, cache, data, _, _ = toy()
    spec = R.Losses(contrastive=R.Weighted(), captions="classes")
    index = np.arange(IMAGES)
    set_back = ClassOffset(
        offset=10.0,
        labels=data.classes[:3],
        images=1,
        rule="prior",
        labeled_named=0.0,
        others_named=1.0,
        labeled_named_without=0.0,
        others_named_without=0.0,
    )
    lesson = Lesson(data, [Taught(teacher, cache)], class_offset=set_back)
    known = Targets(lesson, spec, torch.device("cpu"))(index, np.zeros_like(index))
    others = (known.teacher_features @ known.class_features[3:].T).argmax(dim=1).numpy() + 3
    labels = np.array([p.label for p in cache.images])
    expected = np.where(labels < 3, labels, others)
    assert torch.equal(known.caption_features, known.class_features[expected])


def test_captions_of_classes_use_no_label_at_all_where_stage_1_had_another_set():
    teacher, cache, data, _, _ = toy()
    index = np.arange(IMAGES)
    lesson = Lesson(data, [Taught(teacher, cache)])
    spec = R.Losses(captions="classes")
    targets = Targets(lesson, spec, torch.device("cpu"), adapted_here=False)
    known = targets(index, np.zeros_like(index))
    first = (known.teacher_features @ known.class_features.T).argmax(dim=1)
    assert torch.equal(known.caption_features, known.class_features[first])


def test_prototypes_are_unit_means_of_the_labeled_plain_views():
    teacher, cache, data, _, _ = toy()
    lesson = Lesson(data, [Taught(teacher, cache)])
    found = Targets(lesson, R.Losses(), torch.device("cpu")).prototypes.numpy()
    for c in range(N):
        own = cache.rows[[i for i, p in enumerate(cache.images) if p.label == c], 0].astype(
            np.float32
        )
        mean = (own / np.linalg.norm(own, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(
            found[c], mean / np.linalg.norm(mean) if c < 3 else np.zeros(D), atol=1e-5
        )


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step(monkeypatch):
    with pytest.raises(EdgeclipError, match="projector step"):
        curve({"feature": {}}, monkeypatch, warmup_lr=1e25)


def test_the_projector_learns_the_same_when_the_tower_sees_each_batch_as_it_comes(
    tmp_path, monkeypatch
):
    """Of many more views than the projector's steps see, features are not computed before: 6 x 12
    of 80 views, and 7 x 12.
    """
    whole, asked = T.frozen_features, []
    monkeypatch.setattr(T, "frozen_features", lambda *a: asked.append(1) or whole(*a))
    losses = {"kl": {}, "if_align": {"weight": 100}}
    as_they_come, *_ = toys.run(tmp_path, losses, warmup_steps=6, warmup_lr=0, epochs=0)
    assert not asked
    before, *_ = toys.run(tmp_path, losses, warmup_steps=7, warmup_lr=0, epochs=0)
    assert asked
    assert len(as_they_come) == 6
    assert len(set(as_they_come)) == 6
    np.testing.assert_allclose(as_they_come, before[:6], rtol=1e-5)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        curves = {}
        for name, losses in METHODS.items():
            with patch.context() as inner:
                curves[name] = [float(f"{x:.6g}") for x in curve(losses, inner)[0]]
    GOLDEN.write_text(json.dumps(curves, indent=0) + "\n")
