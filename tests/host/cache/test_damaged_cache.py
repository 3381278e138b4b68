"""Damage of a cache is found before it becomes a number, whatever lies where, and what made the
cache makes it again: equal bytes, and nothing else is made.
"""

import io
import json
import os
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch

from edgeclip import disk
from edgeclip.device.images import index_tar
from edgeclip.host import blocks, cache, teachers
from edgeclip.host import recipe as R
from edgeclip.host.blocks import Checked, Damaged
from edgeclip.host.cache import checked, live
from edgeclip.host.cache.inspect import inspect
from edgeclip.host.data import Dataset
from edgeclip.host.data import index as indices
from edgeclip.host.data.index import BATCH, ImageIndex, index
from tests.support.bytes import DAMAGES
from tests.support.command import run
from tests.support.files import snapshot, write
from tests.support.images import add_member, encoded, toy_image
from tests.support.tiny_recipe import RECIPE
from tests.support.toy_cache import build, dataset
from tests.support.webdataset import shard, webdataset


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(live, "SHARD_IMAGES", (4, 4))


def reinforced(tmp_path):
    """The cache of two reinforced shards: two views and two captions of an image."""
    rng = np.random.default_rng(0)
    for number in range(2):
        with tarfile.open(tmp_path / f"dr{number}.tar", "w") as tar:
            for i in range(5):
                rows = io.BytesIO()
                np.savez(rows, image_emb=rng.normal(size=(2, 6)), text_emb=rng.normal(size=(2, 6)))
                view = [[1, 2, 20, 30], [[3, 12.0]]]
                members = {
                    "jpg": encoded(toy_image(i, 60, 50), "JPEG"),
                    "txt": b"its caption",
                    "paug.json": json.dumps({"param_aug": [view, view]}).encode(),
                    "syn.json": json.dumps({"syn_text": ["another"]}).encode(),
                    "npz": rows.getvalue(),
                }
                for name, content in members.items():
                    add_member(tar, f"u{number}{i}.{name}", content)
    return reinforced_again(tmp_path)


def reinforced_again(tmp_path):
    images = [ref for i in range(2) for ref in index_tar(tmp_path / f"dr{i}.tar")]
    data = Dataset("dr", "", [], (), [], images, [], [])
    teacher = teachers.load(R.Reinforced(root=str(tmp_path), shards="dr*.tar"))
    cpu = torch.device("cpu")
    return cache.build(
        tmp_path / "cache",
        cache.Ingredients(teacher, None, data, R.Views(), 0, True, cpu, 2),
    )


def live_cache(tmp_path):
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for i in range(12):
        if not (images / f"{i:02d}.png").exists():
            toy_image(i, 20 + i, 30 - i).save(images / f"{i:02d}.png")
    return build(tmp_path, dataset(images), captions=True)


MAKERS = {"live": (live_cache, live_cache), "reinforced": (reinforced, reinforced_again)}
"""how a cache is made, and made again of what lies there"""


@pytest.fixture
def made(tmp_path, folder):
    return build(tmp_path, dataset(folder), captions=True)


def files(folder):
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


def everything(opened):
    """All that anything takes from a cache."""
    every = np.arange(len(opened.rows))
    views = opened.rows.shape[1]
    found = [opened.rows[every, np.full(len(every), k)] for k in range(views)]
    found += [opened.views[:], opened.images.places[:], opened.class_features]
    found += [opened.rows.norms[:], opened.caption_features[:]]
    for i in range(len(opened.manifest["shards"])):
        opened.metadata.look_at_all(i)
    return [np.ascontiguousarray(array).tobytes() for array in found]


def places(size):
    """Where one byte, or a page, is damaged: first, in the middle, last."""
    return sorted({0, size // 3, size // 2, max(0, size - 1)})


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_damaged_is_never_read(tmp_path, kind, damage):
    """Refused by name, or without effect: whichever file of the cache, and wherever in it."""
    made = MAKERS[kind][0](tmp_path)
    expected = everything(cache.open_folder(made.folder, []))
    for file in files(made.folder):
        whole = file.read_bytes()
        for place in places(len(whole)):
            file.write_bytes(DAMAGES[damage](whole, place))
            if file.read_bytes() == whole:
                assert everything(cache.open_folder(made.folder, [])) == expected
                inspect(made.folder, verify=True)
                continue
            with pytest.raises(Damaged, match=rf"{file.name}.*run the command that made it again"):
                everything(cache.open_folder(made.folder, []))
            with pytest.raises(Damaged, match=file.name):
                inspect(made.folder, verify=True)
            file.write_bytes(whole)
            (made.folder / checked.NOTE).unlink(missing_ok=True)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", MAKERS)
def test_the_command_that_made_a_cache_makes_it_again(tmp_path, kind, damage):
    make, again = MAKERS[kind]
    made = make(tmp_path)
    expected = everything(made)
    before = snapshot(made.folder)
    for file in files(made.folder):
        whole = file.read_bytes()
        file.write_bytes(DAMAGES[damage](whole, len(whole) // 2))
        if file.read_bytes() == whole:
            continue
        found = None
        for _ in range(2):  # found when it is opened, or by a reader, who notes it
            try:
                found = everything(again(tmp_path))
                break
            except Damaged as e:
                assert file.name in str(e)
        assert found == expected, file
        assert snapshot(made.folder) == before
        assert os.listdir(tmp_path / "cache") == [made.folder.name]


def test_only_what_is_damaged_is_made_again(tmp_path, folder, made, monkeypatch, capsys):
    (made.folder / checked.name("img_emb", 1, 3)).unlink()
    write_shard, done = live.write_shard, []
    monkeypatch.setattr(live, "write_shard", lambda *a: (done.append(a[1]), write_shard(*a)))
    build(tmp_path, dataset(folder), captions=True)
    assert done == [1]
    said = capsys.readouterr().err
    assert "img_emb_1.npy is missing; it is verified whole now" in said
    assert "shard 2 of 3 is made again" in said


def test_what_a_reader_found_and_is_whole_again_is_kept(tmp_path, folder, made, monkeypatch):
    checked.note_damage(made.folder, 2)
    with pytest.raises(Damaged, match=r"shards \[2\] were found damaged"):
        cache.open_folder(made.folder, [])
    monkeypatch.setattr(live, "make", lambda *a: pytest.fail("a shard was made again"))
    assert len(build(tmp_path, dataset(folder), captions=True).rows) == 12
    assert not (made.folder / checked.NOTE).exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_growing_cache_that_was_damaged_goes_on(tmp_path, folder, made, monkeypatch, damage):
    """Whichever of its files it is: the end is the cache that was never interrupted."""
    expected = snapshot(made.folder)
    stop = live.write_shard

    def until(*arguments):
        if arguments[1] == 2:
            raise KeyboardInterrupt
        stop(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(live, "write_shard", until)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "half", dataset(folder), captions=True)
    (partial,) = (tmp_path / "half" / "cache").iterdir()
    grown = [p.relative_to(partial) for p in files(partial) if p.stat().st_size]
    assert len(grown) > 12
    for i, name in enumerate(grown):
        copy = tmp_path / str(i) / "cache" / partial.name
        shutil.copytree(partial, copy)
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(DAMAGES[damage](whole, len(whole) // 2))
        again = build(tmp_path / str(i), dataset(folder), captions=True)
        assert snapshot(again.folder) == expected, name
        assert os.listdir(tmp_path / str(i) / "cache") == [made.folder.name]


def older(made):
    """The cache as edgeclip wrote it before there were digests of blocks."""
    count = len(made.manifest["shards"])
    manifest = {k: v for k, v in made.manifest.items() if k not in ("digest", "block_bytes")}
    manifest["files"] = {f: d for f, d in manifest["files"].items() if not f.startswith("digests")}
    shards = []
    for shard_ in manifest["shards"]:
        sizes = {f: n for f, n in shard_["bytes"].items() if not f.startswith("digests")}
        shards.append({"rows": shard_["rows"], "bytes": sizes})
    manifest["shards"] = shards
    shutil.rmtree(made.folder / "digests")
    disk.write_json(made.folder / disk.MANIFEST, manifest)
    return count


def test_a_cache_without_digests_is_verified_whole_once(made, capsys):
    expected = everything(made)
    digests = snapshot(made.folder / "digests")
    older(made)
    assert everything(cache.open_folder(made.folder, [])) == expected
    assert "has no digests of blocks" in capsys.readouterr().err
    assert snapshot(made.folder / "digests") == digests
    assert everything(cache.open_folder(made.folder, [])) == expected
    assert "digests" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_cache_without_digests_is_found_and_mended(tmp_path, folder, made, damage):
    expected = everything(made)
    older(made)
    file = made.folder / checked.name("img_emb", 1, 3)
    file.write_bytes(DAMAGES[damage](file.read_bytes(), 140))
    with pytest.raises(Damaged, match=file.name):
        cache.open_folder(made.folder, [])
    assert everything(build(tmp_path, dataset(folder), captions=True)) == expected


# --- blocks


def test_every_row_of_files_of_many_blocks_is_compared_once(tmp_path):
    """Rows that end in the next block, and rows larger than a block: each needs all of its own."""
    rng = np.random.default_rng(0)
    for width in (1000, 3 * blocks.BLOCK + 17):
        rows = rng.integers(0, 256, (40, width), dtype=np.uint8)
        paths = []
        for i in range(2):
            paths.append(tmp_path / f"{width}.{i}")
            paths[i].write_bytes(b"header" + rows[20 * i : 20 * i + 20].tobytes())
        known = [blocks.digests(path)[0] for path in paths]
        asked = []

        def digests(file, a, b, known=known, asked=asked):
            asked.append((file, a, b))
            return known[file][a:b]

        sizes = [path.stat().st_size for path in paths]
        both = Checked(paths, sizes, digests, lambda file, why: Damaged(file, why, "do"))
        index = rng.integers(0, 20, 200)
        of = rng.integers(0, 2, 200)
        low = 6 + width * index
        both.look(of, low, low + width)
        count = len(asked)
        assert count
        both.look(of, low, low + width)
        assert len(asked) == count  # a second epoch hashes nothing
        for path in paths:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        fresh = Checked(paths, sizes, digests, lambda file, why: Damaged(file, why, "do"))
        for file in range(2):
            if blocks.count(sizes[file]) > 1:
                fresh.look_at(file, 0, 6)
            with pytest.raises(Damaged, match=f"^{file}: its bytes"):
                fresh.look_at(file, sizes[file] - width, sizes[file])


def test_threads_compare_as_one_does(made):
    opened = cache.open_folder(made.folder, [])
    expected = made.rows[np.arange(12)]
    found = [None] * 8

    def read(i):
        found[i] = opened.rows[np.arange(12)]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows in found:
        assert (rows == expected).all()


# --- the index of images


@pytest.fixture
def indexed(tmp_path):
    """A function that opens the index of a shard of three batches of images; and these."""
    tar = tmp_path / "0.tar"
    shard(tar, [(j, f"caption {j}") for j in range(5)])
    rows = index_tar(tar) * (BATCH // 2)
    images = [ref._replace(key=f"{i:06d}") for i, ref in enumerate(rows)]
    return lambda: index([tar], tmp_path, lambda path: images), images


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_again(tmp_path, indexed, damage):
    read, images = indexed
    assert list(read()) == images
    for file in files(tmp_path / "index"):
        whole = file.read_bytes()
        for place in places(len(whole)):
            file.write_bytes(DAMAGES[damage](whole, place))
            assert list(read()) == images
            assert file.read_bytes() == whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_batch_of_an_index_is_refused_when_it_is_read(
    tmp_path, indexed, monkeypatch, damage
):
    """Of an index that is too large to be read when it is opened."""
    read, images = indexed
    read()
    monkeypatch.setattr(indices, "AT_ONCE", 0)
    file = next(tmp_path.glob("index/*.arrow"))
    whole = file.read_bytes()
    for place in places(len(whole)):
        file.write_bytes(DAMAGES[damage](whole, place))
        with pytest.raises(Damaged, match=rf"{file.name}.*; run the same command again"):
            list(ImageIndex(file, [tmp_path / "0.tar"]))
        assert list(read()) == images
        assert file.read_bytes() == whole


# --- the commands


def test_commands_mend_a_damaged_cache_and_index(here):
    """One zeroed page once changed the student's accuracy, with exit 0."""
    webdataset(here / "data")
    spec = "{kind: webdataset, name: shop, root: data, train: train/*.tar, test: test/*.tar}"
    text = RECIPE.replace("{kind: folders, name: shop, root: ROOT}", spec)
    write(here, text)
    assert run("distill", "r.yaml", "--out", "first").exit_code == 0
    weights = snapshot(here / "first" / "student")
    for kind in ("img_emb", "records", "manifest", "class_features"):
        (folder,) = [p.parent for p in here.glob("cache/*/manifest.json")]
        before = snapshot(folder)
        file = next(p for p in files(folder) if p.name.startswith(kind))
        content = bytearray(file.read_bytes())
        content[-9:-4] = bytes(5)
        file.write_bytes(content)
        result = run("distill", "r.yaml", "--out", kind)
        if result.exit_code:
            assert file.name in result.stderr
            assert run("cache", "inspect", str(folder)).exit_code == 1
            result = run("distill", "r.yaml", "--out", kind)
        assert result.exit_code == 0, result.output
        assert "verified whole now" in result.stderr
        assert snapshot(folder) == before
        assert snapshot(here / kind / "student") == weights
    arrow = next(here.glob("cache/index/*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    result = run("distill", "r.yaml", "--out", "index")
    assert result.exit_code == 0, result.output
    assert "the index is made again" in result.stderr
    assert snapshot(here / "index" / "student") == weights
