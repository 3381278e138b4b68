"""First training: the teacher's plain answers before the full loss, by the same loop."""

import gc
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.data import shapes
from edgeclip.host.distill import stage2
from edgeclip.host.distill.batch import Batch
from edgeclip.host.distill.objective import pretrain_loss
from edgeclip.host.distill.run import distill
from edgeclip.host.distill.train import train
from edgeclip.host.evaluation.protocols import evaluate
from edgeclip.host.teachers.open_clip import TextModule
from tests.support.files import REPO


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name, losses, train fields -> (results, the student's weights); all runs share one teacher
    cache.
    """
    folder = tmp_path_factory.mktemp("first")
    shapes.write(folder / ".data" / "shapes")

    def get(name, losses, train, **data):
        recipe = yaml.safe_load((REPO / "recipes" / "smoke.yaml").read_text())
        recipe["losses"] = losses
        recipe["train"] |= {"warmup_steps": 0, "lr": 1e-3, **train}
        recipe |= data
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))
        results = distill(folder / f"{name}.yaml")
        return results, load_file(folder / "runs" / name / "student" / "student.safetensors")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield get


def test_first_training_on_features_is_training_on_the_feature_loss_bit_for_bit(trained):
    _, plain = trained("plain", {"feature": {"weight": 1}}, {"epochs": 2})
    _, first = trained(
        "first",
        {"kl": {"weight": 1}},
        {"epochs": 0, "pretrain": {"epochs": 2, "labels": "features"}},
    )
    assert plain.keys() == first.keys() and all(torch.equal(plain[k], first[k]) for k in plain)


def test_its_rows_come_before_the_full_losses_and_its_loss_falls(trained):
    results, _ = trained(
        "both",
        {"kl": {"weight": 1}},
        {"warmup_steps": 5, "epochs": 1, "pretrain": {"epochs": 3, "labels": "predictions"}},
    )
    rows = results.log
    assert [r["epoch"] for r in rows] == [0, 1, 2, 3, 4]
    assert ["pretrain_predictions" in r for r in rows] == [False, True, True, True, False]
    assert rows[3]["pretrain_predictions"] < rows[1]["pretrain_predictions"]
    assert "kl" in rows[4] and "kl" not in rows[3]


def test_closed_forms():
    torch.manual_seed(0)
    t, w = F.normalize(torch.randn(4, 6), dim=-1), F.normalize(torch.randn(3, 6), dim=-1)
    same, opposite = (Batch(s, s, t, w, None, 10.0) for s in (t, -t))
    features, predictions = (R.Pretrain(labels=labels) for labels in ("features", "predictions"))
    assert pretrain_loss(same, features)[0].item() == pytest.approx(0, abs=1e-6)
    assert pretrain_loss(opposite, features)[0].item() == pytest.approx(2)
    # the teacher's own answer: minus the log of its largest probability
    expected = -(10 * t @ w.T).softmax(dim=-1).amax(dim=-1).log().mean()
    assert pretrain_loss(same, predictions)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_predictions_need_a_class_list(trained):
    with pytest.raises(
        EdgeclipError, match=r"train\.pretrain\.labels: predictions need a class list"
    ):
        data = {
            "kind": "webdataset",
            "name": "shapes",
            "root": ".data/shapes",
            "train": "train/*.tar",
            "test": None,
            "classes": None,
        }
        trained(
            "none",
            {"feature": {"weight": 1}},
            {"pretrain": {"labels": "predictions"}},
            data=data,
            evaluation_data=None,
        )


def test_training_runs_without_the_teachers_towers(trained, monkeypatch):
    alive = []

    def counted(learner, lesson, *arguments):
        towers = [m for m in gc.get_objects() if issubclass(type(m), TextModule)]
        alive.append([type(m).__name__ for m in towers])
        alive.append([type(t.teacher.tower).__name__ for t in lesson.teachers])
        return train(learner, lesson, *arguments)

    monkeypatch.setattr(stage2, "train", counted)
    results, _ = trained("alone", {"kl": {"weight": 1}}, {"epochs": 1})
    assert alive == [[], ["Identity", "Identity"]]
    # It is loaded again to be scored, and then is what `evaluate` loads.
    again = evaluate(Path("runs/alone"), "zero_shot").sets[0]
    assert (
        again.teacher == results.sets[0].teacher is not None
        and results.models.teacher.parameters > 0
    )
