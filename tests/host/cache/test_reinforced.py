"""MobileCLIP's reinforced shards are a teacher: views with stored parameters, several captions,
several teachers.
"""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from edgeclip.device.images import index_tar
from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, teachers
from edgeclip.host import recipe as R
from edgeclip.host.cache.views import OPERATIONS
from edgeclip.host.data import Dataset
from edgeclip.host.distill.text import texts
from edgeclip.host.student import token_ids
from tests.support.command import mistake, run
from tests.support.files import write
from tests.support.images import add_member, encoded, toy_image
from tests.support.tokens import clips

K, SYNTHETIC, WIDTHS = 3, 2, (6, 4)


def sample(i, size=(60, 50)):
    """(image_emb [K, 10], text_emb [3, 10], param_aug, syn_text) as DataCompDR has them; two
    teachers side by side.
    """
    rng = np.random.default_rng(i)
    image, text = (rng.normal(size=(n, sum(WIDTHS))).astype(np.float32) for n in (K, 1 + SYNTHETIC))
    views = []
    for _ in range(K):
        h, w = rng.integers(20, 40, 2).tolist()
        views.append(
            [
                [int(rng.integers(0, size[1] - h)), int(rng.integers(0, size[0] - w)), h, w],
                [[3, 12.0], [int(rng.integers(6, 9)), 0.27]],
            ]
        )
    return image, text, views, [f"synthetic {i} {c}" for c in range(SYNTHETIC)]


def reinforced(path, ids, kind="npz", images=True, change=lambda i, name, content: content):
    """A shard; change: what is written instead of a member (None: nothing)."""
    with tarfile.open(path, "w") as tar:
        for i in ids:
            image, text, views, syn = sample(i)
            if kind == "npz":
                buffer = io.BytesIO()
                np.savez(buffer, image_emb=image, text_emb=text)
                rows = buffer.getvalue()
            else:
                buffer = io.BytesIO()
                torch.save(
                    {
                        "image_emb": torch.from_numpy(image).bfloat16(),
                        "text_emb": torch.from_numpy(text).bfloat16(),
                    },
                    buffer,
                )
                rows = gzip.compress(buffer.getvalue())
            members = {
                "paug.json": json.dumps({"param_aug": json.dumps(views)}).encode(),
                "syn.json": json.dumps({"syn_text": syn}).encode(),
                kind: rows,
            }
            members |= {"url.txt": b"http://x", "json": json.dumps({"uid": f"u{i}"}).encode()}
            if images:
                members |= {
                    "jpg": encoded(toy_image(i, 60, 50), "JPEG"),
                    "txt": f"caption {i}".encode(),
                }
            for name, content in members.items():
                if (content := change(i, name, content)) is not None:
                    add_member(tar, f"u{i}.{name}", content)
    return path


def dataset(*tars):
    return Dataset("dr", "", [], (), [], [p for t in tars for p in index_tar(t)], [], [])


def build(tmp_path, data, captions=True, cache_name="cache", **fields):
    teacher = teachers.load(
        R.Reinforced(root=str(tmp_path), shards="dr*.tar", **({"columns": (0, 6)} | fields))
    )
    cpu = torch.device("cpu")
    ingredients = cache.Ingredients(teacher, None, data, R.Views(), 0, captions, cpu, 2)
    return cache.build(tmp_path / cache_name, ingredients)


@pytest.mark.parametrize("kind", ["npz", "pth.gz"])
def test_each_teacher_is_its_columns_of_every_view_and_caption(tmp_path, kind):
    tars = [
        reinforced(tmp_path / "dr0.tar", range(7), kind),
        reinforced(tmp_path / "dr1.tar", range(7, 12), kind),
    ]
    first, second = (build(tmp_path, dataset(*tars), columns=c) for c in ((0, 6), (6, 10)))
    assert first.rows.shape == (12, K, 6)
    assert second.rows.shape == (12, K, 4)
    assert len(first.manifest["shards"]) == 2
    for i in (0, 11):
        image, text, *_ = sample(i)
        atol = 2e-3 if kind == "npz" else 2e-2  # float16, bfloat16
        np.testing.assert_allclose(first.rows[i], image[:, :6], atol=atol)
        np.testing.assert_allclose(second.rows[i], image[:, 6:], atol=atol)
        unit = text[:, :6] / np.linalg.norm(text[:, :6], axis=1, keepdims=True)
        np.testing.assert_allclose(first.caption_features[i], unit, atol=atol)
    assert first.images[11].key == "dr1/u11" and first.views.shape == (12, K, 9)


def test_dfndrs_captioners_stand_apart(tmp_path):
    """text_emb of the data's caption alone, and a list with features of its own for every
    captioner; one list has none.
    """

    def apart(i, name, content):
        image, text, _, syn = sample(i)
        if name == "syn.json":
            return json.dumps(
                {"syn_text": syn[1:], "syn_text_coca": syn[:1], "syn_text_later": ["no features"]}
            ).encode()
        if name == "npz":
            buffer = io.BytesIO()
            np.savez(
                buffer,
                image_emb=image,
                text_emb=text[:1],
                syn_text_emb=text[2:],
                syn_text_coca_emb=text[1:2],
            )
            return buffer.getvalue()
        return content

    made = build(tmp_path, dataset(reinforced(tmp_path / "dr0.tar", range(5), change=apart)))
    unit = sample(3)[1][[0, 2, 1], :6]
    np.testing.assert_allclose(
        made.caption_features[3], unit / np.linalg.norm(unit, axis=1, keepdims=True), atol=2e-3
    )
    cut = reinforced(
        tmp_path / "dr0.tar",
        range(5),
        change=lambda i, n, c: c if n != "syn.json" else b'{"syn_text": ["one"]}',
    )
    with pytest.raises(
        EdgeclipError, match=r"5 of 5 samples are broken.*'u0' 2 captions and 3 rows \(text\)"
    ):
        build(tmp_path, dataset(cut), cache_name="another")


def test_the_shards_may_lie_apart_from_the_images_and_in_another_order(tmp_path):
    images = reinforced(
        tmp_path / "images.tar",
        range(9),
        change=lambda i, name, content: content if name in ("jpg", "txt") else None,
    )
    reinforced(tmp_path / "dr0.tar", [8, 3, 5, 1, 0, 2, 7], images=False)
    made = build(tmp_path, dataset(images))
    assert [p.key for p in made.images] == [f"images/u{i}" for i in (8, 3, 5, 1, 0, 2, 7)]
    np.testing.assert_allclose(made.rows[1], sample(3)[0][:, :6], atol=2e-3)


def test_a_view_is_replayed_as_torchvision_made_it():
    """Crop, resize and RandAugment's operations by their numbers, at the teacher's size;
    TranslateX in pixels of it.
    """
    from edgeclip.host.cache.reinforced import parameters

    assert list(OPERATIONS) == list(RandAugment()._augmentation_space(31, (224, 224)))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    crop, operations = [4, 7, 31, 40], [[3, 45.0], [5, -9.0]]
    (view,) = parameters(json.dumps({"param_aug": [[crop, operations]]}).encode(), 224)
    expected = F.resized_crop(image, *crop, [224, 224], InterpolationMode.BICUBIC)
    for number, magnitude in operations:
        expected = _apply_op(
            expected, OPERATIONS[number], magnitude, InterpolationMode.NEAREST, None
        )
    assert (
        cache.apply_view(image, view, Preprocess(size=224, mean=(0,) * 3, std=(1,) * 3))
        == np.asarray(expected)
    ).all()
    smaller = cache.apply_view(
        image, view, Preprocess(size=112, mean=(0,) * 3, std=(1,) * 3)
    ).astype(float)
    at_half = np.asarray(expected.resize((112, 112), Image.Resampling.BOX)).astype(float)
    assert np.abs(smaller - at_half).mean() < 25 < np.abs(smaller[:, ::-1] - at_half).mean()


def test_broken_samples_are_counted_and_many_are_refused(tmp_path):
    ids = range(120)
    tar = reinforced(
        tmp_path / "dr0.tar",
        ids,
        change=lambda i, name, content: None if (i, name) == (7, "paug.json") else content,
    )
    made = build(tmp_path, dataset(tar), captions=False)
    assert len(made.rows) == 119 and made.manifest["skipped"] == [
        f"{tar}: sample 'u7' has no paug.json"
    ]
    reinforced(
        tar,
        ids,
        change=lambda i, name, content: b"[]" if i in (3, 4) and name == "npz" else content,
    )
    with pytest.raises(EdgeclipError, match=r"2 of 120 samples are broken, more than 1%"):
        build(tmp_path, dataset(tar), captions=False, cache_name="another")


def garbled(kind):
    """A sample's rows cut off, with a byte of their middle changed, and as something else: name to
    what `change` writes.
    """
    return {
        "cut": lambda content: content[: len(content) // 2],
        "changed": lambda content: (
            content[: len(content) // 2]
            + bytes([content[len(content) // 2] ^ 255])
            + content[len(content) // 2 + 1 :]
        ),
        "text": lambda content: b"not rows" if kind == "npz" else gzip.compress(b"not rows"),
        "empty": lambda content: b"",
    }


@pytest.mark.parametrize("kind", ["npz", "pth.gz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "text", "empty"])
def test_a_damaged_sample_is_counted_whatever_its_damage(tmp_path, kind, damage):
    damaged = garbled(kind)[damage]
    tar = reinforced(
        tmp_path / "dr0.tar",
        range(110),
        kind,
        change=lambda i, name, content: damaged(content) if (i, name) == (0, kind) else content,
    )
    made = build(tmp_path, dataset(tar))  # and the first sample does not tell the width
    assert len(made.rows) == 109 and made.rows.shape[2] == 6
    (said,) = made.manifest["skipped"]
    assert said.startswith(f"{tar}: sample 'u0' has an unreadable {kind} (") and "\n" not in said


@pytest.mark.parametrize(
    ("member", "content", "says"),
    [
        (
            "paug.json",
            b'{"param_aug": [[[1, 2, 30, 30], [[14, 0.5]]]]}',
            "has operation 14, and RandAugment has 14",
        ),
        (
            "paug.json",
            b'{"param_aug": [[[1, 2, 30, 30], [[-1, 0.5]]]]}',
            "has operation -1, and RandAugment has 14",
        ),
        ("syn.json", b"[]", "has a syn.json that is no mapping"),
        ("npz", None, "has no npz or pth.gz"),
    ],
)
def test_a_sample_that_says_something_else_is_counted(tmp_path, member, content, says):
    tar = reinforced(
        tmp_path / "dr0.tar",
        range(110),
        change=lambda i, name, whole: content if (i, name) == (0, member) else whole,
    )
    assert build(tmp_path, dataset(tar)).manifest["skipped"] == [f"{tar}: sample 'u0' {says}"]


def test_damaged_shards_are_named(tmp_path):
    tar = reinforced(tmp_path / "dr0.tar", range(6))
    data, whole = dataset(tar), tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        EdgeclipError,
        match=r"dr0.tar: not a readable WebDataset shard \(.*\); replace or remove it",
    ):
        build(tmp_path, data)
    tar.write_bytes(b"no tar at all" * 100)
    with pytest.raises(EdgeclipError, match=r"dr0.tar: not a readable WebDataset shard"):
        build(tmp_path, data)
    reinforced(tar, [0, 1, 2, 0])
    with pytest.raises(EdgeclipError, match=r"has two samples 'u0'"):
        build(tmp_path, data)
    reinforced(tar, range(40, 60))
    with pytest.raises(EdgeclipError, match="has no sample of any image of the data"):
        build(tmp_path, data)
    reinforced(tar, range(6), change=lambda i, name, content: content)
    with pytest.raises(
        EdgeclipError, match=r"teacher.columns: \[0, 12\] does not lie within the 10 columns"
    ):
        build(tmp_path, data, columns=(0, 12))
    with pytest.raises(EdgeclipError, match=r"no shard matches"):
        teachers.load(R.Reinforced(root=str(tmp_path), shards="none*.tar"))
    with pytest.raises(EdgeclipError, match=r"is no glob below"):
        teachers.load(R.Reinforced(root=str(tmp_path), shards=f"{tmp_path}/*.tar"))
    reinforced(tar, range(3), change=lambda i, name, content: None if name == "npz" else content)
    with pytest.raises(EdgeclipError, match=r"dr0.tar: has no whole reinforced sample"):
        teachers.load(R.Reinforced(root=str(tmp_path), shards="dr*.tar"))


RECIPE = """
data: {kind: webdataset, name: dr, root: data, train: "*.tar", test: null, classes: null}
evaluation_data: {kind: folders, name: shop, root: shop, test_fraction: 0.9}
teacher: {kind: reinforced, root: data, columns: [0, 6], class_features: first.npy}
other_teachers: [{kind: reinforced, root: data, columns: [6, 10], class_features: second.npy, logit_scale: 60}]
student: {tower: {kind: timm, model: mobilenetv4_conv_small_035, weights: random, image_size: 32}, projector_hidden: null}
losses: {distribution: {weight: 1}, affinity: {weight: 1}, feature: {weight: 1}}
train: {epochs: 1, batch_size: 4, device: cpu}
text_encoder: false
"""


def test_a_student_learns_from_both_teachers(here):
    (here / "data").mkdir()
    reinforced(here / "data" / "0.tar", range(9))
    for c in range(2):
        (here / "shop" / f"class {c}").mkdir(parents=True)
        for i in range(12):
            (here / "shop" / f"class {c}" / f"{i}.png").write_bytes(encoded(toy_image(100 * c + i)))
    for name, width in (("first", 6), ("second", 4)):
        np.save(
            here / f"{name}.npy",
            np.random.default_rng(0).normal(size=(2, width)).astype(np.float32),
        )
    result = run("distill", write(here, RECIPE), "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert {"distribution", "affinity", "feature"} <= json.loads(result.stdout)["log"][-1].keys()
    found = json.loads(run("cache", "build", write(here, RECIPE), "--json").stdout)
    assert [(c["images"], c["views"], c["width"], c["captions"]) for c in found] == [
        (9, K, 6, 3),
        (9, K, 4, 3),
    ]
    mistake(
        "cache",
        "build",
        write(here, RECIPE),
        "--out",
        "x",
        says="--out x: is one folder, and the recipe needs several caches",
    )


def test_a_students_text_tower_reads_the_caption_whose_features_the_view_has(tmp_path):
    """Caption by caption the ids lie beside the teacher's features of the same words."""
    made = build(
        tmp_path,
        dataset(reinforced(tmp_path / "dr0.tar", [4, 1]), reinforced(tmp_path / "dr1.tar", [7])),
    )
    text = teachers.TextTower(module=torch.nn.Identity(), **clips()._asdict(), context_length=16)
    found = texts(
        text, teachers.load(R.Reinforced(root=str(tmp_path), shards="dr*.tar")), made, [], ()
    )
    said = [[f"caption {i}", *(f"synthetic {i} {c}" for c in range(SYNTHETIC))] for i in (4, 1, 7)]
    assert (
        found.captions.shape == (3, 1 + SYNTHETIC, 16)
        and made.caption_features.shape[:2] == found.captions.shape[:2]
    )
    for i, words in enumerate(said):
        assert torch.equal(found.captions[i], token_ids(text, words))
