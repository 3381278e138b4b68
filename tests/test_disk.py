"""What lies on disk is whole, or it is not there."""

import concurrent.futures
import gc
import json
import os
import time

import numpy as np
import pytest

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from tests.support.files import snapshot


def test_sha256_is_the_standards_of_abc(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert (
        disk.sha256(tmp_path / "f")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_equal_descriptions_share_a_fingerprint_and_others_do_not():
    assert disk.fingerprint({"a": 1, "b": [2, None]}) == disk.fingerprint({"b": [2, None], "a": 1})
    assert (
        len({disk.fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]})})
        == 5
    )


def test_json_and_arrays_come_back(tmp_path):
    disk.write_json(tmp_path / "deep" / "x.json", {"ä": [1, 2.5, None, True]})
    assert disk.read_json(tmp_path / "deep" / "x.json") == {"ä": [1, 2.5, None, True]}
    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    disk.write_array(tmp_path / "x.npy", x)
    back = disk.read_array(tmp_path / "x.npy")
    assert back.dtype == x.dtype and (back == x).all()


@pytest.fixture
def unlucky_collector():
    """Collect garbage all the time, and let another thread run at each: once in a day otherwise."""

    def yields(*_: object) -> None:
        time.sleep(0)

    before = gc.get_threshold()
    gc.callbacks.append(yields)
    gc.set_threshold(5)
    yield
    gc.set_threshold(*before)
    gc.callbacks.remove(yields)


def test_threads_read_arrays_side_by_side(tmp_path, unlucky_collector):
    rows = np.zeros(4, [("image", "<i8"), ("norm", "<f4", (3,)), ("view", "<f4", (3, 5))])
    disk.write_array(tmp_path / "rows.npy", rows)
    np.savez(tmp_path / "rows.npz", rows=rows)

    def read(_: int) -> bool:
        mapped = disk.read_array(tmp_path / "rows.npy", mmap_mode="r")
        kept = disk.read_arrays(tmp_path / "rows.npz")["rows"]
        return mapped.dtype == kept.dtype == rows.dtype

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(400)))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    disk.write_text(tmp_path / "f.txt", "old")
    with pytest.raises(ZeroDivisionError), disk.new_file(tmp_path / "f.txt") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert snapshot(tmp_path) == {"f.txt": b"old"}


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    box(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt), disk.new_folder(tmp_path / "box") as folder:
        (folder / "b").write_text("half")
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == before and before["box/b"] == b"b"


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    for name in ("first", "second"):
        with disk.new_folder(tmp_path / "box") as folder:
            assert list(folder.iterdir()) == []
            (folder / name).write_text(name)
            disk.write_manifest(folder, "parcel", {})
    assert snapshot(tmp_path).keys() == {"box", "box/second", f"box/{disk.MANIFEST}"}


@pytest.mark.parametrize("there", ["a file", "somebody's folder", "a letter"])
def test_what_is_not_of_the_same_kind_is_not_replaced(tmp_path, there):
    if there == "a file":
        (tmp_path / "box").write_text("thesis")
    else:
        (tmp_path / "box").mkdir()
        (tmp_path / "box" / "thesis.txt").write_text("thesis")
    if there == "a letter":
        disk.write_manifest(tmp_path / "box", "letter", {})
    before = snapshot(tmp_path)
    with (
        pytest.raises(EdgeclipError, match="lies there already, and is not replaced"),
        disk.new_folder(tmp_path / "box") as folder,
    ):
        disk.write_manifest(folder, "parcel", {})
    assert snapshot(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "box").mkdir()
    assert disk.read_manifest(box(tmp_path), "parcel")["weight"] == 3


def test_an_unfinished_folder_is_not_visible_under_its_name(tmp_path):
    with disk.new_folder(tmp_path / "box") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "box").exists()
    assert (tmp_path / "box" / "a").read_text() == "a"


def box(tmp_path):
    with disk.new_folder(tmp_path / "box") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"abc")
        (folder / "b").write_bytes(b"b")
        disk.write_manifest(folder, "parcel", {"weight": 3})
    return tmp_path / "box"


def test_a_manifest_names_every_file_and_verifies(tmp_path):
    manifest = disk.read_manifest(box(tmp_path), "parcel")
    assert manifest["kind"] == "parcel"
    assert manifest["weight"] == 3
    assert set(manifest["files"]) == {"b", os.path.join("sub", "a")}
    disk.verify(tmp_path / "box", manifest)


def test_every_changed_and_missing_file_is_named_in_one_error(tmp_path):
    folder = box(tmp_path)
    (folder / "sub" / "a").write_bytes(b"abd")
    (folder / "b").unlink()
    with pytest.raises(EdgeclipError, match=r"(?=.*sub/a was changed)(?=.*b is missing)"):
        disk.verify(folder, disk.read_manifest(folder, "parcel"))


def test_a_manifest_that_points_outside_is_refused(tmp_path):
    folder = box(tmp_path)
    (tmp_path / "secret").write_bytes(b"s")
    manifest = disk.read_manifest(folder, "parcel")
    manifest["files"] = {"../secret": disk.sha256(tmp_path / "secret")}
    with pytest.raises(EdgeclipError, match="outside"):
        disk.verify(folder, manifest)


def test_another_kind_a_missing_manifest_and_a_missing_folder_are_errors(tmp_path):
    folder = box(tmp_path)
    with pytest.raises(EdgeclipError, match="is not a bundle"):
        disk.read_manifest(folder, "bundle")
    (folder / disk.MANIFEST).write_text(json.dumps([1]))
    with pytest.raises(EdgeclipError, match="is not a parcel"):
        disk.read_manifest(folder, "parcel")
    (folder / disk.MANIFEST).unlink()
    with pytest.raises(EdgeclipError, match="no finished parcel"):
        disk.read_manifest(folder, "parcel")
    with pytest.raises(EdgeclipError, match="no such folder"):
        disk.read_manifest(tmp_path / "nothing", "parcel")


def test_broken_json_is_a_users_error(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(EdgeclipError, match="not valid JSON"):
        disk.read_json(tmp_path / "x.json")
    with pytest.raises(EdgeclipError, match="no such file"):
        disk.read_json(tmp_path / "y.json")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, (4)), '''}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616,), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        b"(" * 3000,
        b"\xff" * 90,
    ],
)
def test_an_array_whose_header_lies_is_an_error_of_value(tmp_path, header):
    header = header.ljust(118) + b"\n"
    start = b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little")
    (tmp_path / "x.npy").write_bytes(start + header + bytes(64))
    for mode in (None, "r"):
        with pytest.raises((ValueError, OSError, EOFError)):
            disk.read_array(tmp_path / "x.npy", mode)
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises((ValueError, OSError, EOFError)):
        disk.read_arrays(tmp_path / "x.npz")


def test_an_error_reads_where_what_what_to_do():
    assert str(EdgeclipError("file", "is broken", "mend it")) == "file: is broken; mend it"
