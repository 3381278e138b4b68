"""The classification head in numpy is the one that was trained in torch."""

import numpy as np
import pytest
import torch

from edgeclip.device.metrics import l2_normalize
from edgeclip.device.zero_shot import EduAttention, class_scores, ensemble, prompts
from edgeclip.host import recipe as R
from edgeclip.host.student import EduAttentionHead

D = 12


def unit(seed, *shape):
    return l2_normalize(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("classes", [1, 7, 40])
@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.2, 2.0])
def test_the_numpy_head_equals_the_torch_head_over_any_class_list(classes, alpha):
    head = EduAttentionHead(D, R.EduAttention(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.alpha.fill_(alpha)
    u, w = unit(1, 9, D), unit(2, classes, D)
    with torch.no_grad():
        expected = head(torch.from_numpy(u), torch.from_numpy(w)).numpy() @ w.T
    np.testing.assert_allclose(class_scores(u, w, head.numpy()), expected, atol=1e-6)


def test_alpha_zero_is_no_head_at_all():
    head = EduAttention(
        np.full((D, D), np.nan, np.float32), np.full(D, np.nan, np.float32), 0.0, 0.1
    )
    u, w = unit(1, 5, D), unit(2, 4, D)
    np.testing.assert_array_equal(class_scores(u, w, head), u @ w.T)
    np.testing.assert_array_equal(class_scores(u, w), u @ w.T)


def test_the_attention_is_equation_6_and_7():
    rng = np.random.default_rng(3)
    head = EduAttention(rng.normal(size=(D, D)), rng.normal(size=D), 0.5, 0.2)
    u, w = unit(4, 1, D), unit(5, 3, D)
    weight = np.exp([(head.weight @ u[0] + head.bias) @ c / 0.2 for c in w])
    attended = sum(p * c for p, c in zip(weight / weight.sum(), w, strict=True))
    mixed = u[0] + 0.5 * attended
    np.testing.assert_allclose(
        class_scores(u, w, head)[0], w @ (mixed / np.linalg.norm(mixed)), atol=1e-6
    )


def test_large_logits_do_not_overflow():
    head = EduAttention(1e4 * np.eye(D, dtype=np.float32), np.zeros(D, np.float32), 1.0, 0.01)
    assert np.isfinite(class_scores(unit(1, 3, D), unit(2, 4, D), head)).all()


def test_scores_lie_between_minus_one_and_one():
    head = (
        EduAttentionHead(D, R.EduAttention(), torch.Generator().manual_seed(0))
        .numpy()
        ._replace(alpha=0.7)
    )
    assert np.abs(class_scores(unit(1, 50, D), unit(2, 30, D), head)).max() <= 1 + 1e-5


def test_an_ensemble_of_one_template_is_itself_and_of_two_their_bisector():
    x = unit(1, 4, 1, D)
    np.testing.assert_allclose(ensemble(x), x[:, 0], atol=1e-6)
    two = np.array([[[1.0, 0.0], [0.0, 5.0]]])  # lengths do not count
    np.testing.assert_allclose(ensemble(two), [[0.5**0.5, 0.5**0.5]], atol=1e-6)


def test_prompts_go_class_by_class():
    assert prompts(["a", "b"], ["x {c}", "{c} y"]) == ["x a", "a y", "x b", "b y"]
    assert prompts(["{x} 100%"], ["a {c}"]) == ["a {x} 100%"]
