"""The teacher cache is reproducible, is found by what decides it, and replays the views that it
stores.
"""

import random
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip.device.preprocess import normalize
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache
from edgeclip.host.cache import building
from edgeclip.host.recipe import Views
from tests.support.files import snapshot
from tests.support.images import toy_image, truncated_jpeg
from tests.support.toy_cache import SPEC, D, Tower, build, dataset, encode_text, teacher

SIZES = [(100, 60), (60, 100), (33, 33), (500, 20), (7, 90)]


@pytest.mark.parametrize("size", SIZES)
def test_every_view_lies_inside_the_image(size):
    spec = Views(count=50, scale=(0.1, 1.0), ratio=(0.5, 2.0))
    left, top, width, height, flip = cache.draw_views(*size, spec, random.Random(0)).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (width > 0).all()
    assert (height > 0).all()
    assert (left + width <= size[0] * (1 + 1e-6)).all() and (
        top + height <= size[1] * (1 + 1e-6)
    ).all()
    assert set(flip) <= {0, 1} and 5 < flip.sum() < 45


def test_areas_and_ratios_are_those_asked_for():
    views = cache.draw_views(
        100, 100, Views(count=300, scale=(0.3, 0.6), ratio=(0.9, 1.1)), random.Random(0)
    )[1:]
    area, ratio = views[:, 2] * views[:, 3] / 1e4, views[:, 2] / views[:, 3]
    assert (views[:, :4] % 1 == 0).all()  # so the rest is within half a pixel of 55 on either side
    assert 0.29 <= area.min() < 0.32
    assert 0.58 < area.max() <= 0.61
    assert 0.88 <= ratio.min()
    assert ratio.max() <= 1.12


@pytest.mark.parametrize("size", SIZES)
def test_view_0_is_the_center_square(size):
    side = min(size)
    assert cache.draw_views(*size, Views(count=2), random.Random(7))[0].tolist() == [
        round((size[0] - side) / 2),
        round((size[1] - side) / 2),
        side,
        side,
        0,
    ]


def test_replaying_view_0_is_resizing_the_center_square():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    spec = msgspec.structs.replace(SPEC, size=15)
    found = cache.apply_view(image, cache.draw_views(100, 60, Views(), random.Random(0))[0], spec)
    expected = np.asarray(image.crop((20, 0, 80, 60)).resize((15, 15), Image.Resampling.BICUBIC))
    assert (
        found[:, 3:-3] == expected[:, 3:-3]
    ).all()  # at its rim the filter may look beyond the box
    square = toy_image(3, 40, 40)
    assert (
        cache.apply_view(square, np.array([0, 0, 40, 40, 0]), SPEC)
        == np.asarray(square.resize((8, 8), Image.Resampling.BICUBIC))
    ).all()


def test_a_flipped_view_is_the_mirror_of_the_plain_one():
    image, box = toy_image(1, 50, 30), [3.5, 2.0, 20.25, 17.0]
    plain, flipped = (cache.apply_view(image, np.array([*box, f]), SPEC) for f in (0, 1))
    assert (flipped == plain[:, ::-1]).all() and (flipped != plain).any()


def test_rows_are_the_towers_answers_to_the_stored_views(tmp_path, folder):
    made = build(tmp_path, dataset(folder))
    assert made.rows.shape == (12, 3, D) and made.rows.first.dtype == np.float16
    for i in (0, 7):
        with Image.open(made.images[i].path) as image:
            pixels = np.stack(
                [cache.apply_view(image.convert("RGB"), v, SPEC) for v in made.views[i]]
            )
        expected = Tower()(torch.from_numpy(normalize(pixels, SPEC))).numpy()
        np.testing.assert_allclose(made.rows[i], expected, atol=1e-3)


def test_class_features_are_the_ensemble_over_templates(tmp_path, folder):
    made = build(tmp_path, dataset(folder))
    mean = encode_text(["a a dog", "the a dog"]).mean(dim=0)
    np.testing.assert_allclose(made.class_features[1], mean / mean.norm(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(made.class_features, axis=1), 1, atol=1e-6)


def test_without_classes_there_are_no_class_features(tmp_path, folder):
    assert build(tmp_path, dataset(folder, ())).class_features.shape == (0, D)


def test_captions_are_encoded_where_a_loss_needs_them(tmp_path, folder):
    assert build(tmp_path, dataset(folder)).caption_features is None
    made = build(tmp_path, dataset(folder), captions=True)
    np.testing.assert_allclose(
        made.caption_features[:][:, 0], encode_text([p.caption for p in made.images]), atol=1e-3
    )


def test_the_same_ingredients_give_the_same_bytes_wherever_they_lie(tmp_path, folder):
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    first, second = build(tmp_path / "a", dataset(folder)), build(tmp_path / "b", dataset(moved))
    assert first.folder.name == second.folder.name and snapshot(first.folder) == snapshot(
        second.folder
    )


def test_a_finished_cache_is_used_again(tmp_path, folder):
    first = build(tmp_path, dataset(folder))
    before = (first.folder / "img_emb" / "img_emb_0.npy").stat().st_mtime_ns
    again = build(tmp_path, dataset(folder))
    assert (
        again.folder == first.folder
        and (first.folder / "img_emb" / "img_emb_0.npy").stat().st_mtime_ns == before
    )


def test_whatever_decides_the_rows_decides_the_folder(tmp_path, folder):
    data = dataset(folder)
    names = {
        build(tmp_path, data).folder.name,
        build(tmp_path, data, seed=1).folder.name,
        build(tmp_path, data, views=Views(count=2)).folder.name,
        build(tmp_path, data, views=Views(count=3, flip=0.1)).folder.name,
        build(tmp_path, data, teacher(identity={"is": "another"})).folder.name,
        build(
            tmp_path, data, teacher(preprocess=msgspec.structs.replace(SPEC, mean=(0.4,) * 3))
        ).folder.name,
        build(
            tmp_path,
            data,
            teacher(preprocess=msgspec.structs.replace(SPEC, interpolation="bilinear")),
        ).folder.name,
        build(tmp_path, data, captions=True).folder.name,
        build(tmp_path, dataset(folder, ("cat", "dog"))).folder.name,
        build(tmp_path, data._replace(templates=("a {c}",))).folder.name,
        build(tmp_path, data._replace(train=data.train[1:])).folder.name,
    }
    assert len(names) == 11


def test_changed_captions_are_another_cache(tmp_path, folder):
    data = dataset(folder)
    other = data._replace(train=[p._replace(caption=p.caption.upper()) for p in data.train])
    first, second = build(tmp_path, data, captions=True), build(tmp_path, other, captions=True)
    np.testing.assert_allclose(
        second.caption_features[:][:, 0], encode_text([p.caption for p in other.train]), atol=1e-3
    )
    assert first.folder != second.folder


def test_a_changed_image_is_another_cache(tmp_path, folder):
    first = build(tmp_path, dataset(folder))
    toy_image(77, 20, 30).save(folder / "00.png")
    assert build(tmp_path, dataset(folder)).folder != first.folder


def test_one_unreadable_image_in_a_hundred_is_skipped_and_named(tmp_path, folder):
    for i in range(100):
        shutil.copy(folder / "00.png", folder / f"x{i:03d}.png")
    truncated_jpeg(folder / "half.jpg")
    made = build(tmp_path, dataset(folder))
    assert len(made.images) == len(made.rows) == len(made.views) == made.manifest["pictures"] == 112
    assert all(p.key != "half.jpg" for p in made.images)
    assert len(made.manifest["skipped"]) == 1 and "half.jpg" in made.manifest["skipped"][0]
    with Image.open(made.images[-1].path) as image:  # rows still belong to their images
        pixels = cache.apply_view(image.convert("RGB"), made.views[-1, 0], SPEC)[None]
    np.testing.assert_allclose(
        made.rows[-1, 0], Tower()(torch.from_numpy(normalize(pixels, SPEC)))[0], atol=1e-3
    )


def test_more_than_one_percent_unreadable_is_refused_and_nothing_is_left(tmp_path, folder):
    truncated_jpeg(folder / "half.jpg")
    with pytest.raises(EdgeclipError, match=r"1 of 13 images are unreadable.*half\.jpg"):
        build(tmp_path, dataset(folder))
    assert snapshot(tmp_path / "cache") == {} if (tmp_path / "cache").exists() else True


def test_no_image_at_all_is_a_users_error(tmp_path, folder):
    with pytest.raises(EdgeclipError, match="no images to train on"):
        build(tmp_path, dataset(folder)._replace(train=[]))


def test_the_name_of_a_cache_is_what_edgeclip_0_1_gave_it(folder):
    """An identity's words never change: a recipe of 0.1 finds the cache that it made."""
    cpu = torch.device("cpu")
    t = teacher(identity={"kind": "toy", "seed": 7})
    data = dataset(folder)
    ingredients = cache.Ingredients(t, t.tower, data, Views(count=3), 5, True, cpu, 2)
    description = building.describe(ingredients)
    assert description["pictures"] == 12
    assert set(description) == {
        "captions",
        "classes",
        "data",
        "format",
        "pictures",
        "preprocess",
        "seed",
        "teacher",
        "templates",
        "views",
    }
