"""Each distillation loss against numpy, and the identities that it must keep."""

import math

import numpy as np
import pytest
import torch

from edgeclip import recipe as R
from edgeclip.distill import losses as L
from edgeclip.metrics import l2_normalise
from edgeclip.students import EduAttentionHead

B, D, N, SCALE = 6, 8, 5, 7.0
ONE = R.Weighted()
SPECS = {"kl": R.KL(), "if_align": R.IFAlign(), "feature": ONE, "affinity": ONE, "contrastive": ONE}


def unit(seed, rows):
    return l2_normalise(np.random.default_rng(seed).normal(size=(rows, D)))


S, H, T, W, C = unit(1, B), unit(2, B), unit(3, B), unit(4, N), unit(5, B)


def batch(s=S, h=H, t=T, w=W, c=C):
    return L.Batch(*(torch.from_numpy(x) for x in (s, h, t, w, c)), SCALE)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def close(found, expected):
    assert math.isclose(float(found), float(expected), rel_tol=1e-4, abs_tol=1e-6), (float(found), float(expected))


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_kl_is_the_mean_over_pictures_of_teacher_against_student(tau):
    p, q = softmax(SCALE * T @ W.T / tau), softmax(SCALE * H @ W.T / tau)
    close(L.kl(batch(), R.KL(temperature=tau)), (p * np.log(p / q)).sum() / B)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_promptkds_reduction_is_batchmean_times_tau_squared_over_n(tau):
    close(L.kl(batch(), R.KL(temperature=tau, reduction="promptkd")), float(L.kl(batch(), R.KL(temperature=tau))) * tau**2 / N)


def test_promptkds_reduction_is_promptkds_own_line():
    import torch.nn.functional as F

    tau = 2.0
    s, t = (torch.from_numpy(SCALE * x @ W.T) for x in (H, T))
    theirs = F.kl_div(F.log_softmax(s / tau, dim=1), F.softmax(t / tau, dim=1), reduction="sum") * (tau * tau) / s.numel()
    close(L.kl(batch(), R.KL(temperature=tau, reduction="promptkd")), theirs)


def test_if_align_is_l1_of_means_plus_l1_of_biased_variances():
    close(L.if_align(batch(), R.IFAlign()), np.abs(S.mean(0) - T.mean(0)).mean() + np.abs(S.var(0) - T.var(0)).mean())


def test_feature_is_one_minus_the_cosine():
    close(L.feature(batch(), ONE), 1 - (S * T).sum(1).mean())


def test_affinity_is_soft_cross_entropy_both_ways():
    t, s = SCALE * T @ C.T, SCALE * S @ C.T
    expected = -0.5 * ((softmax(t) * np.log(softmax(s))).sum() + (softmax(t.T) * np.log(softmax(s.T))).sum()) / B
    close(L.affinity(batch(), ONE), expected)


def test_contrastive_is_info_nce_both_ways():
    s = SCALE * S @ C.T
    close(L.contrastive(batch(), ONE), -0.5 * (np.log(np.diag(softmax(s))).mean() + np.log(np.diag(softmax(s.T))).mean()))


@pytest.mark.parametrize("name", ["kl", "if_align", "feature"])
def test_a_student_that_equals_its_teacher_has_no_loss(name):
    assert abs(float(L.LOSSES[name](batch(s=T, h=T), SPECS[name]))) < 1e-6


def test_affinity_is_least_where_the_student_equals_its_teacher():
    least = float(L.affinity(batch(s=T), ONE))
    t = SCALE * T @ C.T
    close(least, -0.5 * ((softmax(t) * np.log(softmax(t))).sum() + (softmax(t.T) * np.log(softmax(t.T))).sum()) / B)
    assert all(float(L.affinity(batch(s=l2_normalise(T + 0.1 * unit(seed, B))), ONE)) > least for seed in range(10, 20))


@pytest.mark.parametrize("name", list(L.LOSSES))
def test_the_order_of_pictures_does_not_matter(name):
    order = np.random.default_rng(0).permutation(B)
    close(L.LOSSES[name](batch(S[order], H[order], T[order], W, C[order]), SPECS[name]), L.LOSSES[name](batch(), SPECS[name]))


def test_the_order_of_classes_does_not_matter():
    close(L.kl(batch(w=W[::-1].copy()), R.KL()), L.kl(batch(), R.KL()))


@pytest.mark.parametrize("name", list(L.LOSSES))
def test_no_loss_is_negative_and_each_has_a_gradient_to_the_student(name):
    b = batch()
    s, h = b.image_features.clone().requires_grad_(), b.head_features.clone().requires_grad_()
    loss = L.LOSSES[name](b._replace(image_features=s, head_features=h), SPECS[name])
    loss.backward()
    gradient = h.grad if name == "kl" else s.grad
    assert loss.item() >= 0 and gradient is not None and bool(gradient.abs().max() > 0) and loss.shape == ()


def test_the_total_is_the_weighted_sum_and_parts_are_unweighted():
    spec = R.Losses(kl=R.KL(weight=2), if_align=R.IFAlign(weight=100), feature=R.Weighted(weight=0.5))
    total, parts = L.total(batch(), spec)
    assert set(parts) == {"kl", "if_align", "feature"}
    close(total, 2 * parts["kl"] + 100 * parts["if_align"] + 0.5 * parts["feature"])
    close(parts["kl"], L.kl(batch(), R.KL()))


def test_every_loss_has_a_field_and_every_field_but_the_head_a_loss():
    assert set(L.LOSSES) == set(R.Losses.__struct_fields__) - {"edu_attention"}


def test_alpha_frozen_at_zero_gives_the_image_features_back():
    head = EduAttentionHead(D, 0.1)
    assert torch.allclose(head(torch.from_numpy(S), torch.from_numpy(W)), torch.from_numpy(S), atol=1e-7)


def test_the_layer_under_alpha_zero_has_no_gradient_and_alpha_has_one():
    head = EduAttentionHead(D, 0.1)
    s = torch.from_numpy(S)
    L.kl(batch()._replace(head_features=head(s, torch.from_numpy(W))), R.KL()).backward()
    assert float(head.fc.weight.grad.abs().max()) == 0 and float(head.alpha.grad.abs()) > 0


def test_a_head_with_its_own_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    expected = torch.nn.Linear(D, D), torch.rand(1)
    torch.manual_seed(0)
    EduAttentionHead(D, 0.1, torch.Generator().manual_seed(5))
    assert torch.rand(1) == expected[1]
