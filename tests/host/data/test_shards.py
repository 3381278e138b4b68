"""Shards by glob, range and command; an index that costs no memory; decoding no more of a JPEG than
a view needs."""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import ImageRef, index_tar, read
from edgeclip.device.preprocess import Preprocess, normalize
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, data
from edgeclip.host import recipe as R
from edgeclip.host.data.index import index
from edgeclip.host.data.shards import expand, find
from tests.support.files import snapshot
from tests.support.images import add_member, encoded, toy_image
from tests.support.webdataset import shard, webdataset


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(pattern, found):
    assert expand(pattern) == found


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..9999999999}.tar",
        "{0..1000000}.tar",
        "{0.." + "9" * 5000 + "}.tar",
        "{" + "0" * 5000 + "..9}.tar",
        "{0..9}" * 7,
        "{a,b}" * 40,
        "{" + "," * 1_000_001 + "}",
    ],
)
def test_braces_that_stand_for_too_many_are_one_line(pattern):
    with pytest.raises(EdgeclipError, match="stand for more than 1,000,000 shards") as e:
        expand(pattern)
    assert len(str(e.value)) < 400


def test_a_range_and_a_glob_find_the_same_shards_and_a_missing_one_is_named(tmp_path):
    webdataset(tmp_path)
    assert find(tmp_path, "train/{2,10}.tar", False, tmp_path) == find(
        tmp_path, "train/*.tar", False, tmp_path
    )
    with pytest.raises(EdgeclipError, match=r"train/3.tar: no shard matches"):
        find(tmp_path, "train/{2..3}.tar", False, tmp_path)
    with pytest.raises(EdgeclipError, match="runs backwards"):
        find(tmp_path, "train/{3..2}.tar", False, tmp_path)


def test_a_glob_is_relative_to_the_folder(tmp_path):
    webdataset(tmp_path)
    for glob in (f"{tmp_path}/train/*.tar", "**.tar"):
        with pytest.raises(
            EdgeclipError, match=r"tar: is no glob below .*; write it relative to that folder"
        ):
            find(tmp_path, glob, False, tmp_path)


def test_a_command_runs_only_where_the_recipe_allows_it_and_once(tmp_path):
    root = webdataset(tmp_path / "data")
    command = f"pipe:cat {root}/train/{{2,10}}.tar && echo x >> {tmp_path}/ran"
    spec = {"name": "w", "root": str(root), "train": command, "classes": "classnames.txt"}
    with pytest.raises(
        EdgeclipError, match="is a command, and the recipe does not allow commands; set pipe: true"
    ):
        data.load(R.WebDataset(**spec), tmp_path / "cache")
    assert not (tmp_path / "ran").exists()
    for _ in range(2):
        found = data.load(R.WebDataset(**spec, pipe=True), tmp_path / "cache")
        assert [p.caption for p in found.train] == ["a cat", "a dog", "a car"] * 2
        assert Image.open(io.BytesIO(read(found.train[4]))).size == (8, 8)
    assert (tmp_path / "ran").read_text() == "x\nx\n"


def test_a_command_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(EdgeclipError, match=r"pipe:cat nowhere.tar: failed with exit code 1"):
        find(tmp_path, "pipe:cat nowhere.tar", True, tmp_path / "cache")
    assert [p for p in snapshot(tmp_path) if p.endswith(".tar")] == []


def test_an_index_gives_what_the_shards_hold_and_is_made_once(tmp_path):
    shards = [tmp_path / f"{i}.tar" for i in range(3)]
    for i, path in enumerate(shards):
        shard(path, [(j, f"caption {i} {j}") for j in range(5)])
    expected, calls = [p for s in shards for p in index_tar(s)], []

    def reading(path):
        calls.append(path)
        return index_tar(path)

    for _ in range(2):
        found = index(shards, tmp_path / "cache", reading)
        assert len(found) == 15
        assert list(found) == expected == [found[i] for i in range(15)]
        assert found[-1] == expected[-1]
    assert calls == shards
    shard(shards[1], [(0, "another")])
    assert len(index(shards, tmp_path / "cache", reading)) == 11
    with pytest.raises(IndexError):
        found[15]


def test_what_a_killed_process_left_of_an_index_that_another_wrote_is_removed(tmp_path):
    path = tmp_path / "0.tar"
    shard(path, [(0, "a cat")])
    index([path], tmp_path / "cache", index_tar)
    (whole,) = (tmp_path / "cache" / "index").glob("*.json")
    before = snapshot(tmp_path)
    for suffix in (".json", ".arrow"):
        left = whole.with_name(f".{whole.stem}.0123456789abcdef{suffix}")
        left.write_bytes(b"half")
    assert len(index([path], tmp_path / "cache", index_tar)) == 1
    assert snapshot(tmp_path) == before


def test_an_index_of_0_1_is_made_again_and_gives_the_digests_that_caches_know(tmp_path):
    """It has not what shards are read for today; its facts, as 0.1 wrote them for this shard."""
    shard_path = tmp_path / "0.tar"
    shard_path.write_bytes(bytes(10240))
    os.utime(shard_path, (1, 1))
    images = [
        ImageRef("0/a", str(shard_path), 512, 7, 0, "a cat"),
        ImageRef("0/b", str(shard_path), 1536, 9, 1, "a dog"),
    ]
    of_0_1 = {
        "pictures": 2,
        "digests": [
            "df7f4080607534d21657ab168d9524845b27256c87b0f0beb1aa918ece9ac1d2",
            "1d0e0b04da123696a4ca81046a6c2f425874782313ffb8f3064b4da743380c3b",
        ],
        "shards": ["0.tar"],
    }
    (tmp_path / "index").mkdir()
    old = tmp_path / "index" / "799ab30c4ca516c8.json"
    old.write_text(json.dumps({**of_0_1, "pictures": 1}))
    found = index([shard_path], tmp_path, lambda _: images)
    assert list(found) == images
    (facts,) = set((tmp_path / "index").glob("*.json")) - {old}
    assert of_0_1.items() <= json.loads(facts.read_text()).items()

    again = index([shard_path], tmp_path, lambda _: pytest.fail("the index was made again"))
    assert list(again) == images
    assert again.digests == of_0_1["digests"]


def test_reading_an_index_takes_no_memory_that_grows_with_it(tmp_path):
    def peak(count):
        found = index(
            [tmp_path],
            tmp_path / str(count),
            lambda _: [
                ImageRef(f"{i:09d}", "", i, 1, -1, f"caption of number {i}") for i in range(count)
            ],
        )
        order = np.random.default_rng(0).integers(count, size=2000)
        tracemalloc.start()
        assert all(found[int(i)].offset == i for i in order)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(200_000) < 1.5 * peak(20_000) + 100_000


def test_two_images_of_one_key_are_refused(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        shard(tmp_path / folder / "0.tar", [(None, "x")])
    with pytest.raises(
        EdgeclipError,
        match=r"1 image keys are not unique \(two shards are named '0'\); rename the shards",
    ):
        index([tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"], tmp_path / "cache", index_tar)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgeclipError, match=r"^\.: 1 image keys"):
        index([Path("a/0.tar"), Path("b/0.tar")], tmp_path / "cache", index_tar)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for _ in range(2):
            add_member(tar, "same.png", encoded(toy_image(0)))
    with pytest.raises(
        EdgeclipError,
        match=r"0.tar: not a readable WebDataset shard \(two members are called 'same.png'\)",
    ):
        index_tar(tmp_path / "0.tar")


def test_a_tar_cut_between_members_or_damaged_inside_is_named(tmp_path):
    shard(tmp_path / "0.tar", [(0, "x"), (1, "y"), (2, "z")])
    whole = (tmp_path / "0.tar").read_bytes()
    second = index_tar(tmp_path / "0.tar")[1].offset - 512
    for broken in (whole[:second], whole[:second] + b"?" * 512 + whole[second + 512 :]):
        (tmp_path / "0.tar").write_bytes(broken)
        with pytest.raises(EdgeclipError, match=r"it was cut off, or is damaged in the middle"):
            index_tar(tmp_path / "0.tar")


def test_a_shard_that_became_shorter_than_its_index_is_an_unreadable_image(tmp_path):
    shard(tmp_path / "0.tar", [(0, "x"), (1, "y")])
    last = index_tar(tmp_path / "0.tar")[1]
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[: last.offset + 20])
    with pytest.raises(
        UnreadableImage, match=r"0.tar \(0/1\): the shard is shorter than its index says"
    ):
        read(last)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(UnreadableImage, match="there is no such file"):
        read(last)


def test_open_clips_csv_names_images_and_captions(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(toy_image(i)))
    (tmp_path / "train.csv").write_text(
        "filepath\ttitle\textra\n" + "".join(f"{i}.png\ta caption, {i}\tx\n" for i in range(3))
    )
    found = data.load(R.Csv(name="c", root=str(tmp_path)), tmp_path)
    rows = [(f"{i}.png", f"a caption, {i}") for i in range(3)]
    assert [(p.key, p.caption) for p in found.train] == rows
    assert read(found.train[2]) == encoded(toy_image(2))
    for content, says in (
        ("path\ttitle\n0.png\tx\n", "has no column 'filepath'"),
        ("filepath\ttitle\n0.png\tx\n0.png\ty\n", "lists '0.png' twice"),
        (
            "title\tfilepath\nx\t0.png\nonly a title\n",
            "train.csv: line 3: column 'filepath' is empty",
        ),
        ("filepath\ttitle\n9.png\tx\n", "lists '9.png', but there is no such file"),
    ):
        (tmp_path / "train.csv").write_text(content)
        with pytest.raises(EdgeclipError, match=says):
            data.load(R.Csv(name="c", root=str(tmp_path)), tmp_path)


# --- decoding

SPEC = Preprocess(size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    "view", [[0, 0, 0, 0, 0], [100, 50, 900, 800, 0], [333, 20, 200, 400, 1], [10, 10, 70, 64, 0]]
)
def test_a_view_of_a_scaled_jpeg_is_that_of_the_whole_one(view):
    content, view = encoded(toy_image(5, 1280, 960), "JPEG"), np.array(view, np.float32)
    whole = cache.apply_view(Image.open(io.BytesIO(content)).convert("RGB"), view, SPEC).astype(
        float
    )
    seen = cache.decode_view(content, view, SPEC, "x").astype(float)
    assert seen.shape == (64, 64, 3)
    assert np.abs(seen - whole).mean() < 1.0
    assert np.abs(seen - whole).max() < 12


def test_what_is_no_jpeg_or_no_larger_than_the_view_is_pils_within_a_level():
    view = np.array([3, 5, 60, 58, 1], np.float32)
    for content in (
        encoded(toy_image(5, 640, 480)),
        encoded(toy_image(5, 70, 66), "JPEG"),
        encoded(toy_image(5, 70, 66).convert("L"), "JPEG"),
    ):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        cut = cache.apply_view(
            image.crop((3, 5, 63, 63)), np.array([0, 0, 60, 58, 1], np.float32), SPEC
        )  # nothing beyond the box
        seen = cache.decode_view(content, view, SPEC, "x")
        assert np.abs(seen.astype(int) - cut).max() <= 1 and (seen == cut).mean() > 0.95
        between = view + np.array(
            [0.5, 0, 0, 0, 0], np.float32
        )  # a box between pixels is PIL's to cut
        assert (
            cache.decode_view(content, between, SPEC, "x") == cache.apply_view(image, between, SPEC)
        ).all()
    with pytest.raises(UnreadableImage, match="x: unreadable image"):
        cache.decode_view(encoded(toy_image(5, 640, 480), "JPEG")[:3000], view, SPEC, "x")


def test_normalizing_by_table_is_the_same_arithmetic():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)[:, :, ::-1]
    plain = (
        pixels.astype(np.float32) / np.float32(255) - np.asarray(SPEC.mean, np.float32)
    ) / np.asarray(SPEC.std, np.float32)
    assert (normalize(pixels, SPEC) == plain.transpose(0, 3, 1, 2)).all()
