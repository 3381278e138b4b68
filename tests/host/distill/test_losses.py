"""Each distillation loss against numpy, and the identities that it must keep."""

import math

import numpy as np
import pytest
import torch

from edgeclip.device.metrics import l2_normalize
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.distill import losses as L
from edgeclip.host.distill.batch import Batch, OtherTeacher
from edgeclip.host.student import EduAttentionHead

B, D, N, SCALE = 6, 8, 5, 7.0
ONE = R.Weighted()
OWN = {
    "kl": R.KL(),
    "if_align": R.IFAlign(),
    "affinity": R.Affinity(),
    "distribution": R.Distribution(),
    "masked_feature": R.MaskedFeature(),
}
SPECS = {name: OWN.get(name, ONE) for name in L.LOSSES}


def unit(seed, rows):
    return l2_normalize(np.random.default_rng(seed).normal(size=(rows, D)))


S, H, T, W, C = unit(1, B), unit(2, B), unit(3, B), unit(4, N), unit(5, B)
X, M, P = unit(6, B), unit(7, B), unit(8, N) * np.float32([1, 1, 0, 1, 1])[:, None]
LABELS = np.array([0, 3, -1, 1, -1, 3])
LEARNED = L.learned_parameters(
    R.Losses(**{k: ONE for k in ("interactive", "augmented_feature", "vrd", "xrd")}), D, 0
)


def batch(s=S, h=H, t=T, w=W, c=C, x=X, m=M, p=P, labels=LABELS):
    """s, x, m: the student's image, text and masked features; h after the head; t, c: the
    teacher's; w classes, p prototypes.
    """
    s, h, t, w, c, x, m, p, labels = (torch.from_numpy(a) for a in (s, h, t, w, c, x, m, p, labels))
    return Batch(s, h, t, w, c, SCALE, x, 3 * s, 2 * t, m, labels, p, learned=LEARNED)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def close(found, expected):
    found, expected = (
        float(x.detach() if isinstance(x, torch.Tensor) else x) for x in (found, expected)
    )
    assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6), (found, expected)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_kl_is_the_mean_over_images_of_teacher_against_student(tau):
    p, q = softmax(SCALE * T @ W.T / tau), softmax(SCALE * H @ W.T / tau)
    close(L.kl(batch(), R.KL(temperature=tau)), tau**2 * (p * np.log(p / q)).sum() / B)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_promptkds_reduction_is_batchmean_over_n(tau):
    close(
        L.kl(batch(), R.KL(temperature=tau, reduction="promptkd")),
        float(L.kl(batch(), R.KL(temperature=tau))) / N,
    )


def test_promptkds_reduction_is_promptkds_own_line():
    import torch.nn.functional as F

    tau = 2.0
    s, t = (torch.from_numpy(SCALE * x @ W.T) for x in (H, T))
    theirs = (
        F.kl_div(F.log_softmax(s / tau, dim=1), F.softmax(t / tau, dim=1), reduction="sum")
        * (tau * tau)
        / s.numel()
    )
    close(L.kl(batch(), R.KL(temperature=tau, reduction="promptkd")), theirs)


def log_softmax(x):
    return np.log(softmax(x))


def cross_entropy(q, p):
    return -(p * log_softmax(q)).sum(axis=-1).mean()


def divergence(t, s):
    """KL(softmax(t) || softmax(s)), a mean over rows."""
    return (softmax(t) * (log_softmax(t) - log_softmax(s))).sum(axis=-1).mean()


def info_nce(q):
    return cross_entropy(q, np.eye(B))


def cosine(a, b):
    return (a * b).sum(axis=1)


def test_several_teachers_are_averaged_as_distributions_each_with_its_own_scale():
    t2, w2 = (
        l2_normalize(np.random.default_rng(11).normal(size=(B, 5)).astype(np.float32)),
        l2_normalize(np.random.default_rng(12).normal(size=(N, 5))),
    )
    p = (softmax(SCALE * T @ W.T) + softmax(3.0 * t2 @ w2.T)) / 2
    other = (OtherTeacher(torch.from_numpy(t2), torch.from_numpy(w2), None, 3.0),)
    close(
        L.kl(batch()._replace(other_teachers=other), R.KL()),
        (p * (np.log(p) - log_softmax(SCALE * H @ W.T))).sum() / B,
    )
    c2 = l2_normalize(np.random.default_rng(13).normal(size=(B, 5)).astype(np.float32))
    rows = (softmax(SCALE * T @ C.T) + softmax(3.0 * t2 @ c2.T)) / 2
    columns = (softmax(SCALE * C @ T.T) + softmax(3.0 * c2 @ t2.T)) / 2
    q = 2.0 * S @ X.T
    other = (OtherTeacher(torch.from_numpy(t2), torch.from_numpy(w2), torch.from_numpy(c2), 3.0),)
    found = L.distribution(batch()._replace(other_teachers=other), R.Distribution(logit_scale=2.0))
    close(found, 0.5 * (cross_entropy(q, rows) + cross_entropy(q.T, columns)))


def test_two_equal_teachers_are_one():
    other = (OtherTeacher(torch.from_numpy(T), torch.from_numpy(W), None, SCALE),)
    close(L.kl(batch()._replace(other_teachers=other), R.KL()), L.kl(batch(), R.KL()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("axis", "numpy_axis"), [("batch", 0), ("channels", 1)])
@pytest.mark.parametrize(
    ("features", "normalize"), [("image", True), ("image", False), ("head", True)]
)
def test_if_align_in_every_reading(reduction, axis, numpy_axis, normalize, features):
    s, t = ((S if features == "image" else H), T) if normalize else (3 * S, 2 * T)
    fold = np.mean if reduction == "mean" else np.sum
    expected = fold(np.abs(s.mean(numpy_axis) - t.mean(numpy_axis))) + fold(
        np.abs(s.var(numpy_axis) - t.var(numpy_axis))
    )
    close(
        L.if_align(
            batch(),
            R.IFAlign(axis=axis, normalize=normalize, reduction=reduction, features=features),
        ),
        expected,
    )


def test_kl_with_the_offset_is_that_of_a_teacher_whose_labeled_classes_are_set_back():
    set_back = np.float32([0.3, 0, 0.3, 0, 0])
    p = softmax(SCALE * (T @ W.T - set_back))
    q = softmax(SCALE * H @ W.T)
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    known = batch()._replace(offsets=torch.from_numpy(set_back))
    close(L.kl(known, R.KL(offset=True)), expected)
    close(L.kl(known, R.KL()), float(L.kl(batch(), R.KL())))
    close(L.kl(batch(), R.KL(offset=True)), float(L.kl(batch(), R.KL())))


def test_if_align_of_deviations_and_over_the_teachers_own_scale():
    of_s, of_t = S.std(axis=0), T.std(axis=0)
    mean = np.abs(S.mean(axis=0) - T.mean(axis=0)).mean()
    deviation = np.abs(of_s - of_t).mean()
    close(L.if_align(batch(), R.IFAlign(spread="deviation")), mean + deviation)
    relative = mean / np.abs(T.mean(axis=0)).mean() + deviation / of_t.mean()
    close(L.if_align(batch(), R.IFAlign(spread="deviation", scale="teacher")), relative)
    # Relative errors do not know in which unit features are told.
    spec = R.IFAlign(normalize=False, scale="teacher")
    tenfold = batch()._replace(
        raw_features=10 * batch().image_features, raw_teacher_features=10 * batch().teacher_features
    )
    close(L.if_align(tenfold, spec), float(L.if_align(batch(), R.IFAlign(scale="teacher"))))


def test_if_aligns_moving_average_starts_at_the_first_batch():
    spec = R.IFAlign(momentum=0.9)
    learned = L.learned_parameters(R.Losses(if_align=spec), D, 0)
    first = L.if_align(batch()._replace(learned=learned), spec)
    close(first, L.if_align(batch(), R.IFAlign()))
    second = L.if_align(batch(s=X)._replace(learned=learned), spec)
    mean = 0.9 * S.mean(0) + 0.1 * X.mean(0)
    variance = 0.9 * S.var(0) + 0.1 * X.var(0)
    close(second, np.abs(mean - T.mean(0)).mean() + np.abs(variance - T.var(0)).mean())


def test_hard_labels_and_prototypes_count_labeled_images_and_classes_only():
    rows, classes = LABELS >= 0, P.any(axis=1)
    target = np.eye(N)[LABELS[rows]][:, classes]
    close(L.cross_entropy(batch(), ONE), cross_entropy(SCALE * H[rows] @ W[classes].T, target))
    close(L.prototype(batch(), ONE), cross_entropy(SCALE * S[rows] @ P[classes].T, target))


def test_a_batch_without_labels_has_no_hard_loss_and_a_gradient_of_zero():
    h = torch.from_numpy(H).requires_grad_()
    loss = L.cross_entropy(batch(labels=np.full(B, -1))._replace(head_features=h), ONE)
    loss.backward()
    assert loss.item() == 0 and not h.grad.any()


def test_teacher_match_is_info_nce_against_the_teachers_images_one_way():
    close(L.teacher_match(batch(), ONE), info_nce(SCALE * S @ T.T))


def test_feature_is_one_minus_the_cosine_of_images_and_of_texts():
    close(L.feature(batch(), ONE), (1 - cosine(S, T)).mean() + (1 - cosine(X, C)).mean())
    close(L.feature(batch()._replace(text_features=None), ONE), (1 - cosine(S, T)).mean())


def test_clip_kds_fd_is_two_over_d_of_feature():
    close(L.feature(batch()._replace(text_features=None), ONE) * 2 / D, ((S - T) ** 2).mean())


def test_masked_feature_looks_at_the_masked_images():
    close(L.masked_feature(batch(), R.MaskedFeature()), (1 - cosine(M, T)).mean())


@pytest.mark.parametrize("scale", [None, 50.0])
def test_affinity_is_soft_cross_entropy_or_kl_both_ways(scale):
    t, s = (scale or SCALE) * T @ C.T, (scale or SCALE) * S @ X.T
    close(
        L.affinity(batch(), R.Affinity(logit_scale=scale)),
        0.5 * (cross_entropy(s, softmax(t)) + cross_entropy(s.T, softmax(t.T))),
    )
    close(
        L.affinity(batch(), R.Affinity(form="kl", logit_scale=scale)),
        0.5 * (divergence(t, s) + divergence(t.T, s.T)),
    )


def test_contrastive_is_info_nce_both_ways():
    s = SCALE * S @ X.T
    close(L.contrastive(batch(), ONE), 0.5 * (info_nce(s) + info_nce(s.T)))


def test_images_of_one_caption_are_not_each_others_negatives():
    c = C.copy()
    c[1] = c[0]
    target = np.eye(B)
    target[:2, :2] = 0.5
    s = SCALE * S @ X.T
    close(
        L.contrastive(batch(c=c), ONE),
        0.5 * (cross_entropy(s, target) + cross_entropy(s.T, target)),
    )


def test_a_student_without_a_text_tower_uses_the_teachers_texts():
    close(L.contrastive(batch()._replace(text_features=None), ONE), L.contrastive(batch(x=C), ONE))


def test_gradient_is_the_mse_of_four_gradients_that_autograd_gives_too():
    def by_autograd(image, text):
        image, text = (
            torch.from_numpy(image).requires_grad_(),
            torch.from_numpy(text).requires_grad_(),
        )
        out = []
        for q, order in (
            (SCALE * image @ text.T, (image, text)),
            (SCALE * text @ image.T, (text, image)),
        ):
            out += torch.autograd.grad(torch.nn.functional.cross_entropy(q, torch.arange(B)), order)
        return out

    student, teacher = by_autograd(S, X), by_autograd(T, C)
    for found, expected in zip(
        L.info_nce_gradients(torch.from_numpy(S), torch.from_numpy(X), SCALE), student, strict=True
    ):
        torch.testing.assert_close(found, expected)
    close(
        L.gradient(batch(), ONE),
        sum(((a - b) ** 2).mean() for a, b in zip(student, teacher, strict=True)),
    )


CLIP_SCALE = 1 / 0.07


def test_interactive_crosses_student_and_teacher():
    close(
        L.interactive(batch(), ONE),
        0.5 * (info_nce(CLIP_SCALE * S @ C.T) + info_nce(CLIP_SCALE * X @ T.T)),
    )


def test_augmented_feature_is_info_nce_of_fused_features():
    maps = [LEARNED[f"augmented_{side}"].detach().numpy() for side in ("image", "text")]
    v, s = l2_normalize(np.hstack([S, T]) @ maps[0].T), l2_normalize(np.hstack([X, C]) @ maps[1].T)
    close(
        L.augmented_feature(batch(), ONE),
        0.5 * (info_nce(SCALE * v @ s.T) + info_nce(SCALE * s @ v.T)),
    )


def test_vrd_is_relations_within_modalities_beside_info_nce_on_each():
    a_image, a_text, b_image, b_text = (
        CLIP_SCALE * q for q in (T @ S.T, C @ X.T, S @ T.T, X @ C.T)
    )
    relation = 0.5 * (divergence(a_text, a_image) + divergence(b_text, b_image))
    close(
        L.vrd(batch(), ONE),
        relation + 0.5 * sum(info_nce(q) for q in (a_image, b_image, a_text, b_text)),
    )


def test_xrd_is_symmetric_kl_of_the_cross_modal_pairs():
    m1, m2, m3, m4 = (CLIP_SCALE * q for q in (T @ X.T, C @ S.T, X @ T.T, S @ C.T))
    close(
        L.xrd(batch(), ONE),
        0.25 * (divergence(m2, m1) + divergence(m1, m2) + divergence(m4, m3) + divergence(m3, m4)),
    )


@pytest.mark.parametrize("name", ["kl", "if_align", "feature", "masked_feature", "gradient"])
def test_a_student_that_equals_its_teacher_has_no_loss(name):
    assert abs(float(L.LOSSES[name](batch(s=T, h=T, x=C, m=T), SPECS[name]))) < 1e-6


def test_affinitys_kl_is_zero_and_its_cross_entropy_least_where_student_equals_teacher():
    assert abs(float(L.affinity(batch(s=T, x=C), R.Affinity(form="kl")))) < 1e-6
    least = float(L.affinity(batch(s=T, x=C), R.Affinity()))
    t = SCALE * T @ C.T
    close(least, 0.5 * (cross_entropy(t, softmax(t)) + cross_entropy(t.T, softmax(t.T))))
    assert all(
        float(L.affinity(batch(s=l2_normalize(T + 0.1 * unit(seed, B)), x=C), R.Affinity())) > least
        for seed in range(10, 20)
    )


@pytest.mark.parametrize("name", list(L.LOSSES))
def test_the_order_of_images_does_not_matter(name):
    o = np.random.default_rng(0).permutation(B)
    moved = batch(S[o], H[o], T[o], W, C[o], X[o], M[o], P, LABELS[o])
    close(L.LOSSES[name](moved, SPECS[name]), L.LOSSES[name](batch(), SPECS[name]))


@pytest.mark.parametrize("name", L.NEED_CLASSES)
def test_the_order_of_classes_does_not_matter(name):
    order = np.random.default_rng(0).permutation(N)
    labels = np.where(LABELS >= 0, np.argsort(order)[LABELS], -1)
    close(
        L.LOSSES[name](batch(w=W[order], p=P[order], labels=labels), SPECS[name]),
        L.LOSSES[name](batch(), SPECS[name]),
    )


@pytest.mark.parametrize("classes", [1, 2, 40])
def test_a_novel_class_list_of_another_length_works(classes):
    assert L.kl(batch(w=unit(20, classes)), R.KL()).isfinite()
    head = EduAttentionHead(D, R.EduAttention())
    assert head(torch.from_numpy(S), torch.from_numpy(unit(20, classes))).shape == (B, D)


@pytest.mark.parametrize("name", list(L.LOSSES))
def test_no_loss_is_negative_and_each_has_a_gradient_to_the_student(name):
    b = batch()
    leaves = {
        f: getattr(b, f).clone().requires_grad_()
        for f in ("image_features", "head_features", "masked_features")
    }
    loss = L.LOSSES[name](b._replace(**leaves), SPECS[name])
    loss.backward()
    moved = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    assert loss.item() >= 0
    assert any(bool(g.abs().max() > 0) for g in moved)
    assert loss.shape == ()


def test_the_total_is_the_weighted_sum_and_parts_are_unweighted():
    spec = R.Losses(
        kl=R.KL(weight=2), if_align=R.IFAlign(weight=100), feature=R.Weighted(weight=0.5)
    )
    total, parts = L.total(batch(), spec)
    assert set(parts) == {"kl", "if_align", "feature"}
    close(total, 2 * parts["kl"] + 100 * parts["if_align"] + 0.5 * parts["feature"])
    close(parts["kl"], L.kl(batch(), R.KL()))


def test_a_learned_scale_is_held_at_100_and_comes_down_again():
    learned = L.learned_parameters(R.Losses(interactive=ONE), D, 0)
    scale = learned["interactive_log_scale"]
    scale.data.fill_(np.log(150.0))
    L.interactive(batch()._replace(learned=learned), ONE).backward()
    close(scale.exp().detach(), 100.0)
    assert scale.grad.abs() > 0


def test_what_a_batch_lacks_is_named():
    with pytest.raises(EdgeclipError, match="caption_features"):
        L.contrastive(batch()._replace(caption_features=None), ONE)


def test_every_loss_has_a_field_and_every_field_but_the_head_a_loss():
    assert set(L.LOSSES) == set(R.Losses.__struct_fields__) - {"edu_attention", "captions"}
