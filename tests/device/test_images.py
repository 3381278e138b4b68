"""Images keep their bytes, their order and their names, and unreadable ones are counted."""

import tarfile
import threading
import time

import numpy as np
import pytest

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import (
    ImageRef,
    index_folder,
    index_tar,
    read,
    refuse_unreadable,
    stream,
)
from edgeclip.errors import EdgeclipError
from tests.support.images import add_member, encoded, toy_image


def test_a_tar_comes_back_with_bytes_labels_and_captions(tmp_path):
    contents = [encoded(toy_image(i)) for i in range(5)]
    with tarfile.open(tmp_path / "3.tar", "w") as tar:
        for i, content in enumerate(contents):
            add_member(tar, f"{i:04d}.txt", f" caption {i}, ä\n".encode())
            add_member(tar, f"{i:04d}.png", content)
            add_member(tar, f"{i:04d}.cls", str(10 * i).encode())
        add_member(tar, "0009.json", b"{}")
    images = index_tar(tmp_path / "3.tar")
    assert [read(p) for p in images] == contents
    assert [(p.key, p.label, p.caption) for p in images] == [
        (f"3/{i:04d}", 10 * i, f"caption {i}, ä") for i in range(5)
    ]


def test_a_image_without_label_and_caption_says_so(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_member(tar, "a/b.v2.JPG", b"x")
        add_member(tar, "a/c.jpg", b"y")
    assert [(p.label, p.caption) for p in index_tar(tmp_path / "0.tar")][-1] == (-1, "")


def test_a_folder_with_dots_is_no_end_of_a_key(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in (
            "./1.png",
            "v1.0/1.png",
            "v1.0/2.x.txt",
            "v1.0/2.png",
            "v1.0/._2.png",
            ".png",
        ):
            add_member(tar, name, name.encode())
    found = index_tar(tmp_path / "0.tar")
    assert {p.key: read(p).decode() for p in found} == {
        "0/1": "./1.png",
        "0/v1.0/1": "v1.0/1.png",
        "0/v1.0/2": "v1.0/2.png",
    }


@pytest.mark.parametrize("content", [b"no tar at all" * 100, b""])
def test_a_broken_shard_is_named(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(EdgeclipError, match=r"0\.tar"):
        if not index_tar(tmp_path / "0.tar"):
            raise EdgeclipError(tmp_path / "0.tar", "an empty shard has no images", "")


def test_a_shard_that_ends_too_early_is_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(3):
            add_member(tar, f"{i}.png", encoded(toy_image(i, 100, 100)))
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[:3000])
    with pytest.raises(EdgeclipError, match=r"0\.tar: not a readable WebDataset shard"):
        index_tar(tmp_path / "0.tar")


def test_a_label_that_is_no_number_and_a_missing_shard_are_users_errors(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_member(tar, "0.png", b"x")
        add_member(tar, "0.cls", b"cat")
    with pytest.raises(EdgeclipError, match=r"0\.tar \(0\.cls\): 'cat' is no class index"):
        index_tar(tmp_path / "0.tar")
    with pytest.raises(EdgeclipError, match="no such file"):
        index_tar(tmp_path / "1.tar")


def test_a_folder_is_indexed_in_order_and_only_its_images(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/notes.txt", "c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = index_folder(tmp_path)
    assert [p.key for p in found] == ["a/z.jpg", "b.PNG", "c.webp"] and [
        read(p) for p in found
    ] == [b"a/z.jpg", b"b.PNG", b"c.webp"]


def test_a_folder_that_is_called_like_a_image_is_none(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    (tmp_path / "a.jpg" / "b.png").write_bytes(b"x")
    assert [p.key for p in index_folder(tmp_path)] == ["a.jpg/b.png"]
    with pytest.raises(UnreadableImage, match=r"a.jpg \(k\): cannot be read \(Is a directory\)"):
        read(ImageRef("k", str(tmp_path / "a.jpg")))


def test_read_takes_its_part_of_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")
    assert (
        read(ImageRef("k", str(tmp_path / "f"), 3, 4)) == b"3456"
        and read(ImageRef("k", str(tmp_path / "f"))) == b"0123456789"
    )


def make(i):
    time.sleep(0.001 * (i * 7 % 5))  # finish out of order
    if i % 10 == 3:
        raise UnreadableImage(f"p{i}", "is broken", "mend it")
    return np.full((2, 2), i)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_stream_keeps_its_order_and_leaves_failures_out(threads):
    skipped: list[str] = []
    order = [*range(20, 40), *range(20)]
    batches = list(stream(order, make, 6, skipped, threads))
    expected = [i for i in order if i % 10 != 3]
    assert np.concatenate([i for i, _ in batches]).tolist() == expected
    assert np.concatenate([x for _, x in batches])[:, 0, 0].tolist() == expected
    assert [len(i) for i, _ in batches] == [6] * 6
    assert [s.split(":")[0] for s in skipped] == ["p23", "p33", "p3", "p13"]


def test_a_stream_ends_with_a_short_batch_even_when_the_last_image_fails():
    skipped: list[str] = []
    batches = list(stream([0, 1, 2, 3], make, 2, skipped))
    assert [i.tolist() for i, _ in batches] == [[0, 1], [2]] and len(skipped) == 1
    assert list(stream([], make, 2, skipped)) == [] == list(stream([3], make, 2, skipped))


def test_another_error_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(stream([1, 0], lambda i: np.array(1 // i), 1, []))


def test_an_abandoned_stream_leaves_no_thread():
    before = threading.active_count()
    batches = stream(range(1000), make, 4, [])
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_one_percent_unreadable_is_reported_and_more_is_refused():
    refuse_unreadable([], 0, "d")
    refuse_unreadable(["a"], 100, "d")
    with pytest.raises(
        EdgeclipError, match=r"d: 2 of 100 images are unreadable.*first: a: is broken"
    ):
        refuse_unreadable(["a: is broken", "b"], 100, "d")
