"""Data as people have them: nothing is lost in silence, and nothing that is no data is taken.

Which member of a shard belongs to which sample is webdataset's rule, and webdataset is asked.
"""

import collections
import gzip
import os
import random
import socket
import tarfile

import pytest
from PIL import features

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import (
    SUFFIXES,
    index_classes,
    index_folder,
    index_tar,
    read,
)
from edgeclip.device.preprocess import Preprocess, open_image
from edgeclip.errors import EdgeclipError
from edgeclip.host import data
from edgeclip.host import recipe as R
from edgeclip.host.data.starter import write_recipe
from tests.support.images import add_member, encoded, toy_image
from tests.support.optional import require
from tests.support.webdataset import webdataset

SPEC = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PNG = encoded(toy_image(0, 8, 8))


def tar_of(path, members):
    """members: (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add_member(tar, name, content)
    return path


def skipped_of(path):
    skipped = collections.Counter()
    images = index_tar(path, skipped)
    return images, dict(skipped)


# Members of shards -------------------------------------------------------------------------------

FOLDERS = ["./", "a/", "v1.0/", "a.b/c.d/", "x/../y/"]
STEMS = ["0", "1", "photo", "ø", "with space"]
DOTTED = ["jpg", "JPG", "Jpeg", "png", "webp", "2.jpg", "seg.png", "json", "txt", "cls", "tar.gz"]


def as_webdataset_reads(path):
    """{key: {suffix: content}} of the samples that webdataset finds in a shard."""
    wds = require("webdataset", "pip install 'edgeclip[dev]'")
    with path.open("rb") as file:
        members = wds.tariterators.tar_file_iterator(file)
        found = list(wds.tariterators.group_by_keys({**m, "__url__": ""} for m in members))
    return {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in found}


@pytest.mark.parametrize("seed", range(30))
def test_the_images_of_a_shard_are_those_that_webdataset_finds_in_open_clips_order(tmp_path, seed):
    rng = random.Random(seed)
    members = []
    for folder in rng.sample(FOLDERS, 3):
        for stem in rng.sample(STEMS, 3):
            for suffix in sorted(rng.sample(DOTTED, 4), key=str.lower):
                members.append(f"{folder}{stem}.{suffix}")
    members += ["__MACOSX/._0.jpg", "__meta__/0.jpg", "a/._0.jpg", "README", "a/.hidden"]
    once = {name.removeprefix("./").lower(): name for name in members}
    path = tar_of(
        tmp_path / "s.tar",
        [(n, b"0" if n.endswith(".cls") else n.encode()) for n in sorted(once.values())],
    )

    expected = {}
    without = 0
    for key, sample in as_webdataset_reads(path).items():
        if "__MACOSX" in key or key.endswith("/"):  # macOS's leavings, and a hidden file
            continue
        kinds = [kind for kind in ("jpg", "png", "jpeg", "webp") if kind in sample]
        if kinds:
            expected["s/" + key.removeprefix("./")] = sample[kinds[0]]
        else:
            without += 1
    images, skipped = skipped_of(path)
    assert {p.key: read(p) for p in images} == expected
    assert sum(skipped.values()) - skipped["without a suffix"] == without
    assert skipped["without a suffix"] == 1


def test_what_was_skipped_is_counted_by_cause_and_told_every_time(tmp_path, capsys):
    webdataset(tmp_path)
    rows = [(f"{i}.png", PNG) for i in range(4)]
    rows += [("x.2.jpg", PNG), ("x.2.txt", b"a cat"), ("y.3.jpg", PNG)]
    rows += [("only.json", b"{}"), ("only.txt", b"a cat"), ("drawing.svg", b"<svg/>")]
    rows += [("latin.png", PNG), ("latin.txt", "café".encode("latin-1")), ("README", b"x")]
    tar_of(tmp_path / "train" / "2.tar", rows)
    spec = R.WebDataset(name="w", root=str(tmp_path), classes=None, test=None)
    assert len(data.load(spec, tmp_path / "cache").train) == 4 + 3
    line = capsys.readouterr().err
    assert line.startswith(f"{tmp_path}/train/*.tar: 6 of 13 samples skipped: ")
    for cause in (
        "2 with a dot in the name before .jpg",
        "1 without an image (.json, .txt)",
        "1 without an image (.svg)",
        "1 with a caption that is not UTF-8",
        "1 without a suffix",
    ):
        assert cause in line
    (record,) = (tmp_path / "cache" / "index").glob("*.json")
    assert '"skipped"' in record.read_text()
    assert line.count("\n") == 1


def test_what_a_whole_shard_has_is_not_told(tmp_path, capsys):
    data.load(R.WebDataset(name="w", root=str(webdataset(tmp_path))), tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".JPG", ".Jpeg", ".bmp", ".GIF", ".tif", ".TIFF", ".jfif"])
def test_every_suffix_of_an_image_counts_in_any_case(tmp_path, suffix):
    tar_of(tmp_path / "0.tar", [(f"a{suffix}", PNG)])
    assert [p.key for p in index_tar(tmp_path / "0.tar")] == ["0/a"]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / f"a{suffix}").write_bytes(PNG)
    assert [p.key for p in index_folder(tmp_path / "f")] == [f"a{suffix}"]


def test_pillow_opens_every_suffix_by_itself(tmp_path):
    for suffix in SUFFIXES:
        if suffix == ".avif" and not features.check("avif"):
            continue
        toy_image(3, 16, 12).convert("1" if suffix == ".pbm" else "RGB").save(
            tmp_path / f"a{suffix}"
        )
        assert open_image(tmp_path / f"a{suffix}").size == (16, 12)


def test_a_mask_beside_a_photo_is_no_second_image(tmp_path):
    tar_of(tmp_path / "0.tar", [("a.seg.png", b"mask"), ("a.png", b"second"), ("a.jpg", b"photo")])
    images, skipped = skipped_of(tmp_path / "0.tar")
    assert [read(p) for p in images] == [b"photo"] and not skipped


def test_a_link_and_a_name_that_is_not_utf8_are_counted(tmp_path):
    with tarfile.open(
        tmp_path / "0.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        add_member(tar, "a.png", PNG)
        add_member(tar, "é.png", PNG)
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    images, skipped = skipped_of(tmp_path / "0.tar")
    assert [p.key for p in images] == ["0/a"]
    assert skipped == {
        "with a link, a device or a sparse file in place of an image": 1,
        "with a name that is not UTF-8": 1,
    }


@pytest.mark.parametrize("content", [b"cat", b"", b"1.0", b"-2", b"1_0", "٣".encode(), b"9" * 30])
def test_a_label_that_is_no_class_index_is_named(tmp_path, content):
    tar_of(tmp_path / "0.tar", [("a.png", PNG), ("a.cls", content)])
    with pytest.raises(EdgeclipError, match=r"0\.tar \(a\.cls\): .* is no class index; write"):
        index_tar(tmp_path / "0.tar")


@pytest.mark.parametrize(
    ("content", "label"), [(b"7\n", 7), (b"\xef\xbb\xbf7\r\n", 7), (b" 007 ", 7), (b"-1", -1)]
)
def test_a_label_is_read_whatever_wrote_it(tmp_path, content, label):
    tar_of(tmp_path / "0.tar", [("a.png", PNG), ("a.cls", content)])
    assert [p.label for p in index_tar(tmp_path / "0.tar")] == [label]


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("protocol", ["zero_shot", "base_to_novel"])
def test_a_label_beyond_the_class_list_is_named(tmp_path, part, protocol):
    webdataset(tmp_path)
    tar_of(tmp_path / part / "77.tar", [("a.png", PNG), ("a.cls", b"3")])
    with pytest.raises(EdgeclipError, match="'77/a' has class index 3, and there are 3 classes"):
        data.load(R.WebDataset(name="w", root=str(tmp_path), protocol=protocol), tmp_path)


def test_a_compressed_shard_is_told_how_to_be_decompressed(tmp_path):
    whole = tar_of(tmp_path / "0.tar", [("a.png", PNG)])
    packed = tmp_path / "1 2.tar"
    packed.write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(EdgeclipError, match=r"is compressed \(gzip\).*gzip -dc '.*1 2\.tar' >"):
        index_tar(packed)


def test_shards_without_any_image_are_refused(tmp_path):
    tar_of(tmp_path / "train" / "0.tar", [])
    tar_of(tmp_path / "train" / "1.tar", [("a.txt", b"a cat")])
    with pytest.raises(EdgeclipError, match=r"\*\.tar: has no image"):
        data.load(R.WebDataset(name="w", root=str(tmp_path), classes=None, test=None), tmp_path)


def test_one_key_in_two_shards_is_refused(tmp_path):
    for folder in "ab":
        tar_of(tmp_path / folder / "0.tar", [("x.png", PNG)])
    spec = R.WebDataset(name="w", root=str(tmp_path), classes=None, test=None, train="{a,b}/*.tar")
    with pytest.raises(EdgeclipError, match=r"1 image keys are not unique \(two shards are named"):
        data.load(spec, tmp_path)


# Folders -----------------------------------------------------------------------------------------

LEAVINGS = [
    "cat/._1.png",
    "cat/.DS_Store",
    "cat/Thumbs.db",
    "cat/desktop.ini",
    "cat/.ipynb_checkpoints/1-checkpoint.png",
    "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
    "cat/__MACOSX/._1.png",
    "__MACOSX/cat/._1.png",
    "@eaDir/x/1.jpg",
    ".ipynb_checkpoints/1.png",
    ".DS_Store",
    "._cat",
]


def two_classes(root):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.png").write_bytes(PNG)
    return root


def seen(root):
    """What each door finds in a folder of classes: {class: keys}, by every command alike."""
    by_class = {name: [p.key for p in found] for name, found in index_classes(root).items()}
    loaded = data.load(R.Folders(name="f", root=str(root), test_fraction=0.5), root.parent)
    keys = sorted(p.key for p in [*loaded.train, *(p for s in loaded.evaluation for p in s.images)])
    assert keys == sorted(f"{name}/{key}" for name, found in by_class.items() for key in found)
    assert loaded.classes == [name.replace("_", " ") for name in by_class]
    out = root.parent / f"{random.random()}.yaml"
    assert write_recipe(root, out)[1] == len(by_class)
    together = [p.key for p in index_folder(root)]
    assert sorted(together) == keys
    return by_class


def test_what_systems_leave_is_no_data_and_is_not_counted(tmp_path, capsys):
    root = two_classes(tmp_path / "photos")
    for name in LEAVINGS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    assert seen(root) == {name: ["0.png", "1.png", "2.png"] for name in ("cat", "dog")}
    assert capsys.readouterr().err == ""

    tar_of(tmp_path / "0.tar", [("cat/1.png", PNG), *((name, b"x") for name in LEAVINGS)])
    images, skipped = skipped_of(tmp_path / "0.tar")
    assert [p.key for p in images] == ["0/cat/1"] and not skipped


def test_other_files_are_counted_by_suffix(tmp_path, capsys):
    root = two_classes(tmp_path / "photos")
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/notes.txt", "dog/LICENSE", "stray.jpg"):
        (root / name).write_bytes(b"x")
    data.load(R.Folders(name="f", root=str(root)), tmp_path)
    line = capsys.readouterr().err
    assert line.startswith(f"{root}: 5 of 11 files skipped: 2 .heic, ")
    for cause in ("1 .txt", "1 without a suffix", "1 in no class folder"):
        assert cause in line
    data.load(R.Folders(name="f", root=str(root)), tmp_path)
    assert capsys.readouterr().err == "", "the same line twice"


def test_a_class_without_an_image_and_an_image_without_a_label_are_told(tmp_path, capsys):
    root = two_classes(tmp_path / "photos")
    (root / "fox").mkdir()
    (root / "fox" / "a.heic").write_bytes(b"x")
    data.load(R.Folders(name="f", root=str(root)), tmp_path)
    assert f"{root}: 1 of 3 classes have no image: fox\n" in capsys.readouterr().err

    webdataset(tmp_path / "w")
    tar_of(tmp_path / "w" / "train" / "9.tar", [("a.png", PNG)])
    data.load(R.WebDataset(name="w2", root=str(tmp_path / "w")), tmp_path)
    assert capsys.readouterr().err == "w2: 1 of 7 training images have no label\n"


def test_linked_folders_and_files_are_seen_alike(tmp_path):
    root = two_classes(tmp_path / "photos")
    elsewhere = tmp_path / "elsewhere"
    for name in ("fox", "more"):
        (elsewhere / name / "sub").mkdir(parents=True)
        (elsewhere / name / "sub" / "9.png").write_bytes(PNG)
    (root / "fox").symlink_to(elsewhere / "fox")
    (root / "cat" / "more").symlink_to(elsewhere / "more")
    (root / "cat" / "again").symlink_to(elsewhere / "more")
    (root / "dog" / "linked.png").symlink_to(elsewhere / "fox" / "sub" / "9.png")
    assert seen(root) == {
        "cat": ["0.png", "1.png", "2.png", "again/sub/9.png"],
        "dog": ["0.png", "1.png", "2.png", "linked.png"],
        "fox": ["sub/9.png"],
    }


def test_a_loop_of_links_ends(tmp_path):
    root = two_classes(tmp_path / "photos")
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "cat" / "up").symlink_to(root)
    (root / "all").symlink_to(tmp_path)
    (root / "dog" / "a").symlink_to(root / "dog" / "b")
    (root / "dog" / "b").symlink_to(root / "dog" / "a")
    expected = {name: ["0.png", "1.png", "2.png"] for name in ("cat", "dog")}
    assert seen(root) == expected


def test_one_folder_in_two_classes_is_refused(tmp_path):
    root = two_classes(tmp_path / "photos")
    (root / "kitten").symlink_to(root / "cat")
    for door in (
        lambda: index_classes(root),
        lambda: data.load(R.Folders(name="f", root=str(root)), tmp_path),
        lambda: write_recipe(root, tmp_path / "r.yaml"),
    ):
        with pytest.raises(
            EdgeclipError, match=r"is in two classes, 'cat' and 'kitten', by a link"
        ):
            door()


def test_a_pipe_is_not_waited_for_and_a_broken_link_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "s.jpg"))
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (image,) = index_folder(tmp_path)
    with pytest.raises(UnreadableImage, match=r"gone\.jpg.*there is no such file"):
        read(image)


def test_a_samples_members_may_lie_apart(tmp_path):
    """As `tar` without --sort=name writes them: all images, then all captions."""
    keys = [f"{i:04d}" for i in range(5)]
    images = [(f"{key}.png", PNG) for key in keys]
    captions = [(f"{key}.txt", f"caption {key}".encode()) for key in keys]
    tar_of(tmp_path / "a.tar", [*images, *reversed(captions)])
    found = index_tar(tmp_path / "a.tar")
    assert [(p.key, p.caption) for p in found] == [(f"a/{k}", f"caption {k}") for k in keys]


@pytest.mark.parametrize("name", ["[2024] a", "a*", "a?", "{a,b}", "100% #1", "a'b", "$HOME", "~"])
def test_no_name_of_a_folder_or_an_image_is_a_pattern(tmp_path, name):
    root = tmp_path / name
    for kind in (name, "other"):
        (root / kind).mkdir(parents=True)
        (root / kind / f"{name}.png").write_bytes(PNG)
    assert index_classes(root).keys() == {name, "other"}
    assert [read(image) for image in index_folder(root)] == [PNG, PNG]
    loaded = data.load(R.Folders(name="x", root=str(root), test_fraction=0.0), tmp_path)
    assert len(loaded.train) == 2
