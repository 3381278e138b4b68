"""Building a cache survives what happens in weeks of it: a kill, a full disk, a second process, a
changed mind.
"""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache
from edgeclip.host.cache import assemble, live
from edgeclip.host.recipe import Views
from tests.support.files import snapshot
from tests.support.images import encoded, toy_image
from tests.support.toy_cache import build, dataset, teacher


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(live, "SHARD_IMAGES", (4, 4))


def partial(tmp_path):
    (found,) = (tmp_path / "cache").glob(".*.partial")
    return found


def finished(tmp_path):
    return sorted(p.name for p in (partial(tmp_path) / "shards").glob("*.json"))


class Stop(Exception):
    pass


def stopping_after(count, monkeypatch):
    """A build that dies when the next shard is to be written."""
    write, done = live.write_shard, []

    def until(*arguments):
        if len(done) == count:
            raise Stop
        done.append(1)
        write(*arguments)

    monkeypatch.setattr(live, "write_shard", until)
    return done


def test_shards_make_one_array(tmp_path, folder):
    parts = build(tmp_path, dataset(folder))
    assert len(parts.manifest["shards"]) == 3
    every = np.arange(12)
    for key in (slice(None), every[::-1], np.array([11, 0, 5, 5]), np.array([], int), 7):
        index = every[key] if isinstance(key, slice) else key
        assert (parts.rows[key] == parts.rows[slice(None)][index]).all()
        assert (parts.views[key] == parts.views[slice(None)][index]).all()
    index, view = np.array([3, 11, 4, 0]), np.array([0, 2, 1, 0])
    assert (
        parts.rows[index, view]
        == np.stack([parts.rows[int(i)][v] for i, v in zip(index, view, strict=True)])
    ).all()
    assert [p.key for p in parts.images] == sorted(p.name for p in folder.iterdir())


def test_rows_are_unit_and_their_norms_lie_beside(tmp_path, folder):
    made = build(tmp_path, dataset(folder))
    unit = made.rows.unit(np.arange(12), np.full(12, 1)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(
        unit * made.rows.norms[np.arange(12), 1][:, None], made.rows[np.arange(12), 1], atol=1e-6
    )


def test_an_interrupted_build_goes_on_at_its_first_unfinished_shard(tmp_path, folder, monkeypatch):
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        with pytest.raises(Stop):
            build(tmp_path, dataset(folder))
    assert finished(tmp_path) == ["0.json", "1.json"] and not list(
        (tmp_path / "cache").glob("*/manifest.json")
    )
    made = stopping_after(1, monkeypatch)
    resumed, fresh = build(tmp_path, dataset(folder)), None
    assert len(made) == 1
    monkeypatch.undo()
    monkeypatch.setattr(live, "SHARD_IMAGES", (4, 4))
    fresh = build(tmp_path / "fresh", dataset(folder))
    assert snapshot(resumed.folder) == snapshot(fresh.folder) and [
        p.name for p in (tmp_path / "cache").iterdir()
    ] == [fresh.folder.name]


def test_what_was_damaged_meanwhile_is_made_anew(tmp_path, folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        with pytest.raises(Stop):
            build(tmp_path, dataset(folder))
    file = partial(tmp_path) / "img_emb" / "img_emb_1.npy"
    file.write_bytes(file.read_bytes()[:-2] + b"xx")
    (partial(tmp_path) / "records" / "records_0.npy").unlink()
    resumed = build(tmp_path, dataset(folder))
    said = capsys.readouterr().err
    assert "shard 1 of 3 is made again" in said
    assert "records_0.npy is missing" in said
    assert "img_emb_1.npy was changed" in said
    assert snapshot(resumed.folder) == snapshot(build(tmp_path / "fresh", dataset(folder)).folder)


def test_a_killed_process_leaves_a_build_that_goes_on(tmp_path, folder, monkeypatch):
    """SIGKILL in the middle of a shard: no lock, no half shard is left in the way."""
    slow = live._rows

    def killed(job, pixels, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return slow(job, pixels)

    if (pid := os.fork()) == 0:
        torch.set_num_threads(1)
        live._rows = killed
        build(tmp_path, dataset(folder))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert finished(tmp_path) == ["0.json"]
    assert snapshot(build(tmp_path, dataset(folder)).folder) == snapshot(
        build(tmp_path / "fresh", dataset(folder)).folder
    )


def test_a_disk_that_fills_up_keeps_the_shards_before_and_says_how_to_go_on(
    tmp_path, folder, monkeypatch
):
    """A real limit: the kernel refuses to write beyond it in the middle of a shard's file, as a
    full disk does.
    """
    write, limits = disk.write_array, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path, array):
        if path.name == "img_emb_1.npy":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            write(path, array)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_array", limited)
        with pytest.raises(
            EdgeclipError,
            match=r"shard 2 of 3 could not be written .*; free some disk and run the same command",
        ) as e:
            build(tmp_path, dataset(folder))
    assert e.value.__cause__.errno in (errno.EFBIG, None) and finished(tmp_path) == ["0.json"]
    assert not list(partial(tmp_path).rglob(".img_emb*")) and not list(
        partial(tmp_path).rglob("img_emb_1.npy")
    )
    assert snapshot(build(tmp_path, dataset(folder)).folder) == snapshot(
        build(tmp_path / "fresh", dataset(folder)).folder
    )


def test_a_cache_that_the_disk_cannot_hold_is_refused_before_it_starts(
    tmp_path, folder, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(EdgeclipError, match=r"needs .* more and the disk has .* free; free some"):
        build(tmp_path, dataset(folder))
    assert finished(tmp_path) == []


def test_two_processes_share_the_work_and_neither_corrupts(tmp_path, folder, capfd):
    """Both are started on the same cache at once; each shard is made by one of them, and both end
    with the whole.
    """
    rows, fork = live._rows, multiprocessing.get_context("fork")

    def start(i):
        torch.set_num_threads(1)
        live._rows = lambda job, pixels: (time.sleep(0.02), rows(job, pixels))[1]
        live.write_shard, write = (
            lambda *a: (print(f"process {i} made {a[1]}", flush=True), write(*a))[1],
            live.write_shard,
        )
        assert len(build(tmp_path, dataset(folder)).rows) == 12

    both = [fork.Process(target=start, args=(i,)) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0]
    made = [line.split()[-1] for line in capfd.readouterr().out.splitlines() if "made" in line]
    assert sorted(made) == ["0", "1", "2"]
    (found,) = (tmp_path / "cache").iterdir()
    assert snapshot(found) == snapshot(build(tmp_path / "fresh", dataset(folder)).folder)


def test_a_rank_starts_with_its_own_shards(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    order, write = [], live.write_shard
    monkeypatch.setattr(live, "write_shard", lambda *a: (order.append(a[1]), write(*a)))
    build(tmp_path, dataset(folder))
    assert order == [1, 0, 2]


def into(out, folder, t=None, views=Views(count=3), seed=0):  # noqa: B008
    """Build a cache of `folder`'s images in a folder of its own."""
    t = t or teacher()
    cpu = torch.device("cpu")
    ingredients = cache.Ingredients(t, t.tower, dataset(folder), views, seed, False, cpu, 2)
    return cache.build(out.parent / "cache", ingredients, out)


def test_another_cache_in_the_named_folder_is_refused_with_what_differs(tmp_path, folder):
    mine = tmp_path / "mine"
    made = into(mine, folder)
    assert into(mine, folder).folder == made.folder == mine
    before = snapshot(mine)
    with pytest.raises(
        EdgeclipError, match=r"is another teacher cache \(teacher.is was toy, now other\)"
    ):
        into(mine, folder, teacher(identity={"is": "other"}))
    with pytest.raises(EdgeclipError, match=r"seed was 0, now 1; views.count was 3, now 2"):
        into(mine, folder, seed=1, views=Views(count=2))
    assert snapshot(mine) == before


def test_a_changed_recipe_does_not_go_on_with_half_of_another_cache(tmp_path, folder, monkeypatch):
    mine = tmp_path / "mine"
    with monkeypatch.context() as patch:
        stopping_after(1, patch)
        with pytest.raises(Stop):
            into(mine, folder)
    with pytest.raises(
        EdgeclipError,
        match=r"\.mine\.partial: is another teacher cache \(views.flip was 0.5, now 0.25\); delete it",
    ):
        into(mine, folder, views=Views(count=3, flip=0.25))
    assert len(into(mine, folder).rows) == 12


def test_hours_of_a_teacher_are_not_spent_silently_on_a_changed_field(tmp_path, folder, capsys):
    build(tmp_path, dataset(folder))
    capsys.readouterr()
    build(tmp_path, dataset(folder), seed=3)
    assert "differs (seed was 0, now 3)" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["shorter", "missing", "unfinished", "old"])
def test_a_damaged_cache_is_refused_by_name(tmp_path, folder, damage):
    data, made = dataset(folder), build(tmp_path, dataset(folder))
    file = made.folder / "records" / "records_2.npy"
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[:-8])
        says = r"records_2.npy has \d+ bytes, and its index says \d+"
    elif damage == "missing":
        file.unlink()
        says = "records_2.npy is missing"
    elif damage == "unfinished":
        (made.folder / disk.MANIFEST).unlink()
        with pytest.raises(EdgeclipError, match="no finished teacher cache"):
            cache.open_folder(made.folder, data.train)
        return
    else:
        disk.write_json(
            made.folder / disk.MANIFEST,
            {
                k: v
                for k, v in made.manifest.items()
                if k not in ("format", "digest", "block_bytes")
            },
        )
        with pytest.raises(EdgeclipError, match="of an older edgeclip; delete it"):
            cache.open_folder(made.folder, data.train)
        return
    with pytest.raises(EdgeclipError, match=says):
        cache.open_folder(made.folder, data.train)


def test_stored_views_that_no_longer_give_their_rows_are_refused(tmp_path, folder, monkeypatch):
    """The images are repainted between the last shard and the replay."""
    finish = assemble._finish

    def repainted(*arguments):
        for i in range(12):
            path = folder / f"{i:02d}.png"
            size = path.stat().st_size
            content = encoded(toy_image(900 + i, 20 + i, 30 - i))
            path.write_bytes(content + b"\0" * max(0, size - len(content)))
        finish(*arguments)

    monkeypatch.setattr(assemble, "_finish", repainted)
    with pytest.raises(
        EdgeclipError, match=r"a stored view of 36 replayed gives another row \(cosine"
    ):
        build(tmp_path, dataset(folder))
    assert not list((tmp_path / "cache").iterdir())


def test_a_replay_that_is_not_a_number_is_refused(tmp_path, folder, monkeypatch):
    """The teacher's rows become NaN between the last shard and the replay."""
    finish, rows = assemble._finish, live._rows

    def spoilt(*arguments):
        monkeypatch.setattr(
            live, "_rows", lambda job, pixels: rows(job, pixels) * np.float32(np.nan)
        )
        finish(*arguments)

    monkeypatch.setattr(assemble, "_finish", spoilt)
    with pytest.raises(EdgeclipError, match=r"replayed gives another row \(cosine nan"):
        build(tmp_path, dataset(folder))
    assert not list((tmp_path / "cache").iterdir())


def test_inspect_says_what_is_inside(tmp_path, folder):
    from edgeclip.host.cache.inspect import inspect

    made = build(tmp_path, dataset(folder), captions=True)
    found = inspect(made.folder, verify=True)
    json.dumps(found)
    assert (
        found["images"],
        found["views"],
        found["width"],
        found["shards"],
        found["captions"],
        found["classes"],
    ) == (12, 3, 4, 3, 1, 2)
    assert found["replay"]["views"] == 36
    assert found["replay"]["cosine_min"] > 0.999
    assert found["unit_error"] < 1e-3
    file = made.folder / "more_views" / "more_views_0.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(EdgeclipError, match=r"more_views_0.npy was changed"):
        inspect(made.folder, verify=True)
