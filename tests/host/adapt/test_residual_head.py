"""Stage 1 for the assembled teacher: it starts as the unadapted one, learns what labels it has,
and is kept.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgeclip.device.images import ImageRef
from edgeclip.device.preprocess import Preprocess
from edgeclip.disk import MANIFEST
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.adapt.residual_head import ResidualHead, adapt, balanced
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset
from edgeclip.host.teachers import Teacher

WIDTH, DIM, CLASSES = 16, 8, 4
SPEC = R.ResidualHead(
    hidden=32, dropout=0.0, steps=80, batch_size=32, lr=1e-2, weight_decay=0.0, toward_unadapted=0.1
)


def toy(tmp_path, labeled):
    """A cache whose pooled features tell the class and whose unadapted features do not."""
    rng = np.random.default_rng(0)
    label = np.arange(64) % CLASSES
    pooled = np.eye(WIDTH)[label] * 4 + rng.normal(size=(64, WIDTH)) * 0.1
    rows = (
        np.concatenate([pooled, rng.normal(size=(64, DIM))], axis=1)[:, None]
        .repeat(2, axis=1)
        .astype(np.float16)
    )
    class_features = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:CLASSES].astype(np.float32)
    images = [ImageRef(key=str(i), path=str(tmp_path), label=int(label[i])) for i in range(64)]
    folder = tmp_path / "cache"
    cache = TeacherCache(
        folder, {}, images, rows, np.zeros((64, 2, 5), np.float32), class_features, None
    )
    data = Dataset(
        name="toy",
        train=images,
        labeled=images if labeled else [],
        classes=list("abcd"),
        templates=("{c}",),
        train_classes=list(range(CLASSES)),
        evaluation=[],
        license="none",
    )
    teacher = Teacher(
        name="toy",
        license="none",
        identity={"kind": "toy"},
        preprocess=Preprocess(size=8, mean=(0, 0, 0), std=(1, 1, 1)),
        logit_scale=20.0,
        embed_dim=DIM,
        tower=torch.nn.Identity(),
        features=lambda r: r[:, -DIM:],
        encode_text=lambda texts: torch.zeros(len(texts), DIM),
    )
    return teacher, cache, data


def accuracy(teacher, cache, data):
    u = F.normalize(
        teacher.features(torch.from_numpy(cache.rows[:, 0].astype(np.float32))), dim=-1
    ).numpy()
    return (np.argmax(u @ cache.class_features.T, axis=1) == [p.label for p in cache.images]).mean()


def test_the_head_starts_as_the_unadapted_teacher():
    rows = torch.randn(5, WIDTH + DIM)
    head = ResidualHead(WIDTH, DIM, R.ResidualHead(dropout=0.5))
    torch.testing.assert_close(head(rows), F.normalize(rows[:, -DIM:], dim=-1), rtol=0, atol=0)


def test_it_learns_the_labeled_classes_and_the_head_is_read_back(tmp_path):
    teacher, cache, data = toy(tmp_path, labeled=True)
    assert accuracy(teacher, cache, data) < 0.6
    adapted = adapt(teacher, cache, data, SPEC, 0, tmp_path / "teacher")
    assert accuracy(adapted, cache, data) == 1.0
    again = adapt(
        teacher, cache, data, SPEC, 1, tmp_path / "teacher"
    )  # another seed: it is read, not trained
    rows = torch.randn(3, WIDTH + DIM)
    torch.testing.assert_close(again.features(rows), adapted.features(rows), rtol=0, atol=0)


def test_a_head_of_other_data_is_refused(tmp_path):
    teacher, cache, data = toy(tmp_path, labeled=True)
    adapt(teacher, cache, data, SPEC, 0, tmp_path / "teacher")
    with pytest.raises(EdgeclipError, match="of other data"):
        adapt(
            teacher,
            cache._replace(folder=tmp_path / "another"),
            data,
            SPEC,
            0,
            tmp_path / "teacher",
        )


def test_the_pull_keeps_it_at_the_unadapted_teacher(tmp_path):
    from msgspec.structs import replace

    teacher, cache, data = toy(tmp_path, labeled=True)
    rows = torch.from_numpy(cache.rows[:, 0].astype(np.float32))

    def moved(pull):
        adapted = adapt(
            teacher, cache, data, replace(SPEC, toward_unadapted=pull), 0, tmp_path / str(pull)
        )
        return 1 - F.cosine_similarity(adapted.features(rows), teacher.features(rows)).mean().item()

    assert moved(1000.0) < 0.2 * moved(0.0)


def test_balanced_rows_are_distributions_and_columns_have_equal_mass():
    p = balanced(
        torch.softmax(3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), dim=-1),
        rounds=200,
    )
    torch.testing.assert_close(p.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(p.sum(dim=0), torch.full((5,), 8.0), rtol=1e-4, atol=1e-4)


def test_balanced_leaves_a_label_and_a_fair_table_alone():
    labels = torch.eye(3).repeat(4, 1)
    torch.testing.assert_close(balanced(labels), labels)
    skewed = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.1], [0.8, 0.2]])
    p = balanced(skewed, rounds=500)
    torch.testing.assert_close(p[0], skewed[0])
    # three rows share what the labeled one leaves: one unit of the first class, two of the second;
    # odds ratios stay
    torch.testing.assert_close(p.sum(dim=0), torch.tensor([2.0, 2.0]), rtol=1e-3, atol=1e-3)
    odds = p[1:, 0] / p[1:, 1]
    torch.testing.assert_close(
        odds / odds[0], torch.tensor([1.0, 1.0, 4 / 9]), rtol=1e-3, atol=1e-3
    )


def test_self_training_learns_classes_that_have_no_labels(tmp_path):
    from msgspec.structs import replace

    teacher, cache, data = toy(tmp_path, labeled=True)
    # of the two classes without labels the unadapted teacher always prefers the last, though less
    # where it is wrong
    w = cache.class_features
    lean = np.array(
        [0.3 * w[p.label] + (0.4 * w[3] if p.label > 1 else 0) for p in cache.images], np.float16
    )
    rows = np.concatenate([cache.rows[..., :WIDTH], np.repeat(lean[:, None], 2, axis=1)], axis=2)
    cache = cache._replace(rows=rows)
    data = data._replace(labeled=[p for p in data.labeled if p.label < 2])

    def novel(spec):
        adapted = adapt(teacher, cache, data, spec, 0, tmp_path / str(spec.self_training))
        u = F.normalize(
            adapted.features(torch.from_numpy(rows[:, 0].astype(np.float32))), dim=-1
        ).numpy()
        label = np.array([p.label for p in cache.images])
        answers = np.argmax(u @ w.T, axis=1)
        return (answers[label > 1] == label[label > 1]).mean()

    plain = replace(SPEC, steps=200, toward_unadapted=0.0)
    own = replace(plain, self_training=R.SelfTraining(start=20, every=10))
    assert novel(own) > 0.95 > novel(plain)


def test_self_training_without_unlabeled_images_is_refused(tmp_path):
    from msgspec.structs import replace

    teacher, cache, data = toy(tmp_path, labeled=True)
    with pytest.raises(EdgeclipError, match=r"adapt\.self_training.*every image"):
        adapt(
            teacher,
            cache,
            data,
            replace(SPEC, self_training=R.SelfTraining(start=20)),
            0,
            tmp_path / "teacher",
        )


def test_without_labels_it_says_so_and_leaves_nothing(tmp_path):
    teacher, cache, data = toy(tmp_path, labeled=False)
    with pytest.raises(EdgeclipError, match="no labeled images"):
        adapt(teacher, cache, data, SPEC, 0, tmp_path / "teacher")
    assert not (tmp_path / "teacher" / MANIFEST).exists()


def test_a_wide_margin_leaves_the_competition_to_classes_with_labels(tmp_path):
    from msgspec.structs import replace

    teacher, cache, data = toy(tmp_path, labeled=True)
    data = data._replace(labeled=[p for p in data.labeled if p.label < 2])
    rows = torch.from_numpy(cache.rows[:, 0].astype(np.float32))

    def features(margin):
        spec = replace(SPEC, margin=margin)
        return adapt(teacher, cache, data, spec, 0, tmp_path / str(margin)).features(rows)

    # Of labeled images alone the one-hot rows differ in width, and nothing else does.
    torch.testing.assert_close(features(100.0), features(None), rtol=1e-4, atol=1e-4)
    assert (features(0.0) - features(None)).abs().max() > 0.01
