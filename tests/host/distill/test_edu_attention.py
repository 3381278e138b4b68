"""EduAttention: what alpha does, and that every reading that ships is the device layer's."""

import numpy as np
import pytest
import torch

from edgeclip.device.zero_shot import class_scores
from edgeclip.host import recipe as R
from edgeclip.host.distill import losses as L
from edgeclip.host.distill.batch import Batch
from edgeclip.host.student import EduAttentionHead

D = 8


def unit(seed, rows):
    x = np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


S, T, W = unit(1, 6), unit(3, 6), unit(4, 5)


def test_alpha_frozen_at_zero_gives_the_image_features_back():
    head = EduAttentionHead(D, R.EduAttention())
    assert torch.allclose(
        head(torch.from_numpy(S), torch.from_numpy(W)), torch.from_numpy(S), atol=1e-7
    )


def test_the_layer_under_alpha_zero_has_no_gradient_and_alpha_has_one():
    head = EduAttentionHead(D, R.EduAttention())
    s = torch.from_numpy(S)
    L.kl(
        Batch(s, head(s, torch.from_numpy(W)), torch.from_numpy(T), torch.from_numpy(W), None, 7.0),
        R.KL(),
    ).backward()
    assert float(head.fc.weight.grad.abs().max()) == 0 and float(head.alpha.grad.abs()) > 0


def test_a_head_with_its_own_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    expected = torch.nn.Linear(D, D), torch.rand(1)
    torch.manual_seed(0)
    EduAttentionHead(D, R.EduAttention(), torch.Generator().manual_seed(5))
    assert torch.rand(1) == expected[1]


READINGS = [
    R.EduAttention(fc=fc, normalize=n, temperature=c, center=center)
    for fc in ("query", "key_value", "output", "none")
    for n in (True, False)
    for c in (0.1, 1.0)
    for center in (False, True)
]


@pytest.mark.parametrize(
    "spec", READINGS, ids=lambda s: f"{s.fc}-{s.normalize}-{s.temperature}-{s.center}"
)
def test_every_reading_of_edu_attention_is_the_device_layers(spec):
    head = EduAttentionHead(D, spec, torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.alpha.fill_(0.4)
        theirs = head(torch.from_numpy(S).float(), torch.from_numpy(W).float()).numpy() @ W.T
    np.testing.assert_allclose(class_scores(S, W, head.numpy()), theirs, rtol=1e-4, atol=1e-5)


def test_centered_attention_does_not_see_what_all_classes_share():
    spec = R.EduAttention(fc="none", center=True, normalize=False)
    head = EduAttentionHead(D, spec)
    with torch.no_grad():
        head.alpha.fill_(0.4)
    u = torch.from_numpy(S).float()
    w = torch.from_numpy(W).float()
    plain = head(u, w) - u
    torch.testing.assert_close(head(u, w + torch.ones(D)) - u, plain, rtol=1e-4, atol=1e-5)


def test_a_layer_that_starts_as_the_identity_is_no_layer_at_first():
    heads = [
        EduAttentionHead(D, R.EduAttention(fc_start="identity")),
        EduAttentionHead(D, R.EduAttention(fc="none")),
    ]
    found = []
    for head in heads:
        with torch.no_grad():
            head.alpha.fill_(0.4)
            found.append(head(torch.from_numpy(S).float(), torch.from_numpy(W).float()))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_edu_attention_over_the_batch_from_a_raw_query_and_on_the_teachers_feature():
    head = EduAttentionHead(
        D,
        R.EduAttention(
            axis="batch",
            query="raw",
            residual="teacher",
            fc="none",
            temperature=2.0,
            normalize=False,
            keep=False,
        ),
    )
    with torch.no_grad():
        head.alpha.fill_(0.4)
    q = 3 * S @ W.T / 2.0
    attention = np.exp(q) / np.exp(q).sum(axis=0) @ W
    found = head(
        torch.from_numpy(S), torch.from_numpy(W), torch.from_numpy(3 * S), torch.from_numpy(T)
    )
    np.testing.assert_allclose(found.detach().numpy(), T + 0.4 * attention, rtol=1e-6)


@pytest.mark.parametrize("reading", [{"query": "raw"}, {"axis": "batch"}])
def test_a_reading_that_needs_more_than_a_unit_feature_has_no_device_form(reading):
    assert EduAttentionHead(D, R.EduAttention(keep=False, **reading)).numpy() is None
