"""A student that is the mean of its last weights, and steps that are not longer than they may
be.
"""

import pytest
import torch
from torch import nn

from edgeclip.host.distill.average import Average
from edgeclip.host.distill.step import Step
from tests.support.toy_training import run

COMKD = {"kl": {}, "if_align": {"weight": 10}, "edu_attention": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


def test_it_is_the_mean_of_what_was_counted_in():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    mean = Average(module)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    mean.give(module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    seen = []
    for i in range(4):
        nn.init.constant_(module[0].weight, float(i))
        module(torch.randn(8, 3))
        seen.append({k: v.clone() for k, v in module.state_dict().items()})
        mean.add(module)
    mean.give(module)
    assert module[1].num_batches_tracked == 4
    for name in ("0.weight", "1.running_mean"):
        expected = torch.stack([s[name] for s in seen]).mean(dim=0)
        torch.testing.assert_close(module.state_dict()[name], expected)


@pytest.fixture
def after_each_step(monkeypatch):
    """The towers' weights after each step of a run."""
    found = []
    step = Step.__call__

    def noted(self, *arguments):
        metrics = step(self, *arguments)
        found.append({k: v.clone() for k, v in self.towers.image.state_dict().items()})
        return metrics

    monkeypatch.setattr(Step, "__call__", noted)
    return found


@pytest.mark.parametrize("share", [1.0, 1e-9])
def test_the_student_is_the_mean_of_the_last_steps_weights(folder, after_each_step, share):
    _, weights, _ = run(folder, COMKD, kind="batch norm", warmup_steps=0, average_last=share)
    last = after_each_step if share == 1.0 else after_each_step[-1:]
    assert len(after_each_step) > 2
    for name in last[0]:
        if not last[0][name].is_floating_point():
            continue
        expected = torch.stack([s[name] for s in last]).mean(dim=0)
        torch.testing.assert_close(weights[f"student.tower.{name}"], expected)


def test_a_mean_changes_no_step(folder):
    plain, averaged = run(folder, COMKD), run(folder, COMKD, average_last=0.5)
    assert plain[0] == averaged[0]
    assert any(not torch.equal(plain[1][k], averaged[1][k]) for k in plain[1])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_is_not_longer_than_it_may_be(folder, monkeypatch, precision):
    norms = []
    clip = nn.utils.clip_grad_norm_

    def noted(weights, limit):
        weights = list(weights)
        clip(weights, limit)
        norms.append(torch.cat([p.grad.flatten() for p in weights if p.grad is not None]).norm())

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noted)
    steps, *_ = run(folder, COMKD, precision=precision, max_grad_norm=1e-3)
    assert len(norms) == len(steps)
    if precision == "fp16":  # a step that the loss scale leaves out has no length
        norms = [norm for norm in norms if norm.isfinite()]
    assert norms and all(norm == pytest.approx(1e-3, rel=1e-3) for norm in norms)


def test_a_wide_limit_is_none(folder):
    assert run(folder, COMKD, max_grad_norm=1e9)[0] == run(folder, COMKD)[0]
